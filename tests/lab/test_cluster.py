"""Emulated hosts as hosts: who reaches whom, what faults do, and that nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partialmethod
from pathlib import Path

import pytest

from lightning_comm.lab import cluster
from lightning_comm.lab.cluster import Lab, LabError

PYTHON = [sys.executable, "-I", "-S", "-c"]

# Answers on port 7001 with the time at which it was asked.
ANSWER = """
import socket
with socket.create_server(("", 7001)) as server:
    while True:
        peer, _ = server.accept()
        peer.send(b"here")
        peer.close()
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7001), timeout=float(sys.argv[2])) as peer:
    peer.settimeout(float(sys.argv[2]))
    print(peer.recv(10).decode())
"""


def answers(lab, asker, host, patience_s=0.6):
    process = lab.start(
        asker, [*PYTHON, ASK, lab.address(host), str(patience_s)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return process.communicate(timeout=20)[0] == b"here\n"


def until(condition, patience_s=5.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def three(module_lab):
    """Three hosts that tests share; each test leaves them as it found them."""
    return module_lab(3, ["100mbit", "100mbit", "1gbit"], speeds=[1, 0.5, 2])


def test_every_host_has_the_environment_of_a_launcher_and_its_own_speed(three):
    names = ["NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"]
    names += ["OMP_NUM_THREADS", "LIGHTNING_COMM_SPEED"]
    done = three.run(["sh", "-c", "echo " + " ".join(f"${name}" for name in names)], timeout_s=20)
    assert done.returncode == 0
    assert [line.split() for line in done.output] == [
        ["0", "0", "0", "3", "10.77.0.1", "eth0", "1", "1"],
        ["1", "1", "0", "3", "10.77.0.1", "eth0", "1", "0.5"],
        ["2", "2", "0", "3", "10.77.0.1", "eth0", "1", "2"],
    ]


def test_hosts_with_several_devices_leave_the_local_ranks_to_their_launcher(lab):
    done = lab(1, devices_per_host=2).run(["sh", "-c", "echo ${LOCAL_RANK-none} $LIGHTNING_COMM_LAB"], timeout_s=20)
    assert done.output[0].startswith('none {"hosts": 1, "devices_per_host": 2')


def test_a_cut_host_answers_again_once_its_link_is_restored(three):
    three.start(0, [*PYTHON, ANSWER])
    assert until(lambda: answers(three, 1, 0))
    three.cut(0)
    assert not answers(three, 1, 0)
    three.restore(0)
    assert until(lambda: answers(three, 1, 0))
    three.end(0)


def test_a_stopped_host_says_nothing_until_it_is_resumed(three):
    three.start(0, [*PYTHON, ANSWER])
    assert until(lambda: answers(three, 1, 0))
    three.stop(0)
    assert not answers(three, 1, 0)
    three.resume(0)
    assert until(lambda: answers(three, 1, 0))
    three.end(0)


def test_a_killed_host_takes_its_processes_along_and_leaves_the_others(lab):
    two = lab(2)
    victim = two.start(0, ["sh", "-c", "sleep 100 & sleep 100"])
    other = two.start(1, ["sleep", "100"])
    time.sleep(0.2)
    two.kill(0)
    assert victim.poll() == -signal.SIGKILL
    assert other.poll() is None


def test_hosts_reach_neither_the_machine_nor_the_hosts_of_another_lab(lab):
    first, second = lab(2), lab(2)
    first.start(0, [*PYTHON, ANSWER])
    assert until(lambda: answers(first, 1, 0))
    assert not answers(second, 1, 0)
    assert "10.77" not in subprocess.run(["ip", "addr"], capture_output=True, text=True).stdout


def test_the_first_host_that_fails_decides_and_the_others_are_ended(three):
    began = time.monotonic()
    lines = []
    done = three.run(
        ["sh", "-c", "echo out; echo err >&2; if [ $RANK = 1 ]; then sleep 1; exit 3; fi; sleep 60; exit 5"],
        timeout_s=50,
        on_line=lambda host, line, is_error: lines.append((host, line, is_error)),
    )
    assert (done.returncode, done.host, done.why) == (3, 1, "host 1 ended with exit code 3")
    assert time.monotonic() - began < 20
    assert sorted(set(lines)) == sorted((host, *said) for host in range(3) for said in (("out", False), ("err", True)))


def test_a_host_that_is_killed_in_a_job_ends_it_for_all(lab):
    two = lab(2)
    lines = []

    def on_line(host, line, is_error):
        lines.append(line)
        if host == 1:
            two._network.hosts[1].tell("kill")  # from a reader's thread, as `kill` would wait for that very thread

    done = two.run(["sh", "-c", "echo up; sleep 60"], timeout_s=50, on_line=on_line)
    assert (done.returncode, done.host, done.why) == (137, 1, "host 1 was ended by SIGKILL")


def test_time_that_is_up_ends_what_ignores_a_request(lab, monkeypatch):
    monkeypatch.setattr(Lab, "end", partialmethod(Lab.end, grace_s=0.5))
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    done = lab(2).run([*PYTHON, stubborn], timeout_s=0.5)
    assert (done.returncode, done.host) == (124, None)
    assert "hosts [0, 1] were still running" in done.why
    assert time.monotonic() - began < 20


SCRIPT = """
import sys, time
from lightning_comm_command import _put_in_place
_put_in_place("lightning_comm")  # without executing it, which would load torch
from lightning_comm.lab.cluster import Lab
with Lab(2) as lab:
    jobs = [lab.start(host, ["sleep", "4321"]).pid for host in range(2)]
    print(*jobs, lab._network.switch.pid, *(host.pid for host in lab._network.hosts), flush=True)
    time.sleep(100)
"""


def test_nothing_is_left_of_a_lab_that_was_killed(labs_can_be_made):
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    everything = [Path(f"/proc/{pid}") for pid in process.stdout.readline().split()]
    assert len(everything) == 5
    assert all(each.exists() for each in everything)
    process.kill()
    process.wait()
    assert until(lambda: not any(each.exists() for each in everything))
    assert subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout == links


def test_a_process_forked_while_a_lab_is_open_does_not_keep_it_alive(lab):
    two = lab(2)
    sleeper = two.start(0, ["sleep", "4321"])
    child = os.fork()
    if child == 0:
        time.sleep(30)  # holds copies of the lab's pipes
        os._exit(0)
    try:
        two.close()
        assert sleeper.poll() is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lab_works_without_root(labs_can_be_made):
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)
    if os.geteuid() != 0:
        pytest.skip("these tests do not run as root, so all of them show it")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    python = "/usr/bin/python3"  # others may not be readable to all
    can = subprocess.run([*nobody, "unshare", "--user", "--net", python, "-c", ""], capture_output=True, text=True)
    if can.returncode != 0:
        pytest.skip(f"a user without rights cannot make namespaces here: {can.stderr.strip()}")
    package = Path(cluster.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:  # what nobody may read, and what does not need torch
        copy = Path(folder) / "lightning_comm"
        for part in ("lab", "core"):
            shutil.copytree(package / part, copy / part)
        (copy / "__init__.py").touch()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        done = subprocess.run(
            [*nobody, python, "-c", NOBODYS], capture_output=True, text=True, timeout=60, cwd=folder
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10.77.0.1" in done.stdout
    assert "10.77.0.2" in done.stdout


NOBODYS = """
import os
from lightning_comm.lab.cluster import Lab, unavailable
assert os.geteuid() != 0
assert unavailable() is None, unavailable()
with Lab(2, "100mbit") as lab:
    lab.set_link(1, "10mbit")
    print(lab.run(["ip", "-o", "addr", "show", "eth0"], timeout_s=20))
"""


@pytest.mark.parametrize(
    ("arguments", "must_say"),
    [
        ({"hosts": 0}, ["`hosts`", "from 1 to 64", "got 0"]),
        ({"hosts": 65}, ["`hosts`", "from 1 to 64", "got 65", "share this machine"]),
        ({"hosts": 2, "link": "100"}, ["'100'", "mbit", "100mbit"]),
        ({"hosts": 2, "link": "1bit"}, ["rate", "1kbit to 100gbit", "'1bit'"]),
        ({"hosts": 2, "link": ["1gbit", "1e9gbit"]}, ["rate", "'1e9gbit'", "processors"]),
        ({"hosts": 3, "link": ["1gbit", "1gbit"]}, ["`link`", "one for each of the 3 hosts", "got 2"]),
        ({"hosts": 2, "speeds": [1]}, ["`speeds`", "each of the 2 hosts", "[1]"]),
        ({"hosts": 2, "speeds": [1, 0]}, ["`speeds`", "> 0", "[1, 0]"]),
        ({"hosts": 2, "speeds": [1, float("nan")]}, ["`speeds`", "nan"]),
        ({"hosts": 2, "devices_per_host": 0}, ["`devices_per_host`", ">= 1", "got 0"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(arguments, must_say):
    with pytest.raises(ValueError, match="must be") as caught:
        Lab(**arguments)
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_a_host_that_is_not_there_and_a_lab_that_is_closed_are_named(lab):
    one = lab(1)
    with pytest.raises(ValueError, match="from 0 to 0; got 1"):
        one.cut(1)
    with pytest.raises(ValueError, match="got '5 parsecs'"):
        one.set_link(0, "5 parsecs")
    one.close()
    one.close()
    with pytest.raises(LabError, match="closed"):
        one.cut(0)
