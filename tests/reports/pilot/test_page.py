"""The pilot's page and tables say what the results file holds, and nothing that it does not."""

import re
from dataclasses import asdict

import pytest
from support.pilot_trials import ddp, trial

from lightning_comm.planning.pilot.advice import advise
from lightning_comm.planning.pilot.costs import LIMIT
from lightning_comm.reports.pilot import page as pilot_page
from lightning_comm.reports.pilot import tables as pilot_tables


def results(**changes):
    trials = [ddp(repeat, step_s=0.2, loss=1.5) for repeat in range(3)]
    trials += [trial(LIMIT, repeat, step_s=0.1, ranks=1, loss=1.5) for repeat in range(3)]
    trials += [trial("qsr", repeat, step_s=0.1, sync_s=0.2, period=4, ranks=1, loss=1.5) for repeat in range(3)]
    rounds = {"ddp": [], LIMIT: [], "qsr": [18000, 36000]}
    return {
        "command": "lightning-comm pilot --config <mine>.yaml",
        "settings": {
            "strategies": ["ddp", "qsr"],
            "steps": 20,
            "warmup_steps": 4,
            "repeats": 3,
            "cost_per_hour": None,
            "lab": None,
        },
        "environment": {"torch": "2.15"},
        "job": {"world_size": 2, "total_steps": 36000},
        "plans": {
            name: {"total_steps": 36000, "gradient_steps": 36000 if name == "ddp" else 0, "round_ends": ends}
            for name, ends in rounds.items()
        },
        "problems": {},
        "trials": [asdict(one) for one in trials],
        "failures": {},
        **changes,
    }


def page(of):
    return pilot_page.html_page(of, advise(pilot_tables.read(of)), None)


def rows(table):
    return {row[0]: row[1:] for row in table[1]}


def test_the_whole_run_is_told_in_hours_and_what_is_saved():
    table = pilot_tables.run_table(pilot_tables.read(results()), None)
    assert table[0][:4] == ["whole run", "time", "saved against ddp", "synchronisations"]
    assert rows(table)["ddp"] == ["2.0 h", "-", "36,000", "-", "1.500"]
    assert rows(table)["qsr"] == ["60.0 min", "60.0 min", "2", "-", "1.500"]
    assert list(rows(table)) == ["ddp", "qsr", "without communication"]


def test_a_range_has_the_unit_of_its_figure_and_a_loss_its_sign():
    found = results()
    found["trials"][-1]["step_s"] = [[0.5] * 20]
    table = rows(pilot_tables.run_table(pilot_tables.read(found), None))
    # 2, 2 and 0.4 times as fast, so 1.17 (0.12 to 11.7): what is saved of 2 h follows from that
    assert table["qsr"][:2] == ["1.0 (1.0-5.0) h", "0.3 (-15.2 to 1.8) h"]


def test_money_is_told_where_a_price_is_given():
    found = results(settings={**results()["settings"], "cost_per_hour": 30.0})
    table = pilot_tables.run_table(pilot_tables.read(found), 30.0)
    assert table[0][3] == "cost saved"
    assert rows(table)["qsr"][2] == "30.00"
    assert "<dd>30.00</dd>" in page(found)
    assert "cost saved" not in page(results())


def test_measured_figures_are_medians_with_the_range_where_there_is_one():
    found = results()
    found["trials"][1]["step_s"] = [[0.3] * 20]
    header, _ = table = pilot_tables.measured_table(pilot_tables.read(found))
    assert header[:5] == ["", "step (ms)", "sync (ms)", "step with syncs (ms)", "times as fast as ddp (95 % interval)"]
    assert rows(table)["ddp"][:5] == ["200.0", "-", "200.0 (200.0-300.0)", "1.00", "0.44"]
    assert rows(table)["qsr"][:5] == ["100.0", "200.0", "100.0", "2.29 (1.28-4.09)", "1.00"]


def test_a_limit_that_spreads_has_no_shares_but_the_ratio_to_ddp_and_its_interval_stay():
    found = results()
    found["trials"][4]["step_s"] = [[0.103] * 20]
    header, _ = table = pilot_tables.measured_table(pilot_tables.read(found))
    assert "of the limit" not in header
    assert rows(table)["without communication"][3] == "1.98 (1.90-2.07)"
    assert "of the limit" not in page(found)
    assert "spreads by 3.0 %" in page(found)
    assert "<th>of the limit</th>" in page(results())


@pytest.mark.parametrize("repeats", [1, 2])
def test_with_one_or_two_repeats_ratios_have_no_interval_and_the_page_says_why(repeats):
    found = results(settings={**results()["settings"], "repeats": repeats})
    found["trials"] = [one for one in found["trials"] if one["repeat"] < repeats]
    header, _ = table = pilot_tables.measured_table(pilot_tables.read(found))
    assert "times as fast as ddp" in header
    assert rows(table)["qsr"][3] == "2.00"
    assert f"With {repeats} repeat(s) the ratios have no interval" in page(found)


def test_long_times_are_told_without_decimals_that_nobody_needs():
    found = results()
    found["trials"][1]["step_s"] = [[12.3456] * 20]
    assert rows(pilot_tables.measured_table(pilot_tables.read(found)))["ddp"][2] == "200.0 (200.0-12,346)"


def test_without_a_schedule_nothing_is_projected_and_the_reason_is_given():
    found = results(plans={}, problems={"qsr": "a ReduceLROnPlateau decides"})
    assert pilot_tables.run_table(pilot_tables.read(found), None) is None
    assert "The whole run of <code>qsr</code> is not known: a ReduceLROnPlateau decides." in page(found)
    assert "The whole run</h2>" not in page(found)


def test_the_limit_has_the_same_name_in_sentences_as_in_tables():
    said = pilot_page.not_projected({"problems": {"qsr": "no length", "limit": "no length"}})
    assert said == ["The whole run of `qsr`, the job without communication is not known: no length."]


def test_a_strategy_that_failed_is_in_no_table_and_is_named_with_its_error():
    found = results(failures={"qsr": {"repeat": 1, "error": "rank 1: ValueError: no"}})
    assert "qsr" not in pilot_tables.read(found)
    assert "<code>qsr</code> failed in repeat 2: rank 1: ValueError: no" in page(found)


def test_what_was_emulated_is_said_and_only_then():
    assert pilot_page.emulated(results()) == []
    assert "Emulated" not in page(results())
    lab = {"hosts": 4, "devices_per_host": 1, "links": ["100 Mbit/s"] * 4}
    found = results(settings={**results()["settings"], "lab": lab})
    found["trials"][0]["devices"] = [{"step_s": 0.05, "batch_size": 16, "steps": 40, "overruns": 10}]
    hosts, device, overruns = pilot_page.emulated(found)
    assert "4 hosts with 1 rank(s) each on one machine, joined by links of 100 Mbit/s." in hosts
    assert "16 samples take 50.0 ms" in device
    assert overruns.startswith("25.0 % of the steps overran")
    assert "<b>Emulated.</b>" in page(found)


def test_the_page_warns_of_the_loss_and_needs_no_other_file():
    said = page(results())
    assert "sanity check" in said
    assert re.findall(r'(?:src|href)="(?!data:)', said) == []
    assert "&lt;mine&gt;.yaml" in said
    assert "<mine>" not in said


def test_the_page_says_what_the_interval_is_and_that_it_is_of_each_strategy_by_itself():
    said = " ".join(pilot_page.how_sure(results(settings={**results()["settings"], "repeats": 5}), {}))
    for words in ("95 % of such pilots", "4 degrees of freedom", "each strategy by itself", "contains 1"):
        assert words in said
