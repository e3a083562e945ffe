"""What `transfer.json` says and what joint selection proposed, as frozen records."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from circuitune.report.estimate import Estimate


@dataclass(frozen=True)
class Place:
    """A task of the matrix: how many prompts were tried and answered, and the heads it gave.

    Attributes:
        family: own (of the run), arithmetic, word problem or control.
        of: Prompts that `correct` counts among: tried ones, or those with a one-token answer.
        commonest: How many of these have the commonest answer; None where that is not known.
        near_chance: Whether the model is not shown to beat always saying the commonest answer.
        kept: Whether it answers enough to be measured.
    """

    task: str
    family: str
    of: int
    correct: int
    commonest: int | None
    near_chance: bool
    kept: bool
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Shared:
    """Heads that the first `k` of two tasks share, against chance.

    Random sets with as many heads in each layer share `expected` on average, in 97.5 % of all
    cases at most `high`, and with probability `p` at least as many.
    """

    tasks: tuple[str, str]
    k: int
    shared: int
    expected: float
    high: int
    p: float


@dataclass(frozen=True)
class Scored:
    """Accuracy before and after a knockout, and after minus before (fractions).

    `p` is McNemar's; `spared`: a loss of the margin is excluded.
    """

    before: Estimate
    after: Estimate
    change: Estimate
    p: float
    spared: bool


@dataclass(frozen=True)
class Choices:
    """Multiple-choice questions with a set of heads ablated.

    Attributes:
        kind: source (the heads of the run's task) or matched (random ones).
        n: Questions.
        margin: The largest loss that does not count, a fraction.
        scores: By kind of score, acc or acc_norm (per byte of the choice).
        log_prob: Change of the right choice's log probability, in nats.
    """

    data: str
    kind: str
    draw: int
    n: int
    margin: float
    scores: Mapping[str, Scored]
    log_prob: Estimate


@dataclass(frozen=True)
class HeadChange:
    """Mean direct effect of a head before and after tuning, in logits; negative supports.

    Attributes:
        direction: grew, shrank or unclear.
        share: Change of its share of the model's whole effect, None where there is no whole.
    """

    id: str
    before: float
    after: float
    change: Estimate
    p_adjusted: float
    direction: str
    share: Estimate | None


@dataclass(frozen=True)
class Against:
    """Mean absolute change of tuned heads and of all others, in logits."""

    tuned: float
    others: float
    difference: Estimate
    p: float


@dataclass(frozen=True)
class Overlap:
    """Heads that the strongest `k` before and after tuning have in common.

    `noise` is the Jaccard index that resampled pairs alone give.
    """

    k: int
    common: int
    jaccard: float
    noise: float


@dataclass(frozen=True)
class Variant:
    """What tuning some heads did to the direct effects of all.

    Attributes:
        before, after: Accuracy on the pairs.
        total: What the whole corruption does before and after, in logits.
        tested, grew, shrank: Heads; those that changed at the rate `false_discovery`.
        heads: The largest changes.
        tuned: The changes of the tuned heads.
        against: The tuned heads beside all others, None where all or none were tuned.
    """

    name: str
    before: Estimate
    after: Estimate
    total: tuple[float, float]
    tested: int
    grew: int
    shrank: int
    false_discovery: float
    heads: tuple[HeadChange, ...]
    tuned: tuple[HeadChange, ...]
    overlaps: tuple[Overlap, ...]
    against: Against | None


@dataclass(frozen=True)
class Tuned:
    """How direct effects differ between base and tuned model, or in `note` why that is not known.

    Attributes:
        split: The half of the pairs.
        pairs, groups: Pairs and groups of operands that all means are over.
    """

    split: str
    pairs: int
    groups: int
    variants: tuple[Variant, ...]
    note: str = ""


@dataclass(frozen=True)
class Transfer:
    """How far a circuit reaches.

    Attributes:
        k: Heads that each task gives.
        rows: `transfer.parquet`, with the columns of `Run.knockout`; None where it is not there.
        notes: Why something is not there, by part.
    """

    task: str
    k: int
    places: tuple[Place, ...]
    rows: pd.DataFrame | None
    overlap: tuple[Shared, ...]
    choices: tuple[Choices, ...]
    tuned: Tuned | None
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Proposal:
    """A set of heads and who proposed it.

    Attributes:
        accuracy: Task to the share of right answers that it leaves on the select half.
        reached: Whether it reaches the goal there.
    """

    by: str
    heads: tuple[str, ...]
    accuracy: Mapping[str, float]
    reached: bool


@dataclass(frozen=True)
class Joint:
    """What joint selection proposed, and its goal.

    Attributes:
        targets, spared: Tasks to destroy and to keep.
        left: Largest accuracy that a target may keep.
        harm: Largest accuracy that spared tasks may lose on average.
        evaluated: Sets that were knocked out.
        chosen: The set that became the circuit.
        intact: Accuracy of the intact model by task; 1 where it is not given.
    """

    targets: tuple[str, ...]
    spared: tuple[str, ...]
    intact: Mapping[str, float]
    left: float
    harm: float
    evaluated: int
    proposals: tuple[Proposal, ...]
    chosen: Proposal | None
