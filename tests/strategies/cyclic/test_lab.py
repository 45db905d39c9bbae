"""On emulated hosts: a link that comes back costs time alone, and a host that is lost ends all, by name."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
import torch
from lightning.pytorch import Callback, Trainer
from support.cyclic import cyclic, deep, momentum, reference
from support.training import Regression, loader

STEPS = 80

class Paced(Regression):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

class Mark(Callback):
    def on_train_batch_end(self, runner, *args):
        if runner.global_step == 10:
            open(f"{sys.argv[1]}/{runner.global_rank}", "w").close()

torch.set_num_threads(1)
module, strategy = Paced(deep(9), momentum), cyclic()
runner = Trainer(
    accelerator="cpu", devices=1, num_nodes=3, strategy=strategy, max_epochs=1, logger=False,
    use_distributed_sampler=False, callbacks=[Mark()],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
runner.fit(module, loader(STEPS, int(os.environ["NODE_RANK"])))
expected = Regression(deep(9), momentum)
reference(expected, 3, STEPS, strategy.stage_names)
same = [torch.equal(one, other) for one, other in zip(module.parameters(), expected.parameters())]
print("SAME" if all(same) else "DIFFERENT", len(same))
"""


@pytest.fixture
def hosts(lab, tmp_path):
    """Three hosts that train, and a way to wait until they do."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    cluster = lab(3, "100mbit")
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
    started = [
        cluster.start(
            host, [sys.executable, str(script), str(tmp_path)], env=path, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for host in range(3)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() for rank in range(3)):
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            pytest.fail("\n".join(process.communicate(timeout=5)[0] for process in started))
        time.sleep(0.01)
    return cluster, started


def test_a_link_that_is_cut_and_restored_changes_nothing(hosts):
    cluster, started = hosts
    cluster.cut(1)
    time.sleep(1.5)
    assert all(process.poll() is None for process in started)
    cluster.restore(1)
    for process in started:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "SAME 18" in output


def test_a_host_that_is_lost_ends_the_others_who_say_which_it_was(hosts):
    cluster, started = hosts
    cluster.kill(2)
    outputs = [process.communicate(timeout=30)[0] for process in started[:2]]
    assert all(process.returncode not in (0, -6, 134) for process in started[:2]), outputs
    assert any("Rank 2 does not answer" in output for output in outputs), outputs
