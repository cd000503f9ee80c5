"""Shared fixtures: a clean environment, small real datasets, and one home that a run has filled."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from lens_pipeline import tracking
from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.dataset import Dataset, Split
from lens_pipeline.catalogue.joined import JoinedDataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.shards.prepare import prepare_shards
from lens_pipeline_tests.browser import page
from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import GCSServer, S3Server, sign_in
from lens_pipeline_tests.postgres import postgresql

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["page", "postgresql"]

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"
LENS_PIPELINE = str(Path(sys.executable).with_name("lens-pipeline"))  # the installed command
LONGEST = ("test_unattended", "test_distributed", "test_run")  # files, of the slow tests
OURS = ("LENS_", "MLFLOW_", "DAGSTER_")
NO_SKIP = os.environ.get("LENS_NO_SKIP") == "1"
HOME_WAS_THERE = Path(".lens").exists()
# gcsfs reads it when it is imported, for the whole process; see GCSServer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


def program_says(program: str, *arguments: object, cwd: Path, env: Mapping[str, str]) -> str:
    """What a Python program prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_in(
    split: Split, dataset: Dataset | JoinedDataset, part: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """The cutouts and rows of a dataset's split, in the order of shards that hold just those."""
    table = dataset.table(part)
    places = pd.Index(table["id"]).get_indexer(pd.Index(split.ids))
    assert sorted(places) == list(range(len(table)))
    return dataset.split(part).gather(places), table.iloc[places].reset_index(drop=True)


def pytest_configure() -> None:
    # Of whoever runs the tests: fixtures of whole files are made before `clean_environment`.
    _set_ours({"LENS_NO_SKIP": "1"} if NO_SKIP else {})
    # A script's background jobs ignore Ctrl-C; Dagster then has SIGTERM ignored like it, and so
    # does all that the tests start and mean to end.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not HOME_WAS_THERE and Path(".lens").exists():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\na test has made .lens, the home of whoever runs the tests", file=sys.stderr)


def _ours() -> dict[str, str]:
    """The variables of the environment that decide on what is tested."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(OURS) or name.lower().endswith("_proxy")
    }


def _set_ours(variables: Mapping[str, str]) -> None:
    for name in _ours():
        del os.environ[name]
    os.environ.update(variables)


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """What a command says in the environment of a fixture that several tests share goes no
    further."""
    before = _ours()
    yield
    if fixturedef.scope != "function":
        _set_ours(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Begun last, they would be waited for with nothing beside them.
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With LENS_NO_SKIP=1 a skip is a failure; a GPU, alone, may be missing."""
    outcome = yield
    report = outcome.get_result()
    if NO_SKIP and report.skipped and not item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which LENS_NO_SKIP=1 forbids: {report.longrepr}"


@pytest.fixture(autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of whoever runs the tests gets in, and none of a test gets out; without one of its
    own, its home is its alone. Without `monkeypatch`, which so ends before it, and gives back what
    a command has said."""
    before = dict(os.environ)
    _set_ours({"LENS_HOME": str(tmp_path_factory.getbasetemp() / f"home-{secrets.token_hex(8)}")})
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what one process of these tests makes, and the others take."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def files_of_libraries() -> Iterator[None]:
    """alembic runs its files anew for each database, botocore reads what S3 is for each client: a
    second each time, of hundreds."""
    import alembic.util
    import botocore.session

    load = alembic.util.load_python_file
    kept = cache(load)

    def loaded(folder: str, name: str) -> Any:
        return load(folder, name) if name == "env.py" else kept(folder, name)  # the former acts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alembic.util, "load_python_file", loaded)
        patch.setattr(botocore.session, "create_loader", cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="session", autouse=True)
def tables_of_mlflow(of_all_workers: Path) -> Iterator[None]:
    """MLflow takes seconds for the tables of each database: those that it has made once are
    copied. Programs that the tests start make their own."""
    made, make = of_all_workers / "mlflow.db", tracking._create_database

    def copied(path: Path) -> None:
        with FileLock(of_all_workers / "mlflow.db.lock"):
            make(made)
        if not path.exists():
            aside = path.with_name(".copied.db")
            shutil.copy(made, aside)
            aside.replace(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_create_database", copied)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real telescope images."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def simulated_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 simulated DES cutouts of 32 pixels."""
    out = tmp_path_factory.mktemp("simulated") / "catalogue"
    arguments = ["simulate", "--n", "200", "--image-size", "32", "--out", str(out)]
    assert main(arguments) == 0
    return out / "catalogue.parquet"


@pytest.fixture(scope="session")
def simulated_surveys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 simulated cutouts of DES and 150 of HSC, of 32 pixels."""
    out = tmp_path_factory.mktemp("surveys") / "catalogue"
    arguments = ["--survey", "des,hsc", "--n", "300", "--image-size", "32", "--out", str(out)]
    assert main(["simulate", *arguments]) == 0
    return out / "catalogue.parquet"


@pytest.fixture
def two_surveys(simulated_surveys: Path, tmp_path: Path) -> Path:
    """`simulated_surveys` in an order of its own, to change."""
    table = pd.read_parquet(simulated_surveys).sample(frac=1, random_state=0)
    table["path"] = f"{simulated_surveys.parent}/" + table["path"]
    table.to_parquet(tmp_path / "surveys.parquet", index=False)
    return tmp_path / "surveys.parquet"


@pytest.fixture(scope="session")
def dataset(simulated_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The processed dataset of `simulated_catalogue`, with a few rows unlabelled."""
    catalogue = read_catalogue(simulated_catalogue)
    catalogue.table.loc[:9, "label"] = None
    out = tmp_path_factory.mktemp("dataset")
    return build_dataset(catalogue, out, image_size=32, origin="simulation")


@pytest.fixture(scope="session")
def shards_folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dataset` as shards of 50 cutouts."""
    from lens_pipeline.shards.writer import write_shards

    out = tmp_path_factory.mktemp("shards")
    write_shards(dataset.folder, out, shard_size=50)
    return out


@pytest.fixture(scope="session")
def uneven_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of three bands and 32 pixels; `lenses` have a ring. 71 to train on."""
    folder = tmp_path_factory.mktemp("uneven")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] - 15.5
    ring = 6 * np.exp(-((np.hypot(x, y) - 7) ** 2) / 4)
    rows = []
    for split, n in (("train", 71), ("val", 40), ("test", 20)):
        for k in range(n):
            name = f"{split}{k:02d}.npy"
            pixels = random.normal(size=(3, 32, 32)) + ring * (k % 2)
            np.save(folder / name, pixels.astype(np.float32))
            rows.append({"id": name[:-4], "path": name, "label": k % 2, "split": split})
    pd.DataFrame(rows).to_csv(folder / "catalogue.csv", index=False)
    out = folder / "shards"
    out.mkdir()
    prepare_shards(str(folder / "catalogue.csv"), out, image_size=32, shard_size=30)
    return out


@pytest.fixture
def own_shards(shards_folder: Path, tmp_path: Path) -> Path:
    """A copy of `shards_folder` to spoil."""
    return Path(shutil.copytree(shards_folder, tmp_path / "shards"))


@pytest.fixture(scope="session")
def home(of_all_workers: Path) -> Path:
    """A home that the main job has filled, in the preset for tests. Only to look at."""
    path = of_all_workers / "home"
    with FileLock(of_all_workers / "home.lock"):
        if not (path / "reports" / "summary.json").is_file():
            assert main(["run", "--preset", "tiny", "--home", str(path)]) == 0
            shutil.copytree(path, of_all_workers / "untouched")
    return path


@pytest.fixture
def own_home(home: Path, of_all_workers: Path, tmp_path: Path) -> Path:
    """A copy of `home` to change, as it was before anybody looked at it, for a database that is
    open has files that come and go. MLflow's artifacts stay where they are."""
    return Path(shutil.copytree(of_all_workers / "untouched", tmp_path / "home"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. It may be killed: the next `make_bucket` starts it again."""
    if reason := S3Server.missing():
        pytest.skip(reason)
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GCSServer]:
    """A server of GCS's interface. It may be killed: the next `make_bucket` starts it again."""
    if reason := GCSServer.missing():
        pytest.skip(reason)
    with GCSServer(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on `s3_server`, its administrator signed in."""
    import s3fs

    sign_in(monkeypatch, s3_server.environment())
    name = f"lens-{secrets.token_hex(8)}"
    s3_server.make_bucket(name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def gcs_bucket(gcs_server: GCSServer) -> Iterator[str]:
    """The URL of an empty bucket on `gcs_server`."""
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    name = f"lens-{secrets.token_hex(8)}"
    gcs_server.make_bucket(name)
    yield f"gs://{name}"
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def faulty_proxy() -> Iterator[Callable[[S3Server | GCSServer], FaultyProxy]]:
    """Makes proxies in front of a server: `storage_options(proxy.url)` leads through one."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(FaultyProxy(server.url))


def client_of(home: Path) -> "MlflowClient":
    """Of the home's own database, its registry, too: else that is whichever was asked last."""
    from mlflow import MlflowClient

    database = f"sqlite:///{home / 'mlflow.db'}"
    return MlflowClient(database, database)


def summary_of(home: Path) -> dict[str, Any]:
    """What the last run of a home says it has made."""
    return json.loads((home / "reports" / "summary.json").read_text())
