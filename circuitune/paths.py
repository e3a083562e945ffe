"""Exact effects of paths sender -> receiver -> answer: who feeds the key heads.

A receiver is the query, key or value of one head, or the input of an MLP. The path effect of a
sender through it, at a set of positions:

1. Run clean with the sender's output at these positions replaced by its corrupt value. All other
   heads hold their clean outputs at every position; norms and MLPs recompute. Read what arrives
   at the receiver: the query or the input of the MLP at END, the keys or values at the patched
   positions.
2. Run clean with that query (keys, values) in place; the head's own attention (norms of queries
   and keys, positions, softmax) gives its new z at END. An MLP gives its new output at END.
3. The effect is the *direct effect* of that z (output) on the answer: all other heads hold their
   clean outputs, later MLPs and norms recompute, as in `circuitune.patching`. The MLPs between
   sender and receiver are back at their clean outputs.

Wang et al. (2023) end otherwise: with the receiver's input in place they let all later heads
recompute too, so that what the receiver tells them counts with it. Here a path ends in the
answer, and the effect is the part of the receiver's own direct effect that this sender brings.

A query (key, value) is what the projection makes, and in OLMo-2 the norm over all heads behind
it, by which the heads would change each other's queries.

With the heads held, a change at one position stays there until the receiver's layer. So step 1
is the replay of the direct effects with *cells*, (example, position), in place of examples. Steps
2 and 3 need the attention of one layer with given projections (or one MLP), and the replay of
END.

Checked in ``tests/test_paths.py`` and ``tests/test_path_families.py`` against
``tests/reference/slow_paths.py``: plain hooks and whole forward passes, one path at a time.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuitune.components import (
    Embedding,
    Head,
    Mlp,
    Receiver,
    Sender,
    all_components,
    check_components,
)
from circuitune.effects import METRICS, Metric, PathTable, measure
from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.patching import (
    EndStates,
    cell_states,
    finish,
    replay,
    run_layer,
    run_through,
    start_rows,
    unembed,
    wide,
)
from circuitune.ports import (
    Port,
    Sharing,
    attention_feeds_mlp,
    find_port,
    project,
    projections,
    through_mlp,
)
from circuitune.prompts import PROMPTS_PER_BATCH
from circuitune.sites import attend
from circuitune.weights import widened

# Bounds of memory: numbers in the residual streams of step 1, and tokens in a batch of step 2.
STATE_NUMBERS = 2**27
ATTENTION_TOKENS = 2**14


@dataclass(frozen=True)
class Paths:
    """Which paths to measure.

    Attributes:
        receivers: where paths go in.
        senders: where paths start; by default the embeddings and all components below the
            highest receiver: in lower layers, and for an MLP the heads of its own. A sender that
            is not below a receiver has effect 0 on it, so has a head on the MLP of its own layer
            if the two run in parallel.
        roles: named sets of positions, for each example a list of token places (negative ones
            count from the end, so -1 is END; it may be empty). A sender is patched at all places
            of a role at once. By default one role ``all``, every position. A query and the
            input of an MLP are read at END, so a role without END has effect 0 on them.
        kv: which query heads of a key-value head see a changed key or value: ``head``, the
            receiver alone, as if it had a key-value head of its own; or ``group``, all that
            share it, and their z are patched together. The same if no heads are shared.
    """

    receivers: Sequence[Receiver]
    senders: Sequence[Sender] | None = None
    roles: Mapping[str, Sequence[Sequence[int]]] | None = None
    kv: Sharing = "head"


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
        model: a model of a known family (see `circuitune.families`).
        clean: token ids of the prompts that are patched.
        corrupt: token ids of their counterparts, each as long as its clean prompt.
        paths: senders, receivers and positions.
        candidates: token ids of the admissible answers.
        answers: index into ``candidates`` of each example's answer.

    Raises:
        UserError: the prompts of a pair differ in length, the model has no such component or
            position, it keeps queries, keys and values in an unknown way, or nothing is asked.
    """
    if not (paths.receivers and clean):
        raise UserError(
            f"Paths need at least one receiver and one pair, found {len(paths.receivers)} and "
            f"{len(clean)}; name the q, k or v of a head or the in of an MLP."
        )
    ports = {receiver: find_port(model, receiver, paths.kv) for receiver in paths.receivers}
    senders = _senders(model, paths)
    order = sorted(range(len(senders)), key=lambda row: _level(senders[row]))
    roles = _places(clean, corrupt, paths)
    answers = np.asarray(answers)
    shape = (len(ports), len(roles), len(senders), len(clean))
    plain: dict[Metric, np.ndarray] = {metric: np.empty(len(clean)) for metric in METRICS}
    patched: dict[Metric, np.ndarray] = {metric: np.empty(shape) for metric in METRICS}
    blocks = _blocks([len(tokens) for tokens in clean], width=len(senders) * model.d_model)
    for places in tqdm(blocks, desc="paths", disable=None, leave=False):
        pairs = [(clean[place], corrupt[place]) for place in places]
        inside = [[by_example[place] for place in places] for by_example in roles.values()]
        block = _run_block(model, pairs, inside, {port.layer for port in ports.values()})
        base = unembed(model, block.end.final, candidates).cpu().numpy()
        for metric, values in measure(base, answers[places]).items():
            plain[metric][places] = values
            patched[metric][..., places] = values
        lower = [senders[row] for row in order]
        for found in _receive(model, block, list(ports.values()), lower, candidates):
            rows = [order[row] for row in found.senders]
            at = np.ix_([found.receiver], [found.role], rows, [places[row] for row in found.rows])
            for metric, values in measure(found.logits, answers[at[-1].ravel()]).items():
                patched[metric][at] = values
    return PathTable(tuple(ports), tuple(roles), senders, plain, patched)


# ------------------------------------------------------------------------- what is asked


def _level(part: Sender) -> tuple[int, bool]:
    """What feeds what: a part can feed those of higher levels."""
    return (part.layer, isinstance(part, Mlp))


def _senders(model: Model, paths: Paths) -> tuple[Sender, ...]:
    """The senders asked for; by default all that lie below the highest receiver."""
    if paths.senders is None:
        top = max(_level(receiver.part) for receiver in paths.receivers)
        parts = all_components(top[0] + 1, model.heads)
        return (Embedding(), *(part for part in parts if _level(part) < top))
    parts = [part for part in paths.senders if not isinstance(part, Embedding)]
    check_components(parts, model.layers, model.heads)
    return tuple(paths.senders)


def _places(
    clean: Sequence[Sequence[int]], corrupt: Sequence[Sequence[int]], paths: Paths
) -> dict[str, list[list[int]]]:
    """Per role and example, the places where a patch can change something that is read.

    Places before the first token that differs are left out, since nothing differs there; and if
    no keys or values are read, all but END.

    Raises:
        UserError: prompts or positions do not fit each other.
    """
    if len(clean) != len(corrupt):
        raise UserError(
            f"Every clean prompt needs its corrupt one, found {len(clean)} and {len(corrupt)}; "
            "give the two lists of the same pairs."
        )
    for number, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
        if len(one) != len(other):
            raise UserError(
                "Clean and corrupt prompts must have as many tokens for paths between positions, "
                f"pair {number} has {len(one)} and {len(other)}; replace the operator by a word "
                "of as many tokens, or leave the pair out."
            )
    roles = paths.roles or {"all": [range(len(tokens)) for tokens in clean]}
    only_end = all(receiver.kind in ("q", "in") for receiver in paths.receivers)
    found: dict[str, list[list[int]]] = {}
    for role, by_example in roles.items():
        if len(by_example) != len(clean):
            raise UserError(
                f"Every role needs one list of positions for each of the {len(clean)} prompts, "
                f"{role} has {len(by_example)}; give an empty list where it does not occur."
            )
        found[role] = []
        for number, (places, one, other) in enumerate(zip(by_example, clean, corrupt, strict=True)):
            size = len(one)
            if any(not -size <= place < size for place in places):
                raise UserError(
                    f"Positions must lie within the prompt, role {role} names {list(places)} in "
                    f"prompt {number} of {size} tokens; count from 0, or from the end with -1."
                )
            changed = next((i for i in range(size) if one[i] != other[i]), size)
            first = size - 1 if only_end else 0
            named = sorted({place % size for place in places})
            found[role].append([place for place in named if place >= max(first, changed)])
    return found


def _blocks(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Places of prompts that run together: of equal length, and as many as memory allows."""
    blocks: list[list[int]] = []
    for length in sorted(set(lengths)):
        places = [place for place, other in enumerate(lengths) if other == length]
        size = min(PROMPTS_PER_BATCH, max(1, STATE_NUMBERS // (width * length)))
        blocks += [places[start : start + size] for start in range(0, len(places), size)]
    return blocks


# ------------------------------------------------------------- step 1: sender to receiver


@dataclass(frozen=True)
class _Block:
    """Prompts of equal length that run together.

    Attributes:
        row, place: which prompt of the block a cell lies in, and where.
        roles: numbers of the cells of each role.
        clean, corrupt: what passes the cells, each counted as an example.
        end: what passes END of the clean prompts.
        entry: the clean residual stream at all positions that enters the receivers' layers.
    """

    row: Int[Tensor, " cell"]
    place: Int[Tensor, " cell"]
    roles: list[Int[Tensor, " _"]]
    clean: EndStates
    corrupt: EndStates
    end: EndStates
    entry: dict[int, Float[Tensor, "example token d_model"]]


def _run_block(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    roles: Sequence[Sequence[Sequence[int]]],
    layers: Collection[int],
) -> _Block:
    """Run clean and corrupt prompts and keep what the cells and END need."""
    members = [[(row, place) for row, at in enumerate(by) for place in at] for by in roles]
    cells = sorted({cell for group in members for cell in group})
    number = {cell: index for index, cell in enumerate(cells)}
    row, place = torch.tensor(cells, dtype=torch.long, device=model.device).reshape(-1, 2).T
    every = torch.arange(len(pairs), device=model.device)
    clean, state = run_through(model, [one for one, _ in pairs])
    corrupt, other_state = run_through(model, [other for _, other in pairs])
    final, other_final = finish(model, state), finish(model, other_state)
    last = torch.full_like(every, final.shape[1] - 1)
    return _Block(
        row=row,
        place=place,
        roles=[
            torch.tensor([number[cell] for cell in group], dtype=torch.long, device=model.device)
            for group in members
        ],
        clean=cell_states(clean, row, place, final[row, place]),
        corrupt=cell_states(corrupt, row, place, other_final[row, place]),
        end=cell_states(clean, every, last, final[every, last]),
        entry={layer: clean.entry[layer] for layer in layers},
    )


def _arrivals(
    model: Model, block: _Block, senders: Sequence[Sender]
) -> Iterator[tuple[int, Float[Tensor, "sender cell d_model"]]]:
    """For each receiving layer, what enters it in every cell, with each lower sender patched.

    Rows are the senders below that layer, in the order given: by layer, an MLP after the heads.
    """
    state = block.clean.entry.new_empty(len(senders), *block.clean.entry.shape[1:])
    active = sum(isinstance(part, Embedding) for part in senders)
    state[:active] = block.corrupt.entry[0]
    for layer in range(max(block.entry) + 1):
        if layer in block.entry:
            yield layer, state[:active]
        here = [part for part in senders if part.layer == layer]
        with widened(model.layer(layer)):
            replay(model, block.clean, layer, state[:active])
            if here:
                rows = slice(active, active + len(here))
                state[rows] = start_rows(model, block.clean, block.corrupt, here)
        active += len(here)


# --------------------------------------------------- steps 2 and 3: receiver to the answer


@dataclass(frozen=True)
class _Found:
    """Candidate logits of some paths.

    Attributes:
        receiver, role: their numbers.
        senders, rows: numbers of the senders, and of the prompts in the block.
        logits: at END, with each path patched.
    """

    receiver: int
    role: int
    senders: range
    rows: list[int]
    logits: Float[np.ndarray, "sender example candidate"]


def _receive(
    model: Model,
    block: _Block,
    ports: Sequence[Port],
    senders: Sequence[Sender],
    candidates: Sequence[int],
) -> Iterator[_Found]:
    """All paths by which something arrives; the others leave the answer as it is."""
    if not len(block.row):
        return
    tokens = next(iter(block.entry.values())).shape[1]
    for layer, arriving in _arrivals(model, block, senders):
        heads = [part for part in senders if isinstance(part, Head) and part.layer == layer]
        clean: dict[str, Tensor] = {}
        if any(port.layer == layer and port.z is not None for port in ports):
            call, entry = block.clean.calls[layer], block.entry[layer]
            used = set(projections(model).values())  # one path if the projection is fused
            clean = {path: project(model, call, layer, path, entry) for path in used}
        for (number, port), (role, inside) in product(enumerate(ports), enumerate(block.roles)):
            cells = inside[block.place[inside] == tokens - 1] if port.at_end else inside
            if port.layer != layer or not len(cells):
                continue
            if port.z is None:
                states = _by_mlp(model, block, layer, heads, arriving[:, cells], cells)
            else:
                states = _by_head(model, block, port, clean, arriving[:, cells], cells)
            rows, start = block.row[cells].unique(), 0
            for state in states:
                for above in range(layer + 1, model.layers):
                    with widened(model.layer(above)):
                        replay(model, block.end, above, state)
                logits = unembed(model, finish(model, state[:, rows]), candidates)
                some = range(start, start + len(state))
                yield _Found(number, role, some, rows.tolist(), logits.cpu().numpy())
                start = some.stop


def _chunks(block: _Block, count: int) -> Iterator[slice]:
    """Senders that go through a layer's attention together."""
    examples, tokens = next(iter(block.entry.values())).shape[:2]
    size = max(1, ATTENTION_TOKENS // (examples * tokens))
    return (slice(start, start + size) for start in range(0, count, size))


def _by_head(
    model: Model,
    block: _Block,
    port: Port,
    clean: Mapping[str, Float[Tensor, "example token _"]],
    arriving: Float[Tensor, "sender cell d_model"],
    cells: Int[Tensor, " cell"],
) -> Iterator[Float[Tensor, "sender example d_model"]]:
    """The residual stream at END after the layer, with what reaches a head's q, k or v in place.

    ``clean`` is what the projections make at all positions of the clean prompts.
    """
    layer, end, entry = port.layer, block.end, block.entry[port.layer]
    call = block.clean.calls[layer]
    for some in _chunks(block, len(arriving)):
        made = project(model, call, layer, port.path, arriving[some])[..., port.columns]
        count = len(made)
        given = {path: values.repeat(count, 1, 1, 1) for path, values in clean.items()}
        given[port.path][:, block.row[cells], block.place[cells], port.columns] = made
        flat = {path: values.flatten(0, 1) for path, values in given.items()}
        with widened(model.layer(layer)):
            new = attend(model, layer, entry.repeat(count, 1, 1), flat)[:, -1]
        z = end.z[layer].repeat(count, 1, 1)
        z[..., port.z] = wide(new.unflatten(0, (count, -1))[..., port.z])
        rows = end.entry[layer].expand(count, -1, -1)
        yield run_layer(model, end, layer, rows, _attention(model, layer, z))


def _by_mlp(
    model: Model,
    block: _Block,
    layer: int,
    heads: Sequence[Head],
    arriving: Float[Tensor, "sender cell d_model"],
    cells: Int[Tensor, " cell"],
) -> Iterator[Float[Tensor, "sender example d_model"]]:
    """The residual stream at END after the layer, with what reaches its MLP in place.

    The senders of ``arriving`` come first, then the heads of the layer, if they feed its MLP.
    """
    clean, end, rows = block.clean, block.end, block.row[cells]
    held = clean.attention[layer][None, cells]

    def answered(made: Float[Tensor, "sender cell d_model"]) -> Tensor:
        mlp = end.mlp[layer].repeat(len(made), 1, 1)
        mlp[:, rows] = made
        entry = end.entry[layer].expand(len(made), -1, -1)
        return run_layer(model, end, layer, entry, end.attention[layer][None], mlp)

    for some in _chunks(block, len(arriving)):
        yield answered(through_mlp(model, clean, layer, arriving[some], held))
    if not heads or not attention_feeds_mlp(model, end, layer):
        return
    for some in _chunks(block, len(heads)):
        z = clean.z[layer][cells].repeat(len(heads[some]), 1, 1)
        for row, head in enumerate(heads[some]):
            part = slice(head.index * model.d_head, (head.index + 1) * model.d_head)
            z[row, :, part] = block.corrupt.z[layer][cells, part]
        entry = clean.entry[layer][cells].expand(len(z), -1, -1)
        yield answered(through_mlp(model, clean, layer, entry, _attention(model, layer, z)))


def _attention(
    model: Model, layer: int, z: Float[Tensor, "sender example z"]
) -> Float[Tensor, "sender example d_model"]:
    """What the attention block writes, given the head outputs z."""
    with widened(model.layer(layer)):
        return wide(model.part(layer, model.family.out)(z))
