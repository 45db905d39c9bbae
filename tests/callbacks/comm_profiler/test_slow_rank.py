"""The profiler names a slow rank, and says how long the others wait for it; judged by seconds."""

import time
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch
from support.training import Regression, loader, local_update, network, trainer

from lightning_comm import CommProfiler, FixedPeriod


class Slow(Regression):
    """Computes longer on rank 1."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.03 if self.global_rank == 1 else 0.01)
        return super().training_step(batch, batch_idx)


def _runs(rank, folder):
    runs = {}
    for name, strategy in (("slow_ddp", DDPStrategy()), ("slow_local", local_update(FixedPeriod(4)))):
        profiler = CommProfiler(folder, page=name == "slow_ddp")
        trainer(strategy, 2, callbacks=[profiler]).fit(Slow(network(norm=True)), loader(24, rank))
        runs[name] = profiler.figures, str(profiler.run_folder)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return launch(_runs, str(tmp_path_factory.mktemp("profiles")), world_size=2)[0]


@pytest.mark.parametrize("name", ["slow_ddp", "slow_local"])
def test_the_slow_rank_is_named_and_the_other_one_waits(runs, name):
    run, _ = runs[name]
    assert run.slow_rank == 1
    assert 0.3 < run.slower_by < 4
    waits = [rank.wait_s for rank in run.ranks]
    assert waits[0] > 0.008
    assert waits[1] < waits[0] / 2


def test_the_page_is_one_file_with_figures(runs):
    folder = Path(runs["slow_ddp"][1])
    text = (folder / "profile.html").read_text()
    assert text.count("data:image/svg+xml;base64,") == 4
    assert "Rank 1" in text
    assert "is the slow one" in text
    assert "http" not in text.split("</style>")[1].replace("http-equiv", "")
    assert not (folder.parent / "rank_1.html").exists()
