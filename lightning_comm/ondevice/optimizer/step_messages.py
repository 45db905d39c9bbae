"""Detection of messages to other ranks in an optimizer's ``step``, before they are sent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")  # of operations that communicate


class SendsInStepError(RuntimeError):
    """The error of an optimizer that would send a message in its step."""

    def __init__(self, where: str, optimizer: Optimizer, message: str) -> None:
        super().__init__(
            f"{where}: the optimizer {type(optimizer).__name__} communicates in its `step` ({message}), where it takes "
            "all ranks to be at the same step with the same gradient, and here they are not. Use an optimizer that "
            "computes on each rank by itself (the plain form of this one, if there is one), or DDPStrategy."
        )


class NoMessages(TorchDispatchMode):
    """Raises an error in place of a message that an optimizer's step is about to send, in this thread.

    Every collective and every point-to-point message of torch is an operation in one of a few namespaces, however it
    was imported and for any group.

    Args:
        where: The class that asks, for the message.
        optimizer: The optimizer.

    """

    def __init__(self, where: str, optimizer: Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where, self._optimizer = where, optimizer

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let optimizers compile parts of their step under this mode; newer versions of torch ask for this."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it communicates."""
        if func.namespace in _NAMESPACES:
            raise SendsInStepError(self._where, self._optimizer, f"{func}".split(".")[-2].strip("_"))
        return func(*args, **(kwargs or {}))

    def outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, run without this mode: forward and backward may communicate."""

        def run() -> Any:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            try:
                return closure()
            finally:
                self.__enter__()  # type: ignore[no-untyped-call]

        return run


class FirstSteps:
    """Checks the first step of each optimizer for messages.

    Args:
        where: The class that asks, for the message.

    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._watched: dict[int, Optimizer] = {}  # by address; kept alive, so that no other optimizer gets the address

    @contextmanager
    def watch(self, optimizer: Optimizer) -> Iterator[None]:
        """Refuse messages in ``optimizer.step`` within this block, if it is the optimizer's first step.

        Raises:
            SendsInStepError: In place of a message.

        """
        if id(optimizer) in self._watched:
            yield
            return
        original, own = optimizer.step, vars(optimizer).get("step")

        def step(closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._watched[id(optimizer)] = optimizer
            with NoMessages(self._where, optimizer) as mode:
                if closure is not None:
                    args = (mode.outside(closure), *args)
                return original(*args, **kwargs)

        vars(optimizer)["step"] = step
        try:
            yield
        finally:
            if own is None:
                vars(optimizer).pop("step", None)
            else:
                vars(optimizer)["step"] = own
