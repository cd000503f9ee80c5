"""Whether an ensemble may become champion: against the registry as it is now."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.scored import Source
from lens_pipeline.defs.stages import log
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.registered import load_registered
from lens_pipeline.registry import MODEL, REPLACED, ROLLED_BACK
from lens_pipeline.steps import Recipe, digest, run_step
from lens_pipeline.tracking import STEP_KEY

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

    from lens_pipeline.catalogue.dataset import CutoutFormat
    from lens_pipeline.ensemble.system import LensEnsemble
    from lens_pipeline.evaluation.gates import GateDecision

GATE_CHECK = "passes_the_gate"
RESCORE = "lens_pipeline.scoring.rescore"


def decide(
    lens: LensHome,
    key: str,
    ensemble: Path,
    evaluation: Path,
    source: Source,
    champion: "ModelVersion | None",
    version: "ModelVersion | None" = None,
) -> "GateDecision":
    """The decision on an ensemble and its evaluation (folders), with its reasons.

    key: of the ensemble, as its version in the registry has it; champion: whose place it would
    take, which is scored on the test split of today; version: its own in the registry, where it has
    one.
    """
    from lens_pipeline.catalogue.dataset import CutoutFormat
    from lens_pipeline.ensemble.calibration import at_mixture
    from lens_pipeline.ensemble.description import read_description, read_groups
    from lens_pipeline.evaluation.gates import GateDecision, champion_gate, refused
    from lens_pipeline.evaluation.origins import REAL, by_origin
    from lens_pipeline.evaluation.result import SCORES, read_evaluation
    from lens_pipeline.evaluation.standing import lens_fraction

    settings = lens.settings
    if champion is not None and champion.tags.get(STEP_KEY) == key:
        return GateDecision(True, (), read_evaluation(evaluation).gate(settings.gate).figures)
    if version is not None and ROLLED_BACK in version.tags:
        return refused(f"version {version.version} was rolled back; promote it by hand")
    if champion is None:
        return read_evaluation(evaluation).gate(settings.gate)
    if version is not None and int(version.version) < int(champion.version):
        return refused(f"version {version.version} is older than the champion")
    if version is not None and champion.tags.get(REPLACED) == str(version.version):
        return refused(
            f"version {version.version} was replaced by hand with the older version "
            f"{champion.version}; promote it by hand"
        )
    own = read_description(ensemble)
    dataset = source.opened()[0]
    if own["dataset"] != dataset.facts["content"]:
        raise InputError(
            f"{dataset.folder}: is not the dataset that the ensemble in {ensemble} was evaluated "
            "on; materialise what lies between them first"
        )
    number = str(champion.version)
    try:
        theirs, _ = load_registered(lens.registry, f"models:/{MODEL}/{number}")
    except NoAnswerError:
        raise  # it says nothing of the champion
    except InputError as problem:
        return refused(f"the champion, version {number}, cannot be compared: {problem}")
    if differing := _other_cutouts(CutoutFormat.from_dict(own["format"]), theirs):
        return refused(
            f"the champion, version {number}, is not comparable: {differing}; if the new one is "
            "to replace it, promote it by hand"
        )
    import pandas as pd

    test = pd.read_parquet(evaluation / SCORES, filters=[("split", "==", "test")])
    test = test[test["probability"].notna()]
    if read_evaluation(evaluation).on_real_ones(settings.gate):
        test = by_origin(test, dataset.facts["origin"] == "simulation")[REAL]
    probability = _scored_by(theirs, source, lens).reindex(test["id"])
    if probability.isna().any():
        return refused(f"the champion, version {number}, gives no score for some of the test split")
    log.info("  comparing with the champion, version %s", number)
    label = test["label"].to_numpy(int)
    seen = test["group"].isin(read_groups(ensemble) | theirs.groups).to_numpy()
    decision = champion_gate(
        label,
        at_mixture(test["probability"], label[~seen], lens_fraction(own)),
        probability.to_numpy(),
        group=test["group"].to_numpy(str),
        seen=seen,
        **settings.gate,
        **settings.gate_against_champion,
    )
    return read_evaluation(evaluation).in_each_part(decision, settings.gate)


def _other_cutouts(form: "CutoutFormat", champion: "LensEnsemble") -> str:
    """How the champion's cutouts differ from these; empty where they do not."""
    theirs = champion.format
    if _alike(theirs.pixel_scale, form.pixel_scale):
        theirs = replace(theirs, pixel_scale=form.pixel_scale)
    return "; ".join(
        f"{name} {has}, here {needed}" for name, needed, has in form.differences(theirs)
    )


def _alike(one: float | None, other: float | None) -> bool:
    """Of pixel scales; one that is not known is no other one."""
    return one is None or other is None or math.isclose(one, other, rel_tol=1e-3)


def _scored_by(ensemble: "LensEnsemble", source: Source, lens: LensHome) -> "pd.Series":
    """The champion's probabilities of the test split, by id: a step, for both who ask."""
    import pandas as pd

    from lens_pipeline.ensemble.carried import requirements
    from lens_pipeline.scoring.rescore import SCORES, rescore_test_split

    recipe = Recipe(
        stage="champion_scores",
        modules=(RESCORE, *source.modules),
        libraries=("numpy", "scipy", "pandas", "pyarrow"),
        inputs={"champion": digest(ensemble.facts), **source.inputs},
        settings={"libraries": requirements(ensemble)},
    )
    step = run_step(
        recipe,
        lens.settings.reports,
        lambda out: rescore_test_split(ensemble, source.opened()[0], out),
        verify=lens.settings.verify,
    )
    return pd.read_parquet(step.folder / SCORES).set_index("id")["probability"]
