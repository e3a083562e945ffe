r"""Read public data sets: the calculations in word problems, and multiple-choice questions.

A set is read from a folder with the files as their authors publish them, or without a folder from
the Hugging Face hub. Both ways give the same records, up to the order of the hub's splits:

================  ===================================  ======================================
set               files in the folder                  hub
================  ===================================  ======================================
svamp             svamp/SVAMP.json                     ChilleD/SVAMP, train and test
addsub            addsub/AddSub.json                   allenai/lila, addsub, its parquet files
singleeq          singleeq/questions.json              allenai/lila, singleq, its parquet files
gsm8k             gsm8k/test.jsonl, train.jsonl        openai/gsm8k, main, test and train
commonsense_qa    commonsense_qa/dev_rand_split.jsonl  tau/commonsense_qa, validation
bbh               bbh/NAME.json, one file a task       SaylorTwift/bbh, NAME, test
================  ===================================  ======================================

Two tasks of BIG-Bench Hard count or calculate and are no questions here, `BBH_MATH`: the questions
show what is *not* arithmetic.
"""

import ast
import importlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from circuitune.errors import UserError


@dataclass(frozen=True)
class Step:
    """One calculation inside a word problem, of two whole operands and a whole answer >= 0.

    Attributes:
        before: the text in front of the expression, e.g. the problem and a line break.
        expression: ``"70 - 27 = "`` exactly as the prompt continues; ends right before the first
            digit of the answer.
        a: the first operand.
        sign: the operator as the expression writes it.
        b: the second operand.
        answer: the result.
        id: the data set and the record.
    """

    before: str
    expression: str
    a: int
    sign: str
    b: int
    answer: int
    id: str


@dataclass(frozen=True)
class MultipleChoice:
    r"""A question with answers to choose from.

    Attributes:
        id: the data set and the record.
        prompt: ends without a space, e.g. ``"Question: ...\nAnswer:"``.
        choices: texts that can follow the prompt, each starts with a space.
        answer: place of the right choice.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Record:
    """One record of a set, as its authors publish it.

    Attributes:
        fields: columns.
        id: the set and the number of the record.
        where: where it stands, for error messages.
    """

    fields: dict[str, Any]
    id: str
    where: str

    def get(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """A field of a type.

        Raises:
            UserError: the field is absent or of another type.
        """
        value = self.fields.get(name)
        if not isinstance(value, kind):
            raise self.malformed(name)
        return value

    def malformed(self, name: str) -> UserError:
        """The error for a field that cannot be used."""
        return UserError(
            f"Every record of a data set must have a usable {name}, {self.where} has "
            f"{self.fields.get(name)!r}; download the set anew or take that record out."
        )


@dataclass(frozen=True)
class _Hub:
    """Where a part of a set lies on the hub, and how its columns become the fields of the files.

    Attributes:
        arguments: what ``datasets.load_dataset`` gets beside the split.
        splits: the splits, in the order in which they are read.
        rename: from the hub's columns to the fields of the published file.
    """

    arguments: dict[str, Any]
    splits: tuple[str, ...]
    rename: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def address(self) -> str:
        """What the user would look for."""
        return " ".join(str(value) for value in self.arguments.values())


def _from_lila(row: dict[str, Any]) -> dict[str, Any]:
    """Lila gives each AddSub problem as a Python program; other programs become no equation."""
    program, answer = (_first(row.get(name)) for name in ("output_program", "output_answer"))
    found = _single_operation(str(program))
    return {
        "sQuestion": row.get("input"),
        "lEquations": [f"X = {found}"] if found else [],
        "lSolutions": [answer],
    }


def _first(value: Any) -> Any:
    """The first of several programs or answers that are equally good."""
    return value[0] if isinstance(value, list) and value else value


def _single_operation(program: str) -> str | None:
    """``"70 - 27"`` from a program with one operation of two constants, or of two names of them."""
    try:
        nodes = list(ast.walk(ast.parse(program)))
    except SyntaxError:
        return None
    values = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    operations = [node for node in nodes if isinstance(node, ast.BinOp)]
    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
    if len(operations) != 1 or type(operations[0].op) not in signs:
        return None
    sides = (operations[0].left, operations[0].right)
    both = [values.get(side.id) if isinstance(side, ast.Name) else side for side in sides]
    numbers = [node.value for node in both if isinstance(node, ast.Constant)]
    if len(numbers) != 2:
        return None
    return f"{numbers[0]} {signs[type(operations[0].op)]} {numbers[1]}"


def _from_flat(row: dict[str, Any]) -> dict[str, Any]:
    """The hub's CommonsenseQA has the stem and the choices in columns of their own."""
    choices = row.get("choices") or {}
    labels, texts = choices.get("label", ()), choices.get("text", ())
    listed = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=False)]
    question = {"stem": row.get("question"), "choices": listed}
    return {"id": row.get("id"), "answerKey": row.get("answerKey"), "question": question}


# Lila's repository holds a loading script, which newer versions of `datasets` refuse to run; its
# converted files need none.
_LILA = "hf://datasets/allenai/lila@refs/convert/parquet/{}/*/*.parquet"
# Those that calculate are left out: date_understanding counts days.
BBH_TASKS = (
    *("boolean_expressions", "causal_judgement", "disambiguation_qa"),
    *("hyperbaton", "navigate", "sports_understanding"),
)
BBH_MATH = ("multistep_arithmetic_two", "object_counting")
_SETS: dict[str, tuple[tuple[str, ...], _Hub]] = (
    {
        "svamp": (("svamp/SVAMP.json",), _Hub({"path": "ChilleD/SVAMP"}, ("train", "test"))),
        "addsub": (
            ("addsub/AddSub.json",),
            _Hub({"path": "parquet", "data_files": _LILA.format("addsub")}, ("train",), _from_lila),
        ),
        "singleeq": (
            ("singleeq/questions.json",),
            _Hub(
                {"path": "parquet", "data_files": _LILA.format("singleq")}, ("train",), _from_lila
            ),
        ),
        "gsm8k": (
            ("gsm8k/test.jsonl", "gsm8k/train.jsonl"),
            _Hub({"path": "openai/gsm8k", "name": "main"}, ("test", "train")),
        ),
        "commonsense_qa": (
            ("commonsense_qa/dev_rand_split.jsonl",),
            _Hub({"path": "tau/commonsense_qa"}, ("validation",), _from_flat),
        ),
        "commonsense_qa/train": (
            ("commonsense_qa/train_rand_split.jsonl",),
            _Hub({"path": "tau/commonsense_qa"}, ("train",), _from_flat),
        ),
    }
    | {
        f"gsm8k/{part}": (
            (f"gsm8k/{part}.jsonl",),
            _Hub({"path": "openai/gsm8k", "name": "main"}, (part,)),
        )
        for part in ("train", "test")
    }
    | {
        f"bbh/{task}": (
            (f"bbh/{task}.json",),
            _Hub({"path": "SaylorTwift/bbh", "name": task}, ("test",)),
        )
        for task in (*BBH_TASKS, *BBH_MATH)
    }
)


def steps(name: str, data_dir: Path | None, *, limit: int) -> list[Step]:
    """The first calculations of a set of word problems, in its order, one a problem.

    Problems whose calculation is not one operation of two whole numbers with a whole answer of 0
    or more, or whose answer is given otherwise than it is calculated, are left out.

    Args:
        name: ``svamp``, ``addsub`` or ``gsm8k``.
        data_dir: the folder with the sets; None for the hub.
        limit: most steps.

    Raises:
        UserError: the name is unknown, the set cannot be had, or a record is malformed.
    """
    read = _one_of(_STEPS, name)
    found = (read(record) for record in records(name, data_dir))
    return list(islice((step for step in found if step is not None), limit))


def questions(name: str, data_dir: Path | None, *, limit: int, seed: int) -> list[MultipleChoice]:
    """Questions of a set, drawn at random; the same for the same seed.

    Args:
        name: ``commonsense_qa`` or ``bbh``, whose tasks take turns. Choices are the full texts of
            the answers, also where a task lists them under letters: letters say nothing of a
            small model.
        data_dir: the folder with the sets; None for the hub.
        limit: most questions.
        seed: draws them.

    Raises:
        UserError: the name is unknown, the set cannot be had, or a record is malformed.
    """
    parts, read = _one_of(_QUESTIONS, name)
    drawn = []
    for part in parts:
        found = list(records(part, data_dir))
        random.Random(f"{seed}/{part}").shuffle(found)
        drawn.append([read(record) for record in found[:limit]])
    laps = zip_longest(*drawn)
    return [item for lap in laps for item in lap if item is not None][:limit]


def _one_of(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise UserError(
            f"A data set must be one of {', '.join(table)}, found {name!r}; use one of these."
        )
    return table[name]


# ------------------------------------------------------------------------------ files and the hub


def records(name: str, data_dir: Path | None) -> Iterator[Record]:
    """All records of a set; files are read one after the other, as far as they are needed.

    Args:
        name: a set above, a part as ``gsm8k/test`` or ``commonsense_qa/train``, or a task as
            ``bbh/navigate``.
        data_dir: the folder with the files; None for the hub.

    Raises:
        UserError: the set cannot be read.
    """
    files, hub = _SETS[name]
    if data_dir is None:
        yield from _from_hub(name, hub, files)
        return
    for file in files:
        path = data_dir / file
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"The data set {name} must lie at {path}, it cannot be read there ({error}); give "
                "its folder with --data-dir, or --data-dir hub with `pip install datasets` and a "
                "network."
            ) from error
        kind = path.stem if len(files) > 1 else ""
        for number, fields in enumerate(_parse(text, path), start=1):
            ident = "/".join(part for part in (name, kind, str(number)) if part)
            yield Record(fields, ident, f"record {number} of {path}")


def _parse(text: str, path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file: a JSON list, an object with a list of examples, or lines of JSON."""
    lines = path.suffix == ".jsonl"
    # Not splitlines: a text may hold U+2028 and its like, which JSON leaves unescaped.
    pieces = [line for line in text.split("\n") if line.strip()] if lines else [text]
    for number, piece in enumerate(pieces, start=1):
        where = f"record {number} of {path}" if lines else str(path)
        try:
            value = json.loads(piece)
        except ValueError as error:
            raise UserError(
                f"A data set must be JSON, {where} is not ({error}); download the file anew."
            ) from error
        if not lines and isinstance(value, dict):
            value = value.get("examples")
        if not lines and not isinstance(value, list):
            raise UserError(
                f"A data set must be a JSON list of records, {path} is not; download it anew."
            )
        for place, item in enumerate([value] if lines else value, start=number):
            if not isinstance(item, dict):
                raise UserError(
                    f"A record of a data set must be a JSON object, record {place} of {path} is "
                    "not; download the file anew or take that record out."
                )
            yield item


def _from_hub(name: str, hub: _Hub, files: Sequence[str]) -> Iterator[Record]:
    for split in hub.splits:
        try:
            rows = importlib.import_module("datasets").load_dataset(**hub.arguments, split=split)
        # The library raises dozens of kinds for one cause: the set cannot be had.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"The data set {name} must be on the Hugging Face hub as {hub.address}, it cannot "
                f"be read ({type(error).__name__}: {reason}); give a folder that holds "
                f"{' and '.join(files)} with --data-dir, or `pip install datasets` and have a "
                "network."
            ) from error
        kind = split if len(hub.splits) > 1 else ""
        for number, row in enumerate(rows, start=1):
            ident = "/".join(part for part in (name, kind, str(number)) if part)
            where = f"record {number} of {hub.address} ({split})"
            yield Record(hub.rename(dict(row)), ident, where)


# ----------------------------------------------------------------------------------- word problems

_WHOLE = r"(\d+)(?:\.0*)?"
_OPERATION = re.compile(rf"\(?\s*{_WHOLE}\s*([-+*/])\s*{_WHOLE}\s*\)?")


def _svamp(record: Record) -> Step | None:
    body, question = record.get("Body").strip(), record.get("Question").strip()
    problem = f"{body}{'' if body.endswith(('.', ',', '?', '!')) else '.'} {question}"
    given = _number(record, "Answer", record.get("Answer", (str, int, float)))
    return _spelled_out(record, problem, record.get("Equation"), given)


def _addsub(record: Record) -> Step | None:
    equations, solutions = record.get("lEquations", list), record.get("lSolutions", list)
    if len(equations) != 1 or len(solutions) != 1:
        return None
    left, equals, right = str(equations[0]).partition("=")
    if left.strip() != "X" or not equals:
        return None
    given = _number(record, "lSolutions", solutions[0])
    return _spelled_out(record, record.get("sQuestion").strip(), right, given)


def _spelled_out(record: Record, problem: str, operation: str, given: float) -> Step | None:
    """The problem and its operation on a line of its own."""
    found = _OPERATION.fullmatch(operation.strip())
    if found is None:
        return None
    a, sign, b = int(found[1]), found[2], int(found[3])
    answer = _result(a, sign, b)
    if answer is None or answer != given:
        return None
    return Step(f"{problem}\n", f"{a} {sign} {b} = ", a, sign, b, answer, record.id)


_ANNOTATION = re.compile(r"<<[^<>]*>>")
_CALCULATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
# Nothing that would make it a part of a longer number or of a longer calculation.
_NO_MORE = r"(?<![\d.,$%)])(?<![-+*/=][ ])(?<![-+*/=(])"
_WRITTEN = {"+": r"\+", "-": "-", "*": "[*x\N{MULTIPLICATION SIGN}]", "/": "[/\N{DIVISION SIGN}]"}


def _gsm8k(record: Record) -> Step | None:
    """The first annotated step whose text reads as the annotation does."""
    solution = record.get("answer")
    for found in _CALCULATION.finditer(solution):
        a, sign, b = int(found[1]), found[2], int(found[3])
        text = _ANNOTATION.sub("", solution[: found.start()])
        written = re.search(rf"{_NO_MORE}{a} ?({_WRITTEN[sign]}) ?{b} ?= ?$", text)
        goes_on = re.match(rf"{found[4]}(?![.,]?\d)", solution[found.end() :])
        answer = _result(a, sign, b)
        if written and goes_on and answer is not None and str(answer) == found[4]:
            before = f"{record.get('question').strip()}\n{text[: written.start()]}"
            return Step(before, written[0], a, written[1], b, answer, record.id)
    return None


def _result(a: int, sign: str, b: int) -> int | None:
    """The result where it is whole and 0 or more."""
    if sign == "/":
        return a // b if b and a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return result if result >= 0 else None


def _number(record: Record, name: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError as error:
        raise record.malformed(name) from error


_STEPS: dict[str, Callable[[Record], Step | None]] = {
    "svamp": _svamp,
    "addsub": _addsub,
    "gsm8k": _gsm8k,
}


# --------------------------------------------------------------------------------- multiple choice


def _commonsense(record: Record) -> MultipleChoice:
    question = record.get("question", dict)
    stem, listed = question.get("stem"), question.get("choices")
    if not isinstance(stem, str) or not isinstance(listed, list) or not listed:
        raise record.malformed("question")
    options = [item if isinstance(item, dict) else {} for item in listed]
    labels = [str(item.get("label")) for item in options]
    if record.get("answerKey") not in labels:
        raise record.malformed("answerKey")
    choices = tuple(f" {item.get('text')}" for item in options)
    place = labels.index(record.get("answerKey"))
    return MultipleChoice(record.id, f"Question: {stem.strip()}\nAnswer:", choices, place)


# Tasks of BIG-Bench Hard whose questions do not list their options.
_UNLISTED = {"boolean_expressions": ("True", "False"), "sports_understanding": ("yes", "no")}


def _bbh(record: Record) -> MultipleChoice:
    text, target = record.get("input").strip(), record.get("target").strip()
    stem, _, options = text.partition("Options:")
    lettered = dict(re.findall(r"^(\([A-Z]\)) (.+)$", options, re.MULTILINE))
    words: Sequence[str] = re.findall(r"^- (\w+)$", options, re.MULTILINE)
    listed = lettered or {
        word: word for word in words or _UNLISTED.get(record.id.split("/")[1], ())
    }
    if target not in listed:
        raise record.malformed("target")
    asked = stem.strip() if lettered else text
    choices = tuple(f" {answer.strip()}" for answer in listed.values())
    place = list(listed).index(target)
    return MultipleChoice(record.id, f"Question: {asked}\nAnswer:", choices, place)


_QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[Record], MultipleChoice]]] = {
    "commonsense_qa": (("commonsense_qa",), _commonsense),
    "bbh": (tuple(f"bbh/{task}" for task in BBH_TASKS), _bbh),
}
