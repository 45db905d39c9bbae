"""The formulas of what compressions send, against counting by hand, and the link on which they pay."""

import math
from fractions import Fraction

import pytest

from lightning_comm.core.compression.payload import break_even_bytes_per_s, parts, sent_bytes

SHAPES = [(7, 5), (7,), (4, 3, 3, 3), (1,), (13, 11)]
NUMEL = 35 + 7 + 108 + 1 + 143


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("method", "factor"), [("full", 4), ("bf16", 2), ("fp16", 2), ("ternary", Fraction(NUMEL + 4 * 5, NUMEL))]
)
def test_what_is_all_reduced_is_sent_in_a_ring(method, factor, world_size):
    expected = Fraction(2 * (world_size - 1), world_size) * factor * NUMEL
    assert abs(sent_bytes(method, SHAPES, world_size) - expected) <= 1  # each message is rounded to whole bytes


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_int8_sends_about_a_quarter_of_fp32_at_any_number_of_ranks(world_size):
    # every rank sends the others their parts with all scales, then its own part
    part = math.ceil(NUMEL / world_size)
    assert sent_bytes("int8", SHAPES, world_size) == (world_size - 1) * (part + 4 * 5) + (world_size - 1) * part
    large = [(1000, 1000)] * 10
    share = sent_bytes("int8", large, world_size) / sent_bytes("full", large, world_size)
    assert share == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("world_size", [2, 3, 50, 51])
def test_top_k_grows_with_the_ranks_and_beats_bf16_up_to_fifty_of_them(world_size):
    large = [(1000, 1000)]
    assert sent_bytes("topk", large, world_size) == (world_size - 1) * 8 * 10_000
    assert (sent_bytes("topk", large, world_size) < sent_bytes("bf16", large, world_size)) == (world_size < 50)
    assert parts("topk", SHAPES, world_size, ratio=0.1)[0].payload_bytes == 8 * (4 + 1 + 11 + 1 + 15)


def test_power_sgd_sends_two_thin_matrices_and_vectors_whole():
    first, second = parts("powersgd", SHAPES, world_size=2, rank=2)
    assert first.payload_bytes == 4 * (2 * 7 + 7 + 2 * 4 + 1 + 2 * 13)
    assert second.payload_bytes == 4 * (2 * 5 + 2 * 27 + 2 * 11)


def test_what_power_sgd_would_not_make_smaller_goes_in_full():
    first, second = parts("powersgd", [(3, 3)], world_size=2, rank=2)
    assert (first.payload_bytes, second.payload_bytes) == (4 * 9, 0)


def test_nothing_is_sent_without_synchronisation():
    assert sent_bytes("no_sync", SHAPES, 4) == 0


def test_at_the_break_even_bandwidth_both_take_as_long():
    full, half, extra_s = sent_bytes("full", SHAPES, 4), sent_bytes("bf16", SHAPES, 4), 0.002
    rate = break_even_bytes_per_s(full, half, extra_s)
    assert full / rate == pytest.approx(half / rate + extra_s)
    for slower in (0.5, 0.9):
        assert full / (slower * rate) > half / (slower * rate) + extra_s
    assert break_even_bytes_per_s(10, 10, 1.0) == break_even_bytes_per_s(10, 20, 1.0) == 0
    assert break_even_bytes_per_s(20, 10, 0.0) == math.inf


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`method` must be one of 'full', .*got 'bf17'"):
        parts("bf17", SHAPES, 2)
    with pytest.raises(ValueError, match=r"must be >= 0; got .*`extra_s`=-1"):
        break_even_bytes_per_s(2, 1, -1)
