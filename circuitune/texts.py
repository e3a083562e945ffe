r"""Read training texts from the files that users have, and tell their layout by the columns.

The first layout whose columns are there is taken and announced:

====================================  ==========================================================
columns                               how a record is written
====================================  ==========================================================
messages, conversations               turns (role/content or from/value)
prompt, completion                    joined as they are, with nothing in between
instruction, output (and input)       the prompt of Stanford Alpaca (its train.py)
Body, Question, Answer (SVAMP)        ``"Question: ...\nAnswer:"`` and ``" ..."``, as in
sQuestion, lSolutions (AddSub)        lm-evaluation-harness; GSM8K keeps its calculations and its
question, answer (GSM8K)              #### line
text                                  all of it is completion
====================================  ==========================================================
"""

import csv
import importlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitune.errors import UserError


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it; ``question`` is the problem without the layout."""

    prompt: str
    completion: str
    question: str


@dataclass(frozen=True)
class Turn:
    """One turn of a chat; ``role`` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    turns: tuple[Turn, ...]

    @property
    def question(self) -> str:
        """All that the user says."""
        return "\n".join(turn.text for turn in self.turns if turn.role == "user")


Record = Completion | Chat


@dataclass(frozen=True)
class Texts:
    """Training texts as read, before a tokenizer.

    Attributes:
        records: the records, in the order of the file.
        layout: what was detected, e.g. ``"question and answer"``.
        announcement: one sentence for the user: the layout, the columns and the counts.
    """

    records: tuple[Record, ...]
    layout: str
    announcement: str

    def __iter__(self) -> Iterator[Record]:
        """The records."""
        return iter(self.records)

    @property
    def questions(self) -> list[str]:
        """The problem of each record, for ``overlap``."""
        return [record.question for record in self.records]


# ------------------------------------------------------------------------- files and the hub


def read_training_data(source: str | Path, *, limit: int | None = None, seed: int = 0) -> Texts:
    """Read training texts and tell their layout by the columns.

    Args:
        source: a .json, .jsonl, .csv or .parquet file, or ``hub:NAME`` or ``hub:NAME:CONFIG`` for
            the train part of a data set on the Hugging Face hub.
        limit: most records, drawn at random; None for all.
        seed: draws them; the same records for the same seed.

    Raises:
        UserError: the data cannot be read, their layout is unknown, or a record is malformed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"The limit of records must be at least 1, found {limit}; choose more.")
    name = str(source)
    rows = _hub_rows(name[4:]) if name.startswith("hub:") else _file_rows(Path(source))
    total = len(rows)
    places = range(total)
    if limit is not None and limit < total:
        places = sorted(random.Random(seed).sample(places, limit))
    chosen = [_Row(rows[place], f"record {place + 1} of {name}") for place in places]
    if not chosen:
        raise UserError(f"Training data must hold records, {name} has none; check the file.")
    layout = _layout_of(chosen[0].fields, name)
    read = [layout.read(row) for row in chosen]
    records = tuple(record for record in read if record is not None)
    if not records:
        raise UserError(
            f"Training data must have texts, all {len(read)} records of {name} are blank in "
            f"{' or '.join(layout.columns)}; check the file."
        )
    said = f"{name}: {len(records)} records of {layout.name} (columns {', '.join(layout.columns)})"
    said += f", {len(read) - len(records)} blank ones left out" if len(read) > len(records) else ""
    said += f", drawn from {total} with seed {seed}" if len(read) < total else ""
    return Texts(records, layout.name, f"{said}.")


def _hub_rows(address: str) -> Sequence[Any]:
    name, _, config = address.partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"Reading {name} from the hub must find the package datasets, it is not installed; "
            "`pip install 'circuitune[data]'` or give a file."
        ) from error
    try:
        return datasets.load_dataset(name, config or None, split="train")
    # The library raises dozens of kinds for one cause: the set cannot be had.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The data set {address} must be on the hub with a train part, it cannot be read "
            f"({type(error).__name__}: {reason}); check the name, as in hub:NAME:CONFIG, and the "
            "network, or give a file."
        ) from error


def _file_rows(path: Path) -> list[Any]:
    kinds = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines}
    kinds |= {".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in kinds:
        raise UserError(
            f"Training data must be one of {', '.join(kinds)}, found {path}; convert the file, or "
            "write hub:NAME for a data set of the hub."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Training data must be a readable file, {path} is not ({error.strerror}); check the "
            "path, or write hub:NAME for a data set of the hub."
        ) from error
    if not content.strip():
        raise UserError(f"Training data must hold records, {path} is empty; check the file.")
    try:
        return kinds[path.suffix.lower()](content)
    # pyarrow's errors are ValueErrors too; a file nested too deep for JSON is a RecursionError.
    except (ValueError, csv.Error, OSError, RecursionError) as error:
        what = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else path.suffix[1:].lower()
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"Training data must be {what} as its name says, {path} is not ({reason}); correct or "
            "convert the file."
        ) from error


def _json(content: bytes) -> list[Any]:
    """A list of records, an object with such a list, one record, or after all lines of JSON."""
    text = content.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError as error:
        try:
            json.loads(text.strip().split("\n")[0])
        except ValueError:
            raise error from None
        return _json_lines(content)
    if isinstance(value, dict) and not _fitting(value):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    return value if isinstance(value, list) else [value]


def _json_lines(content: bytes) -> list[Any]:
    rows = []
    # Not splitlines: a text may hold U+2028 and its like, which JSON leaves unescaped.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _csv(content: bytes) -> list[Any]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many cells as the first line")
        rows.append(row)
    return rows


def _parquet(content: bytes) -> list[Any]:
    # Not pandas: it turns lists of turns into arrays.
    return importlib.import_module("pyarrow.parquet").read_table(io.BytesIO(content)).to_pylist()


# ----------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class _Row:
    """The fields of a record, and where it stands, for error messages."""

    fields: Any
    where: str

    def text(self, name: str, *, number: bool = False) -> str:
        """A text; with ``number`` also a number, written without a needless ``.0``."""
        value = self.fields.get(name) if isinstance(self.fields, dict) else None
        if number and isinstance(value, int | float) and not isinstance(value, bool):
            return re.sub(r"\.0+$", "", str(value))
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            raise self.malformed(name, "a text", value)
        return value

    def listed(self, name: str) -> list[Any]:
        """A list, also one that a CSV cell holds as JSON."""
        value = self.fields.get(name) if isinstance(self.fields, dict) else None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise self.malformed(name, "a list", value) from error
        if not isinstance(value, list) or not value:
            raise self.malformed(name, "a list", value)
        return value

    def malformed(self, name: str, wanted: str, value: object) -> UserError:
        """The error for a field that cannot be used."""
        found = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        return UserError(
            f"In training data {name} must be {wanted}, {self.where} has {found}; correct or "
            "remove that record."
        )


def _completion(prompt: str, text: str, question: str) -> Completion | None:
    """None for a record with a blank side, which the announcement counts."""
    blank = not text.strip() or not question.strip()
    return None if blank else Completion(prompt, text, question.strip())


def _question(question: str, answer: str) -> Completion | None:
    answer = f" {answer.strip()}" if answer.strip() else ""
    return _completion(f"Question: {question.strip()}\nAnswer:", answer, question)


def _prompt(row: _Row) -> Completion | None:
    prompt, text = row.text("prompt"), row.text("completion", number=True)
    return _completion(prompt, text, prompt or text)


def _alpaca(row: _Row) -> Completion | None:
    instruction, further = row.text("instruction"), ""
    if row.fields.get("input") is not None:
        further = row.text("input").strip()
    context = ", paired with an input that provides further context" if further else ""
    prompt = f"Below is an instruction that describes a task{context}. Write a response that "
    prompt += f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{further}\n\n" if further else ""
    question = f"{instruction}\n\n{further}" if further else instruction
    return _completion(f"{prompt}### Response:\n", row.text("output", number=True), question)


def _svamp(row: _Row) -> Completion | None:
    body, answer = row.text("Body").strip(), row.text("Answer", number=True)
    stop = "" if body.endswith((".", ",", "?", "!")) else "."
    whole = f"{body}{stop} {row.text('Question').strip()}"
    return _question(whole, re.sub(r"^(-?\d+)\.0+$", r"\1", answer))


def _addsub(row: _Row) -> Completion | None:
    solutions = [_Row({"lSolutions": item}, row.where) for item in row.listed("lSolutions")]
    answers = [item.text("lSolutions", number=True) for item in solutions]
    return _question(row.text("sQuestion"), ", ".join(answers))


_ROLES = {"system": "system", "user": "user", "human": "user"}
_ROLES |= {"assistant": "assistant", "gpt": "assistant"}


def _chat(row: _Row, column: str) -> Chat | None:
    turns = []
    if isinstance(row.fields.get("system"), str):
        turns.append(Turn("system", row.fields["system"]))
    for number, item in enumerate(row.listed(column), start=1):
        turn = _Row(item, f"turn {number} of {row.where}")
        if not isinstance(item, dict):
            raise turn.malformed(column, "a list of turns with a role and a text each", item)
        named, said = ("from", "value") if "from" in item else ("role", "content")
        role = turn.text(named)
        if role not in _ROLES:
            raise turn.malformed(named, f"one of {', '.join(_ROLES)}", role)
        turns.append(Turn(_ROLES[role], turn.text(said)))
    turns = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    return Chat(tuple(turns)) if turns and all(turn.text.strip() for turn in turns) else None


@dataclass(frozen=True)
class _Layout:
    name: str
    columns: tuple[str, ...]
    read: Callable[[_Row], Record | None]


_LAYOUTS = (
    _Layout("chat", ("messages",), lambda row: _chat(row, "messages")),
    _Layout("chat", ("conversations",), lambda row: _chat(row, "conversations")),
    _Layout("prompt and completion", ("prompt", "completion"), _prompt),
    _Layout("instruction and output", ("instruction", "output"), _alpaca),
    _Layout("word problems", ("Body", "Question", "Answer"), _svamp),
    _Layout("word problems", ("sQuestion", "lSolutions"), _addsub),
    _Layout(
        "question and answer",
        ("question", "answer"),
        lambda row: _question(row.text("question"), row.text("answer", number=True)),
    ),
    _Layout(
        "plain text", ("text",), lambda row: _completion("", row.text("text"), row.text("text"))
    ),
)


def _fitting(fields: dict[str, Any]) -> list[_Layout]:
    return [layout for layout in _LAYOUTS if fields.keys() >= set(layout.columns)]


def _layout_of(fields: object, name: str) -> _Layout:
    found = fields if isinstance(fields, dict) else {}
    if not _fitting(found):
        known = "; ".join(", ".join(layout.columns) for layout in _LAYOUTS)
        columns = f"has {', '.join(map(str, found))}" if found else "has no columns"
        raise UserError(
            f"Training data must have the columns of a known layout ({known}), {name} {columns}; "
            "rename its columns."
        )
    return _fitting(found)[0]
