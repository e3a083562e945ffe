"""Tables of `run.py`'s results, each number with its interval, as they stand in the docs.

    python studies/tuning/tables.py docs

It writes ``findings-tuning.md`` and the picture in it.

Two intervals of every difference are at hand. One resamples problems (or paragraphs), with the
training runs as they are: does this circuit, so trained, beat that one? The other takes the seeds
as a sample of all training runs and of all problem sets, by Student's t over the differences of
the seeds: would it again? The second is much wider with three seeds, and it is the one that says
whether a rule is better than its control.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from circuitune.stats import Interval, bootstrap_means, clustered_proportion

sys.path.append(str(Path(__file__).parents[1]))
from scatter import Point, scatter

RESULTS = Path(__file__).parent / "results"
PICTURE = "findings-tuning.svg"
SHOWN = 1  # the seed of the picture: every variant has answered its problems
Cell = dict[str, Any]


def cells(name: str, seeds: Sequence[int] | None = None) -> dict[int, Cell]:
    """Results of a cell by seed."""
    found = {}
    for path in sorted(RESULTS.glob(f"{name.replace(' ', '_')}-*.json")):
        seed = int(path.stem.rpartition("-")[2])
        if seeds is None or seed in seeds:
            found[seed] = json.loads(path.read_text(encoding="utf-8"))
    if name == "direct 5":  # the default, and so two of the methods of the main cell
        found |= cells("main", seeds)
    return found


def hits(cell: Cell, variant: str) -> np.ndarray:
    """1 or 0 per problem."""
    return np.array([int(char) for char in cell["variants"][variant]["hits"]], dtype=float)


def kl(cell: Cell, variant: str) -> np.ndarray:
    """KL to the base per paragraph, times paragraphs over all tokens: the mean is nats a token."""
    drift = np.array(cell["variants"][variant]["drift"])
    return drift[:, 2] * len(drift) / drift[:, 0].sum()


def log_change(cell: Cell, variant: str) -> np.ndarray:
    """Change of the loss per paragraph, scaled as `kl`; its mean is the log of perplexities."""
    own = np.array(cell["variants"][variant]["drift"])
    base = np.array(next(iter(cells("base").values()))["variants"]["base"]["drift"])
    return (own[:, 1] - base[:, 1]) * len(own) / own[:, 0].sum()


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of one number a seed; none for one seed."""
    values = np.array(differences)
    if len(values) < 2:
        return None
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(values.mean(), values.mean() - half, values.mean() + half, len(values))


def over_problems(
    found: dict[int, Cell], value: Callable[[Cell], np.ndarray], *, grouped: bool
) -> Interval:
    """Bootstrap interval of a mean over all seeds, problems of an operand pair together."""
    values = np.concatenate([value(cell) for cell in found.values()])
    if grouped:
        groups = [group for cell in found.values() for group in cell["groups"]]
    else:  # the same paragraphs for every seed
        groups = [str(place) for cell in found.values() for place in range(len(value(cell)))]
    return bootstrap_means(values[None], rng=np.random.default_rng(0), groups=groups)[0]


def accuracy(found: dict[int, Cell], variant: str) -> Interval:
    """Share of right answers over all seeds."""
    values = np.concatenate([hits(cell, variant) for cell in found.values()])
    groups = [group for cell in found.values() for group in cell["groups"]]
    return clustered_proportion(values, rng=np.random.default_rng(0), groups=groups)


def points(interval: Interval, digits: int = 1) -> str:
    """A share in percent."""
    scaled = [100 * x for x in (interval.estimate, interval.low, interval.high)]
    return "{0:.{3}f} [{1:.{3}f}, {2:.{3}f}]".format(*scaled, digits)


def signed(interval: Interval | None, factor: float, digits: int) -> str:
    """A difference, with its sign; one seed has no interval over seeds."""
    if interval is None:
        return "one seed"
    scaled = [factor * x + 0.0 for x in (interval.estimate, interval.low, interval.high)]
    return "{0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]".format(*scaled, digits)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


MEASURES = ["exact match, %", "perplexity change, %", "KL, nats a token"]


def measures(found: dict[int, Cell], variant: str) -> list[str]:
    """Cells of `MEASURES`."""
    change = over_problems(found, lambda cell: log_change(cell, variant), grouped=False)
    drift = over_problems(found, lambda cell: kl(cell, variant), grouped=False)
    spread = f"{drift.estimate:.4f} [{drift.low:.4f}, {drift.high:.4f}]"
    return [points(accuracy(found, variant)), signed(change, 100, 2), spread]


def rates() -> list[str]:
    """Learning rates of each method, on the seed that decides about options."""
    rows = []
    for method in ("precise", "lora_heads", "lora", "full"):
        for path in sorted(RESULTS.glob(f"{method}_at_*-0.json")):
            rate = path.stem.removesuffix("-0").rpartition("_")[2]
            found = cells(f"{method} at {rate}", [0])
            rows.append((method, float(rate), [method, rate, *measures(found, method)]))
    order = sorted(rows, key=lambda row: (row[0], row[1]))
    return table(["method", "learning rate", *MEASURES], [row for _, _, row in order])


def main_table() -> list[str]:
    """All methods, five heads, the same problems and text."""
    found = cells("main")
    rows = [["base", "0", *measures(cells("base", list(found)), "base"), "", "", ""]]
    for name, facts in next(iter(found.values()))["variants"].items():
        gaps = ["", ""]
        if name != "precise":
            gaps = [
                points_gap(found, "precise", name),
                signed(over_seeds([difference(c, name, kl) for c in found.values()]), 1, 4),
            ]
        label = f"**{name}**" if name == "precise" else name
        rows.append(
            [
                label,
                f"{facts['parameters']:,}",
                *measures(found, name),
                f"{seconds(found, name):.0f}",
                *gaps,
            ]
        )
    gaps = ["precise - it, points, problems; seeds", "KL, precise - it, seeds"]
    return table(["method", "parameters", *MEASURES, "seconds", *gaps], rows)


def difference(cell: Cell, other: str, of: Callable[[Cell, str], np.ndarray]) -> float:
    """Mean of precise minus that of another variant, one seed."""
    return float(of(cell, "precise").mean() - of(cell, other).mean())


def points_gap(found: dict[int, Cell], one: str, two: str) -> str:
    """Difference of exact match by both intervals."""
    pooled = over_problems(found, lambda cell: hits(cell, one) - hits(cell, two), grouped=True)
    by_seed = over_seeds([difference(cell, two, hits) for cell in found.values()])
    if by_seed is None:
        return signed(pooled, 100, 1)
    ends = f"[{100 * by_seed.low:+.1f}, {100 * by_seed.high:+.1f}]"
    return f"{signed(pooled, 100, 1)}; {ends}"


def pairs(names: Sequence[str]) -> list[str]:
    """Chosen components against random ones of the same layers, by cell."""
    rows = []
    for name in names:
        found = cells(name)
        if not found:
            continue
        first = next(iter(found.values()))["variants"]["precise"]
        pooled = over_problems(found, lambda c: kl(c, "precise") - kl(c, "random"), grouped=False)
        by_seed = over_seeds([difference(cell, "random", kl) for cell in found.values()])
        ends = "" if by_seed is None else f"; [{by_seed.low:+.4f}, {by_seed.high:+.4f}]"
        values = [measures(found, variant) for variant in ("precise", "random")]
        rows.append(
            [
                *(name, str(len(found)), str(first["lowest_layer"])),
                *(values[0][0], values[1][0], points_gap(found, "precise", "random")),
                *(values[0][2].split()[0], values[1][2].split()[0], signed(pooled, 1, 4) + ends),
                *(values[0][1], values[1][1]),
                *(f"{seconds(found, variant):.0f}" for variant in ("precise", "random")),
            ]
        )
    head = ["chosen", "seeds", "lowest layer", "exact match, %", "random's"]
    head += ["difference, points, problems; seeds", "KL", "random's"]
    head += ["difference of KL, paragraphs; seeds", "perplexity change, %", "random's"]
    return table([*head, "seconds", "random's"], rows)


def seconds(found: dict[int, Cell], variant: str) -> float:
    """Mean time of training."""
    return float(np.mean([cell["variants"][variant]["seconds"] for cell in found.values()]))


def beside(names: Sequence[str], others: dict[str, tuple[str, str]]) -> list[str]:
    """Precise with some components minus other variants of the same seeds, over seeds."""
    rows = []
    for name in names:
        row = [name]
        for cell_name, variant in others.values():
            two = cells(cell_name)
            one = {seed: cell for seed, cell in cells(name).items() if seed in two}
            for of, factor, digits in ((hits, 100, 1), (kl, 1, 4)):
                gaps = [
                    float(of(cell, "precise").mean() - of(two[seed], variant).mean())
                    for seed, cell in one.items()
                ]
                row.append(signed(over_seeds(gaps), factor, digits))
        rows.append(row)
    head = [f"{what}, it - {label}" for label in others for what in ("points", "KL")]
    return table(["chosen", *head], rows)


KINDS = ("sums", "differences", "products")


def kinds_table() -> list[str]:
    """Right answers by operator, of the variants of one seed."""
    rows = []
    for label, found, variant in shown():
        (cell,) = found.values()
        values = hits(cell, variant)
        shares = [  # operators take turns
            points(
                clustered_proportion(
                    values[k :: len(KINDS)],
                    rng=np.random.default_rng(0),
                    groups=cell["groups"][k :: len(KINDS)],
                ),
                0,
            )
            for k in range(len(KINDS))
        ]
        rows.append([label, points(accuracy(found, variant)), *shares])
    return table(["trained", "all, %", *(f"{kind}, %" for kind in KINDS)], rows)


OPERATORS = dict(zip(("add", "sub", "mul"), KINDS, strict=True))


def share(text: str, minus: str | None = None) -> str:
    """Right answers of a string of 0 and 1, or their change against another, paired."""
    values = np.array([int(char) for char in text], dtype=float)
    if minus is None:
        return points(clustered_proportion(values, rng=np.random.default_rng(0)))
    gaps = values - np.array([int(char) for char in minus], dtype=float)
    return signed(bootstrap_means(gaps[None], rng=np.random.default_rng(0))[0], 100, 1)


def far_table() -> list[str]:
    """One long training and its control: held-out and trained problems, drift, commonsense."""
    found = cells("far", [SHOWN])
    (cell,) = found.values()
    base = cell["variants"]["base"]
    rows = []
    for name in ("base", "precise", "random"):
        own = cell["variants"][name]
        asked = share(own["commonsense_qa"])
        change = "" if name == "base" else share(own["commonsense_qa"], base["commonsense_qa"])
        trained = [share(own["trained"][operator]) for operator in OPERATORS]
        rows.append([name, *measures(found, name), *trained, asked, change])
    gap = points_gap(found, "precise", "random")
    drift = over_problems(found, lambda c: kl(c, "precise") - kl(c, "random"), grouped=False)
    rows.append(["precise - random", gap, "", signed(drift, 1, 4), *[""] * 5])
    head = ["trained", *MEASURES, *(f"trained {kind}, %" for kind in OPERATORS.values())]
    return table([*head, "CommonsenseQA, %", "its change, points"], rows)


def shown() -> list[tuple[str, dict[int, Cell], str]]:
    """Variants of the seed of the picture: label, cell, method; those that were not run are out."""
    asked = [("base", "base", "base")]
    asked += [(f"{rule} 5", f"{rule} 5", "precise") for rule in ("circuit", "direct")]
    asked += [(f"direct {n}", f"direct {n}", "precise") for n in (4, 8, 13, 32)]
    asked += [("random 5", "direct 5", "random"), ("random 13", "direct 13", "random")]
    asked += [("direct 5 + 2 MLPs", "direct 5 and 2 MLPs", "precise")]
    asked += [
        (f"circuit 5 + 2 MLPs, {n} steps", f"precise {n} steps", "precise")
        for n in (50, 150, 450, 1350)
    ]
    asked += [("random 5 + 2 MLPs, 1350 steps", "far", "random")]
    asked += [("LoRA", "main", "lora"), ("LoRA, 450 steps", "lora 450 steps", "lora")]
    asked += [("LoRA in 5 heads", "main", "lora_heads"), ("full", "main", "full")]
    found = [(label, cells(name, [SHOWN]), variant) for label, name, variant in asked]
    return [item for item in found if item[1]]


def picture() -> str:
    """Gain against drift, as SVG."""
    base = cells("base", [SHOWN])[SHOWN]
    marks = []
    for label, found, variant in shown()[1:]:
        gain = over_problems(
            found,
            lambda cell, own=variant: 100 * (hits(cell, own) - hits(base, "base")),
            grouped=True,
        )
        drift = over_problems(found, lambda cell, own=variant: kl(cell, own), grouped=False)
        marks.append(Point(label, variant, drift, gain))
    return scatter(
        marks,
        "What tuning gains, and what it moves (SmolLM2, one seed)",
        "KL to the base on WikiText-2, nats a token",
        "gain in held-out + - x, points",
    )


COUNTS = [*(f"direct {n}" for n in (4, 8, 13, 32)), "direct 5 and 2 MLPs"]
RULES = ("circuit", "direct", "upstream", "gradient", "first cost")
HEAD = """# Tuning: methods, learning rates, rules, and random controls

Made by `python studies/tuning/tables.py docs` from the [results](../studies/tuning/results) of
`studies/tuning/run.py`; what they say stands in [findings](findings.md).

SmolLM2-135M-Instruct, one- and two-digit + - x, 150 steps of 32 problems, 400 held-out problems
a seed whose operand pairs were not trained, drift on 200 paragraphs of WikiText-2. The options,
learning rates among them, were chosen on seed 0. A difference has two intervals: the first
resamples problems or paragraphs with the trained models as they are; the second, where there are
several seeds, is Student's t over the seeds and speaks of the recipe. Seconds are those of one
thread of a busy machine; `bench/tune.json` has the times of a quiet one.

![gain against drift of every variant of one seed](findings-tuning.svg)
"""


def sections() -> dict[str, list[str]]:
    """Every table by its title."""
    made = {"Learning rates (seed 0)": rates()}
    if cells("main"):
        made["Methods"] = main_table()
    made["Rules: five heads against random ones of the same layers"] = pairs(
        [f"{rule} 5" for rule in RULES]
    )
    counts = pairs(COUNTS)
    if len(counts) > 2:
        made["Numbers of heads, and MLPs"] = counts
        made["The same beside five heads and beside LoRA (intervals over seeds)"] = beside(
            [name for name in COUNTS if cells(name)],
            {"direct 5": ("direct 5", "precise"), "LoRA": ("main", "lora")},
        )
    made[f"Kinds of problems (seed {SHOWN})"] = kinds_table()
    if cells("far", [SHOWN]):
        title = (
            f"The circuit's five heads and two MLPs, 1350 steps, with the control (seed {SHOWN})"
        )
        made[title] = far_table()
    return made


def page() -> str:
    """The page of all tables."""
    parts = [HEAD]
    for title, lines in sections().items():
        parts.append("\n".join([f"## {title}", "", *lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "findings-tuning.md").write_text(page(), encoding="utf-8")
    (folder / PICTURE).write_text(picture(), encoding="utf-8")
