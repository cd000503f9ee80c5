"""The Lightning system: stretch, dropout, what it is made of and what it says of a cutout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer

import lens_pipeline
from lens_pipeline import LitEnsembleSystem
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem, stretch


def test_the_stretch_is_the_same_for_every_image() -> None:
    """Nothing is normalised image by image: a cutout's input does not depend on its neighbours."""
    images = torch.tensor([[1.0, 50.0], [3.0, 3.0]])
    both = stretch(images, "background_sigma")
    torch.testing.assert_close(both, torch.arcsinh(images / 2))
    torch.testing.assert_close(both[:1], stretch(images[:1], "background_sigma"))
    torch.testing.assert_close(
        stretch(torch.tensor([0.0, 0.5, 1.0]), "composite"), torch.tensor([-2.0, 0.0, 2.0])
    )


def test_dropout_is_in_the_head_alone() -> None:
    system = LitLensSystem("resnet18", image_size=32)
    rates = {
        name: module.p
        for name, module in system.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert rates == {"dropout": 0.3}
    transformer = LitLensSystem("light_transformer", image_size=32)
    inner = [m.p for m in transformer.backbone.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(inner)


def test_the_entry_point_of_the_library_makes_a_network_of_an_architecture() -> None:
    assert lens_pipeline.LitLensSystem is LitLensSystem
    system = lens_pipeline.LitLensSystem(
        arch="resnet18", lr=1e-3, weight_decay=1e-4, dropout_rate=0.5
    )
    assert system(torch.from_numpy(np.zeros((2, 3, 64, 64), np.float32))).shape == (2,)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"loss": "focl"}, "loss 'focl': is none of bce, focal"),
        ({"schedule": "linear"}, "schedule 'linear': is none of cosine, step, plateau, constant"),
        ({"label_smoothing": 2}, "label_smoothing 2: must be 0 to below 0.5"),
        ({"lr": -1.0}, "lr -1.0: must be above 0 to 1"),
        ({"decay_epochs": 0}, "decay_epochs 0: must be at least 1"),
        ({"units": "sigma"}, "units 'sigma': is none of background_sigma, composite"),
        ({"pos_weight": -2.0}, "pos_weight -2.0: must be above 0"),
        ({"ensemble_strategy": "max"}, "'max': is none of mean, uncertainty_weighted"),
    ],
)
def test_what_cannot_be_chosen_is_named(how: dict[str, Any], said: str) -> None:
    make = LitEnsembleSystem if "ensemble_strategy" in how else LitLensSystem
    with pytest.raises(InputError, match=said):
        make(**how)


def test_members_are_a_list() -> None:
    with pytest.raises(InputError, match="architectures 'resnet18,lastro': must be a list"):
        LitEnsembleSystem("resnet18,lastro")


def test_that_cutouts_have_another_size_than_the_network_was_made_for_is_said(
    uneven_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = lens_pipeline.LensDataModule(uneven_shards)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(LitLensSystem("lastro", image_size=32), data, verbose=False)
    assert "image_size" not in caplog.text
    trainer.validate(LitLensSystem("lastro"), data, verbose=False)
    assert "image_size: the network was made for cutouts of 64 pixels, and these" in caplog.text


def test_images_in_64_bits_are_scored_as_those_in_32() -> None:
    system = LitLensSystem("lastro", image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(system(images.double()), system(images))
        assert torch.equal(system(images.half()), system(images.half().float()))


def test_a_shift_needs_no_turns() -> None:
    images, label = torch.randn(4, 3, 32, 32), torch.tensor([1.0, 0.0, 1.0, 0.0])
    seen = []

    class Seeing(LitLensSystem):
        def member_logits(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return super().member_logits(images)

    for how in ({}, {"shift": 2.0}, {"noise": 0.5}):
        system = Seeing("lastro", image_size=32, augment=False, **how)
        system.trainer = Trainer(accelerator="cpu", logger=False)
        system.training_step({"image": images, "label": label}, 0)
    assert torch.equal(seen[0], images)
    assert not torch.equal(seen[1], images)
    assert not torch.equal(seen[2], images)


def test_many_compiled_networks_are_all_compiled() -> None:
    """Of each kind of batch one code, for as many networks as a process makes."""
    counts = []
    torch._dynamo.reset()
    for bands in (1, 3, 5):
        system = LitLensSystem("lastro", bands=bands, image_size=16, compile_model=True)
        compiled: list[torch.fx.GraphModule] = []

        def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
            compiled.append(graph)  # noqa: B023 -- called before the next
            return graph.forward

        system.backbone.compile(backend=counting, dynamic=False)  # no C++ compiler is waited for
        of = ((True, 8), (True, 3), (False, 8), (False, 3))
        for training, n in of if bands < 5 else of[:1]:  # more than the eight that torch keeps
            system.train(training)(torch.zeros(n, bands, 16, 16))
        counts.append(len(compiled))
    torch._dynamo.reset()
    assert counts == [4, 4, 1]


def test_channels_last_changes_the_layout_alone() -> None:
    torch.manual_seed(0)
    plain = LitLensSystem("resnet18", image_size=32).eval()
    torch.manual_seed(0)
    other = LitLensSystem("resnet18", image_size=32, channels_last=True).eval()
    weight = other.backbone.get_parameter("network.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain(images), other(images), rtol=1e-4, atol=1e-4)


def test_members_of_other_seeds_begin_with_other_weights() -> None:
    def weights(*architectures: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return LitEnsembleSystem(architectures, image_size=32).state_dict()

    first, second, both = weights("lastro@1"), weights("lastro@7"), weights("lastro", "b=lastro@7")
    name = "members.lastro.head.weight"
    assert not torch.equal(first[name], second[name])
    assert torch.equal(both["members.b.head.weight"], second[name])
    assert torch.equal(both[name], weights("lastro")[name])


@pytest.mark.parametrize(
    ("arch", "channels_last"),
    [("lastro", False), ("lastro", True), ("resnet18", True), ("light_transformer", False)],
)
def test_by_test_time_augmentation_a_logit_is_the_mean_over_turns_and_flips(
    arch: str, channels_last: bool
) -> None:
    torch.manual_seed(0)
    plain = LitLensSystem(arch, image_size=32, channels_last=channels_last).eval()
    with torch.no_grad():
        plain.head.weight *= 100  # an untrained network has hardly an opinion
    augmented = LitLensSystem(
        arch, image_size=32, channels_last=channels_last, test_time_augmentation=True
    ).eval()
    augmented.load_state_dict(plain.state_dict())
    images = np.random.default_rng(0).normal(0, 3, (2, 3, 32, 32)).astype(np.float32)
    turned = [
        np.rot90(flipped, turns, axes=(2, 3))
        for flipped in (images, images[..., ::-1])
        for turns in range(4)
    ]
    alone = [plain.scored(one) for one in turned]
    assert np.ptp([logit for logit, _ in alone], axis=0).min() > 1e-3  # no network is blind to it
    by_hand = np.mean([logit for logit, _ in alone], axis=0)
    drawn_by_hand = np.mean([drawn for _, drawn in alone], axis=0)
    for one in turned[::3]:  # of which one is turned, and one flipped and turned
        logit, drawn = augmented.scored(one)
        np.testing.assert_allclose(logit, by_hand, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(drawn, drawn_by_hand, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            found = augmented(torch.from_numpy(one.copy()))
        np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-4)


def test_training_sees_each_cutout_once_whatever_scores_are_made_of() -> None:
    system = LitLensSystem("resnet18", image_size=32, test_time_augmentation=True)
    seen = []
    system.backbone.register_forward_hook(lambda *_: seen.append(system.training))
    system.train()(torch.zeros(2, 3, 32, 32))
    assert seen == [True]
    system.eval()(torch.zeros(2, 3, 32, 32))
    assert seen == [True] + 8 * [False]
