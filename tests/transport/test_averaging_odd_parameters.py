"""Parameters of every odd kind, through every way to average: against means by hand, and a resume in flight."""

from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
from support.model_averages import NO_ROUND, Model
from support.odd_parameters import OddParameters, entries

from lightning_comm import Cast, Int8, PowerSGD, TopK
from lightning_comm.ondevice.share import Share
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.recording import another_group

COUNTS = [3, 1, 2]
STEPS = 3
BUCKET_BYTES = 160  # several for the model, in which a parameter of 30 entries is larger
COMPRESSIONS = (None, Cast("bf16"), Cast("fp16"), Int8(), TopK(0.3), PowerSGD(1))
ROUNDING = {"Cast(dtype='bf16')": 2e-2, "Int8()": 2e-2, "Cast(dtype='fp16')": 2e-3}  # of sums
ALWAYS_IN_FULL = ("complex_valued", "head", "tail")
UNTRAINED = ("frozen", "expanded")


def train(module, rank, step):
    """Move every entry once, also those that two parameters share."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in ("transposed", "tail"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        module.tail[3:] += 0.1 * torch.randn(3, generator=generator)


def averages_of(module, compression, overlap, groups):
    averaging = Averaging(BUCKET_BYTES / 2**20, compression, overlap_steps=int(overlap))
    return Model(module, averaging, background=groups.pop() if overlap else None)


def _rounds(rank, world_size, compression, overlap, weighted, groups):
    module = OddParameters()
    averages = averages_of(module, compression, overlap, groups)
    averages.average.begin_round(equal=True)
    history = []
    for step in range(STEPS):
        train(module, rank, step)
        before = entries(module)
        weight = Share.of([COUNTS[(k + step) % world_size] for k in range(world_size)], rank) if weighted else None
        if not overlap:
            averages.average.average(weight)
        else:
            averages.depart(weight)
            if step == 1:  # saved, and restored by another process in flight
                in_flight = averages.overlapped.departed_state()
                state = averages.average.compression_state(in_flight), averages.temporary.own_state()
                state = tuple({name: copied(value) for name, value in part.items()} for part in state)
                never_stopped, landed = averages, module
                module = OddParameters()
                averages = averages_of(module, compression, overlap, groups)
                averages.tensors.load_state(state[1])
                departed = averages.average.load_compression_state(state[0], same=True)
                averages.overlapped.load_state_dict(asdict(NO_ROUND), departed)
                never_stopped.overlapped.land()
            averages.overlapped.land()
            if step == 1:
                others = entries(landed)
                assert all(torch.equal(tensor, others[name]) for name, tensor in entries(module).items())
        after = entries(module)
        assert torch.equal(after["transposed"], after["weight"].t()), "two names of one memory differ"
        assert torch.equal(after["head"][3:], after["tail"][:3])
        history.append(({n: t.numpy() for n, t in before.items()}, {n: t.numpy() for n, t in after.items()}))
        averages.average.begin_round(equal=not (averages.average.compresses or overlap))
    return history


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _all(rank, world_size, exhaustive):
    found = {}
    for number, compression in enumerate(COMPRESSIONS):
        for overlap in (False, True):
            for weighted in (False, True):
                if not exhaustive and (number + overlap + weighted) % 2:
                    continue  # each compression with both values of both, the pairs in turn
                groups = [another_group(timedelta(seconds=30)) for _ in range(2 * overlap)]
                found[repr(compression), overlap, weighted] = _rounds(
                    rank, world_size, compression, overlap, weighted, groups
                )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "exhaustive"), [(3, False), pytest.param(3, True, marks=pytest.mark.exhaustive)]
)
def test_every_odd_parameter_is_averaged_once_and_right_in_every_way(run_ranks, world_size, exhaustive):
    answers = run_ranks(_all, world_size, exhaustive, world_size=world_size)
    assert len(answers[0]) == len(COMPRESSIONS) * (4 if exhaustive else 2)
    for case in answers[0]:
        compression, overlap, weighted = case
        for step in range(STEPS):
            counts = [COUNTS[(k + step) % world_size] if weighted else 1 for k in range(world_size)]
            for name in answers[0][case][step][0]:
                before, after = ([answer[case][step][which][name] for answer in answers] for which in (0, 1))
                mean_before, mean_after = (
                    sum(c * row for c, row in zip(counts, rows, strict=True)) / sum(counts) for rows in (before, after)
                )
                where = f"{name} under {case} in round {step}"
                rounding = ROUNDING.get(compression, 3e-6)
                assert abs(mean_after - mean_before).max(initial=0) < rounding, f"the mean of {where} has moved"
                in_full = compression == "None" or name in (*ALWAYS_IN_FULL, *UNTRAINED)
                for row in after:
                    assert row.dtype == before[0].dtype
                    if in_full:
                        assert abs(row - mean_before).max(initial=0) < 3e-6, where
                if in_full and not overlap:
                    assert all((row == after[0]).all() for row in after), f"ranks differ: {where}"
