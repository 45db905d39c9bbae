"""What the network interface counted against what the ledger says: a network of its own, with no other traffic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import fcntl, json, socket, struct, sys
import torch
from lightning.pytorch import Callback
from support.processes import launch
from support.training import Regression, loader, local_update, trainer
from lightning_comm import FixedPeriod

def loopback_up():
    with socket.socket() as sock:
        request = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS

def sent():
    for line in open("/proc/net/dev"):
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])

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
    return [after - before for before, after in zip(counted.at_4, counted.at_16)]

if __name__ == "__main__":
    loopback_up()
    print(json.dumps(launch(run, int(sys.argv[1]), world_size=int(sys.argv[1]))))
'''


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_interface_counts_the_wire_bytes_of_the_ledger(tmp_path, world_size):
    script = tmp_path / "count.py"
    script.write_text(SCRIPT)
    can = subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True, text=True)
    if can.returncode != 0:
        pytest.skip(f"no network namespace can be made here: {can.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "--net", "--map-root-user", sys.executable, str(script), str(world_size)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    parameters = 4 * (5 * 600 + 600 + 600 * 900 + 900 + 900 + 1)
    assert answers[0][2] == pytest.approx(3 * parameters, rel=1e-3)  # three synchronisations, and small control rows
    total = sum(wire for _, wire, _ in answers)
    assert total == pytest.approx(3 * parameters * 2 * (world_size - 1), rel=1e-3)
    for counted, _, _ in answers:
        assert counted == pytest.approx(total, rel=0.05)
