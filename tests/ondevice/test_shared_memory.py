"""Which tensors share entries, against the addresses of all entries, listed one by one."""

import itertools

import torch
from torch import Tensor, nn

from lightning_comm.ondevice.shared_memory import shared


def bytes_of(tensor: Tensor) -> set[int]:
    steps = [
        range(0, size * stride, stride) if stride else [0]
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    begin, width = tensor.data_ptr(), tensor.element_size()
    entries = (begin + sum(place) * width for place in itertools.product(*steps)) if tensor.numel() else ()
    return {entry + byte for entry in entries for byte in range(width)}


def groups_by_listing(named: list[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """Merge groups for as long as two have a byte in common."""
    groups = [([name], bytes_of(tensor)) for name, tensor in named]
    while pair := next(((a, b) for a, b in itertools.combinations(groups, 2) if a[1] & b[1]), None):
        groups = [group for group in groups if group is not pair[0] and group is not pair[1]]
        groups.append((pair[0][0] + pair[1][0], pair[0][1] | pair[1][1]))
    order = [name for name, _ in named]
    found = [tuple(sorted(names, key=order.index)) for names, _ in groups if len(names) > 1]
    return sorted(found, key=lambda names: order.index(names[0]))


def test_groups_are_those_that_a_list_of_all_addresses_gives() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    sizes = set()
    for _ in range(300):
        storage = torch.zeros(64)
        named = []
        for number in range(5):
            row: Tensor = storage.view(torch.uint8) if draw(4) == 0 else storage
            row = torch.view_as_complex(storage.view(-1, 2)) if draw(6) == 0 else row
            shape, strides = [draw(4) for _ in range(2)], [draw(8) for _ in range(2)]
            last = sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))
            offset = draw(row.numel() - last) if last < row.numel() else 0
            if last < row.numel():
                named.append((f"tensor{number}", row.as_strided(shape, strides, offset)))
        sizes.add(len(groups_by_listing(named)))
        assert shared(named) == groups_by_listing(named)
    assert sizes >= {0, 1, 2}, "the draws had cases of all kinds"


def test_views_and_overlapping_slices_share_and_neighbours_do_not() -> None:
    matrix, other = torch.zeros(6, 8), torch.zeros(3)
    assert shared([("a", matrix), ("other", other), ("transposed", matrix.t())]) == [("a", "transposed")]
    assert shared([("left", matrix[:, :5]), ("right", matrix[:, 4:])]) == [("left", "right")]
    assert shared([("left", matrix[:, :4]), ("right", matrix[:, 4:])]) == []
    assert shared([("even", matrix[:, ::2]), ("odd", matrix[:, 1::2])]) == []
    assert shared([("top", matrix[:3]), ("middle", matrix[2:5]), ("end", matrix[4:])]) == [("top", "middle", "end")]
    assert shared([("row", matrix[0]), ("expanded", matrix[0, :1].expand(9))]) == [("row", "expanded")]
    assert shared([("real", matrix), ("complex", torch.view_as_complex(matrix.view(6, 4, 2)))]) == [("real", "complex")]
    array = other.numpy()
    assert shared([("a", torch.from_numpy(array)), ("b", torch.from_numpy(array))]) == [("a", "b")], "two storages"


def test_flattened_weights_of_an_rnn_lie_in_one_storage_and_share_nothing() -> None:
    flat = torch.zeros(100)
    rnn = nn.LSTM(2, 3)
    begin = 0
    for parameter in rnn.parameters():  # as cuDNN lays them out
        parameter.data = flat[begin : begin + parameter.numel()].view(parameter.shape)
        begin += parameter.numel()
    assert shared(rnn.named_parameters()) == []


def test_tensors_without_memory_share_nothing() -> None:
    empty, meta = torch.zeros(0, 3), torch.zeros(3, device="meta")
    lazy = nn.LazyLinear(3)
    named = [("empty", empty), ("empty2", empty), ("meta", meta), ("meta2", meta), *lazy.named_parameters()]
    assert shared(named) == []
