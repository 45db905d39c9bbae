"""An emulated host is as mortal as a machine: what faults do to it and its processes, in any order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_comm.lab.cluster import LabError


def until(condition, patience_s=5.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_stopped_host_can_be_killed_and_goes_with_its_lab(lab):
    two = lab(2)
    processes = [two.start(host, ["sleep", "4321"]) for host in range(2)]
    for host in range(2):
        two.stop(host)
    two.kill(0)
    assert processes[0].poll() == -signal.SIGKILL
    two.close()
    assert processes[1].poll() == -signal.SIGKILL


def test_a_host_that_is_stopped_and_resumed_in_quick_turns_goes_on(lab):
    one = lab(1)
    process = one.start(0, ["sleep", "0.5"])
    for _ in range(50):
        one.stop(0)
        one.resume(0)
    assert process.wait(20) == 0


def test_signals_to_the_process_of_a_command_reach_the_command(lab):
    one = lab(1)
    polite = one.start(0, ["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"], stdout=-1)
    assert polite.stdout.readline() == b"up\n"
    polite.terminate()
    assert polite.wait(20) == 7
    victim = one.start(0, ["sleep", "4321"])
    victim.kill()
    victim.wait()
    assert until(lambda: not one._network.hosts[0].tell("look"))


def test_what_a_command_left_behind_is_ended_with_the_job(lab):
    one = lab(1)
    began = time.monotonic()
    assert one.run(["sh", "-c", "sleep 4321 & exit 0"], timeout_s=20).returncode == 0
    assert not one._network.hosts[0].tell("look")
    assert time.monotonic() - began < 4  # nobody waited for it


def test_a_killed_host_is_named_by_whatever_is_asked_of_it(lab):
    two = lab(2)
    two.kill(1)
    for ask in (two.cut, two.restore, two.stop, two.resume, two.kill, two.sent_bytes, two.received_bytes):
        with pytest.raises(LabError, match="host 1 has been killed"):
            ask(1)
    with pytest.raises(LabError, match="host 1 has been killed"):
        two.start(1, ["true"])
    two.end(1)  # there is nothing to end
    assert two.start(0, ["true"]).wait(20) == 0


OWNER = """
import os, time
from lightning_comm_command import _put_in_place
_put_in_place("lightning_comm")  # without executing it, which would load torch
from lightning_comm.lab.cluster import Lab
lab = Lab(1)
host = lab._network.hosts[0].pid
command = lab.start(0, ["sleep", "4321"]).pid
lab.stop(0)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, host, command, flush=True)
time.sleep(60)
"""


def test_a_lab_goes_with_its_owner_though_a_fork_of_that_lives_on_and_a_host_is_stopped(labs_can_be_made):
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    child, *others = (int(word) for word in owner.stdout.readline().split())  # the child holds the lab's pipes
    try:
        assert all(Path(f"/proc/{pid}").exists() for pid in others)
        owner.kill()
        owner.wait()
        assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others))
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)
