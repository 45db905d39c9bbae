"""What strategies share, the same for each of them: set-up, launching arguments, files and the hook callback."""

import pickle
from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.processes import launch
from support.training import Regression, loader, trainer

from lightning_comm import CompressedDDPStrategy, CyclicStrategy, FixedPeriod, LocalUpdateStrategy
from lightning_comm.strategies.checkpoints.whole_files import WholeFileIO
from lightning_comm.strategies.common.hooks import HookCallback
from lightning_comm.strategies.common.launching import LaunchingArguments

STRATEGIES = {
    "LocalUpdateStrategy": lambda **launching: LocalUpdateStrategy(FixedPeriod(4), **launching),
    "CompressedDDPStrategy": lambda **launching: CompressedDDPStrategy("topk", **launching),
    "CyclicStrategy": lambda **launching: CyclicStrategy(**launching),
}
each_strategy = pytest.mark.parametrize("name", STRATEGIES)


@each_strategy
def test_each_derives_from_lightnings_class_alone(name):
    assert type(STRATEGIES[name]()).__bases__ == (DDPStrategy,)


@each_strategy
def test_launching_arguments_reach_lightning(name):
    io = WholeFileIO()
    strategy = STRATEGIES[name](
        timeout=timedelta(seconds=7), process_group_backend="gloo", start_method="spawn", checkpoint_io=io
    )
    assert (strategy._timeout, strategy._process_group_backend) == (timedelta(seconds=7), "gloo")
    assert (strategy._start_method, strategy.checkpoint_io) == ("spawn", io)
    assert STRATEGIES[name]()._timeout == timedelta(minutes=30)


@each_strategy
def test_an_unknown_argument_is_named_with_those_that_there_are(name):
    with pytest.raises(TypeError) as caught:
        STRATEGIES[name](time_out=3)
    words = (name, "'time_out'", *(f"`{each}`" for each in LaunchingArguments.__annotations__))
    assert [word for word in words if word not in str(caught.value)] == []


@each_strategy
def test_a_callback_of_the_twin_package_is_refused_by_name_with_both_imports(name):
    import pytorch_lightning

    class Twin(pytorch_lightning.Callback):
        pass

    with pytest.raises(MisconfigurationException) as caught:
        trainer(STRATEGIES[name](), 1, callbacks=[Twin()]).fit(Regression(), loader(1, 0))
    words = (name, "Twin", "`pytorch_lightning`", "`lightning.pytorch`", "from lightning.pytorch.callbacks import")
    assert [word for word in words if word not in str(caught.value)] == []


def _resumes(rank, folder):
    said = []
    for make in STRATEGIES.values():
        try:
            trainer(make(), 1).fit(Regression(), loader(1, rank), ckpt_path=folder)
        except MisconfigurationException as error:
            said.append(str(error))
    return said


def test_the_folder_of_a_sharded_checkpoint_is_refused_by_each(tmp_path):
    ((*said,),) = launch(_resumes, str(tmp_path), world_size=1)
    assert len(said) == len(STRATEGIES)
    for name, text in zip(STRATEGIES, said, strict=True):
        words = (name, repr(str(tmp_path)), "is a folder", "consolidate_checkpoint")
        assert [word for word in words if word not in text] == []


@each_strategy
def test_the_process_that_has_spawned_the_ranks_and_is_none_saves_and_loads_without_a_process_group(tmp_path, name):
    assert not torch.distributed.is_initialized()
    module = Regression()
    runner = module.trainer = trainer(STRATEGIES[name](start_method="spawn"), 1)
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "after.ckpt")
    loaded = runner.strategy.load_checkpoint(tmp_path / "after.ckpt")
    assert torch.equal(loaded["state_dict"]["net.0.weight"], module.net[0].weight)


class Looks(Callback):
    """Notes which callback is first."""

    def __init__(self):
        self.first = []

    def on_train_start(self, runner, module):
        self.first.append([isinstance(each, HookCallback) for each in runner.callbacks])


def _fits_twice(rank):
    found = []
    for make in STRATEGIES.values():
        looks = Looks()
        runner = trainer(make(), 1, callbacks=[looks])
        for epochs in (1, 2):
            runner.fit_loop.max_epochs = epochs
            runner.fit(Regression(optimizer=partial(torch.optim.SGD, lr=0.05)), loader(2, rank))
        hook = next(each for each in runner.callbacks if isinstance(each, HookCallback))
        copy = pickle.loads(pickle.dumps(runner.strategy))
        found.append((looks.first, type(pickle.loads(pickle.dumps(hook))), type(copy), copy._run))
    return found


def test_the_hook_callback_is_first_and_there_once_and_a_strategy_can_be_pickled_after_a_fit():
    (found,) = launch(_fits_twice, world_size=1)
    for name, (first, hook, strategy, run) in zip(STRATEGIES, found, strict=True):
        assert [(each[0], sum(each)) for each in first] == [(True, 1)] * 2
        assert (hook, strategy.__name__, run) == (HookCallback, name, None)
