"""The pilot, small: what it measures is there, and what it projects is what a whole run does."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import own_classes
from support.command_lines import only_fit_is_parsed, with_fewer_packages
from support.forked_python import forked, run_forked
from support.processes import launch

import lightning_comm.examples  # noqa: F401  # so that forked ranks need not load timm themselves
from lightning_comm.cli.fit.command import CommandLine
from lightning_comm.cli.pilot import command as pilot
from lightning_comm.cli.pilot.arguments import Refused, parse
from lightning_comm.cli.pilot.rank import TrialJob
from lightning_comm.cli.pilot.rank import run as run_trials
from lightning_comm.cli.pilot.trial_callbacks import Watch
from lightning_comm.core.ledger import wire_bytes

pytestmark = pytest.mark.timeout(360)  # more than it needs, where others are busy

CONFIG = Path(__file__).parents[2] / "configs" / "qsr.yaml"
COMMAND = Path(sys.executable).parent / "lightning-comm"
SMALL = ["--model.init_args.model_args.depth=1", "--model.init_args.model_args.embed_dim=32"]
RUN = [*SMALL, "--trainer.max_epochs=4", "--trainer.limit_train_batches=12", "--model.init_args.lr=0.004"]
SHORT_SCHEDULE = "--model.init_args.warmup_steps=2"
STEPS, WARMUP, REPEATS = 16, 5, 2  # more steps than an epoch has
STRATEGIES = ("ddp", "local_sgd", "post_local_sgd", "config")


@pytest.fixture(scope="module", autouse=True)
def _only_fit_is_parsed():
    with only_fit_is_parsed():
        yield


def run(words, folder, timeout_s=300):
    command = [COMMAND, "pilot", f"--config={CONFIG}", *words, "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return run_forked(command, capture_output=True, timeout=timeout_s, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the command: two ranks, four strategies and the limit, two repeats."""
    out = tmp_path_factory.mktemp("pilot")
    words = [*RUN, "--strategies", "local_sgd,post_local_sgd_fork,config"]
    words += ["--steps", str(STEPS), "--warmup-steps", str(WARMUP), "--repeats", str(REPEATS)]
    done = run(words, out)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = out.iterdir()
    return folder, json.loads((folder / "pilot.json").read_text()), done.stdout


def by_strategy(results):
    return {name: [t for t in results["trials"] if t["strategy"] == name] for name in (*STRATEGIES, "limit")}


def test_strategies_take_turns_and_every_repeat_begins_with_another(finished):
    _, results, _ = finished
    repeats = [[t["strategy"] for t in results["trials"] if t["repeat"] == repeat] for repeat in range(REPEATS)]
    assert repeats[0] == [*STRATEGIES, "limit"]
    assert repeats[1] == [*STRATEGIES[1:], "limit", "ddp"]


def test_all_trials_take_the_same_steps_on_two_ranks_over_more_than_an_epoch(finished):
    _, results, _ = finished
    assert {(len(t["step_s"]), *map(len, t["step_s"])) for t in results["trials"]} == {(2, STEPS, STEPS)}
    assert {sum(t["samples"]) for t in results["trials"]} == {STEPS * 2 * 16}
    assert results["job"]["total_steps"] == 48


def test_strategies_synchronise_where_they_do_in_a_real_run(finished):
    _, results, _ = finished
    found = by_strategy(results)
    for trial in found["local_sgd"]:
        assert trial["sync_steps"] == [8, 16]
    for trial in found["post_local_sgd"]:  # its gradient phase is shortened to half of the pilot
        assert (trial["gradient_steps"], trial["sync_steps"]) == (8, [16])
    for name in ("ddp", "limit"):
        assert {tuple(trial["sync_steps"]) for trial in found[name]} == {()}


def test_the_projection_has_the_rounds_of_a_whole_run(finished):
    """A run of the user's config to its end, by the real command line, is the judge."""
    _, results, _ = finished

    def train(rank):
        sys.argv[1:] = []
        words = [f"--config={CONFIG}", *RUN, "--trainer.logger=false"]
        words += ["--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=0"]
        line = CommandLine(args=["fit", *words], seed_everything_default=0, save_config_callback=None)
        return [done.step for done in line.trainer.strategy.history]

    ends, other = launch(train, world_size=2)
    assert results["plans"]["config"] == {"total_steps": 48, "gradient_steps": 0, "round_ends": ends}
    assert ends == other
    assert len({b - a for a, b in itertools.pairwise(ends)}) > 1  # the period grew
    assert results["plans"]["ddp"] == {"total_steps": 48, "gradient_steps": 48, "round_ends": []}
    assert results["plans"]["post_local_sgd"]["gradient_steps"] == 24
    assert results["plans"]["post_local_sgd"]["round_ends"] == [32, 40, 48]
    assert results["plans"]["limit"]["round_ends"] == []


def test_bytes_are_those_of_the_formula_and_the_limit_sends_none(finished):
    _, results, _ = finished
    payload = 4 * results["job"]["parameters"]
    average = wire_bytes("all_reduce", payload, world_size=2)
    found = by_strategy(results)
    for trial in found["ddp"]:
        assert trial["sent_bytes"] == pytest.approx([average] * STEPS)
    for trial in found["local_sgd"]:
        sent = {step: count for step, count in enumerate(trial["sent_bytes"], start=1) if count > 1000}
        assert sorted(sent) == trial["sync_steps"]
        assert list(sent.values()) == pytest.approx([average] * len(sent), rel=0.01)
    for trial in found["limit"]:
        assert max(trial["sent_bytes"][WARMUP:]) < 1000


def test_every_repeat_of_a_strategy_ends_with_the_same_loss(finished):
    _, results, _ = finished
    for trials in by_strategy(results).values():
        assert trials[0]["loss"] == pytest.approx(trials[1]["loss"], rel=1e-3)
        assert 0 < trials[0]["loss"] < 3


def test_terminal_and_page_show_the_numbers_and_the_page_needs_no_other_file(finished):
    folder, results, stdout = finished
    page = (folder / "pilot.html").read_text()
    for name in ("pilot.html", "pilot.json"):
        assert str(folder / name) in stdout
    for name in (*STRATEGIES, "without communication"):
        assert len(re.findall(rf"^{name}  +\S", stdout, re.MULTILINE)) == 2
        assert f"<td>{name}</td>" in page
    assert f"[10/10] ddp, repeat {REPEATS} of {REPEATS}" in stdout
    assert "2 repeat(s) show times, but not how sure they are, so nothing will be concluded: --repeats 3" in stdout
    assert "Inconclusive: 2 repeats have no interval" in stdout
    assert max(map(len, re.findall(r"^(?:---|.*  +step with).*$", stdout, re.MULTILINE))) <= 120
    assert "sanity check" in page
    assert 'src="data:image/svg+xml;base64,' in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert results["command"] in page.replace("&#x27;", "'")
    assert "Emulated" not in page


def test_nothing_of_a_real_run_is_left_on_the_disk(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "pilot.html",
        "pilot.json",
        "rank0.log",
        "rank1.log",
    ]


def test_a_pilot_of_the_installed_command_that_is_ended_leaves_no_rank_behind(tmp_path):
    shutil.copy(own_classes.__file__, tmp_path / "own.py")  # a module beside the config, for every rank
    config = {"model": {"class_path": "own.OwnModel"}, "data": {"class_path": "own.OwnData"}}
    config["trainer"] = {"accelerator": "cpu", "devices": 2, "max_epochs": 2}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # which is YAML as well
    words = ["pilot", "--config=config.yaml", "--steps=8", "--warmup-steps=0", "--repeats=50", "--out=pilots"]
    process = subprocess.Popen(
        [COMMAND, *words],
        cwd=tmp_path,
        env={**os.environ, **with_fewer_packages()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("[1/"):
            break
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "What was measured is in" in rest
    assert len(ranks) == 2
    assert [rank for rank in ranks if Path(f"/proc/{rank}").exists()] == []
    (folder,) = (tmp_path / "pilots").iterdir()
    assert json.loads((folder / "pilot.json").read_text())["trials"]


@pytest.fixture
def same_environment(monkeypatch):
    """Reading a config seeds, which sets variables that later tests would inherit."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.usefixtures("same_environment")
def test_what_fails_is_named_with_its_first_error_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    words = [
        f"--config={CONFIG}",
        *SMALL,
        "--trainer.callbacks=support.pilot_faults.FailsOnRank1",
        "--out",
        str(tmp_path),
    ]
    words += ["--strategies=local_sgd", "--trainer.max_steps=20", SHORT_SCHEDULE, "--repeats=1"]
    with forked():
        assert pilot.main(words) == 1
    said = capsys.readouterr().out
    assert said.count("Your run has 20 steps, so trials have 20, of which 5 warm up.\n") == 1
    assert "`local_sgd` failed in repeat 1: rank 1: ArithmeticError: a callback of the user's gave up\n" in said
    assert "The others go on without it." in said
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "pilot.json").read_text())
    assert [trial["strategy"] for trial in results["trials"]] == ["ddp", "limit"]
    assert {len(row) for trial in results["trials"] for row in trial["step_s"]} == {20}
    assert (results["settings"]["steps"], results["settings"]["warmup_steps"]) == (20, 5)
    assert list(results["failures"]) == ["local_sgd"]
    assert "<h2>What failed</h2>" in (folder / "pilot.html").read_text()


def in_a_rank(rank, words, given=()):
    """What a rank of a pilot tells, and how it ends."""
    sys.argv[1:] = []
    events = []
    job = TrialJob([f"--config={CONFIG}", *SMALL, *words], [(0, "ddp")], 60, 10, None, {}, given)
    try:
        run_trials(job, events.append)
    except Refused as refused:
        return events, str(refused)
    return events, None


def test_a_trial_that_a_callback_ends_is_refused_on_all_ranks_with_how_far_it_came():
    words = ["--trainer.callbacks=support.pilot_faults.EndsTheRun", "--trainer.callbacks.after=23"]
    (events, said), (_, other) = launch(in_a_rank, words, world_size=2)
    assert [event["event"] for event in events] == ["rehearsed", "begin"]
    assert said == other
    must_say = ["60 steps", "after 23", "should_stop", "--trainer.max_epochs", "--steps 23 --warmup-steps 5"]
    assert [word for word in must_say if word not in said] == []


@pytest.mark.parametrize(("steps", "given"), [(5, []), (20, ["steps"])])
def test_a_run_too_short_for_its_trials_is_refused_right_after_the_rehearsal(steps, given):
    words = [f"--trainer.max_steps={steps}", SHORT_SCHEDULE]
    (events, said), (_, other) = launch(in_a_rank, words, given, world_size=2)
    assert said is other is None
    assert [event["event"] for event in events] == ["refused"]
    assert "--trainer.max_epochs" in events[0]["error"]


@pytest.mark.parametrize(
    ("steps", "warmup", "total", "must_say"),
    [
        (10, 2, 10, None),  # a round of 8 steps and one of 2, which the end of the run cuts
        (8, 2, 8, ["first round lasts 8", "got 8", "no more", "max_epochs", "--warmup-steps 0"]),
        (8, 0, 8, None),
        (20, 10, 88, ["first round lasts 8", "got 20", "--steps 24 or more"]),
        (20, 10, None, ["--steps 24 or more"]),
    ],
)
def test_a_trial_must_hold_a_whole_round_or_the_one_that_ends_the_run(steps, warmup, total, must_say):
    watch = Watch(steps, warmup, is_limit=False)
    watch.gradient_steps = 0
    if must_say is None:
        watch._check_round(8, total)
        return
    with pytest.raises(Refused) as caught:
        watch._check_round(8, total)
    assert [word for word in must_say if word not in str(caught.value)] == []


BAD_WORDS = [
    ([], ["--config", "got none", "lightning-comm fit"]),
    (["--config=x", "--strategies=qsrr"], ["--strategies", "'qsrr'", "Near it are qsr"]),
    (["--config=x", "--strategies=,"], ["--strategies", "','", "ddp,local_sgd,qsr"]),
    (["--config=x", "--repeats=0"], ["--repeats", ">= 1", "got 0", "spread"]),
    (["--config=x", "--steps=1"], ["--steps", ">= 2", "got 1"]),
    (["--config=x", "--steps=10"], ["--steps", "10 that are not counted", "got 10", "--warmup-steps"]),
    (["--config=x", "--device-ms=0"], ["--device-ms", "> 0", "got 0.0", "Leave it out"]),
    (["--config=x", "--cost-per-hour=nan"], ["--cost-per-hour", "nan", "> 0"]),
]


@pytest.mark.parametrize(("words", "must_say"), BAD_WORDS)
def test_a_bad_option_is_named_with_its_value_and_a_way_out(words, must_say, capsys):
    assert pilot.main(words) == 2
    said = capsys.readouterr().err
    assert [word for word in ("lightning-comm pilot: error:", *must_say) if word not in said] == []


@pytest.mark.usefixtures("same_environment")
@pytest.mark.parametrize(
    ("words", "must_say"),
    [
        (["--trainer.devices=1"], ["one rank", "trainer.devices='1'", "--trainer.devices 2", "--hosts 2"]),
        (["--trainer.num_nodes=2"], ["trainer.num_nodes", "is 2", "torchrun", "--hosts"]),
        (["--trainer.strategy=auto", "--strategies=config"], ["`config`", "'auto'", "Leave `config` out"]),
        (["--out", "/dev/null/results"], ["--out", "'/dev/null/results'", "Not a directory", "another one"]),
    ],
)
def test_a_place_or_config_that_makes_no_sense_is_refused_before_anything_is_measured(words, must_say, capsys):
    assert pilot.main([f"--config={CONFIG}", *words]) == 2
    said = capsys.readouterr().err
    assert [word for word in must_say if word not in said] == []


@pytest.mark.usefixtures("same_environment")
def test_a_config_that_does_not_parse_is_shown_as_fit_shows_it(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("trainer:\n  max_epoch: 3\n")
    with pytest.raises(SystemExit) as caught:
        pilot.main([f"--config={tmp_path / 'bad.yaml'}"])
    assert caught.value.code == 2
    assert "max_epoch" in capsys.readouterr().err


def test_hosts_without_permission_are_refused_with_what_is_missing(monkeypatch):
    from lightning_comm.cli.pilot import arguments as pilot_arguments

    monkeypatch.setattr(pilot_arguments, "unavailable", lambda: "the kernel forbids user namespaces")
    with pytest.raises(Refused) as caught:
        parse(["--config=x", "--hosts=4"])
    said = str(caught.value)
    assert [word for word in ("--hosts", "forbids user namespaces", "Leave it out") if word not in said] == []


@pytest.mark.parametrize(
    ("words", "must_say"),
    [
        (["--hosts=1000"], ["`hosts`", "got 1000", "64"]),
        (["--hosts=2", "--link=1parsec"], ["--link", "'1parsec'", "mbit"]),
        (["--hosts=3", "--link=1gbit,100mbit"], ["--link", "3 hosts", "got 2"]),
    ],
)
def test_a_lab_that_cannot_be_is_refused_in_the_words_of_the_lab(words, must_say, monkeypatch):
    from lightning_comm.cli.pilot import arguments as pilot_arguments

    monkeypatch.setattr(pilot_arguments, "unavailable", lambda: None)
    with pytest.raises(Refused) as caught:
        parse(["--config=x", *words])
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_plain_ddp_is_always_tried_and_names_are_those_without_a_start_method():
    options, words = parse(["--config", "a", "-c", "b", "--strategies", "QSR_fork, qsr,config", "--x", "1"])
    assert options.strategies == ("ddp", "qsr", "config")
    assert words == ["--config=a", "--config=b", "--x", "1"]
