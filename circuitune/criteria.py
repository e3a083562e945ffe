r"""Is the circuit faithful, complete and minimal? The criteria of Wang et al. (2023, section 4).

F is the mean logit difference over the test half. Heads are ablated by their mean over the corrupt
prompts of that half, at END; MLPs stay, and so do keys and values before END. M is the intact
model, C the circuit alone (every other head ablated), a backslash takes heads away.

- *Faithfulness*: F(C) beside F(M), and as a share of what the corruption takes away,
  (F(C) - F(corrupt)) / (F(M) - F(corrupt)) (Hanna et al. 2024). 1: as good as the model; 0: as bad
  as the model on corrupt prompts. The share with no head kept stands beside it: what MLPs and the
  residual stream do alone.
- *Completeness*: for random subsets K of the circuit, F(C \ K) - F(M \ K). A circuit that lacks
  backups falls further than the model, so large negative numbers show that something is missing.
- *Minimality*: for each head v of the circuit, what taking it away does where nothing else is
  left, F(C \ v) - F(C), and where everything else is left, F(M \ C) - F(M \ (C \ v)), that is
  not giving it back to the model without its circuit. Negative: the head supports the answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from circuitune.components import Head
from circuitune.effects import measure
from circuitune.knockout import Outcome, knock_out
from circuitune.models import Model
from circuitune.patching import unembed
from circuitune.ranks import WHOLE, Share
from circuitune.selection import all_heads
from circuitune.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_means,
    clustered_proportion,
    paired_difference,
    resample_counts,
)
from circuitune.tasks import Task

# Random subsets of the circuit that completeness is measured on.
SUBSETS = 10
DRAWS = 2000


@dataclass(frozen=True)
class Sampler:
    """Makes intervals over groups of pairs, each from the same seed."""

    groups: Sequence[str]
    seed: int

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def mean(self, values: Float[np.ndarray, " example"]) -> Interval:
        """Interval of a mean."""
        return bootstrap_mean(values, rng=self._rng(), groups=self.groups, draws=DRAWS)

    def rate(self, hits: np.ndarray) -> Interval:
        """Interval of a rate."""
        return clustered_proportion(hits.astype(float), rng=self._rng(), groups=self.groups)

    def paired(self, after: np.ndarray, before: np.ndarray) -> Interval:
        """Interval of the change of a rate over the same examples."""
        return paired_difference(after, before, rng=self._rng(), groups=self.groups, draws=DRAWS)

    def share(
        self, part: Float[np.ndarray, " example"], whole: Float[np.ndarray, " example"]
    ) -> Interval | None:
        """Interval of mean(part) / mean(whole), both resampled together.

        None where the interval of mean(whole) reaches zero: then it is no scale.
        """
        if not self.mean(whole).low > 0:
            return None
        n = len(whole)
        counts = resample_counts(n, draws=DRAWS, rng=self._rng(), groups=self.groups)
        low, high = np.quantile((counts @ part) / (counts @ whole), (0.025, 0.975))
        return Interval(float(part.mean() / whole.mean()), float(low), float(high), n)

    def mean_absolute(self, rows: Float[np.ndarray, "row example"]) -> Interval:
        """Interval of the mean over rows of the absolute value of the row's mean.

        It cannot fall below what sampling noise gives, so it is no test for zero.
        """
        n = rows.shape[1]
        counts = resample_counts(n, draws=DRAWS, rng=self._rng(), groups=self.groups)
        sample = np.abs(counts @ rows.T / counts.sum(axis=1, keepdims=True)).mean(axis=1)
        low, high = np.quantile(sample, (0.025, 0.975))
        return Interval(float(np.abs(rows.mean(axis=1)).mean()), float(low), float(high), n)


def interval_json(interval: Interval | None) -> dict[str, Any] | None:
    """An interval for JSON; a bound that says nothing is null, and so is an interval of None."""
    if interval is None:
        return None
    ends = {"low": interval.low, "high": interval.high}
    known = {name: end if math.isfinite(end) else None for name, end in ends.items()}
    return {"estimate": interval.estimate, **known, "n": interval.n}


def draw_subsets(
    heads: Sequence[Head], count: int, rng: np.random.Generator
) -> list[tuple[Head, ...]]:
    """Different random subsets that are not empty, each head in or out with equal chance.

    All of them where there are not more than ``count``.
    """
    total = 2 ** len(heads) - 1
    if total <= count:
        codes: list[int] = list(range(1, total + 1))
    else:
        codes = []
        while len(codes) < count:
            bits = rng.integers(0, 2, size=len(heads))
            code = int(sum(int(bit) << place for place, bit in enumerate(bits)))
            if code and code not in codes:
                codes.append(code)
    return [tuple(head for place, head in enumerate(heads) if code >> place & 1) for code in codes]


def judge(
    model: Model, task: Task, heads: Sequence[Head], *, seed: int = 0, share: Share = WHOLE
) -> dict[str, Any]:
    """Faithfulness, completeness and minimality of a set of heads, for ``validate.json``.

    Args:
        model: the model.
        task: pairs that the heads were not chosen on, all of them on this process.
        heads: the circuit.
        seed: draws the subsets and the resamples.
        share: which of the runs this process does; the other processes must do theirs.
    """
    subsets = draw_subsets(heads, SUBSETS, np.random.default_rng(seed))
    circuit, everything = frozenset(heads), frozenset(all_heads(model))
    wanted = [frozenset(), everything - circuit, everything, circuit]
    for subset in subsets:
        wanted += [everything - circuit.difference(subset), frozenset(subset)]
    for head in heads:
        wanted += [everything - circuit | {head}, circuit - {head}]
    runs = _measured(model, task, wanted, share)
    logits = unembed(model, task.corrupt.final, task.pairs.candidates).cpu().numpy()
    corrupt = measure(logits, task.pairs.answers)["logit_diff"]
    sampler = Sampler(task.pairs.groups, seed)
    clean = runs[frozenset()].logit_diff
    return {
        "heads": [str(head) for head in heads],
        "metric": "logit_diff",
        "pairs": len(corrupt),
        "groups": len(set(task.pairs.groups)),
        "clean": interval_json(sampler.mean(clean)),
        "corrupt": interval_json(sampler.mean(corrupt)),
        "faithfulness": {
            "circuit": _kept(runs[everything - circuit], clean, corrupt, sampler),
            "nothing": _kept(runs[everything], clean, corrupt, sampler),
        },
        "completeness": _completeness(runs, circuit, everything, subsets, sampler),
        "minimality": _minimality(runs, heads, everything, sampler),
    }


Runs = Mapping[frozenset, Outcome]


def _measured(model: Model, task: Task, wanted: Sequence[frozenset], share: Share) -> Runs:
    """Outcome of ablating each of some sets of heads."""
    sets = list(dict.fromkeys(wanted))
    outcomes = [knock_out(model, task, sorted(heads)) for heads in share.of(sets)]
    return dict(zip(sets, share.collect(outcomes), strict=True))


def _kept(
    found: Outcome,
    clean: Float[np.ndarray, " example"],
    corrupt: Float[np.ndarray, " example"],
    sampler: Sampler,
) -> dict[str, Any]:
    """What is left where only some heads are."""
    part = sampler.share(found.logit_diff - corrupt, clean - corrupt)
    return {
        "logit_diff": interval_json(sampler.mean(found.logit_diff)),
        "share": interval_json(part),
        "accuracy": interval_json(sampler.rate(found.correct)),
        "kl": interval_json(sampler.mean(found.kl)),
    }


def _completeness(
    runs: Runs,
    circuit: frozenset,
    everything: frozenset,
    subsets: Sequence[tuple[Head, ...]],
    sampler: Sampler,
) -> dict[str, Any]:
    rows, records = [], []
    for subset in subsets:
        alone = runs[everything - circuit.difference(subset)].logit_diff
        within = runs[frozenset(subset)].logit_diff
        rows.append(alone - within)
        records.append(
            {
                "removed": [str(head) for head in subset],
                "circuit": float(alone.mean()),
                "model": float(within.mean()),
                "difference": interval_json(sampler.mean(rows[-1])),
            }
        )
    total = sampler.mean_absolute(np.stack(rows))
    return {"mean_absolute_difference": interval_json(total), "subsets": records}


def _minimality(
    runs: Runs, heads: Sequence[Head], everything: frozenset, sampler: Sampler
) -> list[dict[str, Any]]:
    circuit = frozenset(heads)
    alone, without = runs[everything - circuit].logit_diff, runs[circuit].logit_diff
    records = []
    for head in heads:
        taken = runs[everything - circuit | {head}].logit_diff - alone
        missing = without - runs[circuit - {head}].logit_diff
        both = bootstrap_means(
            np.stack([taken, missing]),
            rng=np.random.default_rng(sampler.seed),
            groups=sampler.groups,
            draws=DRAWS,
        )
        circuit_change, model_change = map(interval_json, both)
        records.append(
            {"id": str(head), "from_circuit": circuit_change, "from_model": model_change}
        )
    return records
