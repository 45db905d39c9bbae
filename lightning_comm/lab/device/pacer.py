"""Emulated devices: a module computes as fast as a device of a stated speed, layer by layer.

The real compute runs unchanged, with the same results. Around it a :class:`DevicePacer` sleeps until the moment at
which the emulated device would have finished the layer. Sleeping leaves the processor to other ranks and to the threads
that communicate, so several devices can share a few cores and communication overlaps with compute as it would on them.
"""

import functools
import time
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_comm.lab.device.deadline_clock import DeadlineClock
from lightning_comm.lab.device.layer_times import Pass, PassPlan, plan_step
from lightning_comm.lab.device.layers import PassRecorder, check_can_be_paced, first_tensor, weights_of
from lightning_comm.lab.device.settings import SPEED_VARIABLE, check_device, emulated_speed

__all__ = ["SPEED_VARIABLE", "DevicePacer", "check_device", "emulated_speed"]


class DevicePacer:
    """Makes forward and backward of a module take as long as on a device of a stated speed.

    ``batch_size`` samples take ``step_s / speed`` seconds of forward and backward together, and other numbers of
    samples take time in proportion. Each layer has a deadline within its pass, by its share of the multiply-adds: a
    forward hook sleeps until then, and in backward a hook on each parameter does, *before* the gradient is handed on.
    So DDP sends its buckets at the moments at which the device would. The deadlines include the real compute: a late
    layer takes nothing from those behind it as long as there is slack. Code that waits for other ranks in the middle of
    a pass has to report that by :meth:`idle`, or the wait would count as compute.

    The first step after :meth:`attach`, and after a parameter begins to require gradients, finds out which layers run;
    it is lengthened as a whole. A step that is late by more than 1 % of its time, and by more than 1 ms, is an overrun,
    and :meth:`summary` reports it.

    What is not paced: the optimizer; the loss, between the last layer and the start of backward; whatever runs outside
    of a step, such as validation; forward passes without a backward, beyond those of the first step; a second backward
    through the same graph. A frozen layer takes its share of forward, and backward takes its whole time over the
    others. Layers without parameters count towards the next one that has some.

    Args:
        module: The module to slow down; its parameters must be on the CPU: only there a sleep delays compute.
        step_s: Seconds that ``batch_size`` samples take on a device of speed 1; more than 0.
        batch_size: Samples, at least 1.
        forward_share: The forward pass's share of the time; more than 0, less than 1.
        speed: Divides the time; ``None`` takes :func:`emulated_speed`.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None. *Results* are bit for bit those without it.

        *Precision.* A sleep ends some 0.1 ms late on an idle machine, and never early. Deadlines are absolute within a
        pass, so this does not add up.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        >>> pacer = DevicePacer(model, step_s=0.02, batch_size=4, speed=2.0)
        >>> pacer.attach()
        >>> started = time.perf_counter()
        >>> for _ in range(3):
        ...     pacer.begin_step(samples=4)
        ...     model(torch.ones(4, 8)).sum().backward()
        >>> time.perf_counter() - started >= 3 * 0.02 / 2.0
        True
        >>> pacer.detach()

    """

    def __init__(
        self,
        module: nn.Module,
        *,
        step_s: float,
        batch_size: int,
        forward_share: float = 1 / 3,
        speed: float | None = None,
    ) -> None:
        check_device("DevicePacer", step_s=step_s, batch_size=batch_size, forward_share=forward_share, speed=speed)
        self.module = module
        self.step_s, self.batch_size, self.forward_share = step_s, batch_size, forward_share
        self.speed = emulated_speed() if speed is None else speed
        self.unpaced_batches = 0  # in which no layer ran forward and backward
        self._clock = DeadlineClock()
        self._attached = False
        self._handles: list[RemovableHandle] = []
        self._hooked: set[str] = set()  # parameters
        self._plan: list[PassPlan] | None = None  # for each pass of a step; None until a step has shown its layers
        self._current: PassPlan | None = None
        self._phase: Literal["off", "between", "forward", "backward"] = "off"
        self._step_s = 0.0  # of the present batch
        self._began_s = 0.0
        self._seen: list[Pass] = []  # in the present step
        self._open = PassRecorder()

    def attach(self) -> None:
        """Begin to pace: register hooks on the module's layers and parameters.

        Raises:
            ValueError: If a parameter is not on the CPU, or the module is compiled.

        """
        self.detach()
        check_can_be_paced(self.module)
        self._attached = True
        for name, layer in self.module.named_modules():
            if any(True for _ in layer.parameters(recurse=False)):
                self._handles += [
                    layer.register_forward_pre_hook(lambda layer, inputs, name=name: self._begin_call(name)),
                    layer.register_forward_hook(lambda layer, inputs, output, name=name: self._end_call(name, output)),
                ]

    def detach(self) -> None:
        """Stop pacing, and take all hooks away. The figures stay."""
        self.end_step()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self._plan = None
        self._attached = False

    def begin_step(self, samples: int) -> None:
        """Begin a batch: until the next one, forward and backward are paced for so many samples; 0 take no time.

        Raises:
            ValueError: If the number is negative.
            RuntimeError: Before :meth:`attach`.

        """
        if samples < 0:
            raise ValueError(f"DevicePacer: `samples` must be >= 0; got {samples!r}. It counts a batch's samples.")
        if not self._attached:
            raise RuntimeError(
                "DevicePacer: `begin_step` paces nothing before `attach`, or after `detach`. Attach it first."
            )
        self.end_step()
        self._hook_parameters()
        self._step_s = self.step_s / self.speed * samples / self.batch_size
        self._seen = []
        self._phase = "between"

    def idle(self, seconds: float) -> None:
        """Note that the device has just waited so long within a pass: what is left of it comes so much later."""
        if self._phase in ("forward", "backward"):
            self._clock.put_off(seconds)

    def end_step(self) -> None:
        """End a batch: what follows, up to the next :meth:`begin_step`, is not paced."""
        if self._phase == "off":
            return
        self._phase = "off"
        if not self._seen:
            self.unpaced_batches += 1
        elif self._plan is None:
            self._plan = plan_step(self._seen, weights_of(self.module))
        else:
            self._clock.end_step(self._step_s)

    @property
    def steps(self) -> int:
        """Steps that were paced layer by layer: all but the first."""
        return self._clock.steps

    @property
    def overruns(self) -> int:
        """Steps that took longer than they should."""
        return self._clock.overruns

    @property
    def real_share(self) -> float:
        """The share of the paced time that was real compute; the rest was slept through. 0.0 before any step."""
        clock = self._clock
        return 1 - clock.slept_s / clock.paced_s if clock.paced_s else 0.0

    @property
    def excess(self) -> float:
        """How much longer the paced steps took than stated, as a share: overruns, and sleeps that ended late."""
        clock = self._clock
        return clock.paced_s / clock.stated_s - 1 if clock.stated_s else 0.0

    def summary(self) -> str:
        """Return a sentence or two: that the device is emulated, how fast it is, and whether it kept that speed."""
        text = (
            f"Emulated device: {self.batch_size} samples take {self.step_s / self.speed:g} s (step_s={self.step_s:g}, "
            f"speed={self.speed:g}). {self.steps} steps took {100 * self.excess:.1f} % longer than that; "
            f"{100 * self.real_share:.0f} % of the time was real compute."
        )
        if self.unpaced_batches:
            text += (
                f" {self.unpaced_batches} batches were NOT paced, since no layer with parameters ran forward and "
                "backward in them; only what is called as a module can be paced."
            )
        if not self.overruns:
            return f"{text} No step overran."
        return (
            f"{text} {self.overruns} steps overran, by {1e3 * self._clock.late_s / self.overruns:.1f} ms on average "
            f"and {1e3 * self._clock.worst_late_s:.1f} ms at most: the real compute is too slow for this speed. Use a "
            "larger step_s, a smaller batch or model, or fewer ranks on this machine."
        )

    def _hook_parameters(self) -> None:
        """Hook what requires gradients and has no hook yet, also if it began to only now."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and name not in self._hooked:
                self._hooked.add(name)
                hook = functools.partial(self._end_gradient, name)
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
                self._plan = None

    def _begin_call(self, layer: str) -> None:
        # in backward, layers run again where activations are checkpointed; that is real compute of the backward
        if self._phase == "between":
            self._phase, self._open = "forward", PassRecorder()
            plan, place = self._plan or [], len(self._seen)
            self._current = plan[place] if place < len(plan) else None
            self._began_s = time.perf_counter()
            self._begin_pass(self.forward_share)
        if self._phase == "forward":
            self._open.begin(layer)

    def _end_call(self, layer: str, output: Any) -> None:
        if self._phase != "forward":
            return
        entries = first_tensor(output)
        if entries is not None and entries.requires_grad:
            entries.register_hook(lambda gradient: self._begin_backward())  # type: ignore[no-untyped-call]
        call = self._open.end(layer, self.module.get_submodule(layer), entries)
        if self._current is not None and call in self._current.forward:
            self._clock.wait(self._current.forward[call])

    def _begin_backward(self) -> None:
        if self._phase != "forward":
            return
        self._end_pass()
        self._phase = "backward"
        self._begin_pass(1 - self.forward_share)
        # DDP queues its own end of backward in the same way, behind this one, so this does not wait for its messages
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_gradient(self, parameter: str, gradient: Tensor) -> None:
        self._begin_backward()
        if self._phase == "backward":
            self._open.seen.gradients.add(parameter)
            if self._current is not None and parameter in self._current.backward:
                self._clock.wait(self._current.backward[parameter])

    def _end_backward(self) -> None:
        if self._phase != "backward":
            return
        if self._current is not None:
            self._clock.wait(1.0)
        elif self._plan is None and not self._seen:  # the first pass of a step that finds out which layers run
            time.sleep(max(0.0, self._began_s + self._step_s - time.perf_counter()))
        self._end_pass()
        self._seen.append(self._open.seen)
        self._phase = "between"

    def _begin_pass(self, share: float) -> None:
        if self._current is not None:
            self._clock.begin_pass(share * self._current.share * self._step_s)

    def _end_pass(self) -> None:
        if self._current is not None:
            self._clock.end_pass()
