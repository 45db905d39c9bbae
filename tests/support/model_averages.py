"""Averages of a model for tests without a run: nobody fails, and nobody is told."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.device_clock import DeviceClock
from lightning_comm.ondevice.flat import Drift
from lightning_comm.ondevice.model_tensors import ModelTensors
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.departed_average import DepartedAverage
from lightning_comm.transport.members import Members
from lightning_comm.transport.model_average import ModelAverage
from lightning_comm.transport.overlapped_average import EndedRound, OverlappedAverage
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.temporary_average import TemporaryAverage

NO_ROUND = EndedRound(0, 1, 0.1, 0.0)


class NobodyFails:
    """Hears of no failure."""

    def first_error_shown(self) -> AbstractContextManager[None]:
        return nullcontext()

    def poll_failures(self) -> None:
        """Nothing is heard."""


def overlapped_average(parameters: Any, overlap_steps: int = 1, said: list[str] | None = None) -> OverlappedAverage:
    """One whose landings are noted in its `landings`."""
    tensors = parameters if callable(parameters) else lambda: parameters
    landings: list[Any] = []
    overlapped = OverlappedAverage(
        tensors,
        overlap_steps,
        NobodyFails(),
        DeviceClock(torch.device("cpu")),
        lambda ended, drift: landings.append((ended, drift)),
        ([] if said is None else said).append,
    )
    overlapped.landings = landings
    return overlapped


class Model:
    """The averages of one rank's model, as a run holds them."""

    def __init__(
        self,
        module: nn.Module,
        averaging: Averaging | None = None,
        buffers: Any = "average",
        weight_averages: Any = dict,
        background: Any = None,
        ledger: CommLedger | None = None,
    ) -> None:
        self.ledger = CommLedger() if ledger is None else ledger
        self.recorder = Recorder(self.ledger, Members(background=background))
        averaging = averaging or Averaging()
        self.tensors = ModelTensors(
            module,
            average_buffers=buffers == "average",
            weight_averages=weight_averages,
            differences=averaging.difference_scope,
        )
        self.average = ModelAverage(self.tensors, self.recorder, averaging)
        self.overlapped = overlapped_average(self.tensors.all_parameters)
        self.temporary = TemporaryAverage(self.average, self.overlapped)

    def depart(self, weight: float | None = None, moderate: Any = frozenset()) -> None:
        def note() -> DepartedAverage:
            return self.average.depart(weight, moderate)

        self.overlapped.depart(note, NO_ROUND)


class Background:
    """Compressed averages of parameters that travel in a thread, and blocking ones with the same references."""

    def __init__(self, recorder: Recorder, compression: Compression, bucket_bytes: int) -> None:
        self.average = CompressedAverage(recorder, compression, bucket_bytes)
        self.references = self.average.references
        self.average_ = self.average.average_
        self._weights: Mapping[str, torch.Tensor] = {}
        self.overlapped = overlapped_average(lambda: self._weights)
        self.correct_ = self.overlapped.correct_

    @property
    def in_flight(self) -> bool:
        return self.overlapped.state_dict() is not None

    def depart(self, weights: Mapping[str, torch.Tensor], weight: float | None = None, moderate: bool = False) -> None:
        self.overlapped.depart(lambda: self.average.depart(weights, weight, moderate=moderate), NO_ROUND)

    def land_(self, weights: Mapping[str, torch.Tensor]) -> Drift:
        self._weights = weights
        self.overlapped.land()
        return self.overlapped.landings[-1][1]

    def state_dict(self) -> dict[str, Any]:
        return {"in_flight": self.overlapped.departed_state(), **self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        self.average.load_state_dict(state, weights, same=True)
        self.overlapped.load_state_dict(asdict(NO_ROUND), self.average.departed_before(state))
