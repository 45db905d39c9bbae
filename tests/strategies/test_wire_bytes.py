"""What the network interface counted against what the ledger says: a network of its own, with no other traffic."""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support.processes import end_idle_ranks, launch
from support.training import Regression, loader, local_update, trainer

from lightning_comm import FixedPeriod

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40


def enter_own_network():
    """Put this process into a network that only a loopback interface belongs to; return why not, or `None`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return os.strerror(ctypes.get_errno())
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP | IFF_RUNNING))
    return None


def sent():
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise AssertionError("there is no loopback interface")


class Counted(Callback):
    """Counts between two moments at which all ranks have just met, so that nobody is sending."""

    def on_train_batch_end(self, runner, module, *args):
        ledger = runner.strategy.ledger
        if runner.global_step in (4, 16):
            torch.distributed.barrier()
            self.__dict__[f"at_{runner.global_step}"] = sent(), ledger.wire_bytes(), ledger.payload_bytes()


def run(rank, world_size):
    linear = torch.nn.Linear
    net = torch.nn.Sequential(linear(5, 600), torch.nn.Tanh(), linear(600, 900), linear(900, 1))
    counted = Counted()
    runner = trainer(local_update(FixedPeriod(4)), world_size, callbacks=[counted])
    runner.fit(Regression(net), loader(20, rank, dtype=torch.float32))
    return [after - before for before, after in zip(counted.at_4, counted.at_16, strict=True)]


def run_in_own_network(rank, world_size):
    """What the ranks counted, or why there is no network for them."""
    refused = enter_own_network()
    answers = refused or launch(run, world_size, world_size=world_size)
    end_idle_ranks()  # those of this process, which would be waited for at its end
    return answers


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_interface_counts_the_wire_bytes_of_the_ledger(world_size):
    [answers] = launch(run_in_own_network, world_size, world_size=1)
    end_idle_ranks()  # of which one has left the network of all others
    if isinstance(answers, str):
        pytest.skip(f"no network namespace can be made here: {answers}")
    assert len(answers) == world_size
    parameters = 4 * (5 * 600 + 600 + 600 * 900 + 900 + 900 + 1)
    assert answers[0][2] == pytest.approx(3 * parameters, rel=1e-3)  # three synchronisations, and the small rank status
    total = sum(wire for _, wire, _ in answers)
    assert total == pytest.approx(3 * parameters * 2 * (world_size - 1), rel=1e-3)
    for counted, _, _ in answers:
        assert counted == pytest.approx(total, rel=0.05)
