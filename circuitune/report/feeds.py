"""Who feeds the key heads, in sentences and tables."""

from collections.abc import Sequence

from circuitune.report import format as fmt
from circuitune.report.estimate import Estimate
from circuitune.report.records import EMBEDDING, Circuit, FeedNode, Feeds
from circuitune.report.tables import Phrase, Row, Sentence, Table, columns, row, sentence

_NAMED, _ROWS = 4, 18
_INPUTS = {"q": "query", "k": "key", "v": "value"}


def told(circuit: Circuit) -> tuple[Sentence, ...]:
    """For each contrast, which heads bring it to the answer, and where they read it.

    Where it could not be traced, the reason; nothing where it was not asked for.
    """
    if circuit.untold:
        return (sentence(f"Who feeds the key heads could not be traced: {circuit.untold}"),)
    feeds = circuit.feeds
    if feeds is None:
        return ()
    return tuple(_brought(feeds, contrast) for contrast in feeds.contrasts)


def _brought(feeds: Feeds, contrast: str) -> Sentence:
    heads = [node for node in feeds.nodes if contrast in node.brings and _is_head(node.id)]
    heads.sort(key=lambda node: node.effects[contrast].mean.value)
    total = fmt.effect_in_words("logit_diff", Estimate(feeds.totals[contrast]))
    name = Phrase(contrast[:1].upper() + contrast[1:], "top")
    if not heads:
        return sentence(name, f" ({total} in all) comes with no single head that passes.")
    pieces: list[str | Phrase] = [name, f" ({total} in all) comes with "]
    for place, node in enumerate(heads[:_NAMED]):
        pieces += [", " if place else "", Phrase(node.id, "top")]
        pieces.append(f" {fmt.effect('logit_diff', node.effects[contrast].mean)}")
        pieces.append(_read_where(feeds, node.id, contrast))
    more = len(heads) - _NAMED
    rest = f" and {more} weaker head{'s' if more > 1 else ''}." if more > 0 else "."
    return sentence(*pieces, rest)


def _read_where(feeds: Feeds, head: str, contrast: str) -> str:
    """How a head reads what it brings, if found: ` (its value at operand 2, fed by 13.4)`."""
    into = [e for e in feeds.edges if (e.head, e.contrast, e.then) == (head, contrast, None)]
    into = [edge for edge in into if edge.effect.mean.value < 0]
    if not into:
        return ""
    strongest = min(into, key=lambda edge: edge.effect.mean.value)
    fed = dict.fromkeys(e.sender for e in into if _is_head(e.sender) and e.sender != EMBEDDING)
    by = f", fed by {' and '.join(list(fed)[:2])}" if fed else ""
    if any(edge.sender == EMBEDDING for edge in into):
        by = ", straight from the tokens"
    return f" (its {_INPUTS[strongest.kind]} at {strongest.role}{by})"


def _is_head(name: str) -> bool:
    return not name.startswith("mlp.")


def nodes_table(feeds: Feeds, ranks: Sequence[str]) -> Table:
    """Components with what they bring and their direct effects, key heads first.

    Args:
        feeds: the graph.
        ranks: the circuit, most important first.
    """
    shown = [node for node in feeds.nodes if node.key or node.brings or node.passes_on]
    shown.sort(key=lambda node: _place(node, ranks))
    rows: list[Row] = []
    for node in shown[:_ROWS]:
        effects = [node.effects.get(name) for name in feeds.contrasts]
        cells = [fmt.effect("logit_diff", e.mean) if e else fmt.Cell(fmt.MISSING) for e in effects]
        brings = ", ".join(node.brings) or fmt.MISSING
        rows.append(row(node.id, brings, _feeds_what(feeds, node), *cells, strong=node.key))
    labels = ("Component", "Brings", "Passes on")
    heads = columns(*labels, *feeds.contrasts, left=["Brings", "Passes on"], code=["Component"])
    note = f"Columns: direct effect on the answer, logits, by what differs. Brings: {feeds.rule}."
    if len(shown) > _ROWS:
        note += f" The first {_ROWS} of {len(shown)}."
    return Table("What they bring to the answer, key heads first", heads, tuple(rows), note)


def _place(node: FeedNode, ranks: Sequence[str]) -> tuple[int, float]:
    """Key heads in their order, then heads, then MLPs, the largest effect first."""
    if node.key and node.id in ranks:
        return (0, float(ranks.index(node.id)))
    largest = max((abs(effect.mean.value) for effect in node.effects.values()), default=0.0)
    return (1 if _is_head(node.id) else 2, -largest)


def _feeds_what(feeds: Feeds, node: FeedNode) -> str:
    """What it passes on and to whom: `operator to 14.2.v, 14.2.k`."""
    told = []
    for contrast in node.passes_on:
        own = [e for e in feeds.edges if (e.sender, e.contrast) == (node.id, contrast)]
        into = list(dict.fromkeys(edge.receiver for edge in own))
        more = " \u2026" if len(into) > 2 else ""
        told.append(f"{contrast} to {', '.join(into[:2])}{more}")
    return "; ".join(told) or fmt.MISSING


def edges_table(feeds: Feeds) -> Table | None:
    """Every edge, strongest first; None without any."""
    if not feeds.edges:
        return None
    rows = []
    for edge in sorted(feeds.edges, key=lambda edge: -abs(edge.effect.mean.value)):
        into = edge.receiver if edge.then is None else f"{edge.receiver} \u2192 {edge.then}"
        rows.append(
            row(
                "tokens" if edge.sender == EMBEDDING else edge.sender,
                edge.role,
                into,
                edge.contrast,
                fmt.effect("logit_diff", edge.effect.mean),
                fmt.percent(Estimate(edge.effect.share), digits=0),
                fmt.p_value(edge.effect.p_adjusted),
            )
        )
    words = ["Sender", "At", "Into", "Contrast"]
    heads = columns(
        *words, "Effect, logits", "Share", "p", left=["At", "Contrast"], code=["Sender", "Into"]
    )
    note = (
        "Share: of the effect of what is fed; what passes several senders counts for each. "
        "p: after Benjamini and Hochberg."
    )
    return Table("Edges", heads, tuple(rows), note)


def caption(feeds: Feeds) -> str:
    """What the numbers are, in one sentence, and how many prompts they rest on."""
    dropped = sum(feeds.dropped.values())
    left = f"; {dropped} could not be changed in one token alone" if dropped else ""
    return (
        "An edge is the exact change of the answer's logit difference when the sender, at this "
        "position, is as in a prompt where only the named token differs, and only this receiver "
        f"sees it: mean and 95 % interval over {feeds.prompts} of {feeds.given} prompts "
        f"({feeds.groups} groups{left})."
    )
