"""From survey cutouts to a calibrated, registered ensemble that finds strong gravitational lenses.

Heavy imports stay lazy: ``import lens_pipeline`` is instant, and the names below import what they
need when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ensemble.lit_system": ["LitEnsembleSystem"],
        "models.system": ["LitLensSystem"],
        "shards.datamodule": ["LensDataModule", "LensWebDatasetDataModule"],
        "training.train": ["set_seed"],
    },
)
