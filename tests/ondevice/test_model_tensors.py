"""Which tensors of a model are averaged, by purpose; what is known of frozen ones; references. No process group."""

import pytest
import torch
from torch import nn

from lightning_comm.ondevice.frozen_parameters import FrozenParameters
from lightning_comm.ondevice.model_tensors import ModelTensors
from lightning_comm.ondevice.references import References


class Odd(nn.Module):
    """Tied, viewed, frozen, complex and whole-number tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))
        self.tied = self.weight
        self.transposed = nn.Parameter(self.weight.data.t())
        self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.teacher = nn.Parameter(torch.ones(5), requires_grad=False)
        self.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.tensor(3))


def names_of(groups):
    return {purpose: sorted(group) for purpose, group in groups.items()}


@pytest.mark.parametrize("average_buffers", [True, False])
def test_tensors_are_given_by_purpose_views_once_and_whole_numbers_apart(average_buffers):
    copy = nn.BatchNorm1d(2)
    tensors = ModelTensors(Odd(), average_buffers=average_buffers, weight_averages=lambda: {"0": copy})
    tensors.begin_round()
    averages = [f"0.{name}" for name in ("bias", "running_mean", "running_var", "weight")]
    expected = {"parameters": ["wave", "weight"], "buffers": ["mean"], "weight_averages": averages}
    assert names_of(tensors.averaged()) == {k: v for k, v in expected.items() if k != "buffers" or average_buffers}
    assert [buffer.item() for buffer in tensors.buffers_without_mean()] == ([3] if average_buffers else [])
    assert tensors.sent_as_differences() == {}
    state = {"parameters:wave", "parameters:weight", "buffer:mean", "buffer:seen"}
    averaged = {f"weight_averages:{name}" for name in averages}
    assert set(tensors.state()) == state | averaged
    assert set(tensors.changed_by_average()) == {n for n in state if average_buffers or "buffer" not in n} | averaged


@pytest.mark.parametrize(("differences", "expected"), [("all", {"wave", "weight"}), ("real", {"weight"})])
def test_differences_are_sent_of_what_has_a_reference_and_shares_its_memory_with_nothing(differences, expected):
    module = Odd()
    tensors = ModelTensors(module, differences=differences)
    references = tensors.references
    tensors.begin_round()
    references.restart(tensors.with_reference(tensors.parameters()))
    assert references.names == set(tensors.sent_as_differences()) == expected
    assert [row.dtype for row in references.of(["weight"])] == [torch.float32]
    module.weight.requires_grad_(False)  # ranks may still differ in it, so it is averaged, in full
    tensors.begin_round()
    assert "weight" in tensors.parameters()
    assert "weight" not in tensors.sent_as_differences()
    references.drop({"weight"})
    assert "weight" not in tensors.parameters()


def test_frozen_parameters_are_seen_to_change_by_their_bits_and_noted_again():
    module = Odd()
    frozen = FrozenParameters(module)
    frozen.begin_round({"weight", "transposed", "wave"})
    assert {name: bool(flag) for name, flag in frozen.changed_here().items()} == {"teacher": False, "counts": False}
    module.teacher.data[1] += 1  # behind torch's back
    module.counts.data[0] = 7
    assert all(frozen.changed_here().values())
    frozen.changed = {"teacher", "counts"}
    assert list(frozen.without_mean()) == ["counts"]
    frozen.note()
    assert not any(frozen.changed_here().values())
    assert frozen.changed == set()


def test_what_has_changed_on_any_rank_is_averaged_once():
    tensors = ModelTensors(Odd())
    tensors.begin_round()
    tensors.frozen.changed = {"teacher", "counts"}
    assert sorted(tensors.parameters()) == ["teacher", "wave", "weight"]
    assert "parameters:counts" in tensors.changed_by_average()
    tensors.frozen.note()
    assert sorted(tensors.parameters()) == ["wave", "weight"]


def test_a_state_is_restored_bit_for_bit_and_that_of_another_model_refused():
    module, other = Odd(), Odd()
    tensors = ModelTensors(module)
    tensors.begin_round()
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(1))
        module.mean += 2
        module.seen += 4
    restored = ModelTensors(other)
    restored.load_state({name: tensor.detach().clone() for name, tensor in tensors.state().items()})
    assert torch.equal(other.weight, module.weight)
    assert (other.mean.tolist(), other.seen.item()) == ([2.0] * 4, 7)
    with pytest.raises(ValueError, match=r"weights that the model does not have: \['parameters:nobody'\]"):
        restored.load_state({"parameters:nobody": torch.zeros(1)})


def test_references_follow_their_parameters_to_another_width():
    references, wide = References(), {"a": torch.ones(3, dtype=torch.float64)}
    references.restart({"a": torch.full((3,), 0.5)})
    (row,) = references.rows
    again = References()
    again.load_state_dict(references.state_dict(), wide)
    assert [each.dtype for each in again.rows] == [torch.float64]
    again.rows[0].add_(1)
    assert row.tolist() == [0.5] * 3, "the rows of another run were moved"
    again.add({"b": torch.zeros(2)})
    assert again.names == {"a", "b"}
