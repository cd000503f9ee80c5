"""Checkpoints that are loaded as systems, and those that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer

from lens_pipeline import LitEnsembleSystem
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem, load_system
from lens_pipeline_tests.payload import Payload


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, payload = tmp_path / "best.ckpt", Payload(tmp_path / "executed")
    torch.save({"state_dict": payload}, path)
    with pytest.raises(InputError, match=f"{path}: refused"):
        load_system(path)
    assert not payload.mark.exists()


def test_a_checkpoint_whose_settings_were_numpys_can_be_read(tmp_path: Path) -> None:
    how = {"lr": np.logspace(-3, -2, 2)[0], "pos_weight": np.float32(3), "bands": np.int64(2)}
    system = LitLensSystem(np.str_("lastro"), image_size=np.int64(32), **how)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(system)
    trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert load_system(tmp_path / "own.ckpt").hparams["pos_weight"] == 3


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
