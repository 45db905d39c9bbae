"""Models and data for the demo, the configs and the tests: timm models on scikit-learn's digits."""

from lightning_comm.core.extras import missing_extras

if (_missing := missing_extras("lightning_comm.examples", "timm", "sklearn")) is not None:
    raise ModuleNotFoundError(_missing)

from lightning_comm.examples.classifier import TimmClassifier  # after the check, since they import these
from lightning_comm.examples.digits import DigitsData

__all__ = ["DigitsData", "TimmClassifier"]
