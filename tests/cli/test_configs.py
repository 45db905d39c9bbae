"""Every file in `configs/`, run by the console command: forked with its ranks, and once as it is installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from support import own_classes
from support.command_lines import only_fit_is_parsed, with_fewer_packages
from support.forked_python import forked

import lightning_comm.examples  # noqa: F401  # so that forked ranks need not load timm themselves

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
COMMAND = Path(sys.executable).parent / "lightning-comm"
# More batches than the learning rate rises for, than a round lasts, and than are logged together.
FEW_BATCHES = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=10", "--trainer.limit_val_batches=1"]
SHORT = [*FEW_BATCHES, "--model.init_args.warmup_steps=2", "--model.init_args.model_args.depth=2"]
# What a config needs to come to all that it does: the first delayed step, average that was on its way, comparison.
MORE = {
    "cyclic": ["--trainer.strategy.init_args.warmup_sync_steps=2"],
    "cyclic_v1": ["--trainer.strategy.init_args.warmup_sync_steps=2"],
    "local_sgd_overlap": ["--trainer.limit_train_batches=17"],
    "adaptive_partition": ["--trainer.limit_train_batches=24"],
}


@pytest.fixture(scope="module", autouse=True)
def _only_fit_is_parsed():
    with only_fit_is_parsed():
        yield


def started(words: list[str], folder: Path, *, real: bool = False) -> "subprocess.Popen[str]":
    with nullcontext() if real else forked():
        return subprocess.Popen(
            [COMMAND, *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(with_fewer_packages() if real else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its ranks can be ended together with it
        )


def run(words: list[str], folder: Path, *, real: bool = False) -> str:
    """Run the command; return what it printed, or fail with it."""
    return said_by(started(words, folder, real=real))


def said_by(process: "subprocess.Popen[str]") -> str:
    try:
        text, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"not done after 120 s:\n{text}")
    assert process.returncode == 0, text
    return text


def test_there_are_configs_to_test():
    assert {"ddp", "qsr", "pactrain", "ddp_bf16", *MORE} <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_the_command_trains_with_the_config(config, tmp_path):
    text = run(["fit", f"--config={config}", *SHORT, *MORE.get(config.stem, [])], tmp_path)
    assert "Starting with 2 processes" in text
    assert "`max_epochs=1` reached" in text
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


# What a technique that is no strategy adds to DDP's config, by what it is called there.
ADDED = {
    "adaptive_partition": {
        "data": {"global_batch_size": 32},  # as many as two processes with `batch_size` 16 have together
        "callbacks": ["lightning_comm.AdaptivePartition", "lightning_comm.callbacks.EmulatedDevice"],
    }
}


def test_the_configs_differ_in_nothing_but_the_strategy_and_what_is_listed_here():
    contents = {config.stem: yaml.safe_load(config.read_text()) for config in CONFIGS}
    for stem, added in ADDED.items():
        data, trainer = contents[stem]["data"]["init_args"], contents[stem]["trainer"]
        assert {name: data.pop(name) for name in added["data"]} == added["data"]
        assert [callback["class_path"] for callback in trainer.pop("callbacks")] == added["callbacks"]
        assert trainer["strategy"] == "ddp"
        assert contents.pop(stem) == contents["ddp"]
    strategies = [content["trainer"].pop("strategy") for content in contents.values()]
    assert all(content == contents["ddp"] for content in contents.values())
    assert all(strategies.count(strategy) == 1 for strategy in strategies)


def test_without_its_last_lines_the_config_of_adaptive_partition_is_that_of_a_real_run():
    text = (CONFIGS[0].parent / "adaptive_partition.yaml").read_text()
    head, _ = text.split("    - class_path: lightning_comm.callbacks.EmulatedDevice # delete this and what follows")
    [callback] = yaml.safe_load(head)["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_comm.AdaptivePartition"


def test_shares_on_the_command_line_and_their_journal_replayed(tmp_path):
    words = ["fit", f"--config={CONFIGS[0].parent / 'ddp.yaml'}", *SHORT]
    words += ["--data.global_batch_size=32", "--trainer.callbacks+=AdaptivePartition"]
    run([*words, "--trainer.callbacks.mode=fixed", "--trainer.callbacks.shares=[1,3]"], tmp_path)
    first = tmp_path / "adaptive_partition" / "run_0" / "journal.json"
    run([*words, f"--trainer.callbacks.replay={first}"], tmp_path)
    second = tmp_path / "adaptive_partition" / "run_1" / "journal.json"
    journals = [json.loads(path.read_text()) for path in (first, second)]
    assert [journal["mode"] for journal in journals] == ["fixed", "balance"]
    assert [[change["sizes"] for change in journal["changes"]] for journal in journals] == [[[8, 24]]] * 2
    assert [journal["changes"][0]["why"] for journal in journals] == ["start", "replay"]
    states = [
        torch.load(next(tmp_path.glob(f"lightning_logs/version_{k}/checkpoints/*.ckpt")), weights_only=True)
        for k in (0, 1)
    ]
    one, other = (state["state_dict"] for state in states)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_says_how_to_run_it(config):
    assert f"#   lightning-comm fit --config configs/{config.name}\n" in config.read_text()


def test_the_installed_command_trains_by_grasp_and_own_classes_in_a_config_and_uses_what_it_trained(tmp_path):
    """Real starts: `fit` with a rank that it starts itself, and one of each other command that is Lightning's."""
    content = yaml.safe_load((CONFIGS[0].parent / "pactrain.yaml").read_text())
    mask = content["trainer"]["strategy"]["init_args"]["compression"][0]["init_args"]
    mask["pruning"] = {
        "class_path": "lightning_comm.GraSPPruning",
        "init_args": {"sparsity": 0.7, "samples": 32, "scope": "layer"},
    }
    mask["schedule"] = {"start_step": 2, "end_step": 6, "every_steps": 2}
    shutil.copy(own_classes.__file__, tmp_path / "own.py")  # a module beside the config, for every rank
    content |= {"model": {"class_path": "own.OwnModel"}, "data": {"class_path": "own.OwnData"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))  # where Lightning writes, without a logger
    text = run(["fit", "--config=config.yaml", *FEW_BATCHES], tmp_path, real=True)
    assert "Starting with 2 processes" in text
    assert "`max_epochs=1` reached" in text
    saved = yaml.safe_load(next(tmp_path.glob("lightning_logs/version_0/config.yaml")).read_text())
    [mask, _] = saved["trainer"]["strategy"]["init_args"]["compression"]
    assert mask["init_args"]["pruning"]["class_path"].endswith("GraSPPruning")
    [checkpoint] = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    weights = [value for value in state["state_dict"].values() if value.dim() >= 2]
    zero = sum(int((value == 0).sum()) for value in weights) / sum(value.numel() for value in weights)
    assert zero == pytest.approx(0.7, abs=0.01)
    alone = ["--config=config.yaml", f"--ckpt_path={checkpoint}", "--trainer.strategy=auto", "--trainer.devices=1"]
    alone += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    alone += [f"--trainer.limit_{part}_batches=1" for part in ("val", "test", "predict")]
    users = {use: started([use, *alone], tmp_path, real=True) for use in ("validate", "test", "predict")}
    said = {use: said_by(process) for use, process in users.items()}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == content  # no command has written over it
    assert [
        use for use, metric in (("validate", "val_accuracy"), ("test", "test_accuracy")) if metric not in said[use]
    ] == []
