"""Masks that change in training: followed on all ranks alike, with a dense step between, or an error on all of them."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from strategies.compression.test_pruning_schedule_runs import SaveAlways
from strategies.compression.test_sparse_mask_runs import Stepwise, data, masked, weights, zeros
from support.processes import launch
from support.training import trainer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from lightning_comm import CompressedDDPStrategy, MagnitudePruning, ModulePruning, SparseMask

LAYERS = (0, 2, 4)


def pruned_by_torch(amount=0.0):
    model = Stepwise()
    for layer in LAYERS:
        prune.identity(model.net[layer], "weight")
    if amount:
        prune.l1_unstructured(model.net[2], "weight", amount=amount)
    return model


def following():
    return CompressedDDPStrategy(SparseMask(ModulePruning()), timeout=timedelta(seconds=20), bucket_cap_mb=0.0003)


def effective(model):
    return [(model.net[layer].weight_orig * model.net[layer].weight_mask).detach().numpy() for layer in LAYERS]


def _by_lightning(rank, ours):
    model = pruned_by_torch()
    pruning = ModelPruning(
        "l1_unstructured",
        [(model.net[layer], "weight") for layer in LAYERS],
        amount=0.3,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=False,
    )
    strategy = following() if ours else "ddp"
    trainer(strategy, 2, callbacks=[pruning], max_epochs=3).fit(model, data(4, rank))
    kept = [int(model.net[layer].weight_mask.sum()) for layer in LAYERS]
    if not ours:
        return effective(model), kept
    gradients = [each.payload_bytes for each in strategy.ledger.records if each.purpose == "gradients"]
    flags = [(each.step, each.payload_bytes) for each in strategy.ledger.records if each.purpose == "mask flags"]
    return effective(model), kept, strategy.dense_steps, min(gradients) < max(gradients), flags


def test_lightnings_pruning_at_the_end_of_epochs_gives_what_it_gives_under_plain_ddp_bit_for_bit():
    plain = launch(_by_lightning, False, world_size=2)
    for (expected, kept), (got, own_kept, dense_steps, smaller, flags) in zip(
        plain, launch(_by_lightning, True, world_size=2), strict=True
    ):
        assert own_kept == kept
        assert sum(kept) < 216 * 0.5  # pruned three times
        assert all((a == b).all() for a, b in zip(expected, got, strict=True))
        assert dense_steps == 2  # what the last epoch's end prunes, no step follows
        assert smaller
        assert flags == [(step, 2) for step in range(12)]


class Change(Callback):
    """Changes the mask of the middle layer after a step."""

    def __init__(self, at, change):
        self.at, self.change, self.dense = at, change, []

    def on_train_batch_end(self, runner, module, *args):
        self.dense.append(runner.strategy.dense_steps)
        if runner.global_step == self.at:
            self.change(module.net[2])


def _grown(rank):
    model = pruned_by_torch(amount=0.5)
    pruned = model.net[2].weight_mask == 0

    def grow(layer):
        layer.weight_mask = torch.ones_like(layer.weight_mask)

    change = Change(3, grow)
    trainer(following(), 2, callbacks=[change]).fit(model, data(8, rank))
    return change.dense, int((model.net[2].weight_orig.detach()[pruned] != 0).sum()), effective(model)


def test_masks_that_grow_on_all_ranks_let_weights_come_back_after_one_dense_step():
    answers = launch(_grown, world_size=2)
    for dense, revived, _ in answers:
        assert dense == [0, 0, 0, 0, 1, 1, 1, 1]  # changed after step 3, seen in the 4th, dense in the 5th
        assert revived == 72
    assert all((a == b).all() for a, b in zip(answers[0][2], answers[1][2], strict=True))


def _changed_alone(rank, who):
    model = pruned_by_torch(amount=0.5)
    names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # or rank 0's would heal it

    def flip(layer):
        if rank == who:
            layer.weight_mask[0, :] = 1 - layer.weight_mask[0, :]

    runner = trainer(following(), 2, callbacks=[Change(3, flip)])
    with pytest.raises(RuntimeError) as caught:
        runner.fit(model, data(8, rank))
    return str(caught.value), runner.global_step


@pytest.mark.parametrize("who", [0, 1])
def test_a_mask_changed_on_one_rank_alone_is_an_error_on_all(who):
    for said, step in launch(_changed_alone, who, world_size=2):
        assert "rank 1 has others than rank 0" in said
        assert step == 4


def _resumed(rank, folder, grows, places):
    def change(layer):
        mask = layer.weight_mask.clone()
        mask[:6] = 1.0 if grows else 0.0
        layer.weight_mask = mask

    def run(*callbacks, **kwargs):
        model = pruned_by_torch(amount=0.5)
        trainer(following(), 2, callbacks=[Change(3, change), *callbacks]).fit(model, data(8, rank), **kwargs)
        return effective(model)

    whole = run(SaveAlways(folder))
    same = []
    for step in places:
        resumed = run(ckpt_path=f"{folder}/at{step}.ckpt")
        same.append(all((a == b).all() for a, b in zip(whole, resumed, strict=True)))
    return same


PLACES = (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("grows", "places"),
    [
        pytest.param(True, (3, 4, 5), id="grows, stopped right after it, once it is seen and after the dense step"),
        pytest.param(True, PLACES, id="grows", marks=pytest.mark.exhaustive),
        pytest.param(False, (3, 4), id="shrinks, stopped right after it and once it is seen"),
        pytest.param(False, PLACES, id="shrinks", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_stopped_around_a_change_goes_on_bit_for_bit(tmp_path, grows, places):
    assert launch(_resumed, str(tmp_path), grows, places, world_size=2) == [[True] * len(places)] * 2


class Leaks(Stepwise):
    """Has gradients outside its masks, on rank 1 at one step."""

    def loss(self, batch):
        leak = self.net[2].weight_orig.sum() * float(self.global_rank == 1 and self.global_step == 2)
        return super().loss(batch) + leak


def _leaking(rank):
    model = Leaks()
    for layer in LAYERS:
        prune.l1_unstructured(model.net[layer], "weight", amount=0.5)
    change = Change(99, None)
    trainer(following(), 2, callbacks=[change]).fit(model, data(6, rank))
    return change.dense


def test_gradients_outside_the_mask_on_one_rank_make_the_next_step_dense_on_all():
    assert launch(_leaking, world_size=2) == [[0, 0, 0, 1, 1, 1]] * 2


def _without_masks(rank):
    model = pruned_by_torch(amount=0.5)
    model.register_buffer("other", torch.zeros(1))  # DDP of torch 2.15 fails where all buffers are gone

    def remove(layer):
        for each in LAYERS:
            prune.remove(model.net[each], "weight")

    runner = trainer(following(), 2, callbacks=[Change(3, remove)])
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the test reads all of it)
        runner.fit(model, data(8, rank))
    return str(caught.value)


def test_masks_that_are_taken_away_are_an_error_on_all():
    assert all("this one has none" in said for said in launch(_without_masks, world_size=2))


def _unwatched(rank):
    strategy = masked()
    trainer(strategy, 2).fit(Stepwise(), data(4, rank))
    return strategy.ledger.messages("mask flags"), strategy.dense_steps


def test_where_the_strategy_prunes_by_itself_nothing_more_is_sent():
    assert launch(_unwatched, world_size=2) == [(0, 0)] * 2


class Regrow(Callback):
    """Lets the mask of the middle layer grow where the dense gradient is, after the fourth step."""

    def __init__(self):
        self.whole, self.state = [], []

    def on_before_optimizer_step(self, runner, module, optimizer):
        weight = module.net[2].weight
        self.pruned = (weight == 0).detach()
        self.whole.append(bool(weight.grad[self.pruned].any()))

    def on_train_batch_end(self, runner, module, *args):
        weight = module.net[2].weight
        state = runner.optimizers[0].state[weight]["exp_avg"]
        self.state.append(int((state[self.pruned] != 0).sum()) + int((weight[self.pruned] != 0).sum()))
        if runner.global_step == 3:
            runner.strategy.request_dense(1)
        if runner.global_step == 4:
            runner.strategy.install_masks({"net.2.weight": torch.ones(12, 12, dtype=torch.bool)})


def _regrown(rank):
    model, callback = Stepwise(), Regrow()
    compression = SparseMask(MagnitudePruning(0.5, skip=("net.0.*", "net.4.*")))
    strategy = CompressedDDPStrategy(compression, timeout=timedelta(seconds=20), bucket_cap_mb=0.0003)
    trainer(strategy, 2, callbacks=[callback]).fit(model, data(6, rank))
    return callback.whole, callback.state[:4], zeros(model), strategy.dense_steps, weights(model)


def test_masks_handed_in_after_a_dense_step_let_weights_come_back():
    answers = launch(_regrown, world_size=2)
    for whole, state, count, dense_steps, _ in answers:
        assert whole[:4] == [False, False, False, True]
        assert state == [0] * 4  # also after the dense step, whose gradients the optimizer has seen
        assert count == 0
        assert dense_steps == 0
    assert all((a == b).all() for a, b in zip(answers[0][4], answers[1][4], strict=True))


def _bad_masks(rank, kind):
    def masks():
        if kind == "unlike":
            mask = torch.ones(12, 12, dtype=torch.bool)
            mask[0, rank] = False
            return {"net.2.weight": mask}
        return {"net.2.weight" if rank == 0 else "net.2.wieght": torch.ones(12, 12, dtype=torch.bool)}

    class Install(Callback):
        def on_train_batch_end(self, runner, *args):
            runner.strategy.install_masks(masks())

    with pytest.raises((RuntimeError, ValueError)) as caught:
        trainer(masked(), 2, callbacks=[Install()]).fit(Stepwise(), data(4, rank))
    return str(caught.value)


def test_masks_handed_in_that_differ_or_do_not_fit_on_one_rank_are_an_error_on_all():
    assert all("rank 1 has others" in said for said in launch(_bad_masks, "unlike", world_size=2))
    first, second = launch(_bad_masks, "misspelt", world_size=2)
    assert "those of rank 1 do not" in first
    assert "Did you mean 'net.2.weight'?" in second


def test_outside_of_a_fit_with_masks_there_is_nothing_to_install():
    for call in (lambda each: each.install_masks({}), lambda each: each.request_dense(1)):
        with pytest.raises(
            RuntimeError, match=r"for a fit with a SparseMask.*Cast\(dtype='bf16'\).*on_train_batch_end"
        ):
            call(CompressedDDPStrategy("bf16"))
