"""Pruned weights of a run: the model is pruned by its schedule, and pruned weights are kept at zero.

The optimizer's state and averages of the weights are set to zero once, at each pruning; the weights after every step,
since some optimizers mix entries.

Order of messages, on every rank alike: before the forward of a step at which the schedule prunes, the masks (two small
messages and one for each masked parameter) and a comparison of 8 bytes; none in the steps between. Where the model
masks itself (:class:`ModulePruning`), two bytes with the last bucket of each step. If they show that a mask has changed
on any rank, a comparison of 8 bytes before the next forward, and the gradients of that step are sent in full.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_comm.core.compression.pruning_schedule import PruningSchedule, break_even_share
from lightning_comm.core.costs import LinkProfile
from lightning_comm.lightning_internals import weight_average_of
from lightning_comm.ondevice.packing import ROW_BYTES, packing_times
from lightning_comm.ondevice.pruning import Masks, PruningContext, checked_masks
from lightning_comm.ondevice.pruning.base import Pruning, warn_of
from lightning_comm.strategies.common.run_length import steps_to_come
from lightning_comm.strategies.common.sent_bytes import handed_over_bytes
from lightning_comm.strategies.common.training_samples import training_samples
from lightning_comm.strategies.sparse_mask.start_line import share_pruned
from lightning_comm.transport.compression.mask_agreement import agree, check_agreement, raise_problem_of_rank_0
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.recording import Recorder


class _OwnMasks:
    """The masks of a model that masks itself, compared with those that are installed.

    Args:
        module: The model.
        pruning: Reads them.
        installed: Returns those that are installed.

    """

    def __init__(self, module: LightningModule, pruning: Pruning, installed: Callable[[], Masks]) -> None:
        self._module, self._pruning, self._installed = module, pruning, installed
        self._watched: list[tuple[Tensor, int]] = []  # the mask buffers at the last comparison, each with its version
        self._differs: bool | Tensor = False  # result of the comparison; a tensor is not read by the host

    def have_changed(self) -> bool | Tensor:
        """Whether a mask in the model differs from the one installed; bits are compared only where it may differ.

        A comparison of bits is returned as a tensor on the model's device, since the host would have to wait for it.
        """
        buffers = [buffer for name, buffer in self._module.named_buffers() if name.endswith("_mask")]
        if len(buffers) != len(self._watched) or any(
            now is not then or now._version != version
            for now, (then, version) in zip(buffers, self._watched, strict=True)
        ):  # also if written anew with the same bits, as DDP does before each forward
            self._differs = _differs(self._pruning.present(self._module), self._installed())
            self._watched = [(buffer, buffer._version) for buffer in buffers]
        return self._differs

    def compare_anew(self) -> None:
        """Compare the bits at the next call: a resumed run has both the model's masks and the installed ones."""
        self._watched = []

    def read(self) -> Masks:
        """Return the masks, on any rank, without the warnings, which rank 0 has given already."""
        return self._pruning.masks(self._module, PruningContext(warn=lambda names, message: None))


class PrunedWeights:
    """The pruned weights of a run.

    Args:
        module: The model.
        codec: Sends gradients, and saves the masks.
        settings: Where masks come from.
        recorder: Sends and records.

    Attributes:
        before_change: Called before masks change, on all ranks alike: messages under way with the old ones must arrive
            first.

    """

    def __init__(
        self, module: LightningModule, codec: SparseMaskCodec, settings: SparseMask, recorder: Recorder
    ) -> None:
        self._module = module
        self._codec = codec
        self._settings = settings
        self._recorder = recorder
        self._pruned: list[tuple[Tensor, Tensor]] = []  # a parameter, and True where it is zero
        self._trainer: Trainer | None = None
        self._optimizers: list[Optimizer] = []
        self._own_masks = _OwnMasks(module, settings.pruning, lambda: codec.masks)
        self._said: set[tuple[str, str]] = set()  # which parameters have been warned of, and of what
        self.dense_steps = 0  # that has been reported as changed
        self.before_change: Callable[[], None] = lambda: None
        if settings.pruning.is_watched:
            codec.watch(self._own_masks.have_changed)

    def start(self, trainer: Trainer, optimizers: Iterable[Optimizer]) -> None:
        """Begin a run, with the masks of the one that is resumed.

        Raises:
            ValueError: On all ranks, if masks cannot be chosen or do not fit the model.

        """
        self._trainer, self._optimizers, self._pruned = trainer, list(optimizers), []
        self._recorder.step = trainer.global_step
        if self._codec.dense_above is None:
            self._codec.dense_above = self._break_even()
        if self._codec.masks:
            self._install_own(lambda: checked_masks(self._codec.masks, self._module, "SparseMask, from the checkpoint"))
            self._say_pruned("in the run that is resumed")
        _warn_of_late_steps(trainer, self._settings.schedule)

    def is_due(self, step: int) -> bool:
        """Whether weights are pruned from this step on, or have been."""
        return bool(self._codec.masks) or self._settings.schedule.last_due(step) is not None

    def before_step(self, step: int) -> None:
        """Prune if it is time. Called before every forward, with the number of optimizer steps done.

        That number is the same for all batches of an accumulation window, so weights are pruned before its first one.

        Raises:
            ValueError: On all ranks, if masks cannot be chosen or do not fit the model.

        """
        if self._codec.masks and self._codec.take_flag():
            self._recorder.step = step
            self._install_own(self._own_masks.read)
            self._codec.request_dense(1)
            self.dense_steps += 1
            if self.dense_steps == 1:
                rank_zero_info(
                    "SparseMask: the model's masks have changed, or it had gradients outside them. Before optimizer "
                    f"step {step} they are read anew, and what is sent next travels in full. Later times are not said."
                )
        due, pruned_at = self._settings.schedule.last_due(step), self._codec.pruned_at
        # masks that cannot be chosen gradually are chosen once, also where a run is resumed under another schedule
        chosen = pruned_at is not None and not hasattr(self._settings.pruning, "sparsity")
        if due is not None and due != pruned_at and not chosen:
            self._recorder.step = step
            self.before_change()
            self._install(self._choose(step))
            self._codec.pruned_at = due
            if not self._settings.schedule.is_gradual or pruned_at is None or due == self._settings.schedule.end_step:
                self._say_pruned(f"before optimizer step {step}")

    def install(self, masks: Mapping[str, Tensor]) -> None:
        """Use masks that every rank has, from the next step on.

        Raises:
            ValueError: On all ranks, if those of one do not fit the model.
            RuntimeError: On all ranks, if they differ.

        """
        self._install_own(lambda: checked_masks(masks, self._module, "CompressedDDPStrategy.install_masks"))

    def request_dense(self, n_steps: int) -> None:
        """Leave the gradients of the next steps whole."""
        self._codec.request_dense(n_steps)

    def suspects(self) -> str:
        """Return a sentence that names masks under which dividing by the norm of a row is a division by zero."""
        emptied = [
            name
            for name, mask in self._codec.masks.items()
            if mask.dim() > 1 and not bool(mask.flatten(1).any(1).all())
        ]
        if not emptied:
            return ""
        return (
            f" The masks of {', '.join(map(repr, emptied[:5]))} leave out whole rows: if the model divides such a "
            "weight by the norm of its rows, name it in `skip`."
        )

    def unread(self) -> Tensor | None:
        """Return what ranks have reported of their masks in the last step, to be read together with other numbers."""
        return self._codec.arrived_flags()

    def note_read(self, values: Sequence[float]) -> None:
        """Take note of it, once it has been read."""
        self._codec.note_flags(values)

    def finish(self) -> None:
        """Wait for what is under way."""
        self._codec.take_flag()

    def _install_own(self, read: Callable[[], Masks]) -> None:
        self.before_change()
        masks, problem = None, None
        try:
            masks = read()
        except Exception as error:  # the others wait for the result
            problem = str(error) or type(error).__name__
        check_agreement(masks, self._module.device, self._recorder, problem)
        assert masks is not None
        self._install(masks)

    def _warn(self, names: Iterable[str], message: str) -> None:
        """Warn of parameters, on the rank that chooses masks, once for each in a run."""
        new = [name for name in names if (name, message) not in self._said]
        self._said.update((name, message) for name in new)
        warn_of(new, message)

    def _install(self, masks: Masks) -> None:
        parameters = dict(self._module.named_parameters())
        masks = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
        self._own_masks.compare_anew()
        self._codec.install(masks, parameters.items())
        self._pruned = [(parameters[name], ~mask) for name, mask in masks.items()]
        self.keep_at_zero()
        self._clear_states()
        _clear_averages(self._trainer, masks)

    def _say_pruned(self, when: str) -> None:
        ranks = self._recorder.world_size
        rank_zero_info(f"SparseMask: {when}, {share_pruned(self._codec.masks, self._settings, self._module, ranks)}")

    def _clear_states(self, unless: bool | Tensor = False) -> None:
        parameters = dict(self._module.named_parameters())
        by_parameter = {id(parameters[name]): mask | unless for name, mask in self._codec.masks.items()}
        for optimizer in self._optimizers:
            _clear_state(optimizer, by_parameter)

    def _choose(self, step: int) -> Masks:
        masks, problem = None, None
        if self._recorder.rank == 0:
            try:
                context = PruningContext(self._codec.masks, self._samples, self._warn)
                masks = self._settings.pruning_at(step).masks(self._module, context)
            except Exception as error:  # any error: the others wait for the result
                problem = str(error) or type(error).__name__  # an empty text would mean no problem
        return agree(masks, problem, self._module, self._recorder)

    def masking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure of an optimizer step, wrapped so that gradients of pruned weights are zero after it.

        For ranks that send no gradients. Clipping comes later, and so does not count them.
        """

        def masked() -> Any:
            output = closure()
            for parameter, pruned in self._pruned:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(pruned, 0)
            return output

        return masked

    def _break_even(self) -> float:
        """Return the share above which buckets are sent dense, by rank 0's measurement of packing and its link file."""
        device, share, problem = self._module.device, torch.zeros(1, dtype=torch.float64), None
        if self._recorder.rank == 0:
            try:
                link = LinkProfile.load(str(self._settings.link))
                ranks = self._recorder.world_size
                row_bytes = handed_over_bytes(self._settings, ROW_BYTES // 4, ranks)  # as `then` sends it
                send_s = link.time_s("all_reduce", row_bytes, ranks) - link.time_s("all_reduce", 4, ranks)
                share[0] = break_even_share(packing_times(device), send_s)
            except (OSError, ValueError) as error:  # the others wait for the result
                problem = f"SparseMask: `link`={self._settings.link!r} cannot be used. {error}"
        raise_problem_of_rank_0(problem, device, self._recorder)
        share = share.to(device)
        self._recorder.broadcast(share, "masks").wait()
        return float(share)

    def _samples(self, count: int) -> Iterator[tuple[Any, int]]:
        assert self._trainer is not None
        return training_samples(self._trainer, count, type(self._settings.pruning).__name__)

    @torch.no_grad()
    def keep_at_zero(self) -> None:
        """Set pruned weights to zero, since an optimizer that mixes entries may have moved them.

        Where the model's own masks have changed since, nothing is set to zero until the new ones are installed, which
        may keep those weights.
        """
        changed = self._settings.pruning.is_watched and self._own_masks.have_changed()
        if changed is True:
            return
        if self._codec.was_dense:
            self._clear_states(unless=changed)
        for parameter, pruned in self._pruned:
            # a tensor is not read, since the host would wait: if masks have changed, nothing is set to zero
            parameter.masked_fill_(pruned if changed is False else pruned & ~changed, 0)


def _differs(found: Masks, installed: Masks) -> bool | Tensor:
    """Return whether masks differ, as a tensor where their bits must be compared."""
    if not found or found.keys() != installed.keys():
        return True
    if any(mask.shape != installed[name].shape for name, mask in found.items()):
        return True
    device = next(iter(found.values())).device
    flags = [(mask != installed[name].to(mask.device)).any().to(device) for name, mask in found.items()]
    return torch.stack(flags).any()


def _warn_of_late_steps(trainer: Trainer, schedule: PruningSchedule) -> None:
    """Warn if a schedule goes beyond the end of training, as far as that is known."""
    rest = steps_to_come(trainer)
    if rest is None:
        return
    total_steps = trainer.global_step + rest
    if schedule.first_step >= total_steps:
        rank_zero_warn(
            f"SparseMask: `schedule` prunes for the first time before optimizer step {schedule.first_step}, and "
            f"training ends after {total_steps}, so nothing is ever pruned and gradients are sent in full. Give an "
            "earlier step."
        )
    elif schedule.end_step is not None and schedule.end_step >= total_steps:
        rank_zero_warn(
            f"SparseMask: `schedule` reaches its final share before optimizer step {schedule.end_step}, and training "
            f"ends after {total_steps}, so fewer weights are pruned than asked for. Give an earlier `end_step`."
        )


def optimizer_problems(optimizers: Iterable[Optimizer]) -> Iterator[str]:
    """Yield optimizers under which pruned weights cannot be kept at zero."""
    for optimizer in optimizers:
        if isinstance(optimizer, (LBFGS, SparseAdam)):
            why = (
                "keeps a history in which all entries are mixed"
                if isinstance(optimizer, LBFGS)
                else "wants sparse gradients, which cannot be masked"
            )
            yield (
                f"SparseMask cannot keep pruned weights at zero under {type(optimizer).__name__}, which "
                f"{why}. Use another optimizer, such as AdamW or SGD."
            )


@torch.no_grad()
def _clear_state(optimizer: Optimizer, masks: dict[int, Tensor]) -> None:
    """Set the state of pruned weights to zero: momenta from before the pruning would change them again."""
    for parameter, state in optimizer.state.items():
        mask = masks.get(id(parameter))
        for value in state.values() if mask is not None else ():
            if isinstance(value, Tensor) and mask is not None and value.shape == mask.shape:
                value.masked_fill_(~mask, 0)


@torch.no_grad()
def _clear_averages(trainer: Trainer | None, masks: Masks) -> None:
    """Prune weight averages too, which otherwise follow the weights only slowly."""
    for callback in getattr(trainer, "callbacks", []):
        average = weight_average_of(callback)
        for name, parameter in average.named_parameters() if average is not None else ():
            mask = masks.get(name.removeprefix("module."))
            if mask is not None:
                parameter.masked_fill_(~mask.to(parameter.device), 0)
