"""What a registered ensemble carries, so that it scores where this package is not installed: the
code, the versions of the libraries, and what its input must be."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import SIGMA_UNITS
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.code_hashes import PACKAGE, source_hashes
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.models.names import network_libraries

MODEL_FILE = Path(__file__).with_name("pyfunc_model.py")
# What the carried modules import when they are loaded.
LIBRARIES = (
    *("astropy", "lazy-loader", "mlflow", "numpy", "pandas", "pytorch-lightning"),
    *("pydantic", "scipy", "torch", "torchmetrics", "torchvision"),
)


def copy_code(out: Path) -> Path:
    """The modules of this package that scoring arrays needs, as a package of its name in `out`."""
    installed = Path(__file__).parents[1]
    for module in source_hashes([f"{PACKAGE}.ensemble.{MODEL_FILE.stem}"]):
        file = Path(*module.split(".")[1:]).with_suffix(".py")
        for name in (file, *(folder / "__init__.py" for folder in file.parents)):
            target = out / PACKAGE / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(installed / name, target)
    return out / PACKAGE


def requirements(ensemble: LensEnsemble) -> list[str]:
    """Of pip, at the versions that are installed."""
    libraries = (*LIBRARIES, *further_libraries(ensemble))
    # Not which build for which accelerator, `+cu132`: an index has no such version.
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in libraries}
    return [f"{name}=={version}" for name, version in versions.items()]


def further_libraries(ensemble: LensEnsemble) -> list[str]:
    """Those that networks of the ensemble come from, and other ensembles may do without."""
    return network_libraries(str(system.hparams["arch"]) for system in ensemble.members.values())


def facts(ensemble: LensEnsemble) -> dict[str, Any]:
    """What the input must be, and what the output is of; the pixel scale is in arcsec/pixel."""
    form = ensemble.format
    return {
        "units": form.units,
        "bands": list(form.bands),
        "image_size": form.image_size,
        "pixel_scale": form.pixel_scale,
        "labels": ["non-lens", "lens"],  # of 0 and 1: scores are of the second
        "dataset_version": ensemble.facts["dataset_version"],
    }


def input_example(form: CutoutFormat) -> NDArray[np.float32]:
    """One cutout of nothing but noise, float32 (1, bands, height, width)."""
    noise = np.random.default_rng(0).standard_normal((1, *form.shape), dtype=np.float32)
    return noise if form.units == SIGMA_UNITS else np.clip(0.1 + 0.05 * noise, 0, 1)
