"""Members of rounds: who they are, what each counts for, and when they may change."""

import pytest
import torch
import torch.distributed as dist
from support.model_averages import Background

from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.share import Share
from lightning_comm.transport.averaging import FullAverage
from lightning_comm.transport.compressed_average import CompressedAverage
from lightning_comm.transport.compression.top_k import TopK
from lightning_comm.transport.members import Members
from lightning_comm.transport.recording import Recorder


def _who(rank):
    some = dist.new_group([0, 2])
    whole = Members()
    found = [(whole.ranks, whole.rank, whole.size, whole.group)]
    if rank != 1:
        part = Members(some)
        found.append((part.ranks, part.rank, part.size, part.group is some))
    else:
        with pytest.raises(ValueError, match=r"Members: `group`.*without rank 1.*Only its members") as caught:
            Members(some)
        found.append(str(caught.value))
    return found


def test_members_are_the_ranks_of_their_group_by_place(run_ranks):
    answers = run_ranks(_who, world_size=3)
    for rank, (whole, _) in enumerate(answers):
        assert whole == ((0, 1, 2), rank, 3, None)
    assert answers[0][1] == ((0, 2), 0, 2, True)
    assert answers[2][1] == ((0, 2), 1, 2, True)


def _shares(rank):
    members = Members()
    return [(float(share), share.begin, share.end) for share in (members.share(), members.share([3, 1, 0]))]


def test_shares_fill_the_line_in_the_order_of_the_members(run_ranks):
    counts = [[1, 1, 1], [3, 1, 0]]
    for rank, found in enumerate(run_ranks(_shares, world_size=3)):
        for share, each in zip(found, counts, strict=True):
            expected = Share.of(each, rank)
            assert share == (float(expected), sum(each[:rank]) / sum(each), sum(each[: rank + 1]) / sum(each))


def _change(rank):
    """One object holds the members: recorder, averages and codec follow it from one round to the next."""
    ranks = [[0, 1, 2], [0, 1], [1, 2], [0, 1, 2]]
    groups = [None if len(each) == 3 else dist.new_group(each) for each in ranks]
    behind = [dist.new_group(each) for each in ranks]
    ledger = CommLedger()
    members = Members(background=behind[0])
    recorder = Recorder(ledger, members)
    full, compressed = FullAverage(recorder, 8), CompressedAverage(recorder, TopK(1.0), 8)
    background = Background(Recorder(ledger, members, background=True), TopK(1.0), 8)
    history = []
    for group, second, each in zip(groups, behind, ranks, strict=True):
        if rank not in each:
            continue
        members.change(group, second)
        with pytest.raises(ValueError, match=r"Members: `background` must be a second.*got None.*Make one") as caught:
            members.change(group)
        assert str(each) in str(caught.value)
        members.begin_round()
        with pytest.raises(RuntimeError, match=r"Members: `group`.*two rounds alone.*within a round") as caught:
            members.change(None)
        assert str(list(members.ranks)) in str(caught.value)
        assert members.group is group
        row = torch.full((5,), 3.0 * rank)
        full.average_({"row": row})
        start = {"a": torch.zeros(5)}
        compressed.references.restart(start)
        start["a"] += 3.0 * rank
        compressed.average_(start)
        source = torch.full((2,), float(rank))
        recorder.broadcast(source, "parameters").wait()
        sent = ledger.records[-1].wire_bytes
        members.end_round()
        begun = {"a": torch.zeros(5)}
        background.references.restart(begun)
        begun["a"] += 3.0 * rank
        background.depart(begun)
        with pytest.raises(RuntimeError, match=r"Members: `group`.*in flight.*Let it land first.*land\(\)") as caught:
            members.change(None, behind[0])
        assert str(each) in str(caught.value)
        background.land_(begun)
        history.append((members.ranks, row.tolist(), start["a"].tolist(), begun["a"].tolist(), source.tolist(), sent))
    with pytest.raises(ValueError, match=r"Members: `background` must have the ranks.*\[0, 1, 2\].*Make both"):
        Members(None, behind[2 if rank else 1])
    with pytest.raises(ValueError, match=r"Recorder: `background`.*got none.*another_group"):
        Recorder(ledger, Members(), background=True)
    return history


def test_a_change_between_two_rounds_reaches_all_that_average_and_within_one_it_is_refused(run_ranks):
    answers = run_ranks(_change, world_size=3)
    rounds = {0: [(0, 1, 2), (0, 1), (0, 1, 2)], 2: [(0, 1, 2), (1, 2), (0, 1, 2)]}
    rounds[1] = [(0, 1, 2), (0, 1), (1, 2), (0, 1, 2)]
    for rank, history in enumerate(answers):
        assert [ranks for ranks, *_ in history] == rounds[rank]
        for ranks, in_full, differences, in_background, first, _ in history:
            mean = 3.0 * sum(ranks) / len(ranks)
            assert in_full == [mean] * 5
            assert differences == pytest.approx([mean] * 5)
            assert in_background == pytest.approx([mean] * 5)
            assert first == [float(ranks[0])] * 2
    # ring shares of a message depend on the number of members
    assert len({sent for history in answers for *_, sent in history}) == 2
