"""The demo, small: its pages agree with its numbers, and its numbers with the formula."""

import base64
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from support.command_lines import only_fit_is_parsed
from support.forked_python import forked, run_forked

import lightning_comm.examples  # noqa: F401  # so that forked ranks need not load timm themselves
from lightning_comm.cli.demo import command as demo
from lightning_comm.cli.demo import pilot as demo_pilot
from lightning_comm.cli.demo import run as demo_run
from lightning_comm.cli.demo.run import RunSettings
from lightning_comm.core.quantities import megabytes, percent
from lightning_comm.planning.pilot.costs import Trial, costs

pytestmark = pytest.mark.timeout(360)  # more than it needs, where others are busy

COMMAND = Path(sys.executable).parent / "lightning-comm"
SMALL = ["demo", "--devices", "2", "--epochs", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the command, with the fewest processes and epochs, in large batches, and with a short pilot.

    Its model is as large as ever, so that its bytes take their time, but looks at a quarter of the patches.
    """
    out = tmp_path_factory.mktemp("demo")
    command = [COMMAND, *SMALL, "--batch-size", "32", "--pilot-repeats", "1"]
    with (
        only_fit_is_parsed(),
        mock.patch.dict(demo_run.MODEL_ARGS, patch_size=4),
        mock.patch.object(demo_pilot, "_STEPS", 16),
        mock.patch.object(demo_pilot, "_DEVICE_MS", 40),
    ):
        done = run_forked([*command, "--out", str(out)], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = out.iterdir()
    return folder, json.loads((folder / "results.json").read_text()), done.stdout


def is_gone(pid):
    """Whether a process has ended, though its parent may not have taken note."""
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def runs_by_method(results):
    return {run["method"]: run for run in results["runs"]}


def test_every_method_trains_the_same_samples(finished):
    _, results, _ = finished
    assert [run["method"] for run in results["runs"]] == ["ddp", "local_sgd", "qsr"]
    assert {(run["world_size"], run["steps"], run["samples"], run["seed"]) for run in results["runs"]} == {
        (2, 22, 22 * 2 * 32, 0)
    }
    assert len({tuple(run["lrs"]) for run in results["runs"]}) == 1


def test_bytes_equal_the_formula(finished):
    _, results, _ = finished
    for method, run in runs_by_method(results).items():
        one_average = run["parameter_bytes"] * 2 * (2 - 1) / 2  # a ring of 2 ranks
        if method == "ddp":
            assert run["synchronisations"] == run["steps"]
            assert run["training_wire_bytes"] == run["steps"] * one_average
        else:
            assert 0 < run["synchronisations"] == len(run["rounds"]) < run["steps"] / 3
            assert run["wire_bytes"]["parameters"] == run["synchronisations"] * one_average
            control = run["training_wire_bytes"] - run["wire_bytes"]["parameters"]
            assert control == run["wire_bytes"]["control"]
            assert control < 0.01 * run["training_wire_bytes"]


def test_rounds_follow_one_another_to_the_last_step(finished):
    _, results, _ = finished
    for run in results["runs"][1:]:
        lengths = [done["period_steps"] for done in run["rounds"]]
        assert [done["end_step"] for done in run["rounds"]] == [sum(lengths[: k + 1]) for k in range(len(lengths))]
        assert sum(lengths) == run["steps"]


def test_the_table_shows_the_numbers_of_the_file(finished):
    folder, results, stdout = finished
    for method, name in (("ddp", "DDP"), ("local_sgd", "Local SGD"), ("qsr", "QSR")):
        run = runs_by_method(results)[method]
        share = run["training_wire_bytes"] / results["runs"][0]["training_wire_bytes"]
        cells = [percent(run["accuracy"]), str(run["synchronisations"]), megabytes(run["training_wire_bytes"])]
        cells += [percent(share), f"{run['wall_s']:.0f} s"]
        (row,) = [line for line in stdout.splitlines() if re.match(rf"{name}  +\d", line)]
        assert re.split("  +", row) == [name, *cells]
        assert f"| {name} | {' | '.join(cells)} |" in (folder / "report.md").read_text()


def test_the_paths_are_printed_and_the_page_needs_no_other_file(finished):
    folder, results, stdout = finished
    page = (folder / "report.html").read_text()
    for name in ("report.html", "figure.png", "results.json"):
        assert str(folder / name) in stdout
    assert base64.b64encode((folder / "figure.png").read_bytes()).decode() in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert results["command"] in page
    assert results["environment"]["torch"] in page


def test_times_are_measured_on_shaped_links_where_the_machine_can(finished, labs_can_be_made):
    folder, results, stdout = finished
    if labs_can_be_made is not None:
        assert f"Times on a slow link are left out: emulated hosts cannot be had here ({labs_can_be_made})." in stdout
        assert results["pilot"] is None
        return
    pilot = results["pilot"]
    assert pilot["settings"]["lab"] == {"hosts": 2, "devices_per_host": 1, "links": ["100 Mbit/s"] * 2}
    assert [trial["strategy"] for trial in pilot["trials"]] == ["ddp", "local_sgd", "qsr", "limit"]
    ddp, local_sgd, *_ = (costs(Trial.read(trial)) for trial in pilot["trials"])
    link_s = results["runs"][0]["parameter_bytes"] / 12.5e6  # a ring of two ranks sends each byte once
    assert ddp.gradient_step_bytes == pytest.approx(results["runs"][0]["parameter_bytes"])
    assert min(ddp.gradient_step_s, local_sgd.sync_s) > 0.7 * link_s  # a shaper lets the first bytes pass at once
    assert pilot["plans"]["qsr"]["round_ends"] == [end["end_step"] for end in runs_by_method(results)["qsr"]["rounds"]]
    for text in ("Time on a slow network", "Hosts and links were emulated: 2 hosts"):
        assert text in (folder / "report.html").read_text()
        assert text in (folder / "report.md").read_text()


def test_the_installed_command_trains_in_processes_that_it_starts_and_keeps_what_it_has_when_interrupted(tmp_path):
    command = [COMMAND, *SMALL, "--batch-size", "64", "--pilot-repeats", "0", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell has what it starts in the background ignore this signal, and all that is started from there
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        said = list(
            itertools.takewhile(lambda line: not line.startswith("[1/3] DDP, seed 0: epoch 1 of 1"), process.stdout)
        )
        (folder,) = tmp_path.iterdir()
        while not (folder / "logs" / "local_sgd-seed0.log").exists():  # of the next run
            assert process.poll() is None, said
            time.sleep(0.05)
        (run,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert [run["method"] for run in json.loads((folder / "results.json").read_text())["runs"]] == ["ddp"]
    deadline = time.monotonic() + 20
    while not is_gone(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_fails_is_named_with_the_end_of_its_output(tmp_path, capfd):
    (tmp_path / "logs").mkdir()
    run = RunSettings("no_such_method", seed=0, devices=2, epochs=1, lr=1e-3, batch_size=16)
    with forked():
        assert demo.run_one(run, tmp_path, "[1/3] Nothing, seed 0") is None
    said = capfd.readouterr().out
    assert [word for word in ("[1/3] Nothing, seed 0 failed", "no_such_method", "ValueError") if word not in said] == []


def test_a_failed_run_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_one", lambda *_: None)
    assert demo.main(["--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("arguments", "must_say"),
    [
        (["--devices", "1"], ["--devices", ">= 2", "got 1", "nobody to talk to"]),
        (["--seeds", "0"], ["--seeds", ">= 1", "got 0"]),
        (["--epochs", "0"], ["--epochs", ">= 1", "got 0"]),
        (["--lr", "-1"], ["--lr", "-1.0", "> 0"]),
        (["--lr", "nan"], ["--lr", "nan", "> 0"]),
        (["--pilot-repeats", "-1"], ["--pilot-repeats", ">= 0", "got -1", "leaves"]),
        (["--batch-size", "720", "--devices", "2"], ["--batch-size", "720", "1437", "<= 718"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(arguments, must_say, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    said = capsys.readouterr().err
    assert [word for word in must_say if word not in said] == []


def test_all_missing_extras_are_named_in_a_line_with_their_installation_before_anything_is_trained(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert demo.main(["--out", str(tmp_path / "results")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-comm demo: it needs 'timm', 'matplotlib', which are not installed. ")
    assert line.endswith("`pip install timm matplotlib` gets them.")
    assert not (tmp_path / "results").exists()
