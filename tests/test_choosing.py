"""Scores of choices against one whole forward pass each; what an ablation must and must not do."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuitune.choosing import (
    Means,
    Scores,
    compare,
    mean_outputs,
    prepare,
    score,
    tokenised,
)
from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.readers import MultipleChoice
from tests.reference.slow_choosing import slow_log_prob, slow_means

WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "mistral, windows": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "gemma3, windows": ("gemma3_text", WINDOWS),
    "gpt2": ("gpt2", {}),
    "gptj": ("gptj", {}),
    "neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "phi": ("phi", {"pad_token_id": 0}),
    "falcon, alibi": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}),
}
# Models are float64, but some families turn positions into float32 angles.
SAME = 1e-6
HEADS = [Head(3, 1), Head(1, 0), Head(1, 2)]
# Of one, two and more tokens under `merging_tokenizer`.
TEXTS = (" a", " b", " ac", " bb", " bac", " cabab")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, but for `` a``, `` b`` and ``:A``, which are one token each."""
    vocab = {
        symbol: place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    merges = [("Ġ", "a"), ("Ġ", "b"), (":", "A")]
    vocab |= {"".join(merge): 256 + place for place, merge in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def questions(n: int, seed: int, *, start: str = "") -> list[MultipleChoice]:
    """Random questions, their prompts of 1 to 14 letters behind a common start."""
    rng = random.Random(seed)
    found = []
    for place in range(n):
        prompt = start + "".join(rng.choice("defgh") for _ in range(rng.randint(1, 14)))
        choices = tuple(rng.sample(TEXTS, rng.randint(2, 5)))
        found.append(MultipleChoice(f"q{place}", prompt, choices, rng.randrange(len(choices))))
    return found


@pytest.fixture
def make(tiny: Callable[..., Model]) -> Callable[..., Model]:
    """Tiny models with `merging_tokenizer`."""

    def wrapped(family: str = "llama", **options: object) -> Model:
        return replace(tiny(family, vocab_size=260, **options), tokenizer=merging_tokenizer())

    return wrapped


# With a common start, which runs once, and without one.
STARTS = [(case, "once told ") for case in CASES] + [(case, "") for case in ("llama", "opt")]


@pytest.mark.parametrize(("case", "start"), STARTS)
def test_scores_equal_one_whole_forward_per_choice(
    make: Callable[..., Model], case: str, start: str
) -> None:
    family, options = CASES[case]
    model = make(family, **options)
    asked = questions(6, seed=1, start=start)
    prepared = prepare(model, asked)
    prompts, choices = prepared.tokens.prompts, prepared.tokens.choices
    means = mean_outputs(model, prepared, HEADS)
    for head, (end, later) in slow_means(model, prompts, choices, HEADS).items():
        torch.testing.assert_close(means.end[head], end, atol=SAME, rtol=0)
        torch.testing.assert_close(means.later[head], later, atol=SAME, rtol=0)
    for heads in ([], HEADS):
        fast = score(model, prepared, heads, means)
        given = [{head: part[head] for head in heads} for part in (means.end, means.later)]
        for place, (prompt, texts) in enumerate(zip(prompts, choices, strict=True)):
            slow = [slow_log_prob(model, prompt, choice, *given) for choice in texts]
            np.testing.assert_allclose(fast.log_probs[place], slow, atol=SAME, rtol=0)


def test_a_window_that_only_choices_exceed_counts_no_padding(make: Callable[..., Model]) -> None:
    """Prompts of two lengths behind a common start, all within the window but for the choices."""
    model = make("mistral", sliding_window=14)
    texts = (" a", " cabab")
    asked = [
        MultipleChoice(end, "once told " + end, texts, 0) for end in ("de", "ed", "defg", "gfed")
    ]
    prepared = prepare(model, asked)
    assert max(map(len, prepared.tokens.prompts)) == 14
    fast = score(model, prepared)
    for place, prompt in enumerate(prepared.tokens.prompts):
        choices = prepared.tokens.choices[place]
        slow = [slow_log_prob(model, prompt, choice, {}, {}) for choice in choices]
        np.testing.assert_allclose(fast.log_probs[place], slow, atol=SAME, rtol=0)


def test_an_ablation_moves_the_scores_and_leaves_nothing_behind(
    make: Callable[..., Model],
) -> None:
    model = make()
    prepared = prepare(model, questions(8, seed=2))
    means = mean_outputs(model, prepared, HEADS)
    before = score(model, prepared)
    without = score(model, prepared, HEADS, means)
    again = score(model, prepared)
    moved = [np.abs(a - b).max() for a, b in zip(before.log_probs, without.log_probs, strict=True)]
    assert min(moved) > 1e-3
    for one, other in zip(before.log_probs, again.log_probs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_positions_before_the_end_are_not_ablated(make: Callable[..., Model]) -> None:
    """With its own output at END as the mean, a question with one-token choices stays the same."""
    model = make()
    alone = prepare(model, [MultipleChoice("one", "defghde", (" a", " b"), 0)])
    means = mean_outputs(model, alone, HEADS)
    before, after = score(model, alone), score(model, alone, HEADS, means)
    np.testing.assert_allclose(before.log_probs[0], after.log_probs[0], atol=1e-12)


def test_prompts_run_once_for_all_ablations(make: Callable[..., Model]) -> None:
    model = make()
    asked = questions(6, seed=3)
    tokens: list[int] = []
    mlp = model.part(0, model.family.mlp)
    handle = mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0][..., 0].numel()))
    prepared = prepare(model, asked)
    before = sum(tokens)
    means = mean_outputs(model, prepared, HEADS)
    tokens.clear()
    score(model, prepared, HEADS, means)
    handle.remove()
    needed = sum(1 + sum(len(c) - 1 for c in texts) for texts in prepared.tokens.choices)
    assert sum(tokens) == needed
    assert before >= sum(len(prompt) - 1 for prompt in prepared.tokens.prompts)


def test_little_memory_changes_no_score(
    make: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pieces, and keys and values that are computed anew each time."""
    model = make()
    asked = questions(12, seed=4)
    usual = score(model, prepare(model, asked))
    monkeypatch.setattr("circuitune.choosing.TOKENS_PER_BATCH", 40)
    monkeypatch.setattr("circuitune.choosing.KEPT_BYTES", 60_000)
    prepared = prepare(model, asked)
    kept = [prompts is not None for _, prompts in prepared.portions]
    assert True in kept
    assert False in kept
    small = score(model, prepared)
    for one, other in zip(usual.log_probs, small.log_probs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_tokens_are_split_at_the_length_of_the_prompt(make: Callable[..., Model]) -> None:
    """A merge over the border takes a token from the choice, as in lm-evaluation-harness."""
    model = make()
    tokens = tokenised(model, [MultipleChoice("merged", "dd:", ("Ad", "dd"), 0)])
    whole = [model.tokenizer(text).input_ids for text in ("dd:Ad", "dd:dd")]
    assert len(whole[0]) == 4
    assert tokens.prompts == [model.tokenizer("dd:").input_ids]
    assert tokens.choices == [[whole[0][3:], whole[1][3:]]]


def test_choosing_by_sum_and_by_length(make: Callable[..., Model]) -> None:
    model = make()
    asked = questions(10, seed=5)
    found = score(model, prepare(model, asked))
    for place, question in enumerate(asked):
        values = found.log_probs[place]
        sizes = [len(text[1:]) for text in question.choices]
        per_byte = [value / size for value, size in zip(values, sizes, strict=True)]
        assert found.chosen[place] == max(range(len(values)), key=values.__getitem__)
        assert found.chosen_by_length[place] == max(range(len(values)), key=per_byte.__getitem__)
        assert found.log_prob[place] == values[question.answer]
    assert (found.chosen != found.chosen_by_length).any()
    assert found.answers.tolist() == [question.answer for question in asked]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (MultipleChoice("q7", "dd", (" a",), 0), "two choices"),
        (MultipleChoice("q7", "dd", (" a", " b"), 2), "number 2 right"),
        (MultipleChoice("q7", "", (" a", " b"), 0), "empty text"),
        (MultipleChoice("q7", "dd", (" a", ""), 0), "adds none"),
        (MultipleChoice("q7", "dd:", ("A", " b"), 0), "adds none"),
    ],
)
def test_unusable_questions_are_named(
    make: Callable[..., Model], question: MultipleChoice, said: str
) -> None:
    with pytest.raises(UserError, match=rf"{said}.*q7"):
        prepare(make(), [question])


def test_nothing_and_too_much_are_refused(make: Callable[..., Model]) -> None:
    model = make("gpt2")
    with pytest.raises(UserError, match="found none"):
        prepare(model, [])
    fits = MultipleChoice("long", "d" * 64, (" a", " b"), 0)
    score(model, prepare(model, [fits]))
    with pytest.raises(UserError, match=r"64 positions.*takes 65"):
        prepare(model, [replace(fits, choices=(" a", " ba"))])


def test_heads_and_means_must_be_there(make: Callable[..., Model]) -> None:
    model = make()
    prepared = prepare(model, questions(2, seed=6))
    with pytest.raises(UserError, match=r"found 4\.0"):
        mean_outputs(model, prepared, [Head(4, 0)])
    for means in (None, Means({}, {})):
        with pytest.raises(ValueError, match=r"lack \['3.1'\]"):
            score(model, prepared, [Head(3, 1)], means)


def scores(chosen: list[int], by_length: list[int], answers: list[int]) -> Scores:
    """Scores of two-choice questions; the right choice has probability 0.8 or 0.2."""
    right = np.array(chosen) == np.array(answers)
    values = tuple(
        np.log([0.8, 0.2] if (hit == (answer == 0)) else [0.2, 0.8])
        for hit, answer in zip(right, answers, strict=True)
    )
    return Scores(values, np.array(chosen), np.array(by_length), np.array(answers))


def test_comparison_of_the_same_questions() -> None:
    answers = [0, 1] * 20
    wrong = [1 - answer for answer in answers]
    before = scores(answers, wrong, answers)
    after = scores([*wrong[:10], *answers[10:]], wrong, answers)
    found = compare(before, after, seed=3)
    assert (found["n"], found["margin"]) == (40, 0.02)
    acc = found["acc"]
    assert (acc["before"][0], acc["after"][0], acc["change"][0]) == (1.0, 0.75, -0.25)
    assert acc["change"][1] < -0.25 < acc["change"][2] < 0
    assert math.isclose(acc["p"], 2 / 2**10)
    assert not acc["non_inferior"]
    assert found["acc_norm"]["change"][0] == 0.0
    assert not found["acc_norm"]["non_inferior"]  # forty questions cannot show two points
    assert math.isclose(found["log_prob"][0], 0.25 * math.log(0.2 / 0.8))


def test_many_questions_show_that_nothing_was_lost() -> None:
    answers = [0, 1] * 400
    same = scores(answers, answers, answers)
    assert compare(same, same)["acc"]["non_inferior"]
    assert compare(same, same)["acc"]["change"][0] == 0
    in_groups = compare(same, same, groups=[place // 100 for place in range(800)])
    assert not in_groups["acc"]["non_inferior"]  # eight groups are few trials


def test_a_part_of_the_scores_keeps_its_order() -> None:
    part = scores([0, 1, 2], [1, 1, 1], [0, 1, 1]).of([2, 0])
    assert list(part.chosen) == [2, 0]
    assert list(part.answers) == [1, 0]
    assert list(part.correct) == [False, True]


def test_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare(scores([0], [0], [0]), scores([0], [0], [1]))
