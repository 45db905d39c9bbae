"""What Lightning says of a run is said under our strategies too, where its users look for it.

The oracle is plain `ddp`: the lines that rank 0 logs there, from the same runs.
"""

import logging
import os
import re
import signal
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.cyclic import deep
from support.partition import ddp
from support.processes import launch
from support.training import Regression, loader, local_update, trainer
from tqdm.std import tqdm

from lightning_comm import CompressedDDPStrategy, CyclicStrategy, FixedPeriod

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")
WAIT = timedelta(seconds=40)
OURS = {
    "local": lambda: local_update(FixedPeriod(2)),
    "compressed": lambda: CompressedDDPStrategy("int8", timeout=WAIT),
    "cyclic": lambda: CyclicStrategy(timeout=WAIT),
}
STRATEGIES = {"ddp": ddp, **OURS}
SAID = {  # the heads of lines without which a test of sets would prove nothing
    "time": ["Time limit reached. Elapsed time is #. Signaling Trainer to stop."],
    "quiet time": [],
    "early": [
        "[rank: #] Metric val_loss improved",
        "[rank: #] Monitored metric val_loss did not improve in the last",
        "Trainer was signaled to stop but the required `min_epochs=#` or `min_steps=None` has not been met.",
        "Epoch #, global step #: 'val_loss' reached # (best #), saving model to",
    ],
    "steps": ["`Trainer.fit` stopped: `max_steps=#` reached."],
    "rate": ["Restoring states from the checkpoint path"],
    "resumed": ["Restored all states from the checkpoint", "You're resuming from a checkpoint that ended before the"],
    "terminated evaluation": ["[rank: #] Received SIGTERM: #"],
    "terminated": ["[rank: #] Received SIGTERM: #"],
    "interrupted": ["Detected KeyboardInterrupt, attempting graceful shutdown ..."],
}


class Obeys(Regression):
    """Does something at its fourth batch, on every rank, and is slow where it is told to be."""

    def __init__(self, at_fourth=lambda: None, pause_s=0.0):
        super().__init__(deep(4), lambda parameters: torch.optim.SGD(parameters, 0.01))
        self.lr, self.at_fourth, self.pause_s = 0.01, at_fourth, pause_s

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            self.at_fourth()
        time.sleep(self.pause_s)
        return super().training_step(batch, batch_idx)


class TerminatedEvaluation(Obeys):
    def validation_step(self, batch, batch_idx):
        _terminate()


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt():
    raise KeyboardInterrupt


class _Keep(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        line = re.sub(r"\.lr_find_[\w-]+", "", record.getMessage())
        self.lines.append(re.sub(r"\d+(?:[.:]\d+)*", "#", line).strip())


@contextmanager
def _listening(said, case):
    keep, loggers = _Keep(), [logging.getLogger(f"lightning.{each}") for each in ("pytorch", "fabric")]
    for each in loggers:
        each.addHandler(keep)
        each.setLevel(logging.INFO)  # ranks end after their runs
    logging.getLogger("py.warnings").addHandler(keep)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # also what an earlier run in this process has said
            logging.captureWarnings(True)
            yield
    except (SIGTERMException, SystemExit):
        pass  # how such a run ends under `ddp` too
    finally:
        logging.captureWarnings(False)
        for each in (*loggers, logging.getLogger("py.warnings")):
            each.removeHandler(keep)
        said[case] = set(keep.lines)


@patch.object(tqdm, "monitor_interval", 0)  # no thread that watches bars
def _runs(rank, name):
    def runner(**kwargs):
        return trainer(STRATEGIES[name](), 2, **{"max_epochs": 2, "limit_val_batches": 1, **kwargs})

    def fit(case, module=None, ckpt_path=None, **kwargs):
        with _listening(said, case):
            runner(**kwargs).fit(module or Obeys(), loader(4, rank), loader(1, rank), ckpt_path=ckpt_path)

    said, forever = {}, {"max_epochs": -1, "limit_val_batches": 0}
    never_better = {"monitor": "val_loss", "patience": 0, "min_delta": 100.0, "verbose": True}
    soon = timedelta(seconds=0.1)
    fit("time", Obeys(pause_s=0.02), callbacks=[Timer(soon)], **forever)
    fit("quiet time", Obeys(pause_s=0.02), callbacks=[Timer(soon, verbose=False)], **forever)
    best = ModelCheckpoint(f"saved {name}", monitor="val_loss", verbose=True, filename="best")
    fit("early", callbacks=[EarlyStopping(**never_better), best], enable_checkpointing=True, max_epochs=5, min_epochs=3)
    fit("rate", callbacks=[LearningRateFinder(max_lr=0.01, num_training_steps=8, early_stop_threshold=None)])
    middle = ModelCheckpoint(f"middle {name}", every_n_train_steps=3, filename="middle")
    fit("steps", callbacks=[middle], enable_checkpointing=True, max_steps=3, max_epochs=-1)
    fit("resumed", ckpt_path=f"middle {name}/middle.ckpt")
    with _listening(said, "terminated evaluation"):
        runner().validate(TerminatedEvaluation(), loader(1, rank))
    fit("terminated", Obeys(_terminate), callbacks=[ModelCheckpoint(f"ended {name}")], enable_checkpointing=True)
    with _listening(said, "interrupted"):
        trainer(STRATEGIES[name](), 2).fit(Obeys(_interrupt), loader(4, rank))
    return said


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("words"))
        return {name: launch(_runs, name, world_size=2)[0] for name in STRATEGIES}


@pytest.mark.parametrize("case", SAID)
@pytest.mark.parametrize("name", OURS)
def test_every_line_of_lightnings_is_there_as_under_ddp(answers, name, case):
    plain = answers["ddp"][case]
    assert [head for head in SAID[case] if not any(head in line for line in plain)] == []
    names = {line.replace("saved ddp", f"saved {name}").replace("middle ddp", f"middle {name}") for line in plain}
    assert names - answers[name][case] == set()


@pytest.mark.parametrize("name", OURS)
def test_a_quiet_timer_stays_quiet(answers, name):
    assert not any(line.startswith("Time limit reached") for line in answers[name]["quiet time"])
