-- Run once, when PostgreSQL's volume is new. Both Dagster and MLflow keep a table alembic_version.
CREATE DATABASE dagster;
CREATE DATABASE mlflow;
