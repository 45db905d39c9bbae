"""The interface of a compression: the settings that a user writes, and the codec that applies them during a run.

A codec works on a *flat bucket*: one row of entries, laid out as in :class:`Layout`. It replaces the entries by the
mean over the ranks of what each of them sent. For that it needs one message or several, so :meth:`Codec.mean` is a
generator: it starts a message, yields it, and is resumed when the message has arrived. Its caller (:mod:`.concurrent`)
decides *when* it is resumed, always in an order that is the same on all ranks, and never from a callback of another
message, where gloo aborts as soon as two buckets are on their way.

Nothing that a codec computes may depend on how parameters are cut into buckets, since DDP rebuilds them after its
first steps and after a resume. Scales, counts and random numbers belong to a parameter, by its name.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_comm.transport.recording import Pending, Recorder


class StartedMessage(NamedTuple):
    """A message that has been started.

    Args:
        pending: Waits for it.
        more: Whether another one follows, which needs what this one brings.

    """

    pending: Pending
    more: bool = False


Conversation = Generator[StartedMessage, None, None]


class Slot(NamedTuple):
    """The place of a parameter in a bucket.

    Args:
        name: The parameter's name in the model, without a wrapper's prefix.
        numel: How many entries it has there.
        shape: Its shape; entries follow each other in the order in which the parameter lies in memory.

    """

    name: str
    numel: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The parameters in a flat bucket, one after the other.

    Example:
        >>> layout = Layout((Slot("weight", 6, (2, 3)), Slot("bias", 2, (2,))))
        >>> layout.numel, [row.tolist() for row in layout.split(torch.arange(8))]
        (8, [[0, 1, 2, 3, 4, 5], [6, 7]])

    """

    slots: tuple[Slot, ...]
    _sizes: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sizes", [slot.numel for slot in self.slots])

    @property
    def numel(self) -> int:
        """Entries in the bucket."""
        return sum(self._sizes)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return a view of each parameter's entries."""
        return tuple(torch.split(flat, self._sizes))


@dataclass(frozen=True)
class Compression(ABC):
    """What to send instead of every entry in full: a frozen value, from which each run makes its own codec.

    Attributes:
        keeps_state: Whether a run that is resumed needs anything of the one before.

    """

    keeps_state: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """Whether the result is the mean of the ranks' entries, but for rounding of the sums."""
        return False

    @abstractmethod
    def codec(self, context: "Context") -> "Codec":
        """Return what does the work in one run."""


@dataclass
class Context:
    """What a codec needs of the run that it works for.

    Args:
        recorder: Sends and records.
        purpose: The purpose of the messages in the ledger.
        seed: Random numbers depend on it, on the step, on the rank and on the parameter's name, and on nothing else.
        feedback: Whether what a method drops is kept and added to the next step's entries, where the method needs it.
            Local updates keep it in the weights and have it off.
        revocable: Whether a mean may be thrown away after it has arrived, so that codecs remember what they had kept
            before, for :meth:`Codec.take_back`.

    """

    recorder: Recorder
    purpose: str
    seed: int = 0
    feedback: bool = True
    revocable: bool = False

    def generator(self, name: str, step: int, device: torch.device, *, shared: bool = False) -> torch.Generator:
        """Return random numbers for one parameter at one step, this rank's own or the same on all ranks.

        From one state GPUs of different kinds draw different numbers. So what ranks must have alike is drawn on the
        host; one that rounds for all, and sends them what it has rounded to, may draw on its device.
        """
        text = f"{self.seed}/{step}/{'all' if shared else self.recorder.rank}/{name}"
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
        return generator


class Codec(ABC):
    """A compression at work in one run, with its state.

    Attributes:
        is_local: Whether its state differs between ranks, so that each must save its own.
        entrywise: Whether the result of an entry depends on that entry of the ranks alone, and not on others in the
            row.
        step: How often all parameters have been synchronised; the owner of the codec counts it up.

    """

    is_local: bool = False
    entrywise: bool = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self.step = 0

    @property
    def world_size(self) -> int:
        """The number of ranks, read at each call, since a resumed run may have another."""
        return self.context.recorder.world_size

    @abstractmethod
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        """Replace the entries by the mean over the ranks of what each sent, in place.

        Args:
            values: The bucket: one row of floating-point entries.
            layout: The layout of its parameters.
            sent: If given, a row of the same length that takes what this rank sent, as the others decode it.

        Yields:
            Each message, once it has started. Resume when it has arrived.

        """

    def mean_and_rest(self, entries: Tensor, layout: Layout, means: Tensor) -> Conversation:
        """Compute the mean of what each rank sent, as :meth:`mean` does, and leave in the entries what was not sent.

        Args:
            entries: The bucket; what this rank sent is subtracted from it.
            layout: The layout of its parameters.
            means: A row of the same length that takes the mean.

        Yields:
            Each message, as there.

        """
        sent = torch.empty_like(entries)
        yield from self.mean(means.copy_(entries), layout, sent)
        entries.sub_(sent)

    def begin_step(self) -> None:  # noqa: B027  (most have nothing to do)
        """Called before the first bucket of a step, on all ranks alike."""

    def end_step(self) -> None:
        """Called after the last bucket of a step has arrived, on all ranks alike."""
        self.step += 1

    @property
    def unapplied(self) -> frozenset[str]:
        """The parameters for which :meth:`take_back` can undo more than the last step; none if nothing is kept."""
        return frozenset()

    def take_back(self, names: Iterable[str], *, last_only: bool = False) -> None:  # noqa: B027  (as `rescale`)
        """Restore what was kept of these parameters before their means, which have been thrown away.

        Args:
            names: The parameters. Those of which nothing is remembered are left as they are.
            last_only: Whether it is only the mean of the last step that was thrown away, and not all of those since
                :meth:`applied`.

        """

    def applied(self, names: Iterable[str]) -> None:  # noqa: B027  (as `rescale`)
        """Forget what was kept before: an optimizer has stepped with the means of these parameters."""

    def rescale(self, factor: float) -> None:  # noqa: B027  (only what keeps residuals has something to scale)
        """Follow a change of the loss scale, in which kept residuals are measured."""

    def regroup(self, places: Mapping[str, Tensor]) -> None:  # noqa: B027  (only what keeps residuals has any to move)
        """Follow a change of what lies in the slots of parameters. Called between steps.

        Args:
            places: By parameter name, for each entry of its new slot, where that was in the old one, or -1 if nowhere.

        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, by parameter name. Tensors belong to this rank alone."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.step = int(state["step"])


def run_alone(conversation: Conversation) -> None:
    """Run a codec's generator to its end, waiting for each message; for one bucket at a time."""
    for message in conversation:
        message.pending.wait()
