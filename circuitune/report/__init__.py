"""The report: a pure function from a run directory to one self-contained HTML file.

    write_report(Path("runs/x"))           # writes runs/x/report.html
    render(summarise(Path("runs/x")))      # the same tables for a terminal (`terminal.render`)

It reads files only and never loads a model: torch is not imported.
"""

from pathlib import Path

from circuitune.report import html, summary
from circuitune.report.load import load
from circuitune.report.measures import measure
from circuitune.report.summary import Summary

__all__ = ["Summary", "summarise", "write_report"]


def write_report(run: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Stages that have not run are named with the command that gives them. An old report stays
    intact when anything fails.

    Raises:
        UserError: The directory is no run, a file in it is malformed, or it cannot be written.
    """
    found = load(run)
    measured = measure(found)
    path = run / "report.html"
    html.write_atomically(path, html.page(found, measured, summary.build(found, measured)))
    return path


def summarise(run: Path) -> Summary:
    """The tables of the report, for the terminal.

    Raises:
        UserError: The directory is no run, or a file in it is malformed.
    """
    found = load(run)
    return summary.build(found, measure(found))
