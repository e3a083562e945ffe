"""Averages with intervals from the per-example and per-draw tables of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from circuitune.report.estimate import Estimate
from circuitune.report.records import Run
from circuitune.stats import Interval, bootstrap_mean, bootstrap_means

# One fixed seed: the report is a function of the run directory and nothing else.
_SEED = 0
_SETS = ("top", "single_pass", "own_circuit", "other_task", "least", "matched", "random")


@dataclass(frozen=True)
class Point:
    """Accuracy after removing `k` components.

    Attributes:
        k: Size of the removed set.
        accuracy: Fraction of the examples still answered; the mean over draws for random sets.
        draws: Accuracy of each random set, empty where there is only one set.
        n: Examples behind each accuracy.
        logit_diff: Mean logit difference, in logits, where it was measured.
    """

    k: int
    accuracy: Estimate
    draws: tuple[float, ...]
    n: int
    logit_diff: float | None


@dataclass(frozen=True)
class Curve:
    """Accuracy on `task` against the number of components removed, for one kind of set."""

    kind: str
    task: str
    points: tuple[Point, ...]

    def at(self, k: int) -> Point | None:
        """The point at exactly `k`, if it was measured."""
        return next((point for point in self.points if point.k == k), None)


@dataclass(frozen=True)
class Knockouts:
    """All knockout curves of one kind of ablation.

    Attributes:
        curves: By task (the circuit's own first), then by set.
        ablation: What replaces an output: mean, zero or resample.
        where: end (the last position) or all.
    """

    curves: tuple[Curve, ...]
    ablation: str
    where: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in order of display."""
        return tuple(dict.fromkeys(curve.task for curve in self.curves))

    def curve(self, kind: str, task: str) -> Curve | None:
        """The curve of one kind of set on one task, if it was measured."""
        found = (curve for curve in self.curves if (curve.kind, curve.task) == (kind, task))
        return next(found, None)


@dataclass(frozen=True)
class Removal:
    """One kind of set removed in one way.

    Attributes:
        kind: Which set, as in `Curve`.
        source: The task that the set was chosen on, empty for random ones.
        task: The task that was then asked.
        accuracy: As in `Point`.
        kl: KL divergence of the answers to the intact model's, in nats, where it was measured.
        draws: Number of sets behind the means.
    """

    kind: str
    source: str
    task: str
    k: int
    ablation: str
    where: str
    accuracy: Estimate
    kl: Estimate | None
    draws: int


@dataclass(frozen=True)
class Reach:
    """What is left of a task, the target, without the heads of another.

    Attributes:
        source: The task that the heads were found on, empty for random ones.
        heads: The heads; empty for random ones.
        accuracy: As in `Point`.
        draws: Number of sets behind it.
        n: Examples behind each accuracy.
        logit_diff: Mean logit difference, in logits, where it was measured.
    """

    source: str
    target: str
    heads: tuple[str, ...]
    accuracy: Estimate
    draws: int
    n: int
    logit_diff: float | None


@dataclass(frozen=True)
class HeldOut:
    """What a proposed set of `k` heads leaves of a task on the held-out half.

    `change` is accuracy minus that of the intact model on the same prompts.
    """

    by: str
    k: int
    task: str
    accuracy: Estimate
    change: float


@dataclass(frozen=True)
class Measured:
    """All averages of a run.

    Attributes:
        effects: Metric -> component -> mean effect, signed; see `mean_effects`.
        noise: Metric -> component -> what rounding alone does to its effect; empty where that
            was not measured.
        knockouts: The knockout curves, None before `circuitune validate`.
        removals: The single removals at the circuit's own size; empty before that.
        held_out: The proposals of joint selection; empty before that.
        reach: Every source in every target, random heads last; empty before `transfer`.
    """

    effects: Mapping[str, Mapping[str, Estimate]]
    noise: Mapping[str, Mapping[str, float]]
    knockouts: Knockouts | None
    removals: tuple[Removal, ...]
    held_out: tuple[HeldOut, ...]
    reach: tuple[Reach, ...]


def measure(run: Run) -> Measured:
    """Every average that the report shows, with its interval."""
    table = run.knockout
    matrix = run.transfer.rows if run.transfer else None
    return Measured(
        effects=mean_effects(run),
        noise=noise_floors(run),
        knockouts=None if table is None else knockouts(table, run.circuit.task),
        removals=() if table is None else removals(table, run.circuit.size),
        held_out=() if table is None else held_out(table),
        reach=() if matrix is None else reach(matrix),
    )


def mean_effects(run: Run) -> Mapping[str, Mapping[str, Estimate]]:
    """Mean effect of each component per metric, with its 95 % bootstrap interval.

    Pairs of one group are resampled together. Signed: negative = supports the answer.

    Returns:
        Metric -> component -> estimate, in the unit of the metric.
    """
    groups = _example_groups(run)
    return {
        str(metric): _row_means(
            part.pivot(index="component", columns="example", values="effect"), groups
        )
        for metric, part in run.effects.groupby("metric", sort=False)
    }


def noise_floors(run: Run) -> Mapping[str, Mapping[str, float]]:
    """What rounding alone does to the effect of each component, per metric, in its unit."""
    if "noise" not in run.effects.columns:
        return {}
    largest = run.effects.groupby(["metric", "component"], sort=False)["noise"].max()
    return {
        str(metric): {str(name): float(value) for (_, name), value in own.items()}
        for metric, own in largest.groupby(level="metric", sort=False)
    }


def knockouts(frame: pd.DataFrame, task: str) -> Knockouts:
    """Curves of `knockout.parquet`, of one ablation at one place, mean at END where present.

    Accuracies under different ablations are different quantities, so they are never joined.

    Args:
        frame: The table as `load` returns it.
        task: The circuit's own task, which comes first.
    """
    # Proposals of joint selection are single sets, no curve; see `held_out`.
    frame = frame[frame["set"] != "proposal"]
    kinds = frame.groupby(["ablation", "where"], sort=False).size()
    ablation, where = ("mean", "end") if ("mean", "end") in kinds.index else kinds.idxmax()
    frame = frame[(frame["ablation"] == ablation) & (frame["where"] == where)]
    # In its own task the circuit of a control task is no circuit of another task.
    own = (frame["set"] == "other_task") & (frame["source"] == frame["task"])
    frame = frame.assign(set=frame["set"].mask(own, "own_circuit"))
    present = list(frame["task"].unique())
    tasks = [task] * (task in present) + [name for name in present if name != task]
    curves = [curve for name in tasks for curve in _task_curves(frame[frame["task"] == name])]
    return Knockouts(tuple(curves), ablation=str(ablation), where=str(where))


def removals(frame: pd.DataFrame, size: int) -> tuple[Removal, ...]:
    """Every set of `size` components of `knockout.parquet`, by what replaces them and where.

    The size is that of the further ablations, where these were measured at another one.

    Args:
        frame: The table as `load` returns it.
        size: Of the circuit.
    """
    further = frame[(frame["ablation"] != "mean") | (frame["where"] != "end")]
    if len(further) and not (further["k"] == size).any():
        size = int(further["k"].max())
    own = frame[frame["k"].isin((0, size))]
    names = ["set", "source", "task", "k", "ablation", "where"]
    return tuple(
        Removal(
            *map(str, key[:3]),
            int(key[3]),
            *map(str, key[4:]),
            accuracy=over_sets(rows, "accuracy", "low", "high"),
            kl=None if rows["kl"].isna().any() else over_sets(rows, "kl", "kl_low", "kl_high"),
            draws=len(rows),
        )
        for key, rows in own.groupby(names, sort=False)
    )


def held_out(frame: pd.DataFrame) -> tuple[HeldOut, ...]:
    """What the proposals of joint selection leave, by `knockout.parquet` as `load` returns it."""
    own = frame[frame["set"] == "proposal"]
    if "change" not in own:  # an older run, which kept only prompts that the model answers
        own = own.assign(change=own["accuracy"] - 1.0)
    return tuple(
        HeldOut(
            str(by),
            int(k),
            str(task),
            over_sets(rows, "accuracy", "low", "high"),
            float(rows["change"].mean()),
        )
        for (by, k, task), rows in own.groupby(["source", "k", "task"], sort=False)
    )


def reach(frame: pd.DataFrame) -> tuple[Reach, ...]:
    """The matrix of `transfer.parquet`, a table as `load` returns it; random heads last."""
    found = []
    for kind in ("source", "matched"):
        own = frame[frame["set"] == kind]
        for (source, target), rows in own.groupby(["source", "task"], sort=False):
            heads = str(rows["heads"].iloc[0]) if "heads" in rows and kind == "source" else ""
            found.append(
                Reach(
                    str(source) if kind == "source" else "",
                    str(target),
                    tuple(heads.split()),
                    over_sets(rows, "accuracy", "low", "high"),
                    draws=len(rows),
                    n=int(rows["n"].iloc[0]),
                    logit_diff=_known_mean(rows["logit_diff"]),
                )
            )
    return tuple(found)


def telling_size(curve: Curve) -> int | None:
    """The smallest `k` with at least 80 % of the largest fall on the curve, None without a fall.

    It only decides which point of the curve the headline quotes; the curve itself is shown whole.
    """
    intact = curve.at(0)
    removed = [point for point in curve.points if point.k > 0]
    if not removed:
        return None
    start = 1.0 if intact is None else intact.accuracy.value
    largest = max(start - point.accuracy.value for point in removed)
    if largest <= 0:
        return removed[-1].k
    return next(p.k for p in removed if start - p.accuracy.value >= 0.8 * largest)


def _example_groups(run: Run) -> Sequence[str] | None:
    """The group of each measured example, where the pairs tell.

    Effects number the select-half pairs of the circuit's task in the order of `pairs.jsonl`.
    """
    used = [p for p in run.pairs if p.split == "select" and p.task == run.circuit.task]
    groups = [pair.group for pair in used if pair.group is not None]
    examples = run.effects["example"]
    return groups if len(groups) == len(used) and examples.max() < len(used) else None


def _row_means(table: pd.DataFrame, groups: Sequence[str] | None) -> Mapping[str, Estimate]:
    """Means of the rows component x example; a row may lack examples that were not measured."""
    rng = np.random.default_rng(_SEED)
    labels = None if groups is None else np.array(groups)[table.columns.to_numpy(dtype=int)]
    values = table.to_numpy(dtype=float)
    known = np.isfinite(values)
    whole = known.all(axis=1)
    found: dict[str, Estimate] = {}
    if whole.any():
        intervals = bootstrap_means(values[whole], rng=rng, groups=labels)
        found = dict(zip(table.index[whole], map(_estimate, intervals), strict=True))
    for row in np.flatnonzero(~whole & known.any(axis=1)):
        there = known[row]
        kept = None if labels is None else labels[there]
        interval = bootstrap_mean(values[row, there], rng=rng, groups=kept)
        found[table.index[row]] = _estimate(interval)
    return found


def _estimate(interval: Interval) -> Estimate:
    if not np.isfinite([interval.low, interval.high]).all():
        return Estimate(interval.estimate)
    return Estimate(interval.estimate, interval.low, interval.high)


def _task_curves(frame: pd.DataFrame) -> list[Curve]:
    present = list(frame["set"].unique())
    kinds = [kind for kind in _SETS if kind in present]
    kinds += [kind for kind in present if kind not in _SETS]
    task = str(frame["task"].iloc[0])
    curves = []
    intact = _point(frame[frame["k"] == 0].drop_duplicates("k"))
    for kind in kinds:
        rows = frame[(frame["set"] == kind) & (frame["k"] > 0)]
        points = [_point(part) for _, part in rows.groupby("k")]
        # Without anything removed all sets are the same set.
        curves.append(Curve(kind, task, tuple(p for p in [intact, *points] if p is not None)))
    return [curve for curve in curves if any(point.k > 0 for point in curve.points)]


def _point(rows: pd.DataFrame) -> Point | None:
    """The point of all rows of one set and size, None without rows."""
    if rows.empty:
        return None
    accuracy = rows["accuracy"].to_numpy(dtype=float)
    return Point(
        k=int(rows["k"].iloc[0]),
        accuracy=over_sets(rows, "accuracy", "low", "high"),
        draws=tuple(accuracy) if len(rows) > 1 else (),
        n=int(rows["n"].iloc[0]),
        logit_diff=_known_mean(rows["logit_diff"]),
    )


def over_sets(rows: pd.DataFrame, name: str, low: str, high: str) -> Estimate:
    """The mean over sets; without a spread between them, the interval is that over examples."""
    values = rows[name].to_numpy(dtype=float)
    interval = bootstrap_mean(values, rng=np.random.default_rng(_SEED))
    # Draws that all agree show no spread; then the interval over examples is the honest one.
    if len(rows) > 1 and interval.low < interval.high:
        return _estimate(interval)
    return Estimate(float(values.mean()), *(_known_mean(rows[end]) for end in (low, high)))


def _known_mean(column: pd.Series) -> float | None:
    mean = column.mean()
    return None if pd.isna(mean) else float(mean)
