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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuitune.components import (
    Embedding,
    Kind,
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
    PROMPTS_PER_BATCH,
    EndStates,
    finish,
    replay,
    run_layer,
    start_rows,
    unembed,
    wide,
)
from circuitune.sites import Trace, attend, record

Sharing = Literal["head", "group"]
# Bounds of memory: numbers in the residual streams of step 1, and tokens in a batch of step 2.
STATE_NUMBERS = 2**27
ATTENTION_TOKENS = 2**14


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
            position, it keeps its projections in another way, or nothing is asked.
    """
    if not (paths.receivers and clean):
        raise UserError(
            f"Paths need at least one receiver and one pair, found {len(paths.receivers)} and "
            f"{len(clean)}; name the q, k or v of a head."
        )
    ports = {receiver: _port(model, receiver, paths.kv) for receiver in paths.receivers}
    senders = _senders(model, paths)
    order = sorted(senders, key=lambda part: (part.layer, isinstance(part, Mlp)))
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
        for number, logits in _receive(model, block, list(ports.values()), order, candidates, base):
            for metric, values in measure(logits, answers[places]).items():
                patched[metric][number][..., places] = values
    rows = [order.index(sender) for sender in senders]
    patched = {metric: values[:, :, rows] for metric, values in patched.items()}
    return PathTable(tuple(ports), tuple(roles), senders, plain, patched)


# ------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class _Port:
    """Where a receiver lies.

    Attributes:
        layer: its layer.
        path: from the layer to its projection.
        columns: its part of the projection's output.
        z: the part of the layer's z that is read and patched.
        at_end: whether it is read at END alone.
    """

    layer: int
    path: str
    columns: slice
    z: slice
    at_end: bool


def projections(model: Model) -> dict[Kind, str]:
    """Paths from a layer to the modules that make queries, keys and values.

    Raises:
        UserError: they are not three modules fed by one norm that feeds nothing else.
    """
    family = model.family
    query = family.query or ""
    stem = query.removesuffix("q_proj")
    names: dict[Kind, str] = {"q": query, "k": f"{stem}k_proj", "v": f"{stem}v_proj"}
    apart = query.endswith("q_proj") and not family.fused and family.norm_before_attention
    try:
        for name in names.values() if apart else ():
            model.part(0, name)
    except AttributeError:
        apart = False
    if not apart:
        raise UserError(
            "Paths into heads need separate projections q_proj, k_proj and v_proj behind a norm "
            f"that feeds only them, a {family.name} model ({model.source}) has not; measure "
            "direct effects, or choose a family such as llama, mistral, qwen2, qwen3 or gemma3."
        )
    return names


def _port(model: Model, receiver: Receiver, kv: Sharing) -> _Port:
    """Find a receiver in the model.

    Raises:
        UserError: there is no such head, or the kind or ``kv`` is not one of the known.
    """
    names, head = projections(model), receiver.head
    check_components([head], model.layers, model.heads)
    if receiver.kind not in names or kv not in get_args(Sharing):
        raise UserError(
            f"A receiver is q, k or v of a head and kv is head or group, found {receiver.kind!r} "
            f"of {head} and kv={kv!r}; correct the name."
        )
    shared = 1 if receiver.kind == "q" else model.heads // model.kv_heads
    place = head.index // shared
    path = names[receiver.kind]
    width = model.part(head.layer, path).weight.shape[0] // (model.heads // shared)
    readers, at = (shared, place) if kv == "group" else (1, head.index)
    return _Port(
        layer=head.layer,
        path=path,
        columns=slice(place * width, (place + 1) * width),
        z=slice(at * readers * model.d_head, (at + 1) * readers * model.d_head),
        at_end=receiver.kind == "q",
    )


def _senders(model: Model, paths: Paths) -> tuple[Sender, ...]:
    """The senders asked for; by default all that lie below the highest receiver."""
    if paths.senders is None:
        top = max(receiver.head.layer for receiver in paths.receivers)
        return (Embedding(), *all_components(top, model.heads))
    parts = [part for part in paths.senders if not isinstance(part, Embedding)]
    check_components(parts, model.layers, model.heads)
    return tuple(paths.senders)


def _places(
    clean: Sequence[Sequence[int]], corrupt: Sequence[Sequence[int]], paths: Paths
) -> dict[str, list[list[int]]]:
    """Per role and example, the places where a patch can change something that is read.

    Places before the first token that differs are left out, since nothing differs there; and if
    only queries are read, all but END.

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
    only_end = all(receiver.kind == "q" for receiver in paths.receivers)
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
    clean, final = _run(model, [one for one, _ in pairs])
    corrupt, other_final = _run(model, [other for _, other in pairs])
    return _Block(
        row=row,
        place=place,
        roles=[
            torch.tensor([number[cell] for cell in group], dtype=torch.long, device=model.device)
            for group in members
        ],
        clean=_states(clean, final, row, place),
        corrupt=_states(corrupt, other_final, row, place),
        end=_states(clean, final, every, torch.full_like(every, final.shape[1] - 1)),
        entry={layer: clean.entry[layer] for layer in layers},
    )


def _run(
    model: Model, prompts: Sequence[Sequence[int]]
) -> tuple[Trace, Float[Tensor, "example token width"]]:
    """What passes every position of prompts of equal length, and the final hidden states."""
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    with record(model, where="all") as trace:
        output = model.trunk(input_ids=tokens, use_cache=False)
    return trace, output.last_hidden_state


def _states(
    trace: Trace,
    final: Float[Tensor, "example token width"],
    row: Int[Tensor, " cell"],
    place: Int[Tensor, " cell"],
) -> EndStates:
    """What passes the given cells."""
    z, attention, mlp, entry = (
        wide(torch.stack([values[row, place] for values in part]))
        for part in (trace.z, trace.attention, trace.mlp, trace.entry)
    )
    return EndStates(z, attention, mlp, entry, wide(final[row, place]), trace.calls)


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
        replay(model, block.clean, layer, state[:active])
        here = [part for part in senders if part.layer == layer]
        if here:
            rows = slice(active, active + len(here))
            state[rows] = start_rows(model, block.clean, block.corrupt, here)
            active += len(here)


# --------------------------------------------------- steps 2 and 3: receiver to the answer


def _receive(
    model: Model,
    block: _Block,
    ports: Sequence[_Port],
    senders: Sequence[Sender],
    candidates: Sequence[int],
    base: Float[np.ndarray, "example candidate"],
) -> Iterator[tuple[int, Float[np.ndarray, "role sender example candidate"]]]:
    """Number of each receiver, and candidate logits at END of its paths; ``base`` if unchanged."""
    shape = (len(block.roles), len(senders), *base.shape)
    if not len(block.row):
        yield from ((number, np.broadcast_to(base, shape)) for number in range(len(ports)))
        return
    for layer, arriving in _arrivals(model, block, senders):
        for number, port in enumerate(ports):
            if port.layer != layer:
                continue
            logits = np.broadcast_to(base, shape).copy()
            for role, rows, examples, found in _answers(model, block, port, arriving, candidates):
                logits[role, rows, examples] = found
            yield number, logits


def _answers(
    model: Model,
    block: _Block,
    port: _Port,
    arriving: Float[Tensor, "sender cell d_model"],
    candidates: Sequence[int],
) -> Iterator[tuple[int, Int[np.ndarray, "sender 1"], Int[np.ndarray, " _"], np.ndarray]]:
    """Candidate logits for each role, in chunks of senders: role, senders, examples, logits."""
    entry = block.entry[port.layer]
    examples, tokens = entry.shape[:2]
    norm = model.part(port.layer, model.family.norm_before_attention)
    clean = {
        path: model.part(port.layer, path)(norm(entry)) for path in projections(model).values()
    }
    size = max(1, ATTENTION_TOKENS // (examples * tokens))
    for start in range(0, len(arriving), size):
        chunk = arriving[start : start + size]
        rows = np.arange(start, start + len(chunk))[:, None]
        made = model.part(port.layer, port.path)(norm(chunk.to(entry.dtype)))[..., port.columns]
        for role, cells in enumerate(block.roles):
            if port.at_end:
                cells = cells[block.place[cells] == tokens - 1]
            if not len(cells):
                continue
            given = {path: values.repeat(len(chunk), 1, 1, 1) for path, values in clean.items()}
            given[port.path][:, block.row[cells], block.place[cells], port.columns] = made[:, cells]
            flat = {path: values.flatten(0, 1) for path, values in given.items()}
            z = attend(model, port.layer, entry.repeat(len(chunk), 1, 1), flat)[:, -1]
            logits = _answer(model, block.end, port, z.unflatten(0, (-1, examples)), candidates)
            changed = block.row[cells].unique()
            yield role, rows, changed.cpu().numpy(), logits[:, changed].cpu().numpy()


def _answer(
    model: Model,
    end: EndStates,
    port: _Port,
    z: Float[Tensor, "sender example z"],
    candidates: Sequence[int],
) -> Float[Tensor, "sender example candidate"]:
    """Candidate logits at END with the receiver's z in place and every other head held."""
    patched = end.z[port.layer].repeat(len(z), 1, 1)
    patched[..., port.z] = wide(z[..., port.z])
    out = model.part(port.layer, model.family.out)
    attention = wide(out(patched.to(out.weight.dtype)))
    entry = end.entry[port.layer].expand(len(z), -1, -1)
    state = run_layer(model, end, port.layer, entry, attention)
    for layer in range(port.layer + 1, model.layers):
        replay(model, end, layer, state)
    return unembed(model, finish(model, state), candidates)
