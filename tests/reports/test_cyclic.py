"""The figure of a schedule shows every turn of every worker, strikes the stale ones, and draws the messages."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from support.grids import few_of

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.reports import cyclic as cyclic_report
from lightning_comm.reports.cyclic import schedule_figure


def names(svg):
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    return set(re.findall(r'<g id="([^"]+)"', svg))


@pytest.mark.parametrize(
    ("workers", "stages", "rule"),
    few_of([(*grid, rule) for grid in [(1, 1), (3, 3), (2, 6), (4, 2)] for rule in ("v1", "v2")], 0, 1, 3, 4, 7),
)
def test_the_figure_holds_each_turn_once_and_strikes_those_that_are_one_update_old(workers, stages, rule):
    schedule, slots = CyclicSchedule(workers, stages, rule), 4 * stages + 3
    drawn = names(schedule_figure(schedule, slots))
    cells, stale = set(), set()
    for worker in range(workers):
        for slot in range(slots):
            if (turn := schedule.turn(worker, slot)) is not None:
                way = "forward" if turn.forward else "backward"
                cells.add(f"worker-{worker}-slot-{slot}-step-{turn.step}-stage-{turn.stage}-{way}")
                if schedule.version(worker, turn.stage, turn.step) == turn.step - 1:
                    stale.add(f"stale-worker-{worker}-slot-{slot}-step-{turn.step}-stage-{turn.stage}-{way}")
    assert {name for name in drawn if name.startswith("worker-")} == cells
    assert {name for name in drawn if name.startswith("stale-")} == stale
    assert bool(stale) == (rule == "v1" or workers > 1)


def test_messages_of_the_first_step_are_drawn_on_request_and_only_within_the_figure():
    schedule = CyclicSchedule(3, 3)
    wanted = {f"{m.kind}-{m.source}-{m.target}-stage-{m.stage}" for m in schedule.transfers(0)}
    assert wanted <= names(schedule_figure(schedule, slots=30, messages=True))
    assert not wanted & names(schedule_figure(schedule, slots=30))
    assert not wanted & names(schedule_figure(schedule, slots=4, messages=True))


@pytest.mark.parametrize(("workers", "stages"), [(3, 3), (4, 4), (4, 12), (4, 2)])
def test_a_sum_travels_after_the_backwards_it_holds_and_parameters_are_there_when_first_read(workers, stages):
    schedule, late = CyclicSchedule(workers, stages), 0
    begins = {}
    for worker in range(workers):
        for slot in range(12 * stages):
            if (turn := schedule.turn(worker, slot)) is not None:
                begins[worker, turn.stage, turn.step, turn.forward] = slot
    for message in schedule.transfers(1):
        leaves, arrives = cyclic_report._times(schedule, message)
        assert leaves <= arrives
        if message.kind == "gradient":
            assert leaves > begins[message.source, message.stage, 1, False]
            assert arrives > begins[message.target, message.stage, 1, False]
        else:
            fresh = schedule.is_fresh(message.target, message.stage)
            first_read = begins[message.target, message.stage, 2 if fresh else 3, True]
            assert arrives <= first_read
            late += arrives == first_read
    assert late  # the hops of the figure are the longest that keep the workers at work


def test_a_wide_schedule_is_drawn_without_numbers():
    schedule = CyclicSchedule(1, 24)
    assert "<!-- 23 -->" not in schedule_figure(schedule)
    assert "<!-- 23 -->" in schedule_figure(schedule, slots=60)


def test_a_bad_argument_or_a_missing_library_is_named_with_a_way_out(monkeypatch):
    with pytest.raises(ValueError, match=r"schedule_figure: `slots` must be >= 1; got 0\. Leave it out"):
        schedule_figure(CyclicSchedule(2, 2), slots=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"schedule_figure: .*pip install matplotlib"):
        schedule_figure(CyclicSchedule(2, 2))
