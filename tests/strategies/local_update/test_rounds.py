"""The engine of rounds without Lightning: what it imports, and rounds of a part of the ranks against means by hand."""

import ast
import importlib.util
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


def engine(members, module, averaging, counts, steps=STEPS):
    """Rounds of these members, as a plain loop makes them."""
    recorder = Recorder(CommLedger(), members)
    clock, samples = RoundClock(FixedPeriod(PERIOD), steps), SampleWeights()
    device_clock = DeviceClock(torch.device("cpu"))
    if counts:
        samples.begin()
    tensors = ModelTensors(module, differences=averaging.difference_scope)
    agreement = Agreement(default_store(), members.rank, members.size, "rounds")
    ends = EpochEnds(default_store(), members.rank, members.size, "rounds", "Rounds", agreement, lambda: None, 30.0)
    training, model, ended = Alone(clock), ModelAverage(tensors, recorder, averaging), []

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
    return rounds, model, mid_round, samples, ended, recorder.ledger, overlapped


def move(rank, step):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * rank + step), dtype=torch.float64)


def _part_of_the_ranks(rank, averaging, counts):
    """Ranks 0 and 2 train in rounds, and rank 1 does something else."""
    group, behind = dist.new_group([0, 2]), dist.new_group([0, 2])
    if rank == 1:
        dist.barrier()
        return None
    members, module = Members(group, behind), nn.Linear(3, 4, bias=False).double()
    nn.init.zeros_(module.weight)
    rounds, model, mid_round, samples, ended, ledger, _ = engine(members, module, averaging, counts)
    weights, seen = [], None
    model.begin_round()
    for step in range(STEPS):
        rounds.open()
        with pytest.raises(RuntimeError, match="two rounds alone"):
            members.change(group, behind)
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
    members.change(group, behind)
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


WITH_ONE_MORE = 8  # steps: so that the average of the new members lands within a round of theirs


def _change(rank, counts):
    """All ranks train the first round, with averages in flight; then rank 1 leaves, and the others go on."""
    part, behind, whole = dist.new_group([0, 2]), dist.new_group([0, 2]), dist.new_group()
    members, module = Members(background=whole), nn.Linear(3, 4, bias=False).double()
    nn.init.zeros_(module.weight)
    averaging = Averaging(overlap_steps=1)
    rounds, model, mid_round, samples, _, ledger, overlapped = engine(members, module, averaging, counts, WITH_ONE_MORE)
    weights, seen = [], []
    model.begin_round()
    for step in range(WITH_ONE_MORE):
        rounds.open()
        with torch.no_grad():
            module.weight += move(rank, step)
        samples.count(counts[rank] if counts else 1)
        samples.end_batch()
        if rounds.clock.tick():
            rounds.synchronise()
        else:
            rounds.go_on()
        weights.append(module.weight.detach().clone().numpy())
        if step == PERIOD - 1:
            with pytest.raises(RuntimeError, match=r"Members: `group`.*in flight.*\[0, 1, 2\].*Let it land first"):
                members.change(part, behind)
            overlapped.land()
            if rank == 1:
                break
            members.change(part, behind)
            mid_round.enter_evaluation()  # among the new members, none of which has trained since
            seen = module.weight.detach().clone().numpy()
            mid_round.weights.leave()
    dist.barrier()
    sent = [record.wire_bytes for record in ledger.records if record.purpose == "parameters"]
    return weights, seen, sent


@pytest.mark.parametrize("counts", [None, (3, 2, 1)], ids=["equal", "weighed"])
def test_members_that_change_once_an_average_has_landed_are_those_of_the_next_one_in_the_background(run_ranks, counts):
    answers = run_ranks(_change, counts, world_size=3)
    for ranks, step, own, evaluated in _expected_as_members_change(counts or (1, 1, 1)):
        for rank in ranks:
            weights, seen, _ = answers[rank]
            torch.testing.assert_close(torch.from_numpy(weights[step]), own[rank])
            if evaluated is not None and rank != 1:
                torch.testing.assert_close(torch.from_numpy(seen), evaluated)
    entries_bytes = 12 * 8
    for rank, (_, _, sent) in enumerate(answers):  # a ring all-reduce sends 2 (n - 1) / n of the payload
        assert sent == [pytest.approx(4 / 3 * entries_bytes)] + [pytest.approx(entries_bytes)] * (0 if rank == 1 else 2)


def _expected_as_members_change(counts):
    """Yield for every step the members, the weights of all ranks, and what an evaluation after it sees, if any."""
    own = [torch.zeros(4, 3, dtype=torch.float64) for _ in range(3)]

    def mean_of(tensors, ranks):
        return sum(counts[rank] * tensors[rank] for rank in ranks) / sum(counts[rank] for rank in ranks)

    for step in range(WITH_ONE_MORE):
        ranks = (0, 1, 2) if step < PERIOD else (0, 2)
        for rank in ranks:
            own[rank] = own[rank] + move(rank, step)
        if step == 2 * PERIOD - 1:
            departed = list(own)
        if step == 2 * PERIOD:  # lands one step later
            own = [tensor + mean_of(departed, ranks) - then for tensor, then in zip(own, departed, strict=True)]
        if step + 1 == WITH_ONE_MORE:
            own = [mean_of(own, ranks)] * 3
        yield ranks, step, list(own), mean_of(own, ranks) if step == PERIOD - 1 else None
        if step == PERIOD - 1:  # landed before the members changed
            own = [mean_of(own, ranks)] * 3
