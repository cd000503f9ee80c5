"""The ensemble: members' scores calibrated, fused, and uncertain where they should be."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "assembly": ["assemble"],
        "calibration": ["fit_calibration"],
        "choice": ["FittedFusion", "choose"],
        "fusion": ["Bayesian", "Fused", "InverseVariance", "Mean", "Single", "Stacking", "fuse"],
        "system": ["LensEnsemble", "load_ensemble"],
    },
)
