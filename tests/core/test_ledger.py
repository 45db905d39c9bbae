"""The ledger's sums against sums by hand."""

from pathlib import Path

import pytest

from lightning_comm.core.key_figures import BESIDE_TRAINING, LIGHTNING, MEETING, OTHERS
from lightning_comm.core.ledger import PURPOSES, CommLedger, CommRecord, wire_bytes


def record(purpose: str, payload: int) -> CommRecord:
    return CommRecord("all_reduce", purpose, payload, 2 * payload, step=0, start_s=0.0, duration_s=0.5)


def test_sums_outlive_the_records_that_are_dropped():
    ledger = CommLedger(capacity=3)
    for k in range(10):
        ledger.add(record("parameters" if k % 2 else "buffers", k))
    assert len(ledger.records) == 3
    assert ledger.payload_bytes() == 45
    assert ledger.payload_bytes("parameters") == 25
    assert ledger.payload_bytes("parameters", "buffers") == 45
    assert ledger.wire_bytes("buffers") == 40
    assert ledger.messages("parameters") == 5
    assert ledger.duration_s() == 5.0
    assert ledger.payload_bytes("unheard of") == 0
    assert ledger.purposes == ["buffers", "parameters"]


def test_a_resumed_run_goes_on_from_its_sums_and_adds_what_setting_up_and_loading_have_sent():
    saved, ledger = CommLedger(), CommLedger()
    for purpose in ("start", "control", "checkpoint_files"):
        saved.add(record(purpose, 10))
    for purpose in ("start", "set_up", "checkpoint_files"):
        ledger.add(record(purpose, 3))
    ledger.load_state_dict(saved.state_dict())
    by_purpose = {name: (ledger.payload_bytes(name), ledger.messages(name)) for name in ledger.purposes}
    assert by_purpose == {"start": (10, 1), "control": (10, 1), "checkpoint_files": (13, 2), "set_up": (3, 1)}
    assert [each.purpose for each in ledger.records] == ["start", "set_up", "checkpoint_files"]


def test_a_purpose_that_the_key_figures_tell_apart_is_known():
    assert {LIGHTNING, MEETING, *OTHERS, *BESIDE_TRAINING} <= set(PURPOSES)
    assert not set(BESIDE_TRAINING) & {LIGHTNING, MEETING, *OTHERS}


def test_the_docs_have_a_row_for_each_purpose_in_the_words_of_the_table():
    page = (Path(__file__).parents[2] / "docs/how-to/measure.md").read_text()
    rows = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    told = {name.strip("| `"): text for name, text in rows if name.strip("| `") in PURPOSES}
    assert told == PURPOSES


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_wire_bytes_are_what_the_ranks_send_together_divided_by_their_number(n):
    payload = 420 * n
    ring_total = sum(2 * (n - 1) * (payload // n) for _ in range(n))
    assert n * wire_bytes("all_reduce", payload, n) == ring_total
    assert n * wire_bytes("broadcast", payload, n) == (n - 1) * payload
    assert n * wire_bytes("all_gather", payload, n) == n * (n - 1) * payload
    assert n * wire_bytes("reduce_scatter", payload, n) + n * wire_bytes("all_gather", payload // n, n) == ring_total
    assert n * wire_bytes("all_to_all", payload, n) == n * (n - 1) * (payload // n)
    assert n * wire_bytes("reduce", payload, n) == n * wire_bytes("gather", payload, n) == (n - 1) * payload
    assert n * wire_bytes("scatter", payload, n) == (n - 1) * payload
    assert wire_bytes("send", payload, n) + wire_bytes("receive", payload, n) == payload
    assert wire_bytes("barrier", 0, n) == 0


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'all_reduce', 'reduce_scatter', 'all_gather', .*; got 'gossip'"):
        wire_bytes("gossip", 1, 2)


def test_a_ledger_must_keep_something():
    with pytest.raises(ValueError, match=r"`capacity` must be >= 1; got 0"):
        CommLedger(capacity=0)
