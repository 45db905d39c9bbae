"""Learning rates against torch's schedulers, metrics against one process, a resumed run against a whole one."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR

from lightning_comm.examples import DigitsData, TimmClassifier
from lightning_comm.examples.schedule import LrSchedule
from lightning_comm.strategies.common.pure_functions import why_not_pure

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks

VIT = "vit_tiny_patch16_224"
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}


def trainer(**arguments) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, **quiet, **arguments})


def fit(model, data, ckpt_path=None, **arguments) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (runner := trainer(**arguments)).fit(model, data, ckpt_path=ckpt_path)
    return runner


class Rates(Callback):
    """Writes down the rate of every optimizer step."""

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.initial_lrs: set[float] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lrs += [group["lr"] for group in optimizer.param_groups]
        self.initial_lrs |= {group["initial_lr"] for group in optimizer.param_groups}


def after(optimizer_lr: float, make_scheduler, steps: int) -> list[float]:
    """The rates that one of torch's own schedulers gives."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optimizer_lr)
    scheduler = make_scheduler(optimizer)
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize(
    ("schedule", "make_scheduler"),
    [
        ({"schedule": "cosine"}, lambda optimizer: CosineAnnealingLR(optimizer, T_max=12 - 4, eta_min=0.02)),
        ({"schedule": "step", "decay_at_steps": [6, 9]}, lambda optimizer: MultiStepLR(optimizer, [6 - 4, 9 - 4])),
        ({"schedule": "constant"}, lambda optimizer: LambdaLR(optimizer, lambda step: 1.0)),
    ],
    ids=["cosine", "step", "constant"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_optimizer_step_has_the_rate_of_the_schedule(schedule, make_scheduler, optimizer):
    rates = Rates()
    model = TimmClassifier(VIT, 10, SMALL, optimizer, lr=0.1, warmup_steps=4, final_lr=0.02, **schedule)
    # 14 batches of 100 an epoch; two to an optimizer step, and stopped after 12 of 14 steps.
    runner = fit(
        model,
        DigitsData(100),
        max_epochs=2,
        max_steps=12,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        callbacks=[rates],
    )
    assert runner.global_step == 12
    assert rates.lrs == pytest.approx([0.02, 0.04, 0.06, 0.08, *after(0.1, make_scheduler, 8)])
    assert rates.initial_lrs == {0.1}


def test_the_rate_never_rises_after_the_warm_up_and_the_cosine_ends_on_its_final_rate():
    schedule = LrSchedule(0.3, "cosine", warmup_steps=7, final_lr=0.01)
    rates = [schedule.rate(step, total_steps=50) for step in range(60)]
    assert rates[:8] == sorted(rates[:8])
    assert rates[7] == max(rates) == 0.3
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert rates[50:] == pytest.approx([0.01] * 10)


def test_a_run_of_unknown_length_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"unknown length.*`max_epochs` or `max_steps`.*'constant'"):
        fit(TimmClassifier(VIT, 10, SMALL), DigitsData(), max_epochs=-1)


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 3


def test_a_constant_rate_needs_no_run_length():
    model = TimmClassifier(VIT, 10, SMALL, schedule="constant", warmup_steps=2)
    runner = fit(model, DigitsData(), max_epochs=-1, limit_val_batches=0, callbacks=[Stop()])
    assert runner.global_step == 4


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match=r"`warmup_steps` must be less than the 3 .* got 3.*shorter"):
        fit(TimmClassifier(VIT, 10, SMALL, warmup_steps=3), DigitsData(), max_steps=3)


def test_a_small_vision_transformer_learns_the_digits():
    torch.manual_seed(0)
    model = TimmClassifier(
        VIT, 10, {**SMALL, "embed_dim": 64, "depth": 2, "num_heads": 4}, lr=4e-3, warmup_steps=20, label_smoothing=0.1
    )
    runner = fit(model, DigitsData(32), max_epochs=3)
    assert runner.callback_metrics["val_accuracy"] > 0.8
    answers = torch.cat(trainer().predict(model, DigitsData(100)))
    _, labels = DigitsData(360).val_dataloader().dataset.tensors
    assert (answers == labels).float().mean() == pytest.approx(float(runner.callback_metrics["val_accuracy"]))


class SaveEveryBatch(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_run_resumed_at_any_step_ends_with_the_weights_of_the_run_that_was_never_stopped(tmp_path):
    def run(ckpt_path=None, callbacks=()):
        torch.manual_seed(1)
        model = TimmClassifier(VIT, 10, SMALL, warmup_steps=2)
        fit(model, DigitsData(400), ckpt_path, max_epochs=2, limit_val_batches=0, callbacks=list(callbacks))
        return model.state_dict()

    whole = run(callbacks=[SaveEveryBatch(tmp_path)])
    assert len(list(tmp_path.glob("*.ckpt"))) == 6
    for step in range(1, 6):
        resumed = run(tmp_path / f"{step}.ckpt")
        assert all(torch.equal(resumed[name], value) for name, value in whole.items()), step


def test_accuracy_and_loss_over_ranks_are_those_of_all_images_together():
    torch.manual_seed(2)
    model = TimmClassifier(VIT, 10, SMALL)
    images, labels = DigitsData(360).val_dataloader().dataset.tensors
    with torch.no_grad():
        logits = model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, run in (("val", "validate"), ("test", "test")):
            # 3 ranks have 120 images each: batches of 50, 50 and 20, whose plain average would be wrong.
            (metrics,) = getattr(trainer(strategy="ddp_fork", devices=3), run)(model, DigitsData(50), verbose=False)
            assert metrics[f"{part}_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
            assert metrics[f"{part}_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


class Where(Callback):
    """Says whether batches are being trained on, set-up and validation aside."""

    training = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Where.training = True

    def on_validation_start(self, trainer, pl_module):
        Where.training = False


def test_nothing_is_reduced_in_training_steps(monkeypatch, tmp_path):
    reduce = DDPStrategy.reduce

    def watched(self, *args, **kwargs):
        with (tmp_path / f"{self.global_rank}.log").open("a") as log:
            log.write("training\n" if Where.training else "elsewhere\n")
        return reduce(self, *args, **kwargs)

    monkeypatch.setattr(DDPStrategy, "reduce", watched)
    model = TimmClassifier(VIT, 10, SMALL)
    fit(model, DigitsData(100), strategy="ddp_fork", devices=2, max_epochs=2, log_every_n_steps=1, callbacks=[Where()])
    assert [set(log.read_text().split()) for log in tmp_path.glob("*.log")] == [{"elsewhere"}] * 2


@pytest.mark.parametrize(
    ("kwargs", "error", "must_say"),
    [
        (
            {"model_name": "vit_tiny_patch16_223"},
            ValueError,
            ["model_name", "'vit_tiny_patch16_223'", "vit_tiny_patch16_224"],
        ),
        ({"model_name": "?"}, ValueError, ["model_name", "'?'", "timm.list_models()"]),
        ({"model_args": {"image_size": 8}}, TypeError, ["model_args", "{'image_size': 8}", VIT, "unexpected keyword"]),
        ({"num_classes": 1}, ValueError, ["num_classes", "got 1"]),
        ({"optimizer": "lamb"}, ValueError, ["optimizer", "'lamb'", "configure_optimizers"]),
        ({"weight_decay": -1.0}, ValueError, ["weight_decay", "got -1.0"]),
        ({"momentum": 1.0}, ValueError, ["momentum", "got 1.0"]),
        ({"label_smoothing": 1.0}, ValueError, ["label_smoothing", "got 1.0"]),
        ({"lr": 0.0}, ValueError, ["`lr`", "got 0.0"]),
        ({"schedule": "linear"}, ValueError, ["schedule", "'linear'", "'cosine'", "'constant'"]),
        ({"warmup_steps": -1}, ValueError, ["warmup_steps", "got -1"]),
        ({"lr": 0.1, "final_lr": 0.2}, ValueError, ["final_lr", "got 0.2", "`lr`=0.1"]),
        ({"schedule": "step"}, ValueError, ["decay_at_steps", "got ()", "'constant'"]),
        ({"decay_at_steps": [3]}, ValueError, ["decay_at_steps", "got (3,)", "'step'"]),
        ({"decay_factor": 0.0}, ValueError, ["decay_factor", "got 0.0"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, error, must_say):
    with pytest.raises(error, match=r"TimmClassifier: |LrSchedule: ") as caught:
        TimmClassifier(**{"model_name": VIT, "num_classes": 10, "model_args": SMALL, **kwargs})
    assert [word for word in must_say if word not in str(caught.value)] == []


@pytest.mark.parametrize("schedule", [LrSchedule(0.1, warmup_steps=3), LrSchedule(0.1, "step", decay_at_steps=(4, 9))])
def test_in_a_run_of_known_length_the_schedule_is_a_function_of_numbers_alone(schedule):
    share = schedule.share_of_peak(12)
    assert why_not_pure(share) is None
    assert [share(step) for step in range(12)] == [schedule.rate(step, total_steps=12) / 0.1 for step in range(12)]
