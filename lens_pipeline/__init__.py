"""From survey cutouts to a calibrated, registered ensemble that finds strong gravitational lenses.

Heavy imports stay lazy: ``import lens_pipeline`` is instant, and the names below import what they
need when they are first used.
"""

import os

import lazy_loader

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing `typing` takes twice as long as all of this
    from typing import Any

# OpenMP reads it once, when PyTorch is loaded. By default its threads spin while they wait for each
# other, which is a little faster as long as nothing else runs; two trainings on the same cores, or
# a training and `predict`, then take many times as long as one after the other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_attached, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        *("catalogue", "ensemble", "evaluation", "models"),
        *("scoring", "shards", "simulation", "training"),
    ],
    submod_attrs={
        "ensemble.lit_system": ["LitEnsembleSystem"],
        "errors": ["InputError"],
        "models.system": ["LitLensSystem"],
        "shards.datamodule": ["LensDataModule", "LensWebDatasetDataModule"],
        "training.train": ["set_seed"],
    },
)


def __getattr__(name: str) -> "Any":
    if name != "__version__":
        return _attached(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lens-pipeline")
    except PackageNotFoundError:  # in a registered model, which carries the code alone
        raise AttributeError(f"No {__name__} attribute {name}") from None
