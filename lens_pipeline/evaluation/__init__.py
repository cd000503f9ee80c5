"""What scores are worth: metrics, gates, plots, reports. Pure functions of labels and scores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gates": ["GateDecision", "first_model_gate"],
        "metrics": ["lens_metrics", "paired_bootstrap", "roc", "threshold_at_fpr"],
        "forecast": ["forecast"],
        "plots": ["learning_curves_figure"],
        "score_plots": [
            *("precision_recall_figure", "purity_figure", "reliability_figure", "roc_figure"),
            "score_histogram_figure",
        ],
        "selection": ["selection_function"],
        "sheets": ["contact_sheet"],
    },
)
