"""WebDataset shards with a manifest and random access: writing, verifying, reading, publishing."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cloud": ["PublishedShards", "publish_shards"],
        "datamodule": ["LensDataModule", "LensWebDatasetDataModule"],
        "prune": ["FoundVersion", "prune_versions"],
        "manifest": ["Manifest"],
        "reader": ["Shards", "open_shards"],
        "store": ["read_manifest"],
        "verify": ["verify_shards"],
        "writer": ["write_shards"],
    },
)
