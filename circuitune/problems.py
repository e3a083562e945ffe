"""Arithmetic problems and the sentences that ask for them: pure Python, seeded, tokenizer-free.

A problem is an operator and two operands. A template turns it into a *clean* prompt, which asks
for the result, and a *corrupt* prompt: the same sentence with the same operands, in which the
operator is replaced by a null word or a meaningless symbol, so that there is nothing to compute
(the counterfactual of Zhang et al., ICML 2024).

Every prompt ends with one space. Tokenizers that split numbers into digits make a token of that
space, so the next token is the first digit of the answer and nothing else. Problems are split by
*group*, the unordered pair of operands: 3 + 5, 5 + 3, 3 x 5 and 5 - 3 stay on the same side.
"""

import re
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count, islice
from random import Random
from typing import Literal, get_args

from circuitune.errors import UserError

VERSION = 1
"""Version of the templates and formats below: results compare only within one version."""

MAX_DIGITS = 4
"""Longest operand that `sample_problems` draws; whole quotients become too rare beyond it."""

FORMATS: tuple[str, ...] = ("{a} {op} {b} = ",)
"""Plain question formats for tuning and generation, in the signs of a keyboard: + - * /."""

Style = Literal["equation", "statement", "question"]
"""The three styles of sentence of Zhang et al. (2024)."""

STYLES: tuple[Style, ...] = get_args(Style)


class Operator(Enum):
    """One of the four operators; the value is its symbol.

    `id` is the name used in files and on the command line: `add`, `sub`, `mul`, `div`.
    """

    ADD = "+"
    SUB = "-"
    MUL = "x"
    DIV = "/"

    @property
    def id(self) -> str:
        """The short lower-case name, e.g. `add`."""
        return self.name.lower()

    @property
    def symbol(self) -> str:
        """The symbol people read: `+`, `-`, `x` or `/`."""
        return self.value

    @property
    def keyboard_symbol(self) -> str:
        """The symbol people type: `+`, `-`, `*` or `/`."""
        return "*" if self is Operator.MUL else self.value

    def __str__(self) -> str:
        """Print the id."""
        return self.id

    @classmethod
    def parse(cls, text: str) -> "Operator":
        """Read an operator from its id or from a symbol, in any case.

        Args:
            text: `add`, `sub`, `mul`, `div`, `+`, `-`, `x`, `*`, `/`, or the typographic minus,
                multiplication and division signs.

        Raises:
            UserError: The text names no operator.
        """
        aliases = {operator.id: operator for operator in cls}
        aliases |= {operator.symbol: operator for operator in cls}
        aliases |= {"*": cls.MUL, "\N{MULTIPLICATION SIGN}": cls.MUL}
        aliases |= {"\N{DIVISION SIGN}": cls.DIV, "\N{MINUS SIGN}": cls.SUB}
        found = aliases.get(text.strip().lower())
        if found is None:
            raise UserError(
                "An operator must be one of add, sub, mul, div or a symbol + - x * /, "
                f"found {text!r}; use one of these."
            )
        return found

    def apply(self, a: int, b: int) -> int | None:
        """Compute the result, or None where a division by `b` is not whole or impossible."""
        match self:
            case Operator.ADD:
                return a + b
            case Operator.SUB:
                return a - b
            case Operator.MUL:
                return a * b
            case Operator.DIV:
                return a // b if b != 0 and a % b == 0 else None


@dataclass(frozen=True)
class Problem:
    """Two operands, an operator, and a whole result.

    Attributes:
        operator: What to do with the operands.
        a: First operand, 0 or more.
        b: Second operand, 0 or more.

    Raises:
        UserError: An operand is negative or the result is not a whole number.
    """

    operator: Operator
    a: int
    b: int

    def __post_init__(self) -> None:
        """Refuse what has no whole answer, so that `answer` never fails."""
        if min(self.a, self.b) < 0 or self.operator.apply(self.a, self.b) is None:
            raise UserError(
                "A problem must have operands of 0 or more and a whole answer, "
                f"found {self}; choose other operands."
            )

    def __str__(self) -> str:
        """Print the problem as an expression, e.g. `3 + 5`."""
        return f"{self.a} {self.operator.symbol} {self.b}"

    @property
    def answer(self) -> int:
        """The result; negative only for a subtraction."""
        result = self.operator.apply(self.a, self.b)
        assert result is not None  # __post_init__ admits no problem without a result
        return result

    @property
    def group(self) -> str:
        """The operands in ascending order, e.g. `3,5`: equal for problems never to be split."""
        return f"{min(self.a, self.b)},{max(self.a, self.b)}"


@dataclass(frozen=True)
class Template:
    """One sentence with its counterfactual; `{a}` and `{b}` stand for the operands.

    Attributes:
        id: Stable name, e.g. `add.equation.1`.
        style: Kind of sentence.
        operator: The operator that the sentence asks for.
        clean: The sentence that asks for the result.
        corrupt: The same sentence with a null word or symbol in place of the operator.

    Raises:
        UserError: A sentence lacks a field or its single final space, the two sentences have
            different numbers of words, or they are the same.
    """

    id: str
    style: Style
    operator: Operator
    clean: str
    corrupt: str

    def __post_init__(self) -> None:
        """Refuse a pair of sentences that could not be compared token by token."""
        for text in (self.clean, self.corrupt):
            _check_prompt(text, fields=("{a}", "{b}"), name=f"Template {self.id}")
        same_length = len(self.clean.split()) == len(self.corrupt.split())
        if self.clean == self.corrupt or not same_length:
            raise UserError(
                f"Template {self.id} must have a corrupt sentence that differs from the clean one "
                f"and has as many words, found {self.clean!r} and {self.corrupt!r}; "
                "replace each operator word by one null word."
            )

    def render(self, problem: Problem) -> tuple[str, str]:
        """Fill in the operands and return the (clean, corrupt) prompts.

        Raises:
            UserError: The problem has another operator than the template.
        """
        if problem.operator is not self.operator:
            raise UserError(
                f"Template {self.id} must get a problem with operator {self.operator}, "
                f"found {problem}; choose from templates(problem.operator)."
            )
        fields = {"a": problem.a, "b": problem.b}
        return self.clean.format(**fields), self.corrupt.format(**fields)


# A sentence is a frame filled with one operator's words, so the same frames serve all operators.
# Brackets mark the one word that carries the operator. Those words are one token in common
# vocabularies (hence "ratio", not "quotient"), as are the null words that replace them.
_WORDS: dict[Operator, dict[str, str]] = {
    Operator.ADD: {
        "infix": "[plus]",
        "spoken": "[plus]",
        "noun": "[sum] of {a} and {b}",
        "done": "[added] to",
    },
    Operator.SUB: {
        "infix": "[minus]",
        "spoken": "[minus]",
        "noun": "[difference] between {a} and {b}",
        "done": "[reduced] by",
    },
    Operator.MUL: {
        "infix": "[times]",
        "spoken": "[times]",
        "noun": "[product] of {a} and {b}",
        "done": "[multiplied] by",
    },
    Operator.DIV: {
        "infix": "[divided] by",
        "spoken": "[over]",
        "noun": "[ratio] of {a} to {b}",
        "done": "[divided] by",
    },
}

# (frame, null word) by style. `typed` is the keyboard symbol, `written` the symbol people read;
# they differ for multiplication. Template ids count the rows: append, never insert.
_FRAMES: dict[Style, tuple[tuple[str, str], ...]] = {
    "equation": (
        ("{a} {typed} {b} = ", "@"),
        ("({a} {written} {b}) = ", "<"),
        ("{a}{typed}{b} = ", "@"),
        ("Calculate {a} {written} {b} = ", "#"),
        ("Solve: {a} {typed} {b} = ", "<"),
    ),
    "statement": (
        ("{a} {infix} {b} equals ", "nothing"),
        ("{a} {infix} {b} is equal to ", "none"),
        ("The {noun} is ", "none"),
        ("The result of {a} {spoken} {b} is ", "nothing"),
        ("{a} {done} {b} gives ", "nothing"),
    ),
    "question": (
        ("Q: What is {a} {infix} {b}? A: ", "nothing"),
        ("Q: What is the {noun}? A: ", "none"),
        ("Question: What is {a} {written} {b}? Answer: ", "@"),
        ("Q: What do you get when {a} is {done} {b}? A: ", "nothing"),
        ("Q: How much is {a} {spoken} {b}? A: ", "none"),
    ),
}


def templates(operator: Operator, style: str | None = None) -> tuple[Template, ...]:
    """Return the templates of one operator, of all styles or of one, in a fixed order.

    `add.equation.1` and `mul.equation.1` are the same sentence but for the operator.

    Raises:
        UserError: The style is unknown.
    """
    if style is not None and style not in STYLES:
        raise UserError(
            f"A style must be one of {', '.join(STYLES)}, found {style!r}; use one of these."
        )
    symbols = {"typed": f"[{operator.keyboard_symbol}]", "written": f"[{operator.symbol}]"}
    words = _WORDS[operator] | symbols | {"a": "{a}", "b": "{b}"}
    return tuple(
        Template(
            id=f"{operator.id}.{kind}.{number}",
            style=kind,
            operator=operator,
            clean=re.sub(r"[\[\]]", "", frame.format_map(words)),
            corrupt=re.sub(r"\[.+\]", null, frame.format_map(words)),
        )
        for kind in STYLES
        if style in (None, kind)
        for number, (frame, null) in enumerate(_FRAMES[kind], start=1)
    )


def completion(problem: Problem, format: str = FORMATS[0]) -> tuple[str, str]:
    """Write a problem as a prompt and the text that continues it.

    Args:
        problem: What to ask.
        format: Text with the fields `{a}`, `{op}` and `{b}` that ends with one space.

    Returns:
        The prompt, which ends with one space, and the answer without a space: `("3 + 5 = ", "8")`.

    Raises:
        UserError: The format lacks a field or its single final space.
    """
    _check_prompt(format, fields=("{a}", "{op}", "{b}"), name="A format")
    prompt = format.format(a=problem.a, op=problem.operator.keyboard_symbol, b=problem.b)
    return prompt, str(problem.answer)


def enumerate_problems(
    operator: Operator, *, low: int, high: int, max_answer: int | None = None, min_answer: int = 0
) -> list[Problem]:
    """List all ordered pairs of operands whose answer is whole and inside the bounds.

    Args:
        operator: The operator of every problem.
        low: Smallest operand, 0 or more.
        high: Largest operand.
        max_answer: Largest answer; None for no bound. 9 keeps one-digit answers.
        min_answer: Smallest answer.

    Returns:
        The problems, ordered by first and then by second operand; empty if none qualifies.

    Raises:
        UserError: `low` is negative or above `high`.
    """
    if not 0 <= low <= high:
        raise UserError(
            f"Operands must satisfy 0 <= low <= high, found low={low} and high={high}; "
            "change the bounds."
        )
    problems = []
    for a in range(low, high + 1):
        for b in range(low, high + 1):
            answer = operator.apply(a, b)
            if answer is None or answer < min_answer:
                continue
            if max_answer is None or answer <= max_answer:
                problems.append(Problem(operator, a, b))
    return problems


def split_groups(
    problems: Iterable[Problem], *, seed: int, share: float = 0.5
) -> tuple[list[Problem], list[Problem]]:
    """Split problems in two so that no pair of operands occurs on both sides.

    Groups are split once for all operators: pass the problems of all of them in one list. Groups
    are taken in random order; each goes to the side that keeps every operator nearest to its
    share, so that both sides hold about the same mix.

    Args:
        problems: Any problems; their order is kept on both sides.
        seed: Decides the split together with the set of problems, not with their order.
        share: Part of the problems that goes to the first side, above 0 and below 1.

    Raises:
        UserError: `share` is out of range, or a side would be empty.
    """
    problems = list(problems)
    if not 0 < share < 1:
        raise UserError(f"share must be above 0 and below 1, found {share}; try 0.5.")
    counts: dict[str, Counter[Operator]] = {}
    for problem in problems:
        counts.setdefault(problem.group, Counter())[problem.operator] += 1
    rng = Random(seed)
    groups = rng.sample(sorted(counts), len(counts))
    excess = dict.fromkeys(Operator, 0.0)  # problems on the first side above its share, so far
    chosen = set()
    for group in groups:
        # Squared distance from the share if the group joins the first side, less that if not.
        sizes = {operator: counts[group][operator] for operator in Operator}
        cost = sum(
            n * (2 * excess[operator] + n * (1 - 2 * share)) for operator, n in sizes.items()
        )
        joins = cost < 0 or (cost == 0 and rng.random() < share)
        if joins:
            chosen.add(group)
        for operator, n in sizes.items():
            excess[operator] += n * (1 - share) if joins else -n * share
    first = [problem for problem in problems if problem.group in chosen]
    second = [problem for problem in problems if problem.group not in chosen]
    if not first or not second:
        raise UserError(
            f"Both sides of a split must hold problems, found {len(groups)} groups with "
            f"share {share}; pass more problems or a share nearer 0.5."
        )
    return first, second


def sample_problems(
    operators: Iterable[Operator],
    *,
    digits: int,
    n: int,
    seed: int,
    exclude: Collection[str] = (),
) -> list[Problem]:
    """Draw random problems for tuning or tests, away from groups that are kept for others.

    The operators take turns. Each draws uniformly from all problems whose operands have at most
    `digits` digits and whose answer is whole and 0 or more; one factor of a product has one digit,
    as in written multiplication. Operands may be 0. An operator that has no problem left is passed
    over, and only when all are used up does every problem come again. So the first m of n problems
    are the sample of size m.

    Args:
        operators: Which operators; repeated ones count once.
        digits: Most digits of an operand, 1 to `MAX_DIGITS`.
        n: Number of problems.
        seed: Decides the draw. One operator's problems do not depend on the other operators.
        exclude: Groups that must not occur, as in `Problem.group`.

    Raises:
        UserError: An argument is out of range, `exclude` holds something that is not a group, or
            it leaves no problem.
    """
    chosen = tuple(dict.fromkeys(operators))
    if not chosen or not 1 <= digits <= MAX_DIGITS or n < 0:
        raise UserError(
            f"A sample needs an operator, digits from 1 to {MAX_DIGITS} and n of 0 or more, found "
            f"{len(chosen)} operators, digits={digits} and n={n}; change the one out of range."
        )
    excluded = _checked_groups(exclude)
    drawn: list[Problem] = []
    for lap in count():
        deals = [_deal(operator, digits, f"{seed}/{lap}", excluded) for operator in chosen]
        fresh = list(islice(_take_turns(deals), n - len(drawn)))
        drawn.extend(fresh)
        if len(drawn) == n:
            return drawn
        if not fresh:
            break
    raise UserError(
        f"exclude must leave some problem with operands of up to {digits} digits, found none for "
        f"{', '.join(map(str, chosen))}; raise digits or exclude fewer groups."
    )


def _deal(
    operator: Operator, digits: int, seed: str, excluded: frozenset[str]
) -> Iterator[Problem]:
    """Yield every problem with operands of at most `digits` digits once, in random order."""
    base = 10**digits
    for code in _shuffled(base * base, Random(f"{seed}/{operator.id}")):
        a, b = divmod(code, base)
        answer = operator.apply(a, b)
        if answer is None or answer < 0 or (operator is Operator.MUL and min(a, b) > 9):
            continue
        problem = Problem(operator, a, b)
        if problem.group not in excluded:
            yield problem


def _shuffled(size: int, rng: Random) -> Iterator[int]:
    """Yield 0 .. size-1 in random order, in memory that grows only with what is drawn.

    Fisher and Yates's shuffle; `moved` holds the cells that differ from their index.
    """
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        pick = rng.randrange(last + 1)
        yield moved.get(pick, pick)
        moved[pick] = moved.pop(last, last)


def _take_turns(sources: Sequence[Iterator[Problem]]) -> Iterator[Problem]:
    """Yield one item of each source in turn; drop a source once it is empty."""
    waiting = deque(sources)
    while waiting:
        source = waiting.popleft()
        item = next(source, None)
        if item is not None:
            waiting.append(source)
            yield item


def _checked_groups(exclude: Collection[str]) -> frozenset[str]:
    """Return the groups as a set; refuse texts that could never match a group."""
    texts = [exclude] if isinstance(exclude, str) else list(exclude)
    for text in texts:
        found = re.fullmatch(r"(0|[1-9][0-9]*),(0|[1-9][0-9]*)", text)
        if isinstance(exclude, str) or found is None or int(found[1]) > int(found[2]):
            raise UserError(
                "exclude must be a collection of groups such as '3,5', smaller operand first, "
                f"found {text!r}; pass the group property of problems."
            )
    return frozenset(texts)


def _check_prompt(text: str, *, fields: Sequence[str], name: str) -> None:
    """Refuse a text that lacks or repeats a field, or does not end with exactly one space."""
    one_space = text.endswith(" ") and not text.endswith("  ")
    if not one_space or any(text.count(field) != 1 for field in fields):
        raise UserError(
            f"{name} must contain each of {', '.join(fields)} once and end with one space, "
            f"found {text!r}; correct the text."
        )
