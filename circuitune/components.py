"""Names for the parts of a model: attention heads, MLPs, and ordered sets of them.

The words of the project, used literally everywhere:

==============  ==================================================================================
clean, corrupt  the prompt with the calculation, and its counterpart without (operator replaced)
sender          the component whose output is changed; receiver: where the change is read
path            sender, receiver, answer; role: a named set of positions, such as the operator
patch           give a component, in the clean run, the output that it has in the corrupt run
direct effect   change of the answer when a sender is patched and every other head is held
knockout        ablate a whole set and count the answers that survive
END             the last position of the prompt, where the answer is read
key head        a head that a selection rule kept; circuit: the ordered set of them
control         the same measurement on components that nobody selected
==============  ==================================================================================

Axis names of array shapes: ``example`` (one prompt pair), ``sender`` (one component), ``layer``,
``head`` (query heads, zero-based), ``d_head``, ``d_model``, ``candidate`` (admissible answers),
``token`` (position), ``vocab``; ``z`` (heads times d_head), ``width`` (d_head or d_model),
``inputs`` and ``outputs`` (of a projection), ``slice`` (its trained rows or columns), ``batch``
(prompts that run together); in training ``text``, ``text_token`` and ``step`` (rows of plain
text, their tokens, and those that predict one); in
statistics ``row`` (whatever is compared), ``unit`` (what is resampled whole), ``draw`` (resamples)
``test`` (hypotheses), ``seed`` (of a training) and ``group`` (examples with something in common);
``paragraph`` and ``quantity`` (what is summed over a paragraph); of
paths ``receiver``, ``role`` and ``cell`` (one position of one example).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from circuitune.errors import UserError


@dataclass(frozen=True, order=True)
class Head:
    """One query head, printed ``layer.index`` (both zero-based)."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


@dataclass(frozen=True, order=True)
class Mlp:
    """The feed-forward block of one layer, printed ``mlp.layer``."""

    layer: int

    def __str__(self) -> str:
        return f"mlp.{self.layer}"


Component = Head | Mlp


@dataclass(frozen=True)
class Embedding:
    """The token embeddings as a sender, printed ``embed``; they lie below layer 0."""

    layer: int = -1

    def __str__(self) -> str:
        return "embed"


Sender = Component | Embedding
Kind = Literal["q", "k", "v", "in"]


@dataclass(frozen=True, order=True)
class Receiver:
    """Where a path goes in, printed ``12.3.q`` or ``mlp.7.in``.

    Attributes:
        part: a query head or an MLP.
        kind: the query, key or value of the head, or the input (``in``) of the MLP.
    """

    part: Component
    kind: Kind

    @property
    def layer(self) -> int:
        """The layer of the part."""
        return self.part.layer

    def __str__(self) -> str:
        return f"{self.part}.{self.kind}"


def parse_component(text: str) -> Component:
    """Read ``12.3`` as a head and ``mlp.7`` as an MLP; the inverse of ``str``.

    Raises:
        UserError: the text is neither.
    """
    if match := re.fullmatch(r"(\d+)\.(\d+)", text.strip()):
        return Head(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"mlp\.(\d+)", text.strip()):
        return Mlp(int(match[1]))
    raise UserError(
        f"A component is written layer.head (12.3) or mlp.layer (mlp.7), found {text!r}; "
        "numbers start at zero."
    )


@dataclass(frozen=True)
class Choice:
    """One chosen component with the effect that it was chosen for.

    ``estimate``, ``low`` and ``high`` are a mean effect and its interval in the unit of the
    rule's metric; ``round`` is the round of an iterated selection (1 for a single pass).
    """

    component: Component
    estimate: float
    low: float
    high: float
    round: int = 1

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the component under ``id``."""
        return {
            "id": str(self.component),
            "estimate": self.estimate,
            "low": self.low,
            "high": self.high,
            "round": self.round,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Choice":
        """The inverse of `to_json`."""
        return cls(
            parse_component(record["id"]),
            record["estimate"],
            record["low"],
            record["high"],
            record.get("round", 1),
        )


@dataclass(frozen=True)
class Circuit:
    """Ranked components with the rule, task and model that they belong to.

    Attributes:
        choices: ranked, most important first.
        task: the task that they were chosen on.
        model: name of the model.
        rule: how they were chosen.
        size: how many of them, from the top, make the circuit; the rest is ranked for curves.
    """

    choices: tuple[Choice, ...]
    task: str
    model: str
    rule: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    @property
    def components(self) -> tuple[Component, ...]:
        """The components alone, most important first."""
        return tuple(choice.component for choice in self.choices)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads alone, most important first."""
        return tuple(part for part in self.components if isinstance(part, Head))

    def to_json(self) -> dict[str, Any]:
        """The content of ``circuit.json``."""
        return {
            "components": [choice.to_json() for choice in self.choices],
            "size": self.size,
            "rule": self.rule,
            "task": self.task,
            "model": self.model,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Circuit":
        """The inverse of `to_json`; unknown keys are left alone."""
        choices = tuple(Choice.from_json(item) for item in record["components"])
        rule, size = record.get("rule", {}), record.get("size", len(choices))
        return cls(choices, record["task"], record["model"], rule, size)


def all_components(layers: int, heads: int) -> tuple[Component, ...]:
    """Every head and MLP of a model, layer by layer, heads before the MLP of their layer."""
    return tuple(
        part
        for layer in range(layers)
        for part in (*(Head(layer, index) for index in range(heads)), Mlp(layer))
    )


def parse_heads(names: Iterable[str]) -> tuple[Head, ...]:
    """The heads among the names of components, in their order."""
    parts = (parse_component(name) for name in names)
    return tuple(part for part in parts if isinstance(part, Head))


def check_components(parts: Iterable[Component], layers: int, heads: int) -> None:
    """Refuse components that a model of this size does not have.

    Raises:
        UserError: a layer or head number is out of range.
    """
    for part in parts:
        if part.layer >= layers or (isinstance(part, Head) and part.index >= heads):
            raise UserError(
                f"Components must lie in layers 0-{layers - 1} and heads 0-{heads - 1}, "
                f"found {part}; check that the file belongs to this model."
            )
