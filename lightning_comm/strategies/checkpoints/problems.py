"""Problems of one rank with files, of which all ranks learn before any of them goes on or gives up."""

import torch
from lightning.pytorch.strategies import ParallelStrategy

from lightning_comm.transport.recording import Recorder

_BYTES = 1500  # of a problem, in UTF-8
_PURPOSE = "checkpoint_files"


class CheckpointError(OSError):
    """A checkpoint that could not be written or read, on all ranks alike; it says where, why and the way out."""


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def first_problem(strategy: ParallelStrategy, recorder: Recorder, problem: str | None) -> tuple[int, str] | None:
    """Return, on all ranks, the first rank that has a problem, and its problem; every rank calls this.

    Note:
        *Communication.* A byte of each rank; and where one has a problem, 1500 more. Recorded as
        ``"checkpoint_files"``.

    """
    text = (problem or "").encode()[:_BYTES].decode(errors="ignore").encode()  # no half characters
    mine = torch.tensor([problem is not None], dtype=torch.uint8, device=strategy.root_device)
    rows, pending = recorder.all_gather(mine, _PURPOSE)
    pending.wait()
    troubled = rows.flatten().nonzero().flatten().tolist()
    if not troubled:
        return None
    row = torch.zeros(_BYTES, dtype=torch.uint8)
    row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    texts, pending = recorder.all_gather(row.to(strategy.root_device), _PURPOSE)
    pending.wait()
    first = troubled[0]
    return first, bytes(texts[first].tolist()).rstrip(b"\0").decode(errors="replace")
