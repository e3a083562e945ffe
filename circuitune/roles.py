"""Roles of token positions, and contrasts in which one thing alone changes.

A *role* names what the tokens at a set of positions stand for. Prompts that were written from the
arithmetic templates have ``operand 1``, ``operator``, ``operand 2``, ``end`` (everything after
these three, up to and with END) and ``other``. A user's own pairs have no known structure: there
it is ``before`` the first token that differs, ``changed``, ``after``, and ``end``, END alone.

A *contrast* is a corrupt prompt with as many tokens that changes one thing and nothing else. In
``operator`` it is the pair's own corrupt prompt; in ``operand 1`` and ``operand 2`` that operand
is another digit, drawn so that the result is another one-digit number. What a component does in
the contrast ``operand 2`` it does because of the second operand. Own pairs have one contrast,
``changed``.

Places come from comparing tokenisations (of a prompt with its own beginnings, or with a contrast),
so any tokenizer will do; nothing is read out of the text of single tokens.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase

from circuitune.errors import UserError
from circuitune.pairs import Pair, Split
from circuitune.problems import Operator, Problem, Template, templates
from circuitune.writing import encode_text

ARITHMETIC_ROLES = ("operand 1", "operator", "operand 2", "end", "other")
OWN_ROLES = ("before", "changed", "after", "end")
ARITHMETIC_CONTRASTS = ("operand 1", "operator", "operand 2")
OWN_CONTRASTS = ("changed",)

Encoder = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    """One clean prompt with the places of its roles, and what it is contrasted with.

    Attributes:
        place: its number among the pairs that were given.
        split, group: those of its pair; prompts of one group are not independent.
        tokens: token ids of the clean prompt.
        roles: places of the tokens of each role; every token has exactly one.
        contrasts: token ids of the corrupt prompt of each contrast, as many as in ``tokens``.
    """

    place: int
    split: Split
    group: str
    tokens: list[int]
    roles: Mapping[str, list[int]]
    contrasts: Mapping[str, list[int]]


@dataclass(frozen=True)
class Contrasts:
    """Prompts that have every contrast, and how many were left out for what reason.

    Attributes:
        names: the contrasts, in the order of reading.
        roles: the roles, in the order of reading.
        prompts: the prompts, in the order of the pairs.
        given: how many pairs there were.
        dropped: reason to number of pairs without roles or contrasts.
    """

    names: tuple[str, ...]
    roles: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    given: int
    dropped: dict[str, int]

    def sample(self, split: Split, most: int, *, rng: np.random.Generator) -> "Contrasts":
        """At most ``most`` prompts of one half, as many of every group as of any other."""
        own = [prompt for prompt in self.prompts if prompt.split == split]
        turns: Counter[str] = Counter()
        order = []
        for index in rng.permutation(len(own)):
            turns[own[index].group] += 1
            order.append((turns[own[index].group], len(order), int(index)))
        kept = sorted(index for _, _, index in sorted(order)[:most])
        prompts = tuple(own[index] for index in kept)
        return Contrasts(self.names, self.roles, prompts, self.given, self.dropped)


def find_contrasts(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, rng: np.random.Generator
) -> Contrasts:
    """Roles and contrasts of pairs: arithmetic if all of them were written by a template.

    Args:
        tokenizer: the model's tokenizer.
        pairs: clean and corrupt prompts.
        rng: draws the other operands.

    Raises:
        UserError: no pair has all its contrasts with as many tokens as its clean prompt.
    """

    def encode(text: str) -> list[int]:
        return encode_text(tokenizer, text)

    written = [_written(pair) for pair in pairs]
    arithmetic = bool(pairs) and None not in written
    names, roles = (
        (ARITHMETIC_CONTRASTS, ARITHMETIC_ROLES) if arithmetic else (OWN_CONTRASTS, OWN_ROLES)
    )
    dropped: Counter[str] = Counter()
    prompts = []
    for place, (pair, text) in enumerate(zip(pairs, written, strict=True)):
        try:
            tokens, at, others = (
                _arithmetic(encode, text, rng) if arithmetic and text else _own(encode, pair)
            )
        except _Unfit as reason:
            dropped[str(reason)] += 1
        else:
            prompts.append(Prompt(place, pair.split, pair.group, tokens, at, others))
    if not prompts:
        why = ", ".join(f"{reason} ({count})" for reason, count in dropped.items()) or "no pairs"
        raise UserError(
            "Contrasts need clean and corrupt prompts of equally many tokens, none of "
            f"{len(pairs)} pairs has them: {why}; write corrupt prompts that keep the number of "
            "tokens."
        )
    return Contrasts(names, roles, tuple(prompts), len(pairs), dict(dropped))


class _Unfit(Exception):
    """Why a pair has no roles or contrasts, as a short phrase."""


_Found = tuple[list[int], dict[str, list[int]], dict[str, list[int]]]


# ------------------------------------------------------------------------------ own pairs


def _own(encode: Encoder, pair: Pair) -> _Found:
    """Tokens, roles and the one contrast of a pair without known structure."""
    clean, corrupt = encode(pair.clean), encode(pair.corrupt)
    if len(clean) != len(corrupt):
        raise _Unfit("corrupt prompt of another length")
    changed = [i for i, (one, other) in enumerate(zip(clean, corrupt, strict=True)) if one != other]
    if not changed:
        raise _Unfit("clean and corrupt tokens are the same")
    end = len(clean) - 1
    differs = [place for place in changed if place != end]
    same = [place for place in range(end) if place not in changed]
    roles = {
        "before": [place for place in same if place < changed[0]],
        "changed": differs,
        "after": [place for place in same if place > changed[0]],
        "end": [end],
    }
    return clean, roles, {"changed": corrupt}


# ----------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class _Written:
    """A prompt that a template wrote: the prefix before it, the problem, and the end cut off."""

    prefix: str
    template: Template
    problem: Problem
    stripped: bool

    def clean(self, problem: Problem | None = None) -> str:
        """The clean prompt, of another problem if one is given."""
        return self._whole(self.template.render(problem or self.problem)[0])

    @property
    def corrupt(self) -> str:
        """The prompt with the operator replaced."""
        return self._whole(self.template.render(self.problem)[1])

    def _whole(self, text: str) -> str:
        return self.prefix + (text.rstrip(" ") if self.stripped else text)

    def spans(self) -> dict[str, tuple[int, int]]:
        """Where the operands and the operator word stand in the clean prompt, in characters."""
        fields = {"{a}": ("operand 1", self.problem.a), "{b}": ("operand 2", self.problem.b)}
        # Clean and corrupt sentence have the same pieces but for the one operator word.
        pieces = zip(*map(_pieces, (self.template.clean, self.template.corrupt)), strict=True)
        found, at = {}, len(self.prefix)
        for piece, other in pieces:
            name, value = fields.get(piece, ("operator" if piece != other else "", piece))
            if name:
                found[name] = (at, at + len(str(value)))
            at += len(str(value))
        return found


def _pieces(sentence: str) -> list[str]:
    """A template's sentence cut at its fields and spaces."""
    return re.split(r"(\{[ab]\}| )", sentence)


def _written(pair: Pair) -> _Written | None:
    """How a template wrote this pair, None if none did."""
    try:
        operator = Operator.parse(pair.task)
        numbers = [int(part) for part in pair.group.split(",")]
        problems = [Problem(operator, *order) for order in _orders(numbers, operator)]
    except (UserError, ValueError):
        return None
    template = next((item for item in templates(operator) if item.id == pair.template), None)
    for problem in problems if template else ():
        clean = template.render(problem)[0]
        for stripped in (False, True):
            text = clean.rstrip(" ") if stripped else clean
            written = _Written(pair.clean.removesuffix(text), template, problem, stripped)
            if (written.clean(), written.corrupt) == (pair.clean, pair.corrupt):
                return written
    return None


def _orders(numbers: Sequence[int], operator: Operator) -> Iterator[tuple[int, int]]:
    """Both orders of two operands, those with a whole result."""
    smaller, larger = numbers
    for a, b in dict.fromkeys([(smaller, larger), (larger, smaller)]):
        if operator.apply(a, b) is not None:
            yield a, b


def _arithmetic(encode: Encoder, written: _Written, rng: np.random.Generator) -> _Found:
    """Tokens, roles and the three contrasts of a prompt that a template wrote."""
    text = written.clean()
    tokens = encode(text)
    roles = {name: _covered(encode, text, tokens, span) for name, span in written.spans().items()}
    taken = [place for places in roles.values() for place in places]
    if len(set(taken)) != len(taken):
        raise _Unfit("one token for two roles")
    roles["end"] = list(range(max(taken) + 1, len(tokens)))
    if not roles["end"]:
        raise _Unfit("no token behind the operands")
    others = {"operator": encode(written.corrupt)}
    for name in ("operand 1", "operand 2"):
        others[name] = _other_operand(encode, written, name, len(tokens), rng)
    if len(others["operator"]) != len(tokens):
        raise _Unfit("operator: corrupt prompt of another length")
    named = {place for places in roles.values() for place in places}
    roles["other"] = [place for place in range(len(tokens)) if place not in named]
    return tokens, roles, {name: others[name] for name in ARITHMETIC_CONTRASTS}


def _covered(encode: Encoder, text: str, tokens: list[int], span: tuple[int, int]) -> list[int]:
    """Places of the tokens of ``text[start:end]``, by tokenising the text up to both ends."""

    def common(beginning: str) -> int:
        shared = zip(encode(beginning), tokens, strict=False)
        return sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], shared))

    start, end = (common(text[:at]) for at in span)
    return list(range(start, max(start + 1, end)))


def _other_operand(
    encode: Encoder, written: _Written, name: str, length: int, rng: np.random.Generator
) -> list[int]:
    """The prompt with one operand replaced by a random digit that gives another digit."""
    own = written.problem
    fitting = []
    for digit in range(1, 10):
        a, b = (digit, own.b) if name == "operand 1" else (own.a, digit)
        result = own.operator.apply(a, b)
        if result is not None and 0 <= result <= 9 and result != own.answer:
            fitting.append(Problem(own.operator, a, b))
    for index in rng.permutation(len(fitting)):
        tokens = encode(written.clean(fitting[index]))
        if len(tokens) == length:
            return tokens
    raise _Unfit(f"{name}: no other digit fits")
