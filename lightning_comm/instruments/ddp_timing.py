"""The times that DistributedDataParallel measures of its all-reduces: a prototype API of torch, kept in this file.

DDP notes in each iteration when the forward and the backward began, when the backward's compute ended, and when the
first all-reduce began and the last one ended. ``INTERNALS`` and ``FIELDS`` list each name that is read; a test looks
each of them up, so a release of torch that removes one fails by that name.

The reducer counts an *iteration* for each forward through the wrapper. Under manual optimization Lightning prepares the
reducer again for every backward, so an iteration may have several that communicate, and only the moment at which the
first all-reduce began shows that there is a new one. Accumulation under ``no_sync`` communicates nothing.

The numbers are set when the next forward begins, so on CPU they are asked for as soon as the backward is over. On CUDA
that would make the host wait for the device; there they are read one iteration late, of every tenth iteration, and only
of its last backward: an iteration with several has no time.
"""

import time
from typing import Any, NamedTuple

from torch.nn.parallel import DistributedDataParallel

INTERNALS = (
    "_get_ddp_logging_data",
    "_set_ddp_runtime_logging_sample_rate",
    "logger",
    "logger.set_runtime_stats_and_log",
)
FIELDS = (
    "iteration",
    "backward_comm_time",
    "backward_compute_comm_overlap_time",
    "backward_comm_time_start",
    "total_parameter_size_bytes",
    "num_parameter_tensors",
    "find_unused_parameters",
)
_EVERY_ITERATION, _ON_CUDA, _TORCHS_DEFAULT = 1, 10, 100  # sample rates; there is no way to ask for the one in force
_NANO = 1e-9


class GradientTime(NamedTuple):
    """The all-reduces of one backward.

    Args:
        start_s: When the first one began, in seconds on the monotonic clock.
        duration_s: Until the last one ended, and the gaps between them.
        hidden_s: The part of it during which the backward still computed.
        payload_bytes: What this rank handed over; 0 where a hook sends, whose calls are counted one by one.

    """

    start_s: float
    duration_s: float
    hidden_s: float
    payload_bytes: int


class DdpTiming:
    """Reads what DDP has measured, once for each backward that communicates.

    Args:
        ddp: The wrapped model.

    Note:
        *Communication.* None.

    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp
        self._on_cuda = next(ddp.parameters()).is_cuda
        self._set_rate(_ON_CUDA if self._on_cuda else _EVERY_ITERATION)
        data = self._read()
        self._iteration, self._began = int(data["iteration"]), _began(data)
        self._backwards = 0  # that have communicated since numbers were new

    def reads(self, model: object) -> bool:
        """Whether this is the wrapper that is read here."""
        return model is self._ddp

    def after_backward(self) -> GradientTime | None:
        """Return what the backward that has just ended sent, or ``None`` if it sent nothing.

        Where its time is not known, or not yet, that is 0.0.
        """
        ddp = self._ddp
        if not ddp.require_backward_grad_sync:
            return None
        if not self._on_cuda:
            assert ddp.logger is not None
            ddp.logger.set_runtime_stats_and_log()
        data = self._read()
        payload_bytes = _payload_bytes(data)
        began = _began(data)
        is_new, self._began = began != self._began, began
        if not self._on_cuda and not is_new:
            return None  # the loss depends on no parameter
        if self._on_cuda and not self._is_known(int(data["iteration"]), is_new):
            return GradientTime(0.0, 0.0, 0.0, payload_bytes)
        comm_ns = max(0, int(data["backward_comm_time"]))
        hidden_ns = min(comm_ns, max(0, int(data["backward_compute_comm_overlap_time"])))
        behind_s = time.time() - time.monotonic()  # DDP reads the wall clock
        start_s = began * _NANO - behind_s
        return GradientTime(start_s, comm_ns * _NANO, hidden_ns * _NANO, payload_bytes)

    def _is_known(self, iteration: int, is_new: bool) -> bool:
        """Whether a time that was read late is that of a backward which was alone in its iteration."""
        if not is_new:
            self._backwards += 1
            return False
        was_alone = self._backwards == iteration - self._iteration
        self._iteration, self._backwards = iteration, 1
        return was_alone

    def end(self) -> None:
        """Let DDP measure as rarely as it does by default."""
        self._set_rate(_TORCHS_DEFAULT)

    def _read(self) -> dict[str, Any]:
        data: dict[str, Any] = self._ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        return data

    def _set_rate(self, every: int) -> None:
        self._ddp._set_ddp_runtime_logging_sample_rate(every)  # type: ignore[no-untyped-call]


def _began(data: dict[str, Any]) -> int:
    """Return when the last all-reduce of gradients began, in ns of the wall clock; 0 before the first one."""
    return int(data.get("backward_comm_time_start", 0))


def _payload_bytes(data: dict[str, Any]) -> int:
    """Return what DDP itself hands over in an iteration, from its settings.

    Every bucket is sent in full, also for parameters without a gradient. With ``find_unused_parameters`` one 4-byte
    flag a parameter comes on top. (A few indices that are sent once, when buckets are rebuilt, are left out.)
    """
    size = int(data["total_parameter_size_bytes"])
    flagged = data["find_unused_parameters"] and not data.get("static_graph")
    flags = 4 * int(data["num_parameter_tensors"]) if flagged else 0
    hook = str(data.get("comm_hook", ""))
    if not hook or hook.endswith("BuiltinCommHookType.ALLREDUCE"):
        return size + flags
    if hook.endswith("BuiltinCommHookType.FP16_COMPRESS"):
        return size // 2 + flags
    return flags
