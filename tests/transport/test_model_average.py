"""Which tensors are averaged, what is kept aside meanwhile, and what one rank alone holds."""

import pytest
import torch
from support.model_averages import Model
from torch import nn

from lightning_comm.ondevice.optimizer.state import optimizer_tensors
from lightning_comm.transport.averaging import Averaging


def build(rank: int, buffers: str = "average", weight_averages=dict):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    model[1].running_mean.fill_(rank)
    model[1].num_batches_tracked.fill_(10 * rank)
    averages = Model(model, Averaging(bucket_mib=40 / 2**20), buffers, weight_averages)
    averages.average.begin_round()
    return model, averages, averages.ledger


def snapshot(model: nn.Module) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _average(rank, buffers):
    model, averages, _ = build(rank, buffers)
    before = snapshot(model)
    averages.average.average()
    return {k: v.numpy() for k, v in before.items()}, {k: v.numpy() for k, v in snapshot(model).items()}


@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_trained_parameters_and_float_buffers_become_means_and_the_rest_does_not(run_ranks, buffers):
    answers = run_ranks(_average, buffers, world_size=2)
    (one, after), (two, _) = answers
    for rank, (before, now) in enumerate(answers):
        for name in before:
            mean = torch.as_tensor(one[name] + two[name]) / 2
            got = torch.from_numpy(now[name])
            if name == "0.bias" or ("running" in name and buffers == "keep"):
                assert torch.equal(got, torch.from_numpy(before[name])), name
            elif "tracked" in name:
                assert int(got) == (0 if buffers == "average" else 10 * rank)
            else:
                torch.testing.assert_close(got, mean, msg=name)
    assert (after["1.running_mean"] == (0.5 if buffers == "average" else 0)).all()


def _enter_and_leave(rank):
    model, averages, ledger = build(rank)
    before = snapshot(model)
    averages.temporary.enter("evaluation")
    inside, own = snapshot(model), averages.temporary.own_state()
    averages.temporary.leave()
    changed = [name for name in before if not torch.equal(before[name], inside[name])]
    restored = all(torch.equal(before[name], tensor) for name, tensor in snapshot(model).items())
    kept = all(torch.equal(own[f"parameters:{name}"], before[name]) for name in averages.tensors.parameters())
    return changed, restored, kept, ledger.purposes


def test_what_was_put_aside_comes_back_bit_for_bit(run_ranks):
    for changed, restored, kept, purposes in run_ranks(_enter_and_leave, world_size=2):
        assert "0.weight" in changed
        assert "0.bias" not in changed
        assert restored
        assert kept
        assert purposes == ["evaluation"]


def _state_dict(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_buffer("steps", torch.tensor(rank + 5))
    averages = Model(model)
    averages.average.begin_round()
    own = model[0].weight.detach().clone()
    averages.temporary.enter("checkpoint", broadcast=False)
    averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    purpose = averages.temporary.purpose
    averages.temporary.leave()
    restored = torch.equal(own, model[0].weight) and averages.temporary.purpose is None
    sent = averages.ledger.payload_bytes(), averages.ledger.payload_bytes("checkpoint")
    return own.numpy(), averaged["0.weight"].numpy(), int(averaged["steps"]), purpose, restored, sent


def test_a_state_dict_is_made_of_averages_and_counts_of_the_rank_itself(run_ranks):
    answers = run_ranks(_state_dict, world_size=2)
    for rank, (_, averaged, steps, purpose, restored, sent) in enumerate(answers):
        assert (averaged == (answers[0][0] + answers[1][0]) / 2).all()
        assert (steps, purpose, restored) == (rank + 5, "checkpoint", True)
        assert sent == (4 * (9 + 3 + 3),) * 2  # tied weights once, and no message for the count


def _layout(rank):
    model, averages, _ = build(0)
    first = averages.tensors.layout()
    model[2].bias.requires_grad_(False)  # frozen within the round: still averaged once more
    same = averages.tensors.layout()
    averages.average.begin_round()
    return first, same, averages.tensors.layout(), averages.tensors.layout([torch.zeros(3)])


def test_the_layout_follows_what_would_be_averaged(run_ranks):
    answers = run_ranks(_layout, world_size=2)
    assert answers[0] == answers[1]
    first, same, later, momenta = answers[0]
    assert first == same
    assert len({first, later, momenta}) == 3
    assert all(float(number) == number for number in answers[0])


def _load(rank):
    _, averages, _ = build(0)
    with pytest.raises(ValueError, match=r"weights that the model does not have: \['parameters:9.weight'\]"):
        averages.tensors.load_state({"parameters:9.weight": torch.zeros(1)})
    return True


def test_the_state_of_another_model_is_refused(run_ranks):
    assert run_ranks(_load, world_size=1) == [True]


def test_momenta_are_found_in_the_order_of_the_parameters_and_counts_left_out():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    shapes = [tuple(tensor.shape) for tensor in optimizer_tensors([optimizer])]
    assert shapes == [(2, 3), (2, 3), (2,), (2,)]


def test_a_state_without_a_mean_is_named():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["quantised"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"SGD keeps 'quantised' as torch.uint8.*'local'"):
        optimizer_tensors([optimizer])
