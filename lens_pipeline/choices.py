"""What may be chosen by name, in settings and in the library alike. Knowing it needs nothing."""

from typing import Literal

Schedule = Literal["cosine", "step", "plateau", "constant"]  # of the learning rate
Loss = Literal["bce", "focal"]
Together = Literal["mean", "uncertainty_weighted"]  # the fusion of what is trained together
Strategy = Literal["mean", "uncertainty_weighted", "stacking", "bayesian", "single"]  # of fusion
Choice = Literal["best", Strategy]
Method = Literal["platt", "temperature", "isotonic"]  # of calibration
