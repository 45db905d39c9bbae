"""Every file in `configs/`, run by the real command in processes of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
COMMAND = Path(sys.executable).parent / "lightning-comm"


def run(words: list[str], folder: Path) -> str:
    """Run the command; return what it printed, or fail with it."""
    process = subprocess.Popen(
        [COMMAND, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its ranks can be ended together with it
    )
    try:
        text, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"not done after 120 s:\n{text}")
    assert process.returncode == 0, text
    return text


def test_there_are_configs_to_test():
    assert {"ddp", "local_sgd", "post_local_sgd", "qsr", "pactrain", "ddp_bf16"} <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_command_trains_with_the_config(config, tmp_path):
    text = run(["fit", f"--config={config}", "--trainer.max_epochs=1"], tmp_path)
    assert "Starting with 2 processes" in text
    assert "`max_epochs=1` reached" in text
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


def test_the_configs_differ_in_nothing_but_the_strategy():
    contents = [yaml.safe_load(config.read_text()) for config in CONFIGS]
    strategies = [content["trainer"].pop("strategy") for content in contents]
    assert all(content == contents[0] for content in contents)
    assert all(strategies.count(strategy) == 1 for strategy in strategies)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_says_how_to_run_it(config):
    assert f"#   lightning-comm fit --config configs/{config.name}\n" in config.read_text()


def test_grasp_on_a_schedule_can_be_written_in_a_config(tmp_path):
    content = yaml.safe_load((CONFIGS[0].parent / "pactrain.yaml").read_text())
    mask = content["trainer"]["strategy"]["init_args"]["compression"][0]["init_args"]
    mask["pruning"] = {
        "class_path": "lightning_comm.GraSPPruning",
        "init_args": {"sparsity": 0.7, "samples": 32, "scope": "layer"},
    }
    mask["schedule"] = {"start_step": 2, "end_step": 6, "every_steps": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    text = run(["fit", "--config=config.yaml", "--trainer.max_epochs=1"], tmp_path)
    assert "`max_epochs=1` reached" in text
    saved = yaml.safe_load(next(tmp_path.glob("lightning_logs/version_0/config.yaml")).read_text())
    [mask, _] = saved["trainer"]["strategy"]["init_args"]["compression"]
    assert mask["init_args"]["pruning"]["class_path"].endswith("GraSPPruning")
    state = torch.load(next(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")), weights_only=True)
    weights = [value for value in state["state_dict"].values() if value.dim() >= 2]
    zero = sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)
    assert zero == pytest.approx(0.7, abs=0.01)
