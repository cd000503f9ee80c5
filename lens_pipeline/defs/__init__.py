"""The orchestration: Dagster assets, a file a stage, each with its checks."""
