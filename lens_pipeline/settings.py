"""Everything that is read from the environment, typed, in one place.

``LENS_*`` variables and ``MLFLOW_TRACKING_URI``; see the table in docs/settings.md. Paths are made
absolute when the settings are read, relative to the working directory.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from lens_pipeline.choices import Choice, Method
from lens_pipeline.errors import InputError
from lens_pipeline.locations import absolute, meant_as_url, publishable, written_down
from lens_pipeline.settings_files import first_wrong

# Variables of the deployment, the code server, the tests, and of commands that a step has started,
# which are no settings.
OTHERS = (
    "LENS_FAILURE",
    *("LENS_TAG", "LENS_DATA", "LENS_ENV_FILE", "LENS_NO_SKIP"),
    *("LENS_CODE_HOST", "LENS_CODE_PORT", "LENS_DAGSTER_PORT"),
    *("LENS_MLFLOW_PORT", "LENS_MLFLOW_HOSTS", "LENS_MLFLOW_ORIGINS"),
)
SIMULATION = "simulation"  # in the place of a source
SQLITE = re.compile(r"(?i)sqlite(\+\w+)?:///(?P<path>/[^?]*)")  # the URI of a database's file
SERVED = ".served"  # in DAGSTER_HOME, by `lens-pipeline show`, which locks it meanwhile
# Where `lens-pipeline show` serves what it is not told to serve elsewhere.
HOST, DAGSTER_PORT, MLFLOW_PORT = "127.0.0.1", 3000, 5000


def _on_this_machine(path: str | Path) -> str:
    if meant_as_url(str(path)):
        raise ValueError(f"{path} is a URL; name a folder on this machine")
    if re.search("[?]|%[0-9a-fA-F]{2}", found := absolute(str(path))):
        raise ValueError(
            f"{found} holds a question mark, or a per cent sign and two hexadecimal digits, which "
            "mean something else in the URL of the database that lies there; name another folder"
        )
    return found


def _tracking_uri(uri: str | None) -> str | None:
    """Raises ValueError for a SQLite file that is another in every directory, and for an address
    that would be taken apart elsewhere than it is meant, and its password shown."""
    if uri and re.match(r"(?i)sqlite(\+\w+)?:(?!////)", uri):
        raise ValueError(
            f"{uri} is another file in every working directory; write sqlite:////, four slashes, "
            "and its absolute path"
        )
    if uri and SQLITE.match(uri) is None:
        wrong = "is no address; in a user or password write / as %2F, @ as %40 and : as %3A"
        try:
            parts = urlsplit(uri)
            _ = parts.port  # raises for what is no number
        except ValueError:
            raise ValueError(wrong) from None
        database = not parts.scheme.startswith("http")  # which SQLAlchemy takes apart
        if (parts.netloc and "@" in parts.path) or (database and parts.netloc.count("@") > 1):
            raise ValueError(wrong)
    return uri


def _absolute_source(source: str) -> str:
    return source if source == SIMULATION else written_down(source)


def _web_address(secret: Any) -> Any:
    """Raises ValueError for what cannot be requested, and does not show it."""
    value = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    if value is None:
        return None
    if not re.fullmatch(r"https?://[^/]+(/.*)?", value) or not re.fullmatch("[!-~]+", value):
        raise ValueError(
            "is no address that begins with http:// or https://, or holds a space or a letter "
            "beyond ASCII"
        )
    if "@" in urlsplit(value).netloc:
        raise ValueError("names a user, but nobody is logged in; its secret is to be in its path")
    return secret


def _names(text: Any) -> Any:
    return tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else text


def _refuse_unknown(known: Iterable[str]) -> None:
    """Raises InputError for a variable that looks like a setting, and is none."""
    names = [*known, *OTHERS]
    for name in sorted(os.environ):
        if name.startswith("LENS_") and name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}? Else unset it" if near else "unset it"
            raise InputError(f"{name}: there is no such setting; {hint}")


def _once_each(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names and ("" in names or len(set(names)) < len(names)):
        raise ValueError("names nothing between two commas, or one thing twice")
    return names


def _told_apart(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Sorted: in whatever order they are asked for, the result is the same one."""
    if names and "..." in "".join(names):
        raise ValueError("no name may hold `...`, which stands for a range of partitions")
    return names and tuple(sorted(names))


_File = Annotated[str | None, BeforeValidator(lambda file: file and absolute(file))]


# Of cutouts, in pixels: the widest arcs still fit, and the cutouts into memory.
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 512
MAX_SEED = 2**32 - 1


class Settings(BaseSettings):
    """What the environment says; the description of each field is its help."""

    model_config = SettingsConfigDict(
        env_prefix="LENS_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    home: Annotated[Path, BeforeValidator(_on_this_machine)] = Field(
        default=Path(".lens"),
        validate_default=True,
        description="Everything is written under it. Its path holds no `?`, and no `%` before two "
        "hexadecimal digits.",
    )
    source: Annotated[str, BeforeValidator(_absolute_source)] = Field(
        default=SIMULATION,
        description="`simulation`, or the path or URL of a catalogue, or a folder of cutouts, "
        "or of published shards.",
    )
    bands: Annotated[
        tuple[str, ...] | None, NoDecode, BeforeValidator(_names), AfterValidator(_once_each)
    ] = Field(
        default=None, description="Bands to keep, by name and in this order, as `g,r,i`; else all."
    )
    pad: bool = Field(
        default=False,
        description="Pad cutouts smaller than the image size with their median; else they are "
        "rejected.",
    )
    preset: Literal["tiny", "quick", "full"] = Field(
        default="quick", description="Size of the job: tiny (tests), quick (two cores), full (GPU)."
    )
    archs: str | None = Field(
        default=None,
        description="The ensemble's members, `[name=]architecture[@seed]`, comma-separated; "
        "by default the preset's.",
    )
    cloud_url: Annotated[str | None, BeforeValidator(lambda url: url and publishable(url))] = Field(
        default=None,
        description="Where shards are published; by default a folder in LENS_HOME.",
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        description="fsspec options for LENS_CLOUD_URL and LENS_SOURCE, JSON; see below.",
    )
    cache_gb: float = Field(
        default=100,
        gt=0,
        description="Most GB (10^9 bytes) of remote shards that are kept in a cache folder.",
    )
    tracking_uri: Annotated[str | None, BeforeValidator(_tracking_uri)] = Field(
        default=None,
        validation_alias="MLFLOW_TRACKING_URI",
        description="MLflow's tracking server, or a database, as `sqlite:////absolute/path.db`; by "
        "default one in LENS_HOME.",
    )
    mlflow_page: str | None = Field(
        default=None,
        pattern="^https?://[^@?]+$",  # results name it: neither password nor token
        description="Address of MLflow's pages, for links to them; by default that of "
        "MLFLOW_TRACKING_URI, where it is a server's, or of `lens-pipeline show`, where it is not "
        "set.",
    )
    dagster_page: str | None = Field(
        default=None,
        pattern="^https?://[^@?]+$",
        description="Address of Dagster's pages, for links to runs in alerts; by default that of "
        "`lens-pipeline show`.",
    )
    deployment: Literal["local", "staging", "production"] = Field(
        default="local",
        description="`local`, `staging` or `production`: tagged on every run, and how many of its "
        "steps are executed at a time (two, four, one per core).",
    )
    survey: Annotated[
        tuple[str, ...] | None,
        *(NoDecode, BeforeValidator(_names)),
        *(AfterValidator(_once_each), AfterValidator(_told_apart)),
    ] = Field(
        default=None,
        description="Whose images: simulated (des, hsc, lsst, euclid_vis, cfhtls; by default des), "
        "or those of a catalogue's column `survey` (by default every row). Of several, as "
        "`des,hsc`, the data are partitioned by survey.",
    )
    simulation: _File = Field(default=None, description="A YAML file that changes the simulation.")
    training: _File = Field(
        default=None,
        description="A YAML file of training settings, for all members or by name.",
    )
    n_cutouts: int | None = Field(
        default=None, ge=100, description="Simulated cutouts; by default the preset's."
    )
    image_size: int | None = Field(
        default=None,
        ge=MIN_IMAGE_SIZE,
        le=MAX_IMAGE_SIZE,
        description="Cutout side in pixels, 32 to 512; by default the preset's.",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Seed of the simulation, the split and training."
    )
    max_reject_fraction: float = Field(
        default=0.1, ge=0, le=1, description="More unusable cutouts than this stop the run."
    )
    fusion: Choice = Field(
        default="best",
        description="How members become one score: `mean`, `uncertainty_weighted`, `stacking`, "
        "`bayesian` or `single`; `best` compares all on the validation set.",
    )
    calibration: Method = Field(
        default="platt",
        description="How logits become probabilities, on the validation set: `platt`, "
        "`temperature` or `isotonic`.",
    )
    test_time_augmentation: bool = Field(
        default=False,
        description="A network's score is the mean over a cutout's eight turns and flips: it ranks "
        "simulated cutouts better, at eight times the work, and nothing is trained again for it.",
    )
    prevalence: float = Field(
        default=1e-3,
        gt=0,
        lt=1,
        description="The fraction of lenses among the cutouts of the sky, for `sky_probability`.",
    )
    gate_min_lens: int = Field(
        default=50, ge=1, description="Lenses that the test set needs before a model is promoted."
    )
    gate_min_nonlens: int = Field(
        default=50, ge=1, description="Non-lenses that the test set needs, likewise."
    )
    gate_tolerance: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="A challenger that may lose this much of the champion's TPR at a small FPR, at "
        "95 % confidence, is not promoted.",
    )
    gate_max_ece: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="The most calibration error of a challenger, both classes weighing the same, "
        "in excess of what chance alone makes.",
    )
    gate_min_auroc: float = Field(
        default=0.5, ge=0, le=1, description="The lower 95 % bound of AUROC must exceed this."
    )

    retrain_cron: str = Field(
        default="0 3 * * 1", description="When the schedule `weekly_retraining` launches, as cron."
    )
    time_zone: str = Field(default="UTC", description="Of the schedules, as `Europe/Paris`.")
    webhook_url: Annotated[SecretStr | None, BeforeValidator(_web_address)] = Field(
        default=None,
        description="Receives failed runs, runs that last too long, checks that warn, schedules "
        "and sensors that fail, sources that cannot be read, new challengers and new champions by "
        "POST, as JSON with a `text`.",
    )
    heartbeat_url: Annotated[SecretStr | None, BeforeValidator(_web_address)] = Field(
        default=None,
        description="Requested (GET) each minute while schedules and sensors work, for a service "
        "that tells people when the requests stop, as Healthchecks and Uptime Kuma do.",
    )
    keep_days: int = Field(
        default=90,
        ge=1,
        description="Days for which the job `cleaning` keeps runs, their logs, and folders of "
        "steps that nothing uses.",
    )
    git_commit: str | None = Field(
        default=None,
        description="The commit of this code where it is no checkout, as in an image.",
    )
    verify: bool = Field(
        default=False, description="Check the sha256 of what is reused, not only file sizes."
    )

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment's name of a setting."""
        return str(cls.model_fields[name].validation_alias or f"LENS_{name.upper()}")

    @classmethod
    def load(cls, **changes: Any) -> Self:
        """The settings from the environment, with `changes` (of the command line) on top.

        Raises InputError, naming the variable, where a value is not valid, and for a variable that
        is no setting.
        """
        _refuse_unknown(map(cls.variable, cls.model_fields))
        for name, value in changes.items():
            if value == "":  # as of a variable of the shell that is not set
                variable = name if name.isupper() else cls.variable(name)
                raise InputError(f"{variable}: is given, and empty")
        try:
            return cls(**{name: value for name, value in changes.items() if value is not None})
        except ValidationError as problem:
            (name, *_), said, _ = first_wrong(problem)
            variable = name if name.isupper() else f"LENS_{name.upper()}"
            raise InputError(f"{variable}: {said}; correct or unset it") from None
        except SettingsError as problem:  # a JSON value that does not parse
            cause = problem.__cause__ or problem
            raise InputError(f"{problem} ({cause}); LENS_STORAGE_OPTIONS must be JSON") from None

    @property
    def is_simulated(self) -> bool:
        """Whether the cutouts are simulated, and no catalogue is read."""
        return self.source == SIMULATION

    @property
    def cache(self) -> Path:
        """What was fetched: remote shards, and registered models."""
        return self.home / "cache"

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def mlflow_database(self) -> Path:
        """Where MLflow keeps its records, if MLFLOW_TRACKING_URI does not say otherwise."""
        return self.home / "mlflow.db"

    @property
    def mlflow_file(self) -> Path | None:
        """The SQLite file that MLflow's records are in; None where a server has them."""
        if self.tracking_uri is None:
            return self.mlflow_database
        found = SQLITE.match(self.tracking_uri)
        return found and Path(found["path"])

    @property
    def _own_mlflow_uri(self) -> str:
        return f"sqlite:///{self.mlflow_database}"

    @property
    def mlflow_uri(self) -> str:
        """The tracking URI: the environment's own, or a SQLite file in LENS_HOME.

        Without the user and password of a server: MLflow would show them in its errors, and takes
        them from the environment; see `mlflow_credentials`.
        """
        uri = self.tracking_uri or self._own_mlflow_uri
        if not uri.startswith("http"):
            return uri
        parts = urlsplit(uri)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def mlflow_credentials(self) -> dict[str, str]:
        """The variables in which MLflow takes what MLFLOW_TRACKING_URI says of user and password;
        none where that is no server's address, or says nothing of the kind."""
        parts = urlsplit(self.tracking_uri or "")
        if not parts.scheme.startswith("http") or parts.username is None:
            return {}
        return {
            "MLFLOW_TRACKING_USERNAME": unquote(parts.username),
            "MLFLOW_TRACKING_PASSWORD": unquote(parts.password or ""),
        }

    @property
    def mlflow_pages(self) -> str | None:
        """The address under which MLflow's pages are, without a slash at its end; None where none
        is known. A home's own records are shown by `show`, unless it is told otherwise here."""
        served = self.mlflow_uri if self.mlflow_uri.startswith("http") else None
        own = self.mlflow_uri == self._own_mlflow_uri  # MLflow itself puts it into the environment
        shown = self.shown.get("mlflow_page", f"http://{HOST}:{MLFLOW_PORT}") if own else None
        address = self.mlflow_page or served or shown
        return address and address.rstrip("/")

    def dagster_run_page(self, run_id: str) -> str | None:
        """The address of a run's page in Dagster; None where it is not known."""
        address = self.dagster_page or self.shown.get("dagster_page")
        return address and f"{address.rstrip('/')}/runs/{run_id}"

    @property
    def shown(self) -> dict[str, Any]:
        """What the last `lens-pipeline show` of this home has written into SERVED: where its
        `dagster_page` and `mlflow_page` are, and the `settings` (see `kept`) that it began with."""
        try:
            return dict(json.loads((self.dagster_home / SERVED).read_bytes()))
        except (OSError, ValueError, TypeError):
            return {}

    @property
    def artifact_location(self) -> str:
        return (self.home / "mlartifacts").as_uri()

    @property
    def surveys(self) -> tuple[str, ...]:
        """Those by which the data are partitioned; none where all are of one, or not told apart."""
        return self.survey if self.survey and len(self.survey) > 1 else ()

    @property
    def cloud(self) -> str:
        return self.cloud_url or str(self.home / "cloud")

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    @property
    def gate(self) -> dict[str, Any]:
        """The thresholds that every model must reach."""
        return {
            "min_lens": self.gate_min_lens,
            "min_nonlens": self.gate_min_nonlens,
            "min_auroc_low": self.gate_min_auroc,
        }

    @property
    def gate_against_champion(self) -> dict[str, Any]:
        """The further thresholds of a model that would take a champion's place."""
        return {"tolerance": self.gate_tolerance, "max_ece": self.gate_max_ece}

    @property
    def decisive(self) -> dict[str, Any]:
        """What was set of all that decides on results, and is not as it is by default, for JSON.

        Neither storage options nor the tracking server's URI: they may hold secrets.
        """
        return {name: v for name, v in self.kept.items() if name not in ("deployment", "cache_gb")}

    @property
    def kept(self) -> dict[str, Any]:
        """What a home remembers of its last run: `decisive`, and what else its graph is made by."""
        places = {"home", "storage_options", "tracking_uri", "mlflow_page", "dagster_page"}
        operation = {
            *("git_commit", "verify", "keep_days"),
            *("retrain_cron", "time_zone", "webhook_url", "heartbeat_url"),
        }
        names = self.model_fields_set - places - operation
        return self.model_dump(mode="json", include=names, exclude_defaults=True)

    def export(self) -> None:
        """Put what was set into the environment, for the steps and child processes."""
        os.environ["DAGSTER_HOME"] = str(self.dagster_home)
        secret = {"tracking_uri", "webhook_url", "heartbeat_url"}
        for name in {*self.model_fields_set, "home"} - secret:
            value = getattr(self, name)
            if value is not None:
                text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
                if isinstance(value, tuple):
                    text = ",".join(value)
                os.environ[f"LENS_{name.upper()}"] = text
