"""Metrics and the effect table: the one home of sign and normalisation.

Every effect is *patched minus clean*, so a negative effect means that the component supports the
answer. Three metrics are computed from the logits of the admissible answers at END:

- ``logit_diff``: logit of the answer minus the logsumexp of the other admissible answers, in
  logits. The default for ranking: it does not depend on the arbitrary offset of a logit.
- ``prob``: probability of the answer among the admissible answers (the logistic of
  ``logit_diff``), a number in 0-1.
- ``relative_logit``: (patched - clean) / clean of the raw answer logit, the number of
  Zhang et al. (2024, section 3). Kept beside the others; a raw logit has no meaningful zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import ttest_1samp

from circuitune.components import Component, Embedding, Receiver, Sender, parse_component
from circuitune.errors import UserError
from circuitune.stats import Interval, bootstrap_means

Metric = Literal["logit_diff", "prob", "relative_logit"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def measure(
    logits: Float[np.ndarray, "*batch example candidate"], answers: Int[np.ndarray, " example"]
) -> dict[Metric, Float[np.ndarray, "*batch example"]]:
    """The value of each metric from candidate logits.

    Args:
        logits: logits of the admissible answers at END.
        answers: index of the right answer among the candidates, one per example.

    Returns:
        ``logit_diff`` and ``prob`` as defined above; under ``relative_logit`` the *raw* answer
        logit, from which `EffectTable.effect` forms the ratio.
    """
    logits = logits.astype(np.float64)
    columns = np.broadcast_to(answers[:, None], (*logits.shape[:-1], 1))
    answer = np.take_along_axis(logits, columns, axis=-1)[..., 0]
    others = logits.copy()
    np.put_along_axis(others, columns, -np.inf, axis=-1)
    top = others.max(axis=-1)
    rest = top + np.log(np.exp(others - top[..., None]).sum(axis=-1))
    difference = answer - rest
    return {
        "logit_diff": difference,
        "prob": np.exp(-np.logaddexp(0.0, -difference)),  # the logistic, without overflow
        "relative_logit": answer,
    }


def grouped_p_values(
    effects: Float[np.ndarray, "sender example"], groups: Sequence[str]
) -> Float[np.ndarray, " sender"]:
    """Whether mean effects differ from zero: a t test over the means of groups of examples.

    Prompts that share operands are not independent, so operand pairs are what is counted; with
    ten of them a permutation test could not pass a correction for hundreds of components.

    Returns:
        two-sided p-values; 1 where there are fewer than two groups or no effect at all, 0 where
        all groups have the same effect.
    """
    names = np.array(groups)
    means = np.stack([effects[:, names == n].mean(axis=1) for n in np.unique(names)], axis=1)
    if means.shape[1] < 2:
        return np.ones(len(means))
    still = means.std(axis=1) <= 1e-12 * np.abs(means).max(axis=1)
    p_values = np.where(means.any(axis=1), 0.0, 1.0)
    p_values[~still] = ttest_1samp(means[~still], 0.0, axis=1).pvalue
    return p_values


def change(
    clean: Mapping[Metric, Float[np.ndarray, " example"]],
    patched: Mapping[Metric, Float[np.ndarray, "*batch example"]],
    metric: Metric,
) -> Float[np.ndarray, "*batch example"]:
    """Patched minus clean (divided by clean for ``relative_logit``), from values of `measure`."""
    difference = patched[metric] - clean[metric]
    return difference / clean[metric] if metric == "relative_logit" else difference


@dataclass(frozen=True)
class EffectTable:
    """Per-example effects of components, the result of every way to locate.

    Attributes:
        components: the senders, one per row of the arrays.
        clean: metric value of the clean run per metric, shape (example,).
        patched: metric value with the sender patched per metric, shape (sender, example).
    """

    components: tuple[Component, ...]
    clean: dict[Metric, Float[np.ndarray, " example"]]
    patched: dict[Metric, Float[np.ndarray, "sender example"]]

    @classmethod
    def from_logits(
        cls,
        components: Sequence[Component],
        clean: Float[np.ndarray, "example candidate"],
        patched: Float[np.ndarray, "sender example candidate"],
        answers: Int[np.ndarray, " example"],
    ) -> "EffectTable":
        """Build the table from candidate logits at END (see `measure`)."""
        return cls(tuple(components), measure(clean, answers), measure(patched, answers))

    def effect(self, metric: Metric = "logit_diff") -> Float[np.ndarray, "sender example"]:
        """Patched minus clean (divided by clean for ``relative_logit``), per example."""
        return change(self.clean, self.patched, metric)

    def mean(self, metric: Metric = "logit_diff") -> Float[np.ndarray, " sender"]:
        """Mean effect of each component over the examples."""
        return self.effect(metric).mean(axis=1)

    def intervals(
        self,
        metric: Metric = "logit_diff",
        *,
        rng: np.random.Generator,
        groups: Sequence[str] | None = None,
        draws: int = 2000,
    ) -> list[Interval]:
        """Bootstrap interval of each component's mean effect; ``groups`` are resampled whole."""
        return bootstrap_means(self.effect(metric), rng=rng, groups=groups, draws=draws)

    def rank(self, metric: Metric = "logit_diff") -> list[Component]:
        """Components in order of mean effect, the most supporting (most negative) first."""
        order = np.argsort(self.mean(metric), kind="stable")
        return [self.components[row] for row in order]

    def rows(self, components: Sequence[Component]) -> list[int]:
        """Row numbers of the given components."""
        row_of = {part: row for row, part in enumerate(self.components)}
        return [row_of[part] for part in components]

    def select(self, components: Sequence[Component]) -> "EffectTable":
        """The table of these components alone, in the order given."""
        rows = self.rows(components)
        patched = {metric: values[rows] for metric, values in self.patched.items()}
        return EffectTable(tuple(components), self.clean, patched)

    def to_frame(self) -> pd.DataFrame:
        """Tidy form: one row per (component, example, metric); columns of ``effects.parquet``."""
        senders, examples = next(iter(self.patched.values())).shape
        frames = [
            pd.DataFrame(
                {
                    "component": np.repeat([str(part) for part in self.components], examples),
                    "layer": np.repeat([part.layer for part in self.components], examples),
                    "example": np.tile(np.arange(examples), senders),
                    "metric": metric,
                    "clean": np.tile(self.clean[metric], senders),
                    "patched": values.reshape(-1),
                    "effect": self.effect(metric).reshape(-1),
                }
            )
            for metric, values in self.patched.items()
        ]
        return pd.concat(frames, ignore_index=True)

    @classmethod
    def load(cls, path: Path) -> "EffectTable":
        """Read ``effects.parquet``.

        Raises:
            UserError: the file is absent, unreadable or lacks a column.
        """
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The effects must be a readable parquet file, {path} is not ({error}); "
                "run `circuitune locate` to make it."
            ) from error
        missing = {"component", "example", "metric", "clean", "patched"} - set(frame.columns)
        if missing:
            raise UserError(
                f"{path} must hold one row per component, example and metric, it lacks the "
                f"columns {sorted(missing)}; run `circuitune locate` to make it anew."
            )
        names = list(dict.fromkeys(frame["component"]))
        clean: dict[Metric, np.ndarray] = {}
        patched: dict[Metric, np.ndarray] = {}
        for metric, part in frame.groupby("metric", sort=False):
            table = part.pivot(index="component", columns="example", values="patched").loc[names]
            first = part[part["component"] == names[0]].sort_values("example")
            clean[metric] = first["clean"].to_numpy()
            patched[metric] = table.to_numpy()
        return cls(tuple(parse_component(name) for name in names), clean, patched)


@dataclass(frozen=True)
class PathTable:
    """Per-example effects of paths.

    Attributes:
        receivers, roles, senders: what the first three axes of ``patched`` count.
        clean: metric value of the clean run per metric; as in `EffectTable` the raw answer logit
            for ``relative_logit``.
        patched: the same with one path patched.
    """

    receivers: tuple[Receiver, ...]
    roles: tuple[str, ...]
    senders: tuple[Sender, ...]
    clean: dict[Metric, Float[np.ndarray, " example"]]
    patched: dict[Metric, Float[np.ndarray, "receiver role sender example"]]

    def effect(
        self, metric: Metric = "logit_diff"
    ) -> Float[np.ndarray, "receiver role sender example"]:
        """Patched minus clean (divided by clean for ``relative_logit``).

        Negative: what the sender brings to the receiver supports the answer.
        """
        return change(self.clean, self.patched, metric)

    def into(self, receiver: Receiver, role: str) -> EffectTable:
        """The components that feed one receiver, for ranks and intervals (embeddings left out)."""
        at = self.receivers.index(receiver), self.roles.index(role)
        rows = [row for row, part in enumerate(self.senders) if not isinstance(part, Embedding)]
        patched = {metric: values[at][rows] for metric, values in self.patched.items()}
        return EffectTable(tuple(self.senders[row] for row in rows), self.clean, patched)

    def to_frame(self) -> pd.DataFrame:
        """Tidy form: one row per (receiver, role, sender, example, metric)."""
        axes = {
            "receiver": [str(receiver) for receiver in self.receivers],
            "role": self.roles,
            "sender": [str(sender) for sender in self.senders],
            "example": range(len(next(iter(self.clean.values())))),
        }
        rows = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
        frames = [
            rows.assign(
                metric=metric,
                clean=np.broadcast_to(self.clean[metric], values.shape).reshape(-1),
                patched=values.reshape(-1),
                effect=self.effect(metric).reshape(-1),
            )
            for metric, values in self.patched.items()
        ]
        return pd.concat(frames, ignore_index=True)
