"""State that was read from a file goes where the parameters are, and takes their width."""

import io
from functools import cache

import pytest
import torch
from support.mock_cuda import CUDA, mock_cuda
from support.processes import one_launch, start_ranks
from torch import nn
from transport.compression.test_compressions import LAYOUT, SHAPES, codec_of, entries

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.base import run_alone
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.names import compression_of
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder

WORDS = ["bf16", "int8", "topk", "ternary", "no_sync"]
CHAINS = [["sparse_mask", "topk"], ["sparse_mask", "bf16"], "sparse_mask"]
COMPRESSIONS = [*(compression_of(each, "the test") for each in [*WORDS, *CHAINS]), PowerSGD(1)]
CASES = [(each, True) for each in COMPRESSIONS] + [(PowerSGD(1), False)]  # the last as averages of weights have it
SAME, NARROWER = (torch.float32, torch.float32), (torch.float32, torch.bfloat16)
FROM_DOUBLE = (torch.float64, torch.float32)


def model(dtype, device):
    """A parameter for each shape, by its name with underscores."""
    named = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value) for name, value in named.items()}


def masked(codec, parameters):
    """Install the masks that a codec has, or its first ones, as whoever prunes does."""
    if not isinstance(codec, SparseMaskCodec):
        return codec
    drawn = {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(len(name))) < 0.4
        for name, shape in SHAPES.items()
        if len(shape) > 1
    }
    codec.install({name: mask.to(CUDA) for name, mask in (codec.masks or drawn).items()}, parameters.items())
    return codec


def step(codec, rank, number, dtype, device):
    values = entries(rank, number).to(dtype).to(device)
    codec.begin_step()
    run_alone(codec.mean(values, LAYOUT))
    codec.end_step()
    return values


def through_a_file(state):
    """What a resumed run is given: Lightning maps storages to the processor."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False)


def tensors_of(state, prefix=""):
    """All tensors in nested dictionaries, by their paths."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    parts = state.items() if isinstance(state, dict) else ()
    return {path: tensor for key, value in parts for path, tensor in tensors_of(value, f"{prefix}/{key}").items()}


def _resumed(rank, saved_in, goes_on_in):
    """For each compression: the mean of a second step, resumed and not, and where what is kept then is."""
    found = []
    with mock_cuda():
        for compression, feedback in CASES:
            codec = masked(codec_of(compression, feedback=feedback)[0], model(saved_in, CUDA))
            step(codec, rank, 0, saved_in, CUDA)
            state = through_a_file(codec.state_dict())
            unbroken = step(codec, rank, 1, saved_in, CUDA)
            fresh = codec_of(compression, feedback=feedback)[0]
            fresh.load_state_dict(state)
            masked(fresh, model(goes_on_in, CUDA))
            resumed = step(fresh, rank, 1, goes_on_in, CUDA)
            kept = {
                path: (str(tensor.device), tensor.dtype)
                for path, tensor in tensors_of(fresh.state_dict()).items()
                if tensor.is_floating_point()
            }
            found.append((repr(compression), resumed.cpu().double().numpy(), unbroken.cpu().double().numpy(), kept))
    return found


@cache
def all_resumed(exhaustive):
    """In one launch, in which what a process does for the first time is done once."""
    return one_launch(_resumed, [SAME, NARROWER, *([FROM_DOUBLE] if exhaustive else [])], world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_in", "goes_on_in"),
    [SAME, NARROWER, pytest.param(*FROM_DOUBLE, marks=pytest.mark.exhaustive)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_what_a_codec_kept_is_used_where_the_gradients_are_and_in_their_width(request, saved_in, goes_on_in):
    (found, _) = all_resumed(request.config.getoption("exhaustive"))[saved_in, goes_on_in]
    assert sum(bool(kept) for *_, kept in found) == 5, "not all that keep something have kept it"
    for compression, resumed, unbroken, kept in found:
        for path, (device, dtype) in kept.items():
            wide = torch.float64 if goes_on_in == torch.float64 else torch.float32
            assert device == "cuda:0", (compression, path)
            assert dtype == (wide if "/bases/" in path else goes_on_in), (compression, path)
        if saved_in == goes_on_in:
            assert (resumed == unbroken).all(), compression
        elif "Int8" not in compression and "Ternary" not in compression:  # a step of their codes
            narrow = goes_on_in == torch.bfloat16 or "bf16" in compression
            close = {"rtol": 0.05, "atol": 0.05} if narrow else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(torch.from_numpy(resumed), torch.from_numpy(unbroken), **close, msg=compression)


def _averaged(rank, saved_in, goes_on_in):
    found = []
    with mock_cuda():
        for compression in (PowerSGD(1), Cast("bf16")):
            weights = {name: torch.ones(shape, dtype=saved_in, device=CUDA) for name, shape in SHAPES.items()}
            averager = CompressedAverage(Recorder(CommLedger()), compression, 2**20)
            averager.references.restart(weights)
            for tensor in weights.values():
                tensor.add_(0.1 * (rank + 1))
            averager.average_(weights)
            fresh = CompressedAverage(Recorder(CommLedger()), compression, 2**20)
            weights = {name: tensor.to(goes_on_in) for name, tensor in weights.items()}
            fresh.load_state_dict(through_a_file(averager.state_dict()), weights, same=True)
            for tensor in weights.values():
                tensor.add_(0.1)
            fresh.average_(weights)
            state = tensors_of({"reference": fresh.state_dict()["reference"]})
            found.append((repr(compression), {(str(each.device), each.dtype) for each in state.values()}))
    return found


@pytest.mark.parametrize(("saved_in", "goes_on_in"), [FROM_DOUBLE], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_references_are_where_the_parameters_are_and_in_the_width_of_their_sums(saved_in, goes_on_in):
    wide = torch.float64 if goes_on_in == torch.float64 else torch.float32
    for found in start_ranks(_averaged, saved_in, goes_on_in, world_size=2):
        for compression, kept in found:
            assert kept == {("cuda:0", wide)}, compression


def _hook_state(rank):
    """The state of a hook, saved from one and restored by another, whose loss scale has become another."""
    with mock_cuda():
        parameters = model(torch.float32, CUDA)
        sync, other = (
            GradientSync(
                codec_of(PowerSGD(1))[0], Recorder(CommLedger()), parameters.items(), lambda scale=scale: scale
            )
            for scale in (8.0, 4.0)
        )
        for number in range(2):
            step(sync.codec, rank, number, torch.float32, CUDA)
        sync._begin_step()
        saved = through_a_file(sync.state_dict())
        other.load_state_dict(saved)
        before = [row.clone() for row in saved["codec"]["residuals"].values()]
        other._begin_step()
        after = [row.clone() for row in other.state_dict()["codec"]["residuals"].values()]
        step(other.codec, rank, 2, torch.float32, CUDA)
        devices = {str(tensor.device) for tensor in tensors_of(other.state_dict()).values()}
        return devices, len(before), all(torch.equal(new, 0.5 * old) for new, old in zip(after, before, strict=True))


def test_residuals_of_a_file_follow_the_loss_scale_before_their_first_step():
    for answer in start_ranks(_hook_state, world_size=2):
        assert answer == ({"cuda:0"}, len(SHAPES), True)


def _drawn(rank):
    """The directions that PowerSGD starts from, on a device whose generator gives other numbers than the host's."""
    with mock_cuda():
        values = entries(rank).to(CUDA)
        there, here = (codec_of(PowerSGD(2), feedback=False)[0] for _ in range(2))
        return [
            {slot.name: codec._start(slot, row).cpu().numpy() for slot in LAYOUT.slots if codec._directions(slot)}
            for codec, row in ((there, values), (here, entries(rank)))
        ]


def test_the_first_directions_are_the_same_on_every_kind_of_device():
    for there, here in start_ranks(_drawn, world_size=2):
        assert there.keys() == here.keys()
        assert len(there) == 3
        assert all((there[name] == here[name]).all() for name in there)


def _masks(rank):
    with mock_cuda() as device:
        codec = SparseMask().codec(codec_of(PowerSGD(1))[0].context)
        kept = {name: torch.arange(torch.Size(shape).numel()).view(shape) % 5 < 2 for name, shape in SHAPES.items()}
        masks = {name: mask.to(CUDA) for name, mask in kept.items() if mask.dim() > 1}
        with device.counting() as reading:
            codec.install(masks, model(torch.float32, CUDA).items())
        with device.counting() as asking:
            counts = [(slot.name, slot.numel) for slot in codec._kept_in(LAYOUT).slots]
        by_hand = [(name, int(mask.sum()) if mask.dim() > 1 else mask.numel()) for name, mask in kept.items()]
        return [wait.kind for wait in reading], len(asking), counts == by_hand


def test_entries_of_masks_are_counted_on_their_device_in_one_reading_for_all():
    assert start_ranks(_masks, world_size=1) == [(["tolist"], 0, True)]
