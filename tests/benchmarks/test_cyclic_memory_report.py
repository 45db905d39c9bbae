"""The arithmetic of the report on activations, against numbers worked out by hand, and its page."""

import pytest

from benchmarks.cyclic import memory_report as report

TRIANGLE = [(10.0 + k / 100, k if k <= 100 else 200 - k) for k in range(201)]  # up and down, in 2 seconds


@pytest.mark.parametrize(("copies", "expected"), [(1, 100), (2, 100), (4, 200), (8, 400)])
def test_shifted_triangles_add_up_to_their_mean(copies, expected):
    assert report.shifted_peak(TRIANGLE, begin=10.0, end=12.0, copies=copies) == pytest.approx(expected, rel=0.02)


def test_copies_of_what_is_always_kept_save_nothing():
    assert report.shifted_peak([(5.0, 7)], begin=5.0, end=6.0, copies=4) == 28


def test_a_copy_keeps_nothing_before_the_first_change():
    assert report.shifted_peak([(0.5, 6), (0.9, 0)], begin=0.0, end=1.0, copies=2) == 6


def test_cuts_make_the_slowest_stage_as_fast_as_can_be():
    assert report.best_cuts([1, 1, 2, 4], 2) == [3]
    assert report.best_cuts([3, 1, 1, 1, 3], 3) == [1, 4]
    assert report.best_cuts([5, 1], 2) == [1]


def model_measured():
    sizes = dict(zip(report.ARMS, (1000, 250, 625, 500, 600, 475), strict=True))
    return {
        "title": "a model", "workers": 4, "batch": 8, "size": 224, "steps": 3, "threads": 2, "load": 0.1,
        "cuts": {"coarse": [0, 1, 2, 3, 4], "fine": list(range(9))}, "stage_shares": [25.0] * 4,
        "stage_bytes": [2**20] * 4, "profile": {"peak_bytes": 250, "shifted_bytes": [690, 700, 600]},
        "peak_bytes": sizes, "step_s": {key: [1.0, 2.0, 3.0] for key in report.ARMS},
    }  # fmt: skip


def page_of(model):
    return report.PAGE.of({"title": "T", "date": "D", "environment": "E", "command": "c", "configurations": [model]})


def test_the_page_has_a_row_for_each_method_with_its_saving():
    page = page_of(model_measured())
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(report.ARMS)
    assert "| `CyclicEngine`, S = N, backwards first | 0.0 | 0.500 | 50.0 % | 2.00 (1.00 to 3.00) | 1.00 |" in rows
    assert any("S = 8, backwards" in row and "52.5 %" in row for row in rows)
    assert "**31.0 %** (30.0 to 40.0 over 3 steps" in page


def test_the_allocators_table_stands_below_where_a_device_has_one():
    found = {"persistent": 100 * 2**20, "peak_above": 300 * 2**20, "reserved": 512 * 2**20}
    less = {**found, "peak_above": 150 * 2**20}
    allocator = {key: found if key == "one batch" else less for key in report.ARMS}
    page = page_of({**model_measured(), "device": "a device", "precision": "bf16", "allocator": allocator})
    assert "| one batch of all | 100.0 | 300.0 | 512.0 | 1.000 |" in page
    assert "| gradient accumulation | 100.0 | 150.0 | 512.0 | 0.500 |" in page
    assert "allocator of a device says, in bf16" in page
    assert "allocator" not in page_of(model_measured())
