"""Messages with only the entries of weights that are not pruned."""

from dataclasses import dataclass, field, replace
from typing import Literal

from typing_extensions import override

from lightning_comm.core.arguments import is_number
from lightning_comm.core.compression.pruning_schedule import PruningSchedule
from lightning_comm.ondevice.pruning import MagnitudePruning, Pruning
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec


@dataclass(frozen=True)
class SparseMask(Compression):
    """Prune the model, alike on all ranks, and send only the gradients of what is left.

    Gradients of pruned weights are zero on every rank, so they need not be sent. The others are gathered into a dense
    row, which an ordinary all-reduce sums, without indices, and are put back. This is exact for the pruned
    model: it trains as under plain DDP with gradients masked by hand. It is not the training of the dense model.

    The model is pruned when training starts, or by the schedule; weights and the optimizer's state are zero there
    from then on. Before the first pruning it trains as under plain DDP, and gradients are sent in full.

    Args:
        pruning: Which weights are pruned.
        then: What is done with the entries that are left: :class:`Cast`, :class:`Int8`, :class:`Ternary` or
            :class:`TopK`, or its name; in full if left out. ``[SparseMask(…), Cast("bf16")]`` is another way to write
            it.
        dense_above: Buckets of which a larger share is kept are sent whole, since gathering costs more than it saves:
            in full, or as a ``then`` of :class:`Cast` sends them. Other methods are always given the kept entries.
            ``"auto"``: the share at which that is so on the link of ``link``, where packing takes as long as it does on
            rank 0 when training starts. A checkpoint keeps it.
        link: For ``"auto"``: a file that ``lightning-comm probe`` wrote, on rank 0.
        schedule: When the model is pruned. Bit by bit (``end_step``) only where ``pruning`` has a ``sparsity``.

    Raises:
        ValueError: If an argument is out of range, or if a gradual schedule meets a ``pruning`` without ``sparsity``.

    Note:
        *Communication.* As ``then`` sends the kept entries: in full 4 bytes for each of them, as bf16 2 bytes; of a
        bucket that is sent whole, for all. At each pruning the masks, one bit a weight.

        *Memory.* An index of 8 bytes for each kept entry, and four masks of one byte a masked weight.

        *When not.* At half the weights pruned this saves as much as a bf16 cast alone. It pays from about three in
        four, or together with a cast.

    Example:
        >>> SparseMask(MagnitudePruning(sparsity=0.9)).pruning.sparsity
        0.9

    References:
        Y. Wang, R. Wu, X. Li, D. Kutscher. `PacTrain <https://arxiv.org/abs/2505.18563>`_. DAC 2025.

    """

    pruning: Pruning = field(default_factory=MagnitudePruning)
    then: Compression | str | None = None
    dense_above: float | Literal["auto"] = 0.9
    schedule: PruningSchedule = field(default_factory=PruningSchedule)
    link: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pruning, Pruning):
            raise ValueError(
                f"SparseMask: `pruning` must say where masks come from; got {self.pruning!r}. Give "
                "MagnitudePruning(sparsity=0.8), ModulePruning(), MaskFile(path) or MaskFunction(function)."
            )
        if isinstance(self.then, str):
            from lightning_comm.transport.compression.names import compression_of  # it knows this class

            object.__setattr__(self, "then", compression_of(self.then, "SparseMask", "then"))
        if self.then is not None and not isinstance(self.then, Compression):
            raise ValueError(
                f"SparseMask: `then` must be a compression or its word; got {self.then!r}. Give Cast('bf16') or "
                "'bf16', or leave it out to send kept entries in full."
            )
        if isinstance(self.then, SparseMask) or type(self.then).__name__ in ("PowerSGD", "NoSync"):
            raise ValueError(
                f"SparseMask: `then` must send a row of numbers; got {self.then!r}. PowerSGD needs whole matrices, "
                "NoSync sends nothing, and one mask is enough. Cast, Int8, Ternary and TopK fit."
            )
        self._check_dense_above()
        if not isinstance(self.schedule, PruningSchedule):
            raise ValueError(
                f"SparseMask: `schedule` must be a PruningSchedule; got {self.schedule!r}. "
                "PruningSchedule(start_step=500) prunes before optimizer step 500."
            )
        if self.schedule.is_gradual and not hasattr(self.pruning, "sparsity"):
            raise ValueError(
                f"SparseMask: `schedule` prunes bit by bit until step {self.schedule.end_step}, which takes a "
                f"`pruning` with a `sparsity` that can rise; got {self.pruning!r}. Use MagnitudePruning or "
                "GraSPPruning, or leave out `end_step`."
            )

    def _check_dense_above(self) -> None:
        share = self.dense_above
        if share != "auto" and not (is_number(share) and 0 <= share <= 1):
            raise ValueError(
                f"SparseMask: `dense_above` is a share of entries, so it must be from 0 to 1, or 'auto'; got {share!r}."
            )
        if share == "auto" and self.link is None:
            raise ValueError(
                "SparseMask: `dense_above`='auto' reckons with a measured link, so it needs `link`; got None. Measure "
                "one with `lightning-comm probe --out probe.json` and give link='probe.json'."
            )
        if share != "auto" and self.link is not None:
            raise ValueError(
                f"SparseMask: `link` is for `dense_above`='auto'; got {self.link!r} with `dense_above`={share!r}. "
                "Leave out one of them."
            )

    def pruning_at(self, step: int) -> Pruning:
        """Return what chooses the masks of step ``step``: ``pruning``, with the share that the schedule has by then."""
        if not self.schedule.is_gradual:
            return self.pruning
        sparsity = self.schedule.sparsity_at(step, getattr(self.pruning, "sparsity"))  # noqa: B009
        return replace(self.pruning, sparsity=sparsity)  # type: ignore[type-var]

    @property
    @override
    def exact(self) -> bool:
        """Whether kept entries become the mean of the ranks', but for rounding of the sums; others are zero."""
        return self.sender.exact

    @property
    def sender(self) -> Compression:
        """What sends the entries that are left."""
        return self.then if isinstance(self.then, Compression) else Full()

    @override
    def codec(self, context: Context) -> "SparseMaskCodec":
        return SparseMaskCodec(
            context, self.sender.codec(context), None if self.dense_above == "auto" else self.dense_above
        )
