"""What a strategy says at its start is what the run then does, and what its ledger counts."""

from datetime import timedelta

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.cyclic import cyclic, deep, momentum
from support.lines import listening
from support.processes import launch
from support.training import Regression, loader, local_update, trainer
from torch import nn
from torch.optim import lr_scheduler

from lightning_comm import (
    Averaging,
    CompressedDDPStrategy,
    FixedPeriod,
    MagnitudePruning,
    PruningSchedule,
    QuadraticPeriod,
    SparseMask,
)
from lightning_comm.strategies.local_update import start_line as local_update_line

STEPS = 10
COUNTED = ("parameters", "buffers", "weight_averages", "gradients", "evaluation", "checkpoint")


class Scheduled(Regression):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], self.make(optimizer)


def cosine(optimizer):
    return [{"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS), "interval": "step"}]


def by_epoch(optimizer):
    return [lr_scheduler.StepLR(optimizer, 1, gamma=0.3)]


def plateau(optimizer):
    return [{"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "seen", "strict": False}]


CASES = {
    "a fixed period": ({"period": FixedPeriod(6)}, {}),
    "validations in mid-round and at its end": (
        {"period": FixedPeriod(4)},
        {"limit_val_batches": 1, "val_check_interval": 6, "num_sanity_val_steps": 0},
    ),
    "each rank validates its own weights": (
        {"period": FixedPeriod(4), "evaluate_weights": "local"},
        {"limit_val_batches": 1, "val_check_interval": 7, "num_sanity_val_steps": 0, "saves": {"save_top_k": -1}},
    ),
    "accumulation, whose last window is short": ({"period": FixedPeriod(2)}, {"accumulate_grad_batches": 3}),
    "validations before the first step": (
        {"period": FixedPeriod(2)},
        {"limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 0, "accumulate_grad_batches": 5},
    ),
    "validations every so many batches of the run, and gradients first": (
        {"period": FixedPeriod(3), "gradient_steps": 4},
        {
            "limit_val_batches": 1,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "accumulate_grad_batches": 2,
        },
    ),
    "gradients first": ({"period": FixedPeriod(4), "gradient_steps": 13}, {}),
    "QSR with a rate a step": ({"period": QuadraticPeriod(alpha=0.1, h_base=2)}, {"make": cosine}),
    "QSR with a rate an epoch": ({"period": QuadraticPeriod(alpha=0.05, h_base=2)}, {"make": by_epoch}),
    "a moving average of the weights": ({"period": FixedPeriod(4)}, {"ema": True}),
    "checkpoints by steps": (
        {"period": FixedPeriod(4)},
        {"saves": {"every_n_train_steps": 5, "save_top_k": -1, "save_last": True}},
    ),
    "a checkpoint an epoch, in an overlap": (
        {"period": FixedPeriod(4), "averaging": Averaging(overlap_steps=1)},
        {"saves": {"save_top_k": -1}},
    ),
}


def run(rank, world_size, folder, names):
    said, answers = listening(), {}
    for name in names:
        ours, given = CASES[name]
        given, callbacks = dict(given), []
        if saves := given.pop("saves", None):
            callbacks.append(ModelCheckpoint(folder / name, **saves))
            given["enable_checkpointing"] = True
        if given.pop("ema", False):
            callbacks.append(EMAWeightAveraging(update_every_n_steps=3))
        module = Scheduled(given.pop("make", lambda optimizer: []))
        strategy = local_update(**ours)
        runner = trainer(strategy, world_size, max_epochs=2, callbacks=callbacks, **given)
        promised, told = [], local_update_line.traffic_to_come

        def note(*args, promised=promised, told=told):
            promised.append(told(*args))
            return promised[-1]

        local_update_line.traffic_to_come = note
        runner.fit(module, loader(STEPS, rank), loader(1, rank))
        local_update_line.traffic_to_come = told
        (foreseen,) = promised
        sent = sum(strategy.ledger.wire_bytes(purpose) for purpose in COUNTED)
        answers[name] = foreseen.traffic, foreseen.exact, len(strategy.history), sent
    return answers, said


def test_what_local_updates_say_at_their_start_is_what_they_do_and_send(tmp_path):
    (answers, said), _ = launch(run, 2, tmp_path, list(CASES), world_size=2)
    for name, (traffic, exact, synchronisations, sent) in answers.items():
        assert exact, name
        assert traffic.synchronisations == synchronisations, name
        assert traffic.wire_bytes == sent, (name, traffic)
    lines = [line for line in said if line.startswith("LocalUpdateStrategy: ")]
    assert len(lines) == len(CASES)
    assert "of the" in lines[0]
    assert "under DDP" in lines[0]
    assert lines[0].startswith("LocalUpdateStrategy: 20 optimizer steps on 2 ranks: 4 synchronisations, 0 averages")
    assert "13 that average gradients, as under DDP, then 2 synchronisations" in "".join(lines)
    assert "moving averages of the weights included" in "".join(lines)


def rates_unknown(rank, world_size):
    said, done = listening(), []
    for make, limits in ((plateau, {}), (cosine, {"max_epochs": -1, "max_time": timedelta(seconds=0.1)})):
        strategy = local_update(QuadraticPeriod(alpha=0.1, h_base=4, h_max=8))
        module = Scheduled(make)
        trainer(strategy, world_size, **limits).fit(module, loader(STEPS, rank))
        done.append(len(strategy.history))
    trainer(local_update(FixedPeriod(1)), world_size, max_epochs=-1, max_steps=1).fit(Regression(), loader(STEPS, rank))
    return said, done


def test_where_rates_or_length_are_not_known_the_line_says_what_is():
    (said, done), _ = launch(rates_unknown, 2, world_size=2)
    by_plateau, endless, single = (
        line for line in said if line.startswith("LocalUpdateStrategy: ") and "agreed" not in line
    )
    assert "10 optimizer steps on 2 ranks: at most 3 synchronisations" in by_plateau
    assert done[0] <= 3
    assert "the length of the run is not known before. A synchronisation, every 4 steps or more, sends" in endless
    assert "LocalUpdateStrategy: 1 optimizer step on 2 ranks: 1 synchronisation, 0 averages for validations" in single


def test_what_there_is_one_of_is_in_the_singular():
    said = [local_update_line._number(number, "average") for number in (0, 1, 2, 1000)]
    assert said == ["0 averages", "1 average", "2 averages", "1,000 averages"]


def test_no_run_fails_by_its_line(monkeypatch):
    def fails(*args):
        raise KeyError("a rule of the user's own")

    monkeypatch.setattr(local_update_line, "_line", fails)
    assert local_update_line.plan_of(None, None).startswith("what the run will send cannot be foreseen (KeyError: ")


def compressed(rank, world_size):
    said, sent = listening(), []
    gradual = PruningSchedule(start_step=2, end_step=10, every_steps=2)
    for compression in ("bf16", "powersgd", SparseMask(MagnitudePruning(0.5)), SparseMask(schedule=gradual)):
        strategy = CompressedDDPStrategy(compression)
        net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        module = Regression(net)
        trainer(strategy, world_size).fit(module, loader(12, rank, dtype=torch.float32))
        zero = sum(int((each == 0).sum()) for each in module.parameters())
        records = [each.wire_bytes for each in strategy.ledger.records if each.purpose == "gradients"]
        sent.append((zero, sum(records) / 12))
    return said, sent


def test_compressed_ddp_says_what_a_step_sends_and_how_many_weights_are_pruned():
    (said, sent), _ = launch(compressed, 2, world_size=2)
    plans = [line for line in said if line.startswith("CompressedDDPStrategy: ")]
    masks = [line for line in said if line.startswith("SparseMask: ")]
    assert plans[0].startswith(
        "CompressedDDPStrategy: Cast(dtype='bf16') for the gradients of 6 parameters on 2 ranks: "
    )
    assert "50.0 % of the" in plans[0]
    weights = 5 * 64 + 64 + 64 * 64 + 64 + 64 + 1
    zero, step_bytes = sent[2]
    assert f"before optimizer step 0, {zero:,} of {weights:,} weights are pruned" in masks[0]
    assert f"each rank sends {step_bytes / 1e3:.1f} kB to average the others" in masks[0]
    # bit by bit: the first time and the last
    assert ["before optimizer step 4," in masks[1], "before optimizer step 10," in masks[2], len(masks)] == [1, 1, 3]
    assert f"{sent[3][0]:,} of {weights:,} weights" in masks[2]


def turns(rank, world_size):
    said = listening()
    for steps_in_step in (2, 0):
        strategy = cyclic(stages=4, warmup_sync_steps=steps_in_step)
        module = Regression(deep(6), momentum)
        trainer(strategy, world_size).fit(module, loader(3, rank))
    counts = [sum(module.get_parameter(name).numel() for name in names) for names in strategy.stage_names]
    return said, counts


def test_cyclic_says_in_one_line_how_the_model_is_cut_and_how_old_parameters_are():
    (said, counts), _ = launch(turns, 2, world_size=2)
    warm, line = (line for line in said if line.startswith("CyclicStrategy: ") and "stages" in line)
    assert "\n" not in line
    in_step = "; the first 2 steps are in step, as under DDP, and after them parameters are"
    assert warm == line.replace(", and parameters are", in_step)
    assert f"4 stages of {min(counts):,} to {max(counts):,} parameters on 2 ranks, which begin at " in line
    assert line.endswith("a rank updates 2 of them, and parameters are 0.25 updates old on average.")
