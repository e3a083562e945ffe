"""Gradient estimates against the exact sweep: equal for small changes, near on a real model."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitune.attribution import agreement, attribute
from circuitune.components import Head, Mlp, all_components
from circuitune.effects import METRICS, EffectTable
from circuitune.errors import UserError
from circuitune.families import FAMILIES
from circuitune.models import Model
from circuitune.patching import EndStates, direct_effects, end_states, prefill
from tests.planted import CARRIERS, build

CANDIDATES = list(range(16, 26))
ANSWERS = np.array([3, 0, 9, 3, 7])
ASKED = {"candidates": CANDIDATES, "answers": ANSWERS}
# One of each kind of block: sequential, with biases, with post-norms and q/k norm, parallel,
# and an MLP that sees batch and token as one axis.
KINDS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {},
    "gpt_neox": {},
    "opt": {"activation_function": "gelu"},  # its own has a kink, and there no slope
}


def states(model: Model, seed: int, last: int = 9) -> EndStates:
    """States at END of random prompts with a common last token."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(size)] + [last] for size in (4, 7, 5, 8, 4)]
    return end_states(model, prefill(model, prompts))


def nearer(clean: EndStates, corrupt: EndStates, share: float) -> EndStates:
    """Corrupt outputs moved towards the clean ones until ``share`` of the difference is left."""
    return replace(
        corrupt,
        z=torch.lerp(clean.z, corrupt.z, share),
        mlp=torch.lerp(clean.mlp, corrupt.mlp, share),
    )


@pytest.mark.parametrize("family", [name for name in KINDS if name in FAMILIES])
def test_estimates_meet_the_exact_effects_of_small_changes(
    tiny: Callable[..., Model], family: str
) -> None:
    """Of a small step to corrupt and one as long the other way, so that curvature cancels."""
    model = tiny(family, **KINDS[family])
    clean, corrupt = states(model, 1), states(model, 2, last=8)
    step = 3e-3  # norms compute in float32 whatever the model's type: much less would be noise
    forth, back = (nearer(clean, corrupt, share) for share in (step, -step))
    ahead, behind = (direct_effects(model, clean, near, **ASKED) for near in (forth, back))
    for metric in METRICS:
        estimate = attribute(model, clean, forth, metric=metric, **ASKED)
        assert estimate.components == ahead.components
        assert list(estimate.patched) == [metric]
        np.testing.assert_array_equal(estimate.clean[metric], ahead.clean[metric])
        exact = (ahead.effect(metric) - behind.effect(metric)) / 2
        scale = np.abs(exact).max(axis=1, keepdims=True)  # of each component
        assert (scale > 1e-6).all()
        assert (np.abs(estimate.effect(metric) - exact) < 0.01 * scale).all()


def test_estimates_differ_from_the_exact_effects_of_large_changes(
    tiny: Callable[..., Model],
) -> None:
    """The replay is not linear, so the slope test has something to find."""
    model = tiny("llama")
    clean, corrupt = states(model, 1), states(model, 2)
    exact = direct_effects(model, clean, corrupt, **ASKED)
    found = agreement(attribute(model, clean, corrupt, **ASKED), exact)
    assert found.largest_error > 0.05
    assert found.rank_correlation > 0.5


def test_nothing_changes_nothing(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    clean = states(model, 1)
    table = attribute(model, clean, clean, **ASKED)
    np.testing.assert_array_equal(table.effect(), 0)


def test_a_head_that_supports_the_answer_is_negative() -> None:
    planted = build(5)
    model = planted.model
    table = attribute(
        model,
        end_states(model, prefill(model, planted.clean)),
        end_states(model, prefill(model, planted.corrupt)),
        candidates=CARRIERS,
        answers=planted.answers,
    )
    assert set(table.rank()[:2]) == set(planted.heads)
    assert (table.select(planted.heads).mean() < -0.1).all()


def test_the_joint_line_adds_up_to_the_whole_change(tiny: Callable[..., Model]) -> None:
    """The completeness of integrated gradients; heads alone, since the last token is the same."""
    model = tiny("llama")
    clean, corrupt = states(model, 1), states(model, 2)
    heads = [part for part in all_components(model.layers, model.heads) if isinstance(part, Head)]
    other = direct_effects(model, corrupt, corrupt, senders=[Mlp(0)], **ASKED)
    gaps = {}
    for steps in (1, 4, 64):
        table = attribute(model, clean, corrupt, steps=steps, **ASKED)
        whole = other.clean["logit_diff"] - table.clean["logit_diff"]
        gaps[steps] = np.abs(table.select(heads).effect().sum(axis=0) - whole).max()
    assert gaps[64] < 1e-3 * np.abs(whole).max()
    assert gaps[64] < gaps[4] < gaps[1]


@pytest.mark.parametrize("steps", [1, 3])
def test_order_and_batching_change_nothing(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    model = tiny("qwen2")
    clean, corrupt = states(model, 1), states(model, 2)
    whole = attribute(model, clean, corrupt, steps=steps, **ASKED)
    monkeypatch.setattr("circuitune.attribution.EXAMPLES_PER_PASS", 2)
    order = [4, 1, 0, 3, 2]

    def shuffled(own: EndStates) -> EndStates:
        parts = {name: getattr(own, name)[:, order] for name in ("z", "attention", "mlp", "entry")}
        return replace(own, **parts, final=own.final[order])

    part = attribute(
        model,
        *(shuffled(own) for own in (clean, corrupt)),
        candidates=CANDIDATES,
        answers=ANSWERS[order],
        steps=steps,
    )
    np.testing.assert_allclose(part.effect(), whole.effect()[:, order], atol=1e-12)


def test_the_model_is_left_as_it_was(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    flags = {name: "mlp" in name for name, _ in model.hf.named_parameters()}
    for name, parameter in model.hf.named_parameters():
        parameter.requires_grad_(flags[name])
    clean, corrupt = states(model, 1), states(model, 2)
    with torch.no_grad():
        table = attribute(model, clean, corrupt, **ASKED)
        assert not torch.is_grad_enabled()
    assert np.abs(table.effect()).max() > 0.1
    for name, parameter in model.hf.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[name]
    assert all("forward" not in vars(module) for module in model.hf.modules())
    assert not clean.z.requires_grad


def test_steps_must_be_positive(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    clean = states(model, 1)
    with pytest.raises(UserError, match="at least one step, found 0"):
        attribute(model, clean, clean, steps=0, **ASKED)


def table_of(means: dict[Head, float]) -> EffectTable:
    """A table with one example and a clean value of zero."""
    patched = {"logit_diff": np.array([[mean] for mean in means.values()])}
    return EffectTable(tuple(means), {"logit_diff": np.zeros(1)}, patched)


def test_agreement_by_hand() -> None:
    a, b, c, d = (Head(0, index) for index in range(4))
    exact = table_of({a: -4.0, b: -3.0, c: -2.0, d: -1.0})
    estimate = table_of({d: -0.5, b: -9.0, a: -4.0, c: -2.0})  # b before a
    found = agreement(estimate, exact, top=1)
    assert found.overlap == 0
    assert agreement(estimate, exact, top=2).overlap == 1
    assert found.largest_error == 6
    assert found.rank_correlation == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert agreement(exact, exact).top == 4
    with pytest.raises(UserError, match="the same components, found 3 and 4 with 3 in common"):
        agreement(table_of({a: 0.0, b: 0.0, c: 0.0}), exact)


def test_real_model_estimates_screen_well(smollm2: Model) -> None:
    """Bounds below what was measured on these six prompts (in brackets)."""
    sums = [(3, 5), (2, 6), (4, 1), (1, 7), (5, 4), (2, 3)]
    both = [
        prefill(
            smollm2,
            [smollm2.tokenizer(f"Math:\n{a} {sign} {b} = ").input_ids for a, b in sums],
        )
        for sign in "+@"
    ]
    clean, corrupt = (end_states(smollm2, prompts) for prompts in both)
    asked = {
        "candidates": [smollm2.tokenizer(str(digit)).input_ids[0] for digit in range(10)],
        "answers": np.array([a + b for a, b in sums]),
    }
    exact = direct_effects(smollm2, clean, corrupt, **asked)
    estimate = attribute(smollm2, clean, corrupt, **asked)
    heads = [part for part in exact.components if isinstance(part, Head)]
    among_heads = agreement(estimate.select(heads), exact.select(heads))
    assert among_heads.rank_correlation > 0.9, among_heads  # [0.946]
    assert among_heads.overlap >= 9 / 13, among_heads  # [10 / 13]
    among_all = agreement(estimate, exact)
    assert among_all.rank_correlation > 0.85, among_all  # [0.907]
    assert among_all.overlap >= 6 / 13, among_all  # [8 / 13]
    # A slope misses how the MLPs and norms bend: it is no replacement for the exact sweep.
    assert among_all.largest_error > 0.5, among_all  # [2.55]
