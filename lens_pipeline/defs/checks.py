"""What checks have found, in words."""

from collections.abc import Iterable

import dagster as dg

from lens_pipeline.defs.gate import GATE_CHECK


def said_of_checks(evaluations: Iterable[dg.AssetCheckEvaluation]) -> list[str]:
    """Of each check that has failed: its name, and what it has counted. The gate speaks for
    itself."""
    said = []
    for check in evaluations:
        if check.passed or check.check_name == GATE_CHECK:
            continue
        figures = [
            f"{name} {value.value:.3g}"
            if isinstance(value.value, float)
            else f"{name} {value.value}"
            for name, value in check.metadata.items()
            if isinstance(value.value, int | float)
        ]
        why = check.description or ", ".join(figures[:3])
        how = "failed" if check.severity == dg.AssetCheckSeverity.ERROR else "warns"
        name = f"{check.check_name} of {check.asset_key.to_user_string()}"
        said.append(f"check {how}: {name}{why and f' ({why})'}")
    return said
