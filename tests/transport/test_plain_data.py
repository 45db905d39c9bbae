"""Values and states between ranks: they arrive as they were, and nothing that arrives can run code."""

import io
import math
import os
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from support.processes import start_ranks

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.plain_data import NotPlainError, broadcast_json, gather_json, gather_states, pack, unpack
from lightning_comm.transport.recording import Recorder

CPU = torch.device("cpu")


class Own:
    """An object of a user's."""


class Evil:
    """What a sender could put into a pickle."""

    def __reduce__(self):
        return os.putenv, ("LIGHTNING_COMM_TEST", "was here")


def _message(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


STATE = {
    "step": torch.tensor(3.0),
    "exp_avg": torch.arange(6.0).view(2, 3).to(torch.bfloat16),
    "best": np.float64(0.1),
    "count": np.int64(3),
    "curve": np.arange(3.0),
    "milestones": Counter([3, 3, 5]),
    "betas": (0.9, math.inf),
    "names": OrderedDict(a={"b"}, c=[None, True, 1j, b"x"]),
}


def test_states_of_optimizers_and_schedulers_arrive_as_they_were():
    back = unpack(_message(pack(STATE, "here")))
    assert back.keys() == STATE.keys()
    for name, value in STATE.items():
        assert type(back[name]) is type(value)
        equal = torch.equal if isinstance(value, torch.Tensor) else np.array_equal
        assert equal(back[name], value) if name != "names" else back[name] == value


@pytest.mark.parametrize("value", [Own(), len, [Own()]], ids=["object", "function", "in a list"])
def test_objects_are_refused_where_they_are_sent_by_their_class_and_with_a_way_out(value):
    with pytest.raises(NotPlainError) as caught:
        pack({"mine": value}, "Adam")
    name = "Own" if value is not len else "len"
    assert [part for part in ("Adam", name, "add_safe_globals") if part not in str(caught.value)] == []


def test_what_a_pickle_would_run_is_not_run_where_it_arrives():
    buffer = io.BytesIO()
    torch.save({"lr": Evil()}, buffer)
    with pytest.raises(Exception, match=r"putenv"):
        unpack(_message(buffer.getvalue()))


def _exchange(rank):
    ledger = CommLedger()
    recorder = Recorder(ledger)
    rows = gather_json({"rank": rank, "text": "ä" * 3 * rank}, recorder, CPU, "control")
    word = broadcast_json([rank, None] if rank == 1 else object(), recorder, CPU, "control", src=1)
    control = ledger.payload_bytes("control")
    states = list(gather_states({"of": rank, "w": torch.full((rank + 1,), 0.5)}, recorder, CPU, "checkpoint", "here"))
    states = [(source, state["of"], state["w"].tolist()) for source, state in states]
    said = None
    try:
        list(gather_states({"of": Own() if rank == 2 else 0}, recorder, CPU, "checkpoint", "here"))
    except NotPlainError as error:
        said = str(error)
    return rows, word, states, said, control, ledger.records[-1].kind


def test_all_ranks_have_all_values_and_rank_0_alone_all_states():
    answers = start_ranks(_exchange, world_size=3)
    for rank, (rows, word, states, said, control, _) in enumerate(answers):
        assert rows == [{"rank": each, "text": "ä" * 3 * each} for each in range(3)]
        assert word == [1, None]
        assert states == ([(each, each, [0.5] * (each + 1)) for each in range(3)] if rank == 0 else [])
        assert "rank 2: here" in said
        assert "Own" in said
        longest = len('{"rank": 2, "text": ""}') + 6 * len("\\u00e4")
        assert control == 8 + longest + 8 + len("[1, null]")
