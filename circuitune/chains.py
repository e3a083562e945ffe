"""Exact effects of chains sender -> head -> key head -> answer, and of a head's whole input.

A chain is a path with one more head in it. A sender is patched at the places of one role; what
arrives at a *first* head's query, keys or values there changes that head's output at some further
places; what of this arrives at the query, keys or values of a second head changes its output at
END, and the effect is that of this output on the answer. All other heads hold their clean outputs
in every step; norms and MLPs between recompute, as in `circuitune.paths`, where a chain of one
head is measured for many senders and receivers at once.

The sender `Whole` stands for everything below a head: its query, keys or values at the places of
a role are those of the corrupt run. This *door* tells at the cost of one row what all senders
bring there together, so that doors with little behind them need not be opened.

Checked in ``tests/test_graph.py`` against ``tests/reference/slow_chains.py``.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuitune.components import (
    Component,
    Embedding,
    Head,
    Mlp,
    Receiver,
    Sender,
    all_components,
    check_components,
)
from circuitune.effects import measure
from circuitune.errors import UserError
from circuitune.memory import check_room
from circuitune.models import Model
from circuitune.patching import (
    EndStates,
    cell_states,
    direct_effects,
    finish,
    replay,
    run_layer,
    run_through,
    start_rows,
    unembed,
    wide,
)
from circuitune.ports import find_port, project, projections
from circuitune.roles import Contrasts
from circuitune.sites import Trace, attend
from circuitune.weights import widened

# Bounds of memory: tokens in one call of an attention, numbers in residual streams, prompts.
ATTENTION_TOKENS = 2**14
STATE_NUMBERS = 2**26
PROMPTS_PER_RUN = 64


@dataclass(frozen=True)
class Whole:
    """Everything below a head at once, printed ``all``."""

    layer: int = -1

    def __str__(self) -> str:
        return "all"


Places = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Chain:
    """Chains from some senders, through one receiver or two.

    Attributes:
        senders: where chains start; a sender that is not below the receiver has effect 0.
        places: where the senders are patched in each example (negative: from the end).
        receiver: where they go into the first head.
        at: the places of that head's output that count in each example; END if it is the only
            head.
        then: where that output goes into the second head, None to end in the answer.
    """

    senders: tuple[Sender | Whole, ...]
    places: Places
    receiver: Receiver
    at: Places = ()
    then: Receiver | None = None


@dataclass(frozen=True)
class Runs:
    """Clean and corrupt runs of prompts of one length, at every position.

    Attributes:
        places: which of the given prompts these are.
        clean, corrupt: what passed.
        final, corrupt_final: final hidden states of the two runs at END.
    """

    places: list[int]
    clean: Trace
    corrupt: Trace
    final: Float[Tensor, "example width"]
    corrupt_final: Float[Tensor, "example width"]

    @property
    def tokens(self) -> int:
        """Length of the prompts."""
        return self.clean.entry[0].shape[1]

    def states(self, trace: Trace, cells: "Cells") -> EndStates:
        """What passed some cells, each counted as an example."""
        return cell_states(trace, cells.row, cells.place, self.final[cells.row])

    def cells(self, places: Sequence[Sequence[int]]) -> "Cells":
        """The cells at the given places of each of all prompts, those of these prompts alone."""
        named = [
            (row, place % self.tokens)
            for row, prompt in enumerate(self.places)
            for place in sorted({place % self.tokens for place in places[prompt]})
        ]
        at = torch.tensor(named, dtype=torch.long, device=self.final.device).reshape(-1, 2)
        return Cells(*at.T)

    @property
    def ends(self) -> "Cells":
        """END of every prompt."""
        row = torch.arange(len(self.places), device=self.final.device)
        return Cells(row, torch.full_like(row, self.tokens - 1))


@dataclass(frozen=True)
class Cells:
    """Positions of prompts: which prompt of a block, and which place in it."""

    row: Int[Tensor, " cell"]
    place: Int[Tensor, " cell"]


@torch.no_grad()
def run_contrasts(
    model: Model,
    clean: Sequence[Sequence[int]],
    contrasts: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, list[Runs]]:
    """Run clean prompts, and their corrupt ones in each contrast, equal lengths together.

    Raises:
        UserError: a corrupt prompt has not as many tokens as its clean one, or the bound on memory
            has no room for the runs.
    """
    lengths = [len(tokens) for tokens in clean]
    if any(lengths != [len(tokens) for tokens in corrupt] for corrupt in contrasts.values()):
        raise UserError(
            "Chains need corrupt prompts with as many tokens as the clean ones, found others; "
            "leave these pairs out."
        )
    check_room(model, sum(lengths) * (1 + len(contrasts)))
    found: dict[str, list[Runs]] = {name: [] for name in contrasts}
    for length in sorted(set(lengths)):
        same = [place for place, other in enumerate(lengths) if other == length]
        for start in range(0, len(same), PROMPTS_PER_RUN):
            places = same[start : start + PROMPTS_PER_RUN]
            one, state = run_through(model, [clean[place] for place in places])
            final = finish(model, state[:, -1])
            for name, corrupt in contrasts.items():
                other, state = run_through(model, [corrupt[place] for place in places])
                corrupt_final = finish(model, state[:, -1])
                found[name].append(Runs(places, one, other, final, corrupt_final))
    return found


@torch.no_grad()
def chain_effects(
    model: Model,
    runs: Sequence[Runs],
    chains: Sequence[Chain],
    *,
    candidates: Sequence[int],
    answers: Int[np.ndarray, " example"],
) -> list[Float[np.ndarray, "sender example"]]:
    """Effect of every chain on the answer's ``logit_diff`` (see `circuitune.effects`), in logits.

    Negative: what the sender brings to the first head, and this to the second, supports the
    answer.

    Args:
        model: a model of a known family (see `circuitune.families`).
        runs: its runs of the prompts, see `run_contrasts`.
        chains: senders, receivers and places; the work below the receivers is shared.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each example's answer.

    Raises:
        UserError: a receiver is not of a head, the model has no such component, or keeps
            queries, keys and values in an unknown way.
    """
    for chain in chains:
        parts = [part for part in chain.senders if isinstance(part, Head | Mlp)]
        check_components(parts, model.layers, model.heads)
        into = [receiver.part for receiver in (chain.receiver, chain.then) if receiver]
        check_components(into, model.layers, model.heads)
        if not all(isinstance(part, Head) for part in into):
            raise UserError(f"Chains go through heads, found {chain.receiver}; leave it out.")
    effects = [np.zeros((len(chain.senders), len(answers))) for chain in chains]
    for part in tqdm(runs, desc="chains", disable=None, leave=False):
        own = answers[part.places]
        plain = measure(unembed(model, wide(part.final), candidates).cpu().numpy(), own)
        ends = _ends(model, part, chains)
        for number, logits in _answers(model, part, ends, candidates):
            patched = measure(logits, own)["logit_diff"]
            effects[number][:, part.places] = patched - plain["logit_diff"]
    return effects


@dataclass(frozen=True)
class _End:
    """What a chain makes of the output of its last head at END."""

    number: int
    head: Head
    z: Float[Tensor, "sender example d_head"]


def _ends(model: Model, runs: Runs, chains: Sequence[Chain]) -> list[_End]:
    """The output of the last head of every chain that changes something."""
    found = []
    for places in dict.fromkeys(chain.places for chain in chains):
        some = [(number, chain) for number, chain in enumerate(chains) if chain.places == places]
        senders = dict.fromkeys(part for _, chain in some for part in chain.senders)
        cells = runs.cells(places)
        if not len(cells.row):
            continue
        layers = {chain.receiver.layer for _, chain in some}
        for layer, arriving in _arrivals(model, runs, cells, list(senders), layers):
            for number, chain in some:
                if chain.receiver.layer == layer:
                    rows = [list(senders).index(part) for part in chain.senders]
                    found.append(_end(model, runs, number, chain, cells, arriving[rows]))
    return found


def _end(
    model: Model,
    runs: Runs,
    number: int,
    chain: Chain,
    cells: Cells,
    arriving: Float[Tensor, "sender cell d_model"],
) -> _End:
    """What a chain makes of what arrives at its first receiver."""
    head = chain.receiver.part
    z = _look(model, runs, chain.receiver, cells, arriving)
    if chain.then is not None:
        inner = runs.cells(chain.at)
        states = runs.states(runs.clean, inner)
        state = _leave(model, states, head, z[:, inner.row, inner.place])
        for layer in range(head.layer + 1, chain.then.layer):
            with widened(model.layer(layer)):
                replay(model, states, layer, state)
        head, z = chain.then.part, _look(model, runs, chain.then, inner, state)
    return _End(number, head, z[:, :, -1])


def _answers(
    model: Model, runs: Runs, ends: Sequence[_End], candidates: Sequence[int]
) -> Iterator[tuple[int, Float[np.ndarray, "sender example candidate"]]]:
    """Number of each chain, and candidate logits at END with all its last head's outputs in."""
    clean = runs.states(runs.clean, runs.ends)
    most = max(1, STATE_NUMBERS // clean.entry[0].numel())
    waiting = sorted(ends, key=lambda end: end.head.layer)
    while waiting:
        some, rows = [waiting.pop(0)], 0
        while waiting and rows + len(waiting[0].z) <= most:
            some.append(waiting.pop(0))
            rows += len(some[-1].z)
        state = clean.entry.new_empty(0, *clean.entry.shape[1:])
        for layer in range(some[0].head.layer, model.layers):
            here = [end for end in some if end.head.layer == layer]
            with widened(model.layer(layer)):
                replay(model, clean, layer, state)
                state = torch.cat([state, *(_leave(model, clean, e.head, e.z) for e in here)])
        logits = unembed(model, finish(model, state), candidates)
        sizes = [len(end.z) for end in some]
        for end, part in zip(some, logits.split(sizes), strict=True):
            yield end.number, part.cpu().numpy()


def _arrivals(
    model: Model,
    runs: Runs,
    cells: Cells,
    senders: Sequence[Sender | Whole],
    layers: Collection[int],
) -> Iterator[tuple[int, Float[Tensor, "sender cell d_model"]]]:
    """What enters some layers in some cells, with each of the senders below patched there."""
    clean, corrupt = (runs.states(trace, cells) for trace in (runs.clean, runs.corrupt))
    order = sorted(
        range(len(senders)),
        key=lambda row: (senders[row].layer, isinstance(senders[row], Mlp)),
    )
    whole = [row for row, part in enumerate(senders) if isinstance(part, Whole)]
    state = clean.entry.new_empty(len(senders), *clean.entry.shape[1:])
    active = sum(part.layer < 0 for part in senders)
    state[:active] = corrupt.entry[0]
    for layer in range(max(layers) + 1):
        if layer in layers:
            found = clean.entry[layer].repeat(len(senders), 1, 1)
            found[order[:active]] = state[:active]
            found[whole] = corrupt.entry[layer]
            yield layer, found
        here = [part for row in order if (part := senders[row]).layer == layer]
        with widened(model.layer(layer)):
            replay(model, clean, layer, state[:active])
            if here:
                rows = slice(active, active + len(here))
                state[rows] = start_rows(model, clean, corrupt, here)
        active += len(here)


def _look(
    model: Model,
    runs: Runs,
    receiver: Receiver,
    cells: Cells,
    arriving: Float[Tensor, "sender cell d_model"],
) -> Float[Tensor, "sender example token d_head"]:
    """A head's z at every place, with one of its projections made from what arrives in cells."""
    port = find_port(model, receiver, "head")
    layer, call = port.layer, runs.clean.calls[port.layer]
    entry = runs.clean.entry[layer]
    clean = {path: project(model, call, layer, path, entry) for path in projections(model).values()}
    found = []
    for chunk in arriving.split(max(1, ATTENTION_TOKENS // entry[..., 0].numel())):
        made = project(model, call, layer, port.path, chunk)[..., port.columns]
        given = {path: values.repeat(len(chunk), 1, 1, 1) for path, values in clean.items()}
        given[port.path][:, cells.row, cells.place, port.columns] = made
        flat = {path: values.flatten(0, 1) for path, values in given.items()}
        with widened(model.layer(layer)):
            z = attend(model, layer, entry.repeat(len(chunk), 1, 1), flat)[..., port.z]
        found.append(wide(z).unflatten(0, (len(chunk), -1)))
    return torch.cat(found)


def _leave(
    model: Model, clean: EndStates, head: Head, z: Float[Tensor, "sender cell d_head"]
) -> Float[Tensor, "sender cell d_model"]:
    """The residual stream after a head's layer, the head's output replaced in some cells."""
    layer = head.layer
    whole = clean.z[layer].repeat(len(z), 1, 1)
    whole[..., head.index * model.d_head : (head.index + 1) * model.d_head] = z
    with widened(model.layer(layer)):
        attention = wide(model.part(layer, model.family.out)(whole))
    return run_layer(model, clean, layer, clean.entry[layer].expand(len(z), -1, -1), attention)


# ------------------------------------------------------------- prompts and ways between roles


@dataclass(frozen=True)
class Way:
    """A way into the query, keys or values of a head, in one contrast.

    Attributes:
        receiver: where it goes in.
        role: the positions at which something arrives.
        contrast: what is changed in the corrupt prompt.
        at: the role at whose positions the receiving head writes; None for END of a key head.
        then: where its output goes in; None for the answer.
    """

    receiver: Receiver
    role: str
    contrast: str
    at: str | None = None
    then: Receiver | None = None


@dataclass(frozen=True)
class Study:
    """Prompts with their contrasts, run and ready to be patched.

    Attributes:
        model: the model.
        found: the prompts.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each prompt's answer.
        runs: the runs of each contrast.
    """

    model: Model
    found: Contrasts
    candidates: tuple[int, ...]
    answers: Int[np.ndarray, " example"]
    runs: Mapping[str, list[Runs]]

    @classmethod
    def make(
        cls,
        model: Model,
        found: Contrasts,
        candidates: Sequence[int],
        answers: Int[np.ndarray, " _"],
    ) -> "Study":
        """Run the prompts of every contrast; ``answers`` are those of all pairs."""
        corrupt = {name: [item.contrasts[name] for item in found.prompts] for name in found.names}
        runs = run_contrasts(model, [item.tokens for item in found.prompts], corrupt)
        own = answers[[prompt.place for prompt in found.prompts]]
        return cls(model, found, tuple(candidates), own, runs)

    @property
    def groups(self) -> list[str]:
        """The group of each prompt."""
        return [prompt.group for prompt in self.found.prompts]

    def places(self, way: Way) -> Places:
        """Where something new can arrive on a way and be seen, in each prompt.

        Nothing differs before the first token that was changed. A query is seen at its own place
        alone: at END, or where the head that it belongs to writes.
        """
        found = []
        for prompt, at in zip(self.found.prompts, self.at(way), strict=True):
            others = prompt.contrasts[way.contrast]
            same = [one == other for one, other in zip(prompt.tokens, others, strict=True)]
            seen = at if way.receiver.kind == "q" else range(len(same))
            first = same.index(False)
            found.append(tuple(p for p in prompt.roles[way.role] if p in seen and p >= first))
        return tuple(found)

    def at(self, way: Way) -> Places:
        """Where the receiving head writes in each prompt: END of a key head."""
        prompts = self.found.prompts
        if way.at is None:
            return tuple((len(prompt.tokens) - 1,) for prompt in prompts)
        return tuple(tuple(prompt.roles[way.at]) for prompt in prompts)

    def below(self, head: Head) -> tuple[Sender, ...]:
        """All senders below a head."""
        return (Embedding(), *all_components(head.layer, self.model.heads))

    def measure(
        self, asked: Mapping[Way, Sequence[Sender | Whole]]
    ) -> dict[Way, Float[np.ndarray, "sender example"]]:
        """Effects of some senders on each way, see `chain_effects`."""
        found = {way: np.zeros((len(asked[way]), len(self.answers))) for way in asked}
        for name in self.found.names:
            chains = {
                way: Chain(tuple(asked[way]), places, way.receiver, self.at(way), way.then)
                for way in asked
                if way.contrast == name and any(places := self.places(way))
            }
            given = {"candidates": self.candidates, "answers": self.answers}
            effects = chain_effects(self.model, self.runs[name], list(chains.values()), **given)
            found |= dict(zip(chains, effects, strict=True))
        return found

    def direct(self, parts: Sequence[Component]) -> dict[str, Float[np.ndarray, "sender example"]]:
        """Direct effects at END of some components in each contrast, in logits."""
        effects = {name: np.empty((len(parts), len(self.answers))) for name in self.runs}
        for name, blocks in self.runs.items():
            for block in tqdm(blocks, desc="direct effects", disable=None, leave=False):
                own = self.answers[block.places]
                given = {"candidates": self.candidates, "answers": own, "senders": list(parts)}
                clean = block.states(block.clean, block.ends)
                corrupt = block.states(block.corrupt, block.ends)
                table = direct_effects(self.model, clean, corrupt, **given)
                effects[name][:, block.places] = table.effect()
        return effects

    def totals(self) -> dict[str, float]:
        """What each whole contrast does to the answer: mean corrupt minus clean, in logits."""
        found = {}
        for name, blocks in self.runs.items():
            changes = []
            for block in blocks:
                before, after = (
                    measure(
                        unembed(self.model, wide(final), self.candidates).cpu().numpy(),
                        self.answers[block.places],
                    )["logit_diff"]
                    for final in (block.final, block.corrupt_final)
                )
                changes.append(after - before)
            found[name] = float(np.concatenate(changes).mean())
        return found
