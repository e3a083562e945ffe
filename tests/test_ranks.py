"""Several processes: the same results as one, one voice, and nobody left waiting."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from circuitune import cli, ranks
from circuitune.config import ValidateConfig
from circuitune.errors import UserError
from circuitune.models import load
from circuitune.pairs import PairSet
from circuitune.ranks import WHOLE, Share
from circuitune.report import summarise
from circuitune.tasks import prepare, survivors, sweep
from circuitune.validate import validate
from tests.test_house import ROOT, in_fresh_python

VALIDATE = ValidateConfig(sizes=(1, 2), controls=2)

# Only the second process fails; the first one waits for it.
LONE_FAILURE = """
from datetime import timedelta
from circuitune import ranks
ranks.TELLING = timedelta(seconds=1)
with ranks.together():
    print("words of", ranks.rank(), flush=True)
    if ranks.rank() == 1:
        raise MemoryError("no room for layer 3")
    ranks.share().collect([1])
"""


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own pairs; their number in a half is odd."""
    lines = [
        {
            "clean": f"{a} + {b} = ",
            "corrupt": f"{a} @ {b} = ",
            "answer": str(a + b),
            "task": "add",
            "group": f"{a},{b}",
        }
        for a in range(1, 5)
        for b in range(1, 6)
        if a + b < 9
    ]
    path = tmp_path_factory.mktemp("own") / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, lines[:14])))
    return path


def locate(model: Path, pairs: Path, run: Path) -> list[str]:
    """The words of a small `circuitune locate`."""
    options = f"--pairs {pairs} --most 4 --draws 100 --dtype float64"
    return ["locate", str(model), "--out", str(run), *options.split()]


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process, validated too."""
    run = tmp_path_factory.mktemp("alone") / "run"
    cli.app(locate(tiny_folder, pairs_file, run), standalone_mode=False)
    words = f"validate {run} --sizes 1,2 --controls {VALIDATE.controls}"
    cli.app(words.split(), standalone_mode=False)
    return run


def launch(processes: int, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script or `-m MODULE` in several processes, as users do; ends within a minute."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


def exchanged() -> dict[str, Any]:
    """What this process has of seven items, and what it gets from the others."""
    share, values = ranks.share(), torch.arange(7.0).square()
    table = np.arange(14).reshape(2, 7)
    return {
        "own": share.of(list(range(7))),
        "collected": share.collect(share.of(list(range(7)))),
        "scarce": share.collect(share.of([5])),
        "gathered": share.gather(table[:, share.rank :: share.world]).tolist(),
        "mean": share.mean(share.of(values), 0).tolist(),
        "first": ranks.first(lambda: f"from {ranks.rank()}"),
    }


def measured(folder: Path, run: Path) -> dict[str, np.ndarray]:
    """Sweeps and survivors on this process's share of the pairs, brought together."""
    model, pairs = load(str(folder), dtype="float64"), PairSet.load(run).of("add", "select")
    task = prepare(model, pairs, share=ranks.share())
    effects = sweep(model, task)
    ablated = effects.rank()[:2]
    after = sweep(model, task, ablated=ablated, corrupt=task.average)
    alive = survivors(model, task, ablated)
    return {"effects": effects.effect(), "after": after.effect(), "alive": alive}


def measure_together(folder: Path, run: Path, top: Path) -> None:
    """What each of several processes does: all of the above into a folder of its own."""
    with ranks.together():
        out = top / str(ranks.rank())
        out.mkdir()
        (out / "exchanged.json").write_text(json.dumps(exchanged()))
        np.savez(out / "measured.npz", **measured(folder, run))
        validate(load(str(folder), dtype="float64"), VALIDATE, run, out)


def numbers(content: Any) -> Iterator[Any]:
    """Every leaf of a JSON value, with its place."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from ((f"{name}/{place}", leaf) for place, leaf in numbers(value))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from ((f"{index}/{place}", leaf) for place, leaf in numbers(value))
    else:
        yield "", content


def check_same_table(one: Path, several: Path) -> None:
    """Two parquet files agree up to rounding."""
    frames = [pd.read_parquet(path) for path in (one, several)]
    pd.testing.assert_frame_equal(*frames, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------- one process


def test_a_world_of_one_has_everything() -> None:
    assert (ranks.rank(), ranks.world(), ranks.share()) == (0, 1, WHOLE)
    items, table = [3, 1, 2], np.arange(6).reshape(2, 3)
    assert WHOLE.of(items) == WHOLE.collect(items) == items
    assert WHOLE.gather(table) is table
    values = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(WHOLE.mean(values, 1), values.mean(1, keepdim=True))
    assert ranks.first(lambda: 5) == 5
    assert ranks.device("auto") == "auto"


def test_a_world_of_one_loads_nothing() -> None:
    code = "from circuitune import ranks\n    with ranks.together(): ranks.first(list)"
    assert in_fresh_python(code) & {"torch", "numpy"} == set()


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_shares_are_disjoint_and_complete(count: int) -> None:
    items = list(range(count))
    parts = [Share(number, 3).of(items) for number in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_promised_processes_must_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unset WORLD_SIZE to work in one process." in line


@pytest.mark.parametrize("command", ["explain", "evaluate", "report", "check"])
def test_other_commands_are_refused_in_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr("sys.argv", ["circuitune", command, "somewhere"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`circuitune {command}`; start it without a launcher." in line


def test_more_processes_than_pairs_are_refused(tiny: Callable[..., Any], alone: Path) -> None:
    pairs = PairSet.load(alone).of("add", "select")
    with pytest.raises(UserError, match=f"9 processes share {len(pairs)}; start fewer"):
        prepare(tiny(), pairs, share=Share(8, 9))


# ----------------------------------------------------------------------------- several processes


def test_two_processes_measure_what_one_measures(
    tiny_folder: Path, alone: Path, tmp_path: Path
) -> None:
    launch(2, "-m", __name__, tiny_folder, alone, tmp_path)
    one = measured(tiny_folder, alone)
    assert one["alive"].size % 2
    for number in range(2):
        out = tmp_path / str(number)
        assert json.loads((out / "exchanged.json").read_text()) == {
            "own": list(range(number, 7, 2)),
            "collected": list(range(7)),
            "scarce": [5],
            "gathered": [list(range(7)), list(range(7, 14))],
            "mean": [13.0],
            "first": "from 0",
        }
        both = np.load(out / "measured.npz")
        for name, values in one.items():
            np.testing.assert_allclose(both[name], values, rtol=0, atol=1e-9)
        check_same_table(alone / "knockout.parquet", out / "knockout.parquet")
        judged = [
            dict(numbers(json.loads((folder / "validate.json").read_text())))
            for folder in (alone, out)
        ]
        assert judged[0].keys() == judged[1].keys()
        assert judged[0] == {k: pytest.approx(leaf, abs=1e-9) for k, leaf in judged[1].items()}


def test_locate_in_two_processes(
    tiny_folder: Path, pairs_file: Path, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = launch(2, "-m", "circuitune", *locate(tiny_folder, pairs_file, run))
    said = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert said == [f"loading {tiny_folder}", "pairs", "memory", "locate"]
    told = [*map(str, summarise(run).headline), f"next: circuitune validate {run}"]
    assert done.stdout.splitlines() == told  # by one of them

    check_same_table(alone / "effects.parquet", run / "effects.parquet")
    one, two = (
        dict(numbers(json.loads((folder / "circuit.json").read_text()))) for folder in (alone, run)
    )
    assert one.keys() == two.keys()
    assert one == {place: pytest.approx(leaf, abs=1e-9) for place, leaf in two.items()}

    names = {path.name for path in alone.iterdir()} - {"knockout.parquet", "validate.json"}
    assert {path.name for path in run.iterdir()} == names
    stages = [
        json.loads((folder / "manifest.json").read_text())["stages"] for folder in (alone, run)
    ]
    assert [stage["locate"]["processes"] for stage in stages] == [1, 2]
    assert stages[1]["pairs"]["processes"] == 1
    assert stages[0]["pairs"]["hash"] == stages[1]["pairs"]["hash"]
    assert stages[0]["locate"]["hash"] == stages[1]["locate"]["hash"]


def test_two_processes_refuse_with_one_voice(tmp_path: Path) -> None:
    """Only the first process finds the fault, while the second one waits for it."""
    (tmp_path / "notes.txt").write_text("mine")
    words = ["locate", "somewhere/model", "--out", tmp_path]
    done = launch(2, "-m", "circuitune", *words, status=1)  # the launcher's own status
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("circuitune: "))
    assert "holds other files; choose another --out." in line
    assert "exitcode: 2" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_process_that_fails_alone_is_heard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LONE_FAILURE)
    done = launch(2, script, status=1)
    assert "no room for layer 3" in done.stderr
    assert done.stdout.count("words of 0") == 1
    assert "words of 1" in done.stderr  # what it had to say until then


if __name__ == "__main__":
    measure_together(*map(Path, sys.argv[1:]))
