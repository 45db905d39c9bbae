"""Lightning's own collectives: ranks compare where they are before them, and skip them once a rank has failed."""

from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_comm.strategies.common.failures import RunFailures

_T = TypeVar("_T")


class LightningCollectives:
    """The wrapper of a strategy around the collectives that Lightning and users call on it.

    Args:
        failures: Names the rank that fails while others wait.

    Attributes:
        trainer: Knows whether a rank has failed; ``None`` before a run.
        compare_places: Refuses ranks that are at different places, before messages that would not show it.
        before: Called before a message, where it must not run beside others of this rank.
        note_met: Called where all ranks meet.

    """

    def __init__(self, failures: RunFailures) -> None:
        self._failures = failures
        self.trainer: Trainer | None = None
        self.note_met: Callable[[], None] = _nothing
        self.forget_fit()

    def forget_fit(self) -> None:
        """Drop the functions of the last ``fit``."""
        self.compare_places: Callable[[str], None] = _compare_nothing
        self.before: Callable[[], None] = _nothing

    def barrier(self, by_lightning: Callable[[], None]) -> None:
        """Let Lightning wait for all ranks."""
        self.compare_places("a barrier")
        self.together(by_lightning, None, "a barrier")

    def broadcast(self, by_lightning: Callable[[], Any], own: Any) -> Any:
        """Let Lightning send an object to all ranks."""
        self.compare_places("a broadcast")
        return self.together(by_lightning, own, "a broadcast")

    def decide(self, by_lightning: Callable[[], bool]) -> bool:
        """Let Lightning reduce a decision, which it does by :meth:`reduce`."""
        self.compare_places("a common decision, as before a checkpoint")
        return by_lightning()

    def reduce(self, by_lightning: Callable[[], Tensor], own: Tensor) -> Tensor:
        """Let Lightning reduce a tensor."""
        self.compare_places("a reduction, as of what is logged")
        return self.together(by_lightning, own, "a reduction")

    def gather(self, by_lightning: Callable[[], Tensor], own: Tensor) -> Tensor:
        """Let Lightning gather a tensor."""
        return self.together(by_lightning, own, "a gathering")

    def together(self, collective: Callable[[], _T], alone: _T, where: str) -> _T:
        """Run a collective, and note that all ranks meet in it; skip it once a rank has failed, since it would not end.

        Args:
            collective: The collective.
            alone: The result if it is skipped: this rank's own value.
            where: The name of the collective, for messages.

        """
        interrupted = self.trainer is not None and self.trainer.interrupted
        if not interrupted:
            self.before()
        self.note_met()
        if interrupted:
            return alone
        with self._failures.first_error_shown(where):
            return collective()

    def __getstate__(self) -> dict[str, Any]:
        replaced = {"compare_places": _compare_nothing, "before": _nothing, "note_met": _nothing}
        return {**vars(self), "trainer": None, **replaced}


def _nothing() -> None:
    """Do nothing."""


def _compare_nothing(_: str) -> None:
    """Compare nothing."""
