"""The ensemble: members' scores calibrated, fused, and uncertain where they should be."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "calibration": ["fit_calibration"],
        "choice": ["FittedFusion", "choose"],
        "fusion": ["Bayesian", "Fused", "InverseVariance", "Mean", "Single", "Stacking", "fuse"],
        "parts": ["score_to_file"],
        "predictor": ["score_catalogue", "score_dataset"],
        "score_files": ["about_scores"],
        "shard_cutouts": ["open_cutout_source"],
        "system": ["LensEnsemble", "assemble", "load_ensemble"],
    },
)
