"""Every change of a bit is noticed, in tensors of every kind, and nothing is where nothing has changed."""

import pytest
import torch
from torch import Tensor, nn

from lightning_comm.ondevice.content import Contents, content


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    memory = draw(4001)
    return {
        "large": draw(64, 97),
        "odd": draw(3, 5),
        "one entry": draw(1),
        "no dimension": draw(),
        "no entries": draw(0, 3),
        "float64": draw(70, 9, dtype=torch.float64),
        "bf16": draw(33, 33).bfloat16(),
        "complex": draw(20, 40, dtype=torch.complex64),
        "transposed": draw(40, 60).t(),
        "channels last": draw(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "with gaps": draw(30, 60)[:, ::2],
        "not at a word": memory[1:],
        "integers": torch.arange(3000),
        "bools": torch.arange(900) % 3 == 0,
    }


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(content(one), content(other))


@pytest.mark.parametrize("name", list(tensors()))
def test_a_single_entry_that_changes_is_noticed_and_put_back_it_is_not(name):
    tensor = tensors()[name]
    contents = Contents([{name: tensor}])
    contents.note(0)
    for index in (0, tensor.numel() // 2, tensor.numel() - 1) if tensor.numel() else ():
        place = tuple(int(each) for each in torch.unravel_index(torch.tensor(index), tensor.shape))
        before = tensor[place].clone()
        tensor.data[place] = ~before if tensor.dtype == torch.bool else before + 1  # moves no counter of changes
        fresh = Contents([{name: tensor}])
        fresh.note(0)
        assert not same(tensor, tensors()[name])
        tensor.data[place] = before
        fresh.compare(0)
        assert fresh.changed() == [name]
    contents.compare(0)
    assert contents.changed() == []


def test_entries_that_change_places_or_signs_are_noticed_though_their_sum_stays():
    tensor = torch.randn(251, 251, generator=torch.Generator().manual_seed(1))
    tensor -= tensor.mean()
    assert not same(tensor, tensor.roll(1, 0))
    assert not same(tensor, tensor[torch.randperm(251)])
    assert not same(tensor, tensor.flip(1))
    assert not same(tensor, -tensor)
    assert not same(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])), "bits, not values"
    nothing = torch.full((3,), torch.nan)
    assert same(nothing, nothing.clone())


def test_only_the_tensors_of_a_group_that_changed_are_named():
    first, second, square = nn.Linear(3, 30), nn.Linear(30, 3), nn.Linear(40, 40)
    contents = Contents([dict(first.named_parameters()), dict(second.named_parameters()), {}, {"w": square.weight}])
    for group in range(4):
        contents.note(group)
        contents.compare(group)
    assert contents.changed() == []
    second.bias.data.clamp_(-1e-9, 1e-9)
    first.weight.data = first.weight.data * 2  # other memory
    square.weight.data = square.weight.data.t()  # the same memory, read in another way
    for group in range(4):
        contents.compare(group)
    assert contents.changed(wait=True) == ["weight", "bias", "w"]


def test_a_single_entry_has_a_content_whatever_its_stride():
    one = torch.tensor(3.0).expand(4)[:1]
    assert one.stride() == (0,)
    assert torch.equal(content(one), content(torch.tensor([3.0])))
    assert not torch.equal(content(one), content(torch.tensor([4.0])))
