"""Masks keep as many weights as they say, are the same on all ranks, and bad ones are named."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.pruning import (
    GraSPPruning,
    MagnitudePruning,
    MaskFile,
    MaskFunction,
    ModulePruning,
    PruningContext,
    checked_masks,
    erk_shares,
    keep_largest,
)
from lightning_comm.transport.compression.mask_agreement import (
    agree,
    check_agreement,
    fingerprint,
    pack_bits,
    unpack_bits,
)
from lightning_comm.transport.recording import Recorder


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 40), nn.Embedding(9, 4), nn.Linear(40, 5)
    )


PRUNABLE = {"0.weight": 216, "3.weight": 1280, "5.weight": 200}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
def test_globally_exactly_the_largest_of_all_are_kept(sparsity):
    net = model()
    masks = MagnitudePruning(sparsity).masks(net)
    assert {name: mask.numel() for name, mask in masks.items()} == PRUNABLE  # no bias, norm or embedding
    kept, pruned = (
        torch.cat(
            [
                p.detach()[m if keep else ~m].abs()
                for p, m in ((dict(net.named_parameters())[n], m) for n, m in masks.items())
            ]
        )
        for keep in (True, False)
    )
    assert kept.numel() == round((1 - sparsity) * sum(PRUNABLE.values()))
    assert not pruned.numel() or kept.min() >= pruned.max()


def test_by_layer_each_keeps_its_share_exactly():
    masks = MagnitudePruning(0.75, scope="layer").masks(model())
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {k: round(0.25 * v) for k, v in PRUNABLE.items()}


def test_erk_keeps_the_total_and_more_of_small_layers():
    net = dict(model().named_parameters())
    shares = erk_shares({name: net[name] for name in PRUNABLE}, 0.8)
    assert sum(shares[name] * numel for name, numel in PRUNABLE.items()) == pytest.approx(0.2 * sum(PRUNABLE.values()))
    assert shares["3.weight"] < min(shares["0.weight"], shares["5.weight"])
    ratio = shares["5.weight"] / shares["3.weight"]
    assert ratio == pytest.approx((45 / 200) / (72 / 1280))
    crowded = erk_shares({name: net[name] for name in PRUNABLE}, 0.2)
    assert max(crowded.values()) == 1.0
    assert sum(crowded[name] * numel for name, numel in PRUNABLE.items()) == pytest.approx(0.8 * sum(PRUNABLE.values()))


def test_no_layer_is_emptied_by_a_global_mask():
    net = model()
    with torch.no_grad():
        net[0].weight.mul_(1e-6)
    assert int(MagnitudePruning(0.99).masks(net)["0.weight"].sum()) == 1


def test_equal_weights_are_pruned_by_their_place_so_the_count_stays_exact():
    net = nn.Linear(10, 10, bias=False)
    nn.init.ones_(net.weight)
    for scope in ("global", "layer", "erk"):
        assert int(MagnitudePruning(0.7, scope=scope).masks(net)["weight"].sum()) == 30


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_masks_that_follow_others_only_shrink_and_keep_their_exact_count(scope):
    net, kept, before = model(), {}, None
    for sparsity in (0.3, 0.5, 0.8, 0.8):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()  # pruned weights too: whoever asks again must not rely on their being zero
        fresh = MagnitudePruning(sparsity, scope=scope).masks(net)
        masks = MagnitudePruning(sparsity, scope=scope).masks(net, PruningContext(kept))
        if kept:
            back = [[bool((each[name] & ~kept[name]).any()) for name in PRUNABLE] for each in (masks, fresh)]
            assert not any(back[0])
            assert any(back[1])  # or shrinking would prove nothing
        totals = [sum(int(each.sum()) for each in answer.values()) for answer in (masks, fresh)]
        assert totals[0] == totals[1]
        if kept and sparsity == before:
            assert fingerprint(masks) == fingerprint(kept)
        kept, before = masks, sparsity


def test_skipped_and_frozen_parameters_have_no_mask():
    net = model()
    net[0].requires_grad_(False)
    assert set(MagnitudePruning(0.5, skip=("5.*",)).masks(net)) == {"3.weight"}


def test_a_module_pruned_by_torch_is_read_by_its_masks_and_not_by_its_zeros():
    net = model()
    prune.l1_unstructured(net[3], "weight", amount=0.5)
    with torch.no_grad():
        net[3].weight_orig[0] = 0.0
    masks = ModulePruning().masks(net)
    assert set(masks) == {"3.weight_orig"}
    assert torch.equal(masks["3.weight_orig"], net[3].weight_mask.bool())
    with pytest.raises(ValueError, match=r"this one has none\. Prune before training, if only by"):
        ModulePruning().masks(model())


def test_a_file_and_a_function_give_their_masks(tmp_path):
    net = model()
    masks = MagnitudePruning(0.5).masks(net)
    torch.save(masks, tmp_path / "masks.pt")
    for source in (MaskFile(str(tmp_path / "masks.pt")), MaskFunction(lambda module: masks)):
        assert fingerprint(source.masks(net)) == fingerprint(masks)


@pytest.mark.parametrize("source", [MaskFunction(lambda module: {}), GraSPPruning(loss=lambda module, batch: None)])
def test_settings_read_the_same_in_another_process_by_which_a_resumed_run_knows_them(source):
    assert " at 0x" not in repr(source)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000])
def test_packed_bits_come_back(numel):
    row = torch.rand(numel) < 0.3
    assert pack_bits(row).numel() == -(-numel // 8)
    assert torch.equal(unpack_bits(pack_bits(row), numel), row)


def _agreed(rank):
    net = model(seed=rank)  # other weights on every rank
    recorder = Recorder(CommLedger())
    masks = MagnitudePruning(0.5).masks(net)
    return fingerprint(agree(masks, None, net, recorder)), fingerprint(masks), recorder.ledger.payload_bytes()


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_get_the_masks_of_rank_0(run_ranks, world_size):
    answers = run_ranks(_agreed, world_size=world_size)
    assert {agreed for agreed, *_ in answers} == {answers[0][1]}
    assert answers[1][1] != answers[0][1]  # or agreeing would prove nothing
    bits = sum(-(-numel // 8) for numel in PRUNABLE.values())
    assert {payload_bytes for *_, payload_bytes in answers} == {2000 + 9 + bits + 8}


def _disagreeing(rank):
    masks = {"weight": torch.tensor([True, False, True, rank == 1])} if rank < 2 else {"weight": torch.ones(4).bool()}
    same_count = {"weight": torch.tensor([True, False]) if rank == 0 else torch.tensor([False, True])}
    said = []
    for each in (masks, same_count):
        with pytest.raises(RuntimeError) as caught:
            check_agreement(each, torch.device("cpu"), Recorder(CommLedger()))
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_masks_on_a_rank_are_an_error_on_all_of_them_also_with_equal_counts(run_ranks, world_size):
    for said in run_ranks(_disagreeing, world_size=world_size):
        assert all("rank 1 has others than rank 0" in each for each in said)


def _failing(rank):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the test reads all of it)
        agree(None, "no masks today" if rank == 0 else None, model(), Recorder(CommLedger()))
    return str(caught.value)


def test_a_problem_of_rank_0_is_raised_on_all(run_ranks):
    assert run_ranks(_failing, world_size=2) == ["no masks today"] * 2


def linear_masks(**masks):
    return checked_masks(masks, nn.Linear(4, 3), "Here")


THIRDS = torch.arange(12).view(3, 4) % 3 > 0


def inverted(kept=THIRDS):
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.fill_(1.0).mul_(kept)
    return checked_masks({"weight": net.weight == 0}, net, "Here")


def tied_masks():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return checked_masks({"1.weight": torch.eye(4).bool()}, net, "Here")


def test_a_mask_of_a_parameter_that_is_all_zero_is_no_inverted_one():
    assert bool(inverted(torch.zeros(3, 4))["weight"].all())


def test_a_file_that_is_damaged_is_named(tmp_path):
    path = str(tmp_path / "masks.pt")
    for content in (b"no masks", b"", b"PK\x03\x04junk"):
        (tmp_path / "masks.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"MaskFile: `path`=.*cannot be read .*torch\.save") as caught:
            MaskFile(path).masks(model())
        assert repr(path) in str(caught.value)


def test_every_scope_keeps_its_share_of_any_shapes_also_where_next_to_nothing_is_pruned():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(1, 5, (), generator=generator))
        scores = {}
        for name in "abcd"[:count]:
            dims = int(torch.randint(2, 5, (), generator=generator))
            shape = torch.randint(1, 10, (dims,), generator=generator).tolist()
            scores[name] = torch.randn(shape, generator=generator)
        total = sum(score.numel() for score in scores.values())
        for sparsity in (0.0, 1e-16, 1e-9, 1e-3, 0.1, 0.5, 0.999):
            for scope in ("global", "layer", "erk"):
                kept = [int(mask.sum()) for mask in keep_largest(scores, sparsity, scope).values()]
                assert min(kept) >= 1
                assert abs(sum(kept) - (1 - sparsity) * total) <= len(kept)  # each share is rounded, and 1 at least
                assert sparsity > 1e-6 or sum(kept) == total


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3).requires_grad_(False)
        self.words = nn.Embedding(4, 3, sparse=True)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: MagnitudePruning(80), ("`sparsity`", "got 80", "write 0.8")),
        (lambda: MagnitudePruning(100), ("`sparsity`", "< 1", "got 100", "one weight in five")),
        (lambda: MagnitudePruning(1.0), ("`sparsity`", "got 1.0", "one weight in five")),
        (lambda: MagnitudePruning(-0.1), ("`sparsity`", "got -0.1", "one weight in five")),
        (lambda: MagnitudePruning(scope="all"), ("`scope`", "'all'", "'erk'")),
        (lambda: MagnitudePruning(skip="head"), ("MagnitudePruning", "`skip`", "got 'head'", "['head']")),
        (lambda: MagnitudePruning(skip=None), ("`skip`", "got None", "Leave it out")),
        (lambda: GraSPPruning(skip="head"), ("GraSPPruning", "`skip`", "got 'head'", "['head']")),
        (lambda: GraSPPruning(skip=[3]), ("`skip`", "got [3]", "Leave it out")),
        (lambda: MagnitudePruning(skip=("3.wieght",)).masks(model()), ("`skip`", "'3.wieght'", "mean '3.weight'?")),
        (lambda: MagnitudePruning(skip=("*",)).masks(model()), ("no parameter is left to prune",)),
        (lambda: MaskFile("/nowhere").masks(model()), ("MaskFile", "`path`", "'/nowhere'")),
        (lambda: linear_masks(), ("Here", "not empty", "got {}")),
        (lambda: linear_masks(wieght=torch.ones(3, 4).bool()), ("'wieght'", "Did you mean 'weight'?")),
        (lambda: linear_masks(weight=torch.ones(3, 4)), ("'weight'", "torch.float32", "`mask != 0`")),
        (lambda: linear_masks(weight=torch.ones(4, 3).bool()), ("(3, 4)", "got (4, 3)", "another architecture")),
        (lambda: linear_masks(weight=torch.zeros(3, 4).bool()), ("'weight'", "keeps nothing", "`~mask`")),
        (lambda: inverted(), ("Here", "'weight'", "4 weights that are zero", "8 others", "`~mask`")),
        (lambda: tied_masks(), ("Here", "'1.weight'", "second name", "'0.weight'")),
        (
            lambda: checked_masks({"one.weight": torch.ones(3, 4).bool()}, Frozen(), "Here"),
            ("'one.weight'", "frozen", "Drop its mask"),
        ),
        (
            lambda: checked_masks({"words.weight": torch.ones(4, 3).bool()}, Frozen(), "Here"),
            ("'words.weight'", "sparse gradients", "sparse=False"),
        ),
    ],
)
def test_bad_arguments_and_masks_are_named_with_a_way_out(make, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the line below reads all of it)
        make()
    assert [part for part in parts if part not in str(caught.value)] == []
