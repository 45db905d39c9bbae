"""The order in which all ranks together go through a dataset, and where it is cut into global batches.

Both are the same on every rank and after a resume: they follow from the seed, the epoch and the number of the pass, and
never from the global random state, a rank or a plan.
"""

import hashlib
import itertools
import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

Tail = Literal["keep", "drop", "merge"]
TAILS = get_args(Tail)


def mixed_seed(*parts: object) -> int:
    """Return a seed of 63 bits that follows from all of the parts.

    Example:
        >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
        (True, False)

    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class Draws(torch.Generator):
    """A generator that each pass seeds again, and that goes to a spawned process without its state.

    Some systems cannot send the state, which torch puts into shared memory.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Draws, ()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let Python's, numpy's and torch's CPU generators start from ``seed``, and put their states back at the end.

    Example:
        >>> with seeded(1):
        ...     first = random.random()
        >>> with seeded(1):
        ...     random.random() == first
        True

    """
    # `torch.manual_seed` would also move the generators of the devices.
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)


class GlobalBatches(NamedTuple):
    """Where an order of ``samples`` is cut into batches of ``size``.

    Args:
        samples: How many the order has.
        size: Samples of a global batch.
        tail: What becomes of those that fill no batch: ``"keep"`` makes a last one of them, ``"drop"`` leaves them out,
            ``"merge"`` adds them to the last batch.

    Example:
        >>> [GlobalBatches(10, 4, tail).bounds(1) for tail in ("keep", "drop", "merge")]
        [(4, 8), (4, 8), (4, 10)]
        >>> [GlobalBatches(10, 4, tail).number for tail in ("keep", "drop", "merge")]
        [3, 2, 2]

    """

    samples: int
    size: int
    tail: str

    @property
    def number(self) -> int:
        """How many batches there are."""
        return -(-self.samples // self.size) if self.tail == "keep" else self.samples // self.size

    def bounds(self, batch: int) -> tuple[int, int]:
        """Return where in the order a batch starts and where it stops."""
        start = batch * self.size
        stop = self.samples if self.tail == "merge" and batch == self.number - 1 else start + self.size
        return start, min(stop, self.samples)


class GlobalOrder:
    """Draws the order of a pass through the data, the same on every rank.

    Args:
        samples: How many there are.
        shuffle: Whether each pass has an order of its own; otherwise all have that of the dataset.
        seed: Decides the order.
        sampler: Draws it instead, if there is one.

    Note:
        *Communication.* None.

    Example:
        >>> order = GlobalOrder(6, shuffle=True, seed=0)
        >>> sorted(order.part(0, 0, 0, 6)) == list(range(6)), order.part(0, 0, 0, 6) == order.part(1, 0, 0, 6)
        (True, False)

    """

    def __init__(self, samples: int, *, shuffle: bool, seed: int, sampler: Any = None) -> None:
        self.samples, self.shuffle, self.seed, self.sampler = samples, shuffle, seed, sampler
        self.repeated = False
        self._checked = sampler is None
        self._drawn: tuple[tuple[int, int], Sequence[Any] | torch.Tensor] | None = None
        self._fingerprint: tuple[tuple[int, int], int] | None = None

    def repeat(self) -> None:
        """Let every pass have the order of the dataset or, with a sampler, that of its first pass."""
        self.repeated, self.shuffle = True, False
        self._drawn = self._fingerprint = None

    def key(self, epoch: int, passes: int) -> tuple[int, int]:
        """Return the epoch and the pass that randomness follows from: always the first, if passes are repeated."""
        return (0, 0) if self.repeated else (epoch, passes)

    def part(self, epoch: int, passes: int, start: int, stop: int) -> list[Any]:
        """Return the indices from ``start`` up to ``stop`` of the order of a pass."""
        order = self._order(self.key(epoch, passes))[start:stop]
        return order.tolist() if isinstance(order, torch.Tensor) else list(order)

    def fingerprint(self, epoch: int, passes: int) -> int:
        """Return 48 bits that almost certainly differ where the order of a pass differs."""
        key = self.key(epoch, passes)
        if self._fingerprint is None or self._fingerprint[0] != key:
            order = self._order(key)
            plain = order.numpy().tobytes() if isinstance(order, torch.Tensor) else repr(order).encode()
            self._fingerprint = key, int.from_bytes(hashlib.blake2b(plain, digest_size=6).digest(), "big")
        return self._fingerprint[1]

    def _order(self, key: tuple[int, int]) -> Sequence[Any] | torch.Tensor:
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = key, self._draw(key)
        return self._drawn[1]

    def _draw(self, key: tuple[int, int]) -> Sequence[Any] | torch.Tensor:
        if self.sampler is not None:
            return self._draw_from_sampler(key)
        if not self.shuffle:
            return range(self.samples)
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(mixed_seed(self.seed, *key)))

    def _draw_from_sampler(self, key: tuple[int, int]) -> list[Any]:
        drawn = self._ask_sampler(key)
        if len(drawn) != self.samples:
            number = len(drawn) if len(drawn) < self.samples else "more"
            raise ValueError(
                f"PartitionedLoader: `sampler` must yield as many samples in every epoch as its length was at the "
                f"start, {self.samples}, since all ranks count steps by it; {type(self.sampler).__name__} yielded "
                f"{number} in epoch {key[0]}. Let it repeat or leave out samples to come to that number."
            )
        if not self._checked and self._ask_sampler(key) != drawn:
            raise ValueError(
                f"PartitionedLoader: `sampler` must draw the same order when it is asked again for the same epoch, or "
                f"ranks and resumed runs would disagree; {type(self.sampler).__name__} did not. Let it draw from the "
                "global random state, from a torch.Generator in its attribute `generator`, or from the epoch that "
                "`set_epoch` tells it."
            )
        self._checked = True
        return drawn

    def _ask_sampler(self, key: tuple[int, int]) -> list[Any]:
        seed = mixed_seed(self.seed, *key)
        if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
            set_epoch(key[0])
        with seeded(seed), _own_generator(self.sampler, seed):
            some = itertools.islice(self.sampler, self.samples + 1)  # also of one that never ends
            return [self._single(each) for each in some]

    def _single(self, drawn: Any) -> Any:
        if isinstance(drawn, (list, range, set)) or getattr(drawn, "ndim", 0) > 0:
            raise TypeError(
                f"PartitionedLoader: `sampler` must yield one index at a time; {type(self.sampler).__name__} yields "
                f"batches, such as {drawn!r}. Give the sampler of single samples that it makes them of; batches of "
                "the size `global_batch_size` are made by the loader, and shared out over the ranks."
            )
        return operator.index(drawn) if hasattr(drawn, "__index__") else drawn


@contextmanager
def _own_generator(sampler: Any, seed: int) -> Iterator[None]:
    """Let the sampler draw from its attribute ``generator`` as if that were new, where it has one."""
    kept = getattr(sampler, "generator", None)
    if not isinstance(kept, torch.Generator):
        yield
        return
    sampler.generator = torch.Generator(kept.device).manual_seed(seed)
    try:
        yield
    finally:
        sampler.generator = kept
