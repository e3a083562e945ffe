"""The fast sweep against one hooked forward pass per component, and identities that must hold."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from circuitune.components import Head, Mlp, all_components
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import (
    direct_effects,
    end_states,
    first_choice,
    noise_floor,
    pair_states,
    unembed,
)
from circuitune.prompts import pad_left, prefill, prefill_pairs, similar_lengths
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
        assert np.abs(table.effect(metric)).max() == 0


def test_results_do_not_depend_on_order_or_batching(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    texts = prompts(9, seed=4, low=4, high=12)
    together = end_states(model, prefill(model, texts))
    order = [3, 1, 8, 0, 2, 7, 6, 5, 4]
    shuffled = end_states(model, prefill(model, [texts[i] for i in order]))
    torch.testing.assert_close(together.z[:, order], shuffled.z, atol=1e-12, rtol=0)
    monkeypatch.setattr("circuitune.prompts.PROMPTS_PER_BATCH", 1)
    alone = end_states(model, prefill(model, texts))
    torch.testing.assert_close(together.final, alone.final, atol=1e-12, rtol=0)


FEW_SHOT = [256, *b"1 + 2 = 3\n2 + 2 = 4\n"]


def few_shot(n: int, seed: int, *, ragged: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Pairs behind one few-shot prefix; each differs in one token near the end."""
    rng = random.Random(seed)
    clean, corrupt = [], []
    for _ in range(n):
        question = [rng.randrange(256) for _ in range(rng.randint(4, 15) if ragged else 12)]
        clean.append([*FEW_SHOT, *question])
        corrupt.append([*FEW_SHOT, *question])
        corrupt[-1][-3] = (corrupt[-1][-3] + 1) % 256
    return clean, corrupt


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("ragged", [False, True])
def test_what_prompts_share_is_computed_once_and_exactly(
    tiny: Callable[..., Model], family: str, ragged: bool
) -> None:
    """A common start, and the tokens of a pair before it differs, change no number."""
    model = tiny(family)
    clean, corrupt = few_shot(7, seed=1, ragged=ragged)
    tokens = []
    embedding = model.hf.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    done = prefill_pairs(model, clean, corrupt)
    handle.remove()
    whole = sum(len(prompt) - 1 for prompt in (*clean, *corrupt))
    assert sum(tokens) < whole / (2 if ragged else 3)
    for some, texts in ((done, [*clean, *corrupt]), (done.first(7), clean)):
        states = end_states(model, some)
        for row, text in enumerate(texts):
            alone = end_states(model, prefill(model, [text]))
            for name in ("z", "attention", "mlp", "entry"):
                shared, own = getattr(states, name)[:, row], getattr(alone, name)[:, 0]
                torch.testing.assert_close(shared, own, atol=1e-12, rtol=1e-9)


def test_prompts_longer_than_a_sliding_window_share_no_start(tiny: Callable[..., Model]) -> None:
    """Padding behind the start would move the window; so it is not shared, and nothing changes."""
    model = tiny("mistral", sliding_window=9)
    clean, corrupt = few_shot(5, seed=2, ragged=True)
    logits = unembed(model, end_states(model, prefill_pairs(model, clean, corrupt)).final)
    for row, text in enumerate([*clean, *corrupt]):
        plain = model.hf(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(logits[row], plain, atol=1e-9, rtol=0)


def test_running_end_leaves_the_cache_as_it_was(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    done = prefill(model, prompts(3, seed=1))
    states = end_states(model, done)
    assert torch.equal(states.final, end_states(model, done).final)
    with pytest.raises(RuntimeError, match="size"):
        end_states(model, done, edits={Head(1, 0): torch.zeros(3)})  # a head has 8 numbers
    assert torch.equal(states.final, end_states(model, done).final)


def test_results_do_not_depend_on_threads_or_the_tokenizers_padding_side(
    tiny: Callable[..., Model],
) -> None:
    model = tiny("llama")
    model.hf.float()
    clean, corrupt = few_shot(6, seed=3, ragged=True)
    found, before = [], torch.get_num_threads()
    try:
        for threads, side in ((1, "left"), (2, "right")):
            torch.set_num_threads(threads)
            model.tokenizer.padding_side = side
            states = pair_states(model, prefill_pairs(model, clean, corrupt))
            answers = np.zeros(6, dtype=int)
            table = direct_effects(model, *states, candidates=CANDIDATES, answers=answers)
            found.append(table.effect())
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(*found, atol=1e-5, rtol=0)


def test_the_noise_floor_is_far_below_the_effects(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    clean, corrupt = few_shot(4, seed=4, ragged=True)
    states = pair_states(model, prefill_pairs(model, clean, corrupt))
    keywords = {"candidates": CANDIDATES, "answers": np.zeros(4, dtype=int)}
    floor = noise_floor(model, states[0], **keywords)
    table = direct_effects(model, *states, **keywords)
    for metric, values in floor.items():
        assert values.shape == (model.layers,)
        assert values.max() < 1e-9 * np.abs(table.effect(metric)).max()


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
    groups = similar_lengths(lengths, 3, tokens=150)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(len(group) <= 3 for group in groups)
    assert max(max(lengths[i] for i in group) * len(group) for group in groups) <= 150
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


def test_states_that_are_not_finite_are_refused(tiny: Callable[..., Model]) -> None:
    model = tiny()
    for value in (math.nan, math.inf):
        states = torch.zeros(3, model.d_model, dtype=model.dtype)
        states[1, 2] = value
        with pytest.raises(UserError, match="Hidden states must be finite, those of tiny llama"):
            first_choice(model, states)
