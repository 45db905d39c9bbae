"""On emulated hosts: a link that comes back costs time alone, and a host that is lost ends all, by name."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.forked_python import forked

SCRIPT = """
import os, sys, time
import torch
from lightning.pytorch import Callback, Trainer
from support.cyclic import cyclic, deep, momentum, reference
from support.training import Regression, loader

STEPS = 40

class Paced(Regression):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

class Mark(Callback):
    def __init__(self, run):
        self.run = run

    def on_train_batch_end(self, runner, *args):
        if runner.global_step == 5:
            open(f"{sys.argv[1]}/{self.run} {runner.global_rank}", "w").close()

def train(run):
    module, strategy = Paced(deep(9), momentum), cyclic()
    runner = Trainer(
        accelerator="cpu", devices=1, num_nodes=3, strategy=strategy, max_epochs=1, logger=False,
        use_distributed_sampler=False, callbacks=[Mark(run)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    runner.fit(module, loader(STEPS, int(os.environ["NODE_RANK"])))
    expected = Regression(deep(9), momentum)
    reference(expected, 3, STEPS, strategy.stage_names)
    same = [torch.equal(one, other) for one, other in zip(module.parameters(), expected.parameters())]
    print("SAME" if all(same) else "DIFFERENT", len(same), flush=True)

torch.set_num_threads(1)
train("cut")
train("lost")
"""


class Hosts:
    """Three hosts that train twice, one run behind the other."""

    def __init__(self, cluster, folder):
        script = folder / "train.py"
        script.write_text(SCRIPT)
        self.cluster, self.folder = cluster, folder
        path = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(folder)}
        self.started = [
            cluster.start(
                host, [sys.executable, str(script), str(folder)], env=path, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
            for host in range(3)
        ]  # fmt: skip

    def wait_for(self, run):
        """Until all have taken five steps of a run."""
        deadline = time.monotonic() + 60
        while not all((self.folder / f"{run} {rank}").exists() for rank in range(3)):
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.started):
                pytest.fail("\n".join(process.communicate(timeout=5)[0] for process in self.started))
            time.sleep(0.01)


@pytest.fixture(scope="module")
def outputs(module_lab, tmp_path_factory):
    """What all said, and how those ended that lived: a link is cut in the first run, a host is lost in the second."""
    with forked():
        hosts = Hosts(module_lab(3, "100mbit"), tmp_path_factory.mktemp("lab"))
    hosts.wait_for("cut")
    hosts.cluster.cut(1)
    time.sleep(1.5)
    assert all(process.poll() is None for process in hosts.started)
    assert not any(hosts.folder.glob("lost *"))
    hosts.cluster.restore(1)
    hosts.wait_for("lost")
    hosts.cluster.kill(2)
    outputs = [process.communicate(timeout=30)[0] for process in hosts.started]
    return outputs, [process.returncode for process in hosts.started[:2]]


def test_a_link_that_is_cut_and_restored_changes_nothing(outputs):
    texts, _ = outputs
    assert all("SAME 18" in text for text in texts), texts


def test_a_host_that_is_lost_ends_the_others_who_say_which_it_was(outputs):
    texts, statuses = outputs
    assert all(status not in (0, -6, 134) for status in statuses), texts
    assert any("Rank 2 does not answer" in text for text in texts[:2]), texts
