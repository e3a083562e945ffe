"""circuitune: find, explain, prove and tune the heads with which a language model calculates.

The names below are loaded on first use, so that importing the package stays instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "models",
    "wrap": "models",
    "prefill": "prompts",
    "prefill_pairs": "prompts",
    "end_states": "patching",
    "pair_states": "patching",
    "noise_floor": "patching",
    "direct_effects": "patching",
    "attribute": "attribution",
    "race": "racing",
    "trace": "graph",
    "path_effects": "paths",
    "Paths": "paths",
    "EffectTable": "effects",
    "Head": "components",
    "Mlp": "components",
    "Receiver": "components",
    "UserError": "errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
