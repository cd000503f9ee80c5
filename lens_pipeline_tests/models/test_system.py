"""The Lightning system: stretch, augmentation, dropout, checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer

import lens_pipeline
from lens_pipeline import LitEnsembleSystem
from lens_pipeline.errors import InputError
from lens_pipeline.models.metrics import StageMetrics
from lens_pipeline.models.system import LitLensSystem, load_system, stretch
from lens_pipeline_tests.payload import Payload


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


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, payload = tmp_path / "best.ckpt", Payload(tmp_path / "executed")
    torch.save({"state_dict": payload}, path)
    with pytest.raises(InputError, match=f"{path}: refused"):
        load_system(path)
    assert not payload.mark.exists()


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


def test_a_checkpoint_whose_settings_were_numpys_can_be_read(tmp_path: Path) -> None:
    how = {"lr": np.logspace(-3, -2, 2)[0], "pos_weight": np.float32(3), "bands": np.int64(2)}
    system = LitLensSystem(np.str_("lastro"), image_size=np.int64(32), **how)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(system)
    trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert load_system(tmp_path / "own.ckpt").hparams["pos_weight"] == 3


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


def test_lenses_that_no_probability_tells_apart_are_ranked_by_their_logits() -> None:
    stage = StageMetrics(ranking=True)
    logit = torch.tensor([45.0, 44.0, 43.0, 42.0, 41.0, 40.0, 39.0, 38.0], dtype=torch.float64)
    stage.update(torch.tensor(0.0), logit, torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    found = stage.compute()
    assert found["auroc"] == 1
    assert found["tpr0"] == 1


def test_sums_are_exact_where_the_network_is_of_16_bits() -> None:
    """Lightning's `bf16-true` makes all tensors of a module so."""
    stage = StageMetrics(ranking=False).to(torch.bfloat16)
    for _ in range(300):
        stage.update(torch.tensor(0.3), torch.ones(64).bfloat16(), torch.ones(64).bfloat16())
    found = stage.compute()
    assert float(found["loss"]) == pytest.approx(0.3)
    assert found["accuracy"] == 1
    assert stage.counted.sums[0] == 300 * 64


def test_the_best_candidates_are_told_apart_in_16_bits_too() -> None:
    """Else lenses and non-lenses would tie where TPR at a small FPR is decided."""
    torch.manual_seed(0)
    system = LitLensSystem("lastro", image_size=32).eval()
    with torch.no_grad():
        system.head.bias.fill_(8.0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = system(torch.randn(64, 3, 32, 32))
    assert len(logits.unique()) > 20


def test_a_plateau_counts_the_epochs_that_are_validated(
    uneven_shards: Path, tmp_path: Path
) -> None:
    system = LitLensSystem("lastro", image_size=32, schedule="plateau", warmup=0.0)
    trainer = Trainer(
        max_epochs=3, check_val_every_n_epoch=2, accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(system, lens_pipeline.LensDataModule(uneven_shards))
    (plateau,) = trainer.lr_scheduler_configs
    assert plateau.scheduler.last_epoch == 1


def test_a_checkpoint_of_another_kind_of_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    for system, other in (
        (LitLensSystem("lastro"), LitEnsembleSystem),
        (LitEnsembleSystem(["lastro"]), LitLensSystem),
    ):
        settings = dict(system.hparams)
        torch.save({"state_dict": system.state_dict(), "hyper_parameters": settings}, path)
        with pytest.raises(InputError, match=f"{path}: is no checkpoint of a {other.__name__}"):
            other.load_from_checkpoint(path, compile_model=False)
    with pytest.raises(InputError, match="^dropout: LitEnsembleSystem has no such argument"):
        LitEnsembleSystem.load_from_checkpoint(path, dropout=0.1)


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    state = {"state_dict": {}, "hyper_parameters": dict(LitLensSystem("lastro").hparams)}
    torch.save(state, path)
    with pytest.raises(InputError, match=f"{path}: is no checkpoint of this LitLensSystem"):
        load_system(path)


def _rates(total: int, **how: object) -> list[float]:
    """The learning rate of each step, in epochs of ten steps with a flat validation loss."""
    system = LitLensSystem("lastro", lr=0.1, image_size=32, **how)  # type: ignore[arg-type]
    system.trainer = SimpleNamespace(  # type: ignore[assignment]
        estimated_stepping_batches=total,
        num_training_batches=min(10, total),
        limit_val_batches=1.0,
        accumulate_grad_batches=1,
        precision="32-true",
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )
    (optimiser,), schedules = system.configure_optimizers()
    rates = []
    for step in range(total):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        for entry in schedules:
            if entry["interval"] == "step":
                entry["scheduler"].step()
            elif step % 10 == 9:
                entry["scheduler"].step(1.0)
    return rates


@pytest.mark.parametrize("total", [*range(1, 25), 50, 100])
def test_the_learning_rate_rises_then_falls_for_any_number_of_steps(total: int) -> None:
    rates = _rates(total, warmup=0.1)
    peak = int(np.argmax(rates))
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    if total >= 4:
        assert rates[peak] == pytest.approx(0.1, rel=0.01)
        assert 0 < peak < total - 1


def test_the_cosine_is_that_of_its_formula() -> None:
    rates = _rates(100, warmup=0.1)
    assert rates[:11] == pytest.approx([0.1 * (k + 1) / 11 for k in range(11)])
    assert rates[10:] == pytest.approx([0.05 * (1 + np.cos(np.pi * k / 90)) for k in range(90)])


def test_steps_are_of_epochs() -> None:
    rates = _rates(60, schedule="step", warmup=0.0, decay=0.5, decay_epochs=2)
    assert rates == pytest.approx([0.1 * 0.5 ** (k // 20) for k in range(60)])


def test_steps_begin_when_the_rate_is_warm() -> None:
    rates = _rates(60, schedule="step", warmup=0.4, decay=0.5, decay_epochs=1)
    assert (np.diff(rates[:25]) > 0).all()
    assert rates[24:] == pytest.approx([0.1 * 0.5 ** (k // 10) for k in range(36)])


def test_a_plateau_is_warmed_up_and_falls_when_the_loss_does_not() -> None:
    rates = _rates(60, schedule="plateau", warmup=0.1, decay=0.5, decay_epochs=2)
    assert (np.diff(rates[:7]) > 0).all()
    assert rates[6:30] == pytest.approx([0.1] * 24)  # no gain in the second and third epoch
    assert rates[30:50] == pytest.approx([0.05] * 20)
    assert rates[50:] == pytest.approx([0.025] * 10)


def test_a_constant_rate_is_warmed_up() -> None:
    rates = _rates(20, schedule="constant", warmup=0.1)
    assert rates[0] < rates[1] < rates[2]
    assert rates[2:] == pytest.approx([0.1] * 18)


def test_the_losses_are_those_of_their_formulas() -> None:
    """Binary cross-entropy with a weight; Lin et al. 2017, equation 5."""
    logit, label = torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([1.0, 1.0, 0.0])
    p = logit.squeeze(1).sigmoid().double()
    right = torch.where(label == 1, p, 1 - p)
    weight = torch.where(label == 1, 4.0, 1.0)
    system = LitLensSystem("lastro", pos_weight=4.0)
    expected = -(weight * right.log()).mean()
    assert system.loss(logit, label).item() == pytest.approx(expected.item(), rel=1e-6)
    focal = LitLensSystem("lastro", pos_weight=4.0, loss="focal", focal_gamma=2.0)
    alpha = torch.where(label == 1, 0.8, 0.2)
    expected = -(alpha * (1 - right) ** 2 * right.log()).mean()
    assert focal.loss(logit, label).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_of_a_lens_that_is_certain_the_focal_loss_has_a_slope(gamma: float) -> None:
    """In 32 bits the score of a logit of 20 is 1, and a power below 1 is steep at 0."""
    system = LitLensSystem("lastro", loss="focal", focal_gamma=gamma)
    logit = torch.tensor([[20.0], [100.0], [-20.0], [3.0]], requires_grad=True)
    system.loss(logit, torch.tensor([1.0, 1.0, 0.0, 1.0])).backward()
    assert logit.grad is not None
    assert logit.grad.isfinite().all()
    assert logit.grad[3] < 0


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_a_smoothed_label_is_where_the_loss_is_lowest(loss: str) -> None:
    system = LitLensSystem("lastro", loss=loss, label_smoothing=0.1).train()
    logits = torch.linspace(-8, 8, 3201)
    each = torch.stack([system.loss(one.view(1, 1), torch.ones(1)) for one in logits])
    assert logits[each.argmin()].sigmoid().item() == pytest.approx(0.95, abs=0.001)


def test_labels_are_smoothed_in_training_alone() -> None:
    logit, label = torch.tensor([[1.5], [-0.5]]), torch.tensor([1.0, 0.0])
    smooth, plain = LitLensSystem("lastro", label_smoothing=0.2), LitLensSystem("lastro")
    p = logit.squeeze(1).sigmoid()
    target = torch.tensor([0.9, 0.1])
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert smooth.loss(logit, label).item() == pytest.approx(expected.item(), rel=1e-6)
    assert smooth.eval().loss(logit, label).item() == pytest.approx(
        plain.eval().loss(logit, label).item()
    )


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_smoothed_labels_leave_the_weights_of_the_classes(loss: str) -> None:
    """Of each class for itself the same logits are best, however rare lenses are."""
    logit = torch.linspace(-6, 6, 1201)[:, None]
    for value in (0.0, 1.0):
        label = torch.full((1201,), value)
        best, losses = [], []
        for weight in (1.0, 100.0):
            system = LitLensSystem("lastro", loss=loss, label_smoothing=0.2, pos_weight=weight)
            each = [system.loss(x[None], y[None]).item() for x, y in zip(logit, label, strict=True)]
            best.append(logit[int(np.argmin(each))].item())
            own = weight if value else 1.0
            losses.append(np.array(each) / own * (1 + weight if loss == "focal" else 1))
        assert best[0] == pytest.approx(best[1], abs=0.02)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
        if loss == "bce":
            assert best[0] == pytest.approx(np.log(9) * (1 if value else -1), abs=0.02)


def _optimiser(system: LitLensSystem) -> torch.optim.Optimizer:
    """As a Trainer has it."""
    system.trainer = SimpleNamespace(  # type: ignore[assignment]
        estimated_stepping_batches=10,
        num_training_batches=10,
        accumulate_grad_batches=1,
        precision="32-true",
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        gradient_clip_val=None,
    )
    (optimiser,), _ = system.configure_optimizers()
    assert isinstance(optimiser, torch.optim.Optimizer)
    return optimiser


def test_only_what_a_layer_multiplies_with_decays() -> None:
    """No biases, norms, tokens and positions: without gradients AdamW leaves those as they are."""
    system = LitLensSystem("light_transformer", image_size=32, lr=0.1, weight_decay=0.5, warmup=0.0)
    system.backbone = VisionTransformer(32, 8, 1, 2, 16, 32)
    system.register_module("names", torch.nn.Embedding(3, 4))
    before = {name: value.detach().clone() for name, value in system.named_parameters()}
    for parameter in system.parameters():
        parameter.data += 1
        parameter.grad = torch.zeros_like(parameter)
    optimiser = _optimiser(system)
    optimiser.step()
    decayed = {
        name
        for name, value in system.named_parameters()
        if not torch.equal(value.detach(), before[name] + 1)
    }
    layer = "backbone.encoder.layers.encoder_layer_0"
    assert decayed == {
        *("backbone.conv_proj.weight", "backbone.heads.head.weight", "head.weight"),
        *(f"{layer}.self_attention.{kind}" for kind in ("in_proj_weight", "out_proj.weight")),
        *(f"{layer}.mlp.{place}.weight" for place in (0, 3)),
    }
    for name, value in system.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in decayed else 1
        torch.testing.assert_close(value.detach(), factor * (before[name] + 1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_is_fused_where_lightning_can_clip_its_gradients(
    precision: str, clip: float | None
) -> None:
    system = LitLensSystem("lastro", image_size=32, schedule="constant")
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=clip,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    cutouts: Any = [{"image": torch.randn(3, 32, 32), "label": float(i % 2)} for i in range(4)]
    trainer.fit(system, DataLoader(cutouts, batch_size=4))
    (optimiser,) = trainer.optimizers
    assert bool(optimiser.defaults["fused"]) == (precision == "32-true" or clip is None)


@pytest.mark.parametrize("found", [True, False])
def test_what_is_counted_at_one_half_is_as_scikit_learn_has_it(found: bool) -> None:
    """Over batches of several sizes, in which each cutout counts once."""
    random = np.random.default_rng(0)
    stage, seen, losses = StageMetrics(ranking=False), [], []
    for n in (5, 1, 8):
        logit, label = random.normal(size=n) - (0 if found else 9), random.integers(2, size=n)
        loss = random.random()
        stage.update(torch.tensor(loss), torch.from_numpy(logit), torch.from_numpy(label).float())
        seen.append([logit, label])
        losses += [loss] * n
    logit, label = np.concatenate(seen, axis=1)
    said = {name: float(value) for name, value in stage.compute().items()}
    taken = logit > 0
    precision, recall, f1, _ = precision_recall_fscore_support(
        label, taken, average="binary", zero_division=0
    )
    expected = {"precision": precision, "recall": recall, "f1": f1}
    expected |= {"accuracy": accuracy_score(label, taken), "loss": np.mean(losses)}
    assert said == pytest.approx(expected)


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


def test_no_batches_have_no_scores() -> None:
    scores = LitEnsembleSystem(("lastro",), image_size=32).predict([])
    assert list(scores) == ["probability", "logit", "std", "entropy", "probability_lastro"]
    assert len(scores) == 0


def test_members_of_other_seeds_begin_with_other_weights() -> None:
    def weights(*architectures: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return LitEnsembleSystem(architectures, image_size=32).state_dict()

    first, second, both = weights("lastro@1"), weights("lastro@7"), weights("lastro", "b=lastro@7")
    name = "members.lastro.head.weight"
    assert not torch.equal(first[name], second[name])
    assert torch.equal(both["members.b.head.weight"], second[name])
    assert torch.equal(both[name], weights("lastro")[name])


def test_lightnings_own_arguments_of_loading_are_known(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    system = LitLensSystem("lastro", image_size=32)
    state = {"state_dict": system.state_dict(), "hyper_parameters": dict(system.hparams)}
    torch.save(state, path)
    LitLensSystem.load_from_checkpoint(path, strict=True, weights_only=True)
    with pytest.raises(InputError, match="weights_only=False: no code"):
        LitLensSystem.load_from_checkpoint(path, weights_only=False)
    with pytest.raises(InputError, match="^dropout: LitLensSystem has no such argument"):
        LitLensSystem.load_from_checkpoint(path, dropout=0.1)
    name, value = state["state_dict"].popitem()
    torch.save(state, path)
    with pytest.raises(InputError, match=name):
        LitLensSystem.load_from_checkpoint(path)
    loaded = LitLensSystem.load_from_checkpoint(path, strict=False)
    assert loaded.state_dict()[name].shape == value.shape


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
