"""The arithmetic of the reports on step times, against numbers worked out by hand."""

import json

import pytest

from benchmarks.compression import steps as compression_steps
from benchmarks.compression import synchronisation
from benchmarks.kit import step_times as report
from benchmarks.kit.pages import page
from benchmarks.kit.statistics import standing
from benchmarks.kit.tables import cells, table
from benchmarks.local_update import overlap

STEPS_S = {
    "limit": [0.200, 0.201, 0.202],
    "ddp": [0.800, 0.804, 0.808],
    "ours": [0.250, 0.260, 0.270],
}
LABELS = {"limit": "no communication", "ddp": "DDP", "ours": "bf16"}


def configuration(steps_s=STEPS_S, **more):
    def tool(name, step_s):
        payload = None if name == "ddp" else 3e6
        return {"step_s": step_s, "sent_bytes": 2e6, "overruns": 1, "real_share": 0.25, "payload_bytes": payload}

    repeats = [
        {"repeat": i, "tools": {name: tool(name, each[i]) for name, each in steps_s.items()}}
        for i in range(len(steps_s["limit"]))
    ]
    labels = {name: LABELS.get(name, name) for name in steps_s}
    found = {"title": "4 hosts, 100mbit", "labels": labels, "repeats": repeats, "note": "A note."}
    return {**found, "left_out": [], "error": "", **more}


def test_ratios_are_paired_by_repeat_and_shares_are_of_the_limit_of_the_same_repeat():
    rows = report.rows_of(configuration())
    limit_s = rows["limit"].steps_s
    assert rows["ours"].speedup(rows["ddp"]) == pytest.approx(sorted([0.8 / 0.25, 0.804 / 0.26, 0.808 / 0.27])[1])
    assert rows["ours"].of(limit_s) == pytest.approx((0.2 / 0.25, 0.201 / 0.26, 0.202 / 0.27))
    assert rows["ours"].share(limit_s) == pytest.approx(0.201 / 0.26)
    assert rows["limit"].of(limit_s) == (1.0, 1.0, 1.0)


def test_a_reference_that_was_not_measured_leaves_ratios_out():
    rows = report.rows_of(configuration())
    assert rows["ours"].speedup(None) is None
    text = table(report.columns(rows, "accelerate", "accelerate"), rows.values())
    assert "| bf16 | 260.0 | 255.0 to 265.0 |  | 0.773 |" in text


def test_payload_is_the_ledgers_and_blank_where_there_is_none():
    rows = report.rows_of(configuration())
    assert rows["ours"].payload_bytes == 3e6
    assert rows["ddp"].payload_bytes is None


@pytest.mark.parametrize(("highest", "conclusive"), [(0.204, True), (0.206, False)])
def test_a_limit_that_spreads_by_more_than_two_percent_makes_a_result_inconclusive(highest, conclusive):
    steps_s = {"limit": [0.2, 0.2, 0.2, 0.2, highest], "ddp": [0.8] * 5}
    rows = report.rows_of(configuration(steps_s))
    assert ("inconclusive" in standing(rows["limit"].steps_s)) != conclusive


def test_fewer_than_five_repeats_are_inconclusive():
    assert "inconclusive**: fewer than 5 repeats" in standing(report.rows_of(configuration())["limit"].steps_s)


def test_the_page_has_every_row_and_says_what_was_left_out_and_what_ended_early():
    base = {"title": "Compressions", "date": "2026-01-02", "command": "python x.py", "environment": "torch 9"}
    configurations = [
        configuration(left_out=["overlap: left out"]),
        {**configuration(), "title": "2 hosts, 1gbit", "repeats": [], "error": "host 1 ended"},
    ]
    whole = {**base, "configurations": configurations}
    text = page(whole, "Words.", report.sections(whole, "ddp", "DDP, best bucket"))
    for part in (
        "# Compressions, 2026-01-02\n\nWords.\n\n    python x.py\n\ntorch 9",
        "| bf16 | 260.0 | 255.0 to 265.0 | 3.09 | 0.773 | 0.748 to 0.800 | 3.000 | 2.000 |",
        "| DDP | 804.0 | 802.0 to 806.0 | 1.00 | 0.250 | 0.250 to 0.250 |  | 2.000 |",
        "3 repeats. A note. Overruns of the device: 3 in no communication, 3 in DDP, 3 in bf16; real compute was 25 %",
        "- **inconclusive**: fewer than 5 repeats.",
        "- overlap: left out",
        "## 2 hosts, 1gbit\n\nThis configuration ended early:\n\n      host 1 ended",
    ):
        assert part in text


@pytest.mark.parametrize(("step_s", "steps"), [(3.0, 2), (1.0, 2), (0.5, 4), (0.2, 10), (0.01, 10)])
def test_a_repeat_times_two_seconds_but_no_less_than_two_steps_and_no_more_than_ten(step_s, steps):
    assert compression_steps.steps_of(step_s) == steps


def test_a_dense_step_takes_what_the_link_needs_and_a_part_of_the_compute():
    # 12.5 MB in a ring of 4 hosts are 18.75 MB for each, 1.5 s at 100 Mbit/s and 0.15 s at 1 Gbit/s
    assert compression_steps.dense_step_s("100mbit", 4, 12.5e6, 0.2) == pytest.approx(1.5 + 0.06)
    assert compression_steps.dense_step_s("1gbit", 4, 12.5e6, 0.2) == pytest.approx(0.2 + 0.045)


def test_the_defaults_of_the_comparison_fit_into_35_minutes():
    from benchmarks.compression.methods import METHODS

    total_s = sum(
        compression_steps.Plan(compression_steps.dense_step_s(link, 4, 4 * 5.6e6, 0.2), 0.2, 5).total_s(list(METHODS))
        for link in ("100mbit", "500mbit", "1gbit")
        for _ in range(2)
    )
    assert 10 * 60 < total_s < 35 * 60


def test_the_bound_of_local_updates_is_compute_and_what_of_a_transfer_is_not_hidden():
    assert overlap.bound(2.0, 0.25, period=8, hidden_steps=0) == 0.5
    assert overlap.bound(2.0, 0.25, period=8, hidden_steps=4) == pytest.approx(2 / 3)
    assert overlap.bound(1.5, 0.25, period=8, hidden_steps=6) == 1.0
    hidden = f"{2 / (4 - 0.25 * overlap.OVERLAP_STEPS):.3f} in full with {overlap.OVERLAP_STEPS} steps"
    assert f"0.500 in full, 0.667 as bf16, {hidden}" in overlap.bounds(2.0, 0.25, 8)


@pytest.mark.parametrize(
    ("ours_s", "link", "word"),
    [(0.209, "100mbit", "reaches 0.95"), (0.212, "100mbit", "misses"), (0.209, "1gbit", "misses")],
)
def test_what_is_compressed_and_overlapped_is_held_against_the_target_of_the_link(ours_s, link, word):
    steps_s = {"limit": [0.2] * 3, "bf16_overlap": [ours_s] * 3, "accelerate": [0.42] * 3}
    said = overlap.verdicts(report.rows_of(configuration(steps_s)), link)
    assert word in said[0]
    assert f"{0.42 / ours_s:.2f} times as fast as accelerate" in said[1]


def test_methods_that_the_library_cannot_do_are_left_out_with_a_reason():
    names, left_out = overlap.usable()
    assert {"limit", "open", "bf16"} <= set(names)
    assert len(names) + len(left_out) == 6
    assert all("left out, since" in each for each in left_out)
    json.dumps([names, left_out])


def test_what_was_sent_is_a_multiple_of_the_formula_and_a_time_is_paired_by_repeat():
    result = {
        "seconds": {"full": [1.0, 4.0], "bf16": [0.5, 1.0]},
        "payload_bytes": {"full": 4e6, "bf16": 2e6},
        "wire": {
            name: {"interface_bytes": 1.01e6, "link_bytes": 1.05e6, "formula_bytes": 1e6} for name in ("full", "bf16")
        },
    }
    assert synchronisation.over_formula(result["wire"]["full"], "link") == pytest.approx(1.05)
    (row,) = cells(synchronisation.columns(result), ["bf16"])
    assert row == [
        "bf16",
        "2.00 MB",
        "750 ms",
        "500 to 1000",
        "3.00",
        "1.010",
        "1.050",
    ]


def test_a_method_pays_on_links_slower_than_the_bytes_it_saves_in_the_time_it_takes():
    seconds = {"full": 0.001, "bf16": 0.002, "mask 20 %, bf16": 0.001}
    rows = cells(synchronisation.break_even_columns(seconds, 1.0, 4), seconds)
    entries = synchronisation.layout_of(1.0).numel
    assert rows[0] == ["full", "1.0 ms", f"{6e-6 * entries:.2f} MB", "", ""]
    assert rows[1][2:] == [f"{3e-6 * entries:.2f} MB", f"{8e-9 * 3 * entries / 0.001:.1f} Gbit/s", ""]
    assert rows[2][1:] == ["1.0 ms", f"{0.6e-6 * entries:.2f} MB", "any", "any"]
