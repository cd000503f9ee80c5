"""Cutout catalogues: tables, images, splits, and the processed dataset."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "table": ["Catalogue", "read_catalogue"],
        "build": ["build_dataset"],
        "dataset": ["Dataset", "open_dataset"],
        "images": ["read_cutout"],
    },
)
