"""Scores: of the cutouts of a survey in files, of a dataset, and what they are worth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["evaluate_ensemble"],
        "parts": ["score_to_file"],
        "predictor": ["score_catalogue", "score_dataset"],
        "score_files": ["about_scores"],
        "shard_cutouts": ["open_cutout_source"],
    },
)
