"""Every notebook runs from its first cell to its last, in a fork of this interpreter; one at times in a new one too."""

import json
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.forked_python import forked

# what every kernel that is forked needs, and a new one loads in seconds
import lightning_comm.examples  # noqa: F401

for name in ("ipykernel.kernelapp", "matplotlib_inline.backend_inline"):
    import_module(name)  # behind what Lightning loads: progress bars look for widgets where a kernel is loaded first

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
IN_A_NEW_PYTHON = "measure"
# What takes long and shows nothing that a shorter run does not: written in the notebook, and here.
FEW_BATCHES = "max_epochs=1, limit_train_batches={}, limit_val_batches=2"
FEW_STEPS = [("max_epochs=epochs", FEW_BATCHES.format(8)), ("warmup_steps=20", "warmup_steps=2")]
FEW_STEPS += [
    (r"depth\": 4", r"depth\": 2"),
    (r"CommProfiler(f\"profile/{name}\")", r"CommProfiler(f\"profile/{name}\", page=False)"),
]
SHORTER = {
    # so many that its figures have times to show
    "adaptive_partition": [("max_epochs=3", FEW_BATCHES.format(36)), ("step_s=0.06", "step_s=0.03")],
    "compression": [*FEW_STEPS, ('\\"ddp_bf16\\", \\"ddp_int8\\", \\"ddp_topk\\"', '\\"ddp_int8\\"')],
    "cyclic": [("epochs=10", "epochs=1"), ("[0.005, 0.01, 0.02, 0.05, 0.1]", "[0.01, 0.1]")],
    "local_update": [("total_steps = 800", "total_steps = 60"), ("max_epochs=2", FEW_BATCHES.format(12))],
    "measure": [
        ("max_steps=84", "max_steps=20"),
        ("step_s=0.04", "step_s=0.02"),
        (r"CommProfiler(f\"profile/{strategy}\")", r"CommProfiler(f\"profile/{strategy}\", page=strategy[0] == \"d\")"),
    ],
    "sparse_mask": [
        *(*FEW_STEPS, ("(50, 80, 90, 95)", "(90,)")),
        (
            "PruningSchedule(start_step=20, end_step=100, every_steps=20)",
            "PruningSchedule(start_step=2, end_step=8, every_steps=2)",
        ),
    ],
}


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Name a kernel that is this very interpreter: one that is registered as ``python3`` may be another."""
    folder = tmp_path / "jupyter" / "kernels" / "here"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    argv.append("--IPKernelApp.matplotlib=inline")  # which it is by itself where matplotlib is not loaded yet
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "here"


def test_there_are_notebooks():
    assert IN_A_NEW_PYTHON in [path.stem for path in NOTEBOOKS]
    assert set(SHORTER) <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize(
    ("path", "is_new"),
    [
        *[pytest.param(path, False, id=path.stem) for path in NOTEBOOKS],
        # what the kernel loads takes longer than the notebook
        *[
            pytest.param(path, True, id=f"{path.stem} in a new Python", marks=pytest.mark.exhaustive)
            for path in NOTEBOOKS
            if path.stem == IN_A_NEW_PYTHON
        ],
    ],
)
def test_the_notebook_runs(path, is_new, kernel, tmp_path):
    text = path.read_text()
    for long, short in SHORTER.get(path.stem, []):
        assert long in text
        text = text.replace(long, short)
    notebook = nbformat.reads(text, as_version=4)
    client = NotebookClient(notebook, timeout=120, kernel_name=kernel, resources={"metadata": {"path": str(tmp_path)}})
    with nullcontext() if is_new else forked():
        client.execute()
    assert all(cell["execution_count"] for cell in notebook.cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_kept_without_outputs(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell["cell_type"] == "code"]
    assert [cell["source"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
