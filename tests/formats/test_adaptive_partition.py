"""A journal says after the file what it said before, and a file that is none says what is wrong with it."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from support.partition_journals import RUN, journal, run_of, window

from lightning_comm.core.adaptive_partition.plan import BatchIndex
from lightning_comm.formats.adaptive_partition import RUN_FIELDS, Change, PartitionJournal, Window


def test_a_journal_is_read_as_it_was_written(tmp_path):
    written = journal([1.0, 3.0], windows=6, move_after=2)
    written.save(tmp_path / "new" / "partition.json")
    assert PartitionJournal.load(tmp_path / "new" / "partition.json") == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["partition.json"]


def test_a_journal_of_a_fixed_run_has_no_windows(tmp_path):
    written = PartitionJournal(run_of(2), "fixed", (Change(0, 0, (16, 48), "start"),))
    written.save(tmp_path / "partition.json")
    assert PartitionJournal.load(tmp_path / "partition.json") == written
    assert written.windows == ()


def test_what_is_not_finite_becomes_null_in_the_file_and_stays_unknown(tmp_path):
    sick = Window(0, 20, math.inf, (32, 32), (math.nan, 0.2), (0.1, -math.inf), math.nan, math.nan, None)
    written = PartitionJournal(run_of(2), "observe", (Change(0, 0, (32, 32), "start"),), (sick,))
    written.save(tmp_path / "partition.json")
    (entry,) = json.loads((tmp_path / "partition.json").read_text())["windows"]
    assert entry["busy_s"] == [None, 0.2]
    assert entry["fetch_s"] == [0.1, None]
    assert [entry[name] for name in ("seconds", "step_s", "gain", "best_sizes")] == [None] * 4
    assert PartitionJournal.load(tmp_path / "partition.json") == written


def test_numbers_of_numpy_become_plain_ones():
    sizes = tuple(np.array([48, 16]))
    one = Window(np.int64(0), 20, np.float32(1.5), sizes, np.array([0.5, 0.25]), (0.0, 0), np.float64(0.5))
    made = PartitionJournal(run_of(2), "observe", (Change(0, 0, sizes, "start"),), (one,)).to_dict()
    assert json.loads(json.dumps(made)) == made
    assert made["windows"][0]["busy_s"] == [0.5, 0.25]


def test_a_rank_waits_for_what_the_longest_is_busy_beyond_it_and_the_longest_for_nobody():
    one = window((20, 30, 14), busy_s=(0.25, 1.0, 0.5))
    assert one.wait_s == (0.75, 0.0, 0.5)
    assert window((20, 30, 14), busy_s=(0.25, None, 0.5)).wait_s == (0.25, None, 0.0)
    assert window((32, 32), busy_s=(None, None)).wait_s == (None, None)


def test_the_plan_of_a_journal_holds_each_change_from_its_place_on():
    made = PartitionJournal(run_of(2), "balance", (Change(0, 0, (32, 32), "start"), Change(1, 3, (48, 16), "balance")))
    plan = made.plan(hi=50)
    assert [(change.place, change.sizes) for change in plan.changes] == [
        (BatchIndex(0, 0), (32, 32)),
        (BatchIndex(1, 3), (48, 16)),
    ]
    assert plan.sizes_at(BatchIndex(1, 2)) == (32, 32)
    assert plan.hi == 50


@pytest.mark.parametrize("field", RUN_FIELDS)
def test_each_thing_that_differs_between_two_runs_is_said_with_both_values(field):
    made = journal([1.0, 1.0])
    assert made.mismatch(RUN | run_of(2)) == []
    other = run_of(2) | {field: 12345}
    (said,) = made.mismatch(other)
    assert said.startswith(RUN_FIELDS[field] + ": ")
    assert said.endswith("12,345 in this run")
    assert made.mismatch({name: value for name, value in other.items() if name != field})[0].endswith(
        "not recorded in this run"
    )


DAMAGE = {
    "cut off": (lambda text: text[: len(text) // 2], ["no JSON, or cut off"]),
    "binary": (lambda text: "\x00\x01", ["no JSON"]),
    "a list": (lambda text: "[1, 2]", ["no journal"]),
    "other JSON": (lambda text: '{"format": 1, "curves": []}', ["no journal", "changes"]),
    "a later format": (lambda text: text.replace('"format": 1', '"format": 9'), ["format 9", "reads 1"]),
    "no ranks": (lambda text: text.replace('"ranks"', '"rank"'), ["`run`", "lacks ranks"]),
    "another mode": (lambda text: text.replace('"balance"', '"guess"'), ["`mode`", "'guess'", "observe"]),
    "no start": (lambda text: text.replace('"epoch": 0, "batch": 0', '"epoch": 0, "batch": 7'), ["epoch 0 batch 7"]),
    "a wrong sum": (lambda text: text.replace("[32, 32]", "[32, 31]"), ["`changes[0]`", "(32, 31)", "63", "64"]),
    "a rank less": (lambda text: text.replace("[32, 32]", "[64]"), ["`changes[0]`", "(64,)", "2 ranks"]),
    "a negative size": (lambda text: text.replace("[32, 32]", "[65, -1]"), ["`changes[0]`", "at least 0"]),
    "half a sample": (lambda text: text.replace("[32, 32]", "[31.5, 32.5]"), ["damaged", "TypeError"]),
    "a word": (lambda text: text.replace('"step_s": 0.', '"step_s": "fast", "gain": 0.'), ["damaged", "TypeError"]),
    "an unknown field": (lambda text: text.replace('"why"', '"because"'), ["damaged", "because"]),
    "a rank less busy": (lambda text: text.replace('"busy_s": [', '"busy_s": [1.0, '), ["`windows[0]`", "busy_s"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_no_whole_journal_is_refused_with_its_path_the_fault_and_a_way_out(kind, tmp_path):
    spoil, must_say = DAMAGE[kind]
    path = tmp_path / "partition.json"
    journal([1.0, 3.0], windows=4, move_after=2).save(path)
    spoilt = spoil(path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    with pytest.raises(ValueError, match="PartitionJournal: `path`") as caught:
        PartitionJournal.load(path)
    said = str(caught.value)
    assert [word for word in (str(path), "leave `replay` out", *must_say) if word not in said] == []


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"`path` .*'nowhere\.json' is not there.*leave `replay` out"):
        PartitionJournal.load("nowhere.json")


def test_changes_that_do_not_follow_each_other_are_refused():
    start = Change(0, 0, (32, 32), "start")
    for late in (Change(0, 0, (48, 16), "balance"), Change(0, 5, (48, 16), "balance")):
        with pytest.raises(ValueError, match=r"`changes` .* one after the other; got epoch 0 batch 0, epoch"):
            PartitionJournal(run_of(2), "balance", (start, Change(0, 9, (32, 32), "balance"), late))


def test_a_disk_that_is_full_leaves_the_journal_that_is_there(tmp_path):
    path = tmp_path / "partition.json"
    kept = journal([1.0, 1.0])
    kept.save(path)
    child = os.fork()
    if child == 0:  # the limit is for good, so in a process of its own
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            journal([1.0, 3.0], windows=50).save(path)
        except OSError as error:
            os._exit(0 if error.filename == str(path) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert PartitionJournal.load(path) == kept
    assert list(Path(tmp_path).iterdir()) == [path]
