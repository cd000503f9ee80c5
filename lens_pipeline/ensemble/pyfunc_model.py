"""The ensemble as an MLflow model, logged as code: MLflow runs this file to load it.

Input: float32 (n, bands, height, width) in the units of the stored cutouts. Output: a table with
the columns of `LensEnsemble.columns`.
"""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble


class LensEnsembleModel(PythonModel):
    """`ensemble` is the loaded LensEnsemble."""

    ensemble: LensEnsemble

    def load_context(self, context: PythonModelContext) -> None:
        self.ensemble = load_ensemble(context.artifacts["ensemble"])

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        return self.ensemble.predict(model_input)


mlflow.models.set_model(LensEnsembleModel())
