"""What a forked process forgets of the one that it was forked from, and how it runs a program to its end."""

import asyncio
import atexit
import contextvars
import faulthandler
import gc
import logging
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import lightning_comm

_LIGHTNINGS = ("lightning.pytorch", "lightning.fabric")  # loggers, to which Lightning gives a handler when it is loaded
_TORCHS_FIRST_SEED = 67280421310721
_OURS = (str(Path(lightning_comm.__file__).parent), str(Path(__file__).parents[1]))


def as_new(environment: dict[str, str], files: Sequence[int], search_path: Sequence[str]) -> None:
    """Forget what a new Python would not have: files, signals, variables, handlers, modules of the user's, seeds.

    Args:
        environment: Its variables.
        files: Those to keep, beside the three standard ones.
        search_path: Where it searches for modules, behind ``PYTHONPATH``.

    """
    gc.freeze()  # what the parent has loaded is no garbage; to look at half a million objects copies their memory
    faulthandler.disable()  # it writes to a file that is closed now
    for number in [int(name) for name in os.listdir("/dev/fd")]:
        if number > 2 and number not in files:
            with suppress(OSError):  # the one that listed the folder
                os.close(number)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)  # as Python does at its start; `subprocess` has set them back
    os.environ.clear()
    os.environ.update(environment)
    own = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*own, *(each for each in search_path if each not in own)]  # as `site` adds no folder twice
    installed = (*filter(None, search_path), *_OURS)
    for name, module in list(sys.modules.items()):
        if (file := getattr(module, "__file__", None)) and not file.startswith(installed):
            del sys.modules[name]
    _forget_streams_and_hooks()
    if not torch.cuda.is_initialized():
        # torch takes a process for one that cannot use CUDA if the one it was forked from has counted the devices
        torch.cuda._is_in_bad_fork = lambda: False
    torch.manual_seed(_TORCHS_FIRST_SEED)
    np.random.seed()


def _forget_streams_and_hooks() -> None:
    # an object that was here before, and is gone now, must not close them
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    warnings.resetwarnings()
    warnings.showwarning = _print_warning  # pytest collects those of its tests
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    logging.disable(logging.NOTSET)
    logging.root.handlers.clear()
    for name in _LIGHTNINGS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [logging.StreamHandler()]
        logger.propagate = False
    asyncio.set_event_loop_policy(None)  # so that the loop is another one: this one's files are closed
    asyncio._set_running_loop(None)
    atexit._clear()
    for at_end in (logging.shutdown, multiprocessing.util._exit_function):
        atexit.register(at_end)
    multiprocessing.process._children = set()
    multiprocessing.resource_tracker._resource_tracker._fd = None  # it is closed, and another one starts when needed
    multiprocessing.resource_tracker._resource_tracker._pid = None


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


def run_as_main(kind: str, what: str, words: Sequence[str]) -> None:
    """Run ``-c`` code, ``-m`` a module, or a script, as the interpreter does."""
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = ["-m", *words]
        sys.modules.pop(what, None)  # there it is `__main__`, and another one once it is imported
        contextvars.Context().run(runpy.run_module, what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    if kind == "-c":
        sys.path.insert(0, "")
        sys.argv[:] = ["-c", *words]
        code = compile(what, "<string>", "exec")
    else:
        sys.path.insert(0, str(Path(what).resolve().parent))
        sys.argv[:] = [what, *words]
        main.__file__ = what
        code = compile(Path(what).read_text(), what, "exec")
    contextvars.Context().run(exec, code, main.__dict__)


@contextmanager
def end_as_interpreter() -> Iterator[None]:
    """End the process after what is done within, as the interpreter does; nothing behind it is ever reached."""
    code = 0
    try:
        yield
    except SystemExit as stop:
        code = _code_of(stop)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    try:
        threading._shutdown()  # waits for threads, as the interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 120  # the interpreter's, where the end itself fails
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF
    print(stop.code, file=sys.stderr)
    return 1
