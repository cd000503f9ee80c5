"""Old versions of the model are removed, by their age or by number."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lens_pipeline.cli import main
from lens_pipeline.registered import load_registered
from lens_pipeline.registry import MODEL, Registry
from lens_pipeline.settings import Settings
from lens_pipeline_tests.conftest import client_of


def test_old_versions_are_removed_and_what_others_need_stays(
    own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, where = client_of(own_home), ("--home", str(own_home))
    registry = Registry(Settings.load(home=own_home))
    first = client.get_model_version(MODEL, "1")
    (made,) = (own_home / "ensemble").glob("*/ensemble.json")
    runs = {n: client.create_run(client.get_run(first.run_id).info.experiment_id) for n in "23"}
    for run in runs.values():
        registry.register(made.parent, run.info.run_id, {})
    client.create_registered_model("published")
    client.copy_model_version(f"models:/{MODEL}/3", "published")
    client.copy_model_version(f"models:/{MODEL}/2", MODEL)  # version 4
    client.create_model_version(MODEL, first.source, first.run_id)  # version 5
    for number in "15":
        assert main(["promote", number, *where]) == 0
    capsys.readouterr()

    def folder_of(model: str, number: str) -> Path:
        uri = client.get_model_version_download_uri(model, number)
        return Path(uri.removeprefix("file://"))

    def retired(*options: str) -> list[str]:
        """The lines about versions, without their dates."""
        assert main(["retire", *where, *options]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert last.startswith(f"{MODEL}: 3 of 5 versions ")
        words = (line.split() for line in lines)
        return [" ".join((number, *rest)) for _, number, _, *rest in words]

    def states() -> list[str]:
        """Of the runs of versions 1, 2, 3."""
        ids = (first.run_id, *(run.info.run_id for run in runs.values()))
        return [client.get_run(run).info.lifecycle_stage for run in ids]

    second = folder_of(MODEL, "2")
    assert second.is_dir()
    newest, oldest = (
        "5 kept champion; of the newest 1",
        "1 kept challenger; a rollback would make it champion",
    )
    old = [f"{number} would go is older" for number in "432"]
    assert retired("--keep", "1", "--dry-run") == [newest, *old, oldest]
    assert len(registry.versions()) == 5
    gone = [f"{number} removed is older" for number in "432"]
    assert retired("--keep", "1") == [newest, *gone, oldest]
    assert [v.version for v in registry.versions()] == [5, 1]
    assert states() == ["active", "deleted", "active"]
    # What MLflow then removes for good is version 2 alone.
    uri = f"sqlite:///{own_home / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri]
    subprocess.run([*command, "--tracking-uri", uri], check=True, capture_output=True)
    assert not second.exists()
    assert folder_of("published", "1").is_dir()
    assert load_registered(registry, f"models:/{MODEL}/1")[0].members


def test_a_version_is_removed_by_its_number_unless_it_has_an_alias(
    own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, where = Registry(Settings.load(home=own_home)).client, ("--home", str(own_home))
    first = client.get_model_version(MODEL, "1")
    experiment = client.get_run(first.run_id).info.experiment_id
    for _ in "23":
        run = client.create_run(experiment)
        model = client.create_logged_model(experiment, f"gone {run.info.run_id}")
        client.create_model_version(MODEL, model.model_uri, run.info.run_id)
    with closing(sqlite3.connect(own_home / "mlflow.db")) as database, database:  # as `mlflow gc`
        database.execute("DELETE FROM logged_models WHERE name LIKE 'gone%'")
    for number in "123":
        assert main(["promote", number, *where]) == 0
    for arguments, said in (
        ([], "error: retire: name versions, or say with --keep how many of the newest stay"),
        (["2", "--keep", "1"], "error: retire: name versions, or"),
        (["1"], "error: retire 1: it is challenger; give the alias to another version first"),
        (["2", "7"], f"error: retire 7: give the number of a version; {MODEL} has 3, 2, 1"),
    ):
        assert main(["retire", *arguments, *where]) == 2
        assert said in capsys.readouterr().err
    # Its model is gone already. A rollback to it is not possible any more, and says so.
    client.set_model_version_tag(MODEL, "2", "lens.rolled_back", "2026-11-29")
    assert main(["retire", "--keep", "1", "--dry-run", *where]) == 0
    assert "a rollback would make it champion; was rolled back" in capsys.readouterr().out
    assert main(["retire", "2", "2", *where]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{MODEL}: 1 of 3 versions removed"
    assert [v.version for v in client.search_model_versions(f"name='{MODEL}'")] == [3, 1]
    assert main(["rollback", *where]) == 2
    assert "has replaced no champion that is still there" in capsys.readouterr().err
