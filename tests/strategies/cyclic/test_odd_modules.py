"""Parameters of every kind through the ring, and what a module keeps and changes beside the trained ones."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.cyclic import cyclic, deep, fit, momentum, reference, state
from support.processes import launch
from support.training import FEATURES, Regression, Samples, loader, trainer
from torch import nn

from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.errors import refuse
from lightning_comm.ondevice.cyclic.update import mean_gradients
from lightning_comm.strategies.cyclic.refusals import module_problems
from lightning_comm.strategies.cyclic.settings import WHERE

pytestmark = pytest.mark.filterwarnings("ignore:CyclicStrategy. one process only")


class Odd(nn.Module):
    """One parameter of each kind: memory transposed, none, one entry, no dimension, complex, narrower, tied, frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 7).double()
        self.first.weight = nn.Parameter(torch.randn(FEATURES, 7, dtype=torch.float64).t())
        self.tied = nn.Linear(7, 7).double()
        self.again = nn.Linear(7, 7).double()
        self.again.weight = self.tied.weight
        self.narrow = nn.Linear(7, 7)
        self.spectrum = nn.Linear(7, 7)
        self.spectrum.weight = nn.Parameter(torch.randn(7, 7, dtype=torch.complex128))
        self.spectrum.bias = None
        self.frozen = nn.Linear(7, 7).double().requires_grad_(False)
        self.last = nn.Linear(7, 1).double()
        self.last.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.last.one = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.last.nothing = nn.Parameter(torch.ones(0, 3, dtype=torch.float64))

    def forward(self, x):
        x = torch.tanh(self.again(torch.tanh(self.tied(torch.tanh(self.first(x))))))
        x = torch.tanh(self.narrow(x.float())).double()
        x = self.spectrum(x.to(torch.complex128)).abs()
        x = self.last(self.frozen(x))
        return self.last.scale * x + self.last.one + self.last.nothing.sum()


def odd(make=momentum):
    torch.manual_seed(0)
    return Regression(Odd(), lambda parameters: make([each for each in parameters if each.requires_grad]))


def _odd(rank, world_size):
    module = odd()
    strategy, _ = fit(rank, world_size, module, 5)
    return state(module), strategy.stage_names, module.net.first.weight.stride()


def test_parameters_of_every_kind_are_as_in_the_sequential_reference():
    answers = launch(_odd, 2, world_size=2)
    expected = odd()
    reference(expected, 2, 5, answers[0][1])
    for weights, _, stride in answers:
        assert all((a == b).all() for a, b in zip(weights, state(expected), strict=True))
        assert stride == (1, 7)


def transposed_view(module):
    module.net[4].weight = nn.Parameter(module.net[2].weight.detach().t())


def overlapping_slices(module):
    memory = torch.randn(90, dtype=torch.float64)
    module.net[2].weight = nn.Parameter(memory[:49].view(7, 7))
    module.net[4].weight = nn.Parameter(memory[40:89].view(7, 7))


def expanded(module):
    module.net[4].weight = nn.Parameter(torch.randn(7, 1, dtype=torch.float64).expand(7, 7))


def largest_norm(module):
    module.table = nn.Embedding(3, 2, max_norm=1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (transposed_view, ["'net.2.weight' and 'net.4.weight'", "share memory", "second.weight = first.weight"]),
        (overlapping_slices, ["'net.2.weight' and 'net.4.weight'", "share memory"]),
        (expanded, ["'net.4.weight'", "(7, 7)", "expanded", "expand it in `forward`"]),
        (largest_norm, ["'table'", "max_norm=1.0", "Leave `max_norm` out"]),
    ],
)
def test_parameters_that_cannot_be_owned_are_refused_with_a_way_out(change, words):
    module = Regression(deep(6), momentum)
    change(module)
    with pytest.raises(MisconfigurationException) as caught:
        refuse(WHERE, module_problems(module))
    missing = [word for word in ["CyclicStrategy", *words] if word not in str(caught.value)]
    assert missing == [], f"{missing} not in: {caught.value}"


def test_tied_neighbouring_and_frozen_memory_is_not_refused():
    module = Regression(deep(6), momentum)
    module.net[4].weight = module.net[2].weight
    memory = torch.randn(98, dtype=torch.float64)
    module.net[6].weight = nn.Parameter(memory[:49].view(7, 7))
    module.net[8].weight = nn.Parameter(memory[49:].view(7, 7))
    module.register_parameter("seen", nn.Parameter(module.net[0].weight.detach().t(), requires_grad=False))
    refuse(WHERE, module_problems(module))


def test_gradients_near_the_limit_of_their_type_have_a_mean():
    largest = torch.finfo(torch.float16).max
    (mean,) = mean_gradients([[torch.full((3,), largest, dtype=torch.float16)]] * 4)
    assert torch.equal(mean, torch.full((3,), largest, dtype=torch.float16))


class Steep(Regression):
    """A loss whose gradient is 3/4 of the largest number of its type on each rank."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum() * 0 + sum(
            (each * (0.75 * torch.finfo(each.dtype).max)).sum() for each in self.parameters()
        )


def _steep(rank, world_size):
    net = nn.Sequential(nn.Linear(FEATURES, 2), nn.Linear(2, 1)).bfloat16()
    for each in net.parameters():
        nn.init.zeros_(each)  # what was drawn could add up to a loss that is infinite
    module = Steep(net, lambda parameters: torch.optim.SGD(parameters, 1e-38))
    trainer(cyclic(), world_size).fit(module, loader(1, rank, dtype=torch.bfloat16))
    return [each.detach().float().numpy() for each in net.parameters()]


def test_the_ring_divides_before_it_adds():
    for moved in launch(_steep, 2, world_size=2):
        assert all(((each > -4) & (each < -2)).all() for each in moved)


KINDS = [torch.bool, torch.int8, torch.int16, torch.int32, torch.float16, torch.float32, torch.complex64]


class Teacher(Regression):
    """A teacher that follows the student by hand, frozen numbers and a count that differ between ranks."""

    def __init__(self):
        super().__init__(deep(6, norm=True), lambda parameters: momentum([p for p in parameters if p.requires_grad]))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.still = nn.Linear(2, 2).requires_grad_(False)
        self.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        self.by_hand = nn.Parameter(torch.zeros(2))  # requires a gradient, and no optimizer has it
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        for dtype in KINDS:
            self.register_buffer(f"buffer_{KINDS.index(dtype)}", torch.zeros(3).to(dtype))
            self.register_parameter(f"kept_{KINDS.index(dtype)}", nn.Parameter(torch.zeros(3).to(dtype), False))

    def loss(self, batch):
        x, y = batch
        with torch.no_grad():
            wanted = self.teacher(x + 0.1)
        out = self.net(x)
        return nn.functional.mse_loss(out, y) + nn.functional.mse_loss(out, wanted)

    def configure_optimizers(self):
        return momentum(self.net.parameters())

    def on_before_zero_grad(self, *args):
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.2)
            self.counts += self.global_rank + 1
            self.by_hand += self.global_rank
            self.seen += self.global_rank + 1
            for number, dtype in enumerate(KINDS):
                for tensor in (getattr(self, f"buffer_{number}"), getattr(self, f"kept_{number}")):
                    tensor.copy_(torch.full((3,), self.global_rank + self.global_step).to(dtype))


class Save(Callback):
    def __init__(self, path, at):
        self.path, self.at, self.weights = path, at, []

    def on_train_batch_end(self, runner, module, *args):
        if runner.global_step in self.at:
            runner.save_checkpoint(f"{self.path}/{runner.global_step}.ckpt")
            self.weights.append(state(module))


def _whole_and_resumed(rank, world_size, path, rule):
    found = []
    for ckpt_path in (None, f"{path}/3.ckpt"):
        module, save = Teacher(), Save(path, [3, 6])
        still = copy.deepcopy(module.still.state_dict())
        data = ResumableLoader(Samples(32, rank), 4, seed=3, num_replicas=1, rank=0)
        trainer(cyclic(rule=rule), world_size, callbacks=[save]).fit(module, data, ckpt_path=ckpt_path)
        assert all(torch.equal(still[name], each) for name, each in module.still.state_dict().items())
        found.append([*save.weights, state(module)])
    return found


@pytest.mark.parametrize("rule", ["v2", pytest.param("v1", marks=pytest.mark.exhaustive)])
def test_what_the_module_changes_itself_is_equal_after_each_flush_and_resumes_exactly(rule, tmp_path):
    (whole, resumed), second = launch(_whole_and_resumed, 2, str(tmp_path), rule, world_size=2)
    assert (len(whole), len(resumed)) == (3, 2), "at 3, 6 and the end"
    for one, other in zip([*whole, *resumed, *whole[1:]], [*second[0], *second[1], *resumed], strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    at_3 = dict(zip(Teacher().state_dict(), whole[0], strict=True))
    assert at_3["counts"].tolist() == [3, 3, 3], "whole numbers are those of rank 0"
    assert at_3["by_hand"].tolist() == [1.5, 1.5], "others are averaged"
    for number, dtype in enumerate(KINDS):
        expected = torch.full((3,), 2 + 0.5 * (dtype.is_floating_point or dtype.is_complex)).to(dtype).tolist()
        assert at_3[f"buffer_{number}"].tolist() == at_3[f"kept_{number}"].tolist() == expected


def scripted():
    net = deep(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would have people compile
        middle = torch.jit.script(net[6:10])
    return Regression(nn.Sequential(*net[:6], middle, *net[10:]), momentum)


COMPILED = {
    "the whole model, of which a validation ran before": lambda: torch.compile(
        Regression(deep(8), momentum), backend="eager"
    ),
    "two layers, by torch.jit": scripted,
}


def _compiled(rank, world_size):
    answers = {}
    for name, make in COMPILED.items():
        module = make()
        strategy, _ = fit(rank, world_size, module, 5, limit_val_batches=1, check_val_every_n_epoch=9)
        plain = Regression(deep(8), momentum)
        trained = getattr(module, "_orig_mod", module)
        same = {one: other for (one, _), (other, _) in zip(trained.named_parameters(), plain.named_parameters())}  # noqa: B905
        reference(plain, world_size, 5, [[same[name] for name in names] for names in strategy.stage_names])
        answers[name] = state(trained), state(plain), len(strategy.stage_names)
    return answers


def test_a_compiled_model_is_cut_and_trains_as_the_sequential_reference():
    # what torch loads with the first model that it compiles, ranks have from this process
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1))
    for answers in launch(_compiled, 2, world_size=2):
        for name, (ours, expected, stages) in answers.items():
            assert stages == 6, name
            for mine, theirs in zip(ours, expected, strict=True):
                assert abs(mine - theirs).max() < 1e-15, name
