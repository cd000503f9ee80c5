"""What two trainings on the same cores do together, of what one does alone; and where PyTorch is
loaded first, so that its threads spin while they wait (see `lens_pipeline/__init__.py`)."""

import argparse
import statistics
import subprocess
import sys

from benchmarks._harness import Row, Target, options, report

PROGRAM = """
import time
{first}
from lens_pipeline.models.system import LitLensSystem
import torch

torch.manual_seed(0)
system = LitLensSystem("resnet18", image_size=64)
optimiser = torch.optim.AdamW(system.parameters())
image, label = torch.randn(32, 3, 64, 64), torch.arange(32) % 2.0
loss = torch.nn.BCEWithLogitsLoss()


def step():
    optimiser.zero_grad()
    loss(system(image), label).backward()
    optimiser.step()


step()
print("ready", flush=True)
input()
begun, steps = time.perf_counter(), 0
while time.perf_counter() < begun + {seconds}:
    step()
    steps += 1
print(steps / (time.perf_counter() - begun))
"""
WAITING = {"as lens_pipeline does": "", "as PyTorch does": "import torch"}


def steps_per_second(n: int, first: str, seconds: int) -> float:
    """Of n trainings at once, together."""
    program = PROGRAM.format(first=first, seconds=seconds)
    trainings = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(n)
    ]
    for training in trainings:
        assert training.stdout is not None
        assert training.stdout.readline() == "ready\n"
    # What one does after the others have ended is little of so many steps.
    for training in trainings:
        assert training.stdin is not None
        training.stdin.write("\n")
        training.stdin.flush()
    return sum(float(training.communicate()[0]) for training in trainings)


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    rows: list[Row] = []
    for waiting, first in WAITING.items():
        runs = [
            [steps_per_second(n, first, arguments.n) for n in (1, 2)]
            for _ in range(arguments.repeats)
        ]
        alone, both = (statistics.median(rate) for rate in zip(*runs, strict=True))
        ratio = statistics.median(two / one for one, two in runs)
        rows.append({"threads wait": waiting, "alone": alone, "both": both, "of alone": ratio})
    return rows, [Target("two at once, of one alone", rows[0]["of alone"], at_least=0.8)]


if __name__ == "__main__":
    arguments = options(__doc__, n=20)  # seconds
    report(arguments, lambda: measure(arguments))
