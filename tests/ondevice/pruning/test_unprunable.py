"""Masks on modules where a zero does not do what a mask means: left whole and named, or refused by name."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_comm.ondevice.pruning import (
    GraSPPruning,
    MagnitudePruning,
    MaskFunction,
    ModulePruning,
    PruningContext,
    checked_masks,
    keep_largest,
)


class Normalised(nn.Module):
    """A parametrization of a user's: rows of length 1."""

    def forward(self, weight):
        return weight / weight.norm(dim=1, keepdim=True)

    def right_inverse(self, weight):
        return weight


class Shares(nn.Module):
    """Two parameters in one memory, and one beside them that is in the same storage and not in the same place."""

    def __init__(self):
        super().__init__()
        memory = torch.randn(6, 4)
        self.one, self.turned = nn.Parameter(memory[:3]), nn.Parameter(memory[:3].t())
        self.beside = nn.Parameter(memory[3:])

    def forward(self, x):
        return x @ self.one.t() @ self.turned.t() @ self.beside.t()


def layer(kind):
    plain = nn.Linear(4, 3)
    if kind == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(plain)
    return {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old spectral_norm": nn.utils.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "custom": lambda plain: parametrize.register_parametrization(plain, "weight", Normalised()),
    }[kind](plain)


KINDS = ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "orthogonal", "custom"]


def with_layer(part):
    torch.manual_seed(0)
    return nn.Sequential(part, nn.Tanh(), nn.Linear(3, 5))


def samples(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=generator)
    return [((x, torch.randint(0, 4, (8,), generator=generator)), 8)]


@pytest.mark.parametrize("pruning", [MagnitudePruning(0.5), GraSPPruning(0.5, temperature=1.0)], ids=["size", "flow"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_weight_is_only_computed_from_is_left_whole_and_named(kind, pruning):
    net = with_layer(layer(kind))
    net(torch.randn(2, 4))
    with pytest.warns(UserWarning, match=r"not pruned: .*'0\..*since '0.weight' is computed from it") as said:
        masks = pruning.masks(net, PruningContext(samples=samples))
    assert set(masks) == {"2.weight"}
    assert len(said) == 1
    trained = [name for name, parameter in net[0].named_parameters() if parameter.dim() > 1]
    assert all(f"'0.{name}'" in str(said[0].message) for name in trained)


def test_a_model_of_nothing_else_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"no parameter is left.*original1.*'weight' is computed from it.*'bf16'"):
        MagnitudePruning(0.5).masks(layer("weight_norm"))


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "custom"])
def test_a_given_mask_that_empties_a_normalised_row_is_refused_and_one_that_does_not_is_taken(kind):
    net = with_layer(layer(kind))
    name = next(name for name, parameter in net.named_parameters() if parameter.shape == (3, 4))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, :3] = False
    before, state = torch.get_rng_state(), {key: value.clone() for key, value in net.state_dict().items()}
    assert torch.equal(checked_masks({name: mask}, net, "here")[name], mask)
    with torch.no_grad():
        dict(net.named_parameters())[name][1, 3] = 0  # a row that is kept, as far as it is zero
    with pytest.raises(
        ValueError, match=rf"MaskFunction: under the mask of '{name}' the weight '0.weight'.*Keep an entry"
    ):
        MaskFunction(lambda module: {name: mask}).masks(net)
    mask[1, 3] = False
    with pytest.raises(ValueError, match="a whole row is zero"):
        MaskFunction(lambda module: {name: mask}).masks(net)
    assert torch.equal(before, torch.get_rng_state())
    assert {key for key, value in net.state_dict().items() if not torch.equal(value, state[key])} == {name}


def test_checking_a_mask_over_a_spectral_norm_leaves_its_iterations_alone():
    net = with_layer(layer("spectral_norm"))
    buffers = [buffer.clone() for buffer in net.buffers()]
    checked_masks({"0.parametrizations.weight.original": torch.eye(3, 4).bool()}, net, "here")
    assert all(map(torch.equal, buffers, net.buffers()))


@pytest.mark.parametrize(
    ("odd", "names", "reason"),
    [
        (Shares, ["one", "turned"], "shares its memory with 'a.turned'"),
        (lambda: holder(torch.randn(1, 4).expand(3, 4)), ["odd"], "entries share one number"),
        (lambda: holder(torch.randn(3, 4, dtype=torch.complex64)), ["odd"], "complex gradients are sent in full"),
    ],
    ids=["shared memory", "expanded", "complex"],
)
def test_parameters_whose_entries_are_not_their_own_are_left_whole_and_refused_a_mask_by_name(odd, names, reason):
    net = nn.ModuleDict({"a": odd(), "b": nn.Linear(4, 5)})
    with pytest.warns(UserWarning, match="not pruned") as said:
        masks = MagnitudePruning(0.5).masks(net)
    assert set(masks) == {"b.weight"} | ({"a.beside"} if odd is Shares else set())
    text = " ".join(str(each.message) for each in said)
    assert reason in text
    assert all(f"'a.{name}'" in text for name in names)
    shape = dict(net.named_parameters())[f"a.{names[0]}"].shape
    with pytest.raises(ValueError, match=rf"here: 'a.{names[0]}' cannot have a mask: .*{reason}.*Drop its mask"):
        checked_masks({f"a.{names[0]}": torch.eye(*shape).bool()}, net, "here")


def holder(values):
    module = nn.Module()
    module.odd = nn.Parameter(values)
    return module


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_parameters_without_entries_are_passed_over(scope):
    net = nn.ModuleDict({"a": holder(torch.empty(0, 4)), "b": nn.Linear(4, 5)})
    assert set(MagnitudePruning(0.5, scope=scope).masks(net)) == {"b.weight"}
    kept = keep_largest({"a": torch.empty(0, 4), "b": torch.arange(6.0)}, 0.5, scope)
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 0, "b": 3}
    given = {"a.odd": torch.empty(0, 4, dtype=torch.bool), "b.weight": torch.eye(5, 4).bool()}
    assert set(checked_masks(given, net, "here")) == {"b.weight"}


class Adapted(nn.Module):
    """A low-rank adapter whose second matrix starts at zero."""

    def __init__(self):
        super().__init__()
        self.base, self.down = nn.Linear(8, 16), nn.Parameter(torch.randn(4, 8))
        self.up = nn.Parameter(torch.zeros(16, 4))
        self.scale = nn.Parameter(torch.full((16, 1), 1e-6))

    def forward(self, x):
        return self.base(x) + self.scale.t() * (x @ self.down.t() @ self.up.t())


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_what_starts_at_one_value_is_left_whole_and_named_and_judged_at_a_later_pruning(scope):
    torch.manual_seed(0)
    net, kept = Adapted(), {}
    pruning = MagnitudePruning(0.5, scope=scope)
    with pytest.warns(UserWarning, match="not pruned: 'up', 'scale', since all entries score alike") as said:
        kept = pruning.masks(net)
    assert len(said) == 1
    assert set(kept) == {"base.weight", "down"}
    assert sum(int(mask.sum()) for mask in kept.values()) == (128 + 32) // 2
    with torch.no_grad():
        net.up.normal_()
        net.scale.normal_()
    later = pruning.masks(net, PruningContext(kept))
    assert set(later) == {"base.weight", "down", "up", "scale"}
    assert not any(bool((later[name] & ~mask).any()) for name, mask in kept.items())


def test_what_has_a_mask_keeps_it_where_there_is_nothing_to_choose_by():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    mask = torch.eye(4).bool()
    with torch.no_grad():
        net["a"].weight.zero_()
    frozen = PruningContext({"a.weight": mask})
    assert not bool((MagnitudePruning(0.5).masks(net, frozen)["a.weight"] & ~mask).any())
    net["a"].weight.requires_grad_(False)
    assert torch.equal(MagnitudePruning(0.5).masks(net, frozen)["a.weight"], mask)


def test_a_model_that_is_all_zero_is_refused():
    net = nn.Linear(4, 4)
    nn.init.zeros_(net.weight)
    with pytest.raises(ValueError, match=r"all scores are 0, as in 'weight'.*PruningSchedule\(start_step="):
        MagnitudePruning(0.5).masks(net)


def test_flow_leaves_whole_what_the_loss_does_not_depend_on():
    net = nn.Sequential(nn.Linear(4, 5))
    net.register_parameter("extra", nn.Parameter(torch.randn(3, 3)))
    with pytest.warns(UserWarning, match="GraSPPruning: not pruned: 'extra'"):
        assert set(GraSPPruning(0.5, temperature=1.0).masks(net, PruningContext(samples=samples))) == {"0.weight"}


def test_a_parameter_that_keeps_next_to_nothing_is_named_and_others_are_not():
    torch.manual_seed(0)
    net = nn.ModuleDict({"small": nn.Linear(16, 8), "large": nn.Linear(16, 32)})
    with torch.no_grad():
        net["small"].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"pruned to one entry, or hardly any: 'small.weight', whose") as said:
        masks = MagnitudePruning(0.8).masks(net)
    assert len(said) == 1
    assert int(masks["small.weight"].sum()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MagnitudePruning(0.8, scope="layer").masks(net)
        MagnitudePruning(0.8, skip=["small.weight"]).masks(net)


def test_neither_inputs_that_are_always_zero_nor_plain_tensors_beside_a_parameter_are_remarked_on():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5))
    net[0].we = torch.ones(3)  # the weight is not computed from it, whatever its name
    net[0].register_parameter("we_proj", nn.Parameter(torch.randn(5, 5)))

    def sparse(count):
        for batch, number in samples(count):
            batch[0][:, 2] = 0
            yield batch, number

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(MagnitudePruning(0.5).masks(net)) == {"0.weight", "0.we_proj"}
        GraSPPruning(0.2, temperature=1.0, skip=["0.we_proj"]).masks(net, PruningContext(samples=sparse))


@pytest.mark.parametrize("way", [0, 1])
def test_rows_and_columns_that_are_zero_and_go_whole_are_said_and_scattered_zeros_are_not(way):
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    with torch.no_grad():
        net.weight[torch.eye(6).bool()] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MagnitudePruning(0.3).masks(net)
    with torch.no_grad():
        net.weight.transpose(0, way)[2:4] = 0
    with pytest.warns(UserWarning, match="whole rows or columns are zero, which so stay zero: 'weight'"):
        MagnitudePruning(0.5).masks(net)


class Tied(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        for name in (first, second):
            setattr(self, name, nn.Embedding(6, 4) if name == "lookup" else nn.Linear(4, 6, bias=False))
        getattr(self, second).weight = getattr(self, first).weight
        self.body = nn.Linear(4, 4)


@pytest.mark.parametrize("names", [("lookup", "head"), ("head", "lookup"), ("head", "other")])
def test_the_mask_of_a_weight_that_modules_share_is_the_union_of_theirs(names):
    masks = [torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) > 0.5 for seed in (1, 2)]
    for pruned in ((0,), (1,), (0, 1)):
        net = Tied(*names)
        prune.custom_from_mask(net.body, "weight", torch.eye(4))
        for each in pruned:
            prune.custom_from_mask(getattr(net, names[each]), "weight", masks[each].float())
        shared = next(name for name, parameter in net.named_parameters() if parameter.shape == (6, 4))
        if len(pruned) == 2:
            found = ModulePruning().masks(net)
            assert torch.equal(found[shared], masks[0] | masks[1])
        else:
            with pytest.warns(
                UserWarning, match=f"the mask of '{names[pruned[0]]}.weight_orig' leaves out no gradients"
            ):
                found = ModulePruning().masks(net)
            assert bool(found[shared].all())
        assert set(found) == {shared, "body.weight_orig"}
        assert torch.equal(found["body.weight_orig"], torch.eye(4).bool())


def test_weights_that_the_model_masks_itself_are_the_first_to_be_pruned():
    net = nn.Linear(8, 8)
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) > 0.5
    prune.custom_from_mask(net, "weight", mask.float())
    chosen = MagnitudePruning(0.7).masks(net)["weight_orig"]
    assert int(chosen.sum()) == round(0.3 * 64) < int(mask.sum())
    assert not bool((chosen & ~mask).any())
    used = net.weight.detach().abs()
    assert used[chosen].min() >= used[~chosen].max()


def test_one_module_under_two_names_has_its_own_mask():
    part = prune.custom_from_mask(nn.Linear(4, 4), "weight", torch.eye(4))
    net = nn.ModuleDict({"a": part, "b": part})
    assert torch.equal(ModulePruning().masks(net)["a.weight_orig"], torch.eye(4).bool())
