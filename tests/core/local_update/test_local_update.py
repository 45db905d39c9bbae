"""The period rules against exact arithmetic, and the clock against its promises."""

import dataclasses
import itertools
import math
import pickle
from fractions import Fraction

import pytest

from lightning_comm.core.local_update import ENDLESS, FixedPeriod, PeriodRule, PowerPeriod, QuadraticPeriod, RoundClock


def exact_period(alpha_milli: int, lr_milli: int, floor_steps: int, exponent: int = 2) -> int:
    """The rule in rational numbers: an oracle that shares neither code nor rounding with ours."""
    return max(floor_steps, math.floor(Fraction(alpha_milli, lr_milli) ** exponent))


def cosine_with_warmup(total: int, warmup: int, peak: float, final: float = 1e-6):
    def lr(step: int) -> float:
        if step < warmup:
            return final + step * (peak - final) / warmup
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return lr


def run(clock: RoundClock, lr, until: int) -> list[int]:
    """Steps at which rounds ended."""
    ends = []
    while clock.steps_done < until:
        if not clock.in_round:
            clock.begin(clock.decide(lr(clock.steps_done)))
        if clock.tick():
            ends.append(clock.steps_done)
    return ends


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_period_is_exact_on_a_grid_of_decimal_rates(exponent):
    for alpha, lr in itertools.product(range(1, 1001, 7), range(1, 401, 3)):
        rule = PowerPeriod(alpha=alpha / 1000, exponent=exponent, h_base=4)
        expected = exact_period(alpha, lr, 4, exponent)
        assert rule.period_steps(lr=lr / 1000, step=0) == expected, f"alpha={alpha}e-3 lr={lr}e-3"


def test_the_quadratic_rule_is_the_power_rule_with_exponent_two():
    for lr in (0.4, 0.1, 0.013, 1e-5):
        power = PowerPeriod(alpha=0.2, exponent=2.0, h_base=3, h_max=900)
        assert QuadraticPeriod(alpha=0.2, h_base=3, h_max=900).period_steps(lr=lr, step=0) == power.period_steps(
            lr=lr, step=0
        )


def test_a_square_within_rounding_of_a_whole_number_counts_as_it():
    assert (0.3 / 0.1) ** 2 < 9  # or the next line would prove nothing
    assert QuadraticPeriod(alpha=0.3, h_base=1).period_steps(lr=0.1, step=0) == 9
    assert (0.2 / (0.8 * 0.1**2)) ** 2 < 625
    assert QuadraticPeriod(alpha=0.2, h_base=2).period_steps(lr=0.8 * 0.1**2, step=0) == 625


@pytest.mark.parametrize(
    ("alpha", "h_base", "lr", "steps"),
    [
        (0.0175, 4, 0.008, 4),
        (0.0175, 4, 0.0078, 5),
        (0.0175, 4, 0.004, 19),
        (0.0175, 4, 0.002, 76),
        (0.0175, 4, 0.001, 306),
        (0.0175, 4, 0.0001, 30625),
        (0.2, 2, 0.8, 2),
        (0.2, 2, 0.08, 6),
        (0.2, 2, 0.008, 625),
    ],
)
def test_published_settings_give_the_known_periods(alpha, h_base, lr, steps):
    assert QuadraticPeriod(alpha=alpha, h_base=h_base).period_steps(lr=lr, step=0) == steps


def test_a_falling_rate_never_shortens_the_period():
    rule = QuadraticPeriod(alpha=0.0175, h_base=2)
    periods = [rule.period_steps(lr=0.1 * 0.97**k, step=k) for k in range(200)]
    assert periods == sorted(periods)
    # Both regimes must be visited, or the line above proves nothing.
    assert periods[0] == rule.h_base
    assert periods[-1] > 1000


def test_alpha_zero_is_a_constant_period_at_every_rate():
    rule = QuadraticPeriod(alpha=0.0, h_base=7)
    assert {rule.period_steps(lr=lr, step=0) for lr in (0.0, 1e-9, 0.1, 5.0)} == {7}


def test_h_max_caps_the_period_and_a_tiny_rate_does_not_overflow():
    assert QuadraticPeriod(alpha=0.1, h_base=2, h_max=50).period_steps(lr=1e-300, step=0) == 50
    assert QuadraticPeriod(alpha=0.1, h_base=2, h_max=50).period_steps(lr=0.0, step=0) == 50
    assert QuadraticPeriod(alpha=0.1, h_base=2).period_steps(lr=1e-300, step=0) == ENDLESS


# ViT-B with Local AdamW (93,600 steps), ResNet-152 with Local SGD (62,400), ViT-B at batch 16384 (23,400).
@pytest.mark.parametrize(
    ("total", "warmup", "peak", "alpha", "h_base", "rounds", "last_start"),
    [
        (93_600, 10_000, 0.008, 0.0175, 4, 9_711, 85_458),
        (93_600, 10_000, 0.008, 0.0175, 8, 6_461, None),
        (62_400, 1_560, 0.8, 0.2, 2, 24_792, None),
        (62_400, 1_560, 0.8, 0.25, 4, 12_539, None),
        (23_400, 2_500, 0.016, 0.0175, 4, 3_771, None),
    ],
)
@pytest.mark.parametrize("warmup_given", [False, True], ids=["auto", "given"])
def test_published_schedules_synchronise_the_known_number_of_times(
    total, warmup, peak, alpha, h_base, rounds, last_start, warmup_given
):
    clock = RoundClock(
        QuadraticPeriod(alpha=alpha, h_base=h_base), total, warmup_steps=warmup if warmup_given else "auto"
    )
    ends = run(clock, cosine_with_warmup(total, warmup, peak), total)
    assert len(ends) == rounds
    assert ends[-1] == total
    if last_start is not None:
        assert ends[-2] == last_start
        assert ends[-1] - ends[-2] == 8_142


@pytest.mark.parametrize("total_steps", [1, 7, 8, 100])
def test_every_step_is_in_one_round_and_the_run_ends_averaged(total_steps):
    clock = RoundClock(rule=QuadraticPeriod(alpha=0.05, h_base=2), total_steps=total_steps)
    assert run(clock, lambda step: 0.02 * 0.98**step, total_steps)[-1] == total_steps


@pytest.mark.parametrize("stop_at", range(1, 60, 3))
def test_a_resumed_clock_averages_on_the_same_steps(stop_at):
    lr = cosine_with_warmup(60, 10, 0.04)

    def new() -> RoundClock:
        return RoundClock(rule=QuadraticPeriod(alpha=0.05, h_base=3), total_steps=60)

    expected = run(new(), lr, 60)
    first, second = new(), new()
    head = run(first, lr, stop_at)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert head + run(second, lr, 60) == expected
    assert len({b - a for a, b in itertools.pairwise(expected)}) > 2  # the period does change


def test_auto_warmup_holds_the_floor_while_rounds_start_at_ever_higher_rates():
    clock = RoundClock(QuadraticPeriod(alpha=1.0, h_base=2), total_steps=None)
    rates = [0.1, 0.2, 0.3, 0.3, 0.25, 0.4, 0.2]
    lengths = []
    for rate in rates:
        steps = clock.decide(rate)
        clock.begin(steps)
        lengths.append(steps)
        while not clock.tick():
            pass
    assert lengths == [2, 2, 2, 11, 16, 2, 25]


def test_a_restart_of_the_schedule_shortens_the_period_again():
    clock = RoundClock(QuadraticPeriod(alpha=0.2, h_base=2), total_steps=None)
    lengths = []
    for rate in (0.1, 0.02, 0.1, 0.02):
        lengths.append(clock.decide(rate))
        clock.begin(lengths[-1])
        while not clock.tick():
            pass
    assert lengths == [2, 100, 4, 100]


def test_a_given_warmup_is_counted_in_steps_and_its_last_round_is_not_cut():
    clock = RoundClock(QuadraticPeriod(alpha=0.1, h_base=4), total_steps=100, warmup_steps=6)
    assert run(clock, lambda step: 0.01, 100)[:2] == [4, 8]
    assert RoundClock(QuadraticPeriod(alpha=0.1, h_base=4), 200, warmup_steps=0).decide(0.01) == 100


def test_a_fixed_period_has_no_warmup():
    clock = RoundClock(FixedPeriod(3), total_steps=7)
    assert run(clock, lambda step: step + 1.0, 7) == [3, 6, 7]


def test_a_rate_of_zero_lasts_to_the_end_of_the_run_or_to_h_max():
    known = RoundClock(rule=QuadraticPeriod(alpha=0.05), total_steps=50, warmup_steps=0)
    assert known.decide(0.0) == 50
    capped = RoundClock(rule=QuadraticPeriod(alpha=0.05, h_max=20), warmup_steps=0)
    assert capped.decide(0.0) == 20


def test_a_round_without_end_is_refused_where_the_end_is_unknown():
    clock = RoundClock(rule=QuadraticPeriod(alpha=0.05), warmup_steps=0)
    with pytest.raises(ValueError, match=r"without end.*h_max.*max_steps"):
        clock.decide(0.0)


def test_steps_beyond_the_end_of_a_round_still_report_it_over():
    clock = RoundClock(FixedPeriod(2))
    clock.begin(clock.decide(0.1))
    assert [clock.tick() for _ in range(3)] == [False, True, True]
    clock.begin(clock.decide(0.1))
    assert clock.round_ends_at == 5


def test_a_round_that_is_ended_early_leaves_the_next_one_whole():
    clock = RoundClock(FixedPeriod(8), total_steps=20)
    clock.begin(clock.decide(0.1))
    for _ in range(3):
        clock.tick()
    clock.end_round()
    assert not clock.in_round
    assert clock.steps_into_round == 0
    assert run(clock, lambda step: 0.1, 20) == [11, 19, 20]


def test_auto_takes_the_authors_ratio_for_the_family_and_the_peak():
    assert QuadraticPeriod().resolve(family="adam", peak_lr=0.008) == QuadraticPeriod(alpha=2.19 * 0.008)
    assert QuadraticPeriod(h_base=2).resolve(family="sgd", peak_lr=0.8).alpha == pytest.approx(0.2)
    assert QuadraticPeriod(h_base=4).resolve(family="sgd", peak_lr=0.8).alpha == pytest.approx(0.31 * 0.8)
    between = [QuadraticPeriod(h_base=h).resolve(family="sgd", peak_lr=1.0).alpha for h in (1, 2, 3, 4, 8)]
    assert between == sorted(between)


def test_a_number_is_not_changed_by_resolving():
    rule = QuadraticPeriod(alpha=0.1)
    assert rule.resolve(family="sgd", peak_lr=1.0) is rule


def test_a_rule_that_was_never_resolved_raises_when_asked():
    with pytest.raises(RuntimeError, match=r"`alpha` is still 'auto'.*resolve"):
        QuadraticPeriod().period_steps(lr=0.1, step=0)


def test_rules_are_frozen_values():
    rule = QuadraticPeriod(alpha=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.alpha = 0.2
    assert rule == QuadraticPeriod(alpha=0.1)
    assert hash(rule) == hash(QuadraticPeriod(alpha=0.1))
    assert pickle.loads(pickle.dumps(rule)) == rule


@dataclasses.dataclass(frozen=True)
class _Odd(PeriodRule):
    answer: object

    def period_steps(self, *, lr, step):
        return self.answer


@pytest.mark.parametrize("answer", [0, -1, 2.5, float("nan"), "4", None])
def test_a_rule_of_ones_own_that_answers_nonsense_is_named(answer):
    with pytest.raises(ValueError, match="_Odd: a period must be a whole number of at least 1") as caught:
        RoundClock(_Odd(answer)).decide(0.1)
    assert f"got {answer!r} at step 0" in str(caught.value)


@pytest.mark.parametrize(
    ("build", "must_say"),
    [
        (lambda: QuadraticPeriod(alpha=-0.2), ["QuadraticPeriod", "alpha", "-0.2", ">= 0", "constant period"]),
        (lambda: QuadraticPeriod(alpha=float("nan")), ["alpha", "nan"]),
        (lambda: QuadraticPeriod(alpha="atuo"), ["alpha", "'atuo'", "auto"]),
        (lambda: QuadraticPeriod(alpha=True), ["alpha", "True"]),
        (lambda: QuadraticPeriod(alpha=0.1, h_base=0), ["h_base", "got 0", "optimizer steps"]),
        (lambda: QuadraticPeriod(alpha=0.1, h_base=-3), ["h_base", "-3"]),
        (lambda: QuadraticPeriod(alpha=0.1, h_base="4"), ["h_base", "'4'", "whole number"]),
        (lambda: QuadraticPeriod(alpha=0.1, h_base=float("nan")), ["h_base", "nan"]),
        (lambda: QuadraticPeriod(alpha=0.1, h_base=8, h_max=4), ["h_max", "got 4", "h_base`=8", "None"]),
        (lambda: QuadraticPeriod(alpha=0.1, h_max=0.5), ["h_max", "0.5"]),
        (lambda: PowerPeriod(alpha="x", exponent=2, h_base=2), ["PowerPeriod", "alpha", "'x'"]),
        (lambda: PowerPeriod(alpha=0.1, exponent=0, h_base=2), ["exponent", "got 0", "> 0"]),
        (lambda: FixedPeriod(0), ["FixedPeriod", "steps", "got 0", ">= 1"]),
        (lambda: FixedPeriod("8"), ["steps", "'8'"]),
        (lambda: RoundClock(FixedPeriod(1), total_steps=0), ["total_steps", "got 0", "None"]),
        (lambda: RoundClock(FixedPeriod(1), warmup_steps=-1), ["warmup_steps", "-1", "auto"]),
        (lambda: RoundClock(FixedPeriod(1), warmup_steps="atuo"), ["warmup_steps", "'atuo'", "auto"]),
        (lambda: RoundClock(FixedPeriod(1)).begin(0), ["round", "got 0"]),
        (lambda: QuadraticPeriod(alpha=0.1).period_steps(lr=-1.0, step=3), ["learning rate", "-1.0", "step 3"]),
        (lambda: QuadraticPeriod(alpha=0.1).period_steps(lr=float("inf"), step=3), ["inf", "finite"]),
        (lambda: QuadraticPeriod().resolve(family="adm", peak_lr=0.1), ["'adm'", "'adam'", "'sgd'", "number"]),
        (lambda: QuadraticPeriod().resolve(family="adam", peak_lr=0.0), ["peak", "0.0", "> 0"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(build, must_say):
    with pytest.raises(ValueError, match=":") as caught:
        build()
    assert [word for word in must_say if word not in str(caught.value)] == []
