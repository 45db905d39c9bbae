"""Parameters for tests of averages by differences, and what compressions make of differences, by hand."""

import hashlib
import math

import torch

from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.rounding import round_stochastically
from lightning_comm.transport.compression.top_k import TopK

SHAPES = {
    "a.weight": (7, 5),
    "a.bias": (7,),
    "empty": (0,),
    "b.weight": (4, 3, 3, 3),
    "one": (1,),
    "c.weight": (13, 11),
}


def named(tensors: "list[torch.Tensor] | tuple[torch.Tensor, ...]") -> dict[str, torch.Tensor]:
    """Names for tensors that have none, in their order."""
    return {str(k): tensor for k, tensor in enumerate(tensors)}


def drawn(name: str, *where: object) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(repr((name, where)).encode()).digest()[:7], "big")
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def start() -> dict[str, torch.Tensor]:
    return {name: drawn(name) for name in SHAPES}


def moved(weights: dict[str, torch.Tensor], rank: int, step: int) -> None:
    """What a rank's optimizer does in a round."""
    for name, tensor in weights.items():
        tensor.add_(drawn(name, rank, step), alpha=0.1)


def in_full(rows, name, step):
    scaled = [row * (1 / len(rows)) for row in rows]
    return rows, sum(scaled[1:], scaled[0])


def by_cast(rows, name, step):
    wires = [(row * (1 / len(rows))).bfloat16() for row in rows]
    return [wire.float() * len(rows) for wire in wires], sum(wires[1:], wires[0]).float()


def by_top_k(rows, name, step):
    sent = []
    for row in rows:
        kept = sorted(range(len(row)), key=lambda i: -abs(float(row[i])))[: max(1, math.ceil(0.1 * len(row)))]
        sent.append(torch.tensor([float(row[i]) if i in kept else 0.0 for i in range(len(row))]))
    scaled = [row * (1 / len(rows)) for row in sent]
    return sent, sum(scaled[1:], scaled[0])


def by_int8(rows, name, step):
    def draw(who, of):
        digest = hashlib.sha256(f"0/{step}/{who}/{of}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    scales = torch.stack([row.abs().max() / 127 for row in rows])
    codes = [round_stochastically(row, scales[r], 127, draw(r, name)) for r, row in enumerate(rows)]
    total = torch.zeros_like(rows[0])
    for code, scale in zip(codes, scales / len(rows), strict=True):
        total += code * scale
    mean_scale = (scales / len(rows)).sum()
    again = round_stochastically(total, mean_scale, 127, draw("all", f"{name}/mean"))
    return [code * scale for code, scale in zip(codes, scales, strict=True)], again * mean_scale


BY_HAND = {Full: in_full, Cast: by_cast, Int8: by_int8, TopK: by_top_k}


def in_memory_order(name, tensor):
    return tensor.permute(0, 2, 3, 1).reshape(-1) if name == "b.weight" else tensor.reshape(-1)
