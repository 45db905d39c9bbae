"""An emulated cluster: several hosts on one Linux machine, joined by links of stated rates."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir
from types import TracebackType
from typing import Any

from lightning_comm.lab import namespaces
from lightning_comm.lab.arguments import check_arguments
from lightning_comm.lab.device.settings import SPEED_TAKEN_VARIABLE, SPEED_VARIABLE
from lightning_comm.lab.job import Job, LabResult
from lightning_comm.lab.namespaces import INTERFACE, LabError, unavailable
from lightning_comm.lab.network import HostNetwork, host_address

__all__ = ["Lab", "LabError", "LabResult", "check_arguments", "unavailable"]

LAB_VARIABLE = "LIGHTNING_COMM_LAB"  # describes the lab to commands on the hosts
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_PORT = 29500  # on host 0; hosts have networks of their own, so no other program uses it


class Lab:
    """Hosts on this machine, each with a network and processes of its own, joined by a switch.

    Every link is shaped in both directions. All of it lives in unnamed kernel namespaces, so nothing appears in the
    machine's own network, two labs never meet, and everything vanishes when the lab is closed or its process ends, also
    by ``kill -9``. Works as root and, where the kernel allows user namespaces, without root.

    Args:
        hosts: How many hosts; 1 to 64.
        link: The rate of every link, such as ``"100mbit"``, or one rate for each host.
        speeds: For each host, the speed of its emulated device (see :class:`DevicePacer`), handed on in the environment
            variable ``LIGHTNING_COMM_SPEED``.
        devices_per_host: How many processes of a job each host is to have; at least 1.

    Raises:
        ValueError: If an argument is out of range.
        LabError: If namespaces cannot be made; :func:`unavailable` returns why.

    Note:
        *Environment* of commands on the hosts: what Lightning, torchrun and ``init_process_group`` read
        (``MASTER_ADDR``, ``MASTER_PORT``, ``NODE_RANK``, ``GROUP_RANK``, ``NNODES``, torchrun's options as ``PET_…``,
        and with one device a host ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``), the interface for
        gloo and NCCL, one thread a process unless ``OMP_NUM_THREADS`` is set, and ``LIGHTNING_COMM_LAB``, which
        describes the lab as JSON.

        *Communication.* None of its own: only what the commands send crosses the links.

        *What is not emulated*: latency (the kernel adds some 0.05 ms), loss, and contention in the switch. Hosts share
        the machine's processors and disk.

    Example:
        >>> def ranks() -> list[str]:
        ...     with Lab(2, "100mbit") as lab:
        ...         return lab.run(["sh", "-c", "printf $RANK"], timeout_s=60).output
        >>> [rank.strip() for rank in ranks()] if unavailable() is None else ["0", "1"]
        ['0', '1']

    """

    def __init__(
        self,
        hosts: int,
        link: str | Sequence[str] = "1gbit",
        *,
        speeds: Sequence[float] | None = None,
        devices_per_host: int = 1,
    ) -> None:
        check_arguments(hosts, link, speeds, devices_per_host)
        self.links = [link] * hosts if isinstance(link, str) else list(link)
        self.speeds = None if speeds is None else list(speeds)
        self.devices_per_host = devices_per_host
        self._taken = Path(gettempdir()) / f"lightning-comm-lab-{token_hex(8)}"  # made by who reads a speed
        self._processes: list[list[subprocess.Popen[Any]]] = [[] for _ in self.links]
        self._network = HostNetwork(self.links)

    @property
    def hosts(self) -> int:
        """The number of hosts."""
        return len(self.links)

    def address(self, host: int) -> str:
        """Return a host's address in the lab's network."""
        return host_address(self._network.checked(host))

    # ---- commands ------------------------------------------------------------------------------------------------

    def environment(self, host: int) -> dict[str, str]:
        """Return what the lab adds to the environment of commands on a host."""
        world = {"hosts": self.hosts, "devices_per_host": self.devices_per_host, "links": self.links}
        variables = {
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(_PORT),
            "NODE_RANK": str(host),
            "GROUP_RANK": str(host),
            "NNODES": str(self.hosts),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            LAB_VARIABLE: json.dumps(world),
        }
        for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            variables[f"PET_{name}"] = variables[name]  # what torchrun reads for its options
        variables["PET_NPROC_PER_NODE"] = str(self.devices_per_host)
        if self.devices_per_host == 1:
            # with more, a launcher on the host sets them: where LOCAL_RANK is set, Lightning starts no processes
            variables |= {"RANK": str(host), "LOCAL_RANK": "0", "WORLD_SIZE": str(self.hosts), "LOCAL_WORLD_SIZE": "1"}
        if self.speeds is not None:
            variables |= {SPEED_VARIABLE: f"{self.speeds[host]:g}", SPEED_TAKEN_VARIABLE: str(self._taken)}
        return variables

    @property
    def speeds_taken(self) -> bool:
        """Whether a process on a host has read an emulated device's speed from the lab, and so uses it."""
        return self._taken.exists()

    def start(
        self, host: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, **popen: Any
    ) -> "subprocess.Popen[Any]":
        """Start a command on a host, as ``subprocess.Popen`` would.

        What the process started in turn outlives a signal to it, as anywhere; :meth:`end` ends all that runs on a host.

        Args:
            host: Which host, from 0.
            command: The program and its arguments.
            env: Replaces the environment that the lab's variables are added to, which is otherwise this process's.
            **popen: As in ``subprocess.Popen``.

        """
        namespace = self._network.alive(host)
        outside = os.environ if env is None else env
        process = namespaces.start(
            namespace,
            command,
            env={name: value for name, value in outside.items() if not _of_another_job(name)} | self.environment(host),
            start_new_session=True,  # a Ctrl-C in the terminal is the lab's to handle
            **popen,
        )
        self._processes[host].append(process)
        return process

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[int, str, bool], None] | None = None,
    ) -> LabResult:
        """Run a command once on every host; when one fails, end the others.

        When it is over, everything that runs on the hosts is ended, whatever started it.

        Args:
            command: The program and its arguments, the same on every host.
            timeout_s: Seconds after which all are ended; ``None`` for no limit.
            env: As in :meth:`start`.
            on_line: Called with host, line and whether it came from standard error, while the job runs.

        """
        return Job(self, command, env, on_line).run(timeout_s)

    def end(self, host: int, grace_s: float = 5.0) -> None:
        """End what runs on a host: by SIGTERM and, what is left after ``grace_s`` seconds, by SIGKILL."""
        self._network.checked(host)
        if not self._network.is_open:
            return  # the lab is closed, and nothing runs
        namespace = self._network.hosts[host]
        for command, patience_s in (("terminate", grace_s), ("kill", 5.0)):
            namespace.tell(command)
            namespace.tell("resume")  # a stopped process would not act on the signal
            deadline = time.monotonic() + patience_s
            while (runs := namespace.tell("look")) and time.monotonic() < deadline:
                time.sleep(0.01)
            if not runs:
                break
        for process in self._processes[host]:
            process.wait(5)

    # ---- faults --------------------------------------------------------------------------------------------------

    def set_link(self, host: int, rate: str, *, down: str | None = None) -> None:
        """Change the rate of a host's link while it is in use.

        Args:
            host: Which host, from 0.
            rate: The new rate, both ways; upwards alone where ``down`` is given.
            down: The rate towards the host.

        """
        self._network.shape(host, rate, down or rate)
        self.links[host] = rate if down is None else f"{rate} up, {down} down"

    def cut(self, host: int) -> None:
        """Cut the host's link to the switch, as a cable that is pulled out."""
        self._network.plug(host, into_switch=False)

    def restore(self, host: int) -> None:
        """Restore the host's link."""
        self._network.plug(host, into_switch=True)

    def stop(self, host: int) -> None:
        """Freeze every process on a host (SIGSTOP), as a machine that hangs."""
        self._network.alive(host).tell("stop")

    def resume(self, host: int) -> None:
        """Let a frozen host go on (SIGCONT)."""
        self._network.alive(host).tell("resume")

    def kill(self, host: int) -> None:
        """Let a host die at once and for good, with all its processes and its network, as in a power cut."""
        self._network.alive(host).close()
        for process in self._processes[host]:
            process.wait()

    # ---- counters ------------------------------------------------------------------------------------------------

    def sent_bytes(self, host: int) -> int:
        """Return the bytes that a host's interface has sent.

        The interface counts headers, 66 bytes of Ethernet, IP and TCP, once for each piece of up to 64 KiB that TCP
        hands to it; the shaper counts them for each frame of 1,514 bytes. So what is counted here is more than the
        payload by 0.2 % at 1 Gbit/s and 0.5 % at 100 Mbit/s, and what the link is busy with is more by 4.6 %.

        """
        return namespaces.counters(self._network.alive(host))[0]

    def received_bytes(self, host: int) -> int:
        """Return the bytes that a host's interface has received, counted as in :meth:`sent_bytes`."""
        return namespaces.counters(self._network.alive(host))[1]

    # ---- beginning and end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take the lab down: processes, links and hosts. Doing so again changes nothing."""
        self._network.close()
        for process in (each for processes in self._processes for each in processes):
            process.wait()
        self._taken.unlink(missing_ok=True)

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _of_another_job(name: str) -> bool:
    """Whether a variable describes a job that this process belongs to, which the hosts must not take for theirs."""
    return name in (*_RANK_VARIABLES, SPEED_VARIABLE, SPEED_TAKEN_VARIABLE) or name.startswith(
        ("TORCHELASTIC_", "SLURM_")
    )
