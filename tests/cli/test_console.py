"""The console command from its first line on: what it loads, and where it looks for the user's own modules."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.command_lines import only_fit_is_parsed
from support.processes import free_port

import lightning_comm
import lightning_comm_command
from lightning_comm.cli.fit.arguments import problem_of
from lightning_comm.cli.fit.user_modules import import_problem
from lightning_comm.cli.main import main

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks

ROOT = Path(__file__).parents[2]
CONFIG, README = ROOT / "configs" / "qsr.yaml", ROOT / "README.md"
WITHOUT_TORCH = [
    *([], ["--version"], ["--help"], ["ft"]),
    *([name, "--help"] for name in ("lab", "probe", "pilot", "demo")),
    *([name, "--no-such-option"] for name in ("lab", "probe", "pilot", "demo")),
    *(
        ["lab", "--link", "7parsec", "--", "true"],
        ["lab", "--hosts", "0", "--", "true"],
        ["lab", "--", "no-such-program"],
    ),
    *(["probe", "--sizes", "7parsec"], ["pilot", "--config=x", "--steps=0"], ["demo", "--devices=1"]),
    *(["fit"], ["fit", "own.yaml"], ["pilot", "own.yaml"], ["lab", "python", "train.py"]),
]
LINES = """
import json, sys
from lightning_comm_command import main
seen = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    seen.append([code, "torch" in sys.modules])
print(json.dumps(seen))
"""
NET = """
from pathlib import Path
import torch
from lightning.pytorch import LightningModule

class Net(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr, self.layer = lr, torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def on_train_end(self):
        Path(f"rank {self.global_rank} of {self.trainer.world_size}").touch()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)
"""


@pytest.fixture(scope="module", autouse=True)
def _only_fit_is_parsed():
    with only_fit_is_parsed():
        yield


@pytest.fixture
def job(tmp_path, monkeypatch):
    """An empty folder, and what makes a module and a config of the user's in it."""
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what a run sets is taken back
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def make(module, text=NET, config="own.yaml", beside="."):
        (folder / beside).mkdir(exist_ok=True)
        (folder / beside / f"{module}.py").write_text(text)
        content = {
            "model": {"class_path": f"{module}.Net", "init_args": {"lr": 0.05}},
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False},
        }
        (folder / beside / config).write_text(yaml.safe_dump(content))

    yield make
    for name in [name for name in sys.modules if name == "own" or name.startswith("users_")]:
        del sys.modules[name]


def command(*words):
    return ["fit", *words, "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]


def test_torch_is_loaded_by_no_help_no_version_and_no_wrong_word(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LINES, json.dumps(WITHOUT_TORCH)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [words for words, (_, loaded) in zip(WITHOUT_TORCH, seen, strict=True) if loaded] == []
    wrong = [words for words, (code, _) in zip(WITHOUT_TORCH, seen, strict=True) if code != 0]
    assert wrong == [[], ["ft"], *WITHOUT_TORCH[8:]]


def test_an_own_module_in_the_current_folder_is_trained_by_the_config_that_the_readme_shows(job, monkeypatch):
    job("own")
    (shown,) = re.findall(r"```yaml\n# own.yaml\n(.*?)```", README.read_text(), re.DOTALL)
    Path("own.yaml").write_text(shown)
    monkeypatch.setattr(sys, "argv", ["lightning-comm", *command("--config=own.yaml", "--trainer.logger=false")])
    sys.argv.append("--trainer.strategy=qsr_fork")
    assert lightning_comm_command.main() == 0
    assert sys.path[0] == os.getcwd()
    assert sorted(path.name for path in Path().glob("rank *")) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_module_beside_the_config_is_found_last_and_hides_nothing(job):
    job("users_other", beside="sub")
    (Path("sub") / "json.py").write_text("raise ImportError('hidden')")
    before = list(sys.path)
    assert main(command("--config", "sub/own.yaml")) == 0
    assert sys.path == [*before, str(Path("sub").resolve())]


@pytest.mark.parametrize(
    ("text", "name", "must_say"),
    [
        (
            None,
            "users_nowhere.Net",
            [
                "model: ",
                "no module 'users_nowhere'",
                "current folder, {here}",
                "users_nowhere.py or the folder users_nowhere/ lies",
            ],
        ),
        (NET, "users_net.Nett", ["model: ", "'users_net.Nett'", "users_net.py has no 'Nett'", "Near it is Net."]),
        (
            "import no_such_package",
            "users_net.Net",
            [
                "model: ",
                "whose module needs 'no_such_package'",
                "folder, {here}",
                "not beside the config",
                "no_such_package.py or the folder no_such_package/ lies, or install it",
            ],
        ),
        (NET, "users_ent.Net", ["no module 'users_ent'", "Near it is users_net. Start the command where users_ent.py"]),
        (NET, "users_net.part.Net", ["no module 'users_net.part'", "users_net/part.py or the folder users_net/part/"]),
        (NET, "Net", ["`class_path` must be a module and a class in it; got 'Net'. Write users_net.Net."]),
        (NET, "Ten", ["got 'Ten'. Write the module in front of it, as in my_module.Ten."]),
        ("def net(:", "users_net.Net", ["model: ", "SyntaxError", "users_net.py, line 1", "Mend it"]),
        ("1 / 0", "users_net.Net", ["model: ", "ZeroDivisionError: division by zero", "Mend it"]),
    ],
    ids=["no module", "no class", "no package", "near", "no part", "no dot", "nowhere", "syntax", "error"],
)
def test_a_class_that_cannot_be_imported_is_named_with_the_reason_and_the_way_out(text, name, must_say, job, capsys):
    job("users_net", text or NET)
    sys.path.insert(0, os.getcwd())
    for config in (["--config=own.yaml"], []):
        with pytest.raises(SystemExit) as caught:
            main(["fit", *config, f"--model={name}"])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        missing = [words for words in must_say if words.format(here=os.getcwd()) not in said]
        assert missing == ([] if config else [words for words in must_say if "beside the config" in words])
        assert said.count("\n") == 1  # no wall above it


def test_all_classes_of_a_config_that_cannot_be_imported_are_named_at_once(job, capsys):
    job("users_net")
    sys.path.insert(0, os.getcwd())
    wrong = {"callbacks": [{"class_path": "users_net.Call"}, {"class_path": "lightning_comm.CommProfiler"}]}
    config = {"model": {"class_path": "users_none.Net"}, "trainer": {**wrong, "strategy": {"class_path": "users_no.S"}}}
    Path("wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", "--config=wrong.yaml"])
    said = capsys.readouterr().err
    assert re.findall(r"got '(.*?)'", said) == ["users_none.Net", "users_net.Call", "users_no.S"]
    assert said.count("\n") == 3


OTHER_WORDS = [
    (["own.yaml"], ["got 'own.yaml'", "write --config own.yaml"]),
    (["users_net.py"], ["got 'users_net.py'", "write --model users_net.Net"]),
    (["--trainer.max_epochs", "-1", "last.ckpt"], ["got 'last.ckpt'", "write --ckpt_path last.ckpt"]),
    (["--config", "own.yaml", "x"], ["got 'x'", "--config FILE", "--model MODULE.CLASS", "--help"]),
    (["--config", "onw.yaml"], ["`--config` must be a file; got 'onw.yaml'", "none in {here}", "Near it is own.yaml"]),
    (["-c", "sub/a.yaml"], ["got 'sub/a.yaml'", "none in {here}/sub", "Give its path"]),
    (["--config=users_net.py"], ["must be a YAML file; got 'users_net.py'", "write --model users_net.Net"]),
]


@pytest.mark.parametrize(("words", "must_say"), OTHER_WORDS, ids=[" ".join(words) for words, _ in OTHER_WORDS])
def test_a_word_that_no_option_takes_is_one_line_with_the_option_that_would(words, must_say, job, capsys):
    job("users_net")
    for command in ("fit", "validate", "test", "predict", "pilot"):
        assert main([command, *words]) == 2
        said = capsys.readouterr().err
        must = [f"lightning-comm {command}: error: ", *must_say]
        assert [word for word in must if word.format(here=os.getcwd()) not in said] == []
        assert said.count("\n") == 1


def test_a_run_without_a_model_names_a_config_and_a_model_that_are_there(job, capsys):
    job("users_net")
    for words in ([], ["--trainer.max_epochs", "3"]):
        assert main(["fit", *words]) == 2
        said = capsys.readouterr().err
        assert "got neither. Write --config own.yaml, or --model users_net.Net.\n" in said
    for path in Path().glob("*"):
        path.unlink()
    assert main(["fit"]) == 2
    assert "Write --config my.yaml, or --model my_module.Net.\n" in capsys.readouterr().err


def test_words_that_the_parser_takes_are_left_to_it(job):
    job("users_net")
    for words in (
        ["--config", "own.yaml", "--trainer.max_epochs", "-1", "--trainer.callbacks+=A", "--ckpt_path", "a.ckpt"],
        ["--config={model: users_net.Net}", "--print_config"],
        ["--model", "users_net.Net", "--trainer.devices=2"],
        ["--help"],
        ["--print_config"],
    ):
        assert problem_of(words) is None, words


def test_callbacks_data_and_strategies_that_cannot_be_imported_are_named_alike(job, capsys):
    job("users_net")
    for words, key in (
        (["--data=users_none.Data"], "data"),
        (["--trainer.callbacks+=users_none.Callback"], "trainer.callbacks"),
        (["--trainer.strategy.class_path=users_none.Strategy"], "trainer.strategy"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(CONFIG), *words])
        assert f"error: {key}: `class_path` must be a class that can be imported" in capsys.readouterr().err


def test_an_argument_that_is_wrong_is_still_shown_as_the_parser_shows_it(capsys):
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONFIG}", "--model.init_args.lr=fast"])
    assert "Expected a <class 'float'>" in capsys.readouterr().err
    assert import_problem("lightning_comm.examples.TimmClassifier") is None


def test_a_config_with_an_example_names_the_package_that_it_lacks(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lightning_comm.examples")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(lightning_comm, "examples", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONFIG}"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "it needs 'timm', which is not installed. `pip install timm` gets it." in line


@pytest.mark.parametrize("name", ["torch.py", "lightning/__init__.py", "random.py"])
def test_a_file_that_hides_a_module_is_named_and_others_are_not(name, tmp_path):
    (tmp_path / "own.py").touch()
    (tmp_path / "numpy").mkdir()  # without an `__init__.py` it hides no package
    assert lightning_comm_command._hiding(tmp_path) == []
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert lightning_comm_command._hiding(tmp_path) == [name]
    assert name in lightning_comm_command._warning(tmp_path, [name])
