"""What cannot work is refused with where, argument, value, rule and way out; what works badly is warned of."""

import traceback
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.cyclic import cyclic, deep, momentum
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer
from torch import nn

from lightning_comm import AdaptivePartition, CyclicStrategy
from lightning_comm.errors import refuse
from lightning_comm.strategies.cyclic import strategy as strategy_file
from lightning_comm.strategies.cyclic.refusals import backend_problems, optimizer_problems
from lightning_comm.strategies.cyclic.settings import WHERE

pytestmark = pytest.mark.filterwarnings("ignore:CyclicStrategy. one process only")


def says(text, words):
    missing = [word for word in ["CyclicStrategy", *words] if word not in text]
    assert missing == [], f"{missing} not in: {text}"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rule": "v3"}, ["`rule`", "'v3'", "'v1', 'v2'"]),
        ({"lag": -1}, ["`lag`", "-1", ">= 0"]),
        ({"lag": True}, ["`lag`", "True"]),
        ({"lag": 1, "rule": "v1"}, ["`lag`=1", "'v1'", "Leave it out"]),
        ({"warmup_sync_steps": 0.5}, ["`warmup_sync_steps`", "0.5", "optimizer steps"]),
        ({"stages": 0}, ["`stages`", "got 0", "multiple of the number of ranks"]),
        ({"stages": True}, ["`stages`", "got True"]),
        ({"stages": []}, ["`stages`", "got []"]),
        ({"stages": ["a", 1]}, ["`stages`", "['a', 1]"]),
        ({"stages": ["a", "b", "a"]}, ["`stages`", "twice", "'b'"]),
        ({"clip_norm": 0}, ["`clip_norm`", "got 0", "None"]),
        ({"clip_norm": float("nan")}, ["`clip_norm`", "nan"]),
        ({"clip_norm": True}, ["`clip_norm`", "True"]),
        ({"clip_by": "norm"}, ["`clip_by`", "'norm'", "'previous_norm'"]),
        ({"stagger": "slot"}, ["`stagger`", "'slot'", "'step'"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, words):
    with pytest.raises(ValueError, match="CyclicStrategy") as caught:
        CyclicStrategy(**kwargs)
    says(str(caught.value), words)


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("ucc", "cuda", ["`process_group_backend`", "'ucc'", "'cuda'", "process_group_backend='gloo'"]),
        ("mpi", "cpu", ["'mpi'", "'cpu'"]),
        (None, "cuda", ["None", "'cuda'", "'nccl'"]),
        ("gloo", "mps", ["'gloo'", "'mps'"]),
    ],
)
def test_a_backend_that_is_not_known_to_carry_the_ring_is_refused(backend, device, words):
    (problem,) = backend_problems(backend, device, 2, {})
    says(f"CyclicStrategy: {problem}", words)
    assert list(backend_problems(backend, device, 1, {})) == []  # nobody to send to


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("gloo", "cuda"), ("nccl", "cuda")])
def test_a_device_with_one_queue_for_all_streams_is_refused_under_nccl_alone(backend, device):
    one = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    problems = list(backend_problems(backend, device, 2, one))
    assert len(problems) == (backend == "nccl")
    for problem in problems:
        says(f"CyclicStrategy: {problem}", ["CUDA_DEVICE_MAX_CONNECTIONS=1", "5", "32"])
    for enough in ({}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}):
        assert list(backend_problems(backend, device, 2, enough)) == []


def test_the_backend_is_looked_at_when_the_run_is_set_up(monkeypatch):
    monkeypatch.setattr(strategy_file, "backend_of", lambda device: "ucc")
    for text in errors(lambda: (Regression(deep(6), momentum), {}, {"callbacks": [Started()]}), 2):
        says(text, ["`process_group_backend`", "'ucc'", "'cpu'"])


class Started(Callback):
    def on_train_batch_start(self, *args):
        pytest.fail("training started")


def errors(make, world_size, steps=6, **kwargs):
    """What each rank says when it fails; `make` gives a module, the strategy's settings and the Trainer's options."""

    def run(rank):
        module, settings, options = make()
        callbacks = [*options.pop("callbacks", []), *kwargs.get("callbacks", [])]
        try:
            trainer(cyclic(**settings), world_size, callbacks=callbacks, **options).fit(module, loader(steps, rank))
        except BaseException:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # whoever refuses has left it
            return traceback.format_exc()

    answers = launch(run, world_size=world_size, timeout_s=40)
    assert None not in answers
    return answers


class With(Regression):
    """A model with one part more, which is or is not used."""

    def __init__(self, part, optimizer=momentum):
        super().__init__(deep(6), optimizer)
        self.part = part


class Thawing(With):
    def __init__(self):
        super().__init__(nn.Linear(2, 2))
        self.backbone = self.part


class SAM(torch.optim.SGD):
    pass


class Around(torch.optim.Optimizer):
    """Wrapped around another optimizer, as Lookahead is."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Estimates(torch.optim.SGD):
    """Keeps an estimate for all parameters in its groups, as Prodigy does."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        gradients = [each.grad for each in self.param_groups[0]["params"] if each.grad is not None]
        if gradients:
            self.param_groups[0]["d"] = max(0.1, *(float(each.abs().max()) for each in gradients))
        super().step()
        return loss


class ByTheWholeNorm(torch.optim.SGD):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
        super().step()
        return loss


class Talks(torch.optim.SGD):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        torch.distributed.barrier()
        super().step()
        return loss


class Switched(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


class NeedsAClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Clips(Regression):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.1, "norm")


class Zero(Regression):
    def configure_optimizers(self):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)


def plain(optimizer=momentum, **options):
    return Regression(deep(6), optimizer), {}, options


def by_value():
    return {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}


def scaler():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: plain(gradient_clip_val=0.5),
            ["gradient_clip_val=0.5", "clip_by='stage'", "own norm", "clip_by='previous_norm'", "one step before"],
        ),
        (
            lambda: (Regression(deep(6)), {"clip_norm": 1.0}, {"gradient_clip_val": 0.5}),
            ["`clip_norm`=1.0", "gradient_clip_val=0.5", "two limits", "Leave one"],
        ),
        (
            lambda: (Regression(deep(6)), {"clip_norm": 1.0}, by_value()),
            ["`clip_norm`=1.0", "gradient_clip_algorithm='value'", "two ways", "Leave one"],
        ),
        (
            lambda: (Regression(deep(6)), {"clip_by": "stage"}, by_value()),
            ["`clip_by`='stage'", "gradient_clip_algorithm='value'", "each entry", "Leave one"],
        ),
        (
            lambda: (With(nn.Linear(2, 2).to(torch.complex64)), {}, by_value()),
            ["complex", "part.weight", "'previous_norm'"],
        ),
        (lambda: plain(gradient_clip_val=float("nan")), ["gradient_clip_val=nan", "> 0"]),
        (lambda: plain(plugins=[scaler()]), ["16-mixed", "gradient scaler", "bf16-mixed"]),
        (lambda: plain(torch.optim.LBFGS), ["LBFGS", "AdamW"]),
        (lambda: plain(lambda p: SAM(p, 0.1)), ["SAM", "whole gradient", "AdamW"]),
        (lambda: (Zero(deep(6)), {}, {}), ["ZeroRedundancyOptimizer", "communicates", "plain optimizer"]),
        (lambda: plain(lambda p: Around(momentum(p))), ["Around", "wrapped around another", "by itself"]),
        (lambda: plain(lambda p: Estimates(p, 0.1)), ["Estimates", "param_groups[0]['d']", "SGD or AdamW"]),
        (lambda: plain(lambda p: ByTheWholeNorm(p, 0.1)), ["ByTheWholeNorm", "gradients of others", "SGD or AdamW"]),
        (lambda: plain(lambda p: Talks(p, 0.1)), ["Talks", "communicates in its `step` (barrier)", "DDPStrategy"]),
        (lambda: plain(lambda p: Switched(p, 0.1)), ["Switched", "`train` and `eval`", "AdamW"]),
        (lambda: plain(lambda p: NeedsAClosure(p, 0.1)), ["NeedsAClosure", "without a closure", "SGD or AdamW"]),
        (
            lambda: (Clips(deep(6)), {}, {}),
            ["Clips.configure_gradient_clipping", "`gradient_clip_val`", "'previous_norm'"],
        ),
        (lambda: plain(lambda p: momentum(nn.Linear(2, 2).parameters())), ["2 parameter(s)", "not in the model"]),
        (
            lambda: plain(lambda p: momentum([each.requires_grad_(False) for each in p])),
            ["no parameter", "requires a gradient", "configure_optimizers"],
        ),
        (lambda: (With(nn.Embedding(3, 2, sparse=True)), {}, {}), ["'part'", "sparse=True", "Leave `sparse` out"]),
        (lambda: (With(nn.SyncBatchNorm(7)), {}, {}), ["'part'", "SyncBatchNorm", "Use BatchNorm"]),
        (lambda: plain(sync_batchnorm=True), ["sync_batchnorm=True", "Leave it out"]),
        (
            lambda: (Thawing(), {}, {"callbacks": [BackboneFinetuning(1)], "max_epochs": 2}),
            ["BackboneFinetuning", "in epoch 1", "another `fit`"],
        ),
        (lambda: plain(callbacks=[AdaptivePartition()]), ["AdaptivePartition", "DDPStrategy"]),
    ],
)
def test_what_cannot_work_is_refused_before_training(make, words):
    (text,) = errors(make, 1, callbacks=[Started()])
    says(text, words)
    assert "training started" not in text


def test_a_callback_of_the_twin_package_is_refused():
    import pytorch_lightning

    (text,) = errors(lambda: plain(callbacks=[pytorch_lightning.callbacks.Timer()]), 1)
    says(text, ["Timer", "pytorch_lightning", "lightning.pytorch"])


def test_two_optimizers_are_refused():
    module = Regression(deep(6))
    optimizers = [momentum(module.net[:4].parameters()), momentum(module.net[4:].parameters())]
    with pytest.raises(MisconfigurationException) as caught:
        refuse(WHERE, optimizer_problems(module, optimizers))
    says(str(caught.value), ["one optimizer", "got 2", "parameter groups", "CompressedDDPStrategy"])


class Unused(With):
    def __init__(self):
        super().__init__(nn.Linear(2, 2))


class Sparse(Regression):
    """A sparse gradient that no module tells of."""

    def __init__(self):
        super().__init__(deep(6))
        self.table = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        rows = nn.functional.embedding(torch.tensor([1]), self.table, sparse=True)
        return super().training_step(batch, batch_idx) + rows.sum()


class Penalty(Regression):
    """Uses parameters in front of the forward that brings their version."""

    def training_step(self, batch, batch_idx):
        penalty = sum(parameter.pow(2).sum() for parameter in self.parameters())
        return super().training_step(batch, batch_idx) + penalty


class Backward(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 2:
            loss.backward(retain_graph=True)
        return loss


def one_graph():
    module, *others = plain()
    for part in module.net:
        part.compile(backend="eager", fullgraph=True)
    return module, *others


class Unfreeze(Callback):
    def on_train_batch_start(self, runner, module, batch, batch_idx):
        module.net[4].requires_grad_(runner.global_step >= 3)


def thawing():
    module, *others = plain(callbacks=[Unfreeze()])
    module.net[4].requires_grad_(False)
    return module, *others


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (Regression(deep(6)), {"stages": 3}, {}), ["`stages`=3", "2 ranks", "multiple of 2"]),
        (lambda: (Regression(deep(6)), {"stages": ["net.0"]}, {}), ["`stages`=['net.0']", "1 stages", "multiple of 2"]),
        (lambda: (Regression(deep(6)), {"stages": 4, "lag": 1}, {}), ["`lag`=1", "`stages`=4"]),
        (lambda: (Regression(deep(6)), {"lag": 3}, {}), ["`lag`", "got 3"]),
        (lambda: (Regression(deep(6)), {"stages": 8}, {}), ["`stages`=8", "6 modules", "net.10", "Leave `stages` out"]),
        (
            lambda: (Regression(nn.Linear(5, 1).double()), {}, {}),
            ["1 module(s)", "2 ranks", "Use fewer ranks"],
        ),
        (lambda: (Regression(deep(6)), {"stages": ["net.0", "net.7"]}, {}), ["'net.7'", "no module", "net.4"]),
        (lambda: (Regression(deep(6)), {"stages": ["net.4", "net.2"]}, {}), ["'net.2'", "in the order", "net.10"]),
        (lambda: (Unused(), {}, {}), ["2 parameter(s)", "step 0", "part.weight", "requires_grad_(False)"]),
        (lambda: (Backward(deep(6)), {}, {}), ["second backward", "one backward a batch", "use_reentrant=False"]),
        (lambda: (Sparse(), {}, {}), ["table", "is sparse", "Leave out `sparse=True`"]),
        (lambda: (Penalty(deep(6)), {}, {}), ["before the module", "behind the forward"]),
        (thawing, ["12 parameters at step 3", "and 10 when", "another `fit`"]),
    ],
)
def test_what_shows_only_with_the_ranks_or_in_a_step_is_refused(make, words):
    texts = errors(make, 2)
    says(texts[0], words)
    assert "CyclicStrategy" in texts[1] or "PeerFailure" in texts[1]


def _weights_of_one_graph(rank, make):
    module, settings, options = make()
    trainer(cyclic(**settings), 2, **options).fit(module, loader(6, rank))
    return [parameter.detach().numpy() for parameter in module.parameters()]


def test_a_module_that_must_be_one_graph_is_refused_where_torch_refuses_it_and_else_trains_as_without():
    """torch 2.15 refuses it; 2.6 and 2.11 run what begins a stage beside the graph."""
    answers = outcomes(_weights_of_one_graph, one_graph, world_size=2)
    texts = [error for _, error in answers if error is not None]
    for text in texts:
        assert [word for word in ("`fullgraph=True`", "start of each stage", "Leave out") if word not in text] == []
    if not texts:
        for (compiled, _), (plainly, _) in zip(
            answers, outcomes(_weights_of_one_graph, plain, world_size=2), strict=True
        ):
            assert all((one == other).all() for one, other in zip(compiled, plainly, strict=True))
    assert len(texts) in (0, 2)


class Hooks(Regression):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def backward(self, loss):
        loss.backward()

    def configure_callbacks(self):
        return [Brought()]


class Brought(Callback):
    def on_before_zero_grad(self, runner, module, optimizer):
        pass


class Norms(Callback):
    def on_after_backward(self, runner, module):
        module.log("norm", 0.0)


def bounded(parameters):
    return torch.optim.SGD([{"params": list(parameters), "max_grad_norm": 1.0}], 0.05)


class Logs(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("each", loss, sync_dist=True, on_step=True)
        return loss


def _warned(rank, world_size, make, callbacks=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(cyclic(), world_size, callbacks=list(callbacks)).fit(make(), loader(6, rank))
    return [str(each.message) for each in caught if "CyclicStrategy" in str(each.message)]


def test_what_works_badly_is_warned_of():
    ((text,),) = launch(_warned, 1, lambda: Regression(deep(6)), world_size=1)
    says(text, ["one process", "devices=2", "simulate_delay"])

    def gradients():
        return Hooks(deep(6), bounded)

    (texts,) = launch(_warned, 1, gradients, [Norms()], world_size=1)
    says(
        " ".join(texts),
        ["Hooks.on_before_optimizer_step", "Norms.on_after_backward", "no effect or fails", "clip_by='stage'"],
    )
    says(" ".join(texts), ["Brought.on_before_zero_grad", "Hooks.backward", "gradient_clip_val", "register_hook"])
    says(" ".join(texts), ["SGD", "`max_grad_norm`", "clips by stage", "clip_by"])
    texts, _ = launch(_warned, 2, lambda: Logs(deep(6)), world_size=2)
    says(" ".join(texts), ["'each'", "sync_dist=True", "every step"])


@pytest.mark.parametrize("base", ["cyclic", "cyclic_v1"])
@pytest.mark.parametrize("suffix", ["", "_spawn", "_fork", "_notebook"])
def test_the_names_of_the_registry_give_the_rule_and_an_error_in_the_twin(base, suffix):
    import pytorch_lightning

    options = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    strategy = Trainer(strategy=base + suffix, **options).strategy
    assert type(strategy) is CyclicStrategy
    assert strategy.settings.rule == ("v1" if base == "cyclic_v1" else "v2")
    with pytest.raises(ImportError, match=r"from lightning\.pytorch import Trainer"):
        pytorch_lightning.Trainer(strategy=base + suffix, **options)
