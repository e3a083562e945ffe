"""How text is written for one tokenizer: token ids, padding, and the space before an answer.

An answer must be *one* token that follows its prompt unchanged. Two ways of writing are tried,
``"3 + 5 = "`` + ``"8"`` and ``"3 + 5 ="`` + ``" 8"``; a tokenizer that allows neither is refused.
Special tokens are the tokenizer's own choice (a BOS token where it adds one, never an EOS).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuitune.errors import UserError


@dataclass(frozen=True)
class Writing:
    """How a prompt and its answer are written for one tokenizer: prefix, and where the space is."""

    prefix: str
    spaced_answer: bool

    def write(self, prompt: str, answer: str) -> tuple[str, str]:
        """The prompt with its prefix, and the answer, with the space on the right side."""
        if self.spaced_answer:
            return self.prefix + prompt.rstrip(" "), " " + answer
        return self.prefix + prompt, answer

    @property
    def policy(self) -> str:
        """One sentence for records and reports."""
        where = "with the space in front of it" if self.spaced_answer else "after a space"
        return f"The answer is one digit, one token, {where}; all ten digits are admissible."


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with the tokenizer's BOS where it adds one, without EOS."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def shipped_paragraphs() -> list[str]:
    """The 200 paragraphs of plain English that ship with circuitune."""
    text = resources.files("circuitune").joinpath("data/retention.txt").read_text("utf-8")
    return text.splitlines()


def pad(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "batch token"]:
    """Right-pad lists to a rectangle; under a causal mask the padding reaches nothing."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def answer_token(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> int | None:
    """The token id of an answer; None where it is not exactly one token after its prompt."""
    ids = encode_text(tokenizer, prompt)
    both = encode_text(tokenizer, prompt + answer)
    return both[-1] if len(both) == len(ids) + 1 and both[:-1] == ids else None


def find_writing(tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> Writing:
    """Decide where the space before the answer goes, so that each digit is one token.

    Raises:
        UserError: neither way of writing gives one-token answers.
    """
    for spaced in (False, True):
        writing = Writing(prefix, spaced)
        written = [writing.write("3 + 5 = ", str(digit)) for digit in range(10)]
        tokens = {answer_token(tokenizer, *item) for item in written}
        if None not in tokens and len(tokens) == 10:
            return writing
    raise UserError(
        "The tokenizer must write each digit as one token after a prompt, it does so neither "
        "after nor with a space; pass your own one-token pairs with --pairs FILE.jsonl."
    )
