"""`circuitune tune` in two processes, as both launchers start them: the slices of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitune import cli, training, tune
from circuitune.deltas import load_delta
from tests.test_ranks import ROOT

OPTIONS = ["--heads", "2", "--steps", "4", "--batch-size", "4", "--precision", "float32"]
OPTIONS += ["--save-every", "2", "--evaluate-every", "2", "--learning-rate", "0.01"]
LAUNCHERS = {
    "none": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


@pytest.fixture(scope="module")
def located(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a tiny model with a circuit."""
    top = tmp_path_factory.mktemp("launch")
    pairs = [
        {"clean": f"{a} + {b} = ", "corrupt": f"{a} @ {b} = ", "answer": str(a + b)}
        for a in range(1, 5)
        for b in range(1, 5)
    ]
    (top / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["locate", tiny_folder, "--out", top / "run", "--pairs", top / "pairs.jsonl"]
    more = ["--no-graph", "--most", "3"]
    cli.app([str(word) for word in [*words, *more]], standalone_mode=False)
    return top / "run"


def launch(launcher: str, *words: object, script: str = "circuitune") -> Any:
    """The command line in two processes, or in one, as users start it; ends within a minute."""
    return subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], *map(str, ["-m", script, *words])],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=60,
        check=False,
    )


@pytest.fixture
def run(located: Path, tmp_path: Path) -> Path:
    """A copy of the run, for one test."""
    return Path(shutil.copytree(located, tmp_path / "run"))


@pytest.fixture(scope="module")
def alone(located: Path) -> Path:
    """The run as one process tunes it."""
    run = Path(shutil.copytree(located, located.with_name("alone")))
    done = launch("none", "tune", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return run


def check_same(run: Path, alone: Path) -> None:
    """Both variants and their losses; and nothing else is left behind."""
    for folder in (Path("tuned"), Path("tuned/random")):
        one, two = load_delta(alone / folder), load_delta(run / folder)
        assert one.tensors.keys() == two.tensors.keys()
        for key, value in one.tensors.items():
            torch.testing.assert_close(two.tensors[key], value, rtol=0, atol=1e-6)
            assert value.any()
        losses = [
            [json.loads(line)["loss"] for line in text.splitlines()]
            for text in ((top / folder / "log.jsonl").read_text() for top in (alone, run))
        ]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in alone.iterdir())
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["stages"]["tune"]["processes"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_tune_what_one_does(run: Path, alone: Path, launcher: str) -> None:
    done = launch(launcher, "tune", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    check_same(run, alone)
    if launcher == "torchrun":
        again = launch(launcher, "tune", run, *OPTIONS)
        assert "tune: done before, nothing changed" in again.stderr


def test_a_killed_stage_goes_on_also_where_one_process_is_late(run: Path, alone: Path) -> None:
    """The first process must leave nothing to the other that it removes at the end."""
    done = launch("torchrun", "killed", "tune", run, *OPTIONS, script=__name__)
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("circuitune: "))
    assert "this one was told to end (SIGTERM)" in line
    assert not (run / "tune.json").exists()
    (made,) = run.glob(".tune-parts-*/precise/checkpoint-*")
    assert made.name == "checkpoint-2"
    done = launch("torchrun", "late", "tune", run, *OPTIONS, script=__name__)
    assert done.returncode == 0, done.stderr
    check_same(run, alone)


def test_bad_input_that_the_first_process_finds_ends_all_with_one_sentence(run: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    done = launch("torchrun", "tune", run, *OPTIONS, "--heads", "99")
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("circuitune: "))
    assert "--heads must be at most" in line
    assert "exitcode  : 2" in done.stderr
    left = {path.name for path in run.iterdir() if not path.name.startswith(".tune-parts-")}
    assert sorted(left) == before


def test_run_in_two_processes(tiny_folder: Path, located: Path, tmp_path: Path) -> None:
    """Stages that cannot share their work are done by the first process while the other waits."""
    words = ["--no-graph", "--most", 3, "--sizes", 1, "--controls", 2, "--problems", 8]
    pairs = ["--pairs", located.with_name("pairs.jsonl")]
    run = tmp_path / "run"
    done = launch("torchrun", "run", tiny_folder, "--out", run, *words, *pairs, *OPTIONS)
    assert done.returncode == 0, done.stderr
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert [(name, stage["processes"]) for name, stage in stages.items()] == [
        ("pairs", 1),
        ("locate", 2),
        ("validate", 2),
        ("explain", 1),
        ("tune", 2),
        ("evaluate", 1),
    ]
    assert (run / "report.html").is_file()
    assert done.stdout.count(str(run / "report.html")) == 1


def misbehave(how: str) -> None:
    """The command line, but the second process comes too late, or ends in the third step.

    There the first one is then at work on its own, so that it hears of it from the launcher.
    """
    second = os.environ["RANK"] == "1"
    log, save = training._Journal.on_log, tune.save_variant

    def killed(self: Any, args: Any, state: Any, *rest: Any, **named: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL) if second else time.sleep(60)
        log(self, args, state, *rest, **named)

    def late(*given: Any) -> None:
        save(*given)
        time.sleep(2 * second)

    if how == "killed":
        training._Journal.on_log = killed
    else:
        tune.save_variant = late
    cli.main()


if __name__ == "__main__":
    misbehave(sys.argv.pop(1))
