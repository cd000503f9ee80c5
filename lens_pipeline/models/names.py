"""Architectures and members of an ensemble by name. Needs no torch."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from lens_pipeline.errors import InputError, first_of


@dataclass(frozen=True)
class Architecture:
    """Who builds a network, under which name of theirs.

    `efficientnet` is timm's network with the weights of a package of its own, and an extra of that
    name.
    """

    library: str  # torchvision, timm, efficientnet or lens_pipeline
    name: str


ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture("torchvision", name) for name in ("resnet18", "resnet34", "resnet50")},
    "vit_b_16": Architecture("torchvision", "vit_b_16"),
    **{
        name: Architecture("lens_pipeline", name)
        for name in ("light_transformer", "trans_enc_s", "deeplens", "lastro")
    },
    "efficientnet_lite0": Architecture("efficientnet", "tf_efficientnet_lite0"),
}
RESERVED = "ensemble"
LIBRARIES = ("torchvision", "timm")  # any of their classifiers, as `timm:convnext_atto`

_MEMBER = re.compile(r"^(?:(?P<name>[^=@]+)=)?(?P<architecture>[^=@]+)(?:@(?P<seed>\d+))?$")


@dataclass(frozen=True)
class Member:
    """One network of the ensemble: `name` is unique; `seed` is added to the run's."""

    name: str
    architecture: str
    seed: int = 0


def parse_members(text: str, setting: str = "LENS_ARCHS") -> tuple[Member, ...]:
    """The members of a comma-separated list. Raises InputError, naming the setting, for one that
    is not valid."""
    members: list[Member] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _MEMBER.match(part)
        if match is None:
            raise InputError(f"{setting}: {part!r} is not [name=]architecture[@seed]")
        architecture = match["architecture"]
        try:
            check_architecture(architecture)
        except InputError as error:
            raise InputError(f"{setting}: {error}") from None
        name = re.sub(r"[^A-Za-z0-9_]", "_", match["name"] or architecture)
        if name == RESERVED:
            raise InputError(f"{setting}: no member may be called {name}: that is all of them")
        if int(match["seed"] or 0) >= 2**32:
            raise InputError(f"{setting}: {part}: the seed must be below 2**32")
        if any(member.name == name for member in members):
            raise InputError(
                f"{setting}: two members are called {name}; "
                f"name them apart, as in {name}_b={architecture}@1"
            )
        members.append(Member(name, architecture, int(match["seed"] or 0)))
    if not members:
        raise InputError(f"{setting}: names no member; an example: resnet18,deeplens@7")
    return tuple(members)


def check_architecture(architecture: str) -> Architecture:
    """The architecture of that name.

    Whether a library has a network of the name that follows its colon is seen when it is built.
    Raises InputError, naming the nearest valid ones, where an architecture is not known.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    library, colon, name = architecture.partition(":")
    if library in LIBRARIES and name:
        return Architecture(library, name)
    unprefixed = name if colon else architecture
    raise InputError(
        f"{architecture!r} is not an architecture; {nearest(unprefixed, ARCHITECTURES)} "
        f"(a network of a library: torchvision:{unprefixed or 'NAME'}, timm:{unprefixed or 'NAME'})"
    )


def network_libraries(architectures: Iterable[str]) -> list[str]:
    """The distributions beside torchvision that build networks of these architectures."""
    used = {check_architecture(architecture).library for architecture in architectures}
    return ["timm"] if used & {"timm", "efficientnet"} else []


def check_installed(architectures: Iterable[str]) -> None:
    """Raises InputError where what builds a network of one of them is not installed."""
    for architecture in architectures:
        for package in network_libraries([architecture]):
            if find_spec(package) is None:
                raise InputError(
                    f"{architecture} needs the package {package}; "
                    f"install lens-pipeline[{check_architecture(architecture).library}]"
                )


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint: the names nearest to one that does not exist, or some where none is near."""
    names = list(names)
    near = difflib.get_close_matches(name.lower(), names, n=2)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {first_of(names, 9)}"
