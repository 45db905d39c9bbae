"""What is changed between steps and does not reach the stages' owners is refused by name, before anything is lost."""

import traceback
from collections import defaultdict

import pytest
import torch
from lightning.pytorch import Callback
from support.cyclic import cyclic, deep, fit, momentum, reference, state
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:CyclicStrategy. one process only")


class At(Callback):
    """Calls a function of the module at one of Lightning's moments, after a number of steps or always."""

    def __init__(self, moment, change, *, step=None):
        def call(runner, module, *args):
            if runner.global_step == step or (step is None and not runner.sanity_checking):
                with torch.no_grad():
                    change(module)

        setattr(self, moment, call)


def clamp(module):
    for parameter in module.net[4].parameters():
        parameter.clamp_(-0.1, 0.1)


def clamp_data(module):
    module.net[4].weight.data.clamp_(-0.1, 0.1)  # moves no counter of changes


def replace_data(module):
    module.net[4].weight.data = module.net[4].weight.data * 0.5


def load(module):
    module.load_state_dict({name: value * 1.1 for name, value in module.state_dict().items()})


class MaxNorm(nn.Linear):
    """Bounds its weight in its forward, as layers with a largest norm do."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


def max_norm():
    net = deep(6)
    net[4] = MaxNorm(7, 7).double()
    return Regression(net, momentum)


def swap_frozen(module):
    module.net[2].requires_grad_(False)
    module.net[4].requires_grad_(True)


def partly_frozen():
    module = Regression(deep(6), momentum)
    module.net[4].requires_grad_(False)
    return module


def two_groups():
    def make(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first, *others[:3]]}, {"params": others[3:]}], 0.1)

    return Regression(deep(6), make)


def move_to_another_group(module):
    first, second = module.trainer.optimizers[0].param_groups
    second["params"].append(first["params"].pop())


def raw(module):
    return module.trainer.optimizers[0]


def load_state(module):
    full = momentum(module.parameters())
    for parameter in module.parameters():
        full.state[parameter] = {"momentum_buffer": torch.ones_like(parameter)}
    raw(module).load_state_dict(full.state_dict())


class Decays(torch.optim.SGD):
    """Has a setting of its own outside of its groups."""

    def __init__(self, parameters):
        self.decay = 0.5
        super().__init__(parameters, 0.05)


def replace_state(module):
    raw(module).state = defaultdict(dict)


def with_decay():
    return Regression(deep(6), Decays)


def set_decay(module):
    raw(module).decay = 0.25


class Twice(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for _ in range(2 if closure is not None else 0):
            with torch.enable_grad():
                closure()
        return super().step()


CHANGES = {
    "clamped after each step": (None, At("on_train_batch_end", clamp), ["net.4.weight", "net.4.bias", "parametriz"]),
    "through data": (None, At("on_train_batch_end", clamp_data), ["net.4.weight"]),
    "in the last step": (None, At("on_train_batch_end", clamp, step=6), ["net.4.weight"]),
    "once, before a batch": (None, At("on_train_batch_start", replace_data, step=3), ["net.4.weight"]),
    "before an epoch": (None, At("on_train_epoch_start", clamp, step=3), ["net.4.weight"]),
    "after an epoch": (None, At("on_train_epoch_end", clamp, step=3), ["net.4.weight"]),
    "after a validation": (None, At("on_validation_end", clamp, step=3), ["net.4.weight"]),
    "loaded": (None, At("on_train_batch_end", load, step=2), ["12 parameter(s)", "net.0.weight", "net.6.bias"]),
    "in a forward": (max_norm, None, ["net.4.weight"]),
    "others frozen": (partly_frozen, At("on_train_batch_start", swap_frozen, step=2), ["other parameters", "step 2"]),
    "another group": (two_groups, At("on_train_batch_start", move_to_another_group, step=2), ["or in other groups"]),
    "state loaded": (None, At("on_train_batch_end", load_state, step=2), ["`state`", "SGD", "another `fit`"]),
    "state cleared": (None, At("on_train_batch_end", lambda m: raw(m).state.clear(), step=2), ["`state`", "SGD"]),
    "state replaced": (None, At("on_train_batch_end", replace_state), ["`state`"]),
    "number set": (with_decay, At("on_train_batch_end", set_decay, step=3), ["`decay`", "Decays"]),
    "two evaluations": (lambda: Regression(deep(6), lambda p: Twice(p, 0.1)), None, ["Twice", "more than once"]),
}


def _errors(rank):
    found = {}
    for name, (make, callback, _) in CHANGES.items():
        module = make() if make else Regression(deep(6), momentum)
        runner = trainer(
            cyclic(), 1, callbacks=[callback] if callback else [], max_epochs=2, limit_val_batches=1,
            num_sanity_val_steps=0, check_val_every_n_epoch=1 if "validation" in name else 9,
        )  # fmt: skip
        try:
            runner.fit(module, loader(3, rank), loader(1, 90))
            found[name] = "nothing", runner.global_step
        except RuntimeError:
            found[name] = traceback.format_exc(), runner.global_step
    return found


def test_each_change_ends_the_run_with_an_error_that_names_it():
    (found,) = launch(_errors, world_size=1)
    for name, (_, _, words) in CHANGES.items():
        missing = [word for word in ["CyclicStrategy", *words] if word not in found[name][0]]
        assert missing == [], f"{name}: {missing} not in {found[name]}"
    assert found["once, before a batch"][1] <= 5, "soon: a step after the version in place at most"


def _clamped(rank):
    callback = At("on_train_batch_end", clamp, step=3)
    trainer(cyclic(), 2, callbacks=[callback]).fit(Regression(deep(6), momentum), loader(8, rank))


def test_each_rank_says_so_itself():
    for _, error in outcomes(_clamped, world_size=2, timeout_s=40):
        assert error is not None
        assert "net.4.weight, net.4.bias" in error


class SwapForValidation(Callback):
    """Evaluates other weights, and puts the others back."""

    def on_validation_start(self, runner, module):
        self.kept = [parameter.detach().clone() for parameter in module.parameters()]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()

    def on_validation_end(self, runner, module):
        with torch.no_grad():
            for parameter, kept in zip(module.parameters(), self.kept, strict=True):
                parameter.copy_(kept)


class Adapted(nn.Module):
    """A frozen weight with an adapter, which can be merged into it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.base = nn.Linear(5, 7).double().requires_grad_(False)
        self.down = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
        self.merged = False

    def merge(self, sign):
        with torch.no_grad():
            self.base.weight.add_(self.up @ self.down, alpha=sign)
        self.merged = sign > 0

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + x @ self.down.T @ self.up.T


class Merging(Regression):
    """Merges while it evaluates, as adapters for language models do."""

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.net[0].merge(1)

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.net[0].merge(-1)


def _merged(rank):
    adapted = Adapted()
    before = adapted.base.weight.clone()
    net = nn.Sequential(adapted, nn.Tanh(), nn.Linear(7, 7).double(), nn.Tanh(), nn.Linear(7, 1).double())
    module = Merging(net, lambda parameters: momentum([each for each in parameters if each.requires_grad]))
    fit(rank, 2, module, 6, val_check_interval=3, limit_val_batches=1, num_sanity_val_steps=0)
    return float((adapted.base.weight - before).abs().max()), float((adapted.up @ adapted.down).abs().max())


def test_a_module_that_merges_weights_while_it_evaluates_merges_and_unmerges_the_same():
    for gap, merged in launch(_merged, world_size=2):
        assert gap < 1e-12
        assert merged > 0.1


class Counted(torch.optim.SGD):
    """Counts in its groups and on itself, and divides its rate by the count; that works stage by stage."""

    def __init__(self, parameters):
        self.calls = 0
        super().__init__([{"params": list(parameters), "steps": 0, "product": 1.0}], 0.1)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.calls += 1
        for group in self.param_groups:
            group["steps"] += 1
            group["product"] *= 0.9
            group["lr"] = 0.1 * group["product"] / group["steps"]
        super().step()
        return loss


def _allowed(rank, world_size):
    """What may be changed: nothing in the end, within bounds, settings, and weights before the first step."""
    module = Regression(deep(6), Counted)
    callbacks = [
        SwapForValidation(),
        At("on_train_batch_end", lambda m: [p.clamp_(-9, 9) for p in m.parameters()]),
        At("on_train_start", lambda m: m.net[0].weight.fill_(0.1)),
    ]
    strategy, _ = fit(
        rank, world_size, module, 6, callbacks=callbacks, val_check_interval=3, limit_val_batches=1,
        num_sanity_val_steps=0,
    )  # fmt: skip
    return state(module), strategy.stage_names


def test_what_is_put_back_stays_within_bounds_or_counts_is_as_in_the_sequential_reference():
    answers = launch(_allowed, 2, world_size=2)
    expected = Regression(deep(6), Counted)
    with torch.no_grad():
        expected.net[0].weight.fill_(0.1)
    reference(expected, 2, 6, answers[0][1], flush_after=[3, 6])
    for weights, _ in answers:
        assert all((a == b).all() for a, b in zip(weights, state(expected), strict=True))
