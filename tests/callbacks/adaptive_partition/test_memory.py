"""The room in a GPU's memory: other processes, ranks on the card and what the allocator keeps take of it."""

from types import SimpleNamespace

import pytest
import torch

from lightning_comm.callbacks.adaptive_partition.memory import MemoryRoom, card_of
from lightning_comm.core.adaptive_partition.balancing import memory_cap

GB = 10**9
CUDA = torch.device("cuda", 0)


class Card:
    """What torch.cuda says of the memory of one card: ranks on it, their allocators, and somebody else."""

    def __init__(self, monkeypatch, total=100 * GB):
        self.total, self.others, self.asked = total, 0, []
        self.allocated = self.reserved = 0
        stubs = {
            "max_memory_allocated": lambda device: self.of(device, self.allocated),
            "max_memory_reserved": lambda device: self.of(device, self.reserved),
            "memory_reserved": lambda device: self.of(device, self.reserved),
            "mem_get_info": lambda device: self.of(device, (self.total - self.others - self.reserved, self.total)),
        }
        for name, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, name, stub)

    def of(self, device, value):
        assert device == CUDA
        return value

    def trains(self, samples, kept=0):
        """10 GB of weights, and 1 GB a sample."""
        self.allocated = max(self.allocated, 10 * GB + samples * GB)
        self.reserved = max(self.reserved, self.allocated + kept)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def learnt(card, sharers=1, kept=0):
    room = MemoryRoom(CUDA, sharers)
    for samples in (8, 16):
        card.trains(samples, kept)
        cap = room.cap(samples)
    return cap


def test_alone_on_a_card_a_rank_may_fill_nine_tenths_of_it(card):
    assert learnt(card) == 80


def test_what_other_processes_hold_is_no_room(card):
    card.others = 50 * GB
    assert learnt(card) == 35  # 0.9 * 50 - 10


def test_ranks_on_one_card_share_what_is_free(card):
    card.others = 26 * GB  # the other rank, with the same batch
    # 26 of its own and half of 48 free ones: together with the other's they are the card
    assert learnt(card, sharers=2) == int(0.9 * 50) - 10
    card.allocated = card.reserved = 0
    assert learnt(card) == int(0.9 * 74) - 10, "and if both took as much, they would not fit"


def test_what_the_allocator_keeps_beside_tensors_is_no_room(card):
    assert learnt(card, kept=20 * GB) == int(0.9 * 80) - 10


def test_what_is_trained_on_now_has_room_however_full_the_card_is(card):
    card.others = 72 * GB
    assert learnt(card, kept=2 * GB) == 16


def test_of_a_smaller_batch_the_peak_is_not_taken_to_be_the_one_of_before(card):
    room = MemoryRoom(CUDA, 1)
    for samples in (16, 8):
        card.trains(samples)
        cap = room.cap(samples)
    assert cap == memory_cap([(16, 26 * GB)], 100 * GB, present=8) == 10


def test_a_larger_peak_at_the_same_size_counts(card):
    room = MemoryRoom(CUDA, 1)
    for samples, needs in ((8, 8), (16, 16), (16, 24)):
        card.trains(needs)
        cap = room.cap(samples)
    assert cap == memory_cap([(8, 18 * GB), (16, 34 * GB)], 100 * GB, present=16) == 44


def test_on_the_processor_nothing_is_asked_and_nothing_is_said():
    assert MemoryRoom(torch.device("cpu"), 2).cap(8) is None
    assert card_of(torch.device("cpu")) is None


def test_a_card_is_known_by_its_uuid_whatever_its_number_is_in_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    assert card_of(torch.device("cuda", 0)) == card_of(torch.device("cuda", 1)) == "GPU-1"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert card_of(torch.device("cuda", 0)) != card_of(torch.device("cuda", 1))
