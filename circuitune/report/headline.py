"""The result in words: a few sentences whose every number is computed from the run."""

from collections.abc import Sequence

from circuitune.report import format as fmt
from circuitune.report.measures import Knockouts, Point, telling_size
from circuitune.report.records import Evaluation, Run
from circuitune.report.tables import Phrase, Sentence, sentence


def headline(run: Run, curves: Knockouts | None) -> tuple[Sentence, ...]:
    """One sentence per finished stage, the strongest claim first."""
    found = (_knocked_out(run, curves) if curves else None, _tuned(run))
    sentences = tuple(part for part in found if part is not None)
    return sentences if len(sentences) == 2 else (*sentences, _located(run))


def primary_task(records: Sequence[Evaluation], own: str) -> str | None:
    """The task that stands for calculation as a whole: `arithmetic`, or else the circuit's own."""
    measured = [record.task for record in records if record.metric == "exact_match"]
    preferred = (task for task in ("arithmetic", own, *measured) if task in measured)
    return next(preferred, None)


def _located(run: Run) -> Sentence:
    circuit, model = run.circuit, run.manifest.model
    task = fmt.task_name(circuit.task)
    if not circuit.components:
        heads = fmt.count(model.layers * model.heads)
        return sentence(f"No component was chosen for {task}: none of {heads} heads passes.")
    if not circuit.size:
        return sentence(
            f"No circuit was found for {task}: no number of the {len(circuit.components)} "
            "components that were ranked takes away what the model answers."
        )
    ids = [part.id for part in circuit.components[: circuit.size]]
    first = circuit.components[0]
    size = Phrase(f"{len(ids)} of {_total(run, ids)}", "top")
    effect = Phrase(fmt.effect_in_words(circuit.metric, first.effect), "top")
    verb = "carries" if len(ids) == 1 else "carry"
    return sentence(
        size,
        f" {verb} {task}; giving {first.id} its corrupt output moves the answer by ",
        effect,
        ".",
    )


def _knocked_out(run: Run, curves: Knockouts) -> Sentence | None:
    task = run.circuit.task
    if not run.circuit.size:
        return None
    top = curves.curve("top", task)
    k = run.circuit.size if top and top.at(run.circuit.size) else top and telling_size(top)
    point = top.at(k) if top and k is not None else None
    if top is None or point is None:
        return None
    ids = [part.id for part in run.circuit.components[:k]]
    intact = top.at(0)
    before = f" from {fmt.accuracy(intact.accuracy)}" if intact else ""
    return sentence(
        f"Removing {k} of {_total(run, ids)} takes {fmt.task_name(task)}{before} to ",
        Phrase(str(fmt.accuracy(point.accuracy)), "top"),
        *_controls(curves, task, point, noun=_noun(ids)),
        ".",
    )


def _controls(curves: Knockouts, task: str, top: Point, *, noun: str) -> tuple[str | Phrase, ...]:
    names = {"matched": f"layer-matched random {noun}", "random": f"random {noun}"}
    for kind, name in names.items():
        curve = curves.curve(kind, task)
        point = curve.at(top.k) if curve else None
        if point:
            left = Phrase(str(fmt.accuracy(point.accuracy)), "control")
            return f"; {name} leave ", left
    return ()


def _tuned(run: Run) -> Sentence | None:
    variants = {v.name: v for v in run.tuning.variants} if run.tuning else {}
    precise = variants.get("precise")
    if precise is None or run.evaluations is None:
        return None
    task = primary_task(run.evaluations, run.circuit.task)
    found = {(r.variant, r.metric, r.task): r.estimate for r in run.evaluations}
    before = found.get(("base", "exact_match", task or ""))
    after = found.get(("precise", "exact_match", task or ""))
    if task is None or before is None or after is None:
        return None
    share = fmt.percent(fmt.Estimate(precise.share))
    pieces: list[str | Phrase] = [
        f"Tuning {_counted(precise.components)} ({share} of the parameters) takes exact match on "
        f"{fmt.task_name(task)} from {fmt.accuracy(before)} to ",
        Phrase(str(fmt.accuracy(after)), "top"),
    ]
    control = found.get(("random", "exact_match", task))
    if control:
        reached = Phrase(str(fmt.accuracy(control)), "control")
        pieces += [f"; as many random {_noun(precise.components)} reach ", reached]
    changes = (r for r in run.evaluations if r.metric == "perplexity_change")
    change = next((r.estimate for r in changes if r.variant == "precise"), None)
    if change:
        pieces.append(f"; perplexity changes by {fmt.percent(change, signed=True)}")
    return sentence(*pieces, ".")


def _noun(ids: Sequence[str]) -> str:
    return "components" if any(name.startswith("mlp.") for name in ids) else "heads"


def _counted(ids: Sequence[str]) -> str:
    noun = _noun(ids)
    return f"{len(ids)} {noun.removesuffix('s') if len(ids) == 1 else noun}"


def _total(run: Run, ids: Sequence[str]) -> str:
    """The population that `ids` were chosen from: all heads, and the MLPs if one is among them."""
    heads = run.manifest.model.layers * run.manifest.model.heads
    noun = _noun(ids)
    return f"{fmt.count(heads if noun == 'heads' else heads + run.manifest.model.layers)} {noun}"
