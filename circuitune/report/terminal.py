"""The summary of a run in a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from circuitune.report.benchmarks import Benchmarks, benchmarks
from circuitune.report.fields import Source
from circuitune.report.format import Cell
from circuitune.report.load import load_evaluations
from circuitune.report.proposing import Enough
from circuitune.report.reaching import Reached
from circuitune.report.summary import Summary, measurements
from circuitune.report.tables import Sentence, Table

_COLOURS = {"top": "bold dark_orange3", "control": "bold dodger_blue2", "": ""}


def render(summary: Summary) -> RenderableType:
    """The headline, the main tables and what is left to run, for `rich.console.Console.print`."""
    parts: list[RenderableType] = [Rule(Text(summary.title, style="bold")), Text()]
    for line in summary.headline:
        parts += [_sentence(line), Text()]
    for line in summary.outdated:
        parts += [Text(line, style="bold red"), Text()]
    located = (summary.pairs, summary.ranking, summary.single_pass)
    tuning = summary.tuning and summary.tuning.transposed()
    for line in summary.certainty:
        parts += [Text(line, style="dim"), Text()]
    for line in summary.brought:
        parts += [_sentence(line), Text()]
    shown, judged = summary.explained, summary.judged
    does = (shown.heads, shown.forms) if shown else ()
    proves = (judged.accuracy, judged.criteria) if judged else ()
    for table in (*located, *does, summary.knockout, summary.other_tasks, *proves, tuning):
        if table is not None and table.rows:
            parts += [_FittedTable(table), Text()]
    parts += _enough(summary.enough) if summary.enough else []
    parts += _benchmarks(summary.benchmarks) if summary.benchmarks else []
    parts += _reached(summary.reached) if summary.reached else []
    notes = (*shown.notes, *shown.forms_notes) if shown else ()
    for line in (*notes, judged.note if judged else ""):
        parts += [Text(line, style="dim"), Text()] if line else []
    for step in summary.steps:
        parts.append(Text.assemble(("next  ", "dim"), (step.command, "bold")))
        parts.append(Padding(Text(step.gives, style="dim"), (0, 0, 0, 6)))
    return Group(*parts)


def render_benchmarks(path: Path) -> RenderableType:
    """All numbers of an `eval.json` whose run directory may hold nothing else.

    Raises:
        UserError: The file is malformed.
    """
    records = load_evaluations(Source(path, f"circuitune evaluate {path.parent}"))
    own = measurements([record for record in records if not (record.kind or record.reason)])
    parts: list[RenderableType] = [_FittedTable(own), Text()] if own else []
    found = benchmarks(records)
    return Group(*parts, *(_benchmarks(found) if found else ()))


def _benchmarks(found: Benchmarks) -> list[RenderableType]:
    """Scores, differences, and what could not be asked."""
    tables = [table for table in (found.scores, found.differences) if table and table.rows]
    parts: list[RenderableType] = []
    for table in tables:
        parts += [_FittedTable(table), Text()]
    return parts + [Text(line, style="dim") for line in found.missing]


def _enough(found: Enough) -> list[RenderableType]:
    """Which set is enough: goal, choice and the sets of its size."""
    parts: list[RenderableType] = []
    for line in found.told:
        parts += [_sentence(line), Text()]
    parts += [_FittedTable(found.beside), Text()]
    return parts + ([Text(found.note, style="dim"), Text()] if found.note else [])


def _reached(found: Reached) -> list[RenderableType]:
    """How far the circuit reaches; the whole matrix is on the page."""
    parts: list[RenderableType] = []
    parts += [_FittedTable(found.compact), Text()] if found.compact else []
    parts += [Text(found.flagged, style="dim"), Text()] if found.flagged else []
    for table in (found.shared, found.choices):
        parts += [_FittedTable(table), Text()] if table else []
    for line in found.changed:
        parts += [Text(line), Text()]
    parts += [_FittedTable(found.changes), Text()] if found.changes else []
    for line in found.notes:
        parts += [Text(line, style="dim"), Text()]
    return parts


@dataclass(frozen=True)
class _FittedTable:
    """A table that puts intervals below their values where the terminal is narrow."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        wide = _drawn(self.table, between=" ")
        fits = Measurement.get(console, options.update(width=10_000), wide).maximum
        yield wide if fits <= options.max_width else _drawn(self.table, between="\n")


def _drawn(table: Table, *, between: str) -> RichTable:
    drawn = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        caption=Text(table.note, style="dim") if table.note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in table.columns:
        drawn.add_column(Text(column.label), justify="right" if column.numeric else "left")
    for line in table.rows:
        cells = (_cell(cell, between) for cell in line.cells)
        drawn.add_row(*cells, style="bold" if line.strong else "")
    return drawn


def _cell(cell: Cell, between: str) -> Text:
    return Text.assemble(cell.text, (between + cell.interval if cell.interval else "", "dim"))


def _sentence(line: Sentence) -> Text:
    return Text.assemble(*((phrase.text, _COLOURS[phrase.role]) for phrase in line.phrases))
