"""The methods that `steps` compares: DDP with one hook or another, in the same plain loop.

Ours use the hook and the codecs that `CompressedDDPStrategy` uses; one of them runs under it as well, with Lightning.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from benchmarks.kit.step_times import DDP, LIMIT
from benchmarks.kit.trainer import lightning
from benchmarks.kit.training import TIMEOUT, Job, Segment, ddp, loop, wrapped
from lightning_comm import (
    Cast,
    CompressedDDPStrategy,
    Int8,
    MagnitudePruning,
    NoSync,
    PowerSGD,
    SparseMask,
    Ternary,
    TopK,
)
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.compression.sparse_mask import SparseMaskCodec
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder

_ONE_BUCKET_MB, _LARGER_MB = 1000.0, 5.0
Make = Callable[[Job, float], Segment]


def compressed(job: Job, cap_mb: float, compression: Compression) -> Segment:
    """Train under DDP with a compression of ours, and keep pruned weights at zero as the strategy does."""
    network = job.network()
    ledger = CommLedger()
    recorder = Recorder(ledger, beside_compute=True)
    codec = compression.codec(Context(recorder, "gradients"))
    model = wrapped(network, cap_mb)
    model.register_comm_hook(None, GradientSync(codec, recorder, network.named_parameters()).hook)
    pruned: list[tuple[torch.Tensor, torch.Tensor]] = []
    if isinstance(compression, SparseMask) and isinstance(codec, SparseMaskCodec):
        pruned = _prune(network, compression, codec)

    @torch.no_grad()
    def keep_at_zero() -> None:
        for weight, mask in pruned:
            weight.masked_fill_(mask, 0)

    return loop(job, network, model, after_step=keep_at_zero, ledger=ledger)


@torch.no_grad()
def _prune(
    network: nn.Module, compression: SparseMask, codec: SparseMaskCodec
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Install masks, which are the same on all hosts since their weights are."""
    masks = compression.pruning.masks(network)
    parameters = dict(network.named_parameters())
    codec.install(masks, parameters.items())
    pruned = [(parameters[name], ~mask) for name, mask in masks.items()]
    for weight, mask in pruned:
        weight.masked_fill_(mask, 0)
    return pruned


def torch_power_sgd(job: Job, cap_mb: float) -> Segment:
    """Train with torch's PowerSGD hook, from the third step on, in one bucket: with more of them it aborts on gloo."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    return ddp(job, _ONE_BUCKET_MB, powerSGD_hook.powerSGD_hook, state)


def pactrain_strategy(job: Job, cap_mb: float) -> Segment:
    """Train with a mask and bf16 under our strategy."""

    def strategy() -> CompressedDDPStrategy:
        return CompressedDDPStrategy(_masked(Cast("bf16")), bucket_cap_mb=cap_mb, timeout=TIMEOUT)

    return lightning(job, strategy, warmup=3)


def _masked(then: Compression | None = None) -> SparseMask:
    return SparseMask(MagnitudePruning(sparsity=0.8), then=then)


def _ours(compression: Compression, other_cap_mb: float | None = None) -> Make:
    return lambda job, cap_mb: compressed(job, other_cap_mb or cap_mb, compression)


METHODS: dict[str, tuple[str, Make]] = {
    LIMIT: ("no communication (`NoSync`)", _ours(NoSync())),
    DDP: ("DDP, best bucket", ddp),
    "torch_bf16": ("torch `bf16_compress_hook`", lambda job, cap: ddp(job, cap, default_hooks.bf16_compress_hook)),
    "torch_powersgd": ("torch `powerSGD_hook`, rank 2, one bucket", torch_power_sgd),
    "bf16": ("bf16", _ours(Cast("bf16"))),
    "fp16": ("fp16", _ours(Cast("fp16"))),
    "int8": ("int8", _ours(Int8())),
    "powersgd": ("PowerSGD, rank 2", _ours(PowerSGD(2))),
    "powersgd_one": ("PowerSGD, rank 2, one bucket", _ours(PowerSGD(2), _ONE_BUCKET_MB)),
    "topk": ("top-k 1 %", _ours(TopK(0.01))),
    "mask": ("mask 80 %", _ours(_masked())),
    "pactrain": ("mask 80 %, bf16 (`pactrain`)", _ours(_masked(Cast("bf16")))),
    "mask_ternary": ("mask 80 %, ternary", _ours(_masked(Ternary()))),
    "pactrain_larger": (f"mask 80 %, bf16, buckets of {_LARGER_MB:g} MB", _ours(_masked(Cast("bf16")), _LARGER_MB)),
    "pactrain_lightning": ("`pactrain` as a strategy, Lightning", pactrain_strategy),
}
