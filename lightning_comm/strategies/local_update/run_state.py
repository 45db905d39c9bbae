"""State of a run under local updates in a checkpoint, and how a run goes on from it."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.ondevice.optimizer.state import optimizer_tensors
from lightning_comm.strategies.checkpoints.comparison import Comparison
from lightning_comm.strategies.local_update.run import LocalUpdateRun
from lightning_comm.strategies.sparse_mask import checkpoint as mask_checkpoint
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec


def state_of(run: LocalUpdateRun) -> dict[str, Any]:
    """Return what a resumed run needs besides the weights, optimizers and random states."""
    return {
        "clock": run.clock.state_dict(),
        "rounds": run.log.rounds,
        "round_lr": run.rounds.lr,
        "in_flight": run.overlapped.state_dict(),
        "ledger": run.recorder.ledger.state_dict(),
        "gradient_steps": run.gradient_steps,
        "began_at": run.began_at,
        "period": {"alpha": getattr(run.settings.period, "alpha", None)},
    }


def begin_count(run: LocalUpdateRun, *, resumed: bool, shared: dict[str, Any] | None) -> None:
    """Set the count of steps, and where in it the run began: with this fit, or with the one that it resumes.

    Args:
        run: The run, whose count is that of the Trainer.
        resumed: Whether there is a checkpoint.
        shared: The strategy's entry of its main file.

    """
    if shared is not None:
        state = shared["run"]
        run.clock.steps_done, run.began_at = int(state["clock"]["steps_done"]), int(state.get("began_at", 0))
    elif resumed and len(run.optimizers()) == 1:
        run.began_at = 0  # another strategy's run, of which each step was one of this optimizer
    elif resumed:
        rank_zero_warn(
            f"LocalUpdateStrategy: the checkpoint of another strategy counts the steps of all optimizers, "
            f"{run.clock.steps_done}, and not those of the counted one (`counted_optimizer`="
            f"{run.settings.counted_optimizer}), so `gradient_steps` and `warmup_steps` are counted from here. Give 0 "
            "for what is over."
        )
    run.recorder.step = run.clock.steps_done


def restore(
    run: LocalUpdateRun,
    shared: dict[str, Any] | None,
    own: dict[str, Any] | None,
    masks: dict[str, Any] | None,
    found: Comparison,
) -> None:
    """Go on from a checkpoint: exactly with this rank's file, else with a new round, else from the step count.

    Args:
        run: The run.
        shared: The strategy's entry of the main file.
        own: This rank's file.
        masks: Those in the main file, for where this rank's file has none that are of use.
        found: The differences between the settings that were saved and those of the run.

    """
    _restore_rounds(run, shared, own, found)
    codec, method = run.model.codec, run.settings.averaging.method
    mask_checkpoint.warn_of_uncompared("LocalUpdateStrategy", None, found)
    if not isinstance(codec, SparseMaskCodec) or not codec.masks:
        mask_checkpoint.restore_masks(codec, masks, found)
        mask_checkpoint.warn_of_other_masks("LocalUpdateStrategy", None, masks, found)
        mask_checkpoint.warn_of_dense("LocalUpdateStrategy", None, masks, method)


def _restore_rounds(
    run: LocalUpdateRun, shared: dict[str, Any] | None, own: dict[str, Any] | None, found: Comparison
) -> None:
    if own is not None:
        saved = own["run"]
        # gradients are averaged again where ranks ran apart before, and that needs equal weights and momenta
        back = saved["gradient_steps"] <= saved["clock"]["steps_done"] < run.gradient_steps
        _restore_clock(run, saved, exact=not back)
        if not back:
            run.model.tensors.load_state(own["weights"])
            departed = run.model.load_compression_state(own.get("compression"), same=found.compression is None)
            run.overlapped.load_state_dict(saved.get("in_flight"), departed)
            run.samples.load_state_dict(own.get("samples"))
            run.rounds.apart = own["apart"]
            return
        run.model.take_optimizer_state(optimizer_tensors(run.optimizers()))
        rank_zero_warn(
            f"LocalUpdateStrategy: `gradient_steps`={run.gradient_steps} says that gradients are averaged at step "
            f"{saved['clock']['steps_done']}, where the run is resumed and ranks ran apart before. It goes on from "
            "the averaged weights and the optimizer state of rank 0. Keep `gradient_steps` as it was for an exact "
            "continuation."
        )
    elif shared is not None:
        _restore_clock(run, shared["run"], exact=False)


def _restore_clock(run: LocalUpdateRun, state: dict[str, Any], *, exact: bool) -> None:
    """Restore the counts; ``exact=False`` begins a new round where the old one was left."""
    run.clock.load_state_dict(state["clock"])
    run.log.rounds = int(state["rounds"])
    run.rounds.lr = float(state["round_lr"])
    run.recorder.ledger.load_state_dict(state["ledger"])
    if not exact:
        run.clock.end_round()
    elif run.clock.total_steps is not None:
        run.clock.round_ends_at = min(run.clock.round_ends_at, run.clock.total_steps)
    run.recorder.step = run.clock.steps_done
