"""One runnable file per question: `python -m benchmarks.NAME`. Ratios measured in one run."""
