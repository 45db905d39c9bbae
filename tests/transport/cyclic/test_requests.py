"""What ranks ask for travels in the sum of their status: each kind is heard, however many ask, and carried out once."""

import itertools
from typing import get_args

import pytest
import torch

from lightning_comm.transport.cyclic.requests import BATCH, RATE, Requests
from lightning_comm.transport.stop_protocol import Kind

KINDS = get_args(Kind)
CPU = torch.device("cpu")


class Store(dict):
    def compare_set(self, key, expected, desired):
        return self.setdefault(key, desired.encode())

    def get(self, key):
        return self[key]


def ranks(count):
    store = Store()
    return [Requests(store, rank, "run") for rank in range(count)]


@pytest.mark.parametrize("asked", [each for n in range(len(KINDS) + 1) for each in itertools.combinations(KINDS, n)])
def test_every_set_of_kinds_is_heard_by_all_whoever_and_however_many_ask(asked):
    for repeats in (1, 40_000):
        everyone = ranks(3)
        for number, kind in enumerate(asked):
            everyone[number % 3].ask(kind, "because")
            everyone[-1].ask(kind, "too")
        status = sum(rank.status(4, None, CPU, asking=True, batch=5, rate=0.5) for rank in everyone) * repeats
        assert status[BATCH] == 15 * repeats
        assert status[RATE] == 1.5 * repeats
        for rank in everyone:
            assert [decision.kind for decision in rank.decided(4, status.tolist(), 6)] == list(asked)


def test_what_is_asked_for_again_before_it_is_done_is_done_with_it():
    one, other = ranks(2)
    done, history = [], []
    for step in range(12):
        if step in (2, 3, 9):
            one.ask("checkpoint", "by the clock")
        if step in (3, 4):
            other.ask("checkpoint", "by the clock")
        history.append(sum(rank.status(step, None, CPU, asking=True) for rank in (one, other)).tolist())
        if step >= 2:  # the status is back two steps later
            answers = [rank.decided(step - 2, history[step - 2], step + 1) for rank in (one, other)]
            assert answers[0] == answers[1]
            done += [(step, decision.kind) for decision in answers[0]]
    assert done == [(4, "checkpoint"), (11, "checkpoint")]
