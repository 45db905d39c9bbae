"""Background threads one after the other: which stream of a device they use, and what is handed over."""

import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.mock_cuda import mock_cuda
from support.mock_cuda_record import Stream
from support.model_averages import Background

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.background_thread import BackgroundStreams, BackgroundThread
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.recording import Recorder, another_group

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")


def _rounds(rank):
    """Return how many streams forty rounds in the background make, and what of their order is missing."""
    with mock_cuda() as device:
        weights = {"a": torch.ones(100, device="cuda"), "b": torch.ones(50, device="cuda")}
        averager = Background(Recorder(CommLedger(), another_group(None), hold=True), Full(), 128)
        averager.references.restart(weights)
        with mock.patch.object(torch.cuda, "Stream", side_effect=Stream) as made:
            for _ in range(40):
                weights["a"].add_(1)
                averager.depart(weights)
                averager.land_(weights)
        found = made.call_count, device.hazards, weights["a"][0].item()
        dist.barrier()
    return found


def test_forty_averages_in_the_background_use_one_stream_of_their_own_and_keep_order(run_ranks):
    (found,) = run_ranks(_rounds, world_size=1)
    assert found == (1, [], 41.0)


@pytest.mark.parametrize("way", ["alone", "one after the other"])
def test_work_is_handed_over_to_the_stream_and_back(way):
    """What was written before is there for the thread, and what the thread has written for whoever joins it."""
    with mock_cuda() as device:
        streams, rows, used = BackgroundStreams(), torch.zeros(3, device="cuda"), []

        def work():
            used.append(torch.cuda.current_stream())
            rows.mul_(2).add_(1)

        for _ in range(3):
            rows.add_(1)
            (BackgroundThread(work, CUDA) if way == "alone" else streams.start(work, CUDA)).join()
            rows.mul_(1)
        assert not device.hazards
        assert rows.tolist() == [21.0] * 3
        assert len(set(used)) == (3 if way == "alone" else 1)
        assert torch.cuda.current_stream() not in used


def test_on_the_host_a_background_thread_has_no_stream_and_fails_where_it_is_waited_for():
    streams, names = BackgroundStreams(), []
    streams.start(lambda: names.append(threading.current_thread().name), HOST).join()
    assert names == ["lightning_comm background"]
    failing = streams.start(lambda: torch.ones(3).view(2), HOST)
    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        failing.join()
