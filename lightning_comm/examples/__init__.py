"""Something real to train, for the demo, the configs and the tests: timm models on scikit-learn's digits."""

try:
    from lightning_comm.examples.classifier import TimmClassifier
    from lightning_comm.examples.digits import DigitsData
except ModuleNotFoundError as error:
    missing = str(error.name).split(".")[0]
    if missing not in ("timm", "sklearn"):
        raise
    raise ModuleNotFoundError(
        f"lightning_comm.examples: {missing!r} must be installed for the examples, and it is not. Install all that they "
        "need with pip install 'lightning-comm[examples]'.",
        name=missing,
    ) from error

__all__ = ["DigitsData", "TimmClassifier"]
