"""From which shares a run starts: chosen, replayed, or those of the run that it resumes."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_comm.callbacks.adaptive_partition.checks import has_batch_norm
from lightning_comm.callbacks.adaptive_partition.settings import PartitionSettings
from lightning_comm.core.adaptive_partition.plan import PartitionPlan, Place
from lightning_comm.core.adaptive_partition.shares import UNBOUNDED, proportional_sizes
from lightning_comm.core.ledger import CommLedger
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.formats.adaptive_partition import PartitionJournal, Window
from lightning_comm.instruments.clocks import json_from_rank_0
from lightning_comm.lightning_internals import load_skipped_loader_states

_WHERE = "AdaptivePartition"


class StartOfRun:
    """The plan that a run begins with, and what is known of an earlier part of it.

    Args:
        trainer: The Trainer, when training starts.
        module: The model.
        settings: What the user chose.
        loaders: Those of the training data, alike on all ranks.
        loaded: What a checkpoint kept.
        ledger: Where messages are written down.

    Attributes:
        run: What a journal must agree with.
        lo: The least that each rank takes.
        hi: The most.
        plan: Which shares hold from where.
        why: What the changes in it come from, by place.
        replays: Whether the plan is that of an earlier run.
        balancer: What is known of the ranks' speeds, if they are the ranks of before.
        windows: What was measured before.

    Raises:
        ValueError: On all ranks alike, if what the user chose does not fit the data, or the journal the run.

    Note:
        *Communication.* With ``replay`` the journal from rank 0.

    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        settings: PartitionSettings,
        loaders: list[PartitionedLoader],
        loaded: dict[str, Any] | None,
        ledger: CommLedger,
    ) -> None:
        self._settings = settings
        first = loaders[0].settings
        total = int(first["global_batch_size"])
        with_norm = has_batch_norm(module)
        self.lo, self.hi = settings.bounds(trainer.world_size, total, with_norm)
        self.run = {
            **first,
            "ranks": trainer.world_size,
            "steps_per_epoch": len(loaders[0]),
            "min_per_rank": list(self.lo),
            "max_per_rank": [None if most == UNBOUNDED else most for most in self.hi],
        }
        sizes = settings.first_sizes(trainer.world_size, total, self.lo, self.hi)
        self.plan = PartitionPlan(sizes, hi=self.hi, lo=self.lo)
        self.why: dict[Place, str] = {Place(0, 0): "start"}
        self.windows: list[Window] = []
        self.balancer: dict[str, Any] | None = None
        self.replays = settings.replay is not None
        _check_merged_batch(loaders, self.hi)
        load_skipped_loader_states(trainer)
        if settings.replay is not None:
            self._replay(trainer, settings.replay, ledger)
        elif loaded is not None:
            self._resume(loaded, max(Place(trainer.current_epoch, 0), *(loader.dispatched for loader in loaders)))
        if with_norm and trainer.world_size > 1:
            rank_zero_info(
                f"{_WHERE}: the model has BatchNorm, which normalises by each rank's own samples, so results depend on "
                "the split, and DDP keeps the running statistics of rank 0. SyncBatchNorm (on GPUs) has neither effect."
            )
        if with_norm:
            _warn_of_single_samples(loaders, trainer.world_size)

    def _replay(self, trainer: Trainer, path: str, ledger: CommLedger) -> None:
        journal = PartitionJournal.from_dict(_journal_of_rank_0(trainer, path, ledger))
        different = journal.mismatch(self.run)
        if different:
            raise ValueError(
                f"{_WHERE}: `replay` must be the journal of a run like this one; got {path!r}, which differs: "
                f"{'; '.join(different)}. Restore these, or leave `replay` out."
            )
        outside = [list(change.sizes) for change in journal.changes if not self._within_bounds(change.sizes)]
        if outside:
            raise ValueError(
                f"{_WHERE}: `replay` must keep to the bounds of this run; got {path!r}, in which ranks take "
                f"{outside[0]} samples, with at least {list(self.lo)} and at most {list(self.hi)}. Change "
                "`min_per_rank` or `max_per_rank`, or leave `replay` out."
            )
        self.plan = journal.plan(self.hi, self.lo)
        self.why = {change.place: "replay" for change in journal.changes}

    def _resume(self, loaded: dict[str, Any], place: Place) -> None:
        if loaded.get("version") != 1:
            rank_zero_warn(
                f"{_WHERE}: the checkpoint holds shares of version {loaded.get('version')!r}, which this version of "
                f"lightning_comm cannot read. The run goes on from the shares {list(self.plan.sizes)}, and measures "
                "anew."
            )
            return
        same = all(loaded["run"][name] == self.run[name] for name in ("ranks", "global_batch_size"))
        if not same:
            before = loaded["run"]
            self.why[Place(0, 0)] = f"start, resumed at batch {place.batch} of epoch {place.epoch}"
            rank_zero_warn(
                f"{_WHERE}: the run is resumed on {self.run['ranks']} ranks with a global batch of "
                f"{self.run['global_batch_size']}, and was stopped on {before['ranks']} ranks with one of "
                f"{before['global_batch_size']}. It goes on from the shares {list(self.plan.sizes)}, and measures anew."
            )
            return
        chosen = self.plan.sizes
        self.plan.load_state_dict(loaded["plan"])
        self.balancer = loaded["balancer"]
        self.windows = [Window(**each) for each in loaded["record"]["windows"]]
        self.why = {Place(epoch, batch): why for epoch, batch, why in loaded["record"]["why"]}
        now = self.plan.sizes_at(place)
        to_come = [now, *(change.sizes for change in self.plan.changes if change.place > place)]
        if self._settings.mode == "fixed":
            self._restart(place, chosen, "resumed with other shares")
        elif not all(self._within_bounds(sizes) for sizes in to_come):
            within = proportional_sizes(sum(now), to_come[-1], self.lo, self.hi)
            self._restart(place, within, "resumed with other bounds")

    def _within_bounds(self, sizes: tuple[int, ...]) -> bool:
        return all(least <= size <= most for least, size, most in zip(self.lo, sizes, self.hi, strict=True))

    def _restart(self, place: Place, sizes: tuple[int, ...], why: str) -> None:
        if self.plan.sizes_at(place) != sizes or self.plan.changes[-1].place > place:
            self.plan.restart_at(place, sizes)
            self.why[place] = why


def _warn_of_single_samples(loaders: list[PartitionedLoader], ranks: int) -> None:
    """Say that a last batch leaves a rank one sample, or a dummy, which BatchNorm may refuse in the middle of a run."""
    for loader in loaders:
        left = int(loader.settings["samples"]) % int(loader.settings["global_batch_size"])
        if loader.settings["tail"] == "keep" and 0 < left < 2 * ranks:
            rank_zero_warn(
                f"{_WHERE}: the last batch of an epoch has {left} samples for {ranks} ranks, so some have one, and "
                "BatchNorm cannot train on one value per channel. Give the loader `tail='drop'` or `tail='merge'`."
            )


def _check_merged_batch(loaders: list[PartitionedLoader], hi: tuple[int, ...]) -> None:
    for loader in loaders:
        samples, total = int(loader.settings["samples"]), int(loader.settings["global_batch_size"])
        last = total + samples % total
        if loader.settings["tail"] == "merge" and sum(hi) < last:
            raise ValueError(
                f"{_WHERE}: `max_per_rank` must allow the last batch of an epoch, which with `tail`='merge' has {last} "
                f"samples; got bounds that sum to {sum(hi)}. Raise them, or give the loader `tail='keep'`."
            )


def _journal_of_rank_0(trainer: Trainer, path: str, ledger: CommLedger) -> dict[str, Any]:
    """Return what rank 0 reads. Other hosts may lack the file, so all ranks learn of it, and all refuse it alike."""
    content: dict[str, Any] = {}
    problem = ""
    if trainer.is_global_zero:
        try:
            content = PartitionJournal.load(path).to_dict()
        except Exception as error:  # whatever it is, the others wait for word of it
            problem = str(error)
    content, problem = json_from_rank_0((content, problem), trainer.strategy.root_device, ledger, "set_up")
    if problem:
        raise ValueError(
            f"{_WHERE}: `replay` must be the journal of an earlier run, on rank 0; got {path!r}. {problem}"
        )
    return content
