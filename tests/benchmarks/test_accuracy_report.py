"""The arithmetic of the report on accuracy, against numbers worked out by hand."""

import math

import pytest

from benchmarks.compression import accuracy as compression_accuracy
from benchmarks.compression import accuracy_report as report
from benchmarks.kit.pages import page
from benchmarks.kit.statistics import half_width

ACCURACIES = {"dense": [0.97, 0.96, 0.98], "mask": [0.96, 0.96, 0.97], "bf16": [0.98, 0.97]}


def results(accuracies=ACCURACIES):
    runs = [
        {"variant": name, "seed": seed, "accuracy": each, "sent_bytes": 4e6 if name == "dense" else 1e6}
        for name, values in accuracies.items()
        for seed, each in enumerate(values)
    ]
    variants = {"dense": ("dense", "dense"), "mask": ("mask 80 %", "masks"), "bf16": ("bf16", "gradients")}
    more = {"left_out": ["overlap"], "figure": "figure.png"}
    base = {"title": "On digits", "date": "2026-01-02", "command": "python x.py", "environment": "torch 9"}
    return {**base, "variants": variants, "runs": runs, "start_accuracies": [0.9, 0.91, 0.92]} | more


def test_differences_are_to_the_dense_run_of_the_same_seed():
    arms = report.arms_of(results())
    assert arms["mask"].differences == pytest.approx((-0.01, 0.0, -0.01))
    assert arms["mask"].mean_difference == pytest.approx(-0.02 / 3)
    assert report.of_dense(arms["mask"], arms) == 0.25


def test_a_variant_is_compared_at_the_seeds_that_it_has():
    assert report.arms_of(results())["bf16"].differences == pytest.approx((0.01, 0.01))


def test_the_interval_is_students():
    # five values: t(0.975, 4) = 2.776445, standard deviation sqrt(2.5)
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert half_width([0.3]) == math.inf


def test_the_page_has_means_differences_intervals_and_bytes():
    text = page(results(), "Words.", report.sections(results()), conditions_last=True)
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
        report.draw(results(accuracies), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_every_variant_has_a_strategy_or_a_reason():
    names, left_out = compression_accuracy.usable(list(compression_accuracy.VARIANTS))
    assert len(names) + len(left_out) == len(compression_accuracy.VARIANTS)
    for name in names:
        compression_accuracy.strategy_of(name)()
