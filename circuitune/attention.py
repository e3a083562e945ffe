"""Where heads look from END, by the role of the token: description, not evidence.

An attention weight says how much of a token's value passes the head, not whether that value
matters. What a head brings to the answer is what `circuitune.graph` measures.

The weights are the model's own, from a plain forward pass with ``attn_implementation`` switched to
``eager`` (other kernels do not keep them). Prompts of one length run together, so nothing is
padded. A first token without meaning is a role of its own, ``start``: heads that have nothing to do
rest there.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitune.components import Head
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.roles import ARITHMETIC_ROLES, OWN_ROLES, Prompt
from circuitune.stats import resample_counts

START = "start"
# Roles that give their first token to it.
RESTING = ("other", "before")
# Label -> the roles that count for it; `START` counts for none.
ARITHMETIC_LABELS = {
    "operand": ("operand 1", "operand 2"),
    "operator": ("operator",),
    "other": ("end", "other"),
}
OWN_LABELS = {"changed": ("changed",), "other": ("before", "after", "end")}
RULE = (
    "the roles with the most attention from END, on average, the first token left out; confidence "
    "is the share of bootstrap draws of groups with the same label"
)
# Attention weights that a forward pass may keep at once, in numbers.
KEPT_NUMBERS = 2**26


@dataclass(frozen=True)
class Looks:
    """Attention weights from END.

    Attributes:
        roles: the last axis of both arrays, `START` first.
        weights: summed over the tokens of each role; over all roles they sum to one.
        uniform: share of each prompt's tokens that have the role, which is what a head that
            looks everywhere alike would give.
        groups: group of each example.
    """

    roles: tuple[str, ...]
    weights: Float[np.ndarray, "layer head example role"]
    uniform: Float[np.ndarray, "example role"]
    groups: tuple[str, ...]

    def of(self, head: Head) -> Float[np.ndarray, "example role"]:
        """Weights of one head."""
        return self.weights[head.layer, head.index]

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """The labels that a head can get, with the roles that count for each."""
        return ARITHMETIC_LABELS if set(ARITHMETIC_ROLES) <= set(self.roles) else OWN_LABELS

    def label(self, head: Head, *, rng: np.random.Generator, draws: int = 2000) -> "Label":
        """The label of a head, see `RULE`; the order of the examples does not matter."""
        weights = self.of(head)
        columns = {
            name: weights[:, [self.roles.index(role) for role in roles]].sum(axis=1)
            for name, roles in self.labels.items()
        }
        return vote(columns, self.groups, rng=rng, draws=draws)


@dataclass(frozen=True)
class Label:
    """What a head looks at most, and how sure that is (0-1, share of bootstrap draws)."""

    name: str
    confidence: float


def vote(
    columns: Mapping[str, Float[np.ndarray, " example"]],
    groups: Sequence[str],
    *,
    rng: np.random.Generator,
    draws: int = 2000,
    kinds: Mapping[str, str] | None = None,
) -> Label:
    """The column with the largest mean, and how often it is so when groups are resampled.

    The result does not depend on the order of the examples.

    Args:
        columns: values per example, by name.
        groups: group of each example.
        rng: draws the resamples.
        draws: how many.
        kinds: label of the columns that do not have their own name as a label.
    """
    # Draws go to groups in order of appearance, so that order is made the same.
    order = np.lexsort((*columns.values(), groups))
    values = np.stack(list(columns.values()))[:, order]
    ordered = [groups[place] for place in order]
    counts = resample_counts(len(groups), draws=draws, rng=rng, groups=ordered)
    names = np.array([(kinds or {}).get(name, name) for name in columns])
    winner = str(names[values.mean(axis=1).argmax()])
    winners = names[(values @ counts.T).argmax(axis=0)]
    return Label(winner, float((winners == winner).mean()))


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Inside, the model computes attention in the way that keeps its weights."""
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


@torch.no_grad()
def look(model: Model, prompts: Sequence[Prompt]) -> Looks:
    """Attention weights of all heads from END, summed by role.

    Args:
        model: the model.
        prompts: prompts with roles, all arithmetic or all not.

    Raises:
        UserError: the model does not give its attention weights.
    """
    known = ARITHMETIC_ROLES if set(prompts[0].roles) == set(ARITHMETIC_ROLES) else OWN_ROLES
    roles = (START, *known)
    weights = np.zeros((model.layers, model.heads, len(prompts), len(roles)))
    uniform = np.zeros((len(prompts), len(roles)))
    with eager(model):
        for places in _batches(model, prompts):
            tokens = [prompts[place].tokens for place in places]
            found = _weights(model, torch.tensor(tokens, device=model.device))
            for row, place in enumerate(places):
                for column, at in enumerate(_places(prompts[place], roles)):
                    weights[:, :, place, column] = found[:, row][..., at].sum(-1)
                    uniform[place, column] = len(at) / len(prompts[place].tokens)
    return Looks(roles, weights, uniform, tuple(prompt.group for prompt in prompts))


def _places(prompt: Prompt, roles: Sequence[str]) -> list[list[int]]:
    """Places of each role; the first token is `START` unless it is an operand, say."""
    named = {role: list(places) for role, places in prompt.roles.items()} | {START: []}
    for role in RESTING:
        if 0 in named.get(role, ()):
            named[role].remove(0)
            named[START] = [0]
    return [named[role] for role in roles]


def _batches(model: Model, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Prompts of one length, as many as may run at once."""
    of_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        of_length[len(prompt.tokens)].append(place)
    for length, places in of_length.items():
        size = max(1, KEPT_NUMBERS // (model.layers * model.heads * length**2))
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _weights(model: Model, tokens: Tensor) -> Float[np.ndarray, "layer batch head token"]:
    """Attention weights at END of every layer."""
    found = model.trunk(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    shape = (len(tokens), model.heads, tokens.shape[1], tokens.shape[1])
    if not found or len(found) != model.layers or any(tuple(f.shape) != shape for f in found):
        raise UserError(
            f"Attention by role needs the attention weights of every layer, {model.source} does "
            "not give them; read the effects of the heads instead."
        )
    return torch.stack([layer[:, :, -1] for layer in found]).double().cpu().numpy()
