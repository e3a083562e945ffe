"""Reads what a report says: the page as a browser would find it, and the terminal's text."""

import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
from rich.console import Console

from circuitune.report import summarise, write_report
from circuitune.report.terminal import render

_VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would find: visible text, addresses, styles and figures by their id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.data: dict[str, str] = {}
        self.policy = ""
        self._reading: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.addresses += [values[name] for name in ("src", "href", "action") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag not in _VOID:
            self.open.append(tag)
            self._reading = values.get("id") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
        elif self.open and self.open[-1] == "script":
            if self._reading:
                self.data[self._reading] = self.data.get(self._reading, "") + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """The visible text, with ordinary spaces."""
        return " ".join("".join(self.texts).split())

    def figure(self, name: str) -> dict:
        """The plotly description of one figure."""
        return json.loads(self.data[f"{name}-data"])


def read_page(run: Path) -> Page:
    """Write the report of `run` and read it back."""
    return Page(write_report(run).read_text(encoding="utf-8"))


def edit_json(path: Path, change: Callable[[object], object]) -> None:
    """Replace a JSON file by what `change` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))))


def edit_table(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Replace a parquet file by what `change` makes of it."""
    change(pd.read_parquet(path)).to_parquet(path)


def headline(run: Path) -> str:
    """The headline as one text."""
    return " ".join(str(line) for line in summarise(run).headline)


def printed(run: Path, width: int) -> str:
    """The terminal summary, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(summarise(run)))
    return console.file.getvalue()
