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
from support.training import Regression, Samples, loader, local_update, trainer
from torch import nn

import lightning_comm.transport.failures as peers
from lightning_comm import (
    AdaptivePartition,
    Averaging,
    BatchNormReestimation,
    CommProfiler,
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    PartitionedLoader,
    QuadraticPeriod,
    SparseMask,
)
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.callbacks.adaptive_partition import session as partition_session
from lightning_comm.errors import RefusedSetUp

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
        (cyclic, ["`stages`=7", "6 things", "ModelPruning", "AdaptivePartition: `shares`", "LBFGS"]),
        (local, ["ModelPruning", "BatchNormReestimation: the model", "AdaptivePartition: `shares`", "LBFGS keeps"]),
        (local, ["StochasticWeightAveraging", "`counted_optimizer`=3 is not there", "9 things"]),
        (compressed, ["`static_graph=True`", "AdaptivePartition: `shares`", "LBFGS", "4 things", "got a DataLoader"]),
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
    with pytest.raises(RefusedSetUp, match=r"^AdaptivePartition: 2 things[^`]*`shares`"):
        runner.fit(Regression(), loader(4, 0))


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (CompressedDDPStrategy, {"compression": "nope", "bucket_cap_mb": -1, "ddp_comm_hook": print}),
        (AdaptivePartition, {"mode": "x", "shares": 3, "batch_sizes": [0], "min_per_rank": "y", "min_gain": -1}),
        (AdaptivePartition, {"max_per_rank": 0, "window_steps": 0, "warmup_steps": -1, "replay": 3, "folder": 4}),
        (EmulatedDevice, {"step_s": -1, "batch_size": 0, "forward_share": 3, "speed": [0, 1]}),
        (LocalUpdateStrategy, {"period": FixedPeriod(4), "warmup_steps": -2, "evaluate_weights": "x"}),
        (CommProfiler, {"timeline_steps": -1, "warmup_steps": 2.5}),
    ],
)
def test_a_constructor_names_all_arguments_that_are_out_of_range(cls, kwargs):
    with pytest.raises(RefusedSetUp, match=rf"^{cls.__name__}: \d things") as caught:
        cls(**kwargs)
    said = [line for line in str(caught.value).splitlines()[1:] if "say the same thing" not in line]
    named = [name for name in kwargs if name != "period"]
    assert len(said) == len(named)
    assert [name for name in named if f"`{name}`" not in str(caught.value)] == []


def of_one_rank(strategy, module, callbacks=(), **kwargs):
    with pytest.raises(RefusedSetUp) as caught:
        trainer(strategy, 1, callbacks=list(callbacks), **kwargs).fit(module, loader(4, 0))
    return str(caught.value)


def what_was_said_one_a_start(rank, folder):
    by_hand = Regression(optimizer=torch.optim.Rprop)
    by_hand.automatic_optimization = False
    endless = {"max_epochs": -1, "max_time": timedelta(seconds=9)}
    norm = nn.Sequential(nn.Linear(5, 4), nn.SyncBatchNorm(4), nn.Linear(4, 1)).double()
    share = {"gradient_steps": 0.5}
    return [
        of_one_rank(local_update(QuadraticPeriod(), **share), Regression(optimizer=torch.optim.Rprop), **endless),
        of_one_rank(local_update(QuadraticPeriod(), **share), by_hand),
        of_one_rank(local_update(FixedPeriod(2), counted_optimizer=2, **share), Regression(norm)),
        of_one_rank(
            local_update(FixedPeriod(2), counted_optimizer=2),
            Regression(),
            [
                EmulatedDevice(0.001, 4, speed=[1, 2, 3]),
                CommProfiler(folder, f"{folder}/none.json"),
                AdaptivePartition(),
            ],
        ),
    ]


def test_what_is_known_of_optimizer_length_loaders_and_callbacks_is_said_in_the_one_message(tmp_path):
    (texts,) = launch(what_was_said_one_a_start, str(tmp_path), world_size=1)
    for text, words in zip(
        texts,
        (
            ["2 things", "`gradient_steps`=0.5 is a share", "`max_steps`", "got 'Rprop'. Give `alpha`"],
            ["2 things", "under manual optimization", "got 'Rprop'"],
            ["2 things", "'net.1' is a SyncBatchNorm", "`counted_optimizer`=2"],  # behind a set-up that fails
            [
                "4 things",
                "EmulatedDevice: `speed`",
                "CommProfiler: `probe`",
                "got a DataLoader",
                "`counted_optimizer`=2",
            ],
        ),
        strict=True,
    ):
        assert [word for word in words if word not in text] == [], text


def leave_soon():
    """Let no rank of this process wait for seconds for others that are in a collective, and so cannot leave."""
    peers._LEAVE_S = 0.3


def alone(rank, make_strategy, make_module):
    leave_soon()
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


def start_that_fails_on_rank_1(rank):
    leave_soon()

    def fails(*args):
        raise OSError("no room on this rank")

    if rank == 1:
        partition_session.chosen_start = fails  # in the process of this rank
    samples = PartitionedLoader(Samples(32, 0), global_batch_size=8)
    trainer(local_update(FixedPeriod(2)), 2, callbacks=[AdaptivePartition()]).fit(Regression(), samples)


def test_a_rank_whose_shares_cannot_start_is_heard_where_the_others_would_make_a_process_group():
    (_, of_0), (_, of_1) = outcomes(start_that_fails_on_rank_1, world_size=2, timeout_s=30)
    assert "rank 1 failed: OSError: no room on this rank" in (of_0 or "")
    assert "OSError: no room on this rank" in (of_1 or "")


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
