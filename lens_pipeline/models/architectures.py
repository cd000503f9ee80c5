"""Architectures by name: each a backbone from cutouts to features."""

import math

import torchvision
from torch import Tensor, nn
from torch.nn import functional

from lens_pipeline.errors import InputError
from lens_pipeline.models.deeplens import DeepLens
from lens_pipeline.models.lastro import Lastro
from lens_pipeline.models.names import check_architecture
from lens_pipeline.models.transformers import LightTransformer

VIT_PATCH = 16


def build_backbone(architecture: str, bands: int, image_size: int) -> tuple[nn.Module, int]:
    """(module from float32 (n, bands, image_size, image_size) to (n, features), features).

    Raises InputError for an architecture that is not known.
    """
    check_architecture(architecture)
    library, _, name = architecture.rpartition(":")
    if library == "timm":
        return _from_timm(name, bands)
    if name == "vit_b_16":
        return _vision_transformer(bands, image_size)
    if architecture == "light_transformer":
        return LightTransformer(bands), LightTransformer.n_features
    if architecture == "deeplens":
        return DeepLens(bands), DeepLens.n_features
    if architecture == "lastro":
        return Lastro(bands), Lastro.n_features
    return _from_torchvision(name, bands)


class _Resized(nn.Module):
    """A network that accepts one size only, behind a bilinear resize to it."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(x)


def _vision_transformer(bands: int, image_size: int) -> tuple[nn.Module, int]:
    # The next whole number of patches: 64 px stay 64, 101 px become 112.
    size = max(2, math.ceil(image_size / VIT_PATCH)) * VIT_PATCH
    network = torchvision.models.vit_b_16(weights=None, image_size=size)
    _accept_bands(network, bands)
    return _Resized(network, size), _drop_head(network, "vit_b_16")


def _from_torchvision(name: str, bands: int) -> tuple[nn.Module, int]:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"LENS_ARCHS: torchvision has no classifier {name!r}")
    network = torchvision.models.get_model(name, weights=None)
    _accept_bands(network, bands)
    return network, _drop_head(network, name)


def _from_timm(name: str, bands: int) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError:
        raise InputError(
            f"LENS_ARCHS: timm:{name} needs the package timm; install lens-pipeline[timm]"
        ) from None
    if name not in timm.list_models():
        raise InputError(f"LENS_ARCHS: timm has no model {name!r}")
    network = timm.create_model(name, pretrained=False, in_chans=bands, num_classes=0)
    return network, int(network.num_features)  # type: ignore[arg-type]


def _accept_bands(network: nn.Module, bands: int) -> None:
    """Replace the first convolution by one that takes `bands` channels."""
    path, stem = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if stem.in_channels != bands:
        replacement = nn.Conv2d(
            bands,
            stem.out_channels,
            stem.kernel_size,  # type: ignore[arg-type]
            stem.stride,  # type: ignore[arg-type]
            stem.padding,  # type: ignore[arg-type]
            bias=stem.bias is not None,
        )
        network.set_submodule(path, replacement)


def _drop_head(network: nn.Module, name: str) -> int:
    """Take the last linear layer off; returns how many features it took."""
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise InputError(f"LENS_ARCHS: {name} has no linear head; choose another")
    path, head = layers[-1]
    network.set_submodule(path, nn.Identity())
    return head.in_features
