"""Architectures and members by name."""

import subprocess
import sys

import pytest

from lens_pipeline.errors import InputError
from lens_pipeline.models.names import Architecture, Member, check_architecture, parse_members


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
        ("resnet81", "LENS_ARCHS: 'resnet81' .*did you mean resnet18"),
        ("DeepLense", "did you mean deeplens"),
        ("trans_enc", "did you mean trans_enc_s"),
        ("efficientnet_b0", "did you mean efficientnet_lite0.*torchvision:efficientnet_b0"),
        ("xyz", "there are resnet18, .*efficientnet_lite0"),
        ("keras:resnet50", "'keras:resnet50' is not an architecture; did you mean resnet50"),
        ("timm:", "not an architecture"),
        ("resnet18@two", "is not .name=.architecture"),
        ("", "names no member"),
        (" , ", "names no member"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_members(text)


def test_the_setting_that_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match="architectures: 'lastr' is not .*did you mean lastro"):
        parse_members("lastr", "architectures")


def test_a_name_says_who_builds_the_network() -> None:
    assert check_architecture("vit_b_16").library == "torchvision"
    assert check_architecture("trans_enc_s").library == "lens_pipeline"
    assert check_architecture("efficientnet_lite0").name == "tf_efficientnet_lite0"
    assert check_architecture("timm:convnext_atto") == Architecture("timm", "convnext_atto")


def test_names_need_no_torch() -> None:
    code = "import sys, lens_pipeline.models.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
