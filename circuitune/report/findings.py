"""What the folder `explain` and `validate.json` say, as frozen records."""

from collections.abc import Mapping
from dataclasses import dataclass

from circuitune.report.estimate import Estimate


@dataclass(frozen=True)
class Label:
    """What a head is called, and the share of bootstrap draws in which it would be so (0-1)."""

    name: str
    confidence: float


@dataclass(frozen=True)
class HeadStory:
    """What is told of one head.

    Attributes:
        key: Whether it is of the circuit; others are of the graph.
        brings: What it brings to the answer; None where that was not traced.
        looks: The label by where it looks; None where attention was not measured.
        does: The label by what it brings; None where that was not traced.
        writes: Tokens that it writes most on clean prompts.
        writes_more: Tokens that it writes more than on corrupt prompts.
    """

    id: str
    key: bool
    brings: tuple[str, ...] | None
    looks: Label | None
    does: Label | None
    writes: tuple[str, ...]
    writes_more: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """Attention weight (0-1) from END to the tokens of one role.

    `kind` is key, graph, layer or all; `uniform` is what equal attention to all tokens gives.
    """

    component: str
    kind: str
    role: str
    weight: Estimate
    uniform: float


@dataclass(frozen=True)
class Written:
    """What a head adds to the logit of a kind of token; `run` is clean, corrupt or difference."""

    component: str
    run: str
    token: str
    logits: Estimate


@dataclass(frozen=True)
class MlpFact:
    """A number of the MLP of a layer.

    `measure` is effect (logits, negative supports the answer), or the vector whose cosine with
    the unembedding row of `token` it is: input, output or sum.
    """

    layer: int
    measure: str
    token: str
    value: Estimate


@dataclass(frozen=True)
class LensPoint:
    """Rank (1 is the best) and probability (0-1) of a kind of token after a layer, by the lens."""

    layer: int
    token: str
    rank: Estimate
    probability: Estimate


@dataclass(frozen=True)
class Neuron:
    """A neuron: direct effect in logits, share of its MLP's effect, mean activations.

    `estimate` is the gradient estimate that chose it, on the other half.
    """

    mlp: str
    index: int
    estimate: float
    effect: Estimate
    share: float
    clean: float
    corrupt: float
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class ExampleLayer:
    """The most probable tokens after a layer with their probabilities, and ranks by kind."""

    layer: int
    top: tuple[tuple[str, float], ...]
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class Example:
    """One prompt through the logit lens; `tokens` are the texts of the kinds of token."""

    prompt: str
    tokens: Mapping[str, str]
    layers: tuple[ExampleLayer, ...]


@dataclass(frozen=True)
class Explanation:
    """The folder `explain`, measured on the held-out half.

    Attributes:
        rise: start, inflection and end of the answer's rise to the layer, with its interval.
        notes: Part (attention, readout, neurons) to why it is not there.
        pairs, groups: Pairs and groups of operands that all means are over.
    """

    heads: tuple[HeadStory, ...]
    attention: tuple[Look, ...]
    readout: tuple[Written, ...]
    mlps: tuple[MlpFact, ...]
    lens: tuple[LensPoint, ...]
    neurons: tuple[Neuron, ...]
    rise: Mapping[str, Estimate]
    example: Example | None
    notes: Mapping[str, str]
    pairs: int
    groups: int


@dataclass(frozen=True)
class Kept:
    """What is left where only some heads are; `share` is None where there is no scale for it."""

    logit_diff: Estimate
    share: Estimate | None
    accuracy: Estimate


@dataclass(frozen=True)
class Subset:
    """Mean logit difference of circuit and model without some heads, and circuit minus model."""

    removed: tuple[str, ...]
    circuit: float
    model: float
    difference: Estimate


@dataclass(frozen=True)
class Needed:
    """What one head does in logits, negative supports: beside the circuit, beside all others."""

    id: str
    from_circuit: Estimate
    from_model: Estimate


@dataclass(frozen=True)
class ControlTask:
    """A control task.

    Attributes:
        rate: Right answers among the prompts with an answer of one token; None if there is none.
        kept: Whether the model answers enough of them to measure it.
        shared: Heads that its circuit shares with the circuit; None if it has none.
    """

    task: str
    rate: Estimate | None
    kept: bool
    shared: int | None


@dataclass(frozen=True)
class Judgement:
    """Is the circuit faithful, complete, minimal? In logits, on the held-out half.

    Attributes:
        heads: The circuit that was judged.
        clean, corrupt: Mean logit difference of the intact model.
        circuit, nothing: What is left with the circuit's heads alone, and with none.
        incomplete: Mean absolute difference of circuit and model over the subsets.
    """

    heads: tuple[str, ...]
    clean: Estimate
    corrupt: Estimate
    circuit: Kept
    nothing: Kept
    incomplete: Estimate
    subsets: tuple[Subset, ...]
    minimality: tuple[Needed, ...]
    controls: tuple[ControlTask, ...]
    pairs: int
    groups: int
