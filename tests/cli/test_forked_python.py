"""A forked Python does what a new one does: each program is run both ways."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support.forked_python import forked, program_of

PROGRAMS = {
    "words, folder, variables and input": (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ.get('OWN'), 'PYTEST_VERSION' in os.environ, "
        "__name__, sys.path[0], sys.stdin.read())"
    ),
    "the path": "import sys; print(sys.path)",
    "a code": "import sys; print('said'); sys.exit(3)",
    "a text": "import sys; sys.exit('why')",
    "an end within": "raise SystemExit",
    "an error": "1 / 0",
    "a signal": "import os; print('said', flush=True); os.kill(os.getpid(), 15)",
    "an interruption": "import os, signal; signal.raise_signal(signal.SIGINT)",
    "a reader that is gone": "import os, signal; print(signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN)",
    "threads and what is left to the end": (
        "import atexit, threading, time\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('first')"
    ),
    "a child": (
        "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True, text=True).stdout)"
    ),
    "spawned": (
        "import multiprocessing\n"
        "pool = multiprocessing.get_context('fork').Pool(1)\nprint(pool.map(abs, [-1, -2]))\npool.close()"
    ),
}


def run(command, tmp_path, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"OWN": "own"}
    done = subprocess.run(
        command, cwd=tmp_path, input="given", env=environment, capture_output=True, text=True, timeout=60, **options
    )
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


# What the way of starting may change is shown for all three ways; the rest for code, which needs no file.
BY_EVERY_WAY = {"words, folder, variables and input", "the path", "an error", "a child"}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(
            name, way, marks=[] if way == "code" or name in BY_EVERY_WAY else pytest.mark.exhaustive, id=f"{name}-{way}"
        )
        for name in PROGRAMS
        for way in ("code", "script", "module")
    ],
)
def test_it_says_what_a_new_one_says_and_ends_as_that_does(name, way, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAMS[name])
    words = {"code": ["-c", PROGRAMS[name]], "script": [str(tmp_path / "program.py")], "module": ["-m", "program"]}[way]
    command = [sys.executable, *words, "a", "--b"]
    with forked():
        found = run(command, tmp_path)
    assert found == run(command, tmp_path)


def test_it_is_forked_and_knows_no_module_of_the_users_that_was_loaded_here(tmp_path, monkeypatch):
    users = types.ModuleType("users_module")
    users.__file__ = str(tmp_path / "users_module.py")
    monkeypatch.setitem(sys.modules, "users_module", users)
    program = "import sys; print('torch' in sys.modules, 'users_module' in sys.modules)"
    with forked():
        assert run([sys.executable, "-c", program], tmp_path) == (0, "True False\n", [])


def test_the_console_command_is_known_for_a_script_of_this_python():
    command = Path(sys.executable).parent / "lightning-comm"
    assert program_of([command, "fit"]) == ("script", str(command), ["fit"])
    assert program_of([Path(sys.executable).parent / ".." / "bin" / Path(sys.executable).name, "-c", ""]) is not None


def test_files_that_are_passed_on_are_open_and_others_are_not(tmp_path):
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    try:
        program = f"import os; os.write({writer}, b'x'); os.read({reader}, 1)"
        with forked():
            code, _, error = run([sys.executable, "-c", program], tmp_path, pass_fds=[writer])
        assert (code, error) == (1, ["OSError: [Errno 9] Bad file descriptor"])
        assert os.read(reader, 9) == b"x"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    "command",
    [
        ["true"],
        "true",
        [sys.executable],
        [sys.executable, "-I", "-c", ""],
        [sys.executable, "-S", "-c", ""],
        ["/bin/sh"],
    ],
)
def test_other_programs_and_a_python_with_options_are_started(command):
    assert program_of(command) is None
