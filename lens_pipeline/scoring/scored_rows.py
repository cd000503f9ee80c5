"""Which rows of a source have their scores already, from whichever file, and what these are."""

import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.build import LIBRARIES as PIXEL_LIBRARIES
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.code_hashes import source_hashes
from lens_pipeline.commit import code_commit
from lens_pipeline.ensemble.carried import further_libraries
from lens_pipeline.ensemble.learnt import LEARNT_PIXELS
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.files import digest
from lens_pipeline.scoring.score_files import FINGERPRINT, ROW_GROUP
from lens_pipeline.scoring.score_tables import LEARNT_FROM, has_learnt_from, score_table
from lens_pipeline.scoring.sources import CutoutSource, hashed

OF_ROWS = ("reject_reason", LEARNT_FROM, FINGERPRINT)  # columns beside those of the ensemble
_MODULES = ("lens_pipeline.scoring.score_tables", "lens_pipeline.scoring.shard_cutouts")
# Of reasons against a cutout: a disk that fails or goes away for a while, or a right that lacks,
# does not show in its file.
_MAY_PASS = ("the file cannot be read", "the file is missing")


def scoring_program(ensemble: LensEnsemble) -> str:
    """A hash of the code and the versions of libraries that pixels and scores come of."""
    libraries = {*PIXEL_LIBRARIES, "torch", "torchvision", *further_libraries(ensemble)}
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return digest([source_hashes(_MODULES), versions])[:32]


def model_hash(ensemble: LensEnsemble) -> str:
    decisive = {name: fact for name, fact in ensemble.facts.items() if name != LEARNT_PIXELS}
    return digest(decisive)[:32]


def made_by(ensemble: LensEnsemble) -> dict[str, Any]:
    """What `about_scores` tells, and decides on no score."""
    return {
        "dataset_version": ensemble.facts["dataset_version"],
        "code_version": importlib.metadata.version("lens-pipeline"),
        "code_commit": code_commit(),
    }


class ScoredRows:
    """catalogue: that of the rows. fingerprint: int64 (n,), of each row: a hash of all that decides
    its score (its id, its image files as they are and how they are read, the model, the program).
    known: bool (n,), whether its score is known, or the reason why it has none. learnt: bool (n,),
    whether the members of the ensemble have trained or validated on its group.

    A row of another file is the same where its fingerprint is.
    """

    def __init__(self, ensemble: LensEnsemble, source: CutoutSource) -> None:
        hashes, self._told = source.row_hashes()
        by = digest([model_hash(ensemble), scoring_program(ensemble)])
        self.fingerprint = hashed(pd.DataFrame({"row": hashes, "by": by})).view(np.int64)
        self.catalogue = source.catalogue
        self._columns = ensemble.columns
        self._ids = pd.Index(self.catalogue.table["id"])
        self.learnt = has_learnt_from(ensemble, self.catalogue)
        n = len(self._ids)
        self.known = np.zeros(n, dtype=bool)
        self._values = np.full((n, len(self._columns)), np.nan)
        self._reasons = np.full(n, None, dtype=object)

    def take(self, stored: pd.DataFrame, *, of_a_stopped_command: bool) -> NDArray[np.integer]:
        """Take over what is of these rows, and return which of them.

        stored: see `stored_scores`. Where a store does not tell whether an image is as it was, its
        score is taken of a command that was stopped alone, and what could not be used is not taken.
        """
        at = self._ids.get_indexer(pd.Index(stored["id"]))
        rejected = stored["reject_reason"].notna().to_numpy()
        same = self.fingerprint[at] == stored[FINGERPRINT].to_numpy()
        fits = (at >= 0) & same & (self._told[at] | (of_a_stopped_command & ~rejected))
        fits &= ~(rejected & self.known[at])  # a row that could not be used, and then could
        self.put(at[fits], stored[fits])
        return at[fits]

    def n_unknown(self, ids: pd.Series) -> int:
        """How many are of none of these rows."""
        return int((self._ids.get_indexer(pd.Index(ids)) < 0).sum())

    def put(self, rows: NDArray[np.integer], scores: pd.DataFrame) -> None:
        """scores: the columns of the ensemble and `reject_reason` of these rows, in their order."""
        reasons = scores["reject_reason"].astype(object)
        self._values[rows] = scores[self._columns].to_numpy(dtype=np.float64)
        self._reasons[rows] = reasons.where(reasons.notna(), None).to_numpy()
        self.known[rows] = True

    @property
    def rejected(self) -> NDArray[np.bool_]:
        return np.array([reason is not None for reason in self._reasons], dtype=bool)

    @property
    def may_pass(self) -> NDArray[np.integer]:
        """The rows that could not be used, and may be usable now though their files are as they
        were."""
        reasons = enumerate(self._reasons)
        rows = [row for row, why in reasons if why is not None and why.startswith(_MAY_PASS)]
        return np.array(rows, dtype=int)

    def reason(self, row: int) -> str | None:
        """Why it could not be used; None where it could, or is not known."""
        return None if self._reasons[row] is None else str(self._reasons[row])

    def forget(self, rows: NDArray[np.integer]) -> None:
        self.known[rows] = False
        self._reasons[rows] = None

    @property
    def n_untold(self) -> int:
        """Of how many no store tells whether their images are as they were."""
        return int((~self._told).sum())

    @property
    def n_scored(self) -> int:
        return int((self.known & ~self.rejected).sum())

    @property
    def reasons(self) -> Counter[str]:
        """Why how many could not be used."""
        return Counter(self._reasons[self.rejected].tolist())

    @property
    def logit(self) -> pd.Series:
        """Of each row, from 0; NaN where there is none."""
        return pd.Series(self._values[:, self._columns.index("logit")])

    def table(self, rows: slice | NDArray[np.integer]) -> pd.DataFrame:
        """The score table (see `score_catalogue`) of some rows, with the fingerprints."""
        ours = [*self._columns, *OF_ROWS]
        own = self.catalogue.table.iloc[rows].drop(columns=ours, errors="ignore")
        part = Catalogue(own.reset_index(drop=True), self.catalogue.source)
        scores = pd.DataFrame(self._values[rows], columns=self._columns)
        reasons = pd.Series(self._reasons[rows], dtype=object)
        table = score_table(part, scores, reasons, self.learnt[rows])
        place = list(table).index(LEARNT_FROM) + 1
        table.insert(place, FINGERPRINT, self.fingerprint[rows])
        return table

    def tables(self) -> Iterator[pd.DataFrame]:
        """`table` of all rows, some at a time."""
        for begin in range(0, len(self.known), ROW_GROUP):
            yield self.table(slice(begin, begin + ROW_GROUP))
