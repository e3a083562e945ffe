"""One task on a model: its pairs tokenised, its states at END, and what is measured on them.

All values that leave this module are those of all pairs, also where several processes share them
(`circuitune.ranks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from circuitune.components import Component, all_components
from circuitune.effects import EffectTable, measure
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.pairs import Encoded, Pair, encode
from circuitune.patching import (
    EndStates,
    direct_effects,
    end_states,
    first_choice,
    pair_states,
    unembed,
)
from circuitune.prompts import Prompts, prefill_pairs
from circuitune.ranks import WHOLE, Share

# Next-token distributions of intact models are kept between knockouts up to this size.
KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Task:
    """The pairs of one task and split, tokenised, with the states at END that patching needs.

    Attributes:
        pairs: all pairs, the same on every process.
        share: which of them this process runs.
        prompts: clean prompts of this process's pairs.
        clean, corrupt: states of their clean and corrupt runs.
        average: ``corrupt`` with every example replaced by the mean over all pairs.
    """

    pairs: Encoded
    share: Share
    prompts: Prompts
    clean: EndStates
    corrupt: EndStates
    average: EndStates
    _intact: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def tokens(self) -> np.ndarray:
        """Token id of each pair's answer."""
        return np.array(self.pairs.candidates)[self.pairs.answers]

    @property
    def answers(self) -> np.ndarray:
        """Place of the answer among the candidates, of this process's pairs."""
        return self.share.of(self.pairs.answers)

    def intact(self, model: Model, places: Tensor) -> Float[Tensor, "row vocab"]:
        """Next-token log probabilities of the clean run at END, of some of the pairs."""
        width = model.hf.get_output_embeddings().weight.shape[0]
        if 4 * width * len(self.clean.final) > KEPT_BYTES:
            return unembed(model, self.clean.final[places]).log_softmax(-1)
        if not self._intact:
            self._intact.append(unembed(model, self.clean.final).log_softmax(-1))
        return self._intact[0][places]

    def states(self, model: Model, ablated: Sequence[Component] = ()) -> EndStates:
        """States of the clean run, with components mean-ablated at END."""
        if not ablated:
            return self.clean
        return end_states(model, self.prompts, edits=self.ablation(ablated, model.d_head))

    def ablation(self, parts: Sequence[Component], d_head: int) -> dict[Component, Tensor]:
        """Mean corrupt output of components, the edits of a mean ablation."""
        return {part: self.average.output(part, d_head)[0] for part in parts}


def prepare(
    model: Model, pairs: Sequence[Pair], answers: Sequence[str] = (), *, share: Share = WHOLE
) -> Task:
    """Tokenise pairs, prefill the clean prompts and run the corrupt ones.

    Args:
        model: the model.
        pairs: all pairs, also where this process runs only its share of them.
        answers: further admissible answers, see `circuitune.pairs.encode`.
        share: which pairs this process runs; the other processes must prepare theirs.

    Raises:
        UserError: an answer is not one token, or a process would have no pair.
    """
    encoded = encode(model.tokenizer, pairs, answers)
    if len(pairs) < share.world:
        raise UserError(
            f"Each process needs at least one pair, {share.world} processes share {len(pairs)}; "
            "start fewer processes or give more pairs."
        )
    both = prefill_pairs(model, share.of(encoded.clean), share.of(encoded.corrupt))
    clean, corrupt = pair_states(model, both)
    prompts = both.first(both.count // 2)
    return Task(encoded, share, prompts, clean, corrupt, averaged(corrupt, share))


def averaged(states: EndStates, share: Share) -> EndStates:
    """Every example replaced by the mean over the examples of all processes (for z and mlp)."""
    means = {
        name: share.mean(values, dim=1).expand_as(values)
        for name, values in (("z", states.z), ("mlp", states.mlp))
    }
    return replace(states, **means)


def survivors(
    model: Model, task: Task, ablated: Sequence[Component] = ()
) -> Bool[np.ndarray, " example"]:
    """Per pair, whether the answer is still the first choice with components mean-ablated at END.

    The mean is taken over the corrupt prompts of the same pairs, as in Zhang et al. (2024).
    """
    top = first_choice(model, task.states(model, ablated).final)
    return task.share.gather(top) == task.tokens


def sweep(
    model: Model,
    task: Task,
    *,
    ablated: Sequence[Component] = (),
    senders: Sequence[Component] | None = None,
    corrupt: EndStates | None = None,
) -> EffectTable:
    """Direct effects on a task, in the intact model or with components already ablated.

    Args:
        model: the model.
        task: the task.
        ablated: components that are mean-ablated at END throughout.
        senders: what to measure; all heads and MLPs by default.
        corrupt: what the senders get: their own corrupt outputs per example by default, or
            ``task.average``, which is what a mean ablation would give them.
    """
    senders = all_components(model.layers, model.heads) if senders is None else senders
    table = direct_effects(
        model,
        task.states(model, ablated),
        task.corrupt if corrupt is None else corrupt,
        candidates=task.pairs.candidates,
        answers=task.answers,
        senders=[part for part in senders if part not in ablated],
    )
    return gathered(table, task.share)


def gathered(table: EffectTable, share: Share) -> EffectTable:
    """The table of all examples, from those of each process's share."""
    clean, patched = (
        {metric: share.gather(values) for metric, values in side.items()}
        for side in (table.clean, table.patched)
    )
    return EffectTable(table.components, clean, patched)


def total_effect(model: Model, task: Task) -> float:
    """Mean change of the logit difference from the clean to the corrupt run, in logits."""
    finals = (task.clean.final, task.corrupt.final)
    before, after = (
        task.share.gather(
            measure(unembed(model, final, task.pairs.candidates).cpu().numpy(), task.answers)[
                "logit_diff"
            ]
        ).mean()
        for final in finals
    )
    return float(after - before)
