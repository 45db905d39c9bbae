"""Pythons that are forked from this process, which has loaded Lightning, where a program would start new ones.

A new Python takes five seconds to load Lightning, a fork some hundredths. Within :func:`forked`, whatever starts this
very interpreter by ``subprocess`` (a test the console command; Lightning's launcher, a pilot or a demo their ranks;
torchrun its workers; a lab a command on an emulated host) gets a fork that takes the command's words, folder,
environment and open files, runs its code as ``__main__``, and ends as the interpreter would. All else is started as
ever: other programs, and a Python with options.

What such a start does not show: that the modules can be loaded, in which order, and from where. One real start of each
subcommand shows that.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from lightning_comm.lab import host_enter
from support.new_process import as_new, end_as_interpreter, run_as_main

_PYTHON = os.path.abspath(sys.executable)  # which may have been started by a path with dots
_WITH_ITS_OWN_NAME = (
    "jupyter_client.launcher",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
)  # modules that import `Popen`


class Program(NamedTuple):
    """What a command line would let a new Python run: ``-c`` code, ``-m`` a module, a script, or ``host`` a command."""

    kind: str
    what: str
    words: list[str]


@contextmanager
def forked() -> Iterator[None]:
    """Let Pythons that this process starts, and those that they start, be forked."""
    with ExitStack() as patches:
        for module in (subprocess, *(sys.modules[name] for name in _WITH_ITS_OWN_NAME if name in sys.modules)):
            patches.enter_context(mock.patch.object(module, "Popen", ForkedPopen))
        yield


def run_forked(command: list[Any], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Do as ``subprocess.run`` does, in text."""
    with forked():
        return subprocess.run(command, **{"text": True, **options})


def program_of(command: Any) -> Program | None:
    """Return what a command lets this interpreter run, or ``None`` where it is something else."""
    if isinstance(command, (str, bytes, Path)):
        return None
    first, *words = (os.fspath(word) for word in command)
    if os.path.abspath(first) != _PYTHON:
        return Program("script", first, words) if _is_our_script(first) else None
    if words[:3] == ["-I", "-S", str(Path(host_enter.__file__))]:
        return Program("host", words[2], words[3:]) if _what_runs(words[6:]) else None
    if words[:1] == ["-u"]:  # torchrun's; it changes when something is written, and not what
        del words[0]
    if words[:1] in (["-c"], ["-m"]):
        return Program(words[0], words[1], words[2:])
    return Program("script", words[0], words[1:]) if words and not words[0].startswith("-") else None


class ForkedPopen(subprocess.Popen[Any]):
    """``subprocess.Popen``, which does not execute a Python in the process that it forks, but lets it become one."""

    def __init__(self, args: Any, *more: Any, **options: Any) -> None:
        program = None if more or options.get("shell") else program_of(args)
        if program is not None:
            environment = options.get("env") or os.environ
            options["preexec_fn"] = partial(
                _become, program, dict(environment), options.get("pass_fds", ()), options.get("preexec_fn")
            )
        super().__init__(args, *more, **options)


def _become(program: Program, environment: dict[str, str], files: Any, first: Any) -> None:
    """Be a new process that runs a program, and end with it; the open files 0 to 2 and the folder are its own already.

    With the other files, the pipe is closed on which the process that started this one waits for its start.
    """
    if first is not None:
        first()
    with end_as_interpreter():
        as_new(environment, files, _search_path())
        _run(program)


def _run(program: Program) -> None:
    if program.kind != "host":
        run_as_main(*program)
        return
    pid, user, started, *command = program.words
    with mock.patch.object(os, "execvp", _execute):  # what it does once it is on the host
        sys.exit(host_enter.main(pid, user, int(started), *command))


def _execute(_: str, command: list[str]) -> None:
    own, variables = _without_env(command)
    program = program_of(own)
    assert program is not None
    with end_as_interpreter():
        as_new({**os.environ, **variables}, (), _search_path())
        _run(program)


def _what_runs(command: list[str]) -> Program | None:
    return program_of(_without_env(command)[0]) if command else None


def _without_env(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return a command without ``env NAME=VALUE`` in front of it, and those variables."""
    if command[0] != "env":
        return command, {}
    count = next(place for place, word in enumerate(command[1:]) if "=" not in word)
    return command[1 + count :], dict(word.split("=", 1) for word in command[1 : 1 + count])


@cache
def _is_our_script(path: str) -> bool:
    """Whether a program is a script of this interpreter, as the console command is."""
    try:
        with open(path, "rb") as file:
            marked, _, python = os.fsdecode(file.readline()).strip().partition("#!")
            return not marked and os.path.abspath(python) == _PYTHON
    except OSError:
        return False


@cache
def _search_path() -> tuple[str, ...]:
    """Return where a new Python searches for modules behind ``PYTHONPATH``: pytest's own folders are not among them."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    with mock.patch.object(subprocess, "Popen", ForkedPopen.__base__):
        done = subprocess.run(command, capture_output=True, text=True, env=plain, check=True)
    return tuple(done.stdout.splitlines())
