"""What the environment says, and what it says wrongly."""

import os
from pathlib import Path

import pytest

from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LENS_HOME")
    settings = Settings.load()
    assert settings.home == tmp_path / ".lens"
    assert settings.source == "simulation"
    assert settings.preset == "quick"
    assert settings.cloud == str(tmp_path / ".lens" / "cloud")
    assert settings.mlflow_uri == f"sqlite:///{tmp_path / '.lens' / 'mlflow.db'}"


def test_paths_are_made_absolute_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LENS_HOME", "here")
    monkeypatch.setenv("LENS_SOURCE", "table.csv")
    monkeypatch.setenv("LENS_CLOUD_URL", "s3://bucket/prefix")
    settings = Settings.load()
    assert settings.home == tmp_path / "here"
    assert settings.source == str(tmp_path / "table.csv")
    assert settings.cloud == "s3://bucket/prefix"


def test_command_line_wins_and_an_explicit_tracking_server_wins_over_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_PRESET", "full")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    settings = Settings.load(preset="tiny", home=tmp_path)
    assert settings.preset == "tiny"
    assert settings.mlflow_uri == "http://tracking.example:5000"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LENS_PRESET", "huge"),
        ("LENS_STORAGE_OPTIONS", "{not json"),
        ("LENS_SEED", "-1"),
        ("LENS_N_CUTOUTS", "many"),
        ("LENS_MAX_REJECT_FRACTION", "2"),
        ("LENS_GATE_MIN_LENS", "0"),
    ],
)
def test_a_wrong_value_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=variable):
        Settings.load()


def test_what_is_given_and_empty_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a variable of the shell that is not set: it would be the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    for name in ("home", "source", "cloud_url"):
        with pytest.raises(InputError, match=f"^LENS_{name.upper()}: is given, and empty$"):
            Settings.load(**{name: ""})
    with pytest.raises(InputError, match="^MLFLOW_TRACKING_URI: is given, and empty$"):
        Settings.load(MLFLOW_TRACKING_URI="")
    monkeypatch.setenv("LENS_SOURCE", "")  # which is as good as none
    assert Settings.load().is_simulated


@pytest.mark.parametrize("name", ["a%20b", "what?"])
def test_a_home_whose_database_would_lie_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    """Its path becomes a part of a URL."""
    with pytest.raises(InputError, match=r"^LENS_HOME: .* holds a question mark, or a per cent"):
        Settings.load(home=tmp_path / name)
    assert Settings.load(home=tmp_path / "50% of #1").home.name == "50% of #1"


def test_a_database_that_another_directory_would_have_another_of_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for uri in ("sqlite:///mlflow.db", "sqlite:mlflow.db", "sqlite+pysqlite:///x", "sqlite://"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: .* write sqlite:////, four"):
            Settings.load()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////data/mlflow.db")
    assert Settings.load().mlflow_uri == "sqlite:////data/mlflow.db"


def test_a_tracking_server_whose_password_ends_its_address_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for uri in (
        *("postgresql://me:pa@s3cret@host/db", "postgresql://me:pa/s3cret@host/db"),
        *("http://me:12/s3cret@host", "http://[s3cret", "postgresql://me:s3cret@host:port/db"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(InputError, match="^MLFLOW_TRACKING_URI: is no address") as told:
            Settings.load()
        assert "s3cret" not in str(told.value)
    for uri in (
        *("http://me:pa%40%2Fs@host:5000", "postgresql+psycopg://me:pa%2Fs@host:5432/db?x=1"),
        *("file:///data/me@host", "/data/mlruns", "databricks://profile"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert Settings.load().tracking_uri == uri


def test_a_password_with_a_slash_in_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://KEY:se/cret@bucket/x.csv", "https://me:se/cret@host/x.csv"):
        monkeypatch.setenv("LENS_SOURCE", url)
        with pytest.raises(InputError, match="must not carry a user or password"):
            Settings.load()
    for url in ("s3://bucket/a:b/c@d.csv", "http://host:8080/c@d.csv", "s3://bucket/c@d.csv"):
        monkeypatch.setenv("LENS_SOURCE", url)
        assert Settings.load().source == url


@pytest.mark.parametrize("user", ["t0ken", "me:t0ken"])
def test_a_web_address_must_not_hold_a_token(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENS_SOURCE", f"https://{user}@raw.example.org/x.csv")
    with pytest.raises(InputError, match="must not carry a user or password") as told:
        Settings.load()
    assert "t0ken" not in str(told.value)
    monkeypatch.setenv("LENS_SOURCE", "abfs://container@account.example.org/x.csv")
    assert Settings.load().source.startswith("abfs://container@")


def test_export_hands_everything_on(tmp_path: Path) -> None:
    given = Settings.load(home=tmp_path, preset="tiny", verify=True, storage_options={"anon": True})
    given.export()
    assert Settings.load() == given
    assert os.environ["DAGSTER_HOME"] == str(tmp_path / "dagster")


def test_the_gate_has_the_bounds_that_are_set() -> None:
    found = Settings.load(gate_tolerance=0.2, gate_max_ece=0.3, gate_min_lens=7, gate_min_auroc=0.6)
    assert found.gate_against_champion == {"tolerance": 0.2, "max_ece": 0.3}
    assert found.gate == {"min_lens": 7, "min_nonlens": 50, "min_auroc_low": 0.6}


def test_the_docs_list_every_setting_with_its_help() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    rows = {
        cells[1].strip().strip("`"): cells[-2].strip()
        for cells in (line.split("|") for line in page.splitlines() if line.startswith("| `"))
        if len(cells) == 5
    }
    for name, field in Settings.model_fields.items():
        variable = field.validation_alias or f"LENS_{name.upper()}"
        assert rows.get(str(variable)) == field.description, variable


def test_a_variable_that_is_no_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENS_PREVALANCE", "0.01")
    with pytest.raises(InputError, match="LENS_PREVALANCE: .* did you mean LENS_PREVALENCE"):
        Settings.load()
    monkeypatch.delenv("LENS_PREVALANCE")
    monkeypatch.setenv("LENS_TRACKING_URI", "http://localhost:5000")
    with pytest.raises(InputError, match="LENS_TRACKING_URI: .* did you mean MLFLOW_TRACKING_URI"):
        Settings.load()
    monkeypatch.delenv("LENS_TRACKING_URI")
    monkeypatch.setenv("LENS_BANDS", "g,g")
    with pytest.raises(InputError, match="LENS_BANDS: names nothing between two commas, or one"):
        Settings.load()


def test_a_url_that_lacks_a_slash_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENS_CLOUD_URL", "s3:/bucket/lenses")
    with pytest.raises(InputError, match="s3:/bucket/lenses: a URL has two slashes"):
        Settings.load()
    for url in ("s3://", "gs:///"):
        monkeypatch.setenv("LENS_CLOUD_URL", url)
        with pytest.raises(InputError, match=f"{url}: names no bucket"):
            Settings.load()
    monkeypatch.setenv("LENS_CLOUD_URL", "s3://bucket/x{1,2}y")
    with pytest.raises(InputError, match="where shards are published must not hold braces"):
        Settings.load()
