"""The registry over several runs: who becomes champion, who does not, and who comes back."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread, Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.cli import main
from lens_pipeline.defs.gate import Candidate
from lens_pipeline.defs.registry import _promoted_if_passed
from lens_pipeline.defs.scored import Source
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.evaluation.gates import GateDecision
from lens_pipeline.registered import load_registered
from lens_pipeline.registry import Registry
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import STEP_KEY
from lens_pipeline_tests.conftest import client_of, summary_of

MODEL = "lens_ensemble"


def aliases(home: Path) -> dict[str, str]:
    found = client_of(home).get_registered_model(MODEL).aliases
    return {alias: str(version) for alias, version in found.items()}


class Cutouts:
    """Noise of two bands and 32 pixels, of two surveys; lenses have a faint ring. One image a
    cutout, of which catalogues are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        random = np.random.default_rng(0)
        y, x = np.mgrid[:32, :32] - 15.5
        ring = 0.35 * np.exp(-((np.hypot(x, y) - 7) ** 2) / 4)
        self.label = np.arange(1400) % 2
        pixels = random.normal(size=(1400, 2, 32, 32)) + ring * self.label[:, None, None, None]
        np.save(folder / "cutouts.npy", pixels.astype(np.float32))
        self.split = np.repeat(["train", "val", "test"], [600, 200, 600])

    def catalogue(self, name: str, **columns: Any) -> str:
        table = pd.DataFrame(
            {
                "id": [f"cutout-{k}" for k in range(1400)],
                "path": [f"cutouts.npy#{k}" for k in range(1400)],
                "label": self.label,
                "split": self.split,
                "bands": "g,r",
                "survey": np.where(np.arange(1400) % 4 < 2, "des", "hsc"),
            }
        ).assign(**columns)
        table.to_csv(self.folder / name, index=False)
        return str(self.folder / name)

    def shuffled(self) -> np.ndarray:
        """Labels that are right on the test split alone."""
        label, learnt = self.label.copy(), self.split != "test"
        label[learnt] = np.random.default_rng(1).permutation(label[learnt])
        return label


@pytest.mark.slow
def test_a_better_model_becomes_champion_a_worse_one_never_and_the_former_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, cutouts = tmp_path / "home", Cutouts(tmp_path)
    monkeypatch.setenv("LENS_ARCHS", "lastro")
    monkeypatch.setenv("LENS_SURVEY", "des,hsc")

    little, much = (1, "3e-4"), (4, "3e-3")  # epochs, learning rate

    def run(catalogue: str, learning: tuple[int, str], **settings: str) -> dict[str, Any]:
        monkeypatch.setenv("LENS_SOURCE", catalogue)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        epochs, rate = learning
        how = ("--set", f"training.epochs={epochs}", "--set", f"training.learning_rate={rate}")
        assert main(["run", "--preset", "tiny", "--home", str(home), *how]) == 0
        for name in settings:
            monkeypatch.delenv(name)
        return summary_of(home)

    right = cutouts.catalogue("right.csv")
    first = run(right, little)
    assert first["gate"]["passed"], first["gate"]["reasons"]
    assert aliases(home) == {"challenger": "1", "champion": "1"}

    # Worse: it has learnt nothing. Twice, for what holds within a run must hold across runs.
    for _ in range(2):
        worse = run(cutouts.catalogue("shuffled.csv", label=cutouts.shuffled()), little)
        assert aliases(home) == {"challenger": "2", "champion": "1"}
        assert not worse["gate"]["passed"]
        of_all, *of_surveys = (r for r in worse["gate"]["reasons"] if "the champion's" in r)
        assert "cannot be ruled out" in of_all
        for survey, reason in zip(("des", "hsc"), of_surveys, strict=True):
            assert reason.startswith(f"{survey}: ")
            assert "it is worse, by" in reason
        assert worse["gate"]["figures"]["n_lens"] == 300
        assert worse["gate"]["figures"]["n_seen"] == 0

    # Better by far.
    better = run(right, much)
    assert better["gate"]["passed"], better["gate"]["reasons"]
    assert better["gate"]["figures"]["gain_low"] > 0
    assert aliases(home) == {"challenger": "3", "champion": "3"}
    assert client_of(home).get_model_version(MODEL, "3").tags["lens.replaced"] == "1"
    # The older model, made again, does not come back by itself.
    again = run(right, little)
    assert again["gate"]["reasons"] == ["version 1 is older than the champion"]
    assert aliases(home) == {"challenger": "3", "champion": "3"}

    assert main(["rollback", "--home", str(home)]) == 0
    assert "version 1 is champion again, in the place of version 3" in capsys.readouterr().out
    assert aliases(home) == {"challenger": "3", "champion": "1"}
    kept_down = run(right, much)
    assert kept_down["gate"]["reasons"] == ["version 3 was rolled back; promote it by hand"]
    assert aliases(home)["champion"] == "1"
    assert main(["promote", "3", "--home", str(home)]) == 0
    assert aliases(home)["champion"] == "3"
    assert run(right, much)["gate"]["passed"]
    verdict = client_of(home).get_model_version(MODEL, "3").tags["lens.gate"]
    assert verdict == "promoted by hand; before: version 3 was rolled back; promote it by hand"

    # A model that was trained on what the champion is tested on, and the other way round.
    swapped = {"test": "train", "train": "test", "val": "val"}
    splits = [swapped[split] for split in cutouts.split]
    unfair = run(cutouts.catalogue("swapped.csv", split=splits), much)
    assert unfair["gate"]["figures"] == {
        **{"n_lens": 0, "n_nonlens": 0},
        **{"n_seen": 600, "n_groups": 0},
    }
    assert (
        "neither model has seen (600 cutouts of the test split are of others) there are 0"
        in unfair["gate"]["reasons"][0]
    )
    # A model of other bands.
    (reason,) = run(right, much, LENS_BANDS="g")["gate"]["reasons"]
    assert "version 3, is not comparable: bands g, r, here g" in reason
    assert aliases(home) == {"challenger": "5", "champion": "3"}


def test_promotion_and_rollback_are_written_down(
    own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, where = client_of(own_home), ("--home", str(own_home))
    for refused in (2, 2):
        assert main(["rollback", *where]) == refused
        assert "has no champion" in capsys.readouterr().err
    first = client.get_model_version(MODEL, "1")
    second = client.create_model_version(MODEL, first.source, first.run_id)
    assert main(["promote", "1", *where]) == 0
    assert main(["rollback", *where]) == 2
    assert "version 1 has replaced no champion" in capsys.readouterr().err
    for _ in range(2):  # the second changes nothing
        assert main(["promote", str(second.version), *where]) == 0
    assert client.get_model_version(MODEL, "2").tags["lens.replaced"] == "1"
    assert client.get_model_version(MODEL, "2").tags["lens.gate"].count("by hand") == 1
    assert main(["rollback", *where]) == 0
    assert aliases(own_home)["champion"] == "1"
    assert "lens.rolled_back" in client.get_model_version(MODEL, "2").tags
    assert main(["promote", "2", *where]) == 0
    assert "lens.rolled_back" not in client.get_model_version(MODEL, "2").tags
    # Back and forth, a rollback does not go round in a circle.
    assert main(["promote", "1", *where]) == 0
    assert main(["rollback", *where]) == 0
    assert aliases(own_home)["champion"] == "2"
    capsys.readouterr()
    assert main(["rollback", *where]) == 2
    assert "version 1, the champion before version 2, was rolled back" in capsys.readouterr().err
    # A former champion that somebody has deleted.
    client.delete_model_version(MODEL, "1")
    assert main(["rollback", *where]) == 2
    assert aliases(own_home)["champion"] == "2"


def test_a_registry_that_fails_in_the_middle_leaves_the_champion(
    own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, where = client_of(own_home), ("--home", str(own_home))
    first = client.get_model_version(MODEL, "1")
    for _ in "23":
        client.create_model_version(MODEL, first.source, first.run_id)
    for number in "12":
        assert main(["promote", number, *where]) == 0
    events = ("INSERT", "UPDATE", "DELETE")
    with closing(sqlite3.connect(own_home / "mlflow.db")) as database, database:
        for event in events:
            database.execute(
                f"CREATE TRIGGER fails_{event} BEFORE {event} ON registered_model_aliases "
                "BEGIN SELECT RAISE(ABORT, 'the disk has failed'); END"
            )
    for command in ("promote 3", "rollback"):
        assert main([*command.split(), *where]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {command} (")
        assert "the disk has failed" in error
        assert aliases(own_home)["champion"] == "2"
    with closing(sqlite3.connect(own_home / "mlflow.db")) as database, database:
        for event in events:
            database.execute(f"DROP TRIGGER fails_{event}")
    # Who stays champion was not rolled back, and can be come back to.
    for number in "23":
        assert main(["promote", number, *where]) == 0
    assert main(["rollback", *where]) == 0
    assert aliases(own_home)["champion"] == "2"


def test_what_was_rolled_back_during_the_comparison_stays_down(own_home: Path) -> None:
    client = client_of(own_home)
    first = client.get_model_version(MODEL, "1")
    client.create_model_version(MODEL, first.source, first.run_id)
    registry = Registry(Settings.load(home=own_home))
    with registry.lock():
        registry.promote("1")
    asked = []

    def against(champion: Any, version: Any) -> GateDecision:
        """Passes; meanwhile somebody promotes version 2, sees that it is bad, and rolls back."""
        asked.append(dict(version.tags))
        if len(asked) == 1:
            assert main(["promote", "2", "--home", str(own_home)]) == 0
            assert main(["rollback", "--home", str(own_home)]) == 0
        return GateDecision("lens.rolled_back" not in version.tags, (), {})

    assert not _promoted_if_passed(registry, "2", against).passed
    assert aliases(own_home)["champion"] == "1"
    assert ["lens.rolled_back" in tags for tags in asked] == [False, True]


def test_what_was_replaced_by_hand_stays_so(own_home: Path) -> None:
    """The next run makes the same model: it is not to undo what somebody has decided."""
    client = client_of(own_home)
    first = client.get_model_version(MODEL, "1")
    client.create_model_version(MODEL, first.source, first.run_id)
    for version in ("2", "1"):
        assert main(["promote", version, "--home", str(own_home)]) == 0
    registry = Registry(Settings.load(home=own_home))
    lens = SimpleNamespace(settings=registry.settings, registry=registry)
    source = Source({}, lambda: (None, None))

    def judged() -> GateDecision:
        champion, version = registry.aliased("champion"), registry.version("2")
        return Candidate(lens, "key", own_home, own_home, source).against(champion, version)

    assert judged().reasons == (
        "version 2 was replaced by hand with the older version 1; promote it by hand",
    )
    assert aliases(own_home)["champion"] == "1"
    # Nor where what has replaced it was replaced, too.
    client.create_model_version(MODEL, first.source, first.run_id)
    for version in ("3", "2", "1"):
        assert main(["promote", version, "--home", str(own_home)]) == 0
    champion = registry.aliased("champion")
    for number in ("2", "3"):
        decision = Candidate(lens, "key", own_home, own_home, source).against(
            champion, registry.version(number)
        )
        assert decision.reasons[0].startswith(f"version {number} was replaced by hand")


def test_who_is_promoted_by_hand_during_the_comparison_is_not_judged(own_home: Path) -> None:
    client = client_of(own_home)
    first = client.get_model_version(MODEL, "1")
    client.set_registered_model_alias(MODEL, "champion", "1")
    client.create_model_version(MODEL, first.source, first.run_id)
    registry = Registry(Settings.load(home=own_home))
    asked: list[str] = []

    def against(champion: Any, version: Any) -> GateDecision:
        asked.append(str(champion.version))
        if champion.version == version.version:
            return GateDecision(True, (), {})
        assert main(["promote", "2", "--home", str(own_home)]) == 0  # while it is compared
        return GateDecision(False, ("it is worse",), {})

    _promoted_if_passed(registry, "2", against)
    assert asked == ["1", "2"]
    assert registry.version("2").tags["lens.gate"].startswith("promoted by hand")


def test_the_champion_itself_is_judged_by_figures_again(own_home: Path) -> None:
    """The page of a run that found everything made has them, too."""
    registry = Registry(Settings.load(home=own_home))
    registry.promote("1")
    champion = registry.version("1")
    lens = SimpleNamespace(settings=registry.settings, registry=registry)
    evaluation = next((own_home / "reports").glob("*/metrics.json")).parent
    key, source = champion.tags[STEP_KEY], Source({}, lambda: (None, None))
    decision = Candidate(lens, key, own_home, evaluation, source).against(champion, champion)
    assert decision.passed
    n = json.loads((evaluation / "metrics.json").read_text())["ensemble"]["n_lens"]
    assert decision.figures["n_lens"] == n


def test_the_registry_says_what_it_does_not_have(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_of(own_home)
    for alias in list(aliases(own_home)):
        client.delete_registered_model_alias(MODEL, alias)
    (tmp_path / "c.csv").write_text("id,path\na,a.npy\n")
    predict = ["predict", "--home", str(own_home), "--catalogue", str(tmp_path / "c.csv")]
    predict += ["--out", str(tmp_path / "scores.csv")]
    assert main(predict) == 2
    assert "has the versions 1, and none is champion or chall" in capsys.readouterr().err
    first = client.get_model_version(MODEL, "1")
    client.create_registered_model("other")
    client.create_model_version("other", first.source, first.run_id)
    assert main([*predict, "--model", "models:/other/1"]) == 2
    assert "models:/other/1 is another model; a lens finder is lens_e" in capsys.readouterr().err


def test_an_alias_that_points_nowhere_is_named_and_promote_mends_it(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_of(own_home)
    first = client.get_model_version(MODEL, "1")
    gone = client.create_model_version(MODEL, first.source, first.run_id)
    assert main(["promote", str(gone.version), "--home", str(own_home)]) == 0
    with sqlite3.connect(own_home / "mlflow.db") as database:
        for table in ("model_version_tags", "model_versions"):
            database.execute(f"DELETE FROM {table} WHERE name = ? AND version = 2", (MODEL,))
    capsys.readouterr()
    (tmp_path / "c.csv").write_text("id,path\na,a.npy\n")
    predict = ["predict", "--home", str(own_home), "--catalogue", str(tmp_path / "c.csv")]
    for command in (
        [*predict, "--out", str(tmp_path / "s.csv")],
        ["rollback", "--home", str(own_home)],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert (
            "the alias champion points to version 2, which is not there; `lens-pipeline pr" in said
        )
    assert main(["promote", "1", "--home", str(own_home)]) == 0
    assert aliases(own_home)["champion"] == "1"


def test_a_champion_that_cannot_be_loaded_is_kept_and_said(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(own_home)
    first = client.get_model_version(MODEL, "1")
    run = client.create_run(client.get_run(first.run_id).info.experiment_id)
    broken = client.create_model_version(MODEL, f"{own_home}/nothing", run.info.run_id)
    assert main(["promote", str(broken.version), "--home", str(own_home)]) == 0
    how = ("--set", "lastro.training.learning_rate=7e-4")
    assert main(["run", "--preset", "tiny", "--home", str(own_home), *how]) == 0
    summary = summary_of(own_home)
    (reason,) = summary["gate"]["reasons"]
    assert reason.startswith("the champion, version 2, cannot be compared: ")
    assert aliases(own_home) == {"challenger": "3", "champion": "2"}


class Unwell(BaseHTTPRequestHandler):
    """A server whose database, or whatever else it needs, is gone."""

    status = 503

    def do_GET(self) -> None:
        self.send_error(self.status)

    def do_POST(self) -> None:
        self.do_GET()


@pytest.mark.parametrize("status", [None, 503, 500, 429])
def test_a_registry_that_cannot_be_asked_decides_nothing(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    folder = next((own_home / "ensemble").glob("*/ensemble.json")).parent
    content = json.loads((folder / "ensemble.json").read_text())["dataset"]
    source = Source({}, lambda: (SimpleNamespace(facts={"content": content}, folder=""), None))
    champion = client_of(own_home).get_model_version(MODEL, "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Unwell, "status", status)
    with HTTPServer(("127.0.0.1", 0), Unwell) as server:
        port = 9 if status is None else server.server_port
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pa55word@127.0.0.1:{port}")
        gone = Settings.load(home=own_home)
        lens = SimpleNamespace(settings=gone, registry=Registry(gone))
        with pytest.raises(NoAnswerError, match="models:/lens_ensemble/1 cannot be loaded") as told:
            Candidate(lens, "key", folder, folder, source).against(champion)
        server.shutdown()
    assert "pa55word" not in str(told.value)


@pytest.mark.parametrize("status", [503, 507])
def test_a_model_whose_store_is_unwell_is_no_verdict_on_it(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    client = client_of(own_home)
    first = client.get_model_version(MODEL, "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Unwell, "status", status)
    with HTTPServer(("127.0.0.1", 0), Unwell) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/models"
        version = client.create_model_version(MODEL, place, first.run_id).version
        with pytest.raises(NoAnswerError, match=f"models:/{MODEL}/{version} cannot be loaded"):
            load_registered(Registry(Settings.load(home=own_home)), f"models:/{MODEL}/{version}")
        server.shutdown()


def test_an_ensemble_of_another_dataset_is_not_decided_on(own_home: Path) -> None:
    """Who materialises the dataset alone, and then the last asset."""
    folder = next((own_home / "ensemble").glob("*/ensemble.json")).parent
    dataset = SimpleNamespace(facts={"content": "other"}, folder="dataset/other")
    source = Source({}, lambda: (dataset, None))
    champion = client_of(own_home).get_model_version(MODEL, "1")
    with pytest.raises(InputError, match="dataset/other: is not the dataset that the ensemble"):
        Candidate(SimpleNamespace(settings=None), "key", folder, folder, source).against(champion)


HOLDS = """
import sys
from lens_pipeline.registry import Registry
from lens_pipeline.settings import Settings

with Registry(Settings.load(home=sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_who_waits_for_another_process_is_told_for_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be registering a model for minutes."""
    monkeypatch.setattr("lens_pipeline.steps.PATIENCE", 0.1)
    _ = Registry(Settings.load(home=tmp_path)).client
    command, pipe = [sys.executable, "-c", HOLDS, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        Timer(2, holder.kill).start()
        assert main(["rollback", "--home", str(tmp_path)]) == 2
    waited, refused = capsys.readouterr().err.splitlines()[-2:]
    assert f"waiting for registry, held by process {holder.pid} on " in waited
    assert "has no champion" in refused


@pytest.mark.parametrize(
    ("alias", "way_out"),
    [
        ("champion", "`lens-pipeline promote` makes another version champion"),
        ("challenger", "on the page of lens_ensemble in MLflow give challenger to another, or rem"),
    ],
)
def test_what_to_do_about_an_alias_that_points_nowhere_is_what_helps(
    tmp_path: Path, alias: str, way_out: str
) -> None:
    """`promote` moves no challenger."""
    registry = Registry(Settings.load(home=tmp_path))
    registry.client.create_registered_model(MODEL)
    registry.client.create_model_version(MODEL, "somewhere")
    registry.set_alias(alias, "1")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("DELETE FROM model_versions")
    with pytest.raises(InputError, match=f"alias {alias} points to version 1, .*; {way_out}"):
        registry.aliased(alias)
