"""What is checked of a catalogue and of the dataset that is made from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dagster as dg

from lens_pipeline.defs.shown import FIRST, derived, table
from lens_pipeline.defs.stages import DATASET, Made, newest_first
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Step

if TYPE_CHECKING:
    import pandas as pd

    from lens_pipeline.catalogue.dataset import Dataset

PIXELS = "lens_pipeline.catalogue.drift"
POSITIONS = "lens_pipeline.catalogue.positions"
STATISTICS = "pixel statistics"  # the metadata by which versions are compared
# Of a class, in a split. Fewer cannot tell fusions apart (five folds of two), nor resolve any rate.
FEW = 10
LOPSIDED = 0.1  # the share of the rarer class among cutouts of one origin, which then tells it


PIXEL_LIBRARIES = ("astropy", "numpy")  # of `drift`


def pixels_of(dataset: "Dataset", content: str, settings: Settings) -> dict[str, Any]:
    """The `pixel_statistics` of a dataset with that content, of which every pixel is read once."""
    from lens_pipeline.catalogue.drift import pixel_statistics

    def measured() -> bytes:
        return json.dumps(pixel_statistics(dataset), indent=1).encode()

    file = derived(
        "statistics", "pixels.json", content, measured, settings, (PIXELS,), PIXEL_LIBRARIES
    )
    return json.loads(file.read_text())


def no_group_spans_two_splits(dataset: "Dataset") -> dg.AssetCheckResult:
    torn = dataset.groups_in_two_splits()
    return dg.AssetCheckResult(
        check_name="no_group_spans_two_splits",
        passed=not torn,
        metadata={"groups": len(torn), "at most": 0, "first": ", ".join(torn[:5])},
    )


def every_split_holds_both_classes(dataset: "Dataset", survey: str | None) -> dg.AssetCheckResult:
    from lens_pipeline.catalogue.splits import SPLITS

    counts = {part: dataset.facts["splits"][part] for part in SPLITS}
    classes = {"n_lens": "lenses", "n_nonlens": "non-lenses"}
    fewest = min(of[name] for of in counts.values() for name in classes)
    few = [
        f"{of[key]} {name} in {part}"
        for part, of in counts.items()
        for key, name in classes.items()
        if of[key] < FEW
    ]
    error, warning = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        check_name="every_split_holds_both_classes",
        passed=fewest >= FEW,
        # Of several surveys, another may hold what one lacks: `merge_shards` looks at all.
        severity=warning if fewest or survey else error,
        description=f"only {', '.join(few)}; {FEW} or more are advised" if few else None,
        metadata={
            "fewest of a class": fewest,
            "at least": FEW,
            **{f"lenses in {part}": of["n_lens"] for part, of in counts.items()},
            **{f"non-lenses in {part}": of["n_nonlens"] for part, of in counts.items()},
            **{
                f"lens fraction of {part}": of["n_lens"] / (of["n_lens"] + of["n_nonlens"])
                for part, of in counts.items()
                if of["n_lens"] + of["n_nonlens"]
            },
        },
    )


def each_origin_holds_both_classes(dataset: "Dataset") -> dg.AssetCheckResult:
    train = dataset.table("train")
    origin = train.assign(simulated=train.get("simulated", False))["simulated"].fillna(False)
    shares = train["label"].astype(float).groupby(origin.astype(bool)).mean()
    lenses = {"simulated" if key else "real": float(share) for key, share in shares.items()}
    mixed = all(LOPSIDED <= share <= 1 - LOPSIDED for share in lenses.values())
    passed = len(lenses) < 2 or mixed
    of_each = " and ".join(f"{share:.0%} of the {name}" for name, share in lenses.items())
    return dg.AssetCheckResult(
        check_name="each_origin_holds_both_classes",
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=None
        if passed
        else f"{of_each} cutouts to train on are lenses: networks may learn to tell the origins, "
        "by their noise, in place of arcs; paint arcs on real galaxies, see `hosts`",
        metadata={
            **{f"lens fraction of {name}": share for name, share in lenses.items()},
            "at least of either class": LOPSIDED,
        },
    )


def all_pixels_are_finite(pixels: Mapping[str, Any]) -> dg.AssetCheckResult:
    of_split = pixels["non_finite"]
    return dg.AssetCheckResult(
        check_name="all_pixels_are_finite",
        passed=not any(of_split.values()),
        metadata={
            "non-finite pixels": sum(of_split.values()),
            "at most": 0,
            **{f"of these in {part}": n for part, n in of_split.items()},
        },
    )


def bands_are_as_in_the_last_version(
    context: dg.AssetExecutionContext, step: Step, pixels: Mapping[str, Any], survey: str | None
) -> dg.AssetCheckResult:
    from lens_pipeline.catalogue.drift import changes, other_format

    def judged(passed: bool, why: str | None = None, **metadata: Any) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            check_name="bands_are_as_in_the_last_version",
            passed=passed,
            severity=dg.AssetCheckSeverity.WARN,
            description=why,
            metadata={name.replace("_", " "): value for name, value in metadata.items()},
        )

    before = _last_pixels(context, step.content, survey)
    if before is None:
        return judged(True, compared="there is no earlier version to compare with")
    if differing := other_format(before, pixels):
        return judged(False, differing, compared=differing)
    found = changes(before["statistics"], pixels["statistics"])
    if found.empty:
        return judged(True, compared="one of both versions has no cutouts to train on")
    worst = found.iloc[int((found["change"] / found["at_most"]).to_numpy().argmax())]
    passed = bool((found["change"] <= found["at_most"]).all())
    what = f"{worst['statistic']} of {worst['band']}"
    return judged(
        passed,
        None
        if passed
        else f"{what}: changed by {worst['change']:.3g} since the last version here, at most "
        f"{worst['at_most']:g} passes; more such changes are in the check's table",
        largest_change=float(worst["change"]),
        at_most=float(worst["at_most"]),
        of=what,
        changes=table(found),
    )


def _last_pixels(
    context: dg.AssetExecutionContext, content: str, survey: str | None
) -> dict[str, Any] | None:
    """The pixel statistics of the newest materialisation that has another content, if any."""
    for record in newest_first(context.instance.fetch_materializations, DATASET, at_a_time=10):
        event = record.asset_materialization
        if event is None or event.partition != survey or STATISTICS not in event.metadata:
            continue
        if event.metadata["content"].value != content:
            return cast("dict[str, Any]", event.metadata[STATISTICS].value)
    return None


def no_near_duplicates_across_splits(dataset: "Dataset") -> dg.AssetCheckResult:
    from lens_pipeline.catalogue.dataset import NEAR_DUPLICATES

    missed = dataset.facts["n_alike_not_compared"]
    about = {"alike, but not compared": missed}
    found = dataset.near_duplicates()
    where = dataset.folder / NEAR_DUPLICATES
    return _no_pairs("no_near_duplicates_across_splits", found, about, where, not missed)


def no_position_is_in_two_splits(
    rows: "pd.DataFrame", split: "pd.Series", content: str, settings: Settings
) -> dg.AssetCheckResult:
    """content: a hash of the rows and their splits, for which the sky is searched once."""
    import io

    import pandas as pd

    from lens_pipeline.catalogue.positions import RADIUS, positions_in_two_splits, with_position

    def searched() -> bytes:
        found = io.BytesIO()
        positions_in_two_splits(rows, split).to_parquet(found, index=False)
        return found.getvalue()

    file = derived(
        "statistics",
        "positions.parquet",
        content,
        searched,
        settings,
        (POSITIONS,),
        ("astropy", "pandas", "pyarrow"),
    )
    about = {
        "within arcsec": RADIUS,
        "rows without a position": int((~with_position(rows)).sum()),
    }
    return _no_pairs("no_position_is_in_two_splits", pd.read_parquet(file), about, file)


def _no_pairs(
    name: str, pairs: "pd.DataFrame", about: Mapping[str, Any], file: Path, searched: bool = True
) -> dg.AssetCheckResult:
    """Warns of pairs of cutouts, listed in a file, that should not be in two splits, and where not
    all that may be such have been looked at."""
    return dg.AssetCheckResult(
        check_name=name,
        passed=pairs.empty and searched,
        severity=dg.AssetCheckSeverity.WARN,
        description=None
        if pairs.empty
        else f"{len(pairs)} pairs of cutouts of one place on the sky are in two splits, see "
        f"{file}; give the cutouts of a pair one group",
        metadata={
            "pairs": len(pairs),
            "at most": 0,
            **about,
            "first": table(pairs.head(FIRST)),
        },
    )


def check_not_refused(upstream: Made, settings: Settings) -> None:
    """Raises InputError where a blocking check refuses a dataset: beyond the run that it is made in
    a check blocks nothing, and of several surveys it may since have passed for another."""
    from lens_pipeline.catalogue.dataset import open_dataset

    dataset = open_dataset(upstream.folder)
    for check in (
        no_group_spans_two_splits(dataset),
        all_pixels_are_finite(pixels_of(dataset, upstream.content, settings)),
    ):
        if not check.passed:
            raise InputError(f"{upstream.folder}: the check {check.check_name} has refused it")
