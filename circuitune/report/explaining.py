"""What the heads look at and how the answer forms, in sentences and tables."""

from collections.abc import Mapping
from dataclasses import dataclass

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.findings import Explanation, HeadStory, Label
from circuitune.report.format import MISSING, Cell
from circuitune.report.tables import Row, Table, columns, row

_TOKENS, _NEURONS, _BEFORE_RISE = 5, 10, 3
_OF_HEADS = ("attention", "readout")
_EVERYWHERE = "all heads"
_TURNS = {"start": "starts to rise", "inflection": "rises most", "end": "has risen"}


@dataclass(frozen=True)
class Explained:
    """The tables of the folder `explain`; None, or empty, where one was not measured.

    Attributes:
        heads: The key heads in words: where they look, what they bring, what they write.
        heads_caption: What these words rest on.
        attention: Attention by role in numbers, the means of other heads below.
        readout: What the heads add to logits.
        forms: The answer at its start, inflection, end and after the last layer.
        forms_caption: What the lens numbers are.
        example: One prompt through the lens, the layers around the rise.
        example_rest: Its other layers.
        neurons: The strongest neurons.
        notes: Why something of the heads is not there, one sentence each.
        forms_notes: The same of the lens, the MLPs and their neurons.
    """

    heads: Table
    heads_caption: str
    attention: Table | None
    readout: Table | None
    forms: Table | None
    forms_caption: str
    example: Table | None
    example_rest: Table | None
    neurons: Table | None
    notes: tuple[str, ...]
    forms_notes: tuple[str, ...]


def explained(found: Explanation) -> Explained:
    """All tables of an explanation."""
    shown, rest = _example(found)
    return Explained(
        heads=_heads(found),
        heads_caption=_heads_caption(found),
        attention=_attention(found),
        readout=_readout(found),
        forms=_forms(found),
        forms_caption=_forms_caption(found),
        example=shown,
        example_rest=rest,
        neurons=_neurons(found),
        notes=_notes(found, of_heads=True),
        forms_notes=_notes(found, of_heads=False),
    )


def _notes(found: Explanation, *, of_heads: bool) -> tuple[str, ...]:
    own = {name: why for name, why in found.notes.items() if (name in _OF_HEADS) == of_heads}
    return tuple(f"{name.capitalize()}: {why}" for name, why in own.items())


def _key(found: Explanation) -> tuple[HeadStory, ...]:
    return tuple(head for head in found.heads if head.key)


def _heads(found: Explanation) -> Table:
    heads = _key(found)
    wanted = {
        "By attention": (any(h.looks for h in heads), lambda h: _label(h.looks)),
        "By effect": (any(h.does for h in heads), lambda h: _label(h.does)),
        "Brings": (any(h.brings is not None for h in heads), _brings),
        "Writes": (any(h.writes for h in heads), lambda h: _tokens(h.writes)),
        "More than corrupt": (any(h.writes_more for h in heads), lambda h: _tokens(h.writes_more)),
    }
    used = {label: make for label, (there, make) in wanted.items() if there}
    rows = tuple(row(head.id, *(make(head) for make in used.values())) for head in heads)
    typed = ["Head", "Writes", "More than corrupt"]
    heads_row = columns("Head", *used, left=["By attention", "By effect", "Brings"], code=typed)
    return Table("The key heads in words", heads_row, rows)


def _label(label: Label | None) -> Cell:
    if label is None:
        return Cell(MISSING)
    return Cell(label.name, str(fmt.accuracy(Estimate(label.confidence))))


def _brings(head: HeadStory) -> str:
    return MISSING if head.brings is None else ", ".join(head.brings) or "nothing that passes"


def _tokens(tokens: tuple[str, ...]) -> str:
    return "  ".join(fmt.token(text) for text in tokens[:_TOKENS]) or MISSING


def _heads_caption(found: Explanation) -> str:
    parts = []
    if any(head.looks for head in _key(found)):
        parts.append(
            "By attention: the kind of role with the most of it, the first token left out."
        )
    if any(head.does for head in _key(found)):
        parts.append(
            "By effect: the difference of whose whole effect on the answer the head's direct "
            "effect is the largest share. What a head reads at a token need not be that token."
        )
    if parts:
        parts.append("Beside a label, the share of bootstrap draws that give the same one.")
    if any(head.writes for head in _key(found)):
        parts.append(
            "Writes: tokens whose logits the head raises most, norms held; more than corrupt: the "
            "same of the difference to the corrupt prompt; \u2423 is a space."
        )
    return " ".join(parts)


def _attention(found: Explanation) -> Table | None:
    if not found.attention:
        return None
    roles = list(dict.fromkeys(look.role for look in found.attention))
    by_name: dict[str, dict[str, Cell]] = {}
    for look in found.attention:
        if look.kind != "graph":
            cell = fmt.accuracy(look.weight)
            by_name.setdefault(look.component, {})[look.role] = cell
    uniform = {look.role: fmt.accuracy(Estimate(look.uniform)) for look in found.attention}
    rows = [_by_column(_control(name), cells, roles) for name, cells in by_name.items()]
    rows.append(_by_column("equal to all tokens", uniform, roles))
    title = "Attention from END by what the tokens stand for"
    return Table(title, columns("Heads", *roles, left=["Heads"]), tuple(rows))


def _control(name: str) -> str:
    if name == _EVERYWHERE:
        return "mean of all heads"
    return f"other heads of {name}" if name.startswith("layer ") else name


def _by_column(name: str, cells: Mapping[str, Cell], labels: list[str]) -> Row:
    return row(name, *(cells.get(label, Cell(MISSING)) for label in labels))


def _readout(found: Explanation) -> Table | None:
    key = {head.id for head in _key(found)}
    own = [item for item in found.readout if item.component in key and item.run != "corrupt"]
    if not own:
        return None
    kinds = list(dict.fromkeys(item.token for item in own))
    by_name: dict[tuple[str, str], dict[str, Cell]] = {}
    for item in own:
        cell = fmt.plain(item.logits, digits=2)
        by_name.setdefault((item.component, item.run), {})[item.token] = cell
    words = {"clean": "clean", "difference": "clean \u2212 corrupt"}
    rows = [
        row(name, words.get(run, run), *(cells.get(kind, Cell(MISSING)) for kind in kinds))
        for (name, run), cells in by_name.items()
    ]
    note = (
        "Logits, norms held; other: mean over the other admissible answers. "
        "No effect: layers above react to what is written."
    )
    heads = columns("Head", "Prompt", *kinds, left=["Prompt"], code=["Head"])
    return Table("What the key heads add to logits", heads, tuple(rows), note)


# ------------------------------------------------------------------------ how the answer forms


def _forms(found: Explanation) -> Table | None:
    if not found.lens:
        return None
    chances = {(p.token, p.layer): p.probability for p in found.lens}
    ranks = {(p.token, p.layer): p.rank for p in found.lens}
    effects = {fact.layer: fact.value for fact in found.mlps if fact.measure == "effect"}
    kinds = [kind for kind in dict.fromkeys(p.token for p in found.lens) if kind != "answer"]
    last = max(p.layer for p in found.lens)
    turns = {f"{_TURNS[name]} after": layer for name, layer in found.rise.items()}
    rows = []
    for name, layer in {**turns, "is given after": Estimate(float(last))}.items():
        at = round(layer.value)
        answer = chances.get(("answer", at)), ranks.get(("answer", at))
        cells = [
            fmt.plain(layer, digits=0),
            fmt.percent(answer[0], digits=0) if answer[0] else Cell(MISSING),
            fmt.plain(answer[1], digits=1) if answer[1] else Cell(MISSING),
            *(_chance(chances.get((kind, at))) for kind in kinds[:2]),
            fmt.effect("logit_diff", effects[at]) if at in effects else Cell(MISSING),
        ]
        rows.append(row(name, *cells))
    labels = ("Layer", "Probability", "Rank", *kinds[:2], "Effect of its MLP")
    heads = columns("The answer", *labels, left=["The answer"])
    note = "Probability and rank of the answer, effect of the layer's MLP in logits."
    if kinds:
        note = f"{note[:-1]}; {' and '.join(kinds[:2])}: probability of it as an answer."
    return Table("The answer by the logit lens", heads, tuple(rows), note)


def _chance(chance: Estimate | None) -> Cell:
    return Cell(MISSING) if chance is None else fmt.percent(chance, digits=0)


def _forms_caption(found: Explanation) -> str:
    return (
        "Logit lens: the residual stream of END after each layer through the model's own final "
        "norm and unembedding; means and 95 % intervals over "
        f"{found.pairs} held-out pairs ({found.groups} groups). Start and end are the first layers "
        "with 10 % and 90 % of the rise of the answer's mean probability, the inflection is where "
        "it rises most."
    )


def _example(found: Explanation) -> tuple[Table | None, Table | None]:
    """The layers around the rise, and the others."""
    example = found.example
    if example is None or not example.layers:
        return None, None
    start = found.rise["start"].value if "start" in found.rise else 0.0
    shown = [layer for layer in example.layers if layer.layer >= start - _BEFORE_RISE]
    rest = [layer for layer in example.layers if layer.layer < start - _BEFORE_RISE]
    most = max(len(layer.top) for layer in example.layers)
    kinds = [kind for kind in example.tokens if kind in example.layers[0].ranks]
    labels = [f"{fmt.token(example.tokens[kind])} ({kind})" for kind in kinds[:3]]
    places = [str(place) for place in range(1, most + 1)]
    heads = columns("Layer", *places, *(f"rank of {label}" for label in labels), code=places)

    def table(title: str, layers: list) -> Table | None:
        rows = [
            row(
                str(layer.layer),
                *(Cell(fmt.token(t), str(fmt.accuracy(Estimate(p)))) for t, p in layer.top),
                *[MISSING] * (most - len(layer.top)),
                *(fmt.count(layer.ranks[kind]) for kind in kinds[:3]),
            )
            for layer in layers
        ]
        return Table(title, heads, tuple(rows)) if rows else None

    return table("The most probable tokens after each layer", shown), table("Below", rest)


def _neurons(found: Explanation) -> Table | None:
    if not found.neurons:
        return None
    best = sorted(found.neurons, key=lambda neuron: -abs(neuron.estimate))[:_NEURONS]
    promoted = any(neuron.tokens for neuron in best)
    rows = []
    for neuron in best:
        cells: list[str | Cell] = [
            f"{neuron.mlp} #{neuron.index}",
            fmt.effect("logit_diff", neuron.effect),
            fmt.percent(Estimate(neuron.share), digits=0),
            fmt.number(neuron.clean, 1),
            fmt.number(neuron.corrupt, 1),
        ]
        rows.append(row(*cells, *([_tokens(neuron.tokens)] if promoted else [])))
    labels = ["Effect, logits", "Of its MLP", "Clean", "Corrupt"]
    promotes = ["Promotes"] if promoted else []
    note = (
        "Chosen by a gradient estimate on the select half, in this order; the exact direct effect "
        "is that of the other half, so a chosen one may prove to be nothing. Clean, corrupt: mean "
        "activations."
    )
    if promoted:
        note += " Promotes: tokens of its output where it is more active on the clean prompts."
    heads = columns("Neuron", *labels, *promotes, code=["Neuron", "Promotes"])
    return Table("The strongest neurons", heads, tuple(rows), note)
