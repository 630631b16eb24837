import math

import pytest

from miles.core.training.schedule import LearningRate


def test_warm_up_is_linear_from_its_initial_value_to_the_peak():
    rate = LearningRate(peak=1.0, warmup_steps=4, warmup_init=0.2)
    assert [rate.at(n) for n in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_constant_never_decays():
    assert LearningRate(peak=3e-4).at(10**6) == 3e-4


def test_linear_reaches_the_minimum_at_the_end_and_stays_there():
    rate = LearningRate(peak=1.0, style="linear", minimum=0.1, warmup_steps=2, decay_steps=12)
    assert rate.at(2) == 1.0
    assert rate.at(7) == pytest.approx(0.55)
    assert rate.at(12) == rate.at(100) == pytest.approx(0.1)


def test_cosine_is_half_way_at_half_time():
    rate = LearningRate(peak=1.0, style="cosine", minimum=0.2, decay_steps=10)
    assert rate.at(5) == pytest.approx(0.6)
    assert rate.at(10) == pytest.approx(0.2)


def test_inverse_square_root_halves_when_steps_quadruple():
    rate = LearningRate(peak=1.0, style="inverse-square-root", warmup_steps=4, minimum=0.3)
    assert rate.at(4) == 1.0
    assert rate.at(16) == pytest.approx(0.5)
    assert rate.at(10**6) == 0.3


@pytest.mark.parametrize(
    ("style", "half_way"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus_sqrt", 1 - 0.5**0.5)],
)
def test_wsd_holds_the_peak_then_anneals_over_its_last_steps(style, half_way):
    rate = LearningRate(peak=1.0, style="WSD", decay_steps=20, anneal_steps=4, anneal_style=style)
    assert rate.at(16) == 1.0
    assert rate.at(18) == pytest.approx(half_way)
    assert rate.at(20) == 0.0


def test_a_decay_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="linear schedule needs the number of steps"):
        LearningRate(peak=1.0, style="linear").at(1)


def megatrons(schedule, n):
    """Megatron-LM's ``OptimizerParamScheduler``, as its documentation states the formulae."""
    warmup, end, low, high = schedule.warmup_steps, schedule.decay_steps, schedule.minimum, schedule.peak
    if warmup > 0 and n <= warmup:
        return schedule.warmup_init + (high - schedule.warmup_init) * n / warmup
    if schedule.style == "constant":
        return high
    if n > end:
        return low
    if schedule.style == "inverse-square-root":
        return max(low, high * math.sqrt(max(warmup, 1)) / math.sqrt(max(n, 1)))
    share = (n - warmup) / (end - warmup)
    style = schedule.style
    if style == "WSD":
        start = end - schedule.anneal_steps
        share, style = max(0.0, (n - start) / schedule.anneal_steps), schedule.anneal_style
    left = {
        "linear": 1 - share,
        "cosine": 0.5 * (math.cos(math.pi * share) + 1),
        "exponential": 2 * 0.5**share - 1,
        "minus_sqrt": 1 - math.sqrt(share),
    }[style]
    return low + left * (high - low)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
@pytest.mark.parametrize("anneal_style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_rates_are_megatrons(style, anneal_style):
    schedule = LearningRate(
        peak=2.0,
        style=style,
        minimum=0.25,
        warmup_steps=3,
        warmup_init=0.5,
        decay_steps=17,
        anneal_steps=6,
        anneal_style=anneal_style,
    )
    for n in range(25):
        assert schedule.at(n) == pytest.approx(megatrons(schedule, n)), n


def test_schedules_agree_where_they_give_the_same_rates_from_now_on():
    short, long = (LearningRate(peak=1.0, style="linear", decay_steps=steps) for steps in (4, 8))
    assert not short.agrees(long, since=2)
    assert short.agrees(long, since=8)
    held = [LearningRate(peak=1.0, decay_steps=steps) for steps in (4, 8)]
    assert held[0].agrees(held[1], since=0)
    warm = LearningRate(peak=1.0, warmup_steps=3)
    assert not warm.agrees(held[0], since=2)
    assert warm.agrees(held[0], since=3)
