"""The arithmetic of the comparison's report, against numbers worked out by hand."""

import pytest

from benchmarks.kit.statistics import paired_ratio
from benchmarks.kit.step_times import rows_of
from benchmarks.tools import report

STEPS_S = {
    "limit": [0.200, 0.201, 0.202],
    "ddp": [0.800, 0.804, 0.808],
    "peer": [0.300, 0.310, 0.320],
    "ours": [0.250, 0.260, 0.270],
}
LABELS = {"limit": "no communication", "ddp": "DDP", "peer": "a peer", "ours": "ours: Lightning"}


def configuration(steps_s=STEPS_S, bare_s=0.32):
    def tool(step_s):
        return {"step_s": step_s, "sent_bytes": 2e6, "overruns": 1, "real_share": 0.25, "steps": 16}

    count = len(steps_s["limit"])
    repeats = [
        {"bare_s": bare_s, "tools": {name: tool(each[i]) for name, each in steps_s.items()}} for i in range(count)
    ]
    return {
        "hosts": 4,
        "link": "100mbit",
        "labels": {name: LABELS[name] for name in steps_s},
        "once_a_period": ["peer", "ours"],
        "repeats": repeats,
        "payload_bytes": 16_000_000,
        "bucket_sweep_s": {"1.0": 0.7, "25.0": 0.8},
        "steps": 3,
    }


def verdicts(steps_s, once_a_period=("peer", "ours")):
    measured = configuration(steps_s)
    return report.verdicts(rows_of(measured), once_a_period, report.bounds_s(measured, period=8))


def test_ratios_are_paired_by_repeat():
    rows = rows_of(configuration())
    assert rows["ddp"].speedup(rows["ddp"]) == 1.0
    assert rows["ours"].speedup(rows["ddp"]) == pytest.approx(sorted([0.8 / 0.25, 0.804 / 0.26, 0.808 / 0.27])[1])
    of_limit = rows["peer"].share(rows["limit"].steps_s)
    assert of_limit == pytest.approx(sorted([0.2 / 0.3, 0.201 / 0.31, 0.202 / 0.32])[1])
    assert paired_ratio([1, 4], [2, 2]) == 1.25  # the ratio of the medians would be another


def test_the_bound_is_compute_and_one_all_reduce_a_period_and_only_of_tools_that_have_a_period():
    rows, bounds = rows_of(configuration()), report.bounds_s(configuration(), period=8)
    assert bounds == pytest.approx([0.2 + 0.04, 0.201 + 0.04, 0.202 + 0.04])
    assert rows["ours"].share(bounds) == pytest.approx((0.201 + 0.32 / 8) / 0.26)
    (column,) = (each for each in report.columns(rows, configuration(), period=8) if each.title == "of the bound")
    assert [column.cell(rows[name]) for name in ("ours", "ddp", "limit")] == ["0.927", "", ""]


def test_the_rate_of_the_link_is_that_of_a_ring():
    assert report.link_bytes_per_s(16_000_000, 2.0, hosts=4) == 12_000_000
    assert report.link_bytes_per_s(16_000_000, 2.0, hosts=2) == 8_000_000


def test_overruns_are_counted_over_all_repeats():
    assert rows_of(configuration())["ours"].overruns == 3


@pytest.mark.parametrize(("highest", "conclusive"), [(0.204, True), (0.206, False)])
def test_a_limit_that_spreads_by_more_than_two_percent_makes_a_result_inconclusive(highest, conclusive):
    five = {name: [*each, each[-1], each[-1]] for name, each in STEPS_S.items()}
    said = verdicts({**five, "limit": [0.2] * 4 + [highest]})
    assert ("inconclusive" in said[0]) != conclusive
    assert len(said) == (2 if conclusive else 3)


@pytest.mark.parametrize(
    ("peer_s", "word"), [([0.30, 0.31, 0.32], "no slower"), ([0.250, 0.245, 0.240], "no slower"), ([0.2] * 3, "slower")]
)
def test_ours_is_slower_only_where_the_interval_of_the_paired_ratios_lies_below_1(peer_s, word):
    (few, against_peer, _) = verdicts({**STEPS_S, "peer": peer_s})
    assert "inconclusive**: fewer than 5 repeats" in few
    assert f"is {word} than the best peer, a peer" in against_peer


def test_against_the_best_peer_the_ratio_is_named_with_its_interval():
    said = verdicts({**STEPS_S, "peer": [0.2] * 3})[1]
    assert said == "ours is slower than the best peer, a peer: 0.77 times as fast (0.70 to 0.85)"


def test_the_bound_is_reached_at_95_percent_of_it():
    reached, missed = (
        verdicts({**STEPS_S, "ours": [step_s] * 3}, ["ours"])[-1] for step_s in (0.241 / 0.951, 0.241 / 0.949)
    )
    assert "reaches 0.95" in reached
    assert "misses" in missed


def test_the_page_names_what_could_not_be_run_with_its_error_and_what_ended_early():
    settings = {"model": "vit", "image": 32, "batch": 4, "step_s": 0.2, "period": 8, "parameters": 5_506_852}
    text = report.PAGE.of(
        {
            "date": "2026-01-02",
            "command": "python -m benchmarks.tools --repeats 3",
            "environment": "torch 9",
            "settings": settings,
            "could_not_run": [{"label": "a tool", "hosts": 4, "error": "Abort\nexit status 134"}],
            "configurations": [
                configuration(),
                {"hosts": 2, "link": "1gbit", "repeats": [], "error": "host 1 ended with exit code 1"},
            ],
        }
    )
    for part in (
        "2026-01-02",
        "5,506,852 parameters",
        "    python -m benchmarks.tools --repeats 3",
        "- a tool, 4 hosts:\n\n      Abort\n      exit status 134",
        "| ours: Lightning | 260.0 | 250.0 to 270.0 | 3.09 | 0.773 | 0.927 | 2.00 |",
        "| no communication | 201.0 | 200.0 to 202.0 | 4.00 | 1.000 |  | 2.00 |",
        "took 320 ms, 600 Mbit/s; so the bound at a period of 8 is 241.0 ms",
        "DDP by `bucket_cap_mb`: 1.0 MB: 700 ms, 25.0 MB: 800 ms",
        "## 2 hosts, 1gbit\n\nThis configuration ended early:\n\n      host 1 ended with exit code 1",
    ):
        assert part in text
