"""`lightning-comm lab`: what a user sees of the hosts, how it ends, and that training in it is one run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jsonargparse import Namespace
from support.command_lines import only_fit_is_parsed
from support.forked_python import forked

import lightning_comm.examples  # noqa: F401  # so that forked ranks need not load timm themselves
from lightning_comm.cli import lab as command
from lightning_comm.cli.fit.command import follow_lab

CONFIG = Path(__file__).parents[2] / "configs" / "qsr.yaml"


@pytest.fixture
def run_lab(labs_can_be_made, capfd):
    """Run the command in this process; return exit status, lines of standard output, lines of standard error."""
    if labs_can_be_made is not None:
        pytest.skip(labs_can_be_made)

    def run(*words):
        capfd.readouterr()
        status = command.main(words)
        said = capfd.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


def test_output_is_prefixed_by_host_and_errors_stay_errors(run_lab):
    status, out, err = run_lab("--hosts", "2", "--", "sh", "-c", r"printf 'hello\r10 %%\r'; echo $NODE_RANK >&2")
    assert status == 0
    assert sorted(out) == ["[host 0] 10 %", "[host 0] hello", "[host 1] 10 %", "[host 1] hello"]
    assert sorted(err) == ["[host 0] 0", "[host 1] 1"]


def test_the_first_host_that_fails_gives_the_status_and_is_named_last(run_lab):
    others = "trap 'echo bye; exit 9' TERM; while :; do sleep 0.1; done"
    script = f"if [ $RANK = 1 ]; then sleep 0.5; echo boom >&2; exit 3; fi; {others}"
    status, out, err = run_lab("--hosts", "3", "--", "sh", "-c", script)
    assert status == 3
    assert sorted(out) == ["[host 0] bye", "[host 2] bye"]
    assert err[0] == "[host 1] boom"
    assert err[-3:] == [
        "The end of the output of host 1, which failed first:",
        "[host 1] boom",
        "lightning-comm lab: host 1 ended with exit code 3; the others were ended.",
    ]


def test_a_command_that_cannot_be_run_on_the_hosts_fails_as_in_a_shell(run_lab, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    status, _, err = run_lab("--hosts", "1", "--", str(program))
    assert status == 127
    assert err[0] == f"[host 0] cannot run '{program}': No such file or directory"


def test_faults_happen_while_the_job_runs(run_lab):
    status, _, err = run_lab(
        "--hosts", "2", "--fault", "0.1s link 0 10mbit", "--fault", "0.3s kill 1", "--", "sleep", "4321"
    )  # fmt: skip
    assert status == 128 + signal.SIGKILL
    assert "lightning-comm lab: link 0 10mbit, after 0.1 s." in err
    assert "lightning-comm lab: kill 1, after 0.3 s." in err
    assert err[-1] == "lightning-comm lab: host 1 was ended by SIGKILL; the others were ended."


def test_a_host_that_waits_for_one_that_hangs_is_ended_when_time_is_up(run_lab):
    began = time.monotonic()
    status, _, err = run_lab("--hosts", "2", "--timeout", "0.6", "--fault", "0.1s stop 1", "--", "sleep", "4321")
    assert status == 124
    assert "time was up while hosts [0, 1] were still running" in err[-1]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_host_and_says_so(run_lab, number):
    def interrupt():
        while not subprocess.run(["pgrep", "-fx", "sleep 4322"], capture_output=True).stdout:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    status, _, err = run_lab("--hosts", "2", "--", "sleep", "4322")
    assert status == 128 + number
    assert err[-1] == "lightning-comm lab: interrupted; every host has been ended."
    assert not subprocess.run(["pgrep", "-fx", "sleep 4322"], capture_output=True).stdout
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_reader_that_has_seen_enough_ends_the_hosts(run_lab, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        status, _, _ = run_lab("--hosts", "2", "--", "sh", "-c", "while :; do echo more; sleep 0.01; done")
    assert status == 128 + signal.SIGPIPE


def test_a_disk_that_is_full_ends_the_hosts_and_is_named(run_lab, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115  # closing it fails as writing to it does
    monkeypatch.setattr(sys, "stdout", full)
    status, _, err = run_lab("--hosts", "2", "--", "sh", "-c", "while :; do echo more; sleep 0.01; done")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert status == 1
    assert err == ["lightning-comm lab: [Errno 28] No space left on device."]


@pytest.mark.parametrize(
    ("words", "must_say"),
    [
        ([], ["command is missing", "lightning-comm lab --hosts 2 -- "]),
        (["--hosts", "2", "--"], ["command is missing"]),
        (
            ["--hosts", "3", "python", "my train.py", "--lr", "0.1"],
            ["Write it behind `--`: lightning-comm lab --hosts 3 -- python 'my train.py' --lr 0.1\n"],
        ),
        (["python", "train.py"], ["lightning-comm lab --hosts 2 -- python train.py\n"]),
        (["--host-s", "3"], ["unrecognized arguments: --host-s 3"]),
        (["--hosts", "2", "python", "--", "train.py"], ["arguments: python. The command is what stands behind `--`"]),
        (["--hosts", "0", "--", "true"], ["`hosts`", "from 1 to 64", "got 0"]),
        (["--hosts", "1000", "--", "true"], ["`hosts`", "from 1 to 64", "got 1000"]),
        (["--hosts", "many", "--", "true"], ["--hosts", "'many'"]),
        (["--fault", "5s link 1 10foo", "--", "true"], ["'10foo'", "bit, kbit, mbit, gbit"]),
        (["--", "/etc/passwd"], ["'/etc/passwd'", "cannot be executed"]),
        (["--link", "7parsec", "--", "true"], ["'7parsec'", "bit, kbit, mbit, gbit", "100mbit"]),
        (["--link", "0mbit", "--", "true"], ["'0mbit'", "> 0"]),
        (["--hosts", "3", "--link", "1gbit,1gbit", "--", "true"], ["`link`", "each of the 3 hosts", "got 2"]),
        (["--speed", "1", "--", "true"], ["`speeds`", "each of the 2 hosts", "[1.0]"]),
        (["--speed", "1,-1", "--", "true"], ["`speeds`", "> 0", "-1.0"]),
        (["--speed", "fast", "--", "true"], ["numbers", "'fast'", "1,1,0.5"]),
        (["--devices-per-host", "0", "--", "true"], ["`devices_per_host`", "got 0"]),
        (["--timeout", "-3", "--", "true"], ["`--timeout`", "> 0", "-3"]),
        (["--fault", "soon cut 1", "--", "true"], ["fault", "'soon cut 1'", "5s cut 1"]),
        (["--fault", "1s cut 2", "--", "true"], ["`--fault`", "host 2", "0 to 1"]),
        (["--fault", "1s link 1 fast", "--", "true"], ["fast"]),
        (["--", "no-such-program"], ["'no-such-program'", "PATH"]),
    ],
)
def test_a_bad_word_is_named_with_its_value_and_a_way_out(words, must_say, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert [word for word in must_say if word not in said] == []
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("speeds", "command", "slows_nothing"),
    [
        ("1,0.5", "true", True),
        ("1,0.5", "touch $LIGHTNING_COMM_SPEED_TAKEN", False),  # as an emulated device does
        ("1,1", "true", False),
        ("1,0.5", "exit 3", False),  # what failed did not come to that
    ],
)
def test_speeds_that_no_process_takes_are_said_to_slow_nothing(run_lab, speeds, command, slows_nothing):
    _, _, err = run_lab("--hosts", "2", "--speed", speeds, "--", "sh", "-c", command)
    said = "\n".join(err)
    assert ("so nothing was slowed" in said) == slows_nothing
    assert ("EmulatedDevice(step_s=" in said) == slows_nothing


def test_where_hosts_cannot_be_had_one_line_says_why(monkeypatch, capsys):
    monkeypatch.setattr(command, "unavailable", lambda: "the lab needs a kernel")
    assert command.main(["--", "true"]) == 1
    assert capsys.readouterr().err == "lightning-comm lab: the lab needs a kernel.\n"


def test_fit_takes_hosts_and_devices_from_the_lab_and_leaves_a_chosen_accelerator(monkeypatch, capsys):
    chosen = {"num_nodes": 1, "devices": 2, "accelerator": "auto"}
    follow_lab(outside := Namespace(**chosen))
    assert vars(outside) == chosen
    monkeypatch.setenv("LIGHTNING_COMM_LAB", '{"hosts": 4, "devices_per_host": 1, "links": []}')
    follow_lab(inside := Namespace(**chosen))
    assert vars(inside) == {"num_nodes": 4, "devices": 1, "accelerator": "cpu"}
    assert capsys.readouterr().err == "In the lab: trainer num_nodes=4, devices=1, accelerator=cpu.\n"
    follow_lab(accelerated := Namespace(**chosen | {"accelerator": "gpu"}))
    assert accelerated.accelerator == "gpu"
    capsys.readouterr()
    monkeypatch.setenv("NODE_RANK", "3")
    follow_lab(Namespace(**chosen))
    assert capsys.readouterr().err == ""


def test_fit_in_the_lab_is_one_run_over_all_hosts(run_lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = str(Path(sys.executable).parent / "lightning-comm")
    with forked(), only_fit_is_parsed():
        status, out, err = run_lab(
            "--hosts", "2", "--link", "100mbit", "--timeout", "150", "--",
            program, "fit", f"--config={CONFIG}", "--trainer.max_steps=6", "--model.init_args.warmup_steps=2",
        )  # fmt: skip
    assert status == 0, "\n".join(out + err)
    text = "\n".join(out + err)
    assert "[host 0] In the lab: trainer num_nodes=2, devices=1." in text
    assert "distributed_backend=gloo" in text
    assert "All distributed processes registered. Starting with 2 processes" in text
    assert "`Trainer.fit` stopped: `max_steps=6` reached" in text
    assert len(list(tmp_path.glob("lightning_logs/version_*/checkpoints/*.ckpt"))) == 1
