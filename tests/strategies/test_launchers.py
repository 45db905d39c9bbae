"""Every way to start processes ends with equal weights: by name, from a plain script, as a user would."""

import multiprocessing.util
import os
import sys
import textwrap

import pytest
from support.forked_python import _search_path, run_forked
from support.new_process import as_new, end_as_interpreter, run_as_main
from support.processes import free_port

SCRIPT = """
    import sys, torch
    from torch.utils.data import DataLoader
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    import lightning_comm

    class Model(BoringModel):
        def on_fit_end(self):
            total = sum(parameter.double().sum().item() for parameter in self.parameters())
            synchronised = [done.step for done in self.trainer.strategy.history]
            with open(f"end{self.global_rank}.txt", "w") as file:  # printed lines of two processes can mix
                print(self.trainer.world_size, repr(total), synchronised, file=file)

    if __name__ == "__main__":
        trainer = Trainer(strategy=sys.argv[1], accelerator="cpu", devices=2, max_epochs=1, limit_val_batches=0,
                          logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.fit(Model(), DataLoader(torch.randn(80, 32), batch_size=2))
"""


def spawn_by_fork(_, command, files):
    """Do what multiprocessing does to spawn a process, which gets all that it works on through a pipe, but forked."""
    pid = os.fork()
    if pid == 0:
        with end_as_interpreter():
            as_new(dict(os.environ), files, _search_path())
            code = command.index("-c") + 1
            run_as_main("-c", command[code], command[code + 1 :])
    return pid


@pytest.mark.parametrize(
    ("name", "really"),
    [
        ("qsr", False),
        ("local_sgd_spawn", False),
        pytest.param("local_sgd_spawn", True, marks=pytest.mark.exhaustive),
        ("post_local_sgd_fork", False),
        ("qsr_notebook", False),
        ("torchrun", False),
    ],
)
def test_a_run_started_in_this_way_ends_equal(tmp_path, monkeypatch, name, really):
    if not really:
        monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_by_fork)
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    own = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in own} | {"OMP_NUM_THREADS": "1"}
    env["MASTER_PORT"] = str(free_port())  # one that Lightning finds, the kernel may give away before rank 0 has it
    command = [sys.executable, str(script), name]
    if name == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        command = [sys.executable, *torchrun, str(script), "local_sgd"]
    done = run_forked(command, capture_output=True, timeout=120, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [path.read_text() for path in sorted(tmp_path.glob("end*.txt"))]
    assert len(ends) == 2
    assert ends[0] == ends[1]
    assert ends[0].startswith("2 ")
    assert ends[0].endswith("20]\n")
