"""Plain tables and sentences: what the page and the terminal both print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from circuitune.report.format import Cell

Role = Literal["", "top", "control"]


@dataclass(frozen=True)
class Phrase:
    """A piece of a sentence; `role` says which series it belongs to, and so its colour."""

    text: str
    role: Role = ""


@dataclass(frozen=True)
class Sentence:
    """A sentence in pieces; `str` joins them."""

    phrases: tuple[Phrase, ...]

    def __str__(self) -> str:
        """The whole sentence."""
        return "".join(phrase.text for phrase in self.phrases)


@dataclass(frozen=True)
class Column:
    """A column head; numbers stand to the right, and `code` is printed as it is typed."""

    label: str
    numeric: bool = True
    code: bool = False


@dataclass(frozen=True)
class Row:
    """The cells of one row; `strong` marks the row that was chosen."""

    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text cells; every row has one cell per column."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def transposed(self) -> "Table":
        """Rows become columns; the first column becomes the head."""
        first, *others = self.columns
        names = [Column(str(row.cells[0])) for row in self.rows]
        rows = [
            Row((Cell(column.label), *(row.cells[place] for row in self.rows)))
            for place, column in enumerate(others, start=1)
        ]
        return Table(
            self.title, (Column(first.label, numeric=False), *names), tuple(rows), self.note
        )


def sentence(*pieces: str | Phrase) -> Sentence:
    """A sentence from texts and phrases."""
    return Sentence(tuple(Phrase(p) if isinstance(p, str) else p for p in pieces))


def row(*cells: str | Cell, strong: bool = False) -> Row:
    """A row from texts and cells."""
    return Row(tuple(Cell(c) if isinstance(c, str) else c for c in cells), strong)


def columns(*labels: str, left: Sequence[str] = (), code: Sequence[str] = ()) -> tuple[Column, ...]:
    """Column heads with a capital; those in `left` are words, those in `code` are typed text."""
    return tuple(
        Column(
            label[:1].upper() + label[1:],
            numeric=label not in {*left, *code},
            code=label in code,
        )
        for label in labels
    )
