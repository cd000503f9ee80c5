"""Whether an ensemble may become champion: against the registry as it is now."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.scored import Source
from lens_pipeline.defs.stages import log
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.files import digest
from lens_pipeline.registered import load_registered
from lens_pipeline.registry import MODEL, REPLACED, ROLLED_BACK
from lens_pipeline.steps import Recipe, run_step
from lens_pipeline.tracking import STEP_KEY

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from numpy.typing import NDArray

    from lens_pipeline.catalogue.dataset import CutoutFormat
    from lens_pipeline.ensemble.system import LensEnsemble
    from lens_pipeline.evaluation.gates import GateDecision

GATE_CHECK = "passes_the_gate"
RESCORE = "lens_pipeline.scoring.rescore"


@dataclass(frozen=True)
class Candidate:
    """An ensemble that may become champion, and its evaluation (both are folders), of `source`.

    key: of the ensemble, as its version in the registry has it.
    """

    lens: LensHome
    key: str
    ensemble: Path
    evaluation: Path
    source: Source

    def against(
        self, champion: "ModelVersion | None", version: "ModelVersion | None" = None
    ) -> "GateDecision":
        """The decision, with its reasons.

        champion: whose place it would take, which is scored on the test split of today; version:
        its own in the registry, where it has one.
        """
        from lens_pipeline.evaluation.gates import GateDecision, refused
        from lens_pipeline.evaluation.result import read_evaluation

        if champion is not None and champion.tags.get(STEP_KEY) == self.key:
            alone = read_evaluation(self.evaluation).gate(self.lens.settings.gate)
            return GateDecision(True, (), alone.figures)
        if version is not None and ROLLED_BACK in version.tags:
            return refused(f"version {version.version} was rolled back; promote it by hand")
        if champion is None:
            return read_evaluation(self.evaluation).gate(self.lens.settings.gate)
        if version is not None and int(version.version) < int(champion.version):
            return refused(f"version {version.version} is older than the champion")
        if version is not None and self._was_replaced(champion, str(version.version)):
            return refused(
                f"version {version.version} was replaced by hand with the older version "
                f"{champion.version}; promote it by hand"
            )
        return self._compared(str(champion.version))

    def _was_replaced(self, champion: "ModelVersion", number: str) -> bool:
        """Whether a newer version was champion before this one, or before those older ones that
        have replaced one another in between."""
        known = {str(version.version): version for version in self.lens.registry.versions()}
        at = champion
        while (former := at.tags.get(REPLACED)) is not None and int(former) > int(at.version):
            if former == number:
                return True
            if former not in known:
                return False
            at = known[former]
        return False

    def _compared(self, number: str) -> "GateDecision":
        """With the champion, of that version, if it takes cutouts like these."""
        from lens_pipeline.catalogue.dataset import CutoutFormat
        from lens_pipeline.ensemble.description import read_description
        from lens_pipeline.evaluation.gates import refused

        own, dataset = read_description(self.ensemble), self.source.opened()[0]
        if own["dataset"] != dataset.facts["content"]:
            raise InputError(
                f"{dataset.folder}: is not the dataset that the ensemble in {self.ensemble} was "
                "evaluated on; materialise what lies between them first"
            )
        try:
            theirs, _ = load_registered(self.lens.registry, f"models:/{MODEL}/{number}")
        except NoAnswerError:
            raise  # it says nothing of the champion
        except InputError as problem:
            return refused(f"the champion, version {number}, cannot be compared: {problem}")
        if differing := _other_cutouts(CutoutFormat.from_dict(own["format"]), theirs):
            return refused(
                f"the champion, version {number}, is not comparable: {differing}; if the new one "
                "is to replace it, promote it by hand"
            )
        test, fitted_at = self._test_split(own, dataset.facts["origin"] == "simulation")
        champions = _scored_by(theirs, self.source, self.lens).reindex(test["id"])
        if champions.isna().any():
            return refused(
                f"the champion, version {number}, gives no score for some of the test split"
            )
        log.info("  comparing with the champion, version %s", number)
        return self._judged(test, fitted_at, champions.to_numpy(), theirs.groups)

    def _test_split(self, own: dict[str, Any], simulated: bool) -> "tuple[pd.DataFrame, float]":
        """(the scores of what is judged by: of the real cutouts alone where they are enough; the
        fraction of lenses among such in the validation split). own: the ensemble's description."""
        import pandas as pd

        from lens_pipeline.evaluation.fractions import lens_fraction
        from lens_pipeline.evaluation.origins import REAL, by_origin, lens_fraction_among
        from lens_pipeline.evaluation.result import SCORES, read_evaluation

        scores = pd.read_parquet(self.evaluation / SCORES)
        scores = scores[scores["probability"].notna()]
        test, validated = (scores[scores["split"] == split] for split in ("test", "val"))
        fitted_at = lens_fraction(own)
        if not read_evaluation(self.evaluation).on_real_ones(self.lens.settings.gate):
            return test, fitted_at
        alike = by_origin(validated, simulated).get(REAL)
        return by_origin(test, simulated)[REAL], lens_fraction_among(alike, fitted_at)

    def _judged(
        self,
        test: "pd.DataFrame",
        fitted_at: float,
        champions: "NDArray[np.float64]",
        learnt: frozenset[str],
    ) -> "GateDecision":
        """fitted_at: the fraction of lenses where `probability` holds; champions: the champion's
        probabilities of the cutouts of `test`; learnt: the groups that it knows."""
        from lens_pipeline.ensemble.calibration import at_mixture
        from lens_pipeline.ensemble.description import read_groups
        from lens_pipeline.evaluation.gates import champion_gate
        from lens_pipeline.evaluation.result import read_evaluation
        from lens_pipeline.evaluation.surveys import told_apart

        settings = self.lens.settings
        label = test["label"].to_numpy(int)
        seen = test["group"].isin(read_groups(self.ensemble) | learnt).to_numpy()
        decision = champion_gate(
            label,
            at_mixture(test["probability"], label[~seen], fitted_at),
            champions,
            group=test["group"].to_numpy(str),
            seen=seen,
            survey=told_apart(test).to_numpy(str),
            **settings.gate,
            **settings.gate_against_champion,
        )
        return read_evaluation(self.evaluation).in_each_part(decision, settings.gate)


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
