"""torch's flight recorder, which writes down what gloo was asked to do: an oracle that shares no code with ours."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

_BYTES = {"Float": 4, "Double": 8, "Long": 8, "Int": 4, "Byte": 1, "BFloat16": 2, "Half": 2, "Char": 1, "Bool": 1}


@contextmanager
def recording_flights(entries: int = 2000) -> Iterator[None]:
    """Let processes that are forked in here write down what they send, as many entries of it as are looked at at once.

    torch reads this when a group is made.
    """
    if not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):
        pytest.skip(f"torch {torch.__version__} writes down nothing of gloo, so there is nothing to compare with")
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(entries)
    try:
        yield
    finally:
        del os.environ["TORCH_FR_BUFFER_SIZE"]


def flight_recorder() -> list[dict]:
    """What gloo was asked to do, as torch itself writes it down."""
    entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json()).get("entries", [])
    return [
        {
            "number": entry["record_id"],
            "kind": entry["profiling_name"].split(":")[-1].replace("_base", ""),
            "types": entry["input_dtypes"],
            "bytes": sum(
                _BYTES[dtype] * torch.Size(size).numel()
                for dtype, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=True)
            ),
        }
        for entry in entries
    ]
