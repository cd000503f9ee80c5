"""Training one member: its configuration and the run itself."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"config": ["TrainConfig"], "member": ["TrainedMember"], "train": ["train"]},
)
