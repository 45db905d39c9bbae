"""The arithmetic of the report on accuracy under shares that move, against numbers worked out by hand."""

import math

import partition_accuracy_report as report
import pytest


def arm(accuracy, apart=0.0, changes=((0, 0, [32, 32]),)):
    found = {"accuracy": accuracy, "weights_apart": apart, "losses_apart": apart / 10, "steps": 460}
    return {**found, "losses_apart_first": apart / 100, "changes": [list(each) for each in changes]}


def run(seed, even, balanced, apart):
    moved = ((0, 0, [32, 32]), (0, 15, [16, 48]))
    arms = {"even": arm(even), "balanced": arm(balanced, apart, moved), "one process": arm(even, 1e-6)}
    return {"variant": "vit", "seed": seed, "largest_weight": 1.5, "arms": arms}


RUNS = [run(0, 0.97, 0.97, 2e-5), run(1, 0.96, 0.95, 4e-5), run(2, 0.98, 0.98, 3e-5)]


def test_differences_are_to_the_even_run_of_the_same_seed():
    assert report.differences(RUNS, "balanced") == pytest.approx([0.0, -0.01, 0.0])


def test_the_interval_is_students_and_blank_for_a_single_seed():
    # t(0.975, 2) = 4.302653; mean -1/3 point, standard deviation sqrt(1/3) points
    half = 4.302653 * math.sqrt(1 / 3) / math.sqrt(3)
    expected = f"{-1 / 3 - half:+.2f} to {-1 / 3 + half:+.2f}"
    assert report.interval(report.differences(RUNS, "balanced")) == expected
    assert report.interval([0.01]) == ""


def test_a_row_shows_the_worst_seed_and_every_move():
    cells = report.row("ViT", "balanced", RUNS)
    assert cells[3] == "-0.33"
    assert cells[5:] == ("4.0e-05", "4.0e-07", "4.0e-06", "1, 1, 1")
    assert report.row("ViT", "one process", RUNS)[-1] == ""


def test_the_page_has_all_arms_seeds_and_shares():
    whole = {"title": "On digits", "date": "2026-01-02", "environment": "torch 9", "command": "python x.py"}
    page = report.page({**whole, "runs": RUNS, "labels": {"vit": "ViT", "resnet": "ResNet"}}, "Words.")
    assert "| ViT | even | 97.00 ± 1.00 % |  |" in page
    assert "shares at the end 16 + 48, 16 + 48, 16 + 48; the largest weight is 1.5; 460 steps" in page
    assert "| ViT | balanced | 97.00 % | 95.00 % | 98.00 % |" in page
    assert "ResNet" not in page
