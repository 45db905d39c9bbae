"""The arithmetic of the report on accuracy under shares that move, against numbers worked out by hand."""

import math

import pytest

from benchmarks.adaptive_partition import accuracy as report
from benchmarks.kit.pages import page
from benchmarks.kit.tables import cells


def arm(accuracy, apart=0.0, changes=((0, 0, [32, 32]),)):
    found = {"accuracy": accuracy, "weights_apart": apart, "losses_apart": apart / 10, "steps": 460}
    return {**found, "losses_apart_first": apart / 100, "changes": [list(each) for each in changes]}


def run(seed, even, balanced, apart):
    moved = ((0, 0, [32, 32]), (0, 15, [16, 48]))
    arms = {"even": arm(even), "balanced": arm(balanced, apart, moved), "one process": arm(even, 1e-6)}
    return {"variant": "vit", "seed": seed, "largest_weight": 1.5, "arms": arms}


RUNS = [run(0, 0.97, 0.97, 2e-5), run(1, 0.96, 0.95, 4e-5), run(2, 0.98, 0.98, 3e-5)]


def arms(runs=RUNS):
    return dict(zip(("even", "balanced", "one process"), report.arms_of("ViT", runs), strict=True))


def test_differences_are_to_the_even_run_of_the_same_seed():
    assert arms()["balanced"].differences == pytest.approx((0.0, -0.01, 0.0))


def test_the_interval_is_students_and_blank_for_a_single_seed():
    # t(0.975, 2) = 4.302653; mean -1/3 point, standard deviation sqrt(1/3) points
    half = 4.302653 * math.sqrt(1 / 3) / math.sqrt(3)
    expected = f"{-1 / 3 - half:+.2f} to {-1 / 3 + half:+.2f}"
    assert arms()["balanced"].interval == expected
    assert arms(RUNS[:1])["balanced"].interval == ""


def test_a_row_shows_the_worst_seed_and_every_move():
    even, balanced, one_process = cells(report.COLUMNS, arms().values())
    assert balanced[3] == "-0.33"
    assert balanced[5:] == ["4.0e-05", "4.0e-07", "4.0e-06", "1, 1, 1"]
    assert one_process[-1] == ""
    assert even[3:] == [""] * 6


def test_the_page_has_all_arms_seeds_and_shares():
    whole = {"title": "On digits", "date": "2026-01-02", "environment": "torch 9", "command": "python x.py"}
    whole |= {"runs": RUNS, "labels": {"vit": "ViT", "resnet": "ResNet"}}
    text = page(whole, "Words.", report.sections(whole))
    assert "| ViT | even | 97.00 ± 1.00 % |  |" in text
    assert "shares at the end 16 + 48, 16 + 48, 16 + 48; the largest weight is 1.5; 460 steps" in text
    assert "| ViT | balanced | 97.00 % | 95.00 % | 98.00 % |" in text
    assert "ResNet" not in text
