"""Runs that write down which samples they were given, and save everywhere."""

import pathlib
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader


class Recorder(LightningModule):
    """Writes down which samples it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """Saves in every hook in which checkpoints are saved; the name tells how many batches were seen."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def _save(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{hook}-{trainer.current_epoch}-{len(module.seen)}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._save("batch", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._save("validation", trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._save("epoch", trainer, pl_module)


def train(loader, folder=None, ckpt_path=None, validate=True, **trainer_args) -> list[list[int]]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveEverywhere(folder)] if folder else [],
        **trainer_args,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises on workers and logging
        trainer.fit(module, loader, DataLoader(range(4)) if validate else None, ckpt_path=ckpt_path)
    return module.seen


def batches_done(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.stem.split("-")[-1])
