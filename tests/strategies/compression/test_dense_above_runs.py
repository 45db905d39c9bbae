"""The share above which buckets go dense, from a measured link: alike on all ranks, kept on resume, or an error."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from strategies.compression.test_sparse_mask_runs import Stepwise, data
from support.processes import launch
from support.training import Stop, trainer

from lightning_comm import CompressedDDPStrategy, MagnitudePruning, SparseMask
from lightning_comm.core.collectives import ring_all_reduce_s
from lightning_comm.core.costs import Curve, LinkProfile, Timing


def save_link(path, bytes_per_s):
    sizes = (4, 40_000, 4_000_000, 40_000_000)
    points = [Timing(size, 5, *[ring_all_reduce_s(size, 2, 1e-4, bytes_per_s)] * 3) for size in sizes]
    LinkProfile(2, "gloo", (Curve("all_reduce", 2, tuple(points)),)).save(path)


def linked(path):
    compression = SparseMask(MagnitudePruning(0.5), dense_above="auto", link=path)
    return CompressedDDPStrategy(compression, timeout=timedelta(seconds=20))


def _share(rank, path, own=""):
    strategy = linked(path + (own if rank == 1 else ""))
    trainer(strategy, 2).fit(Stepwise(), data(2, rank))
    return strategy._sync.codec.dense_above, strategy.ledger.payload_bytes("gradients")


def test_on_a_slow_link_buckets_are_packed_and_on_a_fast_one_they_go_dense(tmp_path):
    shares = {}
    for name, bytes_per_s in (("slow", 1e6), ("fast", 1e13)):
        save_link(tmp_path / name, bytes_per_s)
        # another rank has no file: rank 0 alone reads it
        answers = launch(_share, str(tmp_path / name), ".missing", world_size=2)
        assert answers[0] == answers[1]
        shares[name], payload_bytes = answers[0]
        assert payload_bytes == 2 * 4 * (108 if name == "slow" else 216)
    assert shares["slow"] > 0.9  # four seconds a row, against a few thousandths
    assert shares["fast"] < 0.5


def _resumed(rank, path, folder):
    first = linked(path)
    trainer(first, 2, callbacks=[Stop(2, folder)]).fit(Stepwise(), data(4, rank))
    if rank == 0:
        Path(path).unlink()  # needed no more
    second = linked(path)
    trainer(second, 2).fit(Stepwise(), data(4, rank), ckpt_path=folder)
    return first._sync.codec.dense_above, second._sync.codec.dense_above


def test_a_resumed_run_keeps_the_share_that_it_began_with(tmp_path):
    save_link(tmp_path / "probe.json", 1e8)
    answers = launch(_resumed, str(tmp_path / "probe.json"), str(tmp_path / "a.ckpt"), world_size=2)
    assert len({share for each in answers for share in each}) == 1


def _refused(rank, path):
    runner = trainer(linked(path), 2)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the test reads all of it)
        runner.fit(Stepwise(), data(2, rank))
    return str(caught.value)


def test_a_link_that_is_missing_or_damaged_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    for name, part in (("missing.json", "No such file"), ("other.json", "lightning-comm probe --out FILE")):
        for said in launch(_refused, str(tmp_path / name), world_size=2):
            assert "SparseMask: `link`=" in said
            assert name in said
            assert part in said
