"""One training run of the demo, in processes of its own: ``python -m lightning_comm.cli.demo.run SETTINGS RESULT``.

``SETTINGS`` is a :class:`RunSettings` as JSON, and ``RESULT`` the file that rank 0 writes. While it runs, rank 0 prints
one line of JSON for each validation, marked by ``PROGRESS``, so that its parent process can show how far it is.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from lightning_comm.core.ledger import wire_bytes
from lightning_comm.examples import DigitsData, TimmClassifier
from lightning_comm.strategies import LocalUpdateStrategy

PROGRESS = "@progress "

# What training sends. Counted apart from it: "start" (equal weights at the beginning, which DDP sends as well) and
# "evaluation" (averages for a validation in the middle of a round).
TRAINING_PURPOSES = ("gradients", "parameters", "buffers", "optimizer_state", "weight_averages", "control")

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
WEIGHT_DECAY = 0.05
WARMUP_SHARE = 0.1  # of the run
_VALIDATIONS = 20  # about the most points on the curves


@dataclass(frozen=True)
class RunSettings:
    """The settings in which runs of the demo differ.

    Args:
        method: The name of the strategy, without the way of starting processes: ``"ddp"``, ``"local_sgd"``, ``"qsr"``.
        seed: Of the weights, the order of the images and everything else.
        devices: Number of processes.
        epochs: Passes through the training images.
        lr: Peak learning rate.
        batch_size: Images per batch and process.

    """

    method: str
    seed: int
    devices: int
    epochs: int
    lr: float
    batch_size: int

    @property
    def validation_epochs(self) -> int:
        """After how many epochs a validation runs; divides ``epochs``, so that the last one is followed by one."""
        longest = max(1, self.epochs // _VALIDATIONS)
        return next(n for n in range(longest, 0, -1) if self.epochs % n == 0)


class Observer(Callback):
    """Notes on rank 0 what a run did, and writes it to a file when the run ends."""

    def __init__(self, settings: RunSettings, result_file: Path) -> None:
        self._settings = settings
        self._result_file = result_file
        self._began_s = 0.0
        self._lrs: list[float] = []
        self._curve: list[dict[str, float]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_s = time.monotonic()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lrs.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        point = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "accuracy": float(trainer.callback_metrics["val_accuracy"]),
            "training_wire_bytes": _training_wire_bytes(trainer, pl_module),
            "wall_s": time.monotonic() - self._began_s,
        }
        self._curve.append(point)
        if trainer.is_global_zero:
            # in one piece: `print` may write the end of the line separately, and other ranks write to the same pipe
            sys.stdout.write(f"\n{PROGRESS}{json.dumps(point)}\n")
            sys.stdout.flush()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wall_s = time.monotonic() - self._began_s
        strategy = trainer.strategy if isinstance(trainer.strategy, LocalUpdateStrategy) else None
        rounds = strategy.history if strategy else []
        result = {
            **asdict(self._settings),
            "world_size": trainer.world_size,
            "steps": trainer.global_step,
            "samples": trainer.global_step * self._settings.batch_size * trainer.world_size,
            "parameter_bytes": _bytes_of(p for p in pl_module.parameters() if p.requires_grad),
            "accuracy": self._curve[-1]["accuracy"],
            "synchronisations": len(rounds) if strategy else trainer.global_step,
            "training_wire_bytes": _training_wire_bytes(trainer, pl_module),
            "evaluation_wire_bytes": strategy.ledger.wire_bytes("evaluation") if strategy else 0,
            "wire_bytes": {name: strategy.ledger.wire_bytes(name) for name in strategy.ledger.purposes}
            if strategy
            else {},
            "wall_s": wall_s,
            "lrs": self._lrs,
            "rounds": [{"end_step": r.step, "period_steps": r.period_steps, "drift": r.drift} for r in rounds],
            "curve": self._curve,
        }
        if trainer.is_global_zero:
            self._result_file.write_text(json.dumps(result))


def _training_wire_bytes(trainer: Trainer, module: LightningModule) -> int:
    strategy = trainer.strategy
    if isinstance(strategy, LocalUpdateStrategy):
        return strategy.ledger.wire_bytes(*TRAINING_PURPOSES)
    # DDP sends one mean of the gradients a step, and before each forward the buffers of rank 0.
    gradients = _bytes_of(p for p in module.parameters() if p.requires_grad)
    buffers = _bytes_of(module.buffers())
    ranks = trainer.world_size
    return trainer.global_step * (wire_bytes("all_reduce", gradients, ranks) + wire_bytes("broadcast", buffers, ranks))


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(settings: RunSettings, result_file: Path) -> None:
    """Train one model by one method, on CPU processes that are forked where the platform does that safely."""
    seed_everything(settings.seed, verbose=False)
    torch.set_num_threads(1)  # as many processes as devices share the cores
    data = DigitsData(batch_size=settings.batch_size, seed=settings.seed)
    steps_per_epoch = (
        len(data.train_dataloader()) // settings.devices
    )  # outside a Trainer the loader is that of one rank
    model = TimmClassifier(
        MODEL,
        num_classes=10,
        model_args=MODEL_ARGS,
        lr=settings.lr,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=round(WARMUP_SHARE * settings.epochs * steps_per_epoch),
    )
    trainer = Trainer(
        strategy=settings.method + ("_fork" if sys.platform == "linux" else "_spawn"),
        accelerator="cpu",
        devices=settings.devices,
        max_epochs=settings.epochs,
        check_val_every_n_epoch=settings.validation_epochs,
        callbacks=[Observer(settings, result_file)],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)


def start() -> None:
    """Train the run that the arguments of this process describe."""
    train(RunSettings(**json.loads(sys.argv[1])), Path(sys.argv[2]))
