"""What a new Python runs first, with this folder on its path: two packages that Lightning can do without are missing.

torchmetrics loads them wherever they are installed, which is a third of what Lightning takes to load.
"""

import importlib.metadata
import sys

_MISSING = ("torchvision", "scipy")
_version = importlib.metadata.version


def _version_of_what_is_there(name: str) -> str:
    if name in _MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return _version(name)


importlib.metadata.version = _version_of_what_is_there
sys.modules.update(dict.fromkeys(_MISSING))  # so that to import them is an error
