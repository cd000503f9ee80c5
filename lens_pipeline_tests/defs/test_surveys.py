"""One check over several surveys: what it says of all, and how severe it is."""

from pathlib import Path

import dagster as dg
import pytest

from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs import catalogue
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import CATALOGUE, DATASET
from lens_pipeline.defs.surveys import every_survey, over_surveys, partitioned
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings

WARN, ERROR = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR


@pytest.mark.parametrize(
    ("judged", "passed", "severity"),
    [
        ({"des": (True, WARN), "hsc": (True, ERROR)}, True, ERROR),
        ({"des": (True, ERROR), "hsc": (False, WARN)}, False, WARN),
        ({"des": (False, ERROR), "hsc": (False, WARN)}, False, ERROR),
    ],
)
def test_a_check_passes_where_it_does_of_each_survey(
    judged: dict[str, tuple[bool, dg.AssetCheckSeverity]],
    passed: bool,
    severity: dg.AssetCheckSeverity,
) -> None:
    def body(
        context: dg.AssetExecutionContext, lens: LensHome, survey: str
    ) -> dg.MaterializeResult:
        of_one, as_severe = judged[survey]
        check = dg.AssetCheckResult(
            check_name="sound",
            passed=of_one,
            severity=as_severe,
            description=None if of_one else f"no {survey}",
            metadata={"figure": survey},
        )
        return dg.MaterializeResult(
            metadata={"of": survey}, data_version=dg.DataVersion(survey), check_results=[check]
        )

    thing = dg.asset(
        name="thing",
        check_specs=[dg.AssetCheckSpec("sound", asset="thing")],
        **partitioned([*judged]),
    )(over_surveys(body))
    with dg.DagsterInstance.ephemeral() as instance:
        ran = dg.materialize(
            [thing],
            instance=instance,
            tags=every_survey(Settings.load(survey=[*judged])),
            resources={"lens": LensHome()},
        )
    (check,) = ran.get_asset_check_evaluations()
    assert (check.passed, check.severity) == (passed, severity)
    failed = [f"{survey}: no {survey}" for survey, (of_one, _) in judged.items() if not of_one]
    assert check.description == ("; ".join(failed) or None)
    assert {name: value.value for name, value in check.metadata.items()} == {
        "des: figure": "des",
        "hsc: figure": "hsc",
    }
    made = ran.asset_materializations_for_node("thing")
    assert {one.partition: one.metadata["of"].value for one in made} == {"des": "des", "hsc": "hsc"}


def test_a_run_that_names_no_survey_makes_no_catalogue_that_others_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the catalogue, which is of all surveys, may be made by itself."""

    def begin(*about: object) -> None:
        raise KeyError("begun")

    monkeypatch.setattr(catalogue, "make_catalogue", begin)
    monkeypatch.setenv("LENS_HOME", str(tmp_path))
    settings = Settings.load(survey="des,hsc", preset="tiny", archs="lastro")
    settings.export()
    definitions = make_definitions(settings, retries=False)

    def run(job: str, assets: list[dg.AssetKey] | None = None, **named: str) -> None:
        definitions.resolve_job_def(job).execute_in_process(asset_selection=assets, tags=named)

    refused = "processed_dataset: is made survey by survey, and this run names none; choose its"
    for job in ("full_pipeline", "data"):
        with pytest.raises(InputError, match=refused):
            run(job)
        with pytest.raises(KeyError, match="begun"):
            run(job, **every_survey(settings))
        with pytest.raises(KeyError, match="begun"):
            run(job, **{"dagster/partition": "des"})
        with pytest.raises(KeyError, match="begun"):
            run(job, [CATALOGUE])
        with pytest.raises(InputError, match=refused):
            run(job, [CATALOGUE, DATASET])
