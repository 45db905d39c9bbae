"""What users' models, hooks and callbacks do behind a strategy's back, each once found to go wrong."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.processes import launch, outcomes
from support.training import Regression, Samples, Stop, loader, local_update, network, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from lightning_comm import Averaging, FixedPeriod, QuadraticPeriod


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def no_monitor_of_progress():
    """Without the thread of tqdm, which never ends and has nothing to do with trial runs."""
    return mock.patch.object(tqdm, "monitor_interval", 0)


def _finder(rank, folder, gradient_steps):
    class Tunable(Regression):
        lr = 0.01

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    strategy = local_update(FixedPeriod(4), gradient_steps=gradient_steps)
    finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
    runner = trainer(strategy, 2, callbacks=[finder], default_root_dir=folder, max_steps=20, max_epochs=-1)
    module = Tunable()
    with no_monitor_of_progress():
        runner.fit(module, loader(20, rank))
    ledger = strategy.ledger
    return [done.step for done in strategy.history], runner.global_step, weights(module), ledger.messages("gradients")


@pytest.mark.parametrize(("gradient_steps", "ends"), [(0, [4, 8, 12, 16, 20]), (8, [12, 16, 20])])
def test_the_trial_run_of_a_learning_rate_finder_does_not_count(tmp_path, gradient_steps, ends):
    one, two = launch(_finder, str(tmp_path), gradient_steps, world_size=2)
    assert one[:2] == two[:2] == (ends, 20)
    assert one[3] == gradient_steps
    for mine, theirs in zip(one[2], two[2], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _found_rate(rank, folder):
    class Tunable(Regression):
        lr = 0.01

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1000)]

    strategy = local_update(QuadraticPeriod())
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    module = Tunable()
    with no_monitor_of_progress():
        trainer(strategy, 2, callbacks=[finder], default_root_dir=folder).fit(module, loader(30, rank))
    return module.lr, strategy._run.settings.period.alpha


def test_auto_alpha_follows_the_rate_that_a_finder_found(tmp_path):
    for lr, alpha in launch(_found_rate, str(tmp_path), world_size=2):
        assert lr != 0.01
        assert alpha == pytest.approx(2.19 * lr)


class Teacher(Regression):
    """A frozen copy that follows the trained weights, as in mean-teacher and target networks."""

    def __init__(self):
        super().__init__(network(), adamw)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)


def _teacher(rank, folder):
    module = Teacher()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    runner = trainer(local_update(FixedPeriod(4)), 2, callbacks=[save], enable_checkpointing=True)
    runner.fit(module, loader(18, rank))
    module.on_train_batch_end()  # after the last synchronisation it followed equal weights, and does so again
    return weights(module.teacher), weights(module.net)


def test_frozen_parameters_that_follow_the_trained_ones_end_equal(tmp_path):
    answers = launch(_teacher, str(tmp_path), world_size=2)
    for part in range(2):
        for mine, theirs in zip(answers[0][part], answers[1][part], strict=True):
            np.testing.assert_array_equal(mine, theirs)


class Codebook(Regression):
    """Frozen entries that single samples move, on one rank only: those of a vector quantiser, and how often."""

    def __init__(self):
        super().__init__(network(), adamw)
        self.codes = nn.Parameter(torch.zeros(500, 4, dtype=torch.float64), requires_grad=False)
        self.uses = nn.Parameter(torch.zeros(500, dtype=torch.int64), requires_grad=False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_rank == 1:
            self.codes[37 + batch_idx] += 1.0
        else:
            self.uses[batch_idx] += 1


def _codebook(rank, averaging):
    module = Codebook()
    trainer(local_update(FixedPeriod(4), averaging=averaging), 2).fit(module, loader(9, rank))
    return module.codes[37:46, 0].tolist(), float(module.codes.abs().sum()), module.uses[:9].tolist()


@pytest.mark.parametrize(
    "averaging", [None, Averaging(compression="bf16", overlap_steps=1)], ids=["plain", "in flight"]
)
def test_frozen_parameters_that_one_rank_alone_moves_are_brought_together(averaging):
    for codes, total, uses in launch(_codebook, averaging, world_size=2):
        # the last batch is over when the strategy has already finished its round: its change is each rank's own
        assert codes[:8] == [0.5] * 8
        assert total - 4 * codes[8] == 4 * 8 * 0.5
        assert uses[:8] == [1] * 8


class Renaming(Regression):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == 6:  # behind the checkpoint of this step
            self.own = [p.detach().clone().numpy() for p in self.net.parameters()]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"renamed.{key}": value for key, value in checkpoint["state_dict"].items()}
        self.drop(checkpoint)

    @rank_zero_only
    def drop(self, checkpoint):
        del checkpoint["state_dict"]["renamed.net.0.bias"]


def _renaming(rank, folder):
    module = Renaming()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    trainer(local_update(FixedPeriod(4)), 2, callbacks=[save], enable_checkpointing=True, max_steps=7).fit(
        module, loader(18, rank)
    )
    return module.own


def test_a_hook_that_renames_what_is_saved_finds_averages(tmp_path):
    one, two = launch(_renaming, str(tmp_path), world_size=2)
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    assert "renamed.net.0.bias" not in saved
    np.testing.assert_allclose(saved["renamed.net.0.weight"].numpy(), (one[0] + two[0]) / 2, rtol=0, atol=1e-15)
    assert (one[0] != two[0]).any()


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return (self.samples[index] for index in range(len(self.samples)))


def test_uneven_data_of_unknown_length_is_named_also_when_validation_comes_first():
    def run(rank):
        data = DataLoader(Stream(Samples(4 * (10 - 2 * rank), rank)), batch_size=4)
        runner = trainer(local_update(FixedPeriod(9)), 2, limit_val_batches=1)
        runner.fit(Regression(), data, loader(1, rank))

    for _, error in outcomes(run, world_size=2, timeout_s=40):
        assert "rank 1 stopped after 8, at optimizer step 8" in error


def test_loaders_that_become_unequal_on_reload_are_refused():
    class Reloading(Regression):
        def train_dataloader(self):
            return loader(6 + self.current_epoch * self.global_rank, self.global_rank)

    def run(rank):
        trainer(local_update(FixedPeriod(4)), 2, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Reloading())

    for _, error in outcomes(run, world_size=2, timeout_s=40):
        assert "different numbers of training batches, [6, 7] by rank" in error


def test_pruning_within_the_run_is_refused():
    def run(rank):
        with pytest.raises(MisconfigurationException, match=r"ModelPruning chooses a mask.*Prune before training"):
            trainer(local_update(FixedPeriod(4)), 1, callbacks=[ModelPruning("l1_unstructured", amount=0.5)]).fit(
                Regression(), loader(4, rank)
            )

    launch(run, world_size=1)


def _longer_gradient_phase(rank, folder, step):
    def fit(gradient_steps, **kwargs):
        module, watch = Regression(network(), adamw), Watch()
        strategy = local_update(FixedPeriod(4), gradient_steps=gradient_steps)
        runner = trainer(strategy, 2, callbacks=[watch, Stop(step, path, goes_on=True)], max_epochs=2)
        runner.fit(module, loader(8, rank), **kwargs)
        return watch

    path = f"{folder}/{step}.ckpt"

    class Watch(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, runner, module, *args):
            self.seen[runner.global_step] = weights(module)

    fit(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = fit(12, ckpt_path=path)
    return watch.seen, [str(w.message) for w in caught if "gradient_steps" in str(w.message)]


@pytest.mark.parametrize("stopped_at", [6, 7], ids=["synchronised", "mid-round"])
def test_a_run_resumed_into_a_gradient_phase_goes_on_from_equal_weights(tmp_path, stopped_at):
    (one, said), (two, _) = launch(_longer_gradient_phase, str(tmp_path), stopped_at, world_size=2)
    assert min(one) == stopped_at + 1
    for step in range(stopped_at + 1, 13):
        for mine, theirs in zip(one[step], two[step], strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=f"step {step}")
    assert len(said) == 1
    assert "`gradient_steps`=12" in said[0]


def test_auto_alpha_takes_the_peak_that_a_schedule_of_factors_reaches():
    def run(rank):
        module = Regression(
            network(), lambda p: torch.optim.AdamW(p, lr=1.0), lambda step: 0.01 * min((step + 1) / 4, (10 - step) / 7)
        )
        strategy = local_update(QuadraticPeriod())
        trainer(strategy, 1).fit(module, loader(9, rank))
        return strategy._run.settings.period.alpha

    assert launch(run, world_size=1)[0] == pytest.approx(2.19 * 0.01)


class Raw(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = network()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        nn.functional.mse_loss(self.net(batch[0]), batch[1]).backward()
        optimizer.step()

    def configure_optimizers(self):
        return adamw(self.parameters())


def test_steps_that_cannot_be_counted_are_warned_of():
    def run(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = Raw()
            trainer(local_update(FixedPeriod(4)), 2).fit(module, loader(9, rank))
        return [str(w.message) for w in caught if "no step of the counted optimizer" in str(w.message)], weights(module)

    (said, one), (_, two) = launch(run, world_size=2)
    assert len(said) == 1
    assert "use_pl_optimizer=False" in said[0]
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Finetuned(Regression):
    def __init__(self):
        super().__init__(network(), lambda p: torch.optim.AdamW([x for x in p if x.requires_grad], lr=0.01))
        self.backbone = self.net[0]


def _finetuning(rank, path, resume):
    runner = trainer(
        local_update(FixedPeriod(4)),
        2,
        callbacks=[
            BackboneFinetuning(1, backbone_initial_lr=0.01, verbose=False),
            Stop(10, path, goes_on=True),
        ],
        max_epochs=3,
    )
    module = Finetuned()
    runner.fit(module, loader(6, rank), ckpt_path=path if resume else None)
    return runner.global_step, weights(module)


def test_a_run_with_a_backbone_unfrozen_on_the_way_resumes_in_mid_round(tmp_path):
    path = str(tmp_path / "a.ckpt")
    launch(_finetuning, path, False, world_size=2)
    one, two = launch(_finetuning, path, True, world_size=2)
    assert one[0] == two[0] == 18
    for mine, theirs in zip(one[1], two[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_ledger_and_history_of_a_fit_outlive_a_later_validation():
    def run(rank):
        strategy = local_update(FixedPeriod(4))
        runner = trainer(strategy, 2, limit_val_batches=1)
        module = Regression()
        runner.fit(module, loader(9, rank), loader(1, rank))
        before = len(strategy.history), strategy.ledger.payload_bytes("parameters")
        runner.validate(module, loader(1, rank), verbose=False)
        return before, (len(strategy.history), strategy.ledger.payload_bytes("parameters"))

    for before, after in launch(run, world_size=2):
        assert before == after
        assert before[0] == 3


def _failing_in(where):
    class Failing(Regression):
        pass

    def fail(self, *args):
        if self.global_rank == 1 and not self.trainer.sanity_checking:
            raise ValueError("boom in validation")
        if where == "validation_step":
            Regression.validation_step(self, *args)

    setattr(Failing, where, fail)

    def run(rank):
        runner = trainer(local_update(FixedPeriod(4)), 2, limit_val_batches=2, val_check_interval=6)
        runner.fit(Failing(), loader(12, rank), loader(2, rank))

    return outcomes(run, world_size=2, timeout_s=40)


WHERE = ["on_validation_epoch_end", "on_validation_start", "validation_step"]


@pytest.fixture(scope="module")
def failed():
    """What ranks said, by the place of the failure; launched side by side, since ranks that fail mostly wait."""
    with ThreadPoolExecutor(len(WHERE)) as threads:
        return dict(zip(WHERE, threads.map(_failing_in, WHERE), strict=True))


@pytest.mark.parametrize("where", WHERE)
def test_an_error_around_validation_is_shown_on_the_other_ranks(failed, where):
    (_, first), (_, second) = failed[where]
    assert "ValueError: boom in validation" in second
    assert "rank 1 failed: ValueError: boom in validation" in first
