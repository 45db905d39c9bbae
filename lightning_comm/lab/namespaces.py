"""Hosts and a switch between them, as namespaces of the Linux kernel without a name.

A named namespace (``ip netns add``) is an entry in a folder, and stays when its maker is killed. These exist only as
long as their first process does (:mod:`lightning_comm.lab.host_init`), which ends with the one that started it.
"""

import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_comm.core.rates import parse_rate
from lightning_comm.lab import permissions

INTERFACE = "eth0"  # of every host
_NEW = ("unshare", "--net", "--pid", "--fork", "--kill-child")
_INIT = Path(__file__).with_name("host_init.py")
_ENTER = Path(__file__).with_name("host_enter.py")
_START_S = 10.0  # far longer than it takes to start a command
_LEAST_RATE, _MOST_RATE = "1kbit", "100gbit"
_QUEUE_S = 0.05  # what waits longer than this in a shaped queue is dropped
_FRAME_BYTES, _PAYLOAD_BYTES = 1514, 1448  # Ethernet with 1,500 bytes of IP, and what of them is TCP's payload
# TCP hands data over in pieces of many frames. A piece that is larger than the bucket is cut up, which costs processor
# time and rate; a large bucket lets messages pass unshaped after a pause. So pieces are short where links are slow.
_PIECE_S, _LEAST_PIECE_BYTES, _MOST_PIECE_BYTES = 0.0026, 8 * 1024, 64 * 1024
_LATE_S, _LEAST_LATE_BYTES = 0.00025, 16 * 1024  # what a timer that fires late lets gather in the bucket


def unavailable() -> str | None:
    """Return in one line why hosts cannot be emulated here, or ``None`` if they can be."""
    try:
        with Namespace() as switch:
            switch.run("ip", "link", "add", "br0", "type", "bridge")
            switch.run("ip", "link", "add", "p0", "type", "veth", "peer", "name", "p1")
            shape(switch, "p0", "100mbit")
    except LabError as error:
        return str(error)
    return None


class LabError(RuntimeError):
    """An error of the emulated hosts; the message names the cause."""


class Namespace:
    """A network and a set of processes of its own, held by one process.

    Args:
        beside: Another namespace, whose user namespace this one is made in; ``None`` makes one where that is needed,
            which is when this is not root.

    Raises:
        LabError: If the kernel does not allow it.

    """

    def __init__(self, beside: "Namespace | None" = None) -> None:
        if (missing := permissions.missing()) is not None:
            raise LabError(missing)
        self.needs_user: bool = beside.needs_user if beside else not permissions.may_administer()
        self._turn = threading.Lock()  # a fault and the end of a job may come at once
        new = permissions.with_path(_NEW)
        if beside is not None:
            new = [*beside.enter(network=False), *new]
        elif self.needs_user:
            new += ["--user", "--map-root-user"]
        owner = _own_pidfd()
        try:
            self._process = subprocess.Popen(
                [*new, sys.executable, "-I", "-S", str(_INIT), str(owner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # out of reach of a Ctrl-C in the terminal
                pass_fds=[owner] if owner >= 0 else [],
            )
        finally:
            if owner >= 0:
                os.close(owner)
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line.isdigit():
            _, error = self._process.communicate()
            raise LabError(permissions.why_not(error))
        self.pid = int(line)

    def enter(self, *, network: bool = True) -> list[str]:
        """Return the options that put a short command into this network, or only among its users."""
        options = ["--user", "--preserve-credentials"] if self.needs_user else []
        options += ["--net"] if network else []
        return permissions.with_path(("nsenter", "--target", str(self.pid), *options)) if options else []

    def run(self, *command: str) -> str:
        """Run a short command in this network and return what it printed.

        Raises:
            LabError: If it fails.

        """
        done = subprocess.run([*self.enter(), *permissions.with_path(command)], capture_output=True, text=True)
        if done.returncode != 0:
            raise LabError(permissions.what_failed(command, done.stderr.strip() or done.stdout.strip()))
        return done.stdout

    @property
    def alive(self) -> bool:
        """Whether the namespace still exists."""
        return self._process.poll() is None

    def tell(self, command: str) -> bool:
        """Signal every process in here, and return whether there was any.

        Args:
            command: ``stop``, ``resume``, ``terminate`` or ``kill``; ``look`` signals nothing.

        """
        with self._turn:
            if not self.alive:
                return False
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                print(command, file=self._process.stdin, flush=True)
                return self._process.stdout.readline() == "some\n"
            except BrokenPipeError:
                return False  # it ended in between, and with it all processes

    def close(self) -> None:
        """End every process in here, and the namespace with them."""
        assert self._process.stdin is not None
        if self.alive:
            try:
                print("exit", file=self._process.stdin, flush=True)
            except BrokenPipeError:
                self._process.kill()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_rate(rate: str) -> None:
    """Refuse what is no rate, or none that links can be given here.

    Raises:
        ValueError: If it is not a rate, or out of range.

    """
    if not parse_rate(_LEAST_RATE) <= parse_rate(rate) <= parse_rate(_MOST_RATE):
        raise ValueError(
            f"Lab: a link's rate must be from {_LEAST_RATE} to {_MOST_RATE}; got {rate!r}. Beyond some 10gbit this "
            "machine's processors are the limit."
        )


def shape(where: Namespace, interface: str, rate: str) -> None:
    """Let an interface send at no more than a rate: a token bucket that counts whole Ethernet frames.

    Raises:
        ValueError: If the rate is not one.

    """
    bytes_per_s = parse_rate(rate)
    piece = round(min(_MOST_PIECE_BYTES, max(_LEAST_PIECE_BYTES, bytes_per_s * _PIECE_S)))
    burst = round(piece * _FRAME_BYTES / _PAYLOAD_BYTES + max(_LEAST_LATE_BYTES, bytes_per_s * _LATE_S))
    where.run("ip", "link", "set", interface, "gso_max_size", str(piece))
    where.run(
        "tc", "qdisc", "replace", "dev", interface, "root", "tbf",
        "rate", f"{8 * bytes_per_s:.0f}bit", "burst", f"{burst}b", "limit", f"{round(burst + _QUEUE_S * bytes_per_s)}b",
    )  # fmt: skip


def connect(switch: Namespace, host: Namespace, index: int, address: str, rate: str) -> None:
    """Join a host to the switch by a link that is shaped both ways."""
    port = f"p{index}"
    switch.run(
        "ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(host.pid)
    )  # made in there, so that nothing of it appears in the machine's own network
    switch.run("ip", "link", "set", port, "master", "br0", "up")
    host.run("ip", "addr", "add", address, "dev", INTERFACE)
    host.run("ip", "link", "set", "lo", "up")
    host.run("ip", "link", "set", INTERFACE, "up")
    shape(host, INTERFACE, rate)
    shape(switch, port, rate)


def counters(host: Namespace) -> tuple[int, int]:
    """Return the bytes that a host's interface has sent and received."""
    text = Path(f"/proc/{host.pid}/net/dev").read_text()
    figures = next(line for line in text.splitlines() if line.strip().startswith(INTERFACE)).partition(":")[2].split()
    return int(figures[8]), int(figures[0])


def start(host: Namespace, command: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
    """Start a command on a host and return once it is one of the host's processes, so that faults hit it.

    Args:
        host: The host.
        command: The program and its arguments.
        **popen: As in ``subprocess.Popen``.

    """
    seen, started = os.pipe()
    try:
        options = [str(host.pid), "user" if host.needs_user else "root", str(started)]
        process: subprocess.Popen[Any] = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_ENTER), *options, *command],
            pass_fds=[started, *popen.pop("pass_fds", ())],
            **popen,
        )
        os.close(started)
        started = -1
        select.select([seen], [], [], _START_S)  # until it is closed at the other end too
    finally:
        for each in (seen, started):
            if each >= 0:
                os.close(each)
    return process


def _own_pidfd() -> int:
    """Return a file that becomes readable when this process ends, or -1 where the kernel is too old (before 5.3)."""
    try:
        return os.pidfd_open(os.getpid())
    except OSError:
        return -1
