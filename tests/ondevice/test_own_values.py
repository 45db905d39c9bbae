"""What comes back when an average is taken out, and what somebody has set meanwhile and stays."""

import pytest
import torch
from support.model_averages import Model
from torch import nn

from lightning_comm.ondevice.own_values import OwnValues


def averaged(places):
    """Put other numbers in all places, as an average does, and return what keeps the own ones."""
    own = OwnValues("evaluation", None, places)
    for tensor in places.values():
        tensor.add_(1)
    own.note()
    return own


def test_only_what_nobody_has_set_comes_back():
    places = {name: torch.full((300,), 5.0) for name in ("left", "one entry", "data", "there and back", "renewed")}
    places["count"] = torch.tensor(5)
    own = averaged(places)
    places["one entry"][299] = 7
    places["data"].data.fill_(5.5)
    places["there and back"].mul_(-2).div_(-2)
    places["count"] += 1
    places["renewed"].fill_(8)
    own.note([places["renewed"]])
    other = {"left": torch.zeros(300), "new": torch.ones(1)}  # tensors that have taken the place of those
    assert all(tensor is other[name] for name, tensor in own.goes_on_with(other).items())
    ahead = {name: tensor.clone() for name, tensor in own.goes_on_with(places).items()}
    own.put_back()
    assert [float(tensor.sum()) for tensor in places.values()] == [1500, 299 * 6 + 7, 1650, 1500, 1500, 7]
    assert all(torch.equal(ahead[name], tensor) for name, tensor in places.items())


def test_tensors_that_share_entries_with_one_that_was_set_stay_too():
    matrix, alone, expanded = torch.zeros(4, 6), torch.zeros(3), torch.zeros(2, 1).expand(2, 5)
    own = OwnValues("evaluation", None, {"matrix": matrix, "rows": matrix[1:3], "alone": alone, "expanded": expanded})
    for tensor in (matrix, alone, expanded[:, :1]):
        tensor.add_(1)
    own.note()
    matrix[1, 0] = 9
    own.put_back()
    assert float(matrix.sum()) == 23 + 9
    assert float(alone.sum()) == float(expanded.sum()) == 0


def test_an_average_that_failed_on_the_way_is_all_put_back():
    place = torch.zeros(3)
    own = OwnValues("checkpoint", None, {"place": place})
    place.add_(1)
    own.put_back()
    assert float(place.sum()) == 0


def test_a_loss_from_before_goes_backward_after_the_average_and_not_while_it_is_in_place(run_ranks):
    def run(rank):
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        averages = Model(model)
        averages.average.begin_round()

        def gradients(between):
            model.zero_grad()
            loss = model(torch.ones(2, 3)).sum()
            between()
            loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        def enter():
            averages.temporary.enter("checkpoint", broadcast=False)

        def enter_and_leave():
            enter()
            averages.temporary.leave()

        def set_meanwhile():
            enter()
            with torch.no_grad():
                model[2].weight.zero_()
            averages.temporary.leave()

        expected, got = gradients(lambda: None), gradients(enter_and_leave)
        for between in (enter, set_meanwhile):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(between)
            averages.temporary.leave()
        return all(torch.equal(mine, theirs) for mine, theirs in zip(expected, got, strict=True))

    assert run_ranks(run, world_size=2) == [True, True]
