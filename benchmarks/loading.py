"""How long the code location takes to load, beyond Dagster itself. Every step's process pays it."""

import statistics
import subprocess
import sys
import time

from benchmarks._harness import Row, Target, options, report

REPEATS = 5
MODULES = ("dagster", "lens_pipeline.definitions")


def seconds(module: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - begun


def measure() -> tuple[list[Row], list[Target]]:
    for module in MODULES:
        seconds(module)  # into the file cache
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    for _ in range(REPEATS):
        for module in MODULES:
            times[module].append(seconds(module))
    rows: list[Row] = [
        {"import": m, "median s": statistics.median(t), "min s": min(t), "max s": max(t)}
        for m, t in times.items()
    ]
    added = rows[1]["median s"] - rows[0]["median s"]
    return rows, [Target("seconds that lens_pipeline.definitions adds", added, at_most=2)]


if __name__ == "__main__":
    report(options(__doc__), measure)
