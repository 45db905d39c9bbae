"""All that cannot work in one set-up is said in one message, whoever refuses it, and on every rank."""

import pickle
from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.callbacks import StochasticWeightAveraging as Averaged
from support.cyclic import deep
from support.processes import launch, outcomes
from support.training import Regression, loader, local_update, trainer

from lightning_comm import (
    AdaptivePartition,
    Averaging,
    BatchNormReestimation,
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    SparseMask,
)
from lightning_comm.refusals import RefusedSetUp

PRUNING = {"pruning_fn": "l1_unstructured", "amount": 0.5}
LBFGS = torch.optim.LBFGS
TIMEOUT = timedelta(seconds=40)


def refused(strategy, world_size=1, rank=0, optimizer=None, **kwargs):
    module = Regression(deep(6), optimizer)
    with pytest.raises(RefusedSetUp) as caught:
        trainer(strategy, world_size, **kwargs).fit(module, loader(4, rank))
    return str(caught.value)


def everything(rank, world_size):
    return [
        refused(
            CyclicStrategy(stages=7),
            world_size,
            rank,
            LBFGS,
            callbacks=[ModelPruning(**PRUNING), AdaptivePartition(shares=[1, 2, 3])],
        ),
        refused(
            LocalUpdateStrategy(FixedPeriod(4), optimizer_state="average", counted_optimizer=3),
            world_size,
            rank,
            LBFGS,
            callbacks=[
                Averaged(swa_lrs=0.1),
                ModelPruning(**PRUNING),
                BatchNormReestimation(),
                AdaptivePartition(shares=[1, 2, 3]),
            ],
        ),
        refused(
            CompressedDDPStrategy(SparseMask(), static_graph=True),
            world_size,
            rank,
            LBFGS,
            accumulate_grad_batches=2,
            callbacks=[AdaptivePartition(shares=[1, 2, 3])],
        ),
    ]


def test_one_message_names_all_that_cannot_work_in_trainer_callbacks_model_and_optimizer():
    both = outcomes(everything, 2, world_size=2)
    assert [error for _, error in both] == [None, None]
    (cyclic, local, compressed), _ = (texts for texts, _ in both)
    assert both[0][0] == both[1][0]
    for text, words in (
        (cyclic, ["`stages`=7", "5 things", "ModelPruning", "AdaptivePartition: `shares`", "LBFGS"]),
        (local, ["ModelPruning", "BatchNormReestimation: the model", "AdaptivePartition: `shares`", "LBFGS keeps"]),
        (local, ["StochasticWeightAveraging", "`counted_optimizer`=3 is not there", "8 things"]),
        (compressed, ["`static_graph=True`", "AdaptivePartition: `shares`", "LBFGS", "3 things"]),
    ):
        assert [word for word in words if word not in text] == [], text


def test_several_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match="3 things") as caught:
        CyclicStrategy(rule="v3", lag=-1, stagger="slot")
    assert [word for word in ("`rule`", "`lag`", "`stagger`") if word not in str(caught.value)] == []
    with pytest.raises(ValueError, match="2 things") as caught:
        LocalUpdateStrategy(FixedPeriod(4), gradient_steps=-1, buffers="none")
    assert [word for word in ("`gradient_steps`", "`buffers`") if word not in str(caught.value)] == []


def test_a_callback_refuses_by_itself_where_the_strategy_is_not_ours():
    runner = Trainer(accelerator="cpu", devices=1, callbacks=[AdaptivePartition(shares=[1, 2, 3])], logger=False)
    with pytest.raises(RefusedSetUp, match=r"^AdaptivePartition: `shares`"):
        runner.fit(Regression(), loader(4, 0))


def alone(rank, make_strategy, make_module):
    module = make_module() if rank == 1 else Regression()
    trainer(make_strategy(), 2).fit(module, loader(4, rank))


def frozen():
    return Regression().requires_grad_(False)


@pytest.mark.parametrize(
    ("make_strategy", "make_module", "words"),
    [
        (partial(CyclicStrategy, timeout=TIMEOUT), partial(Regression, optimizer=LBFGS), "the optimizer LBFGS"),
        (partial(local_update, FixedPeriod(2), averaging=Averaging(overlap_steps=1)), frozen, "no parameter of Regr"),
    ],
    ids=["cyclic", "overlap"],
)
def test_the_refusal_of_one_rank_alone_is_heard_where_the_others_would_make_process_groups(
    make_strategy, make_module, words
):
    (_, of_0), (_, of_1) = outcomes(alone, make_strategy, make_module, world_size=2, timeout_s=30)
    assert of_0 is not None
    assert f"PeerFailure: rank 1 failed: RefusedSetUp: {type(make_strategy()).__name__}: " in of_0
    assert all(words in text for text in (of_0, of_1 or ""))


def one_after_the_other(rank):
    strategy = LocalUpdateStrategy(FixedPeriod(4))
    runner = trainer(strategy, 1, callbacks=[BatchNormReestimation()])
    with pytest.raises(RefusedSetUp, match=r"^BatchNormReestimation: "):
        runner.fit(Regression(), loader(4, 0))
    runner.callbacks = []
    runner.fit(Regression(), loader(4, 0))
    return runner.global_step


def test_what_callbacks_refused_is_not_said_of_the_next_run():
    assert launch(one_after_the_other, world_size=1) == [4]


def test_the_error_of_a_started_process_reaches_its_parent_whole():
    error = RefusedSetUp([("A", "one"), ("B", "two")])
    assert (
        str(pickle.loads(pickle.dumps(error)))
        == str(error)
        == ("lightning_comm: 2 things in this set-up cannot work:\n  1. A: one\n  2. B: two")
    )
