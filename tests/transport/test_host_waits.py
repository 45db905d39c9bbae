"""The device that is not there: it sees what would make a host wait, what a stream misses, and what devices refuse."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from support.mock_cuda import mock_cuda
from support.processes import start_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def ones():
    return torch.ones(3, device="cuda")


def pinned():
    return torch.empty(3, pin_memory=True)


WAITS = {
    "_local_scalar_dense": [
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x[0].item(),
        lambda x: torch.tensor([1.0, x[0]]),
        lambda x: torch.as_tensor((x[:1],)),
        lambda x: x.masked_fill_(x > 0, x[0]),
        lambda x: x.index_fill(0, x.long(), x[0]),
    ],
    "allclose": [lambda x: torch.allclose(x, x)],
    "equal": [lambda x: torch.equal(x, x)],
    "tolist": [lambda x: x.tolist()],
    "repr": [repr],
    "_linalg_svd": [lambda x: torch.linalg.svd(x.view(3, 1))],
    "_linalg_eigh": [lambda x: torch.linalg.eigh(x.outer(x))],
    "nonzero": [lambda x: x.nonzero(), lambda x: torch.where(x > 0)],
    "a mask as an index": [lambda x: x[x > 0], lambda x: x.index_put_((x > 0,), x.clone())],
    "indices from the host": [lambda x: x[torch.tensor([0, 1])], lambda x: x[[0, 1]]],
    "copy from the device, pageable": [
        lambda x: x.cpu(),
        lambda x: torch.empty(3).copy_(x),
        lambda x: torch.empty(3).copy_(x, non_blocking=True),
        lambda x: torch.save({"x": x}, io.BytesIO()),
        lambda x: pickle.dumps(nn.Parameter(x)),
        lambda x: x.untyped_storage().cpu(),
    ],
    "copy from the device, pinned": [lambda x: pinned().copy_(x)],
    "copy to the device, pageable": [
        lambda x: torch.ones(3).cuda(),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
        lambda x: torch._foreach_copy_([x], [torch.ones(3)]),
        lambda x: nn.Linear(1, 1, bias=False).to("cuda"),
        lambda x: torch.where(x > 0, x, torch.tensor(3.0)),
    ],
    "copy to the device, pinned": [lambda x: x.copy_(pinned()), lambda x: pinned().to("cuda")],
    "values from the host": [
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: torch.as_tensor(3, device="cuda"),
        lambda x: x.new_tensor(2),
    ],
    "torch.cuda.synchronize": [lambda x: torch.cuda.synchronize()],
    "Event.synchronize": [lambda x: torch.cuda.current_stream().record_event().synchronize()],
    "Stream.synchronize": [lambda x: torch.cuda.current_stream().synchronize()],
}
NONE = {
    "numbers beside it": lambda x: torch.where(x > 0, 2 * x + torch.tensor(3.0), 0.0),
    "filling": lambda x: (torch.full((3,), 2.0, device="cuda"), x.fill_(3), x.new_full((2,), 1.0), x.new_zeros(3)),
    "a mask where a number goes": lambda x: x.__setitem__(x > 0, 5.0),
    "pinned copies": lambda x: (
        pinned().copy_(x, non_blocking=True),
        x.copy_(pinned(), non_blocking=True),
        torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        x.to("cpu", non_blocking=True),
    ),
    "copies within it": lambda x: (copy.deepcopy(x), copy.deepcopy(nn.Parameter(x)), x.clone(), torch.as_tensor(x)),
    "filling with a number of the host": lambda x: x.masked_fill_(x > 0, torch.tensor(2.0)),
    "what is on the host": lambda x: (float(torch.ones(3).sum()), torch.ones(3).tolist(), torch.ones(3).nonzero()),
    "a step": lambda x: torch.optim.AdamW([nn.Parameter(x)]).step(),
    "events and streams": lambda x: torch.cuda.current_stream().wait_event(torch.cuda.Stream().record_event()),
}


@pytest.mark.parametrize(("kind", "work"), [(kind, work) for kind, each in WAITS.items() for work in each])
def test_each_wait_is_seen_once_with_its_place(kind, work):
    with mock_cuda() as device:
        x = ones()
        with device.counting() as waits:
            work(x)
    assert [wait.kind for wait in waits] == [kind]
    assert all("test_host_waits.py" in wait.by for wait in waits)
    assert not any(wait.own for wait in waits)


@pytest.mark.parametrize("work", NONE.values(), ids=list(NONE))
def test_work_that_waits_for_nothing_is_not_counted(work):
    with mock_cuda() as device:
        x = ones()
        with device.counting() as waits:
            work(x)
    assert not waits
    assert not device.hazards


REFUSED = {
    "same device": [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1)]),
        lambda x: torch.ones(3) + x[0],
        lambda x: torch.tensor(1.0).mul_(x[0]),
        lambda x: torch.add(x, x, out=torch.ones(3)),
        lambda x: torch._foreach_add_([torch.tensor(1.0)], [x[0]]),
    ],
    "generator of the device": [
        lambda x: torch.rand(3, generator=torch.Generator("cuda")),
        lambda x: x.uniform_(generator=torch.Generator()),
    ],
    "convert cuda:0": [lambda x: x.numpy()],
    "indices should be": [lambda x: torch.ones(3)[x.long()]],
}


@pytest.mark.parametrize(("words", "work"), [(words, work) for words, each in REFUSED.items() for work in each])
def test_devices_are_not_mixed(words, work):
    with mock_cuda(), pytest.raises((RuntimeError, TypeError), match=words):
        work(ones())


def test_what_comes_of_a_tensor_of_the_device_is_there_too():
    with mock_cuda():
        x = ones()
        made = [
            x[1:],
            x.view(3, 1),
            x + 1,
            x.detach(),
            x.mul_(2),
            copy.deepcopy(x),
            *torch._foreach_add([x], 1),
            x.half(),
        ]
        made += [torch.zeros_like(x), torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))]
        assert all(each.is_cuda and each.device == torch.device("cuda:0") and not each.is_cpu for each in made)
        assert not any(each.is_cuda for each in (x.cpu(), torch.zeros_like(x, device="cpu"), torch.ones(3)))
    assert x.device.type == "cpu"
    assert not torch.cuda.is_available()


def test_gradients_are_on_the_device_and_hooks_and_threads_are_within():
    with mock_cuda() as device:
        net, seen = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to("cuda"), []
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda each: seen.append((each.grad.is_cuda, float(each.grad.sum())))
            )
        with device.counting() as waits:
            net(torch.ones(4, 3, device="cuda")).sum().backward()
        thread = threading.Thread(target=lambda: seen.append((ones().is_cuda, float(ones().sum()))), name="beside")
        thread.start()
        thread.join()
    assert len(seen) == 7
    assert all(on_device for on_device, _ in seen)
    assert [wait.in_backward for wait in waits] == [True] * 6
    assert device.waits[-1].thread == "beside"
    assert device.waits[-1].in_backward is False


def _other_stream(x, *, waits_first=True, joins=True):
    stream = torch.cuda.Stream()
    if waits_first:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.mul_(2)
        mark = stream.record_event()
    if joins:
        mark.wait()
    return x + 1


@pytest.mark.parametrize(
    ("settings", "missing"),
    [({}, []), ({"waits_first": False}, ["overwrites"]), ({"joins": False}, ["reads"])],
    ids=str,
)
def test_a_missing_stream_wait_is_reported(settings, missing):
    with mock_cuda() as device:
        _other_stream(ones(), **settings)
    assert len(device.hazards) == len(missing)
    assert all(word in hazard for word, hazard in zip(missing, device.hazards, strict=True))


def test_what_the_host_has_waited_for_needs_no_stream_wait():
    with mock_cuda() as device:
        x, stream = ones(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            x.mul_(2)
        stream.synchronize()
        x.add_(1)
    assert not device.hazards


HOST_READS = {
    "a number": lambda here: float(here[0]),
    "all": lambda here: here.tolist(),
    "an array": lambda here: here.numpy(),
    "a sum": lambda here: here + 1,
    "writing": lambda here: here.zero_(),
}


@pytest.mark.parametrize("look", HOST_READS.values(), ids=list(HOST_READS))
def test_what_a_copy_brings_is_there_once_the_host_has_waited_for_it(look):
    with mock_cuda() as device:
        x, kept = ones(), pinned()
        for copied in (lambda: x.to("cpu", non_blocking=True), lambda: kept.copy_(x, non_blocking=True)):
            here = copied()
            late = torch.cuda.current_stream().record_event()
            early = len(device.hazards)
            look(here)
            assert len(device.hazards) == early + 1, "nobody has waited"
            assert not late.query()
            late.synchronize()
            assert late.query()
            look(here)
            assert len(device.hazards) == early + 1


def test_memory_that_a_copy_still_reads_is_not_written():
    with mock_cuda() as device:
        x, here = ones(), pinned()
        x.copy_(here, non_blocking=True)
        _ = here + 1  # reading beside a copy that reads
        assert not device.hazards
        here.fill_(2.0)
        assert len(device.hazards) == 1
        assert "may still read" in device.hazards[0]
        torch.cuda.synchronize()
        here.fill_(3.0)
        assert len(device.hazards) == 1


def test_an_event_comes_with_whatever_the_host_waits_for_behind_it():
    with mock_cuda():
        x, stream = ones(), torch.cuda.Stream()
        first = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(stream):
            stream.wait_event(first)
            x.mul_(2)
            second = stream.record_event()
        assert not any(each.query() for each in (first, second, stream))
        second.synchronize()
        assert first.query()
        assert second.query()
        assert stream.query()


def _messages(rank):
    with mock_cuda() as device:
        x = torch.full((4,), float(rank), device="cuda")
        work = dist.all_reduce(x, async_op=True)
        early = x + 1
        missing = len(device.hazards)
        work.wait()
        late = (x + 1).cpu().tolist()
        dist.all_reduce(early)
        _ = early + 1
        with pytest.raises(RuntimeError, match="Bad address"):
            dist.send(x, 1 - rank)
        net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)).to("cuda")
        ddp, seen = DistributedDataParallel(net, bucket_cap_mb=0.005), []

        def hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            seen.append(bucket.buffer().is_cuda)
            done = torch.futures.Future(devices=[bucket.buffer().device])
            dist.all_reduce(bucket.buffer())
            done.set_result(bucket.buffer())
            return done

        ddp.register_comm_hook(None, hook)
        for _ in range(3):
            ddp(torch.ones(2, 50, device="cuda")).sum().backward()
        assert net[0].weight.grad.is_cuda
        return missing, len(device.hazards), late, seen


def _as_under_nccl(rank):
    with mock_cuda(nccl=True):
        with pytest.raises(RuntimeError, match="No backend type"):
            dist.all_reduce(torch.ones(2))
        x = torch.full((2,), float(rank), device="cuda")
        if rank == 0:
            dist.send(x + 5, 1)
            return 5.0
        dist.recv(x, 0)
        return float(x[0])


def _both(rank):
    return _messages(rank), _as_under_nccl(rank)


def test_messages_carry_values_and_their_arrival_must_be_waited_for():
    for (missing, in_all, values, seen), received in start_ranks(_both, world_size=2):
        assert (missing, in_all) == (1, 1)
        assert values == [2.0] * 4
        assert len(seen) > 4
        assert all(seen)
        assert received == 5.0
