"""A model that is cut into stages, with schedule, ring, the stages' optimizer and turns."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Parameter

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.strategies.cyclic import trained
from lightning_comm.strategies.cyclic.fit import Fit
from lightning_comm.strategies.cyclic.hand_over import HandOver, StepSettings
from lightning_comm.strategies.cyclic.step_status import StepStatus
from lightning_comm.strategies.cyclic.user_optimizer import UserOptimizer
from lightning_comm.strategies.cyclic.versions import ModelVersions
from lightning_comm.transport.cyclic.groups import RingGroups
from lightning_comm.transport.cyclic.messages import StageLayout
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.cyclic.stage_optimizer import StageOptimizer
from lightning_comm.transport.cyclic.stagger import NoTurns, Stagger, Turns


@dataclass(frozen=True)
class CutModel:
    """The parts of a run that exist once the stages are known.

    Args:
        stages: Of the model.
        parameters: Those of each stage.
        schedule: Whose turn it is, and which version each uses.
        ring: Carries gradients and versions.
        optimizer: Updates the stages that this rank owns.
        settings: The settings for the update of a step.
        versions: The versions that the model holds.
        hand_over: Of the gradients.
        turns: When ranks begin.

    """

    stages: list[Stage]
    parameters: list[list[Parameter]]
    schedule: CyclicSchedule
    ring: CyclicRing
    optimizer: StageOptimizer
    settings: StepSettings
    versions: ModelVersions
    hand_over: HandOver
    turns: Turns

    def summary(self, steps_in_step: int) -> str:
        """Return in a sentence how the model is cut.

        Args:
            steps_in_step: How many steps from now on use the newest parameters everywhere.

        """
        counts = [sum(each.numel() for each in parameters) for parameters in self.parameters]
        begins = ", ".join(stage.modules[0] or "(start)" for stage in self.stages)
        first = ", and"
        if steps_in_step > 0:
            first = f"; the first {steps_in_step:,} steps are in step, as under DDP, and after them"
        return (
            f"{len(counts)} stages of {min(counts):,} to {max(counts):,} parameters on {self.schedule.workers} ranks, "
            f"which begin at {begins}; a rank updates {len(self.schedule.owned(0))} of them{first} parameters are "
            f"{self.schedule.mean_delay:.3g} updates old on average."
        )


def cut_model(
    fit: Fit, groups: RingGroups, user_optimizer: UserOptimizer, status: StepStatus, stages: Sequence[Stage]
) -> CutModel:
    """Make the parts that train these stages.

    Args:
        fit: What all parts of the run share.
        groups: For the ring's messages.
        user_optimizer: The user's.
        status: The status that travels with the gradients; from now on it returns through the ring that is made here.
        stages: All of them.

    Raises:
        RuntimeError: If the stages are not of what is trained.

    """
    settings, progress, module = fit.settings, fit.progress, fit.module
    trained.check(stages, module, user_optimizer.trained(), progress.steps_done)
    schedule = CyclicSchedule(
        fit.recorder.world_size,
        len(stages),
        settings.rule,
        settings.lag,
        progress.run_began_at + settings.warmup_sync_steps,
    )
    named = dict(module.named_parameters())
    parameters = [[named[name] for name in stage.parameters] for stage in stages]
    owned = {stage: parameters[stage] for stage in schedule.owned(fit.recorder.rank)}
    optimizer = StageOptimizer(user_optimizer.optimizer, owned, status.norm_before)
    user_optimizer.begin_stages(stages)
    status.ring = ring = CyclicRing(
        schedule,
        [StageLayout(each) for each in parameters],
        optimizer.update,
        groups.gradients,
        groups.parameters,
        module.device,
        in_any_order=groups.tagged,
    )
    step_settings = StepSettings(fit, user_optimizer.optimizer, optimizer)

    return CutModel(
        stages=list(stages),
        parameters=parameters,
        schedule=schedule,
        ring=ring,
        optimizer=optimizer,
        settings=step_settings,
        versions=ModelVersions(fit, schedule, stages, parameters, ring),
        hand_over=HandOver(fit, stages, parameters, ring, step_settings, status, user_optimizer.other_parameters),
        turns=NoTurns() if groups.tokens is None else Stagger(schedule, groups.tokens, fit.agreement.poll_failures),
    )
