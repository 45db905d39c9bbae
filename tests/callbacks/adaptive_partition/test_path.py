"""The path of a setting: settings, session, plan, loader, with nothing that calls back up."""

import ast
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_comm.callbacks.adaptive_partition import session
from lightning_comm.callbacks.adaptive_partition.gradients import GradientScaling
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.callbacks.adaptive_partition.start import chosen_start, replayed_start, resumed_start, state_of
from lightning_comm.core.adaptive_partition.plan import BatchIndex
from lightning_comm.data import PartitionedLoader
from lightning_comm.formats.adaptive_partition import Change, PartitionJournal

FOLDER = Path(session.__file__).parent
HELD = ("settings", "start", "windows", "meter", "memory", "record", "files", "messages", "gradients")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names)


@pytest.mark.parametrize("name", HELD)
def test_what_a_session_holds_knows_neither_the_trainer_nor_a_strategy_nor_the_session(name):
    names = set(imported(FOLDER / f"{name}.py"))
    assert names
    told = {each for each in names if each.startswith("lightning_comm.contract") or each.endswith(".Trainer")}
    above = {each for each in names if ".adaptive_partition.session" in each or ".adaptive_partition.callback" in each}
    assert told | above == set()


def settings(**chosen):
    return PartitionSettings(
        **{
            "mode": "balance",
            "shares": None,
            "batch_sizes": None,
            "min_per_rank": None,
            "max_per_rank": None,
            "window_steps": 20,
            "min_gain": 0.05,
            "warmup_steps": 5,
            "loss_reduction": "mean",
            "replay": None,
            "folder": None,
        }
        | chosen
    )


def start_of(ranks=2, **chosen):
    loader = PartitionedLoader(range(64), global_batch_size=16)
    return chosen_start(settings(**chosen), [loader], ranks, has_batch_norm=False)


def test_the_chosen_shares_and_bounds_reach_the_plan_that_loaders_follow():
    start = start_of(shares=(1.0, 3.0), min_per_rank=2, max_per_rank=(8, 13))
    assert start.plan.sizes == (4, 12)
    assert (start.lo, start.hi) == ((2, 2), (8, 13))
    loader = PartitionedLoader(range(64), global_batch_size=16, shuffle=False)
    loader.follow(start.plan, rank=1)
    start.plan.change_at(BatchIndex(0, 2), (8, 8))  # as a window does
    assert [len(batch) for batch in loader] == [12, 12, 8, 8]


def test_a_resumed_start_goes_on_with_the_plan_and_one_of_other_ranks_with_the_chosen_shares():
    before = start_of()
    before.plan.change_at(BatchIndex(0, 2), (10, 6))
    record = {"windows": [], "why": [(0, 0, "start"), (0, 2, "measured")]}
    saved = state_of(before.run, before.plan, None, record)
    after = resumed_start(start_of(), saved, BatchIndex(0, 3), fixed=False)
    assert after.plan.changes == before.plan.changes
    assert after.why == {BatchIndex(0, 0): "start", BatchIndex(0, 2): "measured"}
    fixed = resumed_start(start_of(shares=(1.0, 3.0)), saved, BatchIndex(0, 3), fixed=True)
    assert (fixed.plan.sizes_at(BatchIndex(0, 2)), fixed.plan.sizes_at(BatchIndex(0, 3))) == ((10, 6), (4, 12))
    with pytest.warns(UserWarning, match="resumed on 4 ranks .* was stopped on 2 ranks"):
        other = resumed_start(start_of(ranks=4), saved, BatchIndex(0, 3), fixed=False)
    assert other.plan.sizes == (4, 4, 4, 4)
    assert other.why == {BatchIndex(0, 0): "start, resumed at batch 3 of epoch 0"}


def test_a_replayed_start_has_the_shares_of_the_journal_and_keeps_to_the_bounds():
    start = start_of()
    journal = PartitionJournal(start.run, "balance", (Change(0, 0, (8, 8), "start"), Change(0, 3, (10, 6), "measured")))
    replayed = replayed_start(start, journal, "journal.json")
    assert replayed.replays
    assert replayed.plan.sizes_at(BatchIndex(0, 3)) == (10, 6)
    with pytest.raises(ValueError, match=r"keep to the bounds of this run; got 'journal.json'.*\[10, 6\]"):
        replayed_start(start_of(min_per_rank=7), journal_of(start_of(min_per_rank=7), journal), "journal.json")


def journal_of(start, journal):
    return PartitionJournal(start.run, journal.mode, journal.changes)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_a_gradient_is_scaled_in_one_backward_and_as_it_was_in_the_next(factor):
    module = LightningModule()
    module.weight = torch.nn.Parameter(torch.tensor([2.0, float("inf") if factor == 0.0 else 3.0]))
    scaling = GradientScaling(module)
    loss = (module.weight * module.weight).sum()
    scaling.begin_batch()
    scaling.before_backward(loss, factor)
    loss.backward(retain_graph=True)
    scaling.after_backward()
    expected = torch.zeros(2) if factor == 0.0 else 2 * factor * module.weight.detach()
    assert torch.equal(module.weight.grad, expected)
    module.weight.grad = None
    loss.backward()
    assert torch.equal(module.weight.grad, 2 * module.weight.detach())
