"""No password, key or signature is shown or written down, whether things go well or fail."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import requests

from lens_pipeline.cli import main
from lens_pipeline.defs.stages import in_a_process
from lens_pipeline.errors import InputError, masked
from lens_pipeline.settings import Settings
from lens_pipeline.shards import verify_shards
from lens_pipeline_tests.conftest import summary_of
from lens_pipeline_tests.object_stores import S3Server, free_ports, sign_in

PASSWORD = "pa55-w/rd@of:lens"
IN_A_URI = "pa55-w%2Frd%40of%3Alens"

# MLflow's own server, which asks for a name and a password.
MLFLOW = """
import sys
from flask import Response, request
from mlflow.server import app

@app.before_request
def check():
    given = request.authorization
    if given is None or (given.username, given.password) != ("lens", sys.argv[2]):
        return Response("who are you?", 401)

app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
"""


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """Its address, with name and password in it."""
    (port,) = free_ports(1)
    folder = tmp_path / "mlflow server"
    folder.mkdir()
    environment = os.environ | {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
    }
    command = [sys.executable, "-c", MLFLOW, str(port), PASSWORD]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                answer = requests.get(f"http://127.0.0.1:{port}/health", timeout=2)
            except requests.RequestException:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
            else:
                assert answer.status_code == 401
                break
        else:
            pytest.fail((tmp_path / "server.log").read_text())
        yield f"http://lens:{IN_A_URI}@127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def holding(words: list[str], *folders: Path) -> list[Path]:
    """The files below that hold one of these words."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path for path in files if any(w.encode() in path.read_bytes() for w in words)]


def test_no_secret_is_left_by_a_run(
    own_home: Path,
    mlflow_server: str,
    s3_bucket: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With the keys of the store in LENS_STORAGE_OPTIONS alone, and all logs shown."""
    keys = s3_server.environment()
    sign_in(monkeypatch, {"AWS_EC2_METADATA_DISABLED": "true"})
    secret = keys["AWS_SECRET_ACCESS_KEY"]
    options = s3_server.storage_options() | {"key": keys["AWS_ACCESS_KEY_ID"], "secret": secret}
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    monkeypatch.setenv("LENS_CLOUD_URL", f"{s3_bucket}/lenses")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    command = ["run", "--preset", "tiny", "--home", str(own_home), "--archs", "lastro"]
    assert main([*command, "--set", "training.learning_rate=2e-3", "--verbose"]) == 0
    printed = capfd.readouterr()
    summary = summary_of(own_home)
    assert summary["stages"]["checkpoints/lastro"]["reused"] is False
    published = f"{s3_bucket}/lenses/{summary['dataset_version']}"
    assert verify_shards(published, options) == []
    assert "lens_ensemble, version 1" in printed.out
    words = [secret, PASSWORD, IN_A_URI]
    assert not [word for word in words if word in printed.out + printed.err]
    assert holding(words, own_home, tmp_path / "mlflow server") == []


def test_no_secret_is_left_by_a_run_that_fails(
    own_home: Path,
    s3_bucket: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """MLflow is gone; and the keys of the store are wrong."""
    command = ["run", "--preset", "tiny", "--home", str(own_home), "--verbose"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://lens:{IN_A_URI}@127.0.0.1:9")
    assert main(command) == 2
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    keys = s3_server.environment(wrong=True)
    secret = keys["AWS_SECRET_ACCESS_KEY"]
    sign_in(monkeypatch, {"AWS_EC2_METADATA_DISABLED": "true"})
    options = s3_server.storage_options() | {"key": keys["AWS_ACCESS_KEY_ID"], "secret": secret}
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    monkeypatch.setenv("LENS_CLOUD_URL", f"{s3_bucket}/lenses")
    assert main(command) == 2
    printed = capfd.readouterr()
    assert "Connection refused" in printed.err
    assert "credentials are refused" in printed.err
    words = [secret, PASSWORD, IN_A_URI]
    assert not [word for word in words if word in printed.out + printed.err]
    assert holding(words, own_home) == []


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        ("postgresql://lens:***@db:5432/x", "postgresql://lens:s3cret@db:5432/x"),
        ("postgresql://lens:***@db/x", "postgresql://lens:s3/cr?e#t@t@db/x"),
        ("postgresql://lens:***@db/x", "postgresql://lens:12/s3cret@db/x"),
        ("https://lens:***@db/x", "https://lens:12s3cret@db/x"),
        ("https://***@h/x.csv", "https://s3cret@h/x.csv"),
        ("postgresql://db/x?***", "postgresql://db/x?user=lens&password=s3cret"),
        (
            "https://h/c.csv?***: is not there",
            "https://h/c.csv?X-Amz-Signature=s3cret: is not there",
        ),
        ("('s3://b/c?***')", "('s3://b/c?token=s3cret')"),
        ("az://c/x?***, az://c/y?***", "az://c/x?sig=s3cret, az://c/y?sv=1&sig=s3cret"),
        ("with url: /info?a=b&access_token=*** (", "with url: /info?a=b&access_token=s3cret ("),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("models:/lens_ensemble@champion?", "models:/lens_ensemble@champion?"),
        ("Is it s3://b/c? It is.", "Is it s3://b/c? It is."),
        ("http://127.0.0.1:5000 of a@b", "http://127.0.0.1:5000 of a@b"),
        ("http://h:5000/#/models/x@champion", "http://h:5000/#/models/x@champion"),
    ],
)
def test_what_a_message_shows_of_urls(shown: str, text: str) -> None:
    assert masked(text) == shown
    assert str(InputError(text)) == shown


@pytest.mark.parametrize("query", ["X-Amz-Signature=s3cret", "sig=s3cret", "a=b&token=s3cret"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--preset", "tiny", "--source", "URL"],
        ["prepare", "--output-dir", "OUT", "--data-root", "URL"],
        ["predict", "--catalogue", "URL", "--out", "OUT/scores.csv"],
    ],
)
def test_a_signed_url_is_not_shown_whole(
    arguments: list[str],
    query: str,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = {"URL": f"https://127.0.0.1:9/c.csv?{query}", "OUT": str(tmp_path / "out")}
    given = [words.get(a, a.replace("OUT", words["OUT"])) for a in arguments]
    at = home if arguments[0] == "predict" else tmp_path / "home"
    assert main([*given, "--home", str(at), "--verbose"]) == 2
    printed = capfd.readouterr()
    assert "s3cret" not in printed.out + printed.err
    assert "https://127.0.0.1:9/c.csv?***" in printed.err.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data-root", "URL"],
        ["train", "--use-webdataset", "--train-urls", "s3://b/a.tar", "--val-urls", "URL"],
        ["tune", "--data-root", "URL"],
    ],
)
def test_settings_of_a_training_hold_no_signed_url(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = "https://127.0.0.1:9/train-{0..3}.tar?X-Amz-Signature=s3cret"
    given = [url if a == "URL" else a for a in arguments]
    assert main([*given, "--home", str(tmp_path)]) == 2
    printed = capfd.readouterr()
    assert "tar?***: a URL must not carry a signature or token" in printed.err
    assert "s3cret" not in printed.out + printed.err


def test_a_process_of_a_step_logs_in_as_the_step_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told the tracking server by the environment alone, with what the user has set."""
    uri = f"https://lens:{IN_A_URI}@mlflow.example/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    told = "import os; print(os.environ['MLFLOW_TRACKING_URI'], file=open('told', 'w'))"

    @dg.op
    def step(context: dg.OpExecutionContext) -> None:
        in_a_process(context, [sys.executable, "-c", told], tmp_path / "failure")

    monkeypatch.chdir(tmp_path)
    assert dg.GraphDefinition("job", node_defs=[step]).to_job().execute_in_process().success
    assert (tmp_path / "told").read_text().strip() == uri
    assert Settings.load().mlflow_credentials["MLFLOW_TRACKING_PASSWORD"] == PASSWORD


def test_credentials_are_no_part_of_an_address() -> None:
    settings = Settings.load(MLFLOW_TRACKING_URI=f"https://lens:{IN_A_URI}@mlflow.example/x")
    assert settings.mlflow_uri == "https://mlflow.example/x"
    assert settings.mlflow_credentials == {
        "MLFLOW_TRACKING_USERNAME": "lens",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    }
    assert Settings.load(MLFLOW_TRACKING_URI="https://mlflow.example").mlflow_credentials == {}
    database = "postgresql://lens:s3cret@db/x"
    assert Settings.load(MLFLOW_TRACKING_URI=database).mlflow_uri == database
    assert Settings.load(MLFLOW_TRACKING_URI=database).mlflow_credentials == {}
