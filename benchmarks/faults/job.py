"""One rank of a run that a fault may hit: a small real training with checkpoints."""

import faulthandler
import json
import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from benchmarks.faults.model import STRATEGIES, loader_of, model_of, validation_loader
from benchmarks.faults.plan import CHECKPOINTS, SAVE_EVERY, STEPS, VALIDATE_EVERY
from benchmarks.faults.strike import Fault
from lightning_comm import AdaptivePartition

_SAVES: dict[str, dict[str, Any]] = {
    "top1": {},
    "all": {"save_top_k": -1},
    "last": {"save_top_k": 0, "save_last": True},
    "top1_last": {"save_last": True},
    "link": {"save_last": "link"},
    "on_exception": {"save_on_exception": True},
    "async": {},
}


class Watch(Callback):
    """Tells the fault where the run is.

    Args:
        fault: What happens to this rank.

    """

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fault.at("setup")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"START rank {trainer.global_rank} at step {trainer.global_step}", flush=True)
        self._fault.at("train_start", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._fault.at("batch_start", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._fault.at("batch_end", trainer.global_step) == "should_stop":
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fault.at("validation_end")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._fault.at("save")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fault.at("epoch_end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fault.at("train_end")


class SlowIO(TorchCheckpointIO):
    """Files that take long to write, and a log of those that are whole.

    Args:
        seconds: How long each takes.
        log: Takes a path for each.

    """

    def __init__(self, seconds: float, log: Path) -> None:
        super().__init__()
        self._seconds, self._log = seconds, log

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        time.sleep(self._seconds)
        super().save_checkpoint(checkpoint, path, storage_options)
        with self._log.open("a") as file:
            file.write(f"{path}\n")


def run(order: dict[str, Any]) -> None:
    """Train as one rank.

    Args:
        order: ``case``, or ``None``; ``how`` it is hurt; ``strategy``, ``ranks``, ``saves``, ``partition``,
            ``step_ms``, ``detail``; ``folder`` of this process's logs, ``files`` of checkpoints; ``timeout_s``;
            ``resume``: a checkpoint, or ``None``; ``loader``, ``workers``, ``fewer``: of the loader.

    """
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    rank = int(os.environ["RANK"] if "RANK" in os.environ else os.environ["SLURM_PROCID"])
    ranks, folder = order["ranks"], order["folder"]
    fault = Fault(order["case"], folder, rank, ranks, order["how"])
    fault.at("start")
    fault.watch_files(os.path.join(order["files"], CHECKPOINTS))
    trainer = _trainer(order, rank, fault)
    _log_saves(trainer, Path(folder, f"saves{rank}.txt"))
    pause = partial(time.sleep, order["step_ms"][rank] / 1000)
    model = model_of(order["strategy"], (order["case"] or {}).get("place", ""), fault.at, pause)
    loader = loader_of(
        order["loader"], rank, ranks, fault.at, workers=order["workers"], fewer=order["fewer"][rank]
    )  # fmt: skip
    trainer.fit(model, loader, validation_loader(), ckpt_path=order["resume"])
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    np.savez(Path(folder, f"final{rank}.npz"), steps=trainer.global_step, **weights)  # type: ignore[arg-type]
    print(f"DONE rank {rank} at step {trainer.global_step}", flush=True)
    fault.at("finish")


def _trainer(order: dict[str, Any], rank: int, fault: Fault) -> Trainer:
    files, streams = order["files"], order["loader"] == "stream"
    more: dict[str, Any] = {}
    callbacks: list[Callback] = [Watch(fault)]
    if order["partition"] != "none":
        shares: dict[str, Any] = {"mode": "fixed", "shares": [1 + each for each in range(order["ranks"])]}
        balance = {"window_steps": 8, "warmup_steps": 2}
        settings = shares if order["partition"] == "fixed" else balance
        callbacks.append(AdaptivePartition(folder=os.path.join(files, "partition"), **settings))
    callbacks.append(
        ModelCheckpoint(
            os.path.join(files, CHECKPOINTS),
            filename="s{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=SAVE_EVERY,
            save_on_train_epoch_end=False,
            **_SAVES[order["saves"]],
        )
    )
    if order["saves"] == "async":
        slow = SlowIO(order["detail"].get("slow_s", [0.0] * 9)[rank], Path(order["folder"], f"written{rank}.txt"))
        more["plugins"] = [AsyncCheckpointIO(slow)]
    if order["how"] == "max_time_all":
        more["max_time"] = timedelta(seconds=order["detail"]["seconds"])
    return Trainer(
        strategy=STRATEGIES[order["strategy"]](timedelta(seconds=order["timeout_s"])), accelerator="cpu",
        num_nodes=order["nodes"], devices=order["ranks"] // order["nodes"], max_steps=STEPS, max_epochs=-1,
        val_check_interval=None if streams else VALIDATE_EVERY, limit_val_batches=2, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=callbacks, default_root_dir=files, log_every_n_steps=5, **more,
    )  # fmt: skip


def _log_saves(trainer: Trainer, log: Path) -> None:
    """Let a rank write down every save that it came out of."""
    save = trainer.save_checkpoint

    def logged(filepath: Any, *args: Any, **kwargs: Any) -> None:
        save(filepath, *args, **kwargs)
        with log.open("a") as file:
            file.write(json.dumps([trainer.global_step, str(filepath), time.time()]) + "\n")

    trainer.save_checkpoint = logged  # type: ignore[method-assign]
