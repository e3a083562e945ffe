"""Two processes that were killed go on together, and end with what one process finds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from circuitune import cli
from tests.test_ranks import ROOT, check_same_table, launch, numbers

WORDS = "--sizes 1,2 --controls 3 --no-control-tasks --ablations mean --where end"


@pytest.fixture(scope="module")
def located(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on own pairs."""
    top = tmp_path_factory.mktemp("located")
    lines = [
        {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b), "task": "add"}
        for a in range(1, 5)
        for b in range(2, 5)
    ]
    (top / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = f"--pairs {top / 'own.jsonl'} --most 3 --draws 100 --rule single --no-graph"
    words = f"locate {tiny_folder} --out {top / 'run'} {options} --dtype float64"
    cli.app(words.split(), standalone_mode=False)
    return top / "run"


def parts_of(run: Path) -> list[Path]:
    """The files of finished parts, one of each process."""
    return sorted(run.glob(".validate-parts-*"))


def names_in(parts: Path) -> list[str]:
    """The names of finished parts; a line that is being written is left out."""
    return [json.loads(line)[0] for line in parts.read_text().split("\n") if line.endswith("]")]


def kill_in_the_middle(run: Path) -> None:
    """Start the stage in two processes, kill all once each has finished two parts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, "-m", "circuitune", "validate", str(run), *WORDS.split()],
        cwd=ROOT.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        found = parts_of(run)
        if len(found) == 2 and all(len(names_in(path)) > 1 for path in found):
            break
        time.sleep(0.001)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(number) for number in listed.read_text().split()]
    process.kill()  # first, else it would stop the workers in its own gentle way
    for number in workers:
        os.kill(number, signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the workers are found in /proc")
def test_two_killed_processes_go_on_together(located: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(located, tmp_path / "alone"))
    cli.app(["validate", str(alone), *WORDS.split()], standalone_mode=False)
    run = Path(shutil.copytree(located, tmp_path / "run"))
    kill_in_the_middle(run)
    assert not (run / "validate.json").exists()
    files = parts_of(run)
    before = [names_in(path) for path in files]
    assert [path.stem[-7:] for path in files] == ["-0-of-2", "-1-of-2"]
    assert all(before)
    assert not set(before[0]) & set(before[1])
    # Marks show that finished parts are taken as they stand, and that all others are made anew.
    for path in files:
        path.write_text(path.read_text().replace('"source": "', '"source": "marked '))
    launch(2, "-m", "circuitune", "validate", run, *WORDS.split())
    table = pd.read_parquet(run / "knockout.parquet")
    marked = table["source"].str.startswith("marked ")
    assert marked.sum() == sum(map(len, before)) < len(table)
    table["source"] = table["source"].str.removeprefix("marked ")
    table.to_parquet(tmp_path / "unmarked.parquet")
    check_same_table(alone / "knockout.parquet", tmp_path / "unmarked.parquet")
    judged = [
        dict(numbers(json.loads((folder / "validate.json").read_text()))) for folder in (alone, run)
    ]
    assert judged[0] == {place: pytest.approx(leaf, abs=1e-9) for place, leaf in judged[1].items()}
    assert not parts_of(run)
