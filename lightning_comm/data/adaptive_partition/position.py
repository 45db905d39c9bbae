"""The position of a loader in its passes over the data: counted, saved, restored, and begun again."""

from typing import Any, NamedTuple

from lightning_comm.data.adaptive_partition.arguments import batches_of, check_resumed
from lightning_comm.data.global_order import GlobalBatches, GlobalOrder
from lightning_comm.data.resumable import warn_of_repeated_batches

_STATE_VERSION = 1


class PassPosition(NamedTuple):
    """How far a loader is: ``batches_done`` of a pass have been handed out, the ``passes``-th of an epoch, from 0."""

    epoch: int
    passes: int
    batches_done: int


class LoaderPosition:
    """Counts the batches that a loader hands out, and finds the place to go on from in a resumed run.

    A pass begins at its first batch, not when an iterator is made. Until then the position is the one that was loaded,
    or the start of the epoch that ``begin_epoch`` has named.

    Args:
        order: Of all samples.
        batches: Where the order is cut.

    Note:
        *Communication.* None.

    Example:
        >>> place = LoaderPosition(GlobalOrder(8, shuffle=False, seed=0), GlobalBatches(8, 4, "keep"))
        >>> begun = place.begin_pass(warns=False)
        >>> place.count(begun)
        >>> place.now, place.state_dict()["batches_done"]
        (PassPosition(epoch=0, passes=0, batches_done=1), 1)

    """

    def __init__(self, order: GlobalOrder, batches: GlobalBatches) -> None:
        self._order, self._batches = order, batches
        self.now = PassPosition(0, 0, 0)
        self._begun: object | None = None  # the pass that moves the position; None until its first batch
        self._loaded: dict[str, Any] | None = None
        self._goes_on = False  # in the epoch of the state that was loaded

    @property
    def has_begun(self) -> bool:
        """Whether a batch of the present pass has been asked for."""
        return self._begun is not None

    @property
    def settings(self) -> dict[str, int | str]:
        """What the meaning of "so many batches into an epoch" depends on."""
        sampler = self._order.sampler
        return {
            "samples": self._batches.samples,
            "global_batch_size": self._batches.size,
            "shuffle": int(self._order.shuffle),
            "seed": self._order.seed,
            "tail": self._batches.tail,
            "sampler": "" if sampler is None else type(sampler).__name__,
        }

    def order_fingerprint(self) -> int:
        """Return 48 bits that identify the order of the present pass."""
        return self._order.fingerprint(self.now.epoch, self.now.passes)

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch with the next pass, or go on in it, if a state from the middle of it has been loaded."""
        if self._loaded is None or self.now.epoch != epoch:
            self.now, self._begun, self._loaded = PassPosition(epoch, 0, 0), None, None
        else:
            self._goes_on = True

    def begin_pass(self, *, warns: bool) -> object:
        """Begin a pass at the position that was loaded, or at its start.

        Args:
            warns: Whether this rank warns that batches of a resumed run come twice; one of all ranks does.

        Returns:
            The pass, to count its batches by.

        Raises:
            ValueError: If the state that was loaded is from the middle of a pass with other data or another order.

        """
        if warns and self._begun is None and self._loaded is None:
            warn_of_repeated_batches("PartitionedLoader", self.now.epoch)
        # A state from behind the last batch ends a pass that an epoch goes on with, as of a shorter one of several
        # loaders; without an epoch to go on with, it is the start of the next pass.
        is_over = self._loaded is not None and self.now.batches_done == batches_of(self._loaded) and not self._goes_on
        if self._begun is not None or is_over:
            self.now = PassPosition(self.now.epoch, self.now.passes + 1, 0)
            self._loaded = None
        self._check_loaded()
        self._goes_on = False
        self._begun = object()
        return self._begun

    def check_alone(self, begun: object) -> None:
        """Refuse to go on with a pass while a later one has begun.

        Raises:
            RuntimeError: If there is a later one.

        """
        if self._begun not in (begun, None):
            raise RuntimeError(
                "PartitionedLoader: `iter` must not begin another pass while one goes on, since they would share one "
                "place in the data; got a batch asked from the older one. Make a loader for each."
            )

    def count(self, begun: object) -> None:
        """Count a batch of a pass that was handed out; one of a pass that was left changes nothing."""
        if self._begun is begun:
            self.now = self.now._replace(batches_done=self.now.batches_done + 1)

    def state_dict(self) -> dict[str, int | str]:
        """Return the position, in plain types that are equal on all ranks."""
        if self._loaded is not None:
            return dict(self._loaded)
        fingerprint = self.order_fingerprint() if self.now.batches_done else 0
        return {"version": _STATE_VERSION, **self.settings, **self.now._asdict(), "order": fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where ``state_dict`` was called, unless an epoch other than its own is begun first.

        Raises:
            ValueError: If the state was written by another version.

        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"PartitionedLoader: `state` must be of version {_STATE_VERSION}; got {state.get('version')!r}. Resume "
                "with the version of lightning_comm, and the kind of loader, that wrote it."
            )
        self.now = PassPosition(state["epoch"], state["passes"], state["batches_done"])
        self._begun, self._loaded, self._goes_on = None, dict(state), False

    def _check_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        if state is None or not state["batches_done"]:
            return  # a pass from its start is a whole one, whatever the settings
        check_resumed(state, self.settings)
        check_resumed(state, {"order": self.order_fingerprint()})
