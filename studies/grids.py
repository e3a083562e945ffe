"""What the grids of this folder share: the located run, the text, and how a result is kept."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from circuitune.retention import retention_text

PARAGRAPHS = 200


def located_run(model: str, folder: Path) -> Path:
    """A run with pairs, effects, circuit and graph; located now if no process has."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "circuit.json").is_file():
            words = ["locate", model, "--out", str(folder)]
            subprocess.run([sys.executable, "-m", "circuitune", *words], check=True)
    return folder


@contextmanager
def claimed(target: Path, folder: Path) -> Iterator[bool]:
    """Whether a cell is ours to run: not finished, and run by no other process.

    The claim is a lock on a file beside the cell's folder, which falls when its process ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not target.is_file()


def paragraphs(data_dir: Path) -> list[str]:
    """Paragraphs of WikiText-2, at equal distances."""
    every = retention_text(str(data_dir / "wikitext2" / "test.txt"))
    return every[:: len(every) // PARAGRAPHS][:PARAGRAPHS]


def linked(located: Path, folder: Path) -> Path:
    """A folder in which a cell of the grid trains: the files of the located run as links."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in located.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def rounded(drift: Any) -> list[list[float]]:
    """Tokens, loss and KL (sums) of every paragraph, as results keep them."""
    return [[int(n), round(loss, 4), round(kl, 6)] for n, loss, kl in drift]


def keep(target: Path, content: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    beside = target.with_suffix(".part")
    beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    beside.replace(target)
