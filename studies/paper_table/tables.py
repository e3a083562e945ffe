"""Tables of `run.py`'s results, each number with its interval, beside those of the paper.

    python studies/paper_table/tables.py docs

It writes ``results.md`` and the picture in it. Seeds and questions are both samples: an interval
speaks of another seed and of other questions of the same kind (`circuitune.comparing`).
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitune.comparing import Scores, compare, family, mean_over_tasks, score
from circuitune.stats import Interval

sys.path.append(str(Path(__file__).parents[1]))
from scatter import Point, scatter

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PICTURE = "results.svg"
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M (Q4_K_M)"}
MATH = ("gsm8k", "addsub", "singleeq", "svamp", "arithmetic")
KEPT = ("mmlu", "commonsense_qa", "commonsense_qa_text", "bbh")
TITLES = {
    "gsm8k": "GSM8K",
    "addsub": "AddSub",
    "singleeq": "SingleEq",
    "svamp": "SVAMP",
    "arithmetic": "generated",
    "mmlu": "MMLU",
    "commonsense_qa": "CSQA",
    "commonsense_qa_text": "CSQA, texts",
    "bbh": "BBH",
}
MARGIN = 0.01
ROWS = {
    "base": "base",
    "full": "full SFT",
    "lora": "LoRA r16, all linear",
    "precise": "precise, 32 heads",
    "random": "random, 32 heads",
    "8 heads": "precise, 8 heads",
    "random 8": "random, 8 heads",
    "circuit 5": "precise, the circuit's 5",
}
ABLATIONS = {f"{n} heads": f"{n} heads" for n in (8, 16)} | {"precise": "32 heads"}
ABLATIONS |= {f"{n} heads": f"{n} heads" for n in (48, 64)}
ABLATIONS |= {f"32 heads and {n} MLPs": f"32 heads + {n or 'all'} MLPs" for n in (1, 3, 6, 0)}
SEED = 1  # of the ablations

# Table 1 and the ablations of Zhang et al. (2024), LLaMA2-7B, accuracy in percent.
PAPER = {
    "base": ("14.6", "30.5", "65.4", "34.7", "46.0", "59.8"),
    "full SFT": ("24.6", "53.7", "68.2", "50.3", "40.5", "54.0"),
    "precise, 32 heads": ("27.4", "50.6", "69.7", "55.8", "46.4", "59.6"),
}
PAPER_ABLATIONS = {
    "8 heads": ("25.4", "45.1"),
    "16 heads": ("26.5", "45.8"),
    "32 heads": ("27.4", "46.4"),
    "48 heads": ("27.4", "46.4"),
    "64 heads": ("27.3", "45.5"),
    "32 heads + 1 MLPs": ("27.5", "46.0"),
    "32 heads + 3 MLPs": ("28.0", "45.2"),
    "32 heads + 6 MLPs": ("28.2", "44.9"),
    "32 heads + all MLPs": ("29.2", "43.9"),
}

# Score of guessing, of lm-eval's tasks: a letter of four or five; in BBH a mean over its questions.
GUESSING = {"mmlu": 0.25, "commonsense_qa": 0.2, "commonsense_qa_text": 0.2, "bbh": 0.471}

Cell = dict[str, Any]
Kind = Callable[[str, str, dict[int, Cell]], list[str]]


def cells(model: str, name: str) -> dict[int, Cell]:
    """Results of a cell by seed."""
    paths = sorted(RESULTS.glob(f"{model}-{name.replace(' ', '_')}-[0-9]*.json"))
    return {int(p.stem.rpartition("-")[2]): json.loads(p.read_text("utf-8")) for p in paths}


def scores(found: dict[int, Cell], name: str, task: str) -> list[Scores]:
    """Outcomes of a task, one entry a seed."""
    made = []
    for seed, cell in found.items():
        values = np.array([int(char) for char in cell["hits"][task]], dtype=float)
        made.append(Scores(task, name, seed, tuple(map(str, range(len(values)))), values))
    return made


def drifts(found: dict[int, Cell], name: str) -> list[Scores]:
    """KL to the base, nats a token; a paragraph weighs as many tokens as it has."""
    made = []
    for seed, cell in found.items():
        tokens, _, kl = np.array(cell["drift"]).T
        ids = tuple(map(str, range(len(kl))))
        made.append(Scores("kl", name, seed, ids, kl / tokens, tokens))
    return made


def perplexity(found: dict[int, Cell], base: Cell) -> float:
    """Relative change in percent, mean over seeds."""
    own = [np.array(cell["drift"]).sum(axis=0) for cell in found.values()]
    tokens, loss, _ = np.array(base["drift"]).sum(axis=0)
    return float(np.mean([100 * (math.exp(o[1] / o[0] - loss / tokens) - 1) for o in own]))


def percent(interval: Interval, *, sign: bool = False) -> str:
    """A share, or a difference of shares, in points."""
    values = [100 * x + 0.0 for x in (interval.estimate, interval.low, interval.high)]
    first = f"{values[0]:+.1f}" if sign else f"{values[0]:.1f}"
    return f"{first} [{values[1]:.1f}, {values[2]:.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def calculating(model: str, name: str, found: dict[int, Cell]) -> list[str]:
    """Gain over the base in the mean of the sets that calculate, and accuracy of each."""
    first = "" if name == "base" else percent(gain(found, cells(model, "base")), sign=True)
    return [first, *(percent(score(scores(found, name, task))) for task in MATH)]


def keeping(model: str, name: str, found: dict[int, Cell]) -> list[str]:
    """Accuracy of what tuning must not change, drift and cost."""
    values = [percent(score(scores(found, name, task))) for task in KEPT]
    if name == "base":
        return [*values, "0", "0", "", ""]
    kl = score(drifts(found, name))
    first = next(iter(found.values()))
    timed = [cell["cpu_seconds"] for cell in found.values() if cell.get("cpu_seconds")]
    return [
        *values,
        f"{kl.estimate:.4f} [{kl.low:.4f}, {kl.high:.4f}]",
        f"{perplexity(found, cells(model, 'base')[0]):+.2f}",
        f"{first['parameters']:,}",
        f"{np.mean(timed):.0f}" if timed else "",
    ]


COLUMNS = {
    calculating: ("gain, mean of five", *(f"{TITLES[task]}, %" for task in MATH)),
    keeping: (
        *(f"{TITLES[task]}, %" for task in KEPT),
        *("KL, nats a token", "perplexity, %", "parameters", "CPU seconds"),
    ),
}


def rows_of(
    model: str, rows: dict[str, str], kind: Kind, *, seeds: Sequence[int] | None = None
) -> dict[str, list[str]]:
    """Label of every variant that has results -> its row, the label in front."""
    made = {}
    for name, label in rows.items():
        found = cells(model, name)
        if seeds is not None and name != "base":
            found = {seed: cell for seed, cell in found.items() if seed in seeds}
        if found:
            count = "" if name == "base" else str(len(found))
            made[label] = [label, count, *kind(model, name, found)]
    return made


def variants(model: str) -> list[str]:
    """Two tables: what is gained; what is kept and what it costs, guessing in the first row."""
    first = ("trained", "seeds")
    gained = table([*first, *COLUMNS[calculating]], [*rows_of(model, ROWS, calculating).values()])
    guessing = ["guessing", "", *(f"{100 * GUESSING[task]:.1f}" for task in KEPT), *[""] * 4]
    kept = rows_of(model, ROWS, keeping).values()
    return [*gained, "", *table([*first, *COLUMNS[keeping]], [guessing, *kept])]


def gain(ours: dict[int, Cell], theirs: dict[int, Cell]) -> Interval:
    """Difference of the mean of the five sets that calculate; the base stands for each seed."""
    return mean_over_tasks(
        [(scores(ours, "ours", task), scores(theirs, "theirs", task)) for task in MATH]
    )


def together(model: str, one: str, two: str) -> tuple[dict[int, Cell], dict[int, Cell]]:
    """Results of two cells for the seeds that both have; the base, not trained, has one for all."""
    ours, theirs = cells(model, one), cells(model, two)
    if two == "base":
        return (ours, theirs) if theirs else ({}, {})
    seeds = sorted(ours.keys() & theirs.keys())
    return {seed: ours[seed] for seed in seeds}, {seed: theirs[seed] for seed in seeds}


def drift_apart(ours: dict[int, Cell], theirs: dict[int, Cell]) -> str:
    """Difference of the KL to the base, paired by paragraph."""
    both = drifts(ours, "ours"), drifts(theirs, "theirs")
    found = compare(*both, rng=np.random.default_rng(0)).difference
    return f"{found.estimate:+.4f} [{found.low:.4f}, {found.high:.4f}]"


def differences(model: str, *, minus: Sequence[tuple[str, str]]) -> list[str]:
    """Two tables of paired differences, Holm's correction over all tasks of a pair."""
    gained, kept = [], []
    for one, two in minus:
        ours, theirs = together(model, one, two)
        if not ours:
            continue
        found = family(
            [
                compare(
                    scores(ours, one, task),
                    scores(theirs, two, task),
                    rng=np.random.default_rng(0),
                    margin=MARGIN if task in KEPT and two == "base" else None,
                )
                for task in (*MATH, *KEPT)
            ]
        )
        shown = []
        for result in found:
            star = "\\*" if result.p_holm < 0.05 else ""
            judged = {True: " (not worse)", False: " (not shown)", None: ""}[result.non_inferior]
            shown.append(percent(result.difference, sign=True) + star + judged)
        label = f"{ROWS[one]} - {ROWS[two]}"
        mean = percent(gain(ours, theirs), sign=True)
        gained.append([label, str(len(ours)), mean, *shown[: len(MATH)]])
        moved = "" if two == "base" else drift_apart(ours, theirs)
        kept.append([label, str(len(ours)), *shown[len(MATH) :], moved])
    first = ("difference, points", "seeds")
    return [
        *table([*first, "mean of five", *(TITLES[task] for task in MATH)], gained),
        "",
        *table([*first, *(TITLES[task] for task in KEPT), "KL, nats a token"], kept),
    ]


def paper_tables() -> list[str]:
    """The numbers of the paper, for the eye; another model, other data."""
    head = ["trained (LLaMA2-7B)", "GSM8K", "AddSub", "SingleEq", "SVAMP", "MMLU", "CSQA"]
    return table(head, [[label, *values] for label, values in PAPER.items()])


def ablations(model: str) -> list[str]:
    """Numbers of heads and MLPs of one seed, the paper's GSM8K and MMLU beside them."""
    made: list[str] = []
    for place, (kind, title) in enumerate({calculating: "GSM8K", keeping: "MMLU"}.items()):
        rows = rows_of(model, ABLATIONS, kind, seeds=[SEED])
        beside = [[*row, PAPER_ABLATIONS[label][place]] for label, row in rows.items()]
        head = ["trained", "seeds", *COLUMNS[kind], f"paper: {title}, %"]
        made += [*table(head, beside), ""]
    return made[:-1]


def picture(model: str) -> str:
    """Gain against drift, as SVG."""
    marks = []
    for name, label in (ROWS | ABLATIONS).items():
        if name == "base" or not cells(model, name):
            continue
        found = gain(*together(model, name, "base"))
        ends = [100 * x for x in (found.estimate, found.low, found.high)]
        drift = score(drifts(cells(model, name), name))
        low = max(drift.low, drift.estimate / 10)  # few seeds may reach below 0, which has no log
        across = Interval(drift.estimate, low, drift.high, drift.n)
        method = name.split()[0]
        method = method if method in ("full", "lora", "random") else "precise"
        marks.append(Point(label, method, across, Interval(*ends, found.n)))
    return scatter(
        marks,
        f"What tuning gains, and what it moves ({MODELS[model]})",
        "KL to the base on WikiText-2, nats a token",
        "gain in the mean of GSM8K, AddSub, SingleEq, SVAMP and generated + - x, points",
    )


PAIRS = (
    *((name, "base") for name in ROWS if name != "base"),
    *(("precise", name) for name in ("full", "lora", "random", "circuit 5")),
    *(("8 heads", name) for name in ("full", "lora", "random 8", "precise")),
)
HEAD = """# The paper's table, on models that fit a laptop

Made by `python studies/paper_table/tables.py docs` from the
[results](../studies/paper_table/results) of `studies/paper_table/run.py`.

Zhang et al. (2024) tune 32 heads of LLaMA2-7B and find more arithmetic than by full fine-tuning,
at no loss elsewhere. Here is the same table for small models, with what the paper's has not: LoRA,
random heads of the same layers, seeds, and an interval on every number. Each method learns the
same 800 texts, 100 steps of 8: drawn problems of the training parts of AddSub (160), SingleEq
(160), SVAMP (200) and GSM8K (120), and 160 generated + - x. All answer the same questions of the
test parts. Intervals take questions and seeds as samples; one seed has an interval over questions
alone. A star: p below 0.05, Holm's correction over the nine tasks of a pair. *Not worse*: the
interval lies above -1 point. KL is to the base, on WikiText-2, and so is its difference between
two variants; of the base itself it is 0. Perplexity is the change on WikiText-2. CPU seconds are
those of the whole training on one thread, in float32, the cache of frozen layers included; cells
that ran before texts of like length were put together have none. CSQA is CommonsenseQA, BBH is
BIG-Bench Hard.
"""


def page(words: str) -> str:
    """The page; ``words`` say what held."""
    parts = [HEAD, words.strip() + "\n"]
    for model, title in MODELS.items():
        if not cells(model, "base"):
            continue
        parts.append(f"## {title}\n\n" + "\n".join(variants(model)) + "\n")
        parts.append("Differences, paired by question:\n")
        parts.append("\n".join(differences(model, minus=PAIRS)) + "\n")
    parts.append("## The paper's\n\n" + "\n".join(paper_tables()) + "\n")
    parts.append(
        f"## Numbers of heads and MLPs ({MODELS['smollm2']}, one seed)\n\n"
        + "\n".join(ablations("smollm2"))
        + "\n"
    )
    parts.append(f"![gain against drift of every variant]({PICTURE})\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if not cells("smollm2", "full"):
        sys.exit(f"Tables need results, {RESULTS} has none of full fine-tuning; run run.py first.")
    folder = Path(sys.argv[1])
    said = (HERE / "words.md").read_text(encoding="utf-8")
    (folder / "results.md").write_text(page(said), encoding="utf-8")
    (folder / PICTURE).write_text(picture("smollm2"), encoding="utf-8")
