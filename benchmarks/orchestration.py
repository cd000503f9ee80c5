"""What Dagster and MLflow cost: the main job, the preset for tests, against the same library calls
in a plain script (`benchmarks._plain`).

Wall time of whole commands, each on an empty home, with the interpreter's start. A stage's seconds
are its step's, as Dagster saw it: with recording, pictures and checks. In one process, what a stage
imports is there for the next; with a process a step, each pays.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings

# What a run does beside its stages, each in a process of its own and without the interpreter.
PARTS = {
    "import of Dagster and the definitions": ("", "import lens_pipeline.definitions"),
    "a new Dagster instance": (
        "from lens_pipeline.runner import open_instance",
        "with open_instance(settings): pass",
    ),
    "import of MLflow": ("", "import mlflow"),
    "a new MLflow database": (
        "import mlflow; from lens_pipeline.tracking import Tracking",
        "Tracking(settings).experiment_id",
    ),
}
WHOLE, REST = "whole command", "beside the stages"
Times = dict[str, float]


def environment(home: Path, n: int) -> dict[str, str]:
    ours = {"LENS_HOME": str(home), "LENS_PRESET": "tiny", "LENS_N_CUTOUTS": str(n)}
    ours["DAGSTER_HOME"] = str(home / "dagster")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LENS_", "MLFLOW_"))}
    return kept | ours


def output(command: list[str], home: Path, n: int) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(home, n),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


def plain(home: Path, n: int) -> Times:
    begun = time.perf_counter()
    said = output(["-m", "benchmarks._plain", str(home / "plain"), str(n)], home, n)
    return whole(json.loads(said.splitlines()[-1]), time.perf_counter() - begun)


def whole(stages: Times, wall: float) -> Times:
    return {**stages, REST: wall - sum(stages.values()), WHOLE: wall}


def in_dagster(command: list[str], home: Path, n: int) -> Times:
    begun = time.perf_counter()
    output(command, home, n)
    wall = time.perf_counter() - begun
    with open_instance(Settings.load(home=home)) as instance:
        (run,) = instance.get_runs()
        steps = instance.get_run_step_stats(run.run_id)
    stages = {
        step.step_key.replace("__", "/"): step.end_time - step.start_time
        for step in steps
        if step.start_time is not None and step.end_time is not None
    }
    return whole(stages, wall)


def one_process(home: Path, n: int) -> Times:
    return in_dagster(["-m", "lens_pipeline.cli", "run"], home, n)


def process_a_step(home: Path, n: int) -> Times:
    """The job as the pages launch it, without the daemon's queue."""
    with open_instance(Settings.load(home=home)):
        pass
    job = ["-m", "lens_pipeline.definitions", "-j", "full_pipeline"]
    return in_dagster(["-m", "dagster", "job", "execute", *job], home, n)


def part(setup: str, measured: str, home: Path, n: int) -> float:
    program = (
        "import time; from lens_pipeline.settings import Settings; settings = Settings.load()\n"
        f"{setup}\nbegun = time.perf_counter()\n{measured}\nprint(time.perf_counter() - begun)"
    )
    return float(output(["-c", program], home, n).splitlines()[-1])


def medians(times: list[Times]) -> Times:
    return {name: statistics.median(t[name] for t in times) for name in times[0]}


def measure(n: int, repeats: int) -> tuple[list[Row], list[Target]]:
    ways = {"plain": plain, "one process": one_process, "a process a step": process_a_step}
    times: dict[str, list[Times]] = {name: [] for name in (*ways, "parts")}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            for name, way in ways.items():
                home = Path(folder) / name.replace(" ", "_")
                times[name].append(way(home, n))
            parts = {
                name: part(*code, Path(folder) / f"part{i}", n)
                for i, (name, code) in enumerate(PARTS.items())
            }
            times["parts"].append(parts)
    script, ours, job = (medians(times[name]) for name in ways)
    rows: list[Row] = [
        {
            "part": name,
            "plain s": script.get(name),
            "one process s": ours[name],
            "more s": ours[name] - script.get(name, 0),
            "a process a step s": job[name],
        }
        for name in [*(k for k in ours if k not in (REST, WHOLE)), REST, WHOLE]
    ]
    rows += [{"part": name, "one process s": s} for name, s in medians(times["parts"]).items()]
    more = ours[WHOLE] - script[WHOLE]
    return rows, [
        Target("seconds that `lens-pipeline run` adds", more, at_most=15),
        Target("seconds of the job with a process a step", job[WHOLE], at_most=60),
    ]


if __name__ == "__main__":
    arguments = options(__doc__, n=200)
    report(arguments, lambda: measure(arguments.n, arguments.repeats))
