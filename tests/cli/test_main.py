"""What the console command says, where it hands on, and that Lightning's part of it knows our names."""

import functools
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from support.command_lines import only_fit_is_parsed

import lightning_comm
from lightning_comm import AdaptivePartition
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.cli.fit.command import strategy_problem
from lightning_comm.cli.main import COMMANDS, Command, main

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks

CONFIGS = Path(__file__).parents[2] / "configs"
ONE_BATCH = [
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.limit_train_batches=1",
    "--trainer.max_steps=30",
    "--model.init_args.warmup_steps=0",
]


@pytest.fixture(scope="module", autouse=True)
def _only_fit_is_parsed():
    with only_fit_is_parsed():
        yield


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch):
    """Seeding a run sets variables that later tests would inherit; what is set here is taken back."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def test_help_says_what_each_command_does(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name, command in COMMANDS.items() if f"  {name} " not in text or command.what not in text] == []


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lightning-comm {lightning_comm.__version__}"


def test_no_command_is_a_mistake_that_shows_the_help(capsys):
    assert main([]) == 2
    assert "usage: lightning-comm COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "must_say"),
    [("ft", ["'ft'", "Did you mean fit?"]), ("validation", ["'validation'", "validate"]), ("?", ["'?'", "--help"])],
)
def test_an_unknown_command_is_named_with_those_near_it(name, must_say, capsys):
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert [word for word in must_say if word not in message] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    for place in filter(None, (COMMANDS[name].run, COMMANDS[name].check)):
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_gets_the_words_after_its_name_and_decides_on_the_exit_code(answer, code, monkeypatch):
    given = []
    monkeypatch.setitem(sys.modules, "some.module", SimpleNamespace(run=lambda words: given.append(words) or answer))
    monkeypatch.setitem(COMMANDS, "mine", Command("test this", "some.module:run"))
    assert main(["mine", "--a", "b"]) == code
    monkeypatch.setattr(sys, "argv", ["lightning-comm", "mine", "c"])
    assert main() == code
    assert given == [["--a", "b"], ["c"]]


@pytest.mark.parametrize("name", ["auto", "ddp", "qsr", "local_sgd", "post_local_sgd_fork", "QSR"])
def test_names_that_the_trainer_would_find_are_let_through(name):
    assert strategy_problem(name) is None


@pytest.mark.parametrize(
    ("name", "must_say"),
    [
        ("qsrr", ["strategy", "'qsrr'", "qsr"]),
        ("xxxxxxxx", ["strategy", "'xxxxxxxx'", "Known are auto", "local_sgd"]),
        ("lightning_comm.LocalUpdateStrategy", ["--trainer.strategy.class_path=lightning_comm.LocalUpdateStrategy"]),
    ],
)
def test_a_wrong_strategy_ends_the_command_with_one_sentence(name, must_say, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", f"--config={CONFIGS / 'ddp.yaml'}", f"--trainer.strategy={name}"])
    assert caught.value.code == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [word for word in must_say if word not in message] == []


def test_a_run_may_go_on_in_the_folder_where_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.version=0"]
    run = ["fit", f"--config={CONFIGS / 'ddp.yaml'}", *logger, *ONE_BATCH, "--trainer.limit_val_batches=0"]
    assert main([*run, "--trainer.max_epochs=1"]) == 0
    folder = tmp_path / "lightning_logs" / "version_0"
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    assert main([*run, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]) == 0
    assert "max_epochs: 2\n" in (folder / "config.yaml").read_text()


def test_the_seed_of_a_run_is_fixed_unless_it_is_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = []
    for seed in ([], [], ["--seed_everything=1"]):
        run = ["fit", f"--config={CONFIGS / 'ddp.yaml'}", "--trainer.logger=false", *ONE_BATCH]
        main([*run, "--trainer.fast_dev_run=true", *seed])
        seeds.append(torch.initial_seed())
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.fixture
def built(monkeypatch):
    """The Trainers that are told to fit, which they do not do."""
    trainers = []

    @functools.wraps(Trainer.fit)
    def fit(trainer, *args, **kwargs):
        trainers.append(trainer)

    monkeypatch.setattr(Trainer, "fit", fit)
    return trainers


@pytest.mark.parametrize(
    "given",
    [
        {
            "mode": ("observe", "observe"),
            "shares": ("[1,3]", (1, 3)),
            "min_per_rank": ("4", 4),
            "max_per_rank": ("28", 28),
            "window_steps": ("7", 7),
            "min_gain": ("0", 0),
            "warmup_steps": ("0", 0),
            "loss_reduction": ("sum", "sum"),
            "folder": ("here", "here"),
        },
        {"shares": ("[0.5,1.5]", (0.5, 1.5)), "max_per_rank": ("null", None)},
        {
            "batch_sizes": ("[8,24]", (8, 24)),
            "min_per_rank": ("[4,2]", (4, 2)),
            "max_per_rank": ("[20,28]", (20, 28)),
        },
        {"replay": ("journal.json", "journal.json"), "folder": ("null", None)},
    ],
    ids=lambda given: " ".join(given),
)
@pytest.mark.parametrize("written", ["on the command line", "in a config"])
def test_every_argument_of_adaptive_partition_can_be_given(written, given, built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.callbacks+=AdaptivePartition"]
    words += [f"--trainer.callbacks.{name}={text}" for name, (text, _) in given.items()]
    if written == "in a config":
        arguments = {name: yaml.safe_load(text) for name, (text, _) in given.items()}
        callback = {"class_path": "lightning_comm.AdaptivePartition", "init_args": arguments}
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
        words = ["--config=more.yaml"]
    assert main(["fit", f"--config={CONFIGS / 'ddp.yaml'}", *words]) == 0
    [partition] = [each for each in built[0].callbacks if isinstance(each, AdaptivePartition)]
    assert {name: getattr(partition.settings, name) for name in given} == {
        name: value for name, (_, value) in given.items()
    }


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("[1,3]", (1, 3)), ("null", None)])
def test_the_speed_of_an_emulated_device_can_be_a_number_or_one_for_each_rank(
    text, value, built, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    device = ["--trainer.callbacks.step_s=0.01", "--trainer.callbacks.batch_size=16"]
    words = ["--trainer.callbacks+=EmulatedDevice", *device, f"--trainer.callbacks.speed={text}"]
    assert main(["fit", f"--config={CONFIGS / 'ddp.yaml'}", *words]) == 0
    [device] = [each for each in built[0].callbacks if isinstance(each, EmulatedDevice)]
    assert device.speed == value


@pytest.mark.parametrize(
    ("speed", "more", "slows_nothing"),
    [
        ("0.5", [], True),
        ("0.5", ["--trainer.callbacks.speed=2"], True),
        ("0.5", ["--trainer.callbacks.speed=null"], False),
        ("1", [], False),
    ],
)
def test_fit_says_before_training_that_an_emulated_speed_slows_nothing(
    speed, more, slows_nothing, built, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_COMM_SPEED", speed)
    device = ["--trainer.callbacks+=EmulatedDevice", "--trainer.callbacks.step_s=1", "--trainer.callbacks.batch_size=4"]
    assert main(["fit", f"--config={CONFIGS / 'ddp.yaml'}", *(device if more else []), *more]) == 0
    said = capsys.readouterr().err
    assert ("`--speed` slows nothing on this host" in said) == slows_nothing
    assert ("--trainer.callbacks+=lightning_comm.callbacks.EmulatedDevice" in said) == slows_nothing
    assert len(built) == 1
