"""The engine of rounds without Lightning: what it imports, and rounds of a part of the ranks against means by hand."""

import ast
import importlib.util
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.core.local_update.periods import FixedPeriod
from lightning_comm.ondevice.device_clock import DeviceClock
from lightning_comm.ondevice.model_tensors import ModelTensors
from lightning_comm.strategies.local_update.meeting import Meeting, Parts
from lightning_comm.strategies.local_update.mid_round import MidRoundAverage
from lightning_comm.strategies.local_update.rounds import Rounds
from lightning_comm.strategies.local_update.sample_weights import SampleWeights
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.members import Members
from lightning_comm.transport.model_average import ModelAverage
from lightning_comm.transport.overlapped_average import OverlappedAverage
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.stop_protocol import Agreement, RankPosition, default_store

# ---- what it knows ---------------------------------------------------------------------------------------------------

ENGINE = [f"lightning_comm.strategies.local_update.{name}" for name in ("rounds", "meeting", "mid_round")]
ENGINE += [f"lightning_comm.transport.{name}" for name in ("model_average", "overlapped_average", "temporary_average")]


def path_of(module):
    """The file of one of our modules; `None` for a name that is none."""
    *folders, name = module.split(".")
    root = Path(importlib.util.find_spec("lightning_comm").origin).parent.parent
    below = root.joinpath(*folders)
    found = [path for path in (below / f"{name}.py", below / name / "__init__.py") if path.exists()]
    return found[0] if found else None


def imported_by(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def all_imported_by(modules):
    """All that modules name in imports, and what those of ours among them name, and so on."""
    found, left = set(), list(modules)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if name.startswith("lightning_comm.") and (path := path_of(name)) is not None:
            left += imported_by(ast.parse(path.read_text()))
    return found


def test_the_engine_imports_neither_lightning_nor_ddp_nor_anything_that_does():
    found = all_imported_by(ENGINE)
    assert "lightning_comm.transport.recording.Recorder" in found, "the walk does not follow imports"
    assert [name for name in sorted(found) if name.split(".")[0] in ("lightning", "pytorch_lightning")] == []
    assert [name for name in sorted(found) if name.startswith("torch.nn.parallel") or "Parallel" in name] == []


def test_the_engine_asks_the_members_and_never_the_default_group():
    of_the_group = {"get_world_size", "get_rank", "WORLD", "is_initialized", "new_group", "world_size"}
    for module in ENGINE:
        names = {node.attr for node in ast.walk(ast.parse(path_of(module).read_text())) if hasattr(node, "attr")}
        assert not names & of_the_group, module


# ---- what it does ----------------------------------------------------------------------------------------------------

PERIOD, STEPS = 3, 7


class Alone:
    """Trains in a plain loop."""

    goes_on = True

    def __init__(self, clock):
        self.clock, self.scales, self.warned = clock, [], []

    @property
    def position(self):
        return RankPosition(self.clock.steps_done, 0, 0.0)

    def learning_rate(self):
        return 0.1

    def averaged_state(self):
        return []

    def loss_scale(self, device):
        return None

    def take_loss_scale(self, scales, own):
        self.scales.append((scales, own))

    def warn(self, message):
        self.warned.append(message)


def engine(members, module, averaging, counts):
    """Rounds of these members, as a plain loop makes them."""
    recorder, background = Recorder(CommLedger(), members), None
    if averaging.overlap_steps:
        group = dist.new_group(list(members.ranks), timeout=timedelta(seconds=30), use_local_synchronization=True)
        background = Recorder(recorder.ledger, group, beside_compute=True, hold=True)
    clock, samples = RoundClock(FixedPeriod(PERIOD), STEPS), SampleWeights()
    device_clock = DeviceClock(torch.device("cpu"))
    if counts:
        samples.begin()
    tensors = ModelTensors(module, differences=averaging.difference_scope)
    agreement = Agreement(default_store(), members.rank, members.size, "rounds")
    ends = EpochEnds(default_store(), members.rank, members.size, "rounds", "Rounds", agreement, lambda: None, 30.0)
    training, model, ended = Alone(clock), ModelAverage(tensors, recorder, averaging, background), []

    def note(each, drift):
        ended.append((each.step, each.period_steps, drift.relative > 0))

    overlapped = OverlappedAverage(
        tensors.all_parameters, averaging.overlap_steps, agreement, device_clock, note, training.warn
    )
    parts = Parts(
        training, clock, model, overlapped, samples, recorder, agreement, ends, device_clock, torch.device("cpu")
    )
    meeting = Meeting(parts)
    rounds = Rounds(parts, meeting, note, overlaps=averaging.overlap_steps > 0)
    mid_round = MidRoundAverage(parts, meeting, rounds, lambda purpose: None, averages_state=False)
    return rounds, model, mid_round, samples, ended, recorder.ledger


def move(rank, step):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * rank + step), dtype=torch.float64)


def _part_of_the_ranks(rank, averaging, counts):
    """Ranks 0 and 2 train in rounds, and rank 1 does something else."""
    group = dist.new_group([0, 2])
    if rank == 1:
        dist.barrier()
        return None
    members, module = Members(group), nn.Linear(3, 4, bias=False).double()
    nn.init.zeros_(module.weight)
    rounds, model, mid_round, samples, ended, ledger = engine(members, module, averaging, counts)
    weights, seen = [], None
    model.begin_round()
    for step in range(STEPS):
        rounds.open()
        with pytest.raises(RuntimeError, match="two rounds alone"):
            members.change(group)
        with torch.no_grad():
            module.weight += move(rank, step)
        samples.count(counts[members.rank] if counts else 1)
        samples.end_batch()
        if rounds.clock.tick():
            rounds.synchronise()
        else:
            rounds.go_on()
        if step == 4:
            mid_round.enter_evaluation()
            seen = module.weight.detach().clone().numpy()
            mid_round.weights.leave()
        weights.append(module.weight.detach().clone().numpy())
    members.change(group)
    if rounds.apart:
        rounds.finish()
    dist.barrier()
    return weights, seen, ended, rounds.done, sorted(ledger.purposes)


@pytest.mark.parametrize("counts", [None, (3, 1)], ids=["equal", "weighed"])
def test_a_part_of_the_ranks_is_averaged_at_the_ends_of_its_rounds_and_the_others_are_not_asked(run_ranks, counts):
    first, nothing, third = run_ranks(_part_of_the_ranks, Averaging(), counts, world_size=3)
    assert nothing is None
    shares = [each / sum(counts or (1, 1)) for each in (counts or (1, 1))]
    own = [torch.zeros(4, 3, dtype=torch.float64) for _ in range(2)]
    for step in range(STEPS):
        own = [tensor + move(rank, step) for tensor, rank in zip(own, (0, 2), strict=True)]
        mean = sum(share * tensor for share, tensor in zip(shares, own, strict=True))
        if step == 4:
            for _, seen, *_ in (first, third):
                torch.testing.assert_close(torch.from_numpy(seen), mean)
        if step + 1 in (3, 6, 7):
            own = [mean, mean]
        for tensor, (weights, *_) in zip(own, (first, third), strict=True):
            torch.testing.assert_close(torch.from_numpy(weights[step]), tensor)
    for _, _, ended, done, purposes in (first, third):
        assert ended == [(3, 3, True), (6, 3, True), (7, 1, True)]
        assert (done, purposes) == (3, ["control", "evaluation", "parameters"])


def test_an_average_lands_where_the_round_says_and_the_last_one_is_in_full(run_ranks):
    first, _, third = run_ranks(_part_of_the_ranks, Averaging(overlap_steps=1), None, world_size=3)
    own, departed = [torch.zeros(4, 3, dtype=torch.float64) for _ in range(2)], None
    for step in range(STEPS):
        own = [tensor + move(rank, step) for tensor, rank in zip(own, (0, 2), strict=True)]
        if departed is not None and step in (3, 6):  # one step behind the departure; the last round has one step alone
            mean = (departed[0] + departed[1]) / 2
            own = [tensor + mean - then for tensor, then in zip(own, departed, strict=True)]
        if step + 1 in (3, 6):
            departed = list(own)
            if step + 1 == 6:  # lands after 0 steps, since the last round has but one
                own = [(own[0] + own[1]) / 2] * 2
                departed = None
        if step + 1 == STEPS:
            own = [(own[0] + own[1]) / 2] * 2
        for tensor, (weights, *_) in zip(own, (first, third), strict=True):
            torch.testing.assert_close(torch.from_numpy(weights[step]), tensor)
    assert all((one == other).all() for one, other in zip(first[0][-1:], third[0][-1:], strict=True))
    for _, _, ended, done, _ in (first, third):
        assert ended == [(3, 3, True), (6, 3, True), (7, 1, True)]
        assert done == 3
