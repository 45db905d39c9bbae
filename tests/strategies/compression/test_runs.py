"""Compressed DDP under Lightning: equal ranks, exact resumes, counted bytes, and errors before training starts."""

import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Regression, Stop, loader, own_file, sample, sums_of, trainer, weights
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_comm import Cast, CommProfiler, CompressedDDPStrategy, Int8, NoSync, PowerSGD, Ternary, TopK

METHODS = [Cast("bf16"), Cast("fp16"), Int8(), TopK(0.2), Ternary(), PowerSGD(1)]
NAMES = {
    "ddp_bf16": Cast("bf16"),
    "ddp_fp16": Cast("fp16"),
    "ddp_int8": Int8(),
    "ddp_powersgd": PowerSGD(2),
    "ddp_topk": TopK(0.01),
}
BYTES = 4 * (5 * 12 + 12 + 12 * 12 + 12 + 12 + 1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1))


def module():
    return Regression(network(), lambda parameters: torch.optim.AdamW(parameters, lr=0.01))


def compressed(compression, **kwargs):
    return CompressedDDPStrategy(compression, timeout=timedelta(seconds=40), bucket_cap_mb=0.0003, **kwargs)


def data(steps, rank):
    return loader(steps, rank, dtype=torch.float32)


def _fit(rank, compression, kwargs):
    strategy = compressed(compression)
    model = module()
    runner = trainer(strategy, 2, **kwargs)
    runner.fit(model, data(12, rank), data(2, rank))
    ledger = strategy.ledger
    gradients = ledger.payload_bytes("gradients"), ledger.messages("gradients")
    return weights(model), model.losses, *gradients, runner.global_step


SETTINGS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


GRID = [(compression, setting) for setting in SETTINGS for compression in METHODS]
# each method by itself, and each setting with the one that the list of all strategies has not; of the casts, one
CHOSEN_METHODS = [each for each in METHODS if each != Cast("fp16")]
CHOSEN = [(compression, "plain") for compression in CHOSEN_METHODS]
CHOSEN += [(Ternary(), setting) for setting in SETTINGS if setting != "plain"]


def _loss(net):
    """On what both ranks train on."""
    x, y = zip(*(sample(rank, index, torch.float32) for rank in range(2) for index in range(12 * 4)), strict=True)
    with torch.no_grad():
        return float(nn.functional.mse_loss(net(torch.stack(x)), torch.stack(y)))


@pytest.mark.parametrize(
    ("compression", "setting"),
    [pytest.param(*case, marks=[] if case in CHOSEN else [pytest.mark.exhaustive]) for case in GRID],
    ids=lambda each: each if isinstance(each, str) else repr(each),
)
def test_ranks_end_with_equal_weights_and_have_learnt(runs, compression, setting):
    one, other = runs[repr(compression), setting]
    assert all((a == b).all() for a, b in zip(one[0], other[0], strict=True))
    assert one[2] > 0
    assert one[4] == 12 // SETTINGS[setting].get("accumulate_grad_batches", 1)
    trained = network()
    for parameter, value in zip(trained.parameters(), one[0], strict=True):
        parameter.data = torch.from_numpy(value)
    assert _loss(trained) < 0.99 * _loss(network())


def _plain(rank):
    model = module()
    trainer("ddp", 2).fit(model, data(12, rank))
    return weights(model)


def test_half_the_bytes_in_bf16_and_nearly_the_weights_of_plain_ddp(runs):
    for expected, (got, _, payload_bytes, messages, _) in zip(
        runs["ddp"], runs[repr(Cast("bf16")), "plain"], strict=True
    ):
        assert payload_bytes == 12 * BYTES // 2
        assert messages > 12  # several buckets
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(torch.from_numpy(b), torch.from_numpy(a), rtol=0, atol=0.02)


class Stepwise(Regression):
    """Trains on data given by the step, whatever the loader yields: Lightning begins it again after a resume."""

    def __init__(self):
        super().__init__(network(), lambda parameters: torch.optim.AdamW(parameters, lr=0.01))

    def loss(self, batch):
        generator = torch.Generator().manual_seed(1000 * self.global_rank + self.global_step)
        x = torch.randn(4, 5, generator=generator)
        return nn.functional.mse_loss(self.net(x), x[:, :1] - x[:, 1:2] * x[:, 2:3])


def _go_on(rank, compression, path, said=None):
    """Resume from the checkpoint of another case, with a warning on rank 0 if there is one to come."""
    model, runner = Stepwise(), trainer(compressed(compression), 2)
    with pytest.warns(UserWarning, match=said) if said and rank == 0 else nullcontext():
        runner.fit(model, data(10, rank), ckpt_path=path)
    return weights(model), runner.global_step, sums_of(runner.strategy.ledger)


def _resumed(rank, compression, path):
    whole, unstopped = Stepwise(), trainer(compressed(compression), 2, callbacks=[Stop(5, path, goes_on=True)])
    unstopped.fit(whole, data(10, rank))
    return (weights(whole), sums_of(unstopped.strategy.ledger)), _go_on(rank, compression, path)


@pytest.mark.parametrize(
    "compression",
    [pytest.param(each, marks=[] if each in CHOSEN_METHODS else [pytest.mark.exhaustive]) for each in METHODS],
    ids=repr,
)
def test_a_resumed_run_ends_bit_for_bit_as_the_one_that_was_never_stopped(runs, compression):
    for (whole, expected), (resumed, steps, sums) in runs["resumed", repr(compression)]:
        assert steps == 10
        assert sums == expected
        assert sums["gradients"][0] > 0
        assert all((a == b).all() for a, b in zip(whole, resumed, strict=True))


def test_what_another_method_kept_is_not_taken_up_and_that_is_said(runs):
    for resumed, steps, _ in runs["from another method"]:
        assert steps == 10
        assert all(torch.isfinite(torch.from_numpy(each)).all() for each in resumed)


def _from_plain_ddp(rank, path):
    trainer("ddp", 2, callbacks=[Stop(5, path)]).fit(Stepwise(), data(10, rank))
    runner = trainer(compressed(Cast("bf16")), 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(Stepwise(), data(10, rank), ckpt_path=path)
    return runner.global_step, [str(each.message) for each in caught if "CompressedDDP" in str(each.message)]


def test_a_method_that_keeps_nothing_goes_on_from_plain_ddp_without_a_word(runs):
    assert runs["from plain ddp"] == [(10, [])] * 2


def _damage(rank, path):
    """Leave nothing to read to rank 1, in a checkpoint that no case needs any more."""
    if rank == 1:
        own_file(path, 1).write_bytes(b"no checkpoint")


def test_a_file_that_is_damaged_on_one_rank_leaves_no_other_waiting(runs):
    assert [steps for _, steps, _ in runs["from a damaged file"]] == [10, 10]


def _through_a_link(rank, folder):
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_last="link")
    runner = trainer(compressed(Int8()), 2, callbacks=[save], enable_checkpointing=True, max_steps=6)
    runner.fit(Stepwise(), data(10, rank))
    torch.distributed.barrier()
    model = Stepwise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(compressed(Int8()), 2).fit(model, data(10, rank), ckpt_path=Path(folder) / "last.ckpt")
    said = [str(each.message) for each in caught if "cannot bring back" in str(each.message)]
    return weights(model), said


def test_what_a_method_kept_is_found_through_a_link_to_the_checkpoint(runs):
    ways = zip(runs["resumed", repr(Int8())], runs["through a link"], strict=True)
    for ((whole, _), _), (resumed, said) in ways:
        assert said == []
        assert all((a == b).all() for a, b in zip(whole, resumed, strict=True))


def _kept_files(rank, folder):
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=1, monitor="step", mode="max")
    runner = trainer(compressed(Int8()), 2, callbacks=[checkpoints], enable_checkpointing=True)
    runner.fit(module(), data(12, rank))


def test_the_ranks_folder_goes_with_its_checkpoint(tmp_path):
    launch(_kept_files, str(tmp_path), world_size=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert names[1] == names[0] + ".ranks"
    assert sorted(path.name for path in own_file(tmp_path / names[0], 0).parent.iterdir()) == ["rank0.pt", "rank1.pt"]


class Bad(Regression):
    """Has a loss that is not a number, on one rank, once."""

    def loss(self, batch):
        loss = super().loss(batch)
        return loss * torch.nan if self.global_rank == 1 and self.global_step == 2 else loss


def _bad(rank):
    strategy = compressed(Cast("bf16"))
    with pytest.warns(UserWarning, match="optimizer step 2 is not") if rank == 0 else nullcontext():
        trainer(strategy, 2, max_steps=4).fit(Bad(network()), data(6, rank))
    return strategy.non_finite_steps


def test_a_gradient_that_is_not_finite_is_reported_and_counted_alike(runs):
    assert runs["bad"] == [2, 2]  # the step itself, and the one after it, with weights that are NaN


def _apart(rank):
    model = module()
    with pytest.warns(UserWarning, match="every rank trains a model of its own") if rank == 0 else nullcontext():
        trainer(compressed(NoSync()), 2).fit(model, data(4, rank))
    return weights(model)


def test_without_synchronisation_ranks_drift_apart_and_it_says_so(runs):
    one, other = runs["apart"]
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def _profiled(rank, folder):
    strategy = compressed(Int8())
    profiler = CommProfiler(folder, warmup_steps=0, page=False)
    trainer(strategy, 2, callbacks=[profiler]).fit(module(), data(8, rank))
    return (
        profiler.figures.total_wire_bytes["gradients"],
        strategy.ledger.wire_bytes("gradients"),
        profiler.figures.untimed_steps,
    )


def test_the_profiler_counts_what_the_ledger_counts(runs):
    for measured, ledger, untimed in runs["profiled"]:
        assert measured == ledger
        assert untimed == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("suffix", "method"), [("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")])
def test_a_name_gives_its_method_and_start_method(name, suffix, method):
    assert name + suffix in StrategyRegistry
    strategy = Trainer(strategy=name + suffix, accelerator="cpu", devices=2, logger=False).strategy
    assert isinstance(strategy, CompressedDDPStrategy)
    assert strategy.compression == NAMES[name]
    assert strategy._start_method == method


def _static(rank):
    runner = trainer(compressed(Cast("bf16"), static_graph=True), 2, accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException) as caught:
        runner.fit(module(), data(4, rank))
    return str(caught.value)


def test_a_static_graph_with_accumulation_is_refused(runs):
    for said in runs["static"]:
        assert "static_graph" in said
        assert "accumulate_grad_batches`=2" in said


class Wrapped(Regression):
    """Holds a part that is wrapped already, or sharded."""

    def __init__(self, kind):
        super().__init__(network())
        self.kind = kind

    def configure_model(self):
        if self.kind == "wrapped":
            self.extra = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        elif not isinstance(self.net[0].weight, DTensor):
            mesh = init_device_mesh("cpu", (2,))
            self.net[0].weight = nn.Parameter(distribute_tensor(self.net[0].weight.detach(), mesh, [Shard(0)]))


def _not_whole(rank, kind):
    with pytest.raises(MisconfigurationException) as caught:
        trainer(compressed(Cast("bf16")), 2).fit(Wrapped(kind), data(4, rank))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("wrapped", ("'extra'", "DistributedDataParallel", "plain module")),
        ("sharded", ("'net.0.weight'", "FSDPStrategy")),
    ],
)
def test_models_that_are_not_whole_and_plain_are_refused_before_training(runs, kind, parts):
    for said in runs[kind]:
        assert [part for part in ("CompressedDDPStrategy", *parts) if part not in said] == []


class SecondHook(Callback):
    def on_train_start(self, runner, pl_module):
        runner.strategy.model.register_comm_hook(None, default_hooks.bf16_compress_hook)


def _second_hook(rank):
    with pytest.raises(RuntimeError) as caught:
        trainer(compressed(Cast("bf16")), 2, callbacks=[SecondHook()]).fit(module(), data(4, rank))
    return str(caught.value)


def test_a_second_hook_is_refused_by_torch_before_training(runs):
    for said in runs["second hook"]:
        assert "can only be called once" in said


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    def path(name):
        return str(tmp_path_factory.mktemp(name) / "a.ckpt")

    everything = request.config.getoption("exhaustive")
    grid, methods = (GRID, METHODS) if everything else (CHOSEN, CHOSEN_METHODS)
    fits = {(repr(each), setting): (_fit, each, SETTINGS[setting]) for each, setting in grid}
    paths = {each: path("resumed") for each in methods}
    resumed = {("resumed", repr(each)): (_resumed, each, paths[each]) for each in methods}
    return SharedRanks(
        {
            **fits,
            **resumed,
            "ddp": (_plain,),
            "from another method": (_go_on, TopK(0.2), paths[Int8()], "cannot bring back"),
            "damaging": (_damage, paths[Int8()]),
            "from a damaged file": (_go_on, Int8(), paths[Int8()], r"rank1\.pt cannot be read"),
            "from plain ddp": (_from_plain_ddp, path("ddp")),
            "through a link": (_through_a_link, str(tmp_path_factory.mktemp("link"))),
            "bad": (_bad,),
            "apart": (_apart,),
            "profiled": (_profiled, str(tmp_path_factory.mktemp("profile"))),
            "static": (_static,),
            "wrapped": (_not_whole, "wrapped"),
            "sharded": (_not_whole, "sharded"),
            "second hook": (_second_hook,),
        },
        world_size=2,
    )


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: CompressedDDPStrategy("bf61"), ("CompressedDDPStrategy", "'bf61'", "'bf16'")),
        (lambda: CompressedDDPStrategy(Cast("bf16"), bucket_cap_mb=0), ("`bucket_cap_mb`", "got 0", "default")),
        (
            lambda: CompressedDDPStrategy("bf16", ddp_comm_hook=default_hooks.bf16_compress_hook),
            ("`ddp_comm_hook`", "bf16_compress_hook", "one hook", "`compression`", "DDPStrategy"),
        ),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(make, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the line below reads all of it)
        make()
    assert [part for part in parts if part not in str(caught.value)] == []
