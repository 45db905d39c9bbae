"""What an emulated device refuses, by name, value and a way out."""

import pytest
import torch
from torch import nn

from lightning_comm.lab.device.pacer import DevicePacer, emulated_speed

WIDTH = 16


def stack():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))


@pytest.mark.parametrize("text", ["fast", "", "0", "-1", "nan", "inf"])
def test_a_speed_that_is_no_number_is_named_with_its_variable(text, monkeypatch):
    monkeypatch.setenv("LIGHTNING_COMM_SPEED", text)
    with pytest.raises(ValueError, match="LIGHTNING_COMM_SPEED") as caught:
        emulated_speed()
    assert [word for word in (repr(text), "> 0", "unset it") if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
    [
        ({"step_s": 0}, ["step_s", "got 0", "> 0", "0.25"]),
        ({"step_s": float("nan")}, ["step_s", "got nan", "finite"]),
        ({"step_s": True}, ["step_s", "got True", "seconds"]),
        ({"batch_size": 0}, ["batch_size", "got 0", ">= 1", "of one device"]),
        ({"batch_size": 1.5}, ["batch_size", "got 1.5", "whole number"]),
        ({"forward_share": 0}, ["forward_share", "got 0", "A third"]),
        ({"forward_share": 1.0}, ["forward_share", "got 1.0", "< 1"]),
        ({"speed": 0.0}, ["speed", "got 0.0", "> 0", "LIGHTNING_COMM_SPEED"]),
        ({"speed": "1"}, ["speed", "got '1'", "number"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, must_say):
    with pytest.raises(ValueError, match="DevicePacer: ") as caught:
        DevicePacer(stack(), **{"step_s": 0.1, "batch_size": 8, **kwargs})
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_a_negative_number_of_samples_is_refused():
    pacer = DevicePacer(stack(), step_s=0.1, batch_size=8, speed=1.0)
    pacer.attach()
    with pytest.raises(ValueError, match="`samples` must be >= 0; got -1"):
        pacer.begin_step(-1)


def test_a_model_on_an_accelerator_is_refused():
    with pytest.raises(ValueError, match=r"'0.weight' on 'meta'.*accelerator='cpu'"):
        DevicePacer(stack().to("meta"), step_s=0.1, batch_size=1, speed=1.0).attach()


def test_a_compiled_part_is_refused():
    module = nn.Sequential(torch.compile(stack(), backend="eager"))
    with pytest.raises(ValueError, match=r"compiled '0'.*Leave torch.compile out"):
        DevicePacer(module, step_s=0.1, batch_size=1, speed=1.0).attach()
