"""What code can change of its process so that later code notices, as far as that can be looked up.

Functions put in the place of others, whatever is assigned in the package and the tests, signals, streams, and torch's
switches. Ranks are told the environment and the folder with each call, so these are not among them.
"""

import logging
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

_OURS = ("lightning_comm", "support")
_WHERE_FUNCTIONS_ARE_REPLACED = ("lightning.pytorch", "torch.distributed", "torch.cuda")
_CLASSES_TOO = (
    *("torch._tensor", "torch.nn.modules.module", "torch.optim.optimizer", "torch.nn.parallel.distributed"),
    *("torch.distributed.distributed_c10d", "torch.utils.data.dataloader"),
)
_ALONE = (
    *_CLASSES_TOO,
    *("torch", "torch.accelerator", "torch.serialization"),
    *("os", "time", "random", "threading", "subprocess", "socket", "shutil", "numpy"),
)
_TESTS = str(Path(__file__).parents[1])
_LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_comm")
_NOTHING = object()


class ProcessState(NamedTuple):
    """A process at one time, to be compared with what has become of it."""

    spaces: list[tuple[Any, dict[str, Any]]]  # modules and classes, each with what their names meant
    settings: dict[str, Any]

    def changes(self) -> Iterator[str]:
        """Yield what is not as it was."""
        for space, before in self.spaces:
            now = vars(space)
            for name, value in before.items():
                other = now.get(name, _NOTHING)
                if other is not value and not hasattr(other, "hooked"):  # as torch marks an optimizer's `step`
                    yield f"{getattr(space, '__qualname__', space.__name__)}.{name}"
        now = _settings()
        yield from (name for name, value in self.settings.items() if now[name] != value)

    def holds(self) -> bool:
        return next(self.changes(), None) is None


def process_state() -> ProcessState:
    """Look this process up; some milliseconds."""
    spaces = []
    for name, module in list(sys.modules.items()):
        if module is None or not (keeps := _kept_of(name, module)):
            continue
        spaces.append((module, {key: value for key, value in vars(module).items() if keeps(key, value)}))
        if name.startswith("torch") and name not in _CLASSES_TOO:
            continue
        for cls in list(vars(module).values()):
            if issubclass(type(cls), type) and cls.__module__ == name:  # `isinstance` makes deprecated names warn
                spaces.append((cls, {key: value for key, value in vars(cls).items() if keeps(key, value)}))
    return ProcessState(spaces, _settings())


def _kept_of(name: str, module: Any) -> Callable[[str, Any], bool] | None:
    """Which names of a module, and of its classes, are watched."""
    if name.startswith(_OURS) or (getattr(module, "__file__", None) or "").startswith(_TESTS):
        return _is_assigned
    if name in _ALONE or any(name == each or name.startswith(f"{each}.") for each in _WHERE_FUNCTIONS_ARE_REPLACED):
        return _is_function
    return None


def _is_assigned(key: str, value: Any) -> bool:
    made_anew_by_a_fork = type(value).__module__ == "_thread"  # a lock
    return not key.startswith(("__", "@", "_abc_")) and not made_anew_by_a_fork


def _is_function(key: str, value: Any) -> bool:
    return callable(value) and _is_assigned(key, value)


def _settings() -> dict[str, Any]:
    return {
        "process group": dist.is_initialized(),
        "signals": [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "streams": [os.fstat(number)[:3] for number in (1, 2)],
        "loggers": [(logger.level, list(logger.handlers)) for logger in map(logging.getLogger, _LOGGERS)],
        "limits": [resource.getrlimit(limit) for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)],
        "logging disabled up to": logging.root.manager.disable,
        "who shows warnings": warnings.showwarning,
        "torch": (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.cuda.is_initialized(),
        ),
    }


class RandomStates:
    """The states of all generators when this was made."""

    def __init__(self) -> None:
        self._states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        np.random.set_state(self._states[1])
        random.setstate(self._states[2])
