"""Exact effects of paths sender -> receiver -> answer: who feeds the key heads.

A receiver is the query, key or value of one head. The path effect of a sender through it, at a
set of positions:

1. Run clean with the sender's output at these positions replaced by its corrupt value. All other
   heads hold their clean outputs at every position; norms and MLPs recompute. Read what the
   receiver's projection makes of the residual stream that arrives at its layer: the query at
   END, the keys or values at the patched positions.
2. Run clean with that query (keys, values) in place; the head's own attention (norms of queries
   and keys, positions, softmax) gives its new z at END.
3. The effect is the *direct effect* of that z on the answer: all other heads hold their clean
   outputs, later MLPs and norms recompute, as in `circuitune.patching`.

Wang et al. (2023) end otherwise: with the receiver's input in place they let all later heads
recompute too, so that what the receiver tells them counts with it. Here a path ends in the
answer, and the effect is the part of the receiver's own direct effect that this sender brings.

With the heads held, a change at one position stays there until the receiver's layer. So step 1
is the replay of the direct effects with *cells*, (example, position), in place of examples. Steps
2 and 3 need the attention of one layer with given projections, and the replay of END.

Checked in ``tests/test_paths.py`` against ``tests/reference/slow_paths.py``: plain hooks and
whole forward passes, one path at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuitune.components import Component, Head, Mlp, all_components, check_components
from circuitune.effects import EffectTable, Metric, measure
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import (
    EndStates,
    _replay,
    _run_layer,
    _start_rows,
    finish,
    unembed,
    wide,
)
from circuitune.sites import Trace, attend, record

Kind = Literal["q", "k", "v"]
Sharing = Literal["head", "group"]
# Bounds of memory: numbers in the residual streams of step 1, and tokens in a batch of step 2.
STATE_NUMBERS = 2**27
ATTENTION_TOKENS = 2**14


@dataclass(frozen=True)
class Embedding:
    """The token embeddings as a sender, printed ``embed``; they lie below layer 0."""

    layer: int = -1

    def __str__(self) -> str:
        return "embed"


Sender = Component | Embedding


@dataclass(frozen=True, order=True)
class Receiver:
    """The query, key or value of one query head, printed ``12.3.q``."""

    head: Head
    kind: Kind

    def __str__(self) -> str:
        return f"{self.head}.{self.kind}"


@dataclass(frozen=True)
class Paths:
    """Which paths to measure.

    Attributes:
        receivers: where paths go in.
        senders: where paths start; by default the embeddings and all components in layers below
            the highest receiver. A sender that is not below a receiver has effect 0 on it.
        roles: named sets of positions, for each example a list of token places (negative ones
            count from the end, so -1 is END; it may be empty). A sender is patched at all places
            of a role at once. By default one role ``all``, every position. A query is read at
            END, so a role without END has effect 0 on it.
        kv: which query heads of a key-value head see a changed key or value: ``head``, the
            receiver alone, as if it had a key-value head of its own; or ``group``, all that
            share it, and their z are patched together. The same if no heads are shared.
    """

    receivers: Sequence[Receiver]
    senders: Sequence[Sender] | None = None
    roles: Mapping[str, Sequence[Sequence[int]]] | None = None
    kv: Sharing = "head"


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
        patched = self.patched[metric]
        flat = patched.reshape(-1, patched.shape[-1])
        return EffectTable((), self.clean, {metric: flat}).effect(metric).reshape(patched.shape)

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


@torch.no_grad()
def path_effects(
    model: Model,
    clean: Sequence[Sequence[int]],
    corrupt: Sequence[Sequence[int]],
    paths: Paths,
    *,
    candidates: Sequence[int],
    answers: Int[np.ndarray, " example"],
) -> PathTable:
    """Effect of every sender on the answer through every receiver, per role and example.

    Args:
        model: a model with separate projections of queries, keys and values.
        clean: token ids of the prompts that are patched.
        corrupt: token ids of their counterparts, each as long as its clean prompt.
        paths: senders, receivers and positions.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each example's answer.

    Raises:
        UserError: the prompts of a pair differ in length, the model has no such component or
            position, or it keeps its projections in another way.
    """
    names = projections(model)
    check_components([receiver.head for receiver in paths.receivers], model.layers, model.heads)
    senders = _senders(model, paths)
    roles = _roles(clean, corrupt, paths)
    shape = (len(paths.receivers), len(roles), len(senders), len(clean))
    values: list[dict[Metric, np.ndarray]] = []
    blocks = _blocks([len(tokens) for tokens in clean], len(senders) * model.d_model)
    for places in tqdm(blocks, desc="paths", disable=None, leave=False):
        inside = {role: [by_example[place] for place in places] for role, by_example in roles.items()}
        block = _run_block(model, [clean[i] for i in places], [corrupt[i] for i in places], inside)
    raise NotImplementedError
