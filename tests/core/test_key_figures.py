"""Key figures against hand arithmetic and brute force."""

import random

import pytest

from lightning_comm.core.key_figures import StepFigures, StepFrame, measure_step, union_s
from lightning_comm.core.ledger import CommRecord
from lightning_comm.core.rank_profile import ClockPoint, RankProfile, combine, inferred_waits, with_waits
from lightning_comm.core.step_timeline import aligned, draw
from lightning_comm.reports.profile.text import sentences


def record(purpose: str, start_ms: float, length_ms: float, payload: int = 0, hidden_ms: float = 0.0) -> CommRecord:
    return CommRecord(
        "all_reduce", purpose, payload, 2 * payload, 0, start_ms / 1000, length_ms / 1000, hidden_ms / 1000
    )


def step(batch: int, **kwargs) -> StepFigures:
    defaults = {
        "step": batch,
        "optimizer_steps": 1,
        "start_s": float(batch),
        "duration_s": 0.1,
        "payload_bytes": {},
        "wire_bytes": {},
        "dense_bytes": 100,
        "comm_s": 0.0,
        "exposed_s": 0.0,
        "wait_s": 0.0,
        "lightning_s": 0.0,
        "other_s": 0.0,
    }
    return StepFigures(batch, **{**defaults, **kwargs})


def profile(rank: int, steps, world_size: int = 2, warmup: int = 0, **kwargs) -> RankProfile:
    made = RankProfile({"rank": rank, "world_size": world_size, "warmup_steps": warmup, "host": f"h{rank}"}, **kwargs)
    for each in steps:
        made.add_step(each)
    return made


def test_the_union_of_messages_is_that_of_a_count_millisecond_by_millisecond():
    rng = random.Random(0)
    for _ in range(200):
        records = [record("gradients", rng.randrange(100), rng.randrange(30)) for _ in range(rng.randrange(8))]
        busy = {ms for r in records for ms in range(round(1000 * r.start_s), round(1000 * (r.start_s + r.duration_s)))}
        assert union_s(records) == pytest.approx(len(busy) / 1000)


def test_a_step_keeps_hidden_exposed_waiting_lightning_and_others_apart():
    records = [
        record("control", 10, 5, payload=64),
        record("parameters", 15, 10, payload=1000),
        record("parameters", 20, 10, payload=500),
        record("gradients", 40, 20, payload=300, hidden_ms=15),
        record("lightning", 70, 4, payload=8),
        record("metrics", 80, 2),
        record("user", 81, 3),
    ]
    figures = measure_step(StepFrame(3, 2, 1, start_s=0.0, end_s=0.1, dense_bytes=900), records)
    assert figures.comm_s == pytest.approx(0.040)
    assert figures.exposed_s == pytest.approx(0.025)
    assert figures.wait_s == pytest.approx(0.005)
    assert figures.lightning_s == pytest.approx(0.004)
    assert figures.other_s == pytest.approx(0.004)
    assert figures.own_s == pytest.approx(0.1 - 0.025 - 0.008)
    assert figures.payload_bytes["parameters"] == 1500
    assert figures.sent_bytes == 2 * (64 + 1500 + 300)
    assert (figures.timed, figures.met) == (True, True)


def test_messages_that_overlap_are_exposed_only_while_somebody_waits():
    # both travel from 0.0 on beside compute; from 0.6 to 0.7 one waits for the first, until 0.8 for the second
    records = [
        CommRecord("all_reduce", "gradients", 8, 8, 0, start_s=0.0, duration_s=0.7, hidden_s=0.6),
        CommRecord("all_reduce", "gradients", 8, 8, 0, start_s=0.1, duration_s=0.7, hidden_s=0.6),
    ]
    figures = measure_step(StepFrame(0, 0, 1, 0.0, 1.0, 16), records)
    assert figures.comm_s == pytest.approx(0.8)
    assert figures.exposed_s == pytest.approx(0.2)  # and not 0.8 less twice 0.6


def test_bytes_without_a_time_make_a_step_untimed_unless_another_record_has_the_time():
    frame = StepFrame(0, 0, 1, 0.0, 0.1, 0)
    assert not measure_step(frame, [record("gradients", 0, 0, payload=8)]).timed
    assert measure_step(frame, [record("gradients", 0, 0, payload=8), record("gradients", 0, 9)]).timed


def test_all_ranks_keep_the_same_steps_however_many_there_are():
    kept = [[s.batch for s in profile(rank, map(step, range(5000)), keep=100).kept] for rank in range(2)]
    assert kept[0] == kept[1]
    assert 50 < len(kept[0]) <= 100
    assert kept[0][0] == 0
    assert {b - a for a, b in zip(kept[0], kept[0][1:], strict=False)} == {64}


def test_the_rank_that_stands_still_least_came_last_and_the_others_waited():
    exposed = {0: (0.030, 0.010), 1: (0.012, 0.025), 2: (0.010, 0.010)}
    profiles = [
        profile(rank, [step(b, exposed_s=s, comm_s=s) for b, s in enumerate(row)], world_size=3)
        for rank, row in exposed.items()
    ]
    waits = inferred_waits(profiles)
    assert waits[0] == pytest.approx({0: 0.020, 1: 0.0})
    assert waits[1] == pytest.approx({0: 0.002, 1: 0.015})
    assert waits[2] == pytest.approx({0: 0.0, 1: 0.0})
    run = combine(profiles)
    assert [rank.wait_s for rank in run.ranks] == pytest.approx([0.010, 0.0085, 0.0])
    assert run.wait_s == pytest.approx((0.020 + 0.017) / 6)
    assert [s.wait_s for s in with_waits(profiles[0].kept, waits[0])] == pytest.approx([0.020, 0.0])


def test_measured_waiting_is_left_as_it_was_measured():
    profiles = [profile(r, [step(0, exposed_s=0.02, comm_s=0.02, wait_s=0.01 * r, met=True)]) for r in range(2)]
    assert inferred_waits(profiles) == {0: {}, 1: {}}
    assert [rank.wait_s for rank in combine(profiles).ranks] == [0.0, 0.01]


def test_figures_of_a_run_by_hand():
    def steps(own_s: float):
        for batch in range(10):
            sends = batch % 2
            yield step(
                batch,
                duration_s=0.1,
                comm_s=0.05 * sends,
                exposed_s=(0.1 - own_s) * 2 * sends,
                payload_bytes={"gradients": 500 * sends, "lightning": 8},
                wire_bytes={"gradients": 500 * sends, "lightning": 4},
                dense_bytes=100,
            )

    profiles = [profile(0, steps(0.09), warmup=2), profile(1, steps(0.08), warmup=2)]
    profiles[0].header["link_bytes_per_s"] = 2e4
    run = combine(profiles[::-1])
    assert (run.steps, run.warmup_steps, run.total_steps, run.total_optimizer_steps) == (8, 2, 10, 10)
    assert run.step_s == pytest.approx(0.1)
    assert run.sent_bytes == pytest.approx(250)
    assert run.dense_bytes == pytest.approx(100)
    assert run.share_busy == pytest.approx(0.25)
    assert run.share_exposed == pytest.approx((0.1 + 0.2) / 2)
    assert run.ranks[1].wait_s == pytest.approx(0.01)
    assert run.transfer_s == pytest.approx(0.015 - 0.005)
    assert run.bandwidth_bytes_per_s == pytest.approx(2 * 250 / (0.025 + 0.015))
    assert run.link_bytes_per_s == 2e4
    assert run.slow_rank is None, "every second step is as long on the other rank"
    assert run.total_wire_bytes == {"gradients": 2500, "lightning": 40}


def test_a_run_no_longer_than_its_warm_up_is_counted_whole():
    run = combine([profile(0, [step(0), step(1)], world_size=1, warmup=3)])
    assert (run.steps, run.warmup_steps) == (2, 0)


def test_untimed_steps_count_in_bytes_but_in_no_mean_of_times():
    steps = [step(0, comm_s=0.04, exposed_s=0.04), step(1, timed=False, wire_bytes={"gradients": 10})]
    run = combine([profile(0, steps, world_size=1)])
    assert (run.comm_s, run.untimed_steps, run.sent_bytes) == (0.04, 1, 5)


def test_a_rank_that_stopped_is_named_and_does_not_hide_the_others():
    run = combine([profile(0, map(step, range(20))), profile(1, [], stopped="OSError: full")])
    assert not any("stands out" in text for text in sentences(run)), "one rank alone is compared with none"
    assert run.stopped == {1: "OSError: full"}
    assert run.step_s == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"`profiles` must hold at least one rank; got none"):
        combine([])


def test_totals_are_those_of_ranks_that_measured_all_steps():
    def steps(count):
        return [step(b, payload_bytes={"gradients": 10}, wire_bytes={"gradients": 20}) for b in range(count)]

    profiles = [
        profile(0, [], world_size=5, warmup=3, stopped="OSError: full"),
        profile(1, steps(8), world_size=5, warmup=3),
        profile(2, steps(8), world_size=5, warmup=3),
        profile(3, steps(5), world_size=5, warmup=3),  # its file ends early
    ]
    for each in profiles[1:]:
        each.add_beside({"evaluation": 6})
    run = combine(profiles)
    assert run.total_payload_bytes == {"gradients": 80}
    assert run.total_wire_bytes == {"gradients": 160}
    assert run.beside_wire_bytes == {"evaluation": 6}
    assert (run.total_ranks, run.total_steps, run.warmup_steps) == (2, 8, 3)
    assert "Totals are means of 2 of 5 ranks, which have measured all steps." in sentences(run)


def slow_rank_of(own_s: list[list[float]]):
    """Who is named where ranks are busy by themselves for so long, step by step."""
    ranks = [
        profile(rank, [step(b, duration_s=s) for b, s in enumerate(steps)], world_size=len(own_s), warmup=1)
        for rank, steps in enumerate(own_s)
    ]
    run = combine(ranks)
    return run.slow_rank, run.slower_by, sentences(run)


def test_a_rank_that_is_slow_step_by_step_is_named_though_another_has_the_longest_steps():
    rng = random.Random(0)
    together = [rng.choice((0.05, 0.1, 0.4)) for _ in range(40)]  # batches differ, for all ranks alike
    slow = [1.3 * s for s in together]
    slow[7] = slow[21] = 0.01  # now and then another one is
    pausing = list(together)
    pausing[20] = 100.0
    rank, slower_by, said = slow_rank_of([pausing, slow, together])
    assert (rank, slower_by) == (1, pytest.approx(0.3))
    assert "Rank 1 on h1 is the slow one: by itself it is 0.77 times as fast as the others (median)." in said


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [
        *((ranks, steps) for ranks in (2, 5) for steps in (2, 5, 9, 17)),
        *((5, 27), (2, 100)),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((2, 27), (5, 100))),
    ],
)
def test_of_ranks_alike_none_is_named_on_a_noisy_machine(ranks, steps):
    rng = random.Random(1)
    noisy = [[[rng.lognormvariate(-5, 0.7) for _ in range(1 + steps)] for _ in range(ranks)] for _ in range(200)]
    named = sum(slow_rank_of(own_s)[0] is not None for own_s in noisy)
    assert named <= 4, "of 200 runs"
    _, _, said = slow_rank_of(noisy[0])
    expected = "No rank stands out: none is busy by itself longer than the others, step by step."
    too_few = f"No rank is named as the slow one: {steps} steps are too few, 9 are needed."
    assert [text for text in said if text.startswith("No rank")] == [too_few if steps < 9 else expected]
    slow = [[2.0] * (1 + steps), *[[1.0] * (1 + steps)] * (ranks - 1)]
    assert slow_rank_of(slow)[0] == (0 if steps >= 9 else None)


def test_a_pause_now_and_then_makes_no_slow_rank():
    pausing = [0.01 + 0.3 * (batch % 5 == 0) for batch in range(40)]
    assert slow_rank_of([[0.01] * 40, pausing])[:2] == (None, 0.0)


def test_a_rank_that_is_always_a_little_slower_is_not_named():
    assert slow_rank_of([[0.100] * 40, [0.104] * 40])[:2] == (None, 0.0)
    assert slow_rank_of([[0.100] * 40, [0.106] * 40])[0] == 1


def test_clocks_drift_evenly_between_two_comparisons():
    one = profile(0, [], clock=[ClockPoint(100.0, 5.0, 0.001), ClockPoint(200.0, 7.0, 0.002)])
    assert [one.on_rank_0(t) for t in (100.0, 150.0, 200.0)] == [105.0, 156.0, 207.0]
    assert profile(0, []).on_rank_0(3.0) == 3.0
    assert combine([one]).clock_error_s == 0.002


def test_a_profile_survives_the_journey_through_plain_types():
    frame = StepFrame(0, 0, 1, 0.0, 0.1, 7)
    records = [record("control", 1, 2, payload=64), record("gradients", 5, 20, payload=10, hidden_ms=5)]
    made = profile(0, [measure_step(frame, records)], clock=[ClockPoint(1.0, 2.0, 0.1)])
    made.timeline = [draw(frame, records)]
    made.add_beside({"evaluation": 5})
    again = RankProfile.from_dict(made.to_dict())
    assert again == made
    assert [span.name for span in again.timeline[0].spans] == ["wait", "hidden", "exposed"]


def test_what_is_drawn_has_the_lengths_that_were_measured():
    frame = StepFrame(4, 4, 1, 0.0, 0.1, 0)
    records = [record("gradients", 20, 40, payload=8, hidden_ms=25), record("lightning", 80, 5)]
    [shown] = aligned([draw(frame, records)], {4: 0.006}, lambda t: t + 1)
    lengths = {span.name: span.end_s - span.start_s for span in shown.spans}
    assert lengths == pytest.approx({"hidden": 0.025, "wait": 0.006, "exposed": 0.009, "lightning": 0.005})
    assert (shown.start_s, shown.end_s) == (1.0, 1.1)
