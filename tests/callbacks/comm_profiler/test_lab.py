"""What the profiler counts against what the network interfaces of emulated hosts counted."""

import json
import sys
from pathlib import Path

import pytest
from support.forked_python import forked

PARAMETERS = 4 * (5 * 900 + 900 + 900 * 900 + 900 + 900 + 1)  # bytes; 3.3 MB, so messages are larger than 1 MiB
SCRIPT = '''
import json
from datetime import timedelta
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from support.training import Regression, loader, local_update, trainer
from lightning_comm import CommProfiler, FixedPeriod

def sent():
    counts = {}
    for line in open("/proc/net/dev"):
        name, _, counters = line.partition(":")
        if counters:
            counts[name.strip()] = int(counters.split()[8])
    return sum(count for name, count in counts.items() if name != "lo")

class Counted(Callback):
    """Reads the interface at two moments at which all ranks have just met, so that nobody is sending."""

    def __init__(self):
        self.at = {}

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        if batch_idx in (4, 12):
            dist.barrier()
            self.at[batch_idx] = sent()
            dist.barrier()

def run(strategy):
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 900), torch.nn.Tanh(), torch.nn.Linear(900, 900), torch.nn.Tanh(), torch.nn.Linear(900, 1)
    )
    profiler, counted = CommProfiler("FOLDER", page=False), Counted()
    runner = trainer(strategy, 1, num_nodes=3, callbacks=[counted, profiler])
    runner.fit(Regression(net), loader(16, runner.global_rank, dtype=torch.float32))
    within = [step for step in profiler.steps if 4 <= step.batch < 12]
    return {
        "counted": counted.at[12] - counted.at[4],
        "wire": sum(sum(step.wire_bytes.values()) for step in within),
        "payload": sum(step.payload_bytes.get(name, 0) for step in within for name in ("gradients", "parameters")),
        "bandwidth": profiler.figures.bandwidth_bytes_per_s,
        "exposed_s": profiler.figures.exposed_s,
        "hosts": [rank.host for rank in profiler.figures.ranks],
        "clock_error_s": profiler.figures.clock_error_s,
    }

timeout = timedelta(seconds=60)
print("ANSWER", json.dumps([run(DDPStrategy(timeout=timeout)), run(local_update(FixedPeriod(4)))]))
'''


@pytest.fixture(scope="module")
def answers(module_lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    script = folder / "train.py"
    script.write_text(SCRIPT.replace("FOLDER", str(folder / "profile")))
    cluster = module_lab(3, "500mbit")
    with forked():
        result = cluster.run(
            [sys.executable, str(script)],
            timeout_s=120,
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(folder)},
        )
    assert result.returncode == 0, "\n".join(result.output)
    return [
        json.loads(line.partition("ANSWER ")[2])
        for output in result.output
        for line in output.splitlines()
        if "ANSWER " in line
    ]


@pytest.mark.parametrize(("strategy", "messages"), [(0, 8), (1, 2)], ids=["ddp", "local_sgd"])
def test_wire_bytes_are_those_that_the_interfaces_counted(answers, strategy, messages):
    ranks = [rank[strategy] for rank in answers]
    assert len(ranks) == 3
    assert [rank["payload"] for rank in ranks] == [messages * PARAMETERS] * 3
    wire = sum(rank["wire"] for rank in ranks)
    assert wire == pytest.approx(messages * PARAMETERS * 4, rel=0.001)  # a ring of three: 4/3 from each
    assert sum(rank["counted"] for rank in ranks) == pytest.approx(wire, rel=0.05)


def test_a_shaped_link_is_seen_as_the_bottleneck_that_it_is(answers):
    ddp, local = answers[0]
    assert 0.3 < ddp["bandwidth"] / (500e6 / 8) < 1.05
    # a quarter of the bytes, and a wait for the slowest of three ranks on what may be two processors
    assert ddp["exposed_s"] > 1.2 * local["exposed_s"]
    assert ddp["clock_error_s"] < 0.1
    assert len(set(ddp["hosts"])) == 3, "hosts of one name are told apart by their node"
