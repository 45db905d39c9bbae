"""The private parts of Lightning and of torch that this package touches, by theme.

Lightning offers no public way to leave out the collectives that it issues on each batch. Instead a few methods are
replaced on the *instances* of one run, and restored when the run ends. ``INTERNALS`` lists each name with the reason; a
test looks each of them up, so with a release that removes one it fails by that name.
"""

from lightning_comm.lightning_internals import (
    checkpoints,
    loaders,
    loggers,
    loops,
    signals,
    steps,
    torch_parts,
    weight_averages,
)
from lightning_comm.lightning_internals.checkpoints import (
    SavePlan,
    after_writes,
    give_inner_io,
    inner_io,
    is_wrapping_io,
    last_names,
    point_to,
    replace_links,
    replace_timed_checkpoint,
    save_plan,
    wait_for_writes,
    wrap_saves,
    writer_in_background,
)
from lightning_comm.lightning_internals.loaders import (
    begin_loaders_again,
    given_training_loaders,
    load_skipped_loader_states,
    resumed_epoch,
    training_loaders,
    wrapped_sampler,
)
from lightning_comm.lightning_internals.loggers import (
    LoggedMetric,
    logged_metrics,
    logged_step,
    number_of_logged_metrics,
)
from lightning_comm.lightning_internals.loops import (
    accumulates,
    batches_begun,
    batches_of_epoch,
    before_validation,
    close_finished_epoch,
    end_after_this_step,
    ends_training,
    is_last_batch,
    place_in_run,
    replace_monitor_value,
    replace_timed_validation,
    validation_is_due,
    wrap_loop_ends,
    wrap_skipped_validation,
)
from lightning_comm.lightning_internals.patches import Internal, Patches
from lightning_comm.lightning_internals.signals import (
    leave_out_sigterm_broadcast,
    only_note_sigterm,
    raise_sigterm_after_this_batch,
    replace_signal_handlers,
    replace_timer_check,
    requeue_signal,
    say_time_is_up,
)
from lightning_comm.lightning_internals.steps import (
    clip_what_is_there,
    is_own_closure,
    is_without_optimizer,
    model_averaging_period,
    timeout_of,
)
from lightning_comm.lightning_internals.torch_parts import (
    averages_without_a_hook,
    scale_on_device,
    sees_to_infinities,
    unused_by_all_ranks,
)
from lightning_comm.lightning_internals.weight_averages import before_weight_averages, weight_average_of

INTERNALS = (
    *loops.INTERNALS,
    *loaders.INTERNALS,
    *loggers.INTERNALS,
    *checkpoints.INTERNALS,
    *signals.INTERNALS,
    *steps.INTERNALS,
    *weight_averages.INTERNALS,
    *torch_parts.INTERNALS,
)

__all__ = [
    "INTERNALS",
    "Internal",
    "LoggedMetric",
    "Patches",
    "SavePlan",
    "accumulates",
    "after_writes",
    "averages_without_a_hook",
    "batches_begun",
    "batches_of_epoch",
    "before_validation",
    "before_weight_averages",
    "begin_loaders_again",
    "clip_what_is_there",
    "close_finished_epoch",
    "end_after_this_step",
    "ends_training",
    "give_inner_io",
    "given_training_loaders",
    "inner_io",
    "is_last_batch",
    "is_own_closure",
    "is_without_optimizer",
    "is_wrapping_io",
    "last_names",
    "leave_out_sigterm_broadcast",
    "load_skipped_loader_states",
    "logged_metrics",
    "logged_step",
    "model_averaging_period",
    "number_of_logged_metrics",
    "only_note_sigterm",
    "place_in_run",
    "point_to",
    "raise_sigterm_after_this_batch",
    "replace_links",
    "replace_monitor_value",
    "replace_signal_handlers",
    "replace_timed_checkpoint",
    "replace_timed_validation",
    "replace_timer_check",
    "requeue_signal",
    "resumed_epoch",
    "save_plan",
    "say_time_is_up",
    "scale_on_device",
    "sees_to_infinities",
    "timeout_of",
    "training_loaders",
    "unused_by_all_ranks",
    "validation_is_due",
    "wait_for_writes",
    "weight_average_of",
    "wrap_loop_ends",
    "wrap_saves",
    "wrap_skipped_validation",
    "wrapped_sampler",
    "writer_in_background",
]
