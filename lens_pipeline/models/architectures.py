"""Architectures by name: each a backbone from cutouts to features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer

from lens_pipeline.errors import InputError
from lens_pipeline.models.deeplens import DeepLens
from lens_pipeline.models.lastro import Lastro
from lens_pipeline.models.names import Architecture, check_architecture, check_installed, nearest
from lens_pipeline.models.pretrained import load_weights, published_weights, read_weights
from lens_pipeline.models.transformers import LightTransformer, TransEncS

SMALLEST = 16
OURS: dict[str, Callable[[int], nn.Module]] = {
    "light_transformer": LightTransformer,
    "trans_enc_s": TransEncS,
    "deeplens": DeepLens,
    "lastro": Lastro,
}


def build_backbone(
    architecture: str, bands: int, image_size: int, pretrained: bool | str | Path = False
) -> tuple[nn.Module, int]:
    """(module from float32 (n, bands, image_size, image_size) to (n, features), features).

    pretrained: True for the published weights, or a file: a state dict of the network (its head is
    left out), or a checkpoint of ours to fine-tune; of any number of bands and any image size.
    The names of the parameters are the same in every case. Raises InputError for an architecture
    that is not known, for cutouts of fewer than 16 pixels, and for weights that cannot be had or
    are of another network.
    """
    check_installed([architecture])
    found = check_architecture(architecture)
    if image_size < SMALLEST:
        raise InputError(f"cutouts of {image_size} px: a network needs {SMALLEST} px or more")
    built = {
        "lens_pipeline": _ours,
        "torchvision": _from_torchvision,
        "timm": _from_timm,
        "efficientnet": _from_timm,
    }[found.library](found, bands, image_size)
    for module in built.network.modules():
        # In the head alone, which is the system's.
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):  # of timm's, by a function
            module.drop_rate = 0.0  # type: ignore[assignment]
    if pretrained:
        if pretrained is True:
            weights, source = published_weights(found), f"published weights of {found.name}"
        elif str(pretrained).startswith("models:/"):
            raise InputError(
                f"pretrained {pretrained}: `lens-pipeline train --pretrained` fetches a registered "
                "model; here, name a member's checkpoint, as members/resnet18.ckpt among its "
                "artifacts"
            )
        else:
            weights, source = read_weights(Path(pretrained)), str(pretrained)
        load_weights(
            built.network, weights, bands, built.head, f"{source}: does not fit {architecture}"
        )
    return Backbone(built.network, built.size, built.fixed), built.n_features


@dataclass(frozen=True)
class _Built:
    """A network without its head."""

    network: nn.Module
    n_features: int
    head: tuple[str, ...] = ()  # what was taken off: prefixes of parameters
    size: int = SMALLEST  # the smallest input in pixels, or the only one
    fixed: bool = False


class Backbone(nn.Module):
    """A network behind a bilinear resize where it cannot take the cutouts as they are.

    size: its smallest input in pixels; where `fixed`, its only one.
    """

    def __init__(self, network: nn.Module, size: int, fixed: bool) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < self.size or (self.fixed and x.shape[-1] > self.size):
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(x)


def _ours(architecture: Architecture, bands: int, image_size: int) -> _Built:
    network = OURS[architecture.name](bands)
    return _Built(network, int(network.n_features))  # type: ignore[arg-type]


def _from_torchvision(architecture: Architecture, bands: int, image_size: int) -> _Built:
    name = architecture.name
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(
            f"torchvision:{name}: no classifier of torchvision; {nearest(name, names)}"
        )
    options: dict[str, object] = {}
    if name.startswith("vit_"):
        options = {"image_size": _whole_patches(image_size, int(name.rpartition("_")[2]))}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    network = torchvision.models.get_model(name, weights=None, **options)
    # Before the head goes: in SqueezeNet that is a convolution, too.
    _accept_bands(network, bands)
    head, n_features = _drop_head(network)
    if isinstance(network, VisionTransformer):
        size, fixed = network.image_size, True
    elif isinstance(network, MaxVit):
        size, fixed = 224, True
    elif isinstance(network, SwinTransformer):
        size, fixed = SMALLEST, False  # pads by itself
    else:
        published = torchvision.models.get_model_weights(name)["DEFAULT"].value
        size, fixed = max(published.meta["min_size"]), False
    return _Built(network, n_features, (head,), size, fixed)


def _from_timm(architecture: Architecture, bands: int, image_size: int) -> _Built:
    timm = import_module("timm")  # an extra
    name = architecture.name
    if not timm.is_model(name):
        raise InputError(
            f"timm:{name}: timm has no such network; {nearest(name, timm.list_models())}"
        )
    try:
        network = timm.create_model(name, in_chans=bands, num_classes=0)
    except RuntimeError as error:  # a tag that does not exist
        raise InputError(f"timm:{name}: {error}") from None
    about = network.pretrained_cfg
    size, fixed = image_size, False
    if isinstance(network, timm.models.VisionTransformer) and isinstance(
        network.patch_embed, timm.layers.PatchEmbed
    ):
        size, fixed = _whole_patches(image_size, network.patch_embed.patch_size[0]), True
        network.set_input_size((size, size))
    elif about["fixed_input_size"] or not _takes(network, bands, image_size):
        size, fixed = about["input_size"][-1], True
        if not _takes(network, bands, size):
            raise InputError(f"timm:{name}: does not take {bands} bands; choose another")
    head = about["classifier"] or ()
    layers = (head,) if isinstance(head, str) else head
    return _Built(
        network, network.head_hidden_size, tuple(f"{layer}." for layer in layers), size, fixed
    )


def _takes(network: nn.Module, bands: int, size: int) -> bool:
    """Whether it takes images of that size, which no attribute of timm's networks says."""
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, bands, size, size))
    except Exception:  # noqa: BLE001  each refuses in its own way
        return False
    finally:
        network.train()
    return True


def _whole_patches(image_size: int, patch: int) -> int:
    """The next size in whole patches, two at least: for 16 px, 64 stay 64, 101 become 112."""
    return max(2, math.ceil(image_size / patch)) * patch


def _accept_bands(network: nn.Module, bands: int) -> None:
    """Make the first convolution one that takes `bands` channels."""
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    if stem.in_channels != bands:
        stem.in_channels = bands
        stem.weight = nn.Parameter(torch.empty(stem.out_channels, bands, *stem.kernel_size))
        stem.reset_parameters()


def _drop_head(network: nn.Module) -> tuple[str, int]:
    """Take the last layer off; (prefix of its parameters, how many features it took)."""
    path, head = [
        (n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ][-1]
    network.set_submodule(path, nn.Identity())
    return f"{path}.", head.in_features if isinstance(head, nn.Linear) else head.in_channels
