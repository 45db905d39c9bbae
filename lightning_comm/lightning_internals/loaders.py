"""Private parts of Lightning around loaders: which there are, and what they resume from."""

import traceback
from typing import Any, cast

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_comm.data.resumable import ResumedEpoch, find_resumed_epoch_by
from lightning_comm.lightning_internals.patches import Internal

_LOOPS = "lightning.pytorch.loops"
_FIT_LOOP = f"{_LOOPS}.fit_loop._FitLoop"
_COMBINED_LOADER = "lightning.pytorch.utilities.combined_loader"

INTERNALS = (
    Internal(_FIT_LOOP, "_data_source", "whether `fit` was handed its loaders, so that they are known at set-up"),
    Internal(
        "lightning.fabric.utilities.distributed._DatasetSamplerWrapper", "_sampler", "the user's, in Lightning's own"
    ),
    Internal(_FIT_LOOP, "_combined_loader", "to see whether a loader has a state of its own"),
    Internal(_FIT_LOOP, "_data_fetcher", "made before the random state is restored, so it is begun again"),
    Internal(_FIT_LOOP, "_load_combined_loader_states", "skipped where `configure_optimizers` loads the data first"),
    Internal(_FIT_LOOP, "_combined_loader_states_to_load", "what it would have handed over, and has not"),
    Internal(f"{_COMBINED_LOADER}._ModeIterator", "_idx", "how many batches of a pass have been handed out"),
)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders of a training epoch, each on its own."""
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def given_training_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders that ``fit`` was handed, each on its own; none where a module makes them, later."""
    source = trainer.fit_loop._data_source
    if source.instance is None or source.is_module():
        return []
    data = source.instance
    return list((data if isinstance(data, CombinedLoader) else CombinedLoader(data)).flattened)


def wrapped_sampler(sampler: object) -> object:
    """Return the user's sampler, without the one that Lightning may have put around it to give each rank its part."""
    if not isinstance(sampler, DistributedSamplerWrapper):
        return sampler
    within: Any = sampler.dataset
    return cast(object, within._sampler)


def begin_loaders_again(trainer: Trainer) -> None:
    """Begin the pass through the training data again, unless a loader has a state that this would consume.

    A loader of torch draws from the random state when a pass begins. Lightning begins the first pass before the state
    can be restored.
    """
    loader, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if loader is not None and fetcher is not None and not any(hasattr(each, "state_dict") for each in loader.flattened):
        iter(fetcher)


def load_skipped_loader_states(trainer: Trainer) -> None:
    """Hand the saved state to stateful loaders that were built before Lightning had read it.

    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` builds the loaders too early, and Lightning then
    never restores them. Where it did restore them, nothing is pending and this does nothing.
    """
    fit_loop = trainer.fit_loop
    pending = bool(fit_loop._combined_loader_states_to_load)
    fit_loop._load_combined_loader_states()
    if pending and fit_loop._data_fetcher is not None:
        iter(fit_loop._data_fetcher)  # many loaders restore their state as a pass begins, and one has begun already


def resumed_epoch() -> ResumedEpoch | None:
    """Return where a Trainer resumes an epoch, if it is now asking for the first batch of training after that.

    For loaders, which do not know their Trainer: it is found among the callers.
    """
    asked = begun = False
    for frame, _ in traceback.walk_stack(None):
        caller = frame.f_locals.get("self")
        kind = type(caller).__name__  # by name, since `pytorch_lightning` has classes of its own
        if any(base.__name__ == "_ModeIterator" for base in type(caller).__mro__):
            asked, begun = True, getattr(caller, "_idx", 0) > 0
        if kind == "_EvaluationLoop":
            return None
        if kind == "_FitLoop" and caller is not None:
            done = caller.epoch_loop.batch_progress.current.ready
            resumes = caller.restarting and done > 0 and asked and not begun  # else a hook reads it
            return ResumedEpoch(done, bool(caller._combined_loader_states_to_load)) if resumes else None
    return None


find_resumed_epoch_by(resumed_epoch)
