"""A device with a clock: work is queued at once and done later, as on a GPU, in seconds that a test decides on."""

from types import SimpleNamespace
from unittest import mock

import torch


class DeviceTime:
    """The host's time and one stream's, and the events between them.

    Args:
        monkeypatch: pytest's.
        modules: Those whose `time.monotonic` is to be the host's time here.
        drift: Seconds that the device's clock gains in a second.

    """

    def __init__(self, monkeypatch, *modules, drift=0.0):
        self.now_s, self.free_s, self.waits, self.drift = 0.0, 0.0, 0, drift
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self, enable_timing))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: mock.sentinel.stream)

    def host(self, seconds):
        """The host is busy, or somebody waits in it."""
        self.now_s += seconds

    def queue(self, seconds):
        """The device is given work, which begins when it has done what it was given before."""
        self.free_s = max(self.free_s, self.now_s) + seconds


class Event:
    """An event on the one stream."""

    def __init__(self, device, enable_timing):
        assert enable_timing
        self.device, self.at_s = device, None

    def record(self, stream):
        assert stream is mock.sentinel.stream
        self.at_s = max(self.device.now_s, self.device.free_s)

    def query(self):
        return self.at_s <= self.device.now_s

    def synchronize(self):
        self.device.waits += 1
        self.device.now_s = max(self.device.now_s, self.at_s)

    def elapsed_time(self, other):
        assert self.query(), "CUDA raises cudaErrorNotReady"
        assert other.query(), "CUDA raises cudaErrorNotReady"
        return 1e3 * (other.at_s - self.at_s) * (1 + self.device.drift)
