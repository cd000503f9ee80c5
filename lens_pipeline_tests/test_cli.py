"""What the command says to bad input: one line, the place, the way out, and nothing registered."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.definitions import make_definitions
from lens_pipeline.errors import InputError, NoAnswerError, NoRoomError
from lens_pipeline.runner import open_instance, prepare_home
from lens_pipeline.settings import Settings
from lens_pipeline.training.launch import raise_told
from lens_pipeline_tests.conftest import client_of, program_says

UNTIL_TRAINED = ["cutout_catalogue", "processed_dataset", "lens_shards", "cloud_shards"]
NOBODY = 65534  # the number of a user who owns nothing


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """120 small real-looking PNG cutouts, half of them lenses; a good source to spoil."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(120):
        pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"id": f"c{number}", "path": f"{number}.png", "label": str(number % 2)})
    pd.DataFrame(rows).to_csv(tmp_path / "catalogue.csv", index=False)
    return tmp_path / "catalogue.csv"


def spoil(catalogue: Path, row: int, **values: str) -> None:
    table = pd.read_csv(catalogue, dtype=str, keep_default_na=False)
    for column, value in values.items():
        table.loc[row, column] = value
    table.to_csv(catalogue, index=False)


def drop_column(catalogue: Path, column: str) -> None:
    pd.read_csv(catalogue, dtype=str).drop(columns=column).to_csv(catalogue, index=False)


def keep(catalogue: Path, chosen: slice, **values: str) -> None:
    table = pd.read_csv(catalogue, dtype=str)[chosen]
    table.assign(**values).to_csv(catalogue, index=False)


def spoil_images(catalogue: Path, count: int) -> None:
    for number in range(count):
        (catalogue.parent / f"{number}.png").write_bytes(b"\x89PNG\r\n not an image")


OF_RUNS = {
    "missing source": (lambda c: c.unlink(), "catalogue.csv"),
    "duplicate id": (lambda c: spoil(c, 7, id="c3"), "c3"),
    "too many bad images": (lambda c: spoil_images(c, 20), "LENS_MAX_REJECT_FRACTION"),
}
SPOILERS = {
    "unreadable source": (lambda c: c.write_bytes(b"\x00\xff\xfe" * 50), "catalogue.csv"),
    "empty table": (lambda c: keep(c, slice(0, 0)), "catalogue.csv"),
    "no path": (lambda c: drop_column(c, "path"), "path"),
    "no id": (lambda c: drop_column(c, "id"), "id"),
    "strange label": (lambda c: spoil(c, 7, label="lens?"), "lens?"),
    "single class": (lambda c: keep(c, slice(None), label="1"), "label"),
    "too few": (lambda c: keep(c, slice(0, 6)), "split"),
}


@pytest.mark.parametrize("case", OF_RUNS)
def test_a_bad_source_stops_the_run_with_one_line(
    case: str, catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiler, named = OF_RUNS[case]
    spoiler(catalogue)
    home = tmp_path / "home"
    arguments = ["run", "--preset", "tiny", "--source", str(catalogue), "--home", str(home)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    error = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert named in error[0]
    assert "Traceback" not in said
    assert not (home / "reports" / "summary.json").exists()
    if (home / "mlflow.db").exists():
        assert not client_of(home).search_model_versions()


@pytest.mark.parametrize("case", SPOILERS)
def test_of_a_bad_source_the_one_line_names_the_place(
    case: str, catalogue: Path, tmp_path: Path
) -> None:
    """What a run makes its line of, without a run for each."""
    spoiler, named = SPOILERS[case]
    spoiler(catalogue)
    with pytest.raises(InputError) as told:
        build_dataset(read_catalogue(catalogue), tmp_path / "out", image_size=32, origin="table")
    assert named in str(told.value)
    assert "\n" not in str(told.value)


def test_the_help_names_variables_that_are_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    named = set(re.findall(r"(?:LENS|MLFLOW)_[A-Z_]+", capsys.readouterr().out))
    assert {"LENS_SURVEY", "MLFLOW_TRACKING_URI"} <= named
    for name in named:  # most refuse this value, but none as unknown
        with monkeypatch.context() as one:
            one.setenv(name, "x")
            with suppress(InputError):
                Settings.load()
                continue
            with pytest.raises(InputError, match="^(?!.*there is no such setting)"):
                Settings.load()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--archs", "resnet81"], "resnet81"),
        (["run", "--preset", "tinny"], "choose from 'tiny', 'quick', 'full'); did you mean tiny?"),
        (["run", "--set", "lastro.training.epoch=2"], "training.epochs"),
        (["run", "--set", "lastro.training.epochs=0"], "training.epochs"),
        (["run", "--set", "resnet50.training.epochs=3"], "resnet50"),
        (["run", "--set", "training.epochs"], "SECTION.FIELD=VALUE"),
        (["run", "--set", "epochs=3"], "SECTION.FIELD=VALUE; say --set training.epochs=..."),
        (["run", "--archs", "lastro", "--set", "lastro.epochs=3"], "say --set training.epochs=..."),
        (
            ["run", "--set", "lastro.model.arch=resnet18"],
            "model.arch: is decided by the asset graph",
        ),
        (["run", "--set", "training.epochs=["], "training.epochs"),
        (["run", "--set", "training.monitor=nosuch"], "training.monitor"),
        (["run", "--set", "training.epochs=2020-99-99"], "'2020-99-99' is not a value"),
        (
            ["run", "--set", "training.find_batch_size=true", "--set=hardware.devices=2"],
            "one device",
        ),
        (
            ["run", "--set", "model.pretrained=/nowhere.ckpt"],
            "model.pretrained: /nowhere.ckpt: there",
        ),
        (["run", "--archs", "ensemble=lastro"], "ensemble"),
        (["run", "--archs", "lastro@4294967296"], "2**32"),
        (["run", "--source", "https://me:secret@127.0.0.1/c.csv"], "https://me:***@127.0.0.1"),
        (["run", "--cutouts", "3"], "--cutouts"),
        (["run", "--survey", "lsst"], "--survey; set LENS_SURVEY in the environment"),
        (["run", "--tracking-uri", "x"], "--tracking-uri; set MLFLOW_TRACKING_URI in the"),
        (["run", "--epochs=3"], "--epochs=3; say --set training.epochs=..."),
        (["rnu"], "did you mean run?"),
        (["train", "--data-root", "/nowhere"], "/nowhere: there is no such file or folder"),
        (["train", "--data-root", ""], "--data-root: is given, and empty"),
        (["train", "--checkpoint-dir", ""], "--checkpoint-dir: is given, and empty"),
        (["simulate", "--out", f"{__file__}/x"], f"{__file__} is a file, not a folder"),
        (
            ["prepare", "--data-root", "c", "--output-dir", "s", "--cloud-url", ""],
            "--cloud-url: is given, and empty",
        ),
        (["train", "--learnig-rate", "1e-3"], "--learnig-rate; did you mean --learning-rate"),
        (["tune", "--trails=3"], "--trails=3; did you mean --trials"),
        (["train", "--batch", "32"], "--batch; did you mean --batch-size"),  # no name is cut short
        (["predict", "--catalog", "x.csv"], "argument --catalog; did you mean --catalogue"),
        (["train", "--lr", "0.1"], "--lr; did you mean --learning-rate"),
        (["train", "--gpus=4"], "--gpus=4; did you mean --devices"),
        (["--epochs=3", "train"], "--epochs=3; name it behind train"),
        (["predict", "--catalogue", "c.csv"], "--out"),
        (["predict", "--catalogue", "c.csv", "--out", "scores.txt"], ".parquet or .csv"),
        (["predict", "--catalogue", "c.csv", "--out", "scores.csv"], "no model registry"),
        (["predict", "--catalogue", "", "--out", "s.csv"], "--catalogue: is given, and empty"),
        (["predict", "--catalogue", "c", "--out", "s.csv", "--share", ""], "--share : must be i/n"),
        (["promote", "3"], "no model registry"),
        (["show", "--dagster-port", "99999999"], "--dagster-port: 99999999 is no port"),
        (["show", "--mlflow-port", "0"], "--mlflow-port: 0 is no port"),
        ([], "COMMAND"),
    ],
)
def test_a_bad_command_line_is_one_line_too(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--home", str(tmp_path / "home")] if arguments else []
    if arguments and arguments[0] == "run" and "--preset" not in arguments:
        arguments = [*arguments, "--preset", "tiny"]
    assert main([*arguments, *home]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert "secret" not in line
    assert not (tmp_path / "home" / "mlflow.db").exists()


def test_who_opens_a_home_where_nothing_has_run_is_told(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that no page is opened
        show = ["show", "--dagster-port", str(taken.getsockname()[1])]
        assert main([*show, "--home", str(tmp_path / "mistyped")]) == 2
        told = f"LENS_HOME: {tmp_path / 'mistyped'} is new: nothing has run there yet"
        assert told in capsys.readouterr().err
        assert main([*show, "--home", str(own_home)]) == 2
        assert "is new" not in capsys.readouterr().err
    one, port = "--dagster-port", "--mlflow-port"
    assert main(["show", one, "3999", port, "3999", "--home", str(own_home)]) == 2
    assert "error: --mlflow-port 3999: is that of --dagster-port" in capsys.readouterr().err


def test_nothing_that_a_command_starts_tells_mlflows_makers_of_it(tmp_path: Path) -> None:
    program = (
        "import sys, subprocess; from lens_pipeline.cli import main; main(['promote', '3']); "
        "ask = 'from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY as off; "
        "print(off.get())'; subprocess.run([sys.executable, '-c', ask], check=True)"
    )
    assert program_says(program, cwd=tmp_path, env=os.environ).split() == ["True"]


@pytest.mark.parametrize("folder", [".", "dagster"])
def test_a_home_that_is_somebody_elses_is_named(folder: str) -> None:
    """Root, who may write anywhere, is nobody here."""

    def refused(home: Path) -> None:
        if os.getuid() == 0:
            os.setuid(NOBODY)
        with pytest.raises(InputError, match=f"LENS_HOME: {home / folder} is not writable by you"):
            prepare_home(Settings.load(home=home))

    with tempfile.TemporaryDirectory() as place:  # nobody sees what lies above tmp_path
        home = Path(place)
        prepare_home(Settings.load(home=home))
        home.chmod(0o777)
        (home / "dagster").chmod(0o777)
        (home / folder).chmod(0o555)
        process = multiprocessing.get_context("fork").Process(target=refused, args=(home,))
        process.start()
        process.join()
        (home / folder).chmod(0o777)
    assert process.exitcode == 0


def test_a_cloud_that_cannot_be_used_is_named(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LENS_CLOUD_URL", "nosuch://bucket")
    assert main(["run", "--preset", "tiny", "--home", str(own_home)]) == 2
    assert "error: LENS_CLOUD_URL: nosuch://bucket" in capsys.readouterr().err


def test_a_run_says_what_it_reads_and_simulates_after_a_catalogue_only_where_it_is_told_to(
    own_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where LENS_SOURCE was forgotten: its model would stand beside those of the survey."""
    first, source, no_table = (tmp_path / f"{name}.csv" for name in ("first", "other", "none"))
    for path in (first, source):
        path.write_text("id,path,label\na,a.png,1\n")
    no_table.write_text("name\na\n")  # which is not remembered
    monkeypatch.setenv("LENS_CLOUD_URL", "nosuch://bucket")  # nothing is trained here
    command = ["run", "--home", str(own_home), "--preset", "tiny"]
    forgotten = f"error: LENS_SOURCE: the last run of {own_home} was of {source}: name it again, or"
    told = []
    for named in (str(first), str(source), str(no_table), None, "simulation", None):
        monkeypatch.delenv("LENS_SOURCE", raising=False)  # of the command before, in this process
        assert main([*command, *(["--source", named] if named else [])]) == 2
        told.append(capsys.readouterr().err)
        assert f"source: {named or 'simulation'}" in told[-1]
    assert [forgotten in one for one in told] == [False, False, False, True, False, False]


def test_a_run_says_which_settings_are_others_than_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"  # without its images: nothing is trained here
    table.write_text("id,path,label\na,a.png,1\n")
    monkeypatch.setenv("LENS_SOURCE", str(table))
    command = ["run", "--home", str(tmp_path / "home"), "--preset"]
    told = []
    for changed in (["tiny"], ["full", "--archs", "lastro,deeplens"], ["full"], ["full"]):
        monkeypatch.delenv("LENS_ARCHS", raising=False)  # of the command before, in this process
        monkeypatch.setenv("LENS_SEED", str(10 + len(told)))
        assert main([*command, *changed]) == 2
        lines = capsys.readouterr().err.splitlines()
        told.append([line for line in lines if "in the last run here" in line])
    assert told[1:] == [
        [
            "LENS_ARCHS: lastro,deeplens; in the last run here: not set",
            "LENS_PRESET: full; in the last run here: tiny",
            "LENS_SEED: 11; in the last run here: 10",
        ],
        [
            "LENS_ARCHS: not set; in the last run here: lastro,deeplens",
            "LENS_SEED: 12; in the last run here: 11",
        ],
        ["LENS_SEED: 13; in the last run here: 12"],
    ]


def test_a_setting_of_another_version_is_none_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"  # without its images: nothing is trained here
    table.write_text("id,path,label\na,a.png,1\n")
    kept = {"source": str(table), "preset": "full", "of_another_version": 1}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "settings.json").write_text(json.dumps(kept))
    command = ["run", "--home", str(tmp_path / "home"), "--preset", "tiny"]
    assert main([*command, "--source", str(table)]) == 2
    said = capsys.readouterr().err
    assert "LENS_PRESET: tiny; in the last run here: full" in said
    assert "of_another_version" not in said.lower()


@pytest.mark.parametrize(
    "command",
    [
        ["simulate", "--n", "4", "--out"],
        ["prepare", "--data-root", "{shards}", "--output-dir"],
        ["train", "--data-root", "{shards}", "--checkpoint-dir"],
        ["tune", "--data-root", "{shards}", "--out"],
    ],
    ids=lambda command: command[0],
)
def test_a_place_that_cannot_be_made_is_named(
    command: list[str], shards_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(shards=shards_folder) for word in command]
    assert main([*given, "/proc/none/out"]) == 2  # where nobody, of whatever rights, makes one
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "error: /proc/none" in told
    assert "cannot be made, or written into (No such file or directory)" in told


def test_a_survey_that_nobody_simulates_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pages of the home would launch nothing but failures."""
    monkeypatch.setenv("LENS_SURVEY", "sdss")
    home = tmp_path / "home"
    assert main(["run", "--home", str(home), "--preset", "tiny"]) == 2
    assert "survey: unknown 'sdss'; there are des, hsc" in capsys.readouterr().err
    assert not (home / "settings.json").exists()


def test_a_home_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["run", "--preset", "tiny", "--home", str(tmp_path / "file" / "home")]) == 2
    assert f"error: LENS_HOME: {tmp_path}/file/home/dagster cannot be made" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("flags", [["simulate", "--out"], ["prepare", "--output-dir"]])
def test_a_folder_is_on_this_machine(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "s3://bucket/folder"]) == 2
    assert "s3://bucket/folder is a URL; name a place on" in capsys.readouterr().err
    assert main(["run", "--home", "s3://bucket/folder"]) == 2
    assert "LENS_HOME: s3://bucket/folder is a URL; name a folder on" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verbose", [False, True])
def test_what_is_nobodys_input_is_a_failure_of_one_line_unless_more_is_asked_for(
    verbose: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr("lens_pipeline.commands.train.asked_config", fails)
    assert main(["train", *(["--verbose"] if verbose else [])]) == 1
    said = capsys.readouterr().err
    hint = "" if verbose else " (--verbose shows where)"
    assert said.splitlines()[-1] == f"error: RuntimeError: the sky fell{hint}"
    assert ("Traceback" in said) == verbose


def test_a_flag_whose_tilde_no_shell_has_replaced_means_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert main(["simulate", "--n", "2", "--image-size", "32", "--out=~/few"]) == 0
    assert (tmp_path / "me" / "few" / "catalogue.parquet").is_file()
    assert main(["train", "--config=~nobody-of-that-name/x.yaml"]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("kind", [InputError, NoAnswerError, NoRoomError])
def test_who_has_started_a_command_is_told_why_it_ended(
    kind: type[InputError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of which kind it is, for some are tried again."""
    file = tmp_path / "failure"
    monkeypatch.setenv("LENS_FAILURE", str(file))

    def fail(*_: object) -> None:
        raise kind("the disk\nis away")

    monkeypatch.setattr("lens_pipeline.commands.train.asked_config", fail)
    assert main(["train", "--home", str(tmp_path)]) == 2
    with pytest.raises(InputError, match="the disk\nis away") as told:
        raise_told(file)
    assert type(told.value) is kind


def test_simulations_are_of_the_survey_and_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("decoys: {star: 1}")
    monkeypatch.setenv("LENS_SIMULATION", str(tmp_path / "a.yaml"))
    monkeypatch.setenv("LENS_SURVEY", "cfhtls")
    out = tmp_path / "out"
    assert main(["simulate", "--n", "4", "--image-size", "32", "--out", str(out)]) == 0
    table = pd.read_parquet(out / "catalogue.parquet")
    assert set(table["survey"]) == {"cfhtls"}
    assert set(table["kind"]) == {"lens", "star"}


def test_a_few_bad_images_are_listed_and_the_run_goes_on(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(catalogue, 0, label="")  # and the first row has no label
    spoil_images(catalogue, 2)
    (catalogue.parent / "2.png").unlink()
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)
    Image.fromarray(grey).save(catalogue.parent / "3.png")
    home = tmp_path / "home"
    arguments = ["run", "--preset", "tiny", "--source", str(catalogue), "--home", str(home)]
    assert main([*arguments, "--archs", "lastro"]) == 0
    rejects = pd.read_parquet(next((home / "dataset").glob("*/rejects.parquet")))
    assert rejects["id"].tolist() == ["c0", "c1", "c2", "c3"]
    assert rejects["row"].tolist() == [0, 1, 2, 3]
    for reason, part in zip(
        rejects["reason"], ["cannot be read", "cannot be read", "missing", "1 bands"], strict=True
    ):
        assert part in reason
    scores = pd.read_parquet(next((home / "reports").glob("*/scores.parquet")))
    assert len(scores) == 120
    assert scores["probability"].isna().sum() == 4
    assert scores.loc[2, "reject_reason"] == rejects.loc[2, "reason"]
    told = capsys.readouterr()
    assert "lastro" in told.out
    assert "4 of 120 cutouts cannot be used, see " in told.err
    assert "once: the file is missing" in told.err
    assert "check warns: every_split_holds_both_classes of processed_dataset (only " in told.err
    # The same catalogue elsewhere is the same one.
    moved = tmp_path / "moved"
    shutil.copytree(catalogue.parent, moved)
    settings = Settings.load(
        home=home, source=str(moved / catalogue.name), preset="tiny", archs="lastro"
    )
    settings.export()
    until_trained = [*UNTIL_TRAINED, "checkpoints/lastro"]
    keys = [dg.AssetKey(name.split("/")) for name in until_trained]
    job = make_definitions(settings, retries=False).resolve_job_def("full_pipeline")
    with open_instance(settings) as instance:
        done = job.execute_in_process(instance=instance, asset_selection=keys)
    again = {
        event.asset_key.to_user_string(): event.materialization.metadata["reused"].value
        for event in done.all_events
        if event.is_step_materialization
    }
    assert not again["processed_dataset"]
    assert again["checkpoints/lastro"]


def test_a_command_waits_for_its_threads_and_for_no_search_of_what_is_left(tmp_path: Path) -> None:
    """Which takes seconds at the end of a process that has loaded large libraries."""
    program = """
import atexit, sys, threading, time
from lens_pipeline.cli import main

class Left:
    def __del__(self):
        print("searched")

left = Left()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
print("begun")
main()
"""
    command = [sys.executable, "-c", program, "promote", "3", "--home", str(tmp_path / "none")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.split() == ["begun", "thread", "registered"]
    assert ended.returncode == 2
    assert "has no model registry" in ended.stderr


def test_what_could_not_be_printed_is_a_failure(home: Path) -> None:
    """As where the disk is full to which the output goes."""
    command = [sys.executable, "-m", "lens_pipeline.cli", "retire", "--keep", "1", "--dry-run"]
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [*command, "--home", str(home)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=buffered,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: what was printed is not whole: [Errno 28] No space left on device\n"
    )
