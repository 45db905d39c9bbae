"""Weights after a fit equal those of the sequential reference bit for bit, whatever ranks do to each other's timing."""

import copy
import functools
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.cyclic import Unsteady, adamw, deep, fit, momentum, reference, state
from support.processes import launch
from support.training import Regression, loader, trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_comm.core.cyclic.send_window import SendWindow
from lightning_comm.strategies.cyclic import cut_model
from lightning_comm.transport.cyclic import send_queue

STEPS = 6
GRID = [(n, k * n, rule) for n in (2, 3, 4) for k in (1, 2, 3) for rule in ("v1", "v2")]
GRID += [(6, 6, "v1"), (6, 6, "v2"), (6, 12, "v2")]
# each number of ranks, stages a rank, and rule; the rest of the grid is left to exhaustive runs
OFTEN = [(2, 2, "v1"), (2, 4, "v2"), (3, 3, "v2"), (3, 9, "v1"), (4, 8, "v1")]


def compared(rank, world_size, make, settings=None, simulated=None, options=None, dtype=torch.float64, steps=STEPS):
    """Fit; on rank 0 return what the reference holds, too."""
    module = make()
    strategy, runner = fit(rank, world_size, module, steps, settings, dtype, **options or {})
    assert runner.global_step == steps
    if rank > 0:
        return state(module), None, strategy
    other = make()
    for part in other.modules():
        if isinstance(part, Unsteady):
            part.longest_s = 0.0  # nobody waits for the reference
    rules = {key: value for key, value in (settings or {}).items() if key not in ("stages", "stagger")}
    reference(other, world_size, steps, strategy.stage_names, dtype=dtype, **rules, **simulated or {})
    return state(module), state(other), strategy


def assert_equal(answers, what=""):
    expected = answers[0][1]
    for rank, (ours, _) in enumerate(answers):
        for k, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"{what}: rank {rank}, tensor {k}")


def _cases(rank, world_size, cases):
    return [compared(rank, world_size, *case)[:2] for case in cases]


def run_cases(world_size, cases):
    """Fit one case after the other in the same processes."""
    answers = launch(_cases, world_size, list(cases.values()), world_size=world_size, timeout_s=120)
    for k, name in enumerate(cases):
        assert_equal([answer[k] for answer in answers], name)


@pytest.mark.parametrize(
    ("world_size", "grid"),
    [*((n, OFTEN) for n in (2, 3, 4)), *(pytest.param(n, GRID, marks=pytest.mark.exhaustive) for n in (2, 3, 4, 6))],
    ids=[*"234", *(f"{n}, the whole grid" for n in (2, 3, 4, 6))],
)
def test_rules_stages_and_optimizers_agree_with_the_reference(world_size, grid):
    cases = {}
    for k, (n, stages, rule) in enumerate(each for each in grid if each[0] == world_size):
        make = functools.partial(Regression, deep(stages + k % 2), (momentum, adamw)[(k + k // 2) % 2])
        cases[f"{n} {stages} {rule}"] = (_fresh(make), {"rule": rule, "stages": stages})
    if world_size == 3 or grid is GRID:
        cases["lag"] = (_fresh(functools.partial(Regression, deep(world_size), adamw)), {"lag": 1})
    run_cases(world_size, cases)


def _fresh(make):
    """Each module with a net of its own, though they are made from one."""
    return lambda: Regression(copy.deepcopy(make.args[0]), *make.args[1:])


def grouped(parameters):
    parameters = list(parameters)
    groups = [{"params": parameters[:5], "lr": 0.02}, {"params": parameters[5:], "weight_decay": 0.3}]
    return torch.optim.AdamW(groups, 0.01)


def trained_only(parameters):
    return momentum([each for each in parameters if each.requires_grad])


def frozen():
    net = deep(8)
    net[2].requires_grad_(False)
    net[6].bias.requires_grad_(False)
    return Regression(net, trained_only)


def tied():
    net = deep(8)
    net[10].weight = net[4].weight
    return Regression(net, momentum)


class Twice(nn.Module):
    """The second of its modules runs twice, the first time in front of the others."""

    def __init__(self):
        super().__init__()
        self.net = deep(8)

    def forward(self, x):
        middle = self.net[2]
        x = torch.tanh(middle(torch.tanh(self.net[0](x))))
        return self.net[4:](torch.tanh(middle(x)))


class Attention(nn.Module):
    """The projection of the attention has parameters and is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attend = nn.Linear(5, 8), nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
        self.double()

    def forward(self, x):
        tokens = self.first(x).view(-1, 2, 4)
        return self.last(self.attend(tokens, tokens, tokens, need_weights=False)[0].reshape(-1, 8))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = deep(8)

    def forward(self, x):
        x = checkpoint(self.net[:6], x, use_reentrant=False)
        return self.net[12:](checkpoint(self.net[6:12], x, use_reentrant=False))


class Together(nn.Module):
    """What is odd about the models of this file, in one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Linear(5, 8), nn.Linear(8, 8)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.kept = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.frozen, self.tied, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.frozen.requires_grad_(False)
        self.kept[0].bias.requires_grad_(False)
        self.tied.weight = self.kept[2].weight
        self.double()

    def forward(self, x):
        tokens = self.twice(torch.tanh(self.first(x))).view(-1, 2, 4)
        x = self.attend(tokens, tokens, tokens, need_weights=False)[0].reshape(-1, 8)
        x = checkpoint(self.kept, torch.tanh(self.twice(x)), use_reentrant=False)
        return self.last(torch.tanh(self.tied(self.frozen(x))))


class Counting(torch.optim.SGD):
    """Counts its steps in a group, as timm's Lamb does, and takes ever smaller ones."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.05)
        self.param_groups[0]["count"] = 0

    def step(self, closure=None):
        loss = None if closure is None else closure()
        group = self.param_groups[0]
        group["count"] += 1
        for parameter in group["params"]:
            if parameter.grad is not None:
                with torch.no_grad():
                    parameter.sub_(parameter.grad, alpha=group["lr"] / group["count"])
        return loss


def unsteady():
    net = deep(8)
    return Regression(nn.Sequential(*[part for each in net for part in (each, Unsteady())]), adamw)


def scheduled(optimizer=momentum):
    return Regression(deep(8), optimizer, lambda step: 0.7**step)


VALIDATED = {"limit_val_batches": 1, "val_check_interval": 2}
MODELS = {
    "sleeps": (unsteady, {"rule": "v2"}),
    "sleeps, v1": (unsteady, {"rule": "v1"}),
    "flushes": (lambda: Regression(deep(8), momentum), {}, {"flush_after": (2, 4)}, VALIDATED),
    "warm-up": (lambda: Regression(deep(8), adamw), {"warmup_sync_steps": 3, "rule": "v1"}),
    "schedule": (scheduled, {}),
    "groups and schedule": (lambda: scheduled(grouped), {"rule": "v1"}, {"flush_after": (2, 4)}, VALIDATED),
    "accumulation": (lambda: scheduled(adamw), {}, {"accumulate": 2}, {"accumulate_grad_batches": 2}),
    "clip by stage": (lambda: Regression(deep(8), momentum), {"clip_norm": 0.1}),
    "clip by previous": (
        lambda: Regression(deep(8), momentum), {"clip_norm": 0.3, "clip_by": "previous_norm"},
        {"flush_after": (2, 4)}, VALIDATED,
    ),
    "the Trainer's limit by previous": (
        lambda: Regression(deep(8), momentum), {"clip_by": "previous_norm"}, {"clip_norm": 0.3},
        {"gradient_clip_val": 0.3},
    ),
    "the Trainer's limit by value": (
        lambda: Regression(deep(8), momentum), {"rule": "v1"}, {"clip_value": 0.02},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ),
    "batch norm": (lambda: Regression(deep(8, norm=True), momentum), {}, {"flush_after": (2, 4)}, VALIDATED),
    "counter in a group": (lambda: Regression(deep(8), Counting), {}),
    "frozen": (frozen, {}),
    "tied": (tied, {}),
    "twice": (lambda: Regression(Twice(), momentum), {}),
    "attention": (lambda: Regression(Attention(), adamw), {}),
    "checkpointing": (lambda: Regression(Checkpointed(), momentum), {"rule": "v1"}),
    "frozen, tied, twice, attention and checkpointing": (lambda: Regression(Together(), trained_only), {}),
    "warm-up, clip by stage and counter in a group": (
        lambda: Regression(deep(8), Counting), {"warmup_sync_steps": 3, "rule": "v1", "clip_norm": 0.1},
    ),
    "accumulation and the Trainer's limit by value": (
        lambda: scheduled(adamw), {"rule": "v1"}, {"clip_value": 0.02, "accumulate": 2},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ),
}  # fmt: skip


# with three ranks what depends on who is whose neighbour: with two, the one before is the one behind
OF_THREE = (
    *("sleeps", "groups and schedule", "clip by previous"), "frozen, tied, twice, attention and checkpointing"
)  # fmt: skip
# what each of these shows is a part of another case, here or in a test below
MORE_OF_TWO = (
    *OF_THREE,
    *("sleeps, v1", "flushes", "schedule", "frozen", "tied", "twice", "attention", "checkpointing"),
    *("warm-up", "clip by stage", "counter in a group", "accumulation", "the Trainer's limit by value"),
)  # fmt: skip
OF_TWO = tuple(name for name in MODELS if name not in MORE_OF_TWO)
MORE_OF_THREE = ("flushes", "batch norm", "twice", "tied", "accumulation")


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        *((2, OF_TWO), (3, OF_THREE)),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((2, MORE_OF_TWO), (3, MORE_OF_THREE))),
    ],
    ids=["2", "3", "2, more", "3, more"],
)
def test_models_and_settings_agree_with_the_reference(world_size, names):
    run_cases(world_size, {name: MODELS[name] for name in names})


IN_ORDER = {"in_any_order": False}


def _in_order(rank, world_size, cases):
    ring = cut_model.CyclicRing
    with mock.patch.object(cut_model, "CyclicRing", lambda *args, **kwargs: ring(*args, **{**kwargs, **IN_ORDER})):
        return _cases(rank, world_size, cases)


def _one_at_a_time(rank, world_size, cases):
    with mock.patch.object(send_queue, "SendWindow", functools.partial(SendWindow, messages=1, small_bytes=0)):
        return _cases(rank, world_size, cases)


@pytest.mark.parametrize(
    ("way", "world_size", "names"),
    [
        (_in_order, 3, ("sleeps",)),
        (_one_at_a_time, 3, ("sleeps, v1", "clip by previous")),
        *(
            pytest.param(way, n, ("sleeps", "sleeps, v1", "flushes", "clip by previous"), marks=pytest.mark.exhaustive)
            for way, n in ((_in_order, 2), (_in_order, 3), (_one_at_a_time, 3))
        ),
    ],
)
def test_the_way_in_which_messages_are_sent_changes_nothing(way, world_size, names):
    answers = launch(way, world_size, [MODELS[name] for name in names], world_size=world_size, timeout_s=90)
    for k, name in enumerate(names):
        assert_equal([answer[k] for answer in answers], name)


def _mixed(rank, world_size):
    def loss(model, part):
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(part)

    return compared(
        rank, world_size, lambda: Regression(deep(8).float(), momentum), {}, {"loss": loss},
        {"precision": "bf16-mixed"}, torch.float32,
    )[:2]  # fmt: skip


def test_mixed_precision_agrees_with_the_reference():
    assert_equal(launch(_mixed, 2, world_size=2))


CLIPPED = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}


class Later(Callback):
    """Lowers the Trainer's limit in the middle of a run."""

    def on_train_batch_start(self, runner, *args):
        runner.gradient_clip_val = 0.02 if runner.global_step < 3 else 0.005


def _plain(rank, world_size, strategy="ddp", **options):
    module = scheduled(momentum if options else adamw)
    batches = STEPS * options.get("accumulate_grad_batches", 1)
    trainer(strategy, world_size, **options).fit(module, loader(batches, rank))
    return state(module)


def _rule(rank, world_size, settings, **options):
    module = scheduled(momentum if options else adamw)
    fit(rank, world_size, module, STEPS, settings, **options)
    return state(module)


def _clipped_by_value(rank, world_size):
    free = _plain(rank, world_size, accumulate_grad_batches=2)
    pairs = []
    for callbacks in ([], [Later()]):
        ddp = _plain(rank, world_size, callbacks=callbacks, **CLIPPED)
        pairs.append((ddp, _rule(rank, world_size, {"warmup_sync_steps": 99}, callbacks=callbacks, **CLIPPED)))
    return free, pairs


def test_clipping_by_value_is_that_of_ddp():
    for free, pairs in launch(_clipped_by_value, 2, world_size=2):
        assert max(_farthest(ddp, ours) for ddp, ours in pairs) < 1e-12
        assert _farthest(pairs[0][0], free) > 1e-4, "the limit is reached"
        assert _farthest(pairs[0][0], pairs[1][0]) > 1e-4, "and the lower one"


def _farthest(one, other):
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def _beside_plain(rank, world_size, strategy, *settings):
    return _plain(rank, world_size, strategy), *(_rule(rank, world_size, each) for each in settings)


def test_a_warm_up_to_the_end_is_plain_data_parallelism_and_the_rules_are_not():
    settings = {"warmup_sync_steps": 99}, {"rule": "v1"}, {"rule": "v2"}
    plain, warm, v1, v2 = launch(_beside_plain, 2, "ddp", *settings, world_size=2)[0]
    assert _farthest(warm, plain) < 1e-12
    assert min(_farthest(v1, plain), _farthest(v2, plain), _farthest(v1, v2)) > 1e-6


@pytest.mark.filterwarnings("ignore:CyclicStrategy. one process only")
def test_one_rank_is_plain_training_bit_for_bit():
    [(plain, alone)] = launch(_beside_plain, 1, "auto", {}, world_size=1)
    assert _farthest(plain, alone) == 0


def _counted(rank, world_size, stages):
    make = lambda: Regression(deep(stages), adamw)  # noqa: E731
    *_, strategy = compared(rank, world_size, make, {"stages": stages})
    module = make()
    stage_bytes = [sum(module.get_parameter(n).nbytes for n in names) for names in strategy.stage_names]
    sent = sum(strategy.ledger.payload_bytes(purpose) for purpose in ("gradients", "parameters"))
    assert sent == strategy.schedule.sent_bytes(rank, stage_bytes) * STEPS
    # the two moments of each entry, and for each tensor its number of steps
    state_bytes = 2 * sum(stage_bytes) + 4 * len(list(module.parameters()))
    owned = [stage_bytes[stage] for stage in strategy.schedule.owned(rank)]
    return sent, strategy.optimizer_state_bytes, sum(stage_bytes), state_bytes, 2 * sum(owned)


@pytest.mark.parametrize(
    ("world_size", "stages"),
    [(3, 6), *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((2, 2), (4, 12)))],
)
def test_payload_and_optimizer_state_are_shared_exactly(world_size, stages):
    answers = launch(_counted, world_size, stages, world_size=world_size)
    model, whole = answers[0][2:4]
    assert sum(answer[0] for answer in answers) == 2 * (world_size - 1) * model * STEPS
    assert sum(answer[1] for answer in answers) == whole
    assert all(owned < own < owned + 4 * 2 * stages for _, own, _, _, owned in answers)
