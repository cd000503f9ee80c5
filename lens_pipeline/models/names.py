"""Members of an ensemble by name: `[name=]architecture[@seed]`. Needs no torch."""

import difflib
import re
from dataclasses import dataclass

from lens_pipeline.errors import InputError

ARCHITECTURES: dict[str, str] = {
    "resnet18": "torchvision's ResNet-18 (He et al. 2016)",
    "resnet34": "torchvision's ResNet-34",
    "resnet50": "torchvision's ResNet-50",
    "vit_b_16": "torchvision's Vision Transformer B/16 (Dosovitskiy et al. 2021)",
    "light_transformer": "compact convolutional transformer (Hassani et al. 2021), for cutouts",
    "deeplens": "CMU DeepLens, the field's baseline (Lanusse et al. 2018)",
    "lastro": "EPFL-LASTRO's plain convolutional network (Schaefer et al. 2018)",
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


def parse_members(text: str) -> tuple[Member, ...]:
    """The members of a comma-separated list. Raises InputError for one that is not valid."""
    members: list[Member] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _MEMBER.match(part)
        if match is None:
            raise InputError(f"LENS_ARCHS: {part!r} is not [name=]architecture[@seed]")
        architecture = match["architecture"]
        check_architecture(architecture)
        name = re.sub(r"[^A-Za-z0-9_]", "_", match["name"] or architecture)
        if name == RESERVED:
            raise InputError(f"LENS_ARCHS: no member may be called {name}: that is all of them")
        if int(match["seed"] or 0) >= 2**32:
            raise InputError(f"LENS_ARCHS: {part}: the seed must be below 2**32")
        if any(member.name == name for member in members):
            raise InputError(
                f"LENS_ARCHS: two members are called {name}; "
                f"name them apart, as in {name}_b={architecture}@1"
            )
        members.append(Member(name, architecture, int(match["seed"] or 0)))
    if not members:
        raise InputError("LENS_ARCHS: names no member; an example: resnet18,deeplens@7")
    return tuple(members)


def check_architecture(architecture: str) -> None:
    """Raises InputError, naming the nearest valid ones, where an architecture is not known."""
    library, colon, _ = architecture.partition(":")
    if architecture in ARCHITECTURES or (colon and library in LIBRARIES):
        return
    near = difflib.get_close_matches(architecture, ARCHITECTURES, n=2) or list(ARCHITECTURES)
    raise InputError(
        f"LENS_ARCHS: {architecture!r} is not an architecture; did you mean {', '.join(near)}? "
        "(torchvision:NAME and timm:NAME work, too)"
    )
