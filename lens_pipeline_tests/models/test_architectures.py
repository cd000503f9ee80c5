"""Every architecture takes cutouts of any bands and size, and learns."""

import pytest
import torch

from lens_pipeline.errors import InputError
from lens_pipeline.models.architectures import build_backbone
from lens_pipeline.models.names import ARCHITECTURES

SMALL = [name for name in ARCHITECTURES if name not in ("resnet34", "resnet50", "vit_b_16")]


@pytest.mark.parametrize("architecture", [*SMALL, "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize(("bands", "size"), [(1, 32), (3, 64), (5, 45)])
def test_any_number_of_bands_and_any_size_is_taken(
    architecture: str, bands: int, size: int
) -> None:
    backbone, n_features = build_backbone(architecture, bands, size)
    backbone.eval()
    with torch.inference_mode():
        assert backbone(torch.randn(2, bands, size, size)).shape == (2, n_features)


@pytest.mark.parametrize(("bands", "size"), [(1, 32), (3, 101)])
def test_the_vision_transformer_takes_more_than_224_pixels_only(bands: int, size: int) -> None:
    backbone, n_features = build_backbone("vit_b_16", bands, size)
    with torch.inference_mode():
        assert backbone(torch.randn(1, bands, size, size)).shape == (1, n_features)


def test_any_network_of_timm_can_be_a_backbone() -> None:
    backbone, n_features = build_backbone("timm:resnet10t", 4, 48)
    with torch.inference_mode():
        assert backbone(torch.randn(2, 4, 48, 48)).shape == (2, n_features)


@pytest.mark.parametrize("architecture", ["timm:resnet1", "torchvision:resnet1"])
def test_an_unknown_network_of_a_library_is_an_error(architecture: str) -> None:
    with pytest.raises(InputError, match="resnet1"):
        build_backbone(architecture, 3, 64)


@pytest.mark.parametrize("architecture", ["light_transformer", "lastro", "deeplens"])
def test_a_small_network_learns_to_tell_a_ring_from_a_disc(architecture: str) -> None:
    """Twenty steps on a task that needs shape: the same light, once with a hole."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    r = torch.hypot(x, y)
    ring, disc = ((r > 5) & (r < 9)).float(), (r < 7.5).float()
    disc *= ring.sum() / disc.sum()
    label = torch.arange(32) % 2
    images = torch.where(label[:, None, None] == 1, ring, disc)[:, None]
    images = images + 0.1 * torch.randn(32, 1, 32, 32)
    backbone, n_features = build_backbone(architecture, 1, 32)
    network = torch.nn.Sequential(backbone, torch.nn.Linear(n_features, 1))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            network(images).squeeze(1), label.float()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_transformer_sees_where_things_are() -> None:
    """The same pixels rearranged are another image: tokens know their place."""
    torch.manual_seed(0)
    backbone, _ = build_backbone("light_transformer", 1, 32)
    backbone.eval()
    image = torch.randn(1, 1, 32, 32)
    swapped = torch.cat([image[..., 16:], image[..., :16]], dim=-1)
    with torch.inference_mode():
        assert not torch.allclose(backbone(image), backbone(swapped), atol=1e-4)
