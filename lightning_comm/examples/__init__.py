"""Something real to train, for the demo, the configs and the tests: timm models on scikit-learn's digits."""

try:
    from lightning_comm.examples.classifier import TimmClassifier
    from lightning_comm.examples.digits import DigitsData
except ModuleNotFoundError as error:
    missing = str(error.name).split(".")[0]
    if missing not in ("timm", "sklearn"):
        raise
    raise ModuleNotFoundError(
        f"lightning_comm.examples: the examples need {missing!r}, which is not installed. "
        "pip install 'lightning-comm[examples]' installs all that they need.",
        name=missing,
    ) from error

__all__ = ["DigitsData", "TimmClassifier"]
