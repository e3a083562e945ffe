"""Locating finds what was planted, and its intervals are honest about what was not."""

import numpy as np
import pytest

from circuitune.components import Head
from circuitune.effects import EffectTable
from circuitune.patching import direct_effects, end_states, prefill
from circuitune.stats import benjamini_hochberg, sign_flip_p
from tests.planted import CARRIERS, Planted, build

SEEDS = range(20)


def effects_of(planted: Planted) -> EffectTable:
    """Direct effects of every head of a planted model."""
    model = planted.model
    table = direct_effects(
        model,
        end_states(model, prefill(model, planted.clean)),
        end_states(model, prefill(model, planted.corrupt)),
        candidates=CARRIERS,
        answers=planted.answers,
    )
    return table.select([part for part in table.components if isinstance(part, Head)])


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_heads_rank_first_with_intervals_clear_of_zero(seed: int) -> None:
    planted = build(seed)
    table = effects_of(planted)
    assert set(table.rank()[:2]) == set(planted.heads)  # so AUROC is 1
    intervals = table.intervals(rng=np.random.default_rng(seed))
    for part, interval in zip(table.components, intervals, strict=True):
        if part in planted.heads:
            assert interval.high < 0


def test_null_heads_are_covered_at_the_nominal_rate() -> None:
    """120 null heads over 20 models: zero lies in about 95 % of their intervals."""
    covered, rejected, tested = 0, 0, 0
    for seed in SEEDS:
        planted = build(seed)
        table = effects_of(planted)
        assert np.abs(table.effect()).mean() > 1e-3  # null effects are not trivially zero
        null = [part for part in table.components if part not in planted.heads]
        rng = np.random.default_rng(seed)
        intervals = table.select(null).intervals(rng=rng)
        covered += sum(not interval.excludes(0.0) for interval in intervals)
        tested += len(null)
        adjusted = benjamini_hochberg(sign_flip_p(table.effect(), rng=rng))
        rejected += sum(
            p <= 0.05 and part not in planted.heads
            for part, p in zip(table.components, adjusted, strict=True)
        )
    # 95 % of 120 is 114; below 105 has probability under 1e-3 if the coverage is nominal.
    assert covered >= 105
    assert rejected / tested <= 0.08
