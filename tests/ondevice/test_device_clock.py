"""What a device did when, on the host's clock: known without a wait, and never outside of what is sure."""

import pytest
import torch
from support.device_time import DeviceTime

from lightning_comm.ondevice import device_clock
from lightning_comm.ondevice.device_clock import DeviceClock


@pytest.fixture
def device(monkeypatch):
    return DeviceTime(monkeypatch, device_clock)


def test_a_moment_is_when_the_device_comes_to_it_and_not_when_it_is_asked_for(device):
    clock = DeviceClock(torch.device("cuda"))
    clock.wait_for(start := clock.mark())
    device.queue(2.0)
    after = clock.mark()
    device.host(0.5)
    assert (clock.has_passed(start), clock.has_passed(after)) == (True, False)
    device.host(2.0)
    assert clock.has_passed(after)
    assert (clock.at_s(start), clock.at_s(after), clock.seconds(start, after)) == (0.0, 2.0, 2.0)
    assert device.waits == 0


def test_the_time_until_a_moment_that_is_to_come_is_waited_for(device):
    clock = DeviceClock(torch.device("cuda"))
    first = clock.mark()
    device.queue(3.0)
    second = clock.mark()
    device.host(1.0)
    assert (clock.seconds(first, second), device.now_s, device.waits) == (3.0, 3.0, 1)


def test_waiting_for_a_moment_makes_it_known(device):
    clock = DeviceClock(torch.device("cuda"))
    device.queue(3.0)
    moment = clock.mark()
    clock.wait_for(moment)
    clock.wait_for(moment)
    assert (clock.at_s(moment), device.now_s, device.waits) == (3.0, 3.0, 1)


@pytest.mark.parametrize("drift", [0.01, -0.01])
def test_a_clock_that_drifts_is_held_within_what_the_host_has_seen(monkeypatch, drift):
    device = DeviceTime(monkeypatch, device_clock, drift=drift)
    clock = DeviceClock(torch.device("cuda"))
    clock.wait_for(start := clock.mark())
    assert clock.at_s(start) == 0.0
    for _ in range(1000):
        asked_s = device.now_s
        device.queue(0.1)
        moment = clock.mark()
        device.host(0.11)
        assert clock.has_passed(moment)
        assert asked_s <= clock.at_s(moment) <= device.now_s
    assert device.now_s - 0.11 <= clock.at_s(moment) <= device.now_s, "after 110 s, of which 1 % is more than a second"


def test_on_the_processor_a_moment_has_passed_when_it_is_marked():
    clock = DeviceClock(torch.device("cpu"))
    first, second = clock.mark(), clock.mark()
    clock.wait_for(second)
    assert clock.has_passed(first)
    assert clock.at_s(second) - clock.at_s(first) == clock.seconds(first, second) >= 0
