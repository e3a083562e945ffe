"""Answers: the number at the start of a text, and generation in batches."""

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig

from circuitune import answering
from circuitune.answering import generate, read_answer
from circuitune.models import Model
from circuitune.problems import Operator, Problem
from circuitune.writing import Writing


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("8", 8),
        (" 12\n", 12),
        ("-3 and", -3),
        ("12.", 12),
        ("12.5", None),
        ("1,200", None),
        ("so 8", None),
        ("", None),
        ("007\n", 7),
    ],
)
def test_read_answer(text: str, answer: int | None) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize("shipped", [{}, {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}])
def test_generation_equals_one_prompt_at_a_time(
    tiny: Callable[..., Model], shipped: dict[str, float]
) -> None:
    """Whatever settings for generation the checkpoint brings."""
    model = tiny()
    own = model.hf.generation_config = GenerationConfig(**shipped)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5], [40, 41], [1, 2, 3, 4, 5, 6]]
    together = generate(model, prompts, new_tokens=4)
    for prompt, text in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(model.hf(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == model.tokenizer.eos_token_id:
                break
        expected = model.tokenizer.decode(tokens[len(prompt) :])
        assert text.startswith(expected)
    assert model.hf.generation_config is own


def test_long_answers_are_read_to_their_end(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that goes on after the right digits is wrong."""
    asked: list[int] = []

    def written(_model: Model, prompts: list[list[int]], *, new_tokens: int) -> list[str]:
        asked.append(new_tokens)
        return ["111111111111111"[:new_tokens]] * len(prompts)

    monkeypatch.setattr(answering, "generate", written)
    problem = Problem(Operator.parse("add"), 9999, 1112)
    writing = Writing("", spaced_answer=False)
    assert not answering.exact_match(tiny(), [problem], writing).any()
    assert asked == [6]
