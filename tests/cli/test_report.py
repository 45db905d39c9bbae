"""The demo's sentences and tables against numbers worked out by hand, also when QSR loses."""

import pytest
from support import pilot_trials

from lightning_comm.cli.demo import figure, report
from lightning_comm.planning.pilot.costs import LIMIT, summarise
from lightning_comm.reports.pieces import text_table


def run(method, seed, accuracy, wire_bytes):
    return {
        "method": method,
        "seed": seed,
        "steps": 10,
        "samples": 320,
        "parameter_bytes": 4000,
        "accuracy": accuracy,
        "synchronisations": 10 if method == "ddp" else 2,
        "training_wire_bytes": wire_bytes,
        "evaluation_wire_bytes": 0 if method == "ddp" else 6_000_000,
        "wall_s": 2.0,
        "lrs": [0.1] * 10,
        "rounds": [] if method == "ddp" else [{"end_step": 4, "period_steps": 4}, {"end_step": 10, "period_steps": 6}],
        "curve": [
            {"epoch": 1, "step": 10, "accuracy": accuracy, "training_wire_bytes": wire_bytes, "wall_s": 2.0},
        ],
    }


def results(*pairs):
    """Accuracies of DDP and QSR, one pair a seed; QSR sends a tenth."""
    runs = []
    for seed, (ddp, qsr) in enumerate(pairs):
        runs += [run("qsr", seed, qsr, 3_000_000), run("ddp", seed, ddp, 30_000_000)]
    settings = {"devices": 2, "epochs": 1, "seeds": len(pairs), "lr": 0.1, "batch_size": 16, "alpha": 0.2, "h_base": 4}
    return {"command": "lightning-comm demo", "settings": settings, "environment": {"torch": "2"}, "runs": runs}


@pytest.mark.parametrize(
    ("qsr", "must_say"),
    [
        (0.95, "QSR sent 10.0 % of DDP's bytes and was 2.00 percentage points less accurate than DDP: 95.0 % against"),
        (0.98, "QSR sent 10.0 % of DDP's bytes and was 1.00 percentage points more accurate than DDP: 98.0 % against"),
        (0.97, "QSR sent 10.0 % of DDP's bytes and was as accurate as DDP: 97.0 % against 97.0 %."),
    ],
)
def test_one_seed_is_told_as_it_is(qsr, must_say):
    said = report.conclusions(results((0.97, qsr)))
    assert said[0].startswith(must_say)
    assert "0.28 points" in said[1]
    assert "one seed" in said[1]


def test_several_seeds_are_compared_in_pairs():
    (said, _) = report.conclusions(results((0.96, 0.95), (0.90, 0.93), (0.98, 0.97)))
    assert "0.33 percentage points more accurate than DDP on average over 3 paired seeds" in said
    assert "(standard deviation 2.31, from -1.00 to +3.00)" in said
    assert "95.0 % against 94.7 %" in said


def test_the_tables_have_a_row_for_each_method_and_each_seed():
    two = results((0.96, 0.95), (0.90, 0.93))
    rows = {row[0]: row[1:] for row in report.summary_table(two)[1]}
    assert rows == {
        "QSR": ["94.0 ± 1.4 %", "2", "3.0 MB", "10.0 %", "2 s"],
        "DDP": ["93.0 ± 4.2 %", "10", "30.0 MB", "100.0 %", "2 s"],
    }
    header, seeds = report.seeds_table(two)
    assert header == ["seed", "QSR", "DDP", "QSR - DDP"]
    assert seeds == [["0", "95.00 %", "96.00 %", "-1.00"], ["1", "93.00 %", "90.00 %", "+3.00"]]


def test_a_text_table_is_as_wide_in_every_row():
    text = text_table(["method", "sent"], [["DDP", "1,601.3 MB"], ["Local SGD", "2 MB"]])
    assert len({len(line) for line in text.splitlines()}) == 1


def test_bytes_of_evaluation_are_told_apart():
    assert any("come on top: QSR 6.0 MB." in text for text in report.how_measured(results((0.9, 0.9))))


def test_names_and_values_are_escaped_on_the_page():
    strange = results((0.9, 0.9)) | {"environment": {"system": "<script>"}}
    assert "<script>" not in report.html_page(strange, b"png")


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_figure_is_drawn_for_one_seed_and_for_several(seeds, tmp_path):
    figure.draw(results(*[(0.9, 0.8)] * seeds), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_times_name_the_option_that_the_demo_has(monkeypatch):
    few = results((0.9, 0.9)) | {"pilot": {"settings": {}, "trials": []}}
    made = pilot_trials.trial
    trials = [pilot_trials.ddp(), made(LIMIT, step_s=0.1, ranks=1), made("qsr", step_s=0.12, period=4, ranks=1)]
    monkeypatch.setattr(report, "read", lambda _: summarise(trials, {}))
    assert report.times(few)[-1].endswith("so a difference may be noise. Measure again with `--pilot-repeats 5`.")
