"""Averages in the background on the wire, against a single process that does the arithmetic of all ranks by hand."""

import itertools
import threading
import time
from datetime import timedelta
from functools import cache

import pytest
import torch
from support.differences import BY_HAND, SHAPES, in_memory_order, moved, start
from support.grids import few_of
from support.model_averages import Background, overlapped_average
from support.processes import one_launch

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.overlapped_average import EndedRound
from lightning_comm.transport.recording import Recorder, another_group

ROUNDS = 3
METHODS = [Full(), Cast("bf16"), Int8(), TopK(0.1)]
PAUSES = ["nothing", "time", "arrive", "resume"]


def rows(tensors):
    return {name: in_memory_order(name, tensor).clone().numpy() for name, tensor in tensors.items()}


def _background(rank, compression, bucket_bytes, pause):
    """Depart after one move, land after another; `pause` is what happens in between."""
    ledger = CommLedger()
    recorder = Recorder(ledger, another_group(timedelta(seconds=30)), beside_compute=True, hold=True)
    averager = Background(recorder, compression, bucket_bytes)
    weights = start()
    weights["b.weight"] = weights["b.weight"].contiguous(memory_format=torch.channels_last)
    averager.references.restart(weights)
    history = []
    for step in range(ROUNDS):
        moved(weights, rank, 2 * step)
        averager.depart(weights)
        assert averager.in_flight
        before = rows(weights)
        if pause == "time":
            time.sleep(0.05)
        if pause == "arrive":
            averager.overlapped.wait()
        if pause == "resume":
            state = averager.state_dict()
            averager = Background(recorder, compression, bucket_bytes)
            averager.load_state_dict(state, weights)
            assert averager.in_flight
        same = rows(weights)
        assert all((same[name] == before[name]).all() for name in SHAPES), "weights moved while in flight"
        moved(weights, rank, 2 * step + 1)
        averager.land_(weights)
        assert not averager.in_flight
        reference = averager.state_dict()["reference"]
        history.append((rows(weights), {name: row.clone().numpy() for name, row in reference.items()}))
    return history, ledger.payload_bytes("parameters")


GRID = list(itertools.product(METHODS, (8, 10**6), PAUSES))  # compression, bytes of a bucket, what happens in flight
FEW = (0, 3, 5, 9, 14, 15, 18, 20, 23, 27, 28)  # each compression with both sizes, and with a resume


@cache
def of_two(exhaustive):
    """All cases of two ranks, in one launch."""
    cases = [case for number, case in enumerate(GRID) if exhaustive or number in FEW]
    return one_launch(_background, [*cases, (Full(), 300, "nothing"), (Cast("bf16"), 300, "nothing")], world_size=2)


@cache
def of_three():
    cases = [(compression, 300, "nothing") for compression in (Full(), Int8(), TopK(0.1), PowerSGD(1))]
    return one_launch(_background, cases, world_size=3)


@cache
def in_one_process(compression, world_size):
    return list(_in_one_process(compression, world_size))


def _in_one_process(compression, world_size):
    weights = [start() for _ in range(world_size)]
    reference = {name: in_memory_order(name, tensor).clone() for name, tensor in weights[0].items()}
    for step in range(ROUNDS):
        corrections = [{} for _ in range(world_size)]
        for rank in range(world_size):
            moved(weights[rank], rank, 2 * step)
        for name in SHAPES:
            differences = [in_memory_order(name, each[name]) - reference[name] for each in weights]
            if not len(differences[0]):
                continue
            sent, mean = BY_HAND[type(compression)](differences, name, step)
            reference[name] = reference[name] + mean
            for rank in range(world_size):
                corrections[rank][name] = mean - sent[rank]
        for rank in range(world_size):
            moved(weights[rank], rank, 2 * step + 1)
            for name, correction in corrections[rank].items():
                if name == "b.weight":
                    count, channels, height, width = SHAPES[name]
                    correction = correction.view(count, height, width, channels).permute(0, 3, 1, 2)
                weights[rank][name].add_(correction.reshape(SHAPES[name]))
        yield [rows(each) for each in weights], {name: row.clone().numpy() for name, row in reference.items()}


@pytest.mark.parametrize(("compression", "bucket_bytes", "pause"), few_of(GRID, *FEW), ids=str)
def test_ranks_do_what_one_process_does_for_all_whatever_happens_in_flight(request, compression, bucket_bytes, pause):
    answers = of_two(request.config.getoption("exhaustive"))[compression, bucket_bytes, pause]
    for step, (weights, reference) in enumerate(in_one_process(compression, 2)):
        for rank, (history, _) in enumerate(answers):
            after, held = history[step]
            for name in SHAPES:
                assert (after[name] == weights[rank][name]).all(), f"{name} of rank {rank} in round {step}"
                assert (held[name] == reference[name]).all(), f"reference of {name} in round {step}"


@pytest.mark.parametrize("compression", [Full(), Int8(), TopK(0.1), PowerSGD(1)], ids=repr)
def test_three_ranks_hold_the_same_references_and_keep_the_mean(compression):
    answers = of_three()[compression, 300, "nothing"]
    alone = [start() for _ in range(3)]  # what the mean would be without any communication
    for step in range(ROUNDS):
        for rank, each in enumerate(alone):
            moved(each, rank, 2 * step)
            moved(each, rank, 2 * step + 1)
        mean = [rows(each) for each in alone]
        for name in SHAPES:
            held = [history[step][1][name] for history, _ in answers]
            assert all((row == held[0]).all() for row in held)
            got = sum(history[step][0][name] for history, _ in answers) / 3
            wanted = sum(each[name] for each in mean) / 3
            bound = (step + 1) / 127 if isinstance(compression, Int8) else 1e-5  # of its second rounding
            assert abs(got - wanted).max(initial=0) < bound, name


def test_the_payload_is_that_of_a_blocking_average(request):
    numel = sum(row.numel() for row in start().values())
    for compression, itemsize in ((Full(), 4), (Cast("bf16"), 2)):
        for _, payload_bytes in of_two(request.config.getoption("exhaustive"))[compression, 300, "nothing"]:
            assert payload_bytes == ROUNDS * itemsize * numel


def _other_layouts(rank):
    recorder = Recorder(CommLedger(), another_group(timedelta(seconds=30)), beside_compute=True, hold=True)
    averager = Background(recorder, Cast("bf16"), 300)
    weights = start()
    averager.references.restart(weights)
    sizes = []
    for count in range(2, len(weights) + 1):  # as where layers are unfrozen one by one
        part = dict(list(weights.items())[:count])
        averager.depart(part)
        averager.land_(part)
        kept = sum(row.numel() for row, _ in averager.average._kept_rows.values())
        sizes.append((kept, sum(tensor.numel() for tensor in part.values())))
    return sizes


def test_rows_are_kept_for_the_last_departure_alone(run_ranks):
    for sizes in run_ranks(_other_layouts, world_size=2):
        assert all(kept == numel for kept, numel in sizes)


def _from_another_thread(rank):
    """As where a framework runs a fit, or autograd a hook, in a thread that is not the main one."""
    ledger = CommLedger()
    recorder = Recorder(ledger)
    sending = threading.Thread(target=lambda: recorder.all_reduce(torch.ones(4), "gradients").wait())
    sending.start()
    sending.join()
    return ledger.payload_bytes("gradients")


def test_messages_of_any_thread_are_written_down_at_once_unless_they_are_held(run_ranks):
    assert run_ranks(_from_another_thread, world_size=2) == [16, 16]


@pytest.mark.parametrize("steps", [-1, 1.5, True, "2"])
def test_a_bad_number_of_steps_is_named_with_its_value_and_a_way_out(steps):
    with pytest.raises(ValueError, match="overlap_steps") as caught:
        Averaging(overlap_steps=steps)
    assert all(word in str(caught.value) for word in ("overlap_steps", repr(steps), ">= 0", "0 waits"))


# ---- where it lands --------------------------------------------------------------------------------------------------


def _landings(rank, next_steps):
    """One round ends at step 4; ranks go on for another, and note after which steps weights had moved."""
    said, weights = [], {"a": torch.zeros(3)}
    recorder = Recorder(CommLedger(), another_group(timedelta(seconds=30)), beside_compute=True, hold=True)
    average, overlapped = CompressedAverage(recorder, Full(), 300), overlapped_average(lambda: weights, 2, said)
    average.references.restart(weights)
    found = []
    for start_step in (4, 4 + next_steps):
        weights["a"] += rank + 1.0
        before = weights["a"].clone()
        ended = EndedRound(start_step, 4, 0.1, 0.5)
        overlapped.depart(lambda: average.depart(weights), ended)
        overlapped.make_way()  # on a CPU nothing is held up
        held_up = not overlapped.is_sending
        overlapped.begin_round(start_step, next_steps)
        moved_after = []
        for step in range(start_step, start_step + next_steps):
            overlapped.land_if_due(step)
            moved_after.append(not torch.equal(weights["a"], before))
        found.append((held_up, moved_after, weights["a"].tolist()))
    return found, [(each, drift.relative > 0) for each, drift in overlapped.landings], said


@pytest.mark.parametrize(("next_steps", "lands_after"), [(5, 2), (3, 2), (2, 1), (1, 0)])
def test_an_average_lands_after_as_many_steps_as_asked_for_or_before_the_last_of_its_round(
    run_ranks, next_steps, lands_after
):
    for found, landings, said in run_ranks(_landings, next_steps, world_size=2):
        for held_up, moved_after, _ in found:
            assert not held_up
            assert moved_after == [k >= lands_after for k in range(next_steps)]
        assert [weights for *_, weights in found] == [[1.5] * 3, [3.0] * 3]
        for k, (ended, drifted) in enumerate(landings):
            assert drifted
            assert ended.step == 4 + k * next_steps
            assert ended.land_at == ended.step + lands_after
            assert (ended.period_steps, ended.lr, ended.wait_s) == (4, 0.1, 0.5)
            assert ended.transfer_s > 0
        assert len(said) == (lands_after < 2), "said once for all rounds as short"
        for words in (f"the {next_steps} steps of the round", "begins at step 4", f"lands after {lands_after}:"):
            assert all(words in each for each in said)


def _fails(rank):
    weights = {"a": torch.zeros(3)}
    average, overlapped = CompressedAverage(Recorder(CommLedger()), Full(), 300), overlapped_average(lambda: weights)
    average.references.restart(weights)
    departed = average.depart(weights)
    departed.travel = lambda: torch.ones(3).view(2)
    overlapped.depart(lambda: departed, EndedRound(4, 4, 0.1, 0.5))
    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        overlapped.land()
    return overlapped.is_sending, weights["a"].tolist(), overlapped.landings


def test_what_fails_in_the_thread_is_raised_where_it_is_waited_for_and_moves_nothing(run_ranks):
    assert run_ranks(_fails, world_size=1) == [(False, [0.0] * 3, [])]
