"""`circuitune tune` in two processes, as both launchers start them: the slices of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from circuitune import cli
from circuitune.deltas import load_delta
from tests.test_ranks import ROOT

OPTIONS = ["--heads", "2", "--steps", "4", "--batch-size", "4", "--precision", "float32"]
OPTIONS += ["--save-every", "2", "--evaluate-every", "2", "--learning-rate", "0.01"]
LAUNCHERS = {
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
    words = ["locate", str(tiny_folder), "--out", str(top / "run"), "--no-graph", "--most", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["circuitune", *words, "--pairs", str(top / "pairs.jsonl")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return top / "run"


def tune(run: Path, launcher: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    """`circuitune tune` as a user starts it."""
    end = [] if launcher else ["-m", "circuitune"]
    module = ["--module", "circuitune"] if "accelerate" in "".join(launcher) else []
    module = ["-m", "circuitune"] if launcher and not module else module
    return subprocess.run(
        [sys.executable, *launcher, *module, *end, "tune", str(run), *OPTIONS, *more],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(located: Path) -> Path:
    run = located.with_name("alone")
    shutil.copytree(located, run)
    done = tune(run, [])
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_tune_what_one_does(
    located: Path, alone: Path, tmp_path: Path, launcher: str
) -> None:
    """Both variants, with the same loss at every step; and nothing else is left behind."""
    run = tmp_path / "run"
    shutil.copytree(located, run)
    done = tune(run, LAUNCHERS[launcher])
    assert done.returncode == 0, done.stderr
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
    again = tune(run, LAUNCHERS[launcher])
    assert "tune: done before, nothing changed" in again.stderr


def test_bad_input_ends_all_processes_with_one_sentence(located: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(located, run)
    done = tune(run, LAUNCHERS["torchrun"], "--batch-size", "3")
    assert done.returncode != 0
    assert done.stderr.count("circuitune: A batch must fall into equal pieces") == 1
    assert not (run / "tune.json").exists()
