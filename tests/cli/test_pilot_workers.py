"""The ranks of a pilot are heard, a first error is told from what it caused, and none is left behind."""

import os
import subprocess
import sys
import time

import pytest

from lightning_comm.cli.fresh_python import fresh_python
from lightning_comm.cli.pilot import command as pilot
from lightning_comm.cli.pilot import workers
from lightning_comm.cli.pilot.arguments import Refused
from lightning_comm.cli.pilot.rank import TrialJob
from lightning_comm.cli.pilot.results import Results, TrialProgress
from lightning_comm.cli.pilot.workers import WorkerFailed, run_workers

JOB = TrialJob(args=[], trials=[], steps=4, warmup_steps=1, device_s=None, trainer={})
SAYS = "import json, os, sys, time\ndef say(**event): print('@pilot ' + json.dumps(event), flush=True)\n"
SLEEPS = "time.sleep(60)"


class Scripts:
    """A place whose ranks run a few lines of Python instead of a training."""

    def __init__(self, *scripts):
        self.ranks, self.scripts, self.processes = len(scripts), scripts, []

    def start(self, command, rank):
        words = [sys.executable, "-S", "-c", SAYS + self.scripts[rank]]
        self.processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return self.processes[-1]

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


def failure(tmp_path, *scripts, timeout_s=30.0):
    place = Scripts(*scripts)
    with pytest.raises(WorkerFailed) as caught:
        list(run_workers(JOB, place, tmp_path, timeout_s))
    assert all(process.poll() is not None for process in place.processes)
    return str(caught.value)


def test_events_are_passed_on_in_order_and_all_else_is_logged(tmp_path):
    place = Scripts("print('loading')\nsay(event='a')\nprint('x')\nsay(event='b', n=1)", "print('of rank 1')")
    assert list(run_workers(JOB, place, tmp_path, 30.0)) == [{"event": "a"}, {"event": "b", "n": 1}]
    assert (tmp_path / "rank0.log").read_text() == "loading\nx\n"
    assert (tmp_path / "rank1.log").read_text() == "of rank 1\n"


@pytest.fixture
def short_grace(monkeypatch):
    """For ranks that do not end by themselves, whatever another does."""
    monkeypatch.setattr(workers, "_GRACE_S", 0.5)


@pytest.mark.usefixtures("short_grace")
def test_the_first_error_is_shown_and_the_others_are_ended(tmp_path):
    began = time.monotonic()
    said = failure(tmp_path, SLEEPS, "say(event='failed', error='ValueError: no such layer')\nsys.exit(1)")
    assert said == "rank 1: ValueError: no such layer"
    assert time.monotonic() - began < 30


def test_a_rank_that_was_killed_is_the_cause_and_not_the_one_that_lost_its_connection(tmp_path):
    lost = "time.sleep(0.3)\nsay(event='failed', error='RuntimeError: Connection closed by peer')\nsys.exit(1)"
    said = failure(tmp_path, lost, "print('step 7', flush=True)\nos.kill(os.getpid(), 9)")
    assert said.startswith("rank 1 was ended by SIGKILL. Was the memory used up? The end of its output:")
    assert said.endswith("step 7")


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_ends_without_a_word_is_shown_with_the_end_of_its_output(tmp_path):
    said = failure(tmp_path, SLEEPS, "print('error: a bad value')\nsys.exit(2)")
    assert said == "rank 1 ended with exit code 2. The end of its output:\nerror: a bad value"


def test_silence_ends_with_the_time_out_and_a_way_to_allow_more(tmp_path):
    said = failure(tmp_path, SLEEPS, SLEEPS, timeout_s=0.5)
    assert [word for word in ("0.5 s", "`--timeout`", str(tmp_path)) if word not in said] == []


def results(tmp_path):
    (tmp_path / "logs").mkdir()
    return Results(tmp_path, {"settings": {"strategies": ["ddp", "qsr"]}})


BEGINS = "say(event='rehearsed')\nsay(event='begin', repeat=0, strategy='ddp')\n"
TRIAL = """say(event='rehearsed')
say(event='begin', repeat=0, strategy='ddp')
say(event='trial', repeat=0, strategy='ddp', warmup_steps=1, gradient_steps=3, sync_steps=[], step_s=[[1, 1, 1]])
say(event='begin', repeat=0, strategy='qsr')
"""


def test_a_strategy_that_fails_is_named_and_the_others_go_on_in_new_processes(tmp_path, capsys):
    class Restarted(Scripts):
        def start(self, command, rank):
            self.scripts = [TRIAL + "say(event='failed', error='MemoryError')", "say(event='rehearsed')"][
                len(self.asked) :
            ]
            self.asked.append(command[-1])
            return super().start(command, 0)

    place = Restarted("")
    place.asked = []
    found = results(tmp_path)
    pilot._measure(TrialJob([], [(0, "ddp"), (0, "qsr"), (0, "limit")], 3, 1, None, {}), found, place, 30.0)
    assert found.data["failures"] == {"qsr": {"repeat": 0, "error": "rank 0: MemoryError"}}
    assert [trial["strategy"] for trial in found.data["trials"]] == ["ddp"]
    assert '"trials": [[0, "limit"]]' in place.asked[1]
    assert "`qsr` failed in repeat 1: rank 0: MemoryError\nThe others go on without it." in capsys.readouterr().out


def test_a_baseline_that_fails_ends_the_pilot_at_once_with_its_error(tmp_path):
    """The place starts its ranks once: nothing else is tried without what everything is compared with."""
    found = results(tmp_path)
    place = Scripts(BEGINS + "say(event='failed', error='MemoryError')\nsys.exit(1)")
    with pytest.raises(WorkerFailed) as caught:
        pilot._measure(TrialJob([], [(0, "ddp"), (0, "qsr"), (0, "limit")], 3, 1, None, {}), found, place, 30.0)
    said = str(caught.value)
    must_say = ["`ddp` failed in repeat 1: rank 0: MemoryError\n", "no answer without it", str(tmp_path / "pilot.json")]
    assert [word for word in must_say if word not in said] == []
    assert len(place.processes) == 1
    assert found.data["failures"] == {"ddp": {"repeat": 0, "error": "rank 0: MemoryError"}}


def test_a_run_too_short_for_what_was_asked_is_refused_and_no_rank_is_left(tmp_path):
    place = Scripts("say(event='refused', error='`--steps` must be less')\n" + SLEEPS)
    with pytest.raises(Refused, match="`--steps` must be less"):
        pilot._measure(TrialJob([], [(0, "ddp")], 3, 1, None, {}), results(tmp_path), place, 30.0)
    assert [process.poll() for process in place.processes] == [-9]


def test_trials_that_are_shortened_are_said_once_and_kept(tmp_path, capsys):
    found = results(tmp_path)
    found.data["settings"].update(steps=60, warmup_steps=10)
    hear = pilot._listener(found, TrialProgress(1, 1), [], {})
    for _ in range(2):  # as where ranks are started again
        hear({"event": "rehearsed", "total_steps": 16, "steps": 16, "warmup_steps": 4})
    assert capsys.readouterr().out == "Your run has 16 steps, so trials have 16, of which 4 warm up.\n"
    assert (found.data["settings"]["steps"], found.data["settings"]["warmup_steps"]) == (16, 4)


def test_a_rank_is_not_disturbed_by_a_file_named_like_a_module_of_pythons_and_finds_the_users_modules(
    tmp_path, monkeypatch
):
    """A package that loads no torch stands for ours, which is taken from where it was taken here."""
    package = tmp_path / "elsewhere" / "own_tool"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "rank.py").write_text("import shlex, sys\ndef start():\n    import users_own\n    print(sys.argv)")
    monkeypatch.syspath_prepend(package.parent)
    (tmp_path / "shlex.py").write_text("raise ImportError('hidden')")
    (tmp_path / "users_own.py").write_text("print('found')")

    def start(**more):
        command, environment = fresh_python("own_tool.rank", "word"), {**os.environ, **more}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert (start().stdout, start().stderr) == ("found\n['lightning-comm', 'word']\n", "")
    assert ("No module named 'users_own'" in start(PYTHONSAFEPATH="1").stderr) == (sys.version_info >= (3, 11))


def test_a_config_that_does_not_train_at_all_ends_the_pilot_with_its_error(tmp_path):
    with pytest.raises(WorkerFailed) as caught:
        pilot._measure(
            TrialJob([], [(0, "ddp")], 3, 1, None, {}),
            results(tmp_path),
            Scripts("say(event='failed', error='FileNotFoundError: my/data')"),
            30.0,
        )
    said = str(caught.value)
    assert [word for word in ("rehearsal", "`ddp`", "rank 0: FileNotFoundError: my/data") if word not in said] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here to stand for a full disk")
def test_a_full_disk_is_met_and_the_file_of_before_stays_whole(tmp_path):
    found = results(tmp_path)
    before = (tmp_path / "pilot.json").read_text()
    (tmp_path / "pilot.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        found.rehearsed({"event": "rehearsed", "world_size": 2})
    assert (tmp_path / "pilot.json").read_text() == before
