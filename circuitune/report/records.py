"""What a run directory says, as frozen records.

`load` makes them, everything else in this package only reads them. A field is None when the
stage that writes it has not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from circuitune.report.estimate import Estimate
from circuitune.report.findings import Explanation, Judgement
from circuitune.report.reach import Joint, Transfer

EMBEDDING = "embed"
"""The sender of an edge that starts at the tokens."""


@dataclass(frozen=True)
class ModelCard:
    """The shape of the model that was measured; `d_*` are widths, `parameters` a count."""

    id: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    parameters: int
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """How the run was made.

    Attributes:
        command: The command line that made the run.
        model: The model card.
        config: Stage name to its options.
        versions: Package name to version, circuitune's own included.
        machine: Free facts about the machine.
        stages: Stage name to free facts (`hash`, `seconds`, `finished`), in the order they ran.
    """

    command: str
    model: ModelCard
    config: Mapping[str, Mapping[str, object]]
    versions: Mapping[str, str]
    machine: Mapping[str, object]
    stages: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Pair:
    """One clean prompt and its corrupt twin; `split` is select or test.

    Pairs of one `group` are not independent, so intervals resample them together.
    """

    clean: str
    corrupt: str
    answer: str
    task: str
    template: str
    split: str
    group: str | None


@dataclass(frozen=True)
class Prefix:
    """A prompt prefix that was tried; `accuracy` is a fraction of `n` problems."""

    text: str
    accuracy: Estimate
    n: int
    chosen: bool


@dataclass(frozen=True)
class TaskSelection:
    """How many problems of one task the model answers, and how many pairs were kept."""

    task: str
    tried: int
    correct: int
    rate: Estimate
    select: int
    test: int


@dataclass(frozen=True)
class Selection:
    """How the pairs were chosen."""

    prefixes: tuple[Prefix, ...]
    answer_policy: str
    tasks: tuple[TaskSelection, ...]


@dataclass(frozen=True)
class RankedComponent:
    """A component in a ranking; the effect is signed, negative = supports the answer.

    Attributes:
        id: `12.3` for a head, `mlp.7` for an MLP.
        effect: In the unit of the ranking's metric.
        round: The round of the iterated ranking that chose it, from 1; None in a single pass.
    """

    id: str
    effect: Estimate
    round: int | None = None

    @property
    def is_head(self) -> bool:
        """Whether this is an attention head rather than an MLP."""
        return not self.id.startswith("mlp.")


@dataclass(frozen=True)
class SinglePass:
    """The ranking by one sweep, as in the paper; heads below `key_cut` are its key heads."""

    metric: str
    components: tuple[RankedComponent, ...]
    key_cut: float | None
    key_heads: int | None


@dataclass(frozen=True)
class FeedEffect:
    """A mean effect in logits, its p-value after Benjamini and Hochberg, and its share.

    The whole that `share` refers to is what the contrast does to the answer (a node), or the
    effect of what is fed (an edge).
    """

    mean: Estimate
    p_adjusted: float
    share: float


@dataclass(frozen=True)
class FeedNode:
    """A component and its direct effect by contrast.

    Attributes:
        brings: Contrasts that it brings to the answer directly.
        passes_on: Contrasts that it brings to another head.
    """

    id: str
    key: bool
    brings: tuple[str, ...]
    passes_on: tuple[str, ...]
    effects: Mapping[str, FeedEffect]


@dataclass(frozen=True)
class FeedEdge:
    """What `sender`, at the positions of `role`, brings to an input of a head (`head`.`kind`).

    That head writes at the positions of `at`, to `then`, an input of a key head; both are None
    where it is a key head itself and writes the answer.
    """

    sender: str
    role: str
    head: str
    kind: str
    contrast: str
    at: str | None
    then: str | None
    effect: FeedEffect

    @property
    def receiver(self) -> str:
        """The input, as in `20.8.v`."""
        return f"{self.head}.{self.kind}"


@dataclass(frozen=True)
class Feeds:
    """The graph, in the order of the file: strongest edges first.

    Attributes:
        contrasts, roles: their names, in the order of reading.
        totals: what each contrast does to the answer, in logits.
        prompts, given, groups: prompts that were used, those there were, groups of operands.
        dropped: reason to number of prompts that could not be used.
        rule: when a component is said to bring something.
    """

    contrasts: tuple[str, ...]
    roles: tuple[str, ...]
    totals: Mapping[str, float]
    nodes: tuple[FeedNode, ...]
    edges: tuple[FeedEdge, ...]
    prompts: int
    given: int
    groups: int
    dropped: Mapping[str, int]
    rule: str

    def node(self, name: str) -> FeedNode | None:
        """The node of a component."""
        return next((node for node in self.nodes if node.id == name), None)


@dataclass(frozen=True)
class Circuit:
    """The ranked components, most important first; `rule` is free text by field.

    `size` of them, from the top, make the circuit; the rest is ranked for the curves.
    `significance` and `stability` say how sure the first sweep is; empty where not measured.
    `joint` is what joint selection proposed; None where another rule chose the components.
    `noise` is what rounding alone does to an effect, by metric; empty where not measured.
    `feeds` says who feeds the key heads; None where that was not traced, and `untold` why not.
    """

    components: tuple[RankedComponent, ...]
    size: int
    significance: Mapping[str, object]
    stability: Mapping[str, object]
    rule: Mapping[str, object]
    joint: Joint | None
    metric: str
    task: str
    single_pass: SinglePass | None
    noise: Mapping[str, float]
    feeds: Feeds | None
    untold: str


@dataclass(frozen=True)
class Evaluation:
    """One measured number of one model variant, or of a difference of two, over `n` examples.

    Of a benchmark `kind` is `math` or `retention`, and a difference has its corrected p value and
    whether the first variant is shown not to be worse than the second. `chance` is what guessing
    scores where there are choices. A benchmark that was not asked has the metric `missing` and a
    reason.
    """

    task: str
    variant: str
    metric: str
    estimate: Estimate
    n: int
    kind: str = ""
    p_holm: float | None = None
    not_worse: bool | None = None
    reason: str = ""
    chance: float | None = None


@dataclass(frozen=True)
class TunedVariant:
    """What one tuning run trained; `share` is the fraction of all parameters.

    `loss_first` and `loss_last` are nats per supervised token.
    """

    name: str
    components: tuple[str, ...]
    parameters: int
    share: float
    steps: int
    lr: float
    seconds: float
    tokens_per_second: float | None
    loss_first: float | None
    loss_last: float | None


@dataclass(frozen=True)
class Tuning:
    """All tuned variants and the rule that chose their components."""

    variants: tuple[TunedVariant, ...]
    rule: str


@dataclass(frozen=True)
class Run:
    """A whole run directory.

    Attributes:
        path: The directory as the user wrote it.
        effects: Columns `component`, `layer`, `example`, `metric`, `effect`, and where it was
            measured `noise`, what rounding alone does to the effect.
        knockout: Columns `set`, `k`, `draw`, `ablation`, `where`, `task`, `accuracy`, `n`,
            `low`, `high`, `logit_diff`, `kl`, `kl_low`, `kl_high`, `source` (the task that the
            heads were chosen on); numbers from `low` on may be NaN, `source` empty.
        judgement: `validate.json`, None where an older version validated the run.
        transfer: How far the circuit reaches, `transfer.json`.
        outdated: Stages whose inputs were made anew since, and the stage that made these.
    """

    path: Path
    manifest: Manifest
    pairs: tuple[Pair, ...]
    selection: Selection | None
    effects: pd.DataFrame
    circuit: Circuit
    knockout: pd.DataFrame | None
    judgement: Judgement | None
    explanation: Explanation | None
    transfer: Transfer | None
    tuning: Tuning | None
    evaluations: tuple[Evaluation, ...] | None
    benchmarks: tuple[Evaluation, ...] = ()
    outdated: Mapping[str, str] = field(default_factory=dict)
