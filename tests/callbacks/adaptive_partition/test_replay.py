"""The journal of a run whose shares moved, and its replay."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.partition import SLOW, balance
from support.processes import launch

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("in_own_folder")  # journals are written there


def test_a_replayed_journal_repeats_the_run_bit_for_bit_whatever_the_speeds(tmp_path):
    folder = tmp_path / "first"
    change = (14, [3 * SLOW, SLOW])
    first = launch(partial(balance, speeds=[SLOW, 3 * SLOW], steps=42, change=change, folder=str(folder)), world_size=2)
    [path] = folder.glob("run_*/journal.json")
    assert len(json.loads(Path(path).read_text())["changes"]) > 2
    workers = {"num_workers": 2}
    again = launch(
        partial(balance, speeds=[2 * SLOW, 2 * SLOW], steps=42, replay=str(path), loader=workers), world_size=2
    )
    for (seen, _, one), (seen_again, journal, other) in zip(first, again, strict=True):
        assert seen == seen_again
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert {change["why"] for change in journal["changes"]} == {"replay"}
        assert journal["windows"]  # it is measured all the same
