"""Some runs in which something is hurt, and the judge of such runs, which must be able to say each bad class."""

import gc
import multiprocessing
import signal
import sys
from dataclasses import replace

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults.files import beside, checkpoints, damage, left_over
from benchmarks.faults.judge import BAD, CLASSES, judge
from benchmarks.faults.logs import degraded, last_error, named
from benchmarks.faults.plan import KINDS, STRATEGIES, draw
from benchmarks.faults.report import failures, page_of, terminal
from benchmarks.faults.strike import STRUCK, Fault
from benchmarks.faults.workshop import Workshop
from benchmarks.faults.zygote import Zygote

SEEDS = {  # what tests of the strategies show as well is left to `make benchmark-faults`
    6: "rank 0 of a cyclic run stops answering",
    27: "a rank dies between the files of a checkpoint that takes another's place",
    30: "bytes of a file of one rank are overwritten",
    61: "a sample of a long round cannot be read",
    65: "the disk of rank files is full",
    75: "a peer dies where exceptions save a checkpoint",
    76: "checkpoints are written by a thread, and slowly",
    81: "one of three ranks ends at once",
    90: "one rank under compression is told to end",
}


FEW = (6, 27)  # what others wait for in vain, and what leaves a checkpoint half written, one of each kind of strategy


@pytest.fixture(scope="module")
def hurt_runs(tmp_path_factory, request):
    """Carry all of them out, some at a time, in ranks forked from this process; return the records by seed."""
    if sys.platform != "linux":
        pytest.skip("ranks are stopped, and looked at, as Linux does it")
    seeds = SEEDS if request.config.getoption("exhaustive") else FEW
    gc.freeze()  # ranks end as the interpreter does, which would look at all that pytest has, and copy its memory
    try:
        zygote = Zygote.forked()
    finally:
        gc.unfreeze()
    workshop = Workshop(tmp_path_factory.mktemp("faults"), slack=5, compares=False, zygote=zygote)
    try:
        records = faults.run_all([draw(seed) for seed in seeds], workshop, 3, lambda _: None)
    finally:
        workshop.close()
    return {record["case"]["seed"]: record for record in records}


@pytest.mark.timeout(900)  # the first of them waits for all, on a machine that may be busy
@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=() if seed in FEW else pytest.mark.exhaustive) for seed in SEEDS],
    ids=[what.replace(" ", "_") for what in SEEDS.values()],
)
def test_a_run_that_is_hurt_ends_in_time_names_who_was_hurt_and_keeps_its_checkpoints(hurt_runs, seed):
    record = hurt_runs[seed]
    assert record["class"] in ("ok", "refused clearly"), f"{record['class']}: {record['why']}\n{record.get('logs')}"


# ---- the judge -------------------------------------------------------------------------------------------------------

_LOST = "PeerFailure: rank 1 failed: it does not answer any more"
_WHOLE = {
    "name": "s20.ckpt", "codes": [0, 0], "hang": False, "start": 20, "notes": [], "errors": [], "whole": True,
    "equal": True, "exact": True, "logs": [], "began": True,
}  # fmt: skip


def record_of(kind="kill", *, strategy="local_sgd", **changes):
    """Return what is found of a run in which rank 1 of two was hurt in step 22, and all went as it should."""
    case = replace(draw(0, kind, strategy, 2), rank=1, place="training_step", step=22)
    hurt = {
        "case": case.as_json(), "phase": "step", "folder": "", "took_s": 9.0, "hit": {"step": 22, "time": 0.0},
        "where_all_stood": [[22, "backward"], [22, "training_step"]], "codes": [1, -9], "ends_s": [6.1, 0.1],
        "hang": [], "stopped": [], "left_processes": [], "errors": [_LOST, ""], "aborted": [False, False],
        "done": [False, False], "started": [True, True], "steps": [22, 22], "logs": ["", ""], "requeued": "",
        "floor": 20, "resumes": [_WHOLE], "left_over": [],
    }  # fmt: skip
    return {**hurt, **changes}


def class_of(kind="kill", **changes):
    return judge(record_of(kind, **changes)).word


FINISHED = {"codes": [0, 0], "errors": ["", ""], "done": [True, True], "equal": True, "exact": True}
EARLIER = {**_WHOLE, "name": "s15.ckpt", "start": 15}
TERMINATED = {**_WHOLE, "name": "last-terminated-step=22.ckpt", "start": 22}
REFUSED = {**_WHOLE, "codes": [1, 1], "whole": False, "start": None, "began": False}
CLEAR = ["ValueError: LocalUpdateStrategy: `ckpt_path`='s20.ckpt' is damaged. Give an earlier one."] * 2
BARE = ["RuntimeError: PytorchStreamReader failed reading zip archive"] * 2


@pytest.mark.parametrize(
    ("word", "kind", "changes"),
    [
        ("ok", "kill", {}),
        ("ok", "pause", FINISHED),
        ("driver error", "kill", {"driver_error": "Traceback\nKeyError: 1"}),
        ("HANG", "kill", {"hang": [0], "codes": [None, -9]}),
        ("HANG", "kill", {"resumes": [{**_WHOLE, "hang": True, "whole": False}, _WHOLE]}),
        ("ABORT", "kill", {"codes": [-6, -9]}),
        ("ABORT", "kill", {"aborted": [True, False]}),
        ("LOST", "kill", {"resumes": []}),
        ("LOST", "kill", {"resumes": [{**_WHOLE, "start": 15}]}),
        ("LOST", "kill", {"resumes": [{**_WHOLE, "whole": False, "notes": ["it is incomplete"]}]}),
        ("WRONG RESULT", "sigterm_one", {"errors": ["", ""], "codes": [0, 0]}),
        ("WRONG RESULT", "requeue_one", FINISHED),
        ("ok", "requeue_one", {**FINISHED, "requeued": "requeue 4242\n"}),
        ("ok", "sigterm_one", {"errors": ["", ""], "codes": [0, 0], "resumes": [TERMINATED]}),
        ("ok", "sigterm_one", {"errors": ["", ""], "codes": [0, 0], "saved": ["s22.ckpt", TERMINATED["name"]]}),
        ("WRONG RESULT", "sigterm_one", {"errors": ["", ""], "codes": [0, 0], "saved": ["s20.ckpt"]}),
        ("WRONG RESULT", "sigterm_one", {"codes": [1, 1], "resumes": [TERMINATED]}),
        ("CORRUPT LOADED", "damage_main", {"damaged": "s20.ckpt", "resumes": [{**_WHOLE, "exact": False}]}),
        ("CORRUPT LOADED", "damage_main", {"damaged": "s20.ckpt", "resumes": [{**_WHOLE, "exact": None}]}),
        ("CORRUPT LOADED", "damage_main", {"damaged": "s20.ckpt", "resumes": [{**_WHOLE, "whole": False}]}),
        ("ok", "damage_main", {"damaged": "s20.ckpt", "resumes": [_WHOLE]}),
        ("refused clearly", "damage_main", {
            "damaged": "s20.ckpt", "resumes": [{**REFUSED, "errors": CLEAR}, EARLIER],
        }),
        ("unclear message", "damage_main", {
            "damaged": "s20.ckpt", "resumes": [{**REFUSED, "errors": BARE}, EARLIER],
        }),
        ("LOST", "damage_main", {"damaged": "s20.ckpt", "resumes": [{**REFUSED, "errors": CLEAR}] * 2}),
        ("WRONG RESULT", "pause", {**FINISHED, "equal": False}),
        ("WRONG RESULT", "pause", {**FINISHED, "exact": False}),
        ("WRONG RESULT", "pause", {}),
        ("WRONG RESULT", "kill", {"codes": [0, -9]}),
        ("WRONG RESULT", "kill", {"resumes": [{**_WHOLE, "exact": False}]}),
        ("WRONG RESULT", "kill", {"resumes": [{**_WHOLE, "equal": False}]}),
        ("WRONG RESULT", "unequal_unknown", FINISHED),
        ("refused clearly", "unequal_unknown", {
            "codes": [1, 1], "errors": ["RuntimeError: LocalUpdateStrategy: ranks have 24 and 19 batches; ..."] * 2,
        }),
        ("unclear message", "unequal_known", {
            "codes": [1, 1], "errors": ["RuntimeError: LocalUpdateStrategy: ranks have 24 and 19 batches; ..."] * 2,
        }),
        ("WRONG NAME", "kill", {"errors": ["PeerFailure: rank 2 failed", ""]}),
        ("LEFT BEHIND", "kill", {"left_processes": ["77: python"]}),
        ("LEFT BEHIND", "kill", {"left_over": ["a", "b", "c", "d"]}),
        ("unclear message", "kill", {"errors": ["RuntimeError: Connection closed by peer", ""]}),
        ("unclear message", "raise_step", {"errors": [_LOST, "ValueError: fault: boom"], "codes": [1, 1]}),
        ("invalid", "kill", {"hit": None}),
    ],
)  # fmt: skip
def test_the_judge_says_each_class_of_what_a_record_holds(word, kind, changes):
    assert class_of(kind, **changes) == word
    assert word in CLASSES


def test_of_several_findings_the_worst_is_the_class_and_all_are_told():
    judgement = judge(record_of(errors=["PeerFailure: rank 2 failed", ""], hang=[0], resumes=[]))
    assert judgement.word == "HANG"
    assert judgement.why.index("had not ended") < judgement.why.index("none can be resumed")


def test_what_the_watchdog_says_is_the_error_of_a_log():
    said = "rank 1 has waited for 11 s in a barrier, and ends. Rank 2 does not answer."
    assert last_error(f"ValueError: earlier\n{said}\nThread 0x1 (most recent call first):\n  File a") == said


def test_the_last_error_of_a_log_is_its_message_without_prefixes_and_what_follows():
    log = (
        "[rank0]: Traceback (most recent call last):\n[rank0]:   File x\n[rank0]: ValueError: first\n\n"
        "[rank0]: During handling of the above exception, another exception occurred:\n\n"
        "[rank0]: lightning_comm.transport.stop_protocol.PeerFailure: rank 2: boom\n[rank0]: more words\n"
        "[W123 socket.cpp:1] noise of rank 7\n"
    )
    assert last_error(log) == "lightning_comm.transport.stop_protocol.PeerFailure: rank 2: boom\nmore words"
    assert last_error("all went well\n") == ""


def test_ranks_are_named_without_the_one_that_speaks():
    assert named("Rank 2 failed; ranks 0, 1 and 3 saw it, rank0 is no word", own=1) == {0, 2, 3}


def test_a_resumed_run_that_says_what_it_lacks_is_not_whole():
    assert degraded("x.py:3: LocalUpdateStrategy: `ckpt_path`='a' cannot bring every rank back: it is missing")
    assert degraded("Restoring states from the checkpoint path at a.ckpt") == ""


# ---- files -----------------------------------------------------------------------------------------------------------


def write_two_files(run, folder, how):
    """Write two large files as the rank that is hurt."""
    case = {**draw(27).as_json(), "rank": 0, "step": 0, "place": "file", "detail": {"operation": 2}}
    fault = Fault(case, str(run), 0, 1, how)
    fault.at("batch_end", 1)
    fault.watch_files(str(folder))
    for name in ("a", "b"):
        try:
            (folder / name).write_bytes(bytes(100_000))
        except OSError:
            (folder / "told").touch()


@pytest.mark.parametrize(
    ("how", "code", "sizes"),
    [
        ("kill_operation", -signal.SIGKILL, {"a": 100_000}),
        ("kill_write", -signal.SIGXFSZ, {"a": 100_000, "b": 16_384}),
        ("fail_write", 0, {"a": 100_000, "b": 16_384, "told": 0}),
    ],
)
def test_a_process_dies_before_or_within_the_second_file_or_is_told_that_the_disk_is_full(tmp_path, how, code, sizes):
    (tmp_path / "checkpoints").mkdir()
    arguments = (tmp_path, tmp_path / "checkpoints", how)
    process = multiprocessing.get_context("fork").Process(target=write_two_files, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert {path.name: path.stat().st_size for path in (tmp_path / "checkpoints").iterdir()} == sizes
    assert '"place": "file: open b"' in (tmp_path / STRUCK).read_text()


@pytest.mark.parametrize("how", ["truncate", "empty", "flip", "garbage", "zeros", "missing"])
def test_damage_hits_the_newest_checkpoint_and_says_what_the_file_held(tmp_path, how):
    folder = tmp_path / "checkpoints"
    for age, name in enumerate(("s5.ckpt", "s10.ckpt")):
        (folder / f"{name}.ranks").mkdir(parents=True)
        for path in (folder / f"{name}.ranks" / "rank0.pt", folder / name):
            path.write_bytes(bytes(range(1, 200)) * (age + 1))
    (folder / "last.ckpt").symlink_to("s10.ckpt")
    (folder / "s15.ckpt.part").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["s10.ckpt", "s5.ckpt"]
    assert [path.name for path in beside(folder / "s10.ckpt")] == ["rank0.pt"]
    assert left_over(tmp_path) == ["s15.ckpt.part"]
    path, content = damage(tmp_path, "damage_rank", {"damage": how, "where": 0.4, "bit": 3}, seed=1)
    assert path == folder / "s10.ckpt.ranks" / "rank0.pt"
    assert content == bytes(range(1, 200)) * 2
    assert not path.exists() if how == "missing" else path.read_bytes() != content
    assert damage(tmp_path, "damage_main", {"damage": "flip", "where": 0.4, "bit": 3}, seed=1)[0].name == "s10.ckpt"


# ---- cases and tables ------------------------------------------------------------------------------------------------


def test_a_seed_is_always_the_same_case_and_all_seeds_have_every_kind_and_strategy():
    cases = [draw(seed) for seed in range(150)]
    assert cases == [draw(seed) for seed in range(150)]
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.strategy for case in cases} == set(STRATEGIES)
    assert {case.ranks for case in cases} == {2, 3}
    assert {case.phase for case in cases} >= {"set-up", "step", "round end", "validation", "save", "end of fit"}


def test_a_name_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"`--kind` must be one of kill, .*; got 'death'"):
        draw(0, "death")
    with pytest.raises(ValueError, match=r"`--strategy` must be one of local_sgd, .*; got 'fsdp'"):
        draw(0, None, "fsdp")
    with pytest.raises(ValueError, match="'cyclic' writes no files of single ranks, so 'rank_missing' cannot happen"):
        draw(0, "rank_missing", "cyclic")


def test_the_page_and_the_terminal_have_a_row_for_each_kind_and_strategy_and_every_finding():
    records = [record_of(), record_of("stop", strategy="cyclic", hang=[0])]
    records = [{**record, "class": judge(record).word, "why": judge(record).why} for record in records]
    conditions = {"environment": "torch 9", "command": "python -m benchmarks.faults", "date": "2026-01-02"}
    text = page_of(records, conditions)
    for part in (
        "| class | runs | HANG | ok |", "| all | 2 | 1 | 1 |", "| kill | 1 |  | 1 |", "| cyclic | 1 | 1 |  |",
        "- seed 0, stop, `cyclic`, 2 ranks: **HANG**: rank 0 had not ended in time",
    ):  # fmt: skip
        assert part in text
    assert "kill" in terminal(records)
    assert [record["class"] for record in failures(records)] == ["HANG"]
    assert set(BAD) < set(CLASSES)


def test_lightnings_own_strategy_is_shown_and_not_judged():
    record = record_of(strategy="ddp", hang=[0])
    assert failures([{**record, "class": "HANG", "why": ""}]) == []


def test_seeds_are_numbers_and_ranges():
    assert faults.numbers("0-3,7") == [0, 1, 2, 3, 7]
