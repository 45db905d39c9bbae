"""The arithmetic of the report on accuracy, against numbers worked out by hand."""

import math

import accuracy_report as report
import compression_accuracy
import pytest

ACCURACIES = {"dense": [0.97, 0.96, 0.98], "mask": [0.96, 0.96, 0.97], "bf16": [0.98, 0.97]}


def results(accuracies=ACCURACIES):
    runs = [
        {"variant": name, "seed": seed, "accuracy": each, "sent_bytes": 4e6 if name == "dense" else 1e6}
        for name, values in accuracies.items()
        for seed, each in enumerate(values)
    ]
    variants = {"dense": ("dense", "dense"), "mask": ("mask 80 %", "masks"), "bf16": ("bf16", "gradients")}
    base = {"title": "On digits", "date": "2026-01-02", "command": "python x.py", "environment": "torch 9"}
    return {**base, "variants": variants, "runs": runs, "start_accuracies": [0.9, 0.91, 0.92], "left_out": ["overlap"]}


def test_differences_are_to_the_dense_run_of_the_same_seed():
    rows = report.rows_of(results())
    assert rows["mask"].differences == pytest.approx((-0.01, 0.0, -0.01))
    assert rows["mask"].mean_difference == pytest.approx(-0.02 / 3)
    assert rows["mask"].of_dense == 0.25


def test_a_variant_is_compared_at_the_seeds_that_it_has():
    assert report.rows_of(results())["bf16"].differences == pytest.approx((0.01, 0.01))


def test_the_interval_is_students():
    # five values: t(0.975, 4) = 2.776445, standard deviation sqrt(2.5)
    assert report.half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert report.half_width([0.3]) == math.inf


def test_the_page_has_means_differences_intervals_and_bytes():
    text = report.page(results(), "Words.", "figure.png")
    half = 100 * 4.302653 * math.sqrt(1 / 3) / 100 / math.sqrt(3)  # of -1, 0, -1 points
    for part in (
        "| dense | 97.00 ± 1.00 % |  |  | 4.00 MB | 100.0 % |",
        f"| mask 80 % | 96.33 ± 0.58 % | -0.67 | {-2 / 3 - half:+.2f} to {-2 / 3 + half:+.2f} | 1.00 MB | 25.0 % |",
        "![Difference to dense against bytes sent](figure.png)",
        "- overlap",
        "| bf16 | 98.00 % | 97.00 % |  |",
        "had reached 90.00 %, 91.00 %, 92.00 %",
    ):
        assert part in text


def test_a_figure_is_drawn_of_one_seed_as_of_several(tmp_path):
    for name, accuracies in (("one", {"dense": [0.97], "mask": [0.96]}), ("several", ACCURACIES)):
        report.draw(report.rows_of(results(accuracies)), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_every_variant_has_a_strategy_or_a_reason():
    names, left_out = compression_accuracy.usable(list(compression_accuracy.VARIANTS))
    assert len(names) + len(left_out) == len(compression_accuracy.VARIANTS)
    for name in names:
        compression_accuracy.strategy_of(name)()
