"""What part 6 of the check for a GPU times and judges: packing and unpacking, and nothing beside."""

from unittest import mock

import pytest
import torch
from support.mock_cuda import mock_cuda
from support.on_device import MOCKED

from benchmarks.gpu_check import packing as gpu_check_packing
from benchmarks.gpu_check.packing import device_seconds_of, packing_of, waits_of
from benchmarks.gpu_check.report import Check, findings


def parameters():
    draw = torch.Generator().manual_seed(0)
    shapes = [(7,), (5, 9), (), (3, 4, 2), (60,)]
    return [
        torch.randn(shape, generator=draw).to(dtype) for dtype in (torch.float32, torch.bfloat16) for shape in shapes
    ]


@pytest.mark.parametrize(("ranks", "divisor"), [(1, 1), (2, 2)])
def test_what_is_timed_writes_each_number_once_divided_by_the_ranks(ranks, divisor):
    tensors, wanted = parameters(), [each.float().div(divisor).to(each.dtype) for each in parameters()]
    packing_of(tensors, 64, ranks)()  # 16 entries a bucket: more buckets than are in use at a time
    assert all(torch.equal(each, right) for each, right in zip(tensors, wanted, strict=True))


@pytest.mark.parametrize(
    ("host_is_late", "ahead", "busy"), [(False, 5, [20.0] * 6), (True, 0, [20.0 * 2**k for k in range(6)])]
)
def test_the_device_is_busy_until_the_host_has_enqueued_all(host_is_late, ahead, busy, monkeypatch):
    spun = []
    monkeypatch.setattr(gpu_check_packing, "spin", lambda device, milliseconds: spun.append(milliseconds))
    with mock_cuda(), mock.patch.object(torch.cuda.Event, "query", return_value=host_is_late):
        assert device_seconds_of(lambda: None, "cuda") == (1e-3, ahead)
    assert spun == busy


@pytest.mark.parametrize(
    ("name", "kind", "size", "times", "verdict"),
    [
        ("vit_base_patch16_224", "fp32", 25, 1.4, "ok"),
        ("vit_base_patch16_224", "fp32", 25, 1.6, "fails"),
        ("vit_base_patch16_224", "fp32", 1, 1.6, "info"),
        ("vit_base_patch16_224", "bf16", 25, 1.6, "info"),
        ("resnet50", "fp32", 25, 1.6, "info"),
    ],
)
def test_judged_is_packing_alone_of_the_large_model_and_not_with_a_division(tmp_path, name, kind, size, times, verdict):
    each = {"seconds": times * (16 if kind == "fp32" else 12) * 1e-6, "ahead": 5, "launches": 28}
    found = {"entries": 10**6, "rate": 1e12, f"{size}, 1": each, f"{size}, 2": each}
    gpu_check_packing._report_packing(Check(6, "cuda", tmp_path), name, kind, found)
    plain, divided = findings(tmp_path)
    assert plain["measured"]["times the floor"] == times
    assert plain["measured"]["host ahead"] == "5 of 5"
    assert plain["verdict"] == verdict
    assert divided["verdict"] == "info"
    assert ("1.5 times" in divided["expected"]) == (kind == "fp32")


def test_waits_are_counted_on_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv(MOCKED, "1")
    with mock_cuda():
        row = torch.ones(3, device="cuda")
        found = waits_of(lambda: float(row.sum()), "cuda")
    assert [each.rsplit(" ", 1)[1] for each in found] == ["_local_scalar_dense"]
    assert waits_of(lambda: None, "cpu") is None
