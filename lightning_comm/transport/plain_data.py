"""Messages of values that are not tensors: sent as JSON, or as tensors in containers, and never as pickled objects.

Unpickling runs any code that the sender has put into the message. What is sent here is read by a parser that creates
numbers, texts, tensors and containers of these, and nothing else.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_comm.transport.recording import Recorder

_STATE_TAG = 2**20 + 11  # the tag of messages with states; no other message of the default group uses it
_RULE = (
    "Such states are made of numbers, texts, tensors and containers of these. Keep objects of your own out of "
    "`state_dict()`, or name their class by `torch.serialization.add_safe_globals` on all ranks."
)


class NotPlainError(TypeError):
    """The error of a state that holds more than numbers, texts, tensors and containers of these."""


def gather_json(value: Any, recorder: Recorder, device: torch.device, purpose: str) -> list[Any]:
    """Return the values of all ranks, on all of them; every rank calls this.

    Args:
        value: Anything that JSON can hold; tuples arrive as lists.
        recorder: Sends and records.
        device: The device from which the backend sends.
        purpose: What it is for, for the ledger.

    Note:
        *Communication.* Two all-gathers: 8 bytes, and the longest text.

    """
    text = _bytes_of(value, device)
    lengths, pending = recorder.all_gather(torch.tensor([text.numel()], device=device), purpose)
    pending.wait()
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=device)
    padded[: text.numel()] = text
    rows, pending = recorder.all_gather(padded, purpose)
    pending.wait()
    return [_value_of(row[:length]) for row, length in zip(rows, lengths.view(-1).tolist(), strict=True)]


def broadcast_json(value: Any, recorder: Recorder, device: torch.device, purpose: str, src: int = 0) -> Any:
    """Return the value of one rank, on all of them; every rank calls this, and the values of others are ignored.

    Args:
        value: Anything that JSON can hold; tuples arrive as lists, on ``src`` too.
        recorder: Sends and records.
        device: The device from which the backend sends.
        purpose: What it is for, for the ledger.
        src: The rank whose value counts.

    Note:
        *Communication.* Two broadcasts: 8 bytes, and the text.

    """
    text = _bytes_of(value if recorder.rank == src else None, device)
    length = torch.tensor([text.numel()], device=device)
    recorder.broadcast(length, purpose, src).wait()
    if recorder.rank != src:
        text = torch.empty(int(length), dtype=torch.uint8, device=device)
    recorder.broadcast(text, purpose, src).wait()
    return _value_of(text)


def gather_states(
    state: Any, recorder: Recorder, device: torch.device, purpose: str, where: str
) -> Iterator[tuple[int, Any]]:
    """Yield the state of each rank on rank 0, one after the other, and nothing elsewhere; every rank goes through all.

    Args:
        state: Numbers, texts, tensors, and containers of these; NumPy's numbers too.
        recorder: Sends and records.
        device: The device from which the backend sends.
        purpose: What it is for, for the ledger.
        where: Whose state it is, for messages.

    Raises:
        NotPlainError: On all ranks, if the state of one holds anything else.

    Note:
        *Communication.* The lengths of all states, by two all-gathers; then each state, sent to rank 0.

        *Memory.* On rank 0 the bytes of one rank's state besides those yielded; elsewhere a copy of the state.

    """
    # rank 0 keeps its own state as it is; a state that cannot be sent is reported to all ranks before any is sent
    problem, content = None, b""
    if recorder.rank != 0:
        try:
            content = pack(state, where)
        except NotPlainError as error:
            problem = f"rank {recorder.rank}: {error}"
    rows = gather_json({"bytes": len(content), "problem": problem}, recorder, device, purpose)
    problems = [row["problem"] for row in rows if row["problem"]]
    if problems:
        raise NotPlainError("; ".join(problems))
    if recorder.rank != 0:
        message = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        recorder.wait_for(recorder.send(message, 0, purpose, message.numel(), tag=_STATE_TAG, step=recorder.step), 0)
        return
    yield 0, state
    for rank in range(1, recorder.world_size):
        message = torch.empty(rows[rank]["bytes"], dtype=torch.uint8, device=device)
        recorder.wait_for(recorder.receive(message, rank, tag=_STATE_TAG), rank)
        yield rank, unpack(message)


def pack(state: Any, where: str) -> bytes:
    """Return a state as bytes that :func:`unpack` can read.

    Raises:
        NotPlainError: If it could not.

    Example:
        >>> unpack(torch.frombuffer(bytearray(pack({"lr": 0.1, "state": torch.ones(2)}, "here")), dtype=torch.uint8))
        {'lr': 0.1, 'state': tensor([1., 1.])}

    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        with _harmless_classes_allowed():
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    except Exception as error:  # pickling runs code of the classes in the state
        raise NotPlainError(
            f"{where} cannot be sent to another rank ({type(error).__name__}: {error}). {_RULE}"
        ) from error
    if refused:
        raise NotPlainError(f"{where} cannot be sent to another rank, since it holds {', '.join(refused)}. {_RULE}")
    return buffer.getvalue()


def unpack(message: Tensor) -> Any:
    """Return the state that another rank has packed."""
    with _harmless_classes_allowed():
        return torch.load(io.BytesIO(message.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


@contextmanager
def _harmless_classes_allowed() -> Iterator[None]:
    """Allow classes that schedulers and optimizers may keep and that run no code: NumPy's numbers, texts and arrays."""
    classes: list[Any] = [type(np.dtype(code)) for code in "?bhilqBHILQefdFDUS"]
    makers: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    with torch.serialization.safe_globals([np.dtype, np.ndarray, frozenset, *classes, *makers]):
        yield


def _bytes_of(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _value_of(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes())
