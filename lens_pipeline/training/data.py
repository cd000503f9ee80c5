"""The cutouts that a configuration names."""

from typing import Any

from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.shards.datamodule import CutoutModule, LensDataModule, LensWebDatasetDataModule
from lens_pipeline.training.config import TrainConfig


def data_module(config: TrainConfig, settings: Settings) -> CutoutModule:
    """settings: say where remote shards are kept, unless `data.cache_dir` does, and how stores are
    asked.

    Raises InputError where the cutouts are not whole, or `data` contradicts itself.
    """
    chosen = config.data
    urls = {name: getattr(chosen, name) for name in ("train_urls", "val_urls", "test_urls")}
    given = [name for name, url in urls.items() if url is not None]
    shared: dict[str, Any] = {
        "batch_size": config.training.batch_size,
        "num_workers": chosen.num_workers,
        "image_size": chosen.image_size,
        "seed": config.training.seed,
        "bagging": chosen.bagging,
        "cache_dir": chosen.cache_dir or settings.cache,
        "storage_options": settings.storage_options,
    }
    if not chosen.use_webdataset:
        if given:
            raise InputError(f"data.{given[0]}: is for WebDataset tars; set data.use_webdataset")
        return LensDataModule(chosen.data_root, **shared)
    if chosen.data_root is not None:
        raise InputError("data.data_root: goes without data.use_webdataset, which takes URLs")
    if urls["train_urls"] is None:
        raise InputError("data.train_urls: is needed with data.use_webdataset")
    return LensWebDatasetDataModule(**urls, **shared)
