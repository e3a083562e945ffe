r"""Word problems of four public sets, whole, each with a part to train on and a part to test.

GSM8K has its own parts. AddSub, SingleEq and SVAMP have none that would serve: many problems of
SingleEq stand in AddSub too, some with a word changed or a number spelled out, and SVAMP asks
several questions about one story. So the numbers in a problem decide: all problems of all three
sets with the same numbers lie in the same part, by a hash of these numbers alone. No test problem
of one set is a training problem of another, also where only one of the sets is at hand. The same
story with other numbers does stand on both sides.

A problem has a solution to learn from: its equation, worked out, and GSM8K's last line
``#### 43``; that line alone where the set gives no equation, or one that does not come to the
answer. GSM8K has its own solutions. Answers are those of the sets, the few wrong ones too.
"""

import ast
import hashlib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

from circuitune.errors import UserError
from circuitune.examples import Overlap, normal_words, overlap
from circuitune.extracting import TOLERANCE, WORDS
from circuitune.readers import Record, records

SETS = ("addsub", "singleeq", "svamp", "gsm8k")
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
SPLIT = 1
"""Version of the parts: results compare only within one version."""
_SPELLED = WORDS | {"one": 1}


@dataclass(frozen=True)
class WordProblem:
    r"""A problem in words and its solution.

    Attributes:
        id: the set and the record.
        question: the problem.
        answer: the number, written plainly: ``43``, ``0.75``.
        solution: what follows the question in training, e.g. ``70 - 27 = 43\n#### 43``.
    """

    id: str
    question: str
    answer: str
    solution: str


def word_problems(name: str, data_dir: Path | None, part: Part) -> list[WordProblem]:
    """Problems of one part of a set, in the order of the set.

    Args:
        name: one of `SETS`.
        data_dir: folder with the files of `circuitune.readers`; None for the Hugging Face hub.
        part: the part to train on, or the part to test.

    Raises:
        UserError: the set is unknown, cannot be read, or holds no problem of the part.
    """
    if name not in SETS:
        raise UserError(
            f"A set of word problems must be one of {', '.join(SETS)}, found {name!r}; use one."
        )
    if name == "gsm8k":
        found = [_gsm8k(record) for record in records(f"gsm8k/{part}", data_dir)]
    else:
        every = [_READERS[name](record) for record in records(name, data_dir)]
        found = [problem for problem in every if part_of(problem.question) == part]
    if not found:
        raise UserError(
            f"A set of word problems must hold some, the {part} part of {name} is empty; download "
            "it anew."
        )
    return found


def part_of(question: str) -> Part:
    """The part that a problem of a set without own parts lies in.

    The numbers in it decide, each counted once and ``two`` as ``2``; its words if it has none.
    """
    words = normal_words(question)
    spelled = {str(_SPELLED.get(word, word)) for word in words}
    numbers = sorted(word for word in spelled if word[-1].isdigit())
    digest = hashlib.sha256(" ".join(numbers or words).encode()).digest()
    return PARTS[digest[0] % 2]


def shared(train: Sequence[WordProblem], test: Sequence[WordProblem]) -> list[Overlap]:
    """Test problems that stand among training problems, see `circuitune.examples.overlap`."""
    return overlap([item.question for item in train], [item.question for item in test])


def plain_number(text: str) -> str:
    """A number without what does not change it: ``43`` for ``43.0`` and ``1,000``.

    Raises:
        ValueError: it is no finite number.
    """
    try:
        value = Decimal(text.strip().replace(",", ""))
    except InvalidOperation as error:
        raise ValueError(f"not a number: {text!r}") from error
    if not value.is_finite():
        raise ValueError(f"not a finite number: {text!r}")
    return f"{value.normalize():f}"


def _number(record: Record, name: str, value: object) -> str:
    try:
        return plain_number(str(value))
    except ValueError as error:
        raise record.malformed(name) from error


def _svamp(record: Record) -> WordProblem:
    body, question = record.get("Body").strip(), record.get("Question").strip()
    joined = f"{body}{'' if body.endswith(('.', ',', '?', '!')) else '.'} {question}"
    answer = _number(record, "Answer", record.get("Answer", (str, int, float)))
    return WordProblem(record.id, joined, answer, _worked(record.get("Equation"), answer))


def _with_equations(record: Record) -> WordProblem:
    """AddSub writes ``X = 70 - 27``, SingleEq ``70-x=27``; the hub's copies may have none."""
    solutions, equations = record.get("lSolutions", list), record.get("lEquations", list)
    if not solutions:
        raise record.malformed("lSolutions")
    answer = _number(record, "lSolutions", solutions[0])
    solution = _worked(str(equations[0]) if len(equations) == 1 else "", answer)
    return WordProblem(record.id, record.get("sQuestion").strip(), answer, solution)


def _gsm8k(record: Record) -> WordProblem:
    """The solution stays as it is, annotations too: so do lm-eval's worked examples."""
    solution = record.get("answer")
    answer = _number(record, "answer", solution.rpartition("####")[2])
    return WordProblem(record.id, record.get("question").strip(), answer, solution.strip())


_READERS: dict[str, Callable[[Record], WordProblem]] = {
    "addsub": _with_equations,
    "singleeq": _with_equations,
    "svamp": _svamp,
}


# ------------------------------------------------------------------------------- worked solutions

_PIECES = re.compile(r"\d+(?:\.\d*)?|\.\d+|\S")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _worked(equation: str, answer: str) -> str:
    """``70 - 27 = 43`` and the line with the answer, from an equation as the sets write it.

    Args:
        equation: ``( 70.0 - 27.0 )``, ``X = 70 - 27`` or ``70-x=27``; empty if there is none.
        answer: the value of the expression, or of the unknown.
    """
    last = f"#### {answer}"
    pieces = [re.sub(r"\.0*$", "", piece) for piece in _PIECES.findall(equation.lower())]
    text = re.sub(r"(?<=\() | (?=\))", "", " ".join(pieces))
    sides = text.split(" = ") if "=" in text else ["x", text]
    values = [_value(side, Fraction(answer)) for side in sides]
    if len(sides) != 2 or "x" not in "".join(sides) or not _equal(*values):
        return last
    rest = [_bare(side) for side in sides if side != "x"]
    if len(rest) == 2:
        return f"{rest[0]} = {rest[1]}, x = {answer}\n{last}"
    return f"{rest[0]} = {answer}\n{last}"


def _bare(side: str) -> str:
    """A side without parentheses around the whole of it."""
    inner = side[1:-1]
    return inner if side.startswith("(") and _value(inner, Fraction(1)) is not None else side


def _equal(left: Fraction | None, right: Fraction | None) -> bool:
    if left is None or right is None:
        return False
    return abs(left - right) <= Fraction(TOLERANCE) * max(abs(left), abs(right))


def _value(text: str, unknown: Fraction) -> Fraction | None:
    """The value of an expression for a value of x; None if it is none."""
    try:
        return _calculated(ast.parse(text, mode="eval").body, unknown)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _calculated(node: ast.expr, unknown: Fraction) -> Fraction:
    match node:
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
            sides = (_calculated(side, unknown) for side in (left, right))
            return _OPERATIONS[type(operation)](*sides)
        case ast.UnaryOp(ast.USub(), operand):
            return -_calculated(operand, unknown)
        case ast.Constant(int() | float() as value):
            return Fraction(str(value))
        case ast.Name("x"):
            return unknown
    raise ValueError("not a calculation")
