"""How sure the first sweep is, in sentences."""

from collections.abc import Mapping

from circuitune.report.records import Circuit

_NAMED = 8


def certainty(circuit: Circuit) -> tuple[str, ...]:
    """One sentence on significance and one on stability, where they were measured."""
    found = (_significance(circuit.significance), _stability(circuit.stability))
    return tuple(line for line in found if line)


def _significance(facts: Mapping[str, object]) -> str:
    match facts:
        case {
            "tested": int(tested),
            "significant": int(significant),
            "false_discovery": float(rate),
            "share_cut": float(cut),
            "total_effect": int() | float() as total,
            "key": list(key),
        }:
            named = ", ".join(f"{item['id']} ({item['share']:.0%})" for item in key[:_NAMED])
            more = f" and {len(key) - _NAMED} more" if len(key) > _NAMED else ""
            return (
                f"In one sweep {significant} of {tested} components differ from zero at a "
                f"false-discovery rate of {rate:.0%}; {len(key)} of them move the answer by at "
                f"least {cut:.0%} of what the whole corruption does ({total:+.1f} logits)"
                + (f": {named}{more}." if key else ".")
            )
    return ""


def _stability(facts: Mapping[str, object]) -> str:
    match facts:
        case {
            "k": int(k),
            "pairs": int(pairs),
            "bootstrap_jaccard": [float(mean), float(low), float(high)],
            "split_half_jaccard": [float(halves), *_],
        }:
            wanted = facts.get("pairs_for_jaccard_0.8")
            advice = (
                f"0.8 needs about {wanted} pairs"
                if isinstance(wanted, int)
                else "0.8 is out of reach of 64 times as many"
            )
            return (
                f"The strongest {k} heads of that sweep overlap with those of a resampled sweep by "
                f"a Jaccard index of {mean:.2f} [{low:.2f}, {high:.2f}] on {pairs} pairs, two "
                f"halves with each other by {halves:.2f}; {advice}."
            )
    return ""
