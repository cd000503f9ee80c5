"""What scores are worth: metrics, gates, plots, reports. Pure functions of labels and scores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gates": ["GateDecision", "first_model_gate"],
        "metrics": ["lens_metrics", "roc"],
        "selection": ["forecast", "selection_function"],
    },
)
