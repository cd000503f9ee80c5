"""Members by name."""

import pytest

from lens_pipeline.errors import InputError
from lens_pipeline.models.names import Member, parse_members


def test_a_member_is_name_architecture_seed() -> None:
    assert parse_members("resnet18, timm:convnext_atto,deep=deeplens@7 ,resnet34@2") == (
        Member("resnet18", "resnet18"),
        Member("timm_convnext_atto", "timm:convnext_atto"),
        Member("deep", "deeplens", 7),
        Member("resnet34", "resnet34", 2),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18,resnet18@2", "two members are called resnet18"),
        ("a=resnet18,a=deeplens", "two members are called a"),
        ("resnet81", "did you mean resnet18"),
        ("keras:resnet50", "not an architecture"),
        ("resnet18@two", "is not .name=.architecture"),
        ("", "names no member"),
        (" , ", "names no member"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_members(text)
