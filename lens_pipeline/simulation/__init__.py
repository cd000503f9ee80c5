"""Simulated strong lenses and their look-alikes: surveys, population, rendering, catalogues."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["SimulationConfig", "load_config", "load_configs"],
        "surveys": ["DEFAULT_SURVEY", "SURVEYS", "Survey", "find_survey"],
        "simulate": ["Simulation", "simulate", "simulate_catalogue"],
    },
)
