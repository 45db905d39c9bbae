"""Callbacks that average weights under Cyclic Data Parallelism: they average one version, the same on all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.strategies.cyclic.settings import WHERE
from lightning_comm.transport.epoch_ends import is_of_other_calls
from lightning_comm.transport.stop_protocol import PeerFailure

_SELDOM_STEPS = 10  # with this many steps between two updates, or more, the flushes cost little


def averages_by_own_rule(trainer: Trainer) -> bool:
    """Whether a callback of the user's own decides when weights are averaged, which may differ between ranks."""
    callbacks = (each for each in getattr(trainer, "callbacks", []) if isinstance(each, WeightAveraging))
    return any(type(each).__module__.partition(".")[0] != "lightning" for each in callbacks)


class WeightAverages:
    """Counts the updates of averages, at each of which all ranks meet, and warns once if they are frequent."""

    def __init__(self) -> None:
        self._updated_at: dict[int, int] = {}  # the steps done at the last update, by callback
        self._warned = False

    def count(self, callback: Callback, step: int) -> None:
        """Note that a callback is about to average the weights."""
        before = self._updated_at.get(id(callback))
        self._updated_at[id(callback)] = step
        if before is None or self._warned or not 0 < step - before < _SELDOM_STEPS:
            return
        self._warned = True
        often = "step" if step - before == 1 else f"{step - before} steps"
        rank_zero_warn(
            f"{WHERE}: the callback {type(callback).__name__} updates its average every {often}, and for each update "
            "all ranks wait until they have the newest parameters, so that it is of one version. What the strategy "
            f"gains is lost to that. Update less often: `EMAWeightAveraging(update_every_n_steps={_SELDOM_STEPS})` or "
            "more, with `decay=decay**n` for the same memory, or by a `should_update` of your own."
        )

    @contextmanager
    def explained(self, callback: Callback, step: int) -> Iterator[None]:
        """Name the callback in the error of ranks that disagree, if they do so in an update of an average."""
        try:
            yield
        except (ValueError, PeerFailure) as error:
            if not is_of_other_calls(error):
                raise
            raise type(error)(
                f"{WHERE}: the callback {type(callback).__name__} updates its average after step {step} on this rank, "
                f"and other ranks do not. Let `should_update` depend on its arguments alone. In detail: {error}"
            ) from error
