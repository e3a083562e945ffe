"""Greedy answers to arithmetic problems, and whether they are right."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from transformers import GenerationConfig

from circuitune.models import Model
from circuitune.problems import Problem, completion
from circuitune.prompts import continued, pad_left, similar_lengths
from circuitune.writing import Writing, encode_text

PROMPTS_PER_BATCH = 64
NEW_TOKENS = 5  # at least: three digits, after a space perhaps, and what ends the number
# The number that an answer starts with, unless it goes on as a decimal fraction.
ANSWER = re.compile(r"\s*(-?\d+)(?!\d|[.,]\d)")


def read_answer(text: str) -> int | None:
    """The whole number at the start of a generated answer, if there is one."""
    found = ANSWER.match(text)
    return int(found[1]) if found else None


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Greedy continuations by Hugging Face's ``generate``, prompts of similar length together."""
    texts = [""] * len(prompts)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.eos_token_id or 0,
    )
    for places in similar_lengths([len(tokens) for tokens in prompts], PROMPTS_PER_BATCH):
        tokens, mask = pad_left([prompts[place] for place in places])
        output = continued(model, tokens, mask, settings)
        decoded = model.tokenizer.batch_decode(output[:, tokens.shape[1] :])
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text
    return texts


def answers(model: Model, problems: Sequence[Problem], writing: Writing) -> list[str]:
    """What the model writes after each problem, as many tokens as the longest answer needs."""
    asked = [writing.write(*completion(problem))[0] for problem in problems]
    longest = max((len(str(problem.answer)) for problem in problems), default=0)
    tokens = [encode_text(model.tokenizer, prompt) for prompt in asked]
    longest += 1 + writing.spaced_answer  # the number may go on, and is wrong then
    return generate(model, tokens, new_tokens=max(NEW_TOKENS, longest))


def are_right(problems: Sequence[Problem], texts: Sequence[str]) -> Bool[np.ndarray, " example"]:
    """Whether a text begins with the answer, the whole of it, per problem."""
    pairs = zip(problems, texts, strict=True)
    return np.array([read_answer(text) == problem.answer for problem, text in pairs])


def exact_match(
    model: Model, problems: Sequence[Problem], writing: Writing
) -> Bool[np.ndarray, " example"]:
    """Whether the whole generated answer is right, per problem."""
    return are_right(problems, answers(model, problems, writing))
