"""The arithmetic of the reports on Cyclic Data Parallelism, against numbers worked out by hand."""

import pytest

from benchmarks.cyclic import accuracy as cyclic_accuracy
from benchmarks.cyclic import shared_memory_report as memory
from benchmarks.cyclic import steps as cyclic
from benchmarks.cyclic import steps_report as report
from benchmarks.cyclic.steps_report import ALONE, BEST, BUCKETS, LABELS, V1, V2
from benchmarks.kit.pages import page
from benchmarks.kit.step_times import LIMIT, rows_of
from benchmarks.kit.tables import cells
from lightning_comm.core.cyclic.schedule import CyclicSchedule

STEPS_S = {
    LIMIT: [0.70] * 5,
    ALONE: [0.80] * 5,
    BUCKETS: [0.72, 0.72, 0.72, 0.72, 0.725],
    BEST: [1.0, 1.0, 1.0, 1.0, 1.1],
    V2: [0.80, 0.80, 0.80, 0.80, 0.90],
    V1: [0.80] * 5,
}
PEAKS = {"p95": 12.5e6, "highest": 13e6, "window": 12e6}


def configuration(steps_s=STEPS_S, **more):
    def tool(name, step_s):
        found = {"step_s": step_s, "sent_bytes": 9e6, "overruns": 1, "real_share": 0.1, "peaks": [PEAKS, PEAKS]}
        return {**found, "payload_bytes": 8.5e6 if name in (V1, V2) else None}

    count = len(steps_s[LIMIT])
    repeats = [
        {"repeat": i, "tools": {name: tool(name, each[i]) for name, each in steps_s.items()}} for i in range(count)
    ]
    found = {"title": "4 hosts", "labels": {name: report.LABELS[name] for name in steps_s}, "repeats": repeats}
    found |= {"ratio": 1.0, "least_bytes": 8.5e6, "delays": {V1: 1.0, V2: 0.375, BEST: 0.0}, "note": "A note."}
    return {**found, "state_shares": {V2: [0.2, 0.3], BEST: [1.0, 1.0]}, "error": "", **more}


def test_the_bound_is_the_longer_of_compute_and_the_faster_of_the_isolated_all_reduces():
    assert report.bounds_s(configuration()["repeats"]) == [0.72, 0.72, 0.72, 0.72, 0.725]
    slower = configuration({**STEPS_S, LIMIT: [0.75] * 5})
    assert report.bounds_s(slower["repeats"]) == [0.75] * 5
    without = configuration({name: each for name, each in STEPS_S.items() if name != BUCKETS})
    assert report.bounds_s(without["repeats"]) == [0.8] * 5


def test_shares_and_ratios_are_paired_by_repeat():
    rows, bounds = rows_of(configuration()), report.bounds_s(configuration()["repeats"])
    assert rows[V2].of(bounds) == pytest.approx((0.9, 0.9, 0.9, 0.9, 0.725 / 0.9))
    assert rows[V2].share(bounds) == pytest.approx(0.9)
    assert rows[V2].speedup(rows[BEST]) == pytest.approx(1.25)
    assert report.peaks_seen(rows[V2]) == PEAKS


def test_what_trains_nothing_together_is_not_compared_with_ddp():
    rows = rows_of(configuration())
    (column,) = (each for each in report.times_columns(configuration(), rows) if each.title.startswith("times as fast"))
    assert [column.cell(rows[name]) for name in (LIMIT, ALONE, BUCKETS, V2)] == ["", "", "", "1.25"]


@pytest.mark.parametrize(("rule", "asked", "word"), [(V2, "0.85", "reached"), (V1, "0.95", "**missed**")])
def test_what_was_asked_stands_beside_what_was_measured(rule, asked, word):
    found = configuration()
    said = report.verdicts(found, rows_of(found))
    assert f"asked of {LABELS[rule]}: {asked} of the bound; measured 0.900: {word}" in said
    assert f"asked of {LABELS[V2]}: 1.2 times as fast as the best DDP; measured 1.250: reached" in said


def test_nothing_is_asked_where_the_link_is_roomy():
    found = configuration(ratio=0.1)
    assert not [each for each in report.verdicts(found, rows_of(found)) if "asked" in each]


@pytest.mark.parametrize(("last_s", "conclusive"), [(0.734, True), (0.736, False)])
def test_a_bound_that_spreads_by_more_than_two_percent_makes_a_result_inconclusive(last_s, conclusive):
    found = configuration({**STEPS_S, BUCKETS: [0.72] * 4 + [last_s]})
    assert ("inconclusive" in report.verdicts(found, rows_of(found))[0]) != conclusive


def test_fewer_than_five_repeats_are_inconclusive():
    found = configuration({name: each[:4] for name, each in STEPS_S.items()})
    assert "inconclusive**: fewer than 5 repeats" in report.verdicts(found, rows_of(found))[0]


def test_peaks_are_of_one_sample_to_the_next_and_over_the_longer_window():
    # 20 ms each: nothing, then 1000 bytes a sample four times, then nothing
    sent = [0, 0, 0, 1000, 2000, 3000, 4000, 4000, 4000, 4000]
    peaks = report.peaks_of([(0.02 * k, each) for k, each in enumerate(sent)], window_s=0.1199)
    assert peaks["highest"] == pytest.approx(1000 / 0.02)
    assert peaks["window"] == pytest.approx(4000 / 0.12)
    assert peaks["p95"] == pytest.approx(1000 / 0.02)
    assert report.peaks_of([(0.0, 0), (0.02, 5)], window_s=1.0) == {}


def test_a_sample_that_follows_a_late_one_closely_is_no_peak():
    samples = [(0.02 * k, 1000 * k) for k in range(8)]
    late = [*samples[:3], (0.0595, 3000 - 500), *samples[3:]]
    assert report.peaks_of(late, window_s=0.05)["highest"] == pytest.approx(1e6)
    assert report.peaks_of(late, window_s=0.05, shortest_s=0.01)["highest"] == pytest.approx(50_000)


def test_the_page_has_every_row_with_delay_memory_and_bytes_and_says_what_ended_early():
    early = {**configuration(), "title": "broken", "repeats": [], "error": "host 1 ended"}
    base = {"title": "Cyclic", "date": "2026-01-02", "command": "python x.py", "environment": "torch 9"}
    whole = {**base, "configurations": [configuration(), early]}
    text = page(whole, "Words.", report.sections(whole))
    for part in (
        "# Cyclic, 2026-01-02\n\nWords.\n\n    python x.py\n\ntorch 9",
        '| `CyclicStrategy(rule="v2")` | 800.0 | 800.0 to 900.0 | 0.900 | 0.806 to 0.900 | 1.25 | 0.375 | '
        "20.0 to 30.0 % |",
        "| DDP, best buckets | 1000.0 | 1000.0 to 1100.0 | 0.720 | 0.659 to 0.720 | 1.00 | 0 | 100.0 % |",
        '| `CyclicStrategy(rule="v2")` | 8.500 | 1.0000 | 9.000 | 1.059 | 100.0 | 104.0 | 96.0 |',
        "5 repeats. A note. Overruns of the device: 5 in no communication",
        "## broken\n\nThis configuration ended early:\n\n      host 1 ended",
    ):
        assert part in text


def test_compute_is_such_that_a_transfer_takes_the_stated_multiple_of_it():
    # 12.5 MB/s, of which 1448 of 1514 bytes are payload
    assert cyclic.step_s_of(1.0, 8.5e6) == pytest.approx(8.5e6 / 12.5e6 * 1514 / 1448, abs=1e-3)
    assert cyclic.step_s_of(0.5, 8.5e6) == pytest.approx(2 * cyclic.step_s_of(1.0, 8.5e6), abs=2e-3)
    assert cyclic.step_s_of(0.1, 8.5e6) == pytest.approx(cyclic.step_s_of(1.0, 8.5e6), abs=1e-3)
    assert [cyclic.link_of(ratio) for ratio in (0.1, 0.5, 2.0)] == ["1gbit", "100mbit", "100mbit"]


@pytest.mark.parametrize(("step_s", "steps"), [(3.0, 4), (1.5, 4), (0.75, 8), (0.36, 10)])
def test_a_repeat_times_six_seconds_but_no_less_than_four_steps_and_no_more_than_ten(step_s, steps):
    assert cyclic.steps_of(step_s) == steps


def test_the_mean_delay_of_v2_is_half_of_n_minus_one_over_n():
    assert cyclic.delays_of(CyclicSchedule(4, 12, "v2")) == pytest.approx(3 / 8)
    assert cyclic.delays_of(CyclicSchedule(4, 12, "v1", warmup_sync_steps=5)) == 1.0


def test_the_defaults_fit_into_40_minutes():
    steps_s = {ratio: cyclic.step_s_of(ratio, 8.56e6) for ratio in (0.5, 1, 2, 0.1)}
    total_s = sum(cyclic.expected_s(ratio, each, list(report.LABELS), 5) for ratio, each in steps_s.items())
    assert 20 * 60 < total_s < 40 * 60


def triangle(length_s=1.0, pieces=100):
    """One rank whose memory rises to 100 and falls again within a step."""
    return [(length_s * k / pieces, min(k, pieces - k) * 200 // pieces) for k in range(pieces)]


def test_shifted_copies_of_a_triangle_sum_up_to_a_constant():
    assert memory.shifted_peak(triangle(), 0.0, 1.0, workers=1) == 100
    assert memory.shifted_peak(triangle(), 0.0, 1.0, workers=2) == pytest.approx(100, abs=3)
    assert memory.shifted_peak(triangle(), 0.0, 1.0, workers=4) == pytest.approx(200, abs=5)


def test_a_profile_keeps_its_level_until_the_next_change():
    profile = [(0.5, 7), (1.0, 0)]
    assert [memory.level(profile, at_s) for at_s in (0.2, 0.5, 0.9, 1.0, 2.0)] == [0, 7, 7, 0, 0]


def test_rows_of_memory_are_medians_and_stand_beside_the_prediction():
    profiles = [{"began_s": 0.0, "length_s": 1.0, "profile": triangle()}]
    arms = {
        memory.DDP: {"peaks_bytes": [4e6, 4e6, 6e6], "step_s": 0.6},
        memory.NONE: {"peaks_bytes": [3e6, 4e6, 5e6], "step_s": 0.6},
        memory.STEP: {"peaks_bytes": [2e6, 2e6, 2.5e6], "step_s": 0.6},
    }
    found = {"title": "vit", "profiles": profiles, "repeats": [{"repeat": 0, "arms": arms}]}
    columns = memory.columns(found, memory.predictions(profiles, workers=4))
    rows = {row[0]: row[1:] for row in cells(columns, memory.measured(found))}
    assert rows["DDP"] == ["4.00", "4.00 to 4.00", "1.000", "1.000", "6.00", "600"]
    share = memory.shifted_peak(triangle(), 0.0, 1.0, 4) / 400
    assert rows[memory.LABELS[memory.STEP]] == ["2.00", "2.00 to 2.00", "0.500", f"{share:.3f}", "2.50", "600"]
    assert memory.LABELS[memory.STEP_V1] not in rows
    assert rows[memory.LABELS[memory.NONE]][3] == ""
    text = "".join(memory.sections({"settings": {"workers": 4}, "configurations": [found]}))
    assert "4 at once: 0.00 MB" in text


def accuracies():
    def run(case, rule, seed, accuracy_, loss):
        return {
            "case": case, "rule": rule, "seed": seed, "accuracy": accuracy_, "last_loss": loss, "highest_loss": loss,
            "steps": 10,
        }  # fmt: skip

    runs = [run("vit", "dp", 0, 0.9, 0.1), run("vit", "dp", 1, 0.8, 0.2), run("vit", "v1", 0, 0.85, 0.3)]
    runs += [run("vit", "v1", 1, 0.85, None)]
    return {
        "title": "T", "date": "d", "command": "c", "environment": "e", "runs": runs, "cases": {"vit": "ViT, 0.1"},
        "rules": {"dp": "plain", "v1": "v1"},
    }  # fmt: skip


def test_accuracies_are_compared_by_seed_and_a_loss_that_is_not_finite_is_said():
    found = accuracies()
    (_, v1) = cyclic_accuracy.arms_of(found)
    assert v1.differences == pytest.approx((-0.05, 0.05))
    text = page(found, "Words.", cyclic_accuracy.sections(found))
    for part in (
        "| ViT, 0.1 | plain | 85.00 % | 80.00 to 90.00 |  |  | 0.15 | 0.2 |",
        "| ViT, 0.1 | v1 | 85.00 % | 85.00 to 85.00 | -0.00 | -5.00 to +5.00 | not finite | not finite |",
        "| ViT, 0.1 | plain | 90.00 % | 80.00 % |",
    ):
        assert part.replace("-0.00", "") in text.replace("-0.00", "").replace("+0.00", "")


def test_workers_draw_in_turn_what_the_ranks_of_a_run_would_load():
    batches = list(cyclic_accuracy.micro_batches(seed=3, epochs=2))
    steps = 1437 // (cyclic_accuracy.WORKERS * cyclic_accuracy.BATCH)
    assert len(batches) == 2 * steps * cyclic_accuracy.WORKERS
    assert {len(images) for images, _ in batches} == {cyclic_accuracy.BATCH}
    epoch = [image for images, _ in batches[: len(batches) // 2] for image in images]
    assert len({image.numpy().tobytes() for image in epoch}) > 0.99 * len(epoch)  # each once in an epoch
    assert not batches[0][0].equal(batches[len(batches) // 2][0])  # and in another order in the next
