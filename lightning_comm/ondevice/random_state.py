"""The state of a process's random generators, as values that a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, as plain values and tensors.

    CUDA's is included if this process uses CUDA: that of its current device, which Lightning sets to the rank's own.
    Where CUDA is available but not used, its state is not read: reading would initialise CUDA, which takes memory on
    the device and fails in a forked process.

    Example:
        >>> before = random_state()
        >>> first = torch.rand(3), random.random(), np.random.rand()
        >>> set_random_state(before)
        >>> torch.equal(first[0], torch.rand(3)), first[1:] == (random.random(), np.random.rand())
        (True, True)

    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state that :func:`random_state` returned.

    A state of CUDA is ignored if this process does not use CUDA; without one, its generator stays as it is.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state(state["cuda"])


def seed_torch(seed: int) -> None:
    """Seed those of torch's generators whose states :func:`random_state` returns, and no others.

    ``torch.manual_seed`` also seeds those of all other devices; and where CUDA is not used yet, it registers a seed
    for later.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
