"""An image classifier around any model of the timm library."""

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_comm.examples.schedule import LrSchedule, ScheduleName

Batch = tuple[Tensor, Tensor]


class TimmClassifier(LightningModule):
    """Trains a timm model to name the class of an image.

    It logs ``train_loss`` of each rank's own batch, and over all ranks ``val_loss``, ``val_accuracy``, ``test_loss``
    and ``test_accuracy``. Batches are pairs of images and class numbers.

    Args:
        model_name: A name from ``timm.list_models()``.
        num_classes: How many classes there are; at least 2.
        model_args: Arguments of ``timm.create_model``: ``img_size``, ``in_chans``, ``embed_dim``, ``pretrained``, …
        optimizer: AdamW, or SGD with momentum.
        lr: The peak learning rate, which the optimizer knows as ``initial_lr``; more than 0.
        weight_decay: Decoupled for AdamW, in the gradient for SGD; at least 0.
        momentum: For SGD; at least 0 and less than 1.
        schedule: How the rate falls after the warm-up, step by step (:class:`LrSchedule`).
        warmup_steps: Optimizer steps until the peak is reached.
        final_lr: Where the warm-up starts and the cosine ends.
        decay_at_steps: For schedule ``"step"``: the optimizer steps after which the rate is lower.
        decay_factor: For schedule ``"step"``: the factor by which the rate is multiplied each time.
        label_smoothing: Share of each label that is spread over all classes, in training only; at least 0, less than 1.

    Raises:
        ValueError: If an argument is out of range, timm has no such model, or, when training starts, the run is of
            unknown length or ends in the warm-up.
        TypeError: If the model does not take ``model_args``.

    Note:
        *Communication.* None in training steps. Metrics are reduced when a validation or test ends.

    Example:
        >>> small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
        >>> classifier = TimmClassifier("vit_tiny_patch16_224", num_classes=10, model_args=small)
        >>> classifier(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    """

    def __init__(  # noqa: PLR0913  # one flat list, so that each is one word in a config and on the command line
        self,
        model_name: str,
        num_classes: int,
        model_args: dict[str, Any] | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        schedule: ScheduleName = "cosine",
        warmup_steps: int = 0,
        final_lr: float = 0.0,
        decay_at_steps: Sequence[int] = (),
        decay_factor: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check_arguments(num_classes, optimizer, weight_decay, momentum, label_smoothing)
        self.save_hyperparameters()
        self.lr_schedule = LrSchedule(lr, schedule, warmup_steps, final_lr, tuple(decay_at_steps), decay_factor)
        self.model = _create_model(model_name, num_classes, model_args or {})
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self._total_steps = math.inf

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits: one number per image and class, the highest for the predicted class."""
        logits: Tensor = self.model(images)
        return logits

    @override
    def on_train_start(self) -> None:
        # Not in `configure_optimizers`: there it makes Lightning drop the state of the train loader from the
        # checkpoint (Lightning issue 20550). Only the rate of step 0 is needed earlier, and that is known.
        self._total_steps = self.trainer.estimated_stepping_batches
        if not getattr(self.trainer, "fast_dev_run", False):  # a trial of a few batches may well end in the warm-up
            self.lr_schedule.check_run_length(self._total_steps)
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LambdaLR) and scheduler.lr_lambdas == [self._share_of_peak]:
                scheduler.lr_lambdas = [self.lr_schedule.share_of_peak(self._total_steps)]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        # This rank's loss alone: a reduction would be a blocking message in every step, which this project avoids.
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", self.val_accuracy, batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", self.test_accuracy, batch)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the class number of each image."""
        logits: Tensor = self(batch[0])
        return logits.argmax(dim=1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with the peak rate as its ``initial_lr``, and a scheduler that moves in every step."""
        peak, weight_decay = self.lr_schedule.lr, self.hparams["weight_decay"]
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=peak, weight_decay=weight_decay)
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), lr=peak, momentum=self.hparams["momentum"], weight_decay=weight_decay
            )
        scheduler = LambdaLR(optimizer, self._share_of_peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _share_of_peak(self, step: int) -> float:
        """Return the rate as long as the length of the run is not known."""
        return self.lr_schedule.rate(step, total_steps=self._total_steps) / self.lr_schedule.lr

    def _evaluate(self, part: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log(f"{part}_loss", loss, on_epoch=True, sync_dist=True, batch_size=len(labels))
        self.log(f"{part}_accuracy", accuracy, on_epoch=True, prog_bar=True, batch_size=len(labels))


def _create_model(model_name: str, num_classes: int, model_args: dict[str, Any]) -> nn.Module:
    # A colon means that the model is not timm's own but fetched by address, which only timm can judge.
    if ":" not in model_name and not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        raise ValueError(
            f"TimmClassifier: `model_name` must be a name that timm knows; got {model_name!r}. "
            + (f"Near it are {', '.join(near)}." if near else "timm.list_models() has them all.")
        )
    try:
        model: nn.Module = timm.create_model(model_name, num_classes=num_classes, **model_args)
    except TypeError as error:
        raise TypeError(
            f"TimmClassifier: `model_args` must be arguments of timm's {model_name}; got {model_args!r}. timm says: "
            f"{error}."
        ) from error
    return model


def _check_arguments(
    num_classes: int, optimizer: str, weight_decay: float, momentum: float, label_smoothing: float
) -> None:
    if num_classes < 2:
        raise ValueError(
            f"TimmClassifier: `num_classes` must be >= 2; got {num_classes!r}. Two classes are two numbers per image."
        )
    if optimizer not in ("adamw", "sgd"):
        raise ValueError(
            f"TimmClassifier: `optimizer` must be 'adamw' or 'sgd'; got {optimizer!r}. For another one, override "
            "`configure_optimizers`."
        )
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(
            f"TimmClassifier: `weight_decay` must be finite and >= 0; got {weight_decay!r}. 0 leaves it out."
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"TimmClassifier: `momentum` must be >= 0 and < 1; got {momentum!r}. 0 leaves it out.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"TimmClassifier: `label_smoothing` must be >= 0 and < 1; got {label_smoothing!r}. 0 leaves it out."
        )
