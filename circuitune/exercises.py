"""Generated arithmetic for tuning: problems to train on, to watch, and to judge by.

The one-digit operand pairs of a run are split in two before anything is measured. Problems that
judge a tuned model have none of the half that heads were chosen on, problems that train it none
of the other half and no operand pair of a problem that judges, so no claim rests on a problem
that was seen, in any order of its operands.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from circuitune.pairs import PairSet
from circuitune.problems import Operator, Problem, sample_problems

# Problems that judge are drawn first, always as many, so that fewer of them are the same ones.
TEST_RESERVE = 600
# Problems that watch a training: drawn as training problems are, and never trained. Fewer where
# operands have one digit, since each takes its operand pair from training.
WATCHED = 100


@dataclass(frozen=True)
class Exercises:
    """Problems of one run, no operand pair shared between the three lists.

    Attributes:
        train: problems to train on, shuffled.
        watch: problems to answer during training, for early stopping and budgets.
        test: problems that judge the result.
    """

    train: list[Problem]
    watch: list[Problem]
    test: list[Problem]


def held_out_problems(
    pair_set: PairSet, operators: Sequence[str], *, digits: int, n: int, seed: int
) -> list[Problem]:
    """Problems that judge: their one-digit operand pairs lie in the held-out half of the run."""
    from_file = set(pair_set.selection["select_groups"])
    chosen = [Operator.parse(text) for text in operators]
    return sample_problems(chosen, digits=digits, n=n, seed=seed + 1, exclude=from_file)


def exercises(
    pair_set: PairSet, operators: Sequence[str], *, digits: int, n: int, seed: int, watch: bool
) -> Exercises:
    """Draw problems for training, watching and judging.

    Args:
        pair_set: the run's pairs, for the split of their operands.
        operators: ids or symbols of the operators.
        digits: most digits of an operand.
        n: number of training problems.
        seed: seed of all draws.
        watch: whether problems are kept out of training to watch it.

    Raises:
        UserError: there are not as many problems, see `circuitune.problems.sample_problems`.
    """
    chosen = [Operator.parse(text) for text in operators]
    test = held_out_problems(pair_set, operators, digits=digits, n=TEST_RESERVE, seed=seed)
    kept_out = set(pair_set.selection["held_out_groups"]) | {problem.group for problem in test}
    watched: list[Problem] = []
    if watch:
        few = min(WATCHED, 10**digits)
        watched = sample_problems(chosen, digits=digits, n=few, seed=seed + 3, exclude=kept_out)
        kept_out |= {problem.group for problem in watched}
    train = sample_problems(chosen, digits=digits, n=n, seed=seed + 2, exclude=kept_out)
    random.Random(seed).shuffle(train)
    return Exercises(train, watched, test)
