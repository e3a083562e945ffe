"""The fast sweep against one hooked forward pass per component, and identities that must hold."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from circuitune.components import Head, Mlp, all_components
from circuitune.models import Model
from circuitune.patching import (
    direct_effects,
    end_states,
    pad_left,
    prefill,
    similar_lengths,
    unembed,
)
from tests.reference.slow_effects import run_with, slow_patched_logits

FAMILIES = ["llama", "mistral", "qwen2"]
CANDIDATES = list(range(16, 26))


def prompts(n: int, seed: int, low: int = 5, high: int = 9) -> list[list[int]]:
    """Random token lists of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(low, high))] for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_fast_sweep_equals_one_forward_per_component(
    tiny: Callable[..., Model], family: str, kv_heads: int
) -> None:
    model = tiny(family, num_key_value_heads=kv_heads)
    clean, corrupt = prompts(5, seed=1), prompts(5, seed=2)
    answers = np.arange(5) % len(CANDIDATES)
    table = direct_effects(
        model,
        end_states(model, prefill(model, clean)),
        end_states(model, prefill(model, corrupt)),
        candidates=CANDIDATES,
        answers=answers,
    )
    assert table.components == all_components(model.layers, model.heads)
    for example, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        slow = slow_patched_logits(model, one, other, table.components, CANDIDATES)
        fast = table.patched["relative_logit"][:, example]
        np.testing.assert_allclose(fast, slow[:, answers[example]], atol=1e-9, rtol=0)


def test_patching_moves_the_answer(tiny: Callable[..., Model]) -> None:
    """The reference is not vacuous: effects are far above the tolerance."""
    model = tiny("llama")
    clean = end_states(model, prefill(model, prompts(4, seed=1)))
    corrupt = end_states(model, prefill(model, prompts(4, seed=2)))
    table = direct_effects(
        model, clean, corrupt, candidates=CANDIDATES, answers=np.zeros(4, dtype=int)
    )
    assert (np.abs(table.effect("logit_diff")).mean(axis=1) > 1e-3).all()


def test_patching_clean_into_clean_is_exactly_nothing(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    clean = end_states(model, prefill(model, prompts(6, seed=3)))
    table = direct_effects(
        model, clean, clean, candidates=CANDIDATES, answers=np.zeros(6, dtype=int)
    )
    for metric in table.patched:
        assert np.abs(table.effect(metric)).max() < 1e-12


def test_results_do_not_depend_on_order_or_batching(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    texts = prompts(9, seed=4, low=4, high=12)
    together = end_states(model, prefill(model, texts))
    order = [3, 1, 8, 0, 2, 7, 6, 5, 4]
    shuffled = end_states(model, prefill(model, [texts[i] for i in order]))
    torch.testing.assert_close(together.z[:, order], shuffled.z, atol=1e-12, rtol=0)
    monkeypatch.setattr("circuitune.patching.PROMPTS_PER_BATCH", 1)
    alone = end_states(model, prefill(model, texts))
    torch.testing.assert_close(together.final, alone.final, atol=1e-12, rtol=0)


def test_end_states_equal_a_plain_forward(tiny: Callable[..., Model]) -> None:
    model = tiny("qwen2")
    texts = [*prompts(5, seed=5, low=2, high=11), [7]]
    states = end_states(model, prefill(model, texts))
    logits = unembed(model, states.final)
    for row, tokens in enumerate(texts):
        plain = model.hf(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(logits[row], plain, atol=1e-12, rtol=0)


def test_ablation_at_end_equals_hooks_on_a_full_forward(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    texts = prompts(4, seed=6)
    head, mlp = Head(1, 2), Mlp(2)
    edits = {head: torch.randn(8).double(), mlp: torch.randn(24).double()}
    states = end_states(model, prefill(model, texts), edits=edits)
    for row, tokens in enumerate(texts):
        _, z, _ = run_with(model, tokens, {}, {})
        z_new = z[1].clone()
        z_new[16:24] = edits[head]
        plain, _, _ = run_with(model, tokens, {1: z_new}, {2: edits[mlp]})
        logits = unembed(model, states.final[row : row + 1], CANDIDATES)[0]
        torch.testing.assert_close(logits, plain[CANDIDATES], atol=1e-12, rtol=0)


def test_senders_can_be_a_subset_in_any_order(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    clean = end_states(model, prefill(model, prompts(3, seed=1)))
    corrupt = end_states(model, prefill(model, prompts(3, seed=2)))
    keywords = {"candidates": CANDIDATES, "answers": np.zeros(3, dtype=int)}
    whole = direct_effects(model, clean, corrupt, **keywords)
    some = [Mlp(2), Head(0, 1), Head(3, 3), Mlp(0)]
    part = direct_effects(model, clean, corrupt, senders=some, **keywords)
    assert part.components == tuple(some)
    np.testing.assert_allclose(part.effect(), whole.select(some).effect(), atol=1e-12)


def test_similar_lengths_covers_every_place_once() -> None:
    lengths = [3, 50, 4, 4, 90, 5, 7, 120, 3]
    groups = similar_lengths(lengths, 3)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(len(group) <= 3 for group in groups)
    for group in groups:
        inside = [lengths[place] for place in group]
        assert max(inside) <= 2 * min(inside)


def test_pad_left_puts_end_last() -> None:
    tokens, mask = pad_left([[1, 2, 3], [4]])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_real_model_fast_equals_slow(smollm2: Model) -> None:
    """20 random components of SmolLM2 within 1e-4 logits."""
    texts = [(f"Math:\n{a} + {b} = ", f"Math:\n{a} @ {b} = ") for a, b in ((3, 5), (2, 6), (4, 1))]
    clean, corrupt = (
        [smollm2.tokenizer(pair[side]).input_ids for pair in texts] for side in (0, 1)
    )
    digits = [smollm2.tokenizer(str(digit)).input_ids[0] for digit in range(10)]
    senders = random.Random(0).sample(all_components(smollm2.layers, smollm2.heads), 20)
    answers = np.array([8, 8, 5])
    table = direct_effects(
        smollm2,
        end_states(smollm2, prefill(smollm2, clean)),
        end_states(smollm2, prefill(smollm2, corrupt)),
        candidates=digits,
        answers=answers,
        senders=senders,
    )
    for example in range(3):
        rows = range(example, len(senders), 3)
        some = [senders[row] for row in rows]
        slow = slow_patched_logits(smollm2, clean[example], corrupt[example], some, digits)
        fast = table.patched["relative_logit"][list(rows), example]
        np.testing.assert_allclose(fast, slow[:, answers[example]], atol=1e-4, rtol=0)
