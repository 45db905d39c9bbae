"""Clocks of processes on one machine are one clock, so the offset must be 0 within the stated error."""

import json
import time

import torch
import torch.distributed as dist
from support.processes import start_ranks

from lightning_comm.core.ledger import CommLedger
from lightning_comm.instruments import clocks
from lightning_comm.instruments.clocks import compare_clocks, device_of_group, gather_json, number_from_rank_0
from lightning_comm.instruments.collectives import Watcher


def _meet(rank):
    cpu = torch.device("cpu")
    seen = []
    watcher = Watcher(seen.append, int, lambda body: body())
    watcher.install()
    ledger = CommLedger()
    point = compare_clocks(ledger)
    real = time.monotonic
    clocks.time = type("Clock", (), {"monotonic": staticmethod(lambda: real() - 5.0 * rank)})
    behind = compare_clocks(ledger)
    number = number_from_rank_0(40 + rank, ledger)
    gathered = gather_json({"rank": rank, "long": "ü" * 1000 * rank}, cpu, ledger)
    watcher.remove()
    return point, behind, number, gathered, str(device_of_group(torch.device("meta"))), seen, ledger


def test_clocks_agree_within_the_error_and_ranks_hear_what_each_has_to_say():
    answers = start_ranks(_meet, world_size=3)
    for rank, (point, behind, number, gathered, device, seen, ledger) in enumerate(answers):
        assert abs(point.offset_s) <= point.error_s < 0.5
        assert abs(behind.offset_s - 5.0 * rank) <= behind.error_s < 0.5
        assert number == 40
        assert [row["rank"] for row in gathered] == [0, 1, 2]
        assert [len(row["long"]) for row in gathered] == [0, 1000, 2000]
        assert device == "cpu"
        assert seen == [], "the profiler counts its own messages"
        text = len(json.dumps({"rank": 2, "long": "ü" * 2000}))
        questions = 2 * 16 * (1 if rank else 2)  # two comparisons, in which rank 0 answers both others
        assert ledger.purposes == ["instruments"]
        assert ledger.payload_bytes() == 8 * questions + 8 + 8 + text
        assert ledger.messages() == questions + 3
    assert answers[0][0].error_s == 0.0
    assert not dist.is_initialized()
