"""Networks: members and their names, architectures, the Lightning system."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "augmentation": ["augment"],
        "names": ["Member", "parse_members"],
        "system": ["LitLensSystem", "stretch"],
    },
)
