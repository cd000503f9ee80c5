"""The registered model on its own: what it carries, and what it needs where it runs."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from lens_pipeline.ensemble.carried import LIBRARIES
from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.registered import load_registered
from lens_pipeline.registry import MODEL, Registry
from lens_pipeline.settings import Settings
from lens_pipeline_tests.conftest import program_says, summary_of
from lens_pipeline_tests.object_stores import free_ports
from lens_pipeline_tests.served import DIRECT


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    """The files of the registered model. Those of copies of the home lie beside them."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    address = MlflowClient(uri, uri).get_model_version_download_uri(MODEL, "1")
    return Path(address.removeprefix("file://"))


@pytest.fixture(scope="module")
def cutouts(simulated_catalogue: Path) -> np.ndarray:
    return np.load(simulated_catalogue.parent / "images-00000.npy")[:5]


@pytest.fixture(scope="module")
def ensemble(home: Path) -> LensEnsemble:
    return load_ensemble(next((home / "ensemble").glob("[!.]*/ensemble.json")).parent)


WITHOUT_THE_PACKAGE = """
import importlib.machinery, sys
from pathlib import Path

class Uninstalled:
    '''lens_pipeline is found nowhere but in a model.'''

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "lens_pipeline":
            return None
        of_models = [place for place in sys.path if Path(place, "../MLmodel").is_file()]
        found = importlib.machinery.PathFinder.find_spec(name, of_models)
        if found is None:
            raise ModuleNotFoundError("No module named 'lens_pipeline'", name=name)
        return found

sys.meta_path.insert(0, Uninstalled)
try:
    import lens_pipeline
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("lens_pipeline can be imported")

import mlflow, numpy

model = mlflow.pyfunc.load_model(sys.argv[1])
model.predict(numpy.load(sys.argv[2])).to_parquet(sys.argv[3])
import lens_pipeline
assert Path(lens_pipeline.__file__).is_relative_to(sys.argv[1]), lens_pipeline.__file__
assert not {"dagster", "webdataset", "caustics"} & set(sys.modules)
"""


def test_the_model_scores_where_the_package_is_not_installed(
    model: Path, cutouts: np.ndarray, ensemble: LensEnsemble, tmp_path: Path
) -> None:
    np.save(tmp_path / "cutouts.npy", cutouts)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    files = ("cutouts.npy", "scores.parquet")
    program_says(WITHOUT_THE_PACKAGE, model, *files, cwd=tmp_path, env=environment)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "scores.parquet"), ensemble.predict(cutouts)
    )


def test_the_model_says_what_it_takes_and_gives(
    home: Path, model: Path, ensemble: LensEnsemble
) -> None:
    found = Model.load(model)
    (taken,) = found.signature.inputs.inputs
    assert (taken.type, taken.shape) == (np.dtype(np.float32), (-1, 3, 32, 32))
    assert found.signature.outputs.input_names() == ensemble.columns
    assert found.load_input_example(str(model)).shape == (1, 3, 32, 32)
    summary = summary_of(home)
    assert found.metadata == {
        "units": "background_sigma",
        "bands": ["g", "r", "i"],
        "image_size": 32,
        "pixel_scale": 0.263,
        "labels": ["non-lens", "lens"],
        "dataset_version": summary["dataset_version"],
    }


def test_the_model_requires_what_its_code_imports(model: Path) -> None:
    pinned = (model / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in pinned] == list(LIBRARIES)
    assert all("==" in line and "+" not in line for line in pinned)
    files = list((model / "code").rglob("*.py"))
    assert files
    imported = set()
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"lens_pipeline"}
    assert others == {name.replace("-", "_") for name in LIBRARIES}


def test_the_model_answers_over_http_as_it_does_in_python(
    home: Path, model: Path, cutouts: np.ndarray, ensemble: LensEnsemble, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    program = str(Path(sys.executable).with_name("mlflow"))
    command = [program, "models", "serve", "--model-uri", f"models:/{MODEL}@challenger"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # The server is started by the name `uvicorn`.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}", "PATH": path}
    example = json.loads((model / "serving_input_example.json").read_text())
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env=os.environ | more, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url, begun = f"http://127.0.0.1:{port}", time.monotonic()
        while not _answers(f"{url}/ping"):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() - begun < 120, (tmp_path / "log").read_text()
            time.sleep(0.2)
        for content in ({"inputs": cutouts.tolist()}, example):
            wanted = ensemble.predict(np.array(content["inputs"], np.float32))
            request = urllib.request.Request(
                f"{url}/invocations",
                json.dumps(content).encode(),
                {"Content-Type": "application/json"},
            )
            with DIRECT.open(request, timeout=60) as answer:
                found = pd.DataFrame(json.load(answer)["predictions"])
            assert list(found) == ensemble.columns
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)  # float32
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_what_is_no_cutout_is_refused_and_nothing_gives_nothing(ensemble: LensEnsemble) -> None:
    shape = (3, ensemble.format.image_size, ensemble.format.image_size)
    nothing = ensemble.predict(np.zeros((0, *shape), np.float32))
    assert list(nothing) == ensemble.columns
    assert len(nothing) == 0
    cutouts = np.random.default_rng(0).normal(size=(4, *shape))
    cutouts[2, 1, 5, 5] = np.nan
    with pytest.raises(InputError, match=r"cutout 2 of the array \(from 0\) has pixels that are"):
        ensemble.predict(cutouts)


def test_a_version_of_other_code_is_told(
    home: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(Settings.load(home=home))
    load_registered(registry)
    assert "other code" not in caplog.text
    (carried,) = model.rglob("code/lens_pipeline/ensemble/fusion.py")
    as_it_was = carried.read_text()
    carried.write_text(f"{as_it_was}# before it was mended\n")
    try:
        load_registered(registry)
    finally:
        carried.write_text(as_it_was)
    assert "was registered with other code (1 files differ, as ensemble/fusion.py)" in caplog.text
