"""Options of stages: flags of the command line over a YAML recipe over the defaults.

Flags are read off the config dataclasses, so that a new option is one line there.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from circuitune import config as configs
from circuitune.errors import UserError
from circuitune.runs import FILES

# Stage name -> (function, options). The function gets (model, config, run, work).
IMPLEMENTATION: dict[str, tuple[str, type]] = {
    "pairs": ("circuitune.pairs:collect", configs.PairsConfig),
    "locate": ("circuitune.locate:locate", configs.LocateConfig),
    "validate": ("circuitune.validate:validate", configs.ValidateConfig),
    "explain": ("circuitune.explain:explain", configs.ExplainConfig),
    "transfer": ("circuitune.transfer:transfer", configs.TransferConfig),
    "tune": ("circuitune.tune:tune", configs.TuneConfig),
    "evaluate": ("circuitune.evaluate:evaluate", configs.EvaluateConfig),
    "benchmark": ("circuitune.evaluate:benchmark", configs.EvaluateConfig),
}


def stage_options(values: dict[str, Any], *names: str) -> list[Any]:
    """Configs of the named stages from given flags over a YAML file over defaults."""
    file = values.pop("config", None)
    recipe = read_recipe(file) if file else {}
    given = {key: value for key, value in values.items() if value is not None}
    built = []
    for name in names:
        config_class = IMPLEMENTATION[name][1]
        known = {item.name for item in fields(config_class)}
        section = recipe.get(name) or {}
        chosen = {key: value for key, value in given.items() if key in known}
        built.append(configs.overrides(config_class, section | chosen))
        _look_ahead(built[-1])
    return built


def _look_ahead(options: Any) -> None:
    """Refuse what a stage would refuse later, before a model is loaded and other stages run.

    Raises:
        UserError: a file is absent, or a task or an operator unknown.
    """
    for name in (*FILES, "data_dir"):
        value = getattr(options, name, None)
        if value and not value.startswith("hub") and not os.path.exists(value):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be there, {value} is not; check the path.")
    if getattr(options, "suite", None):
        importlib.import_module("circuitune.suites").named_tasks(options.suite)
    for name in ("operators", "tune_operators"):
        for text in getattr(options, name, ()):
            importlib.import_module("circuitune.problems").Operator.parse(text)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe: one section per stage.

    Raises:
        UserError: the file is absent, not YAML, or has an unknown or malformed section.
    """
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"--config must be a readable YAML file, {path} is not ({error}); correct the file."
        ) from error
    if not isinstance(recipe, dict):
        raise UserError(
            f"--config must hold sections with options, {path} holds {recipe!r}; put the options "
            f"under {', '.join(IMPLEMENTATION)}."
        )
    for name, section in recipe.items():
        if name not in IMPLEMENTATION:
            raise UserError(
                f"--config must have the sections {', '.join(IMPLEMENTATION)}, found {name!r}; "
                "correct the file."
            )
        if not isinstance(section, dict | None):
            raise UserError(
                f"A section of --config must hold options, {name} holds {section!r}; write "
                "`option: value` below it."
            )
    return recipe


def with_options(*stages: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of stages to a command, as flags named after the config fields.

    The command receives them in its keyword ``values``; a flag that is not given is None, so
    that a YAML recipe can speak.
    """
    flags: dict[str, Any] = {}
    for name in stages:
        for item in fields(IMPLEMENTATION[name][1]):
            flags.setdefault(item.name, item)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.name != "values"]

        def command(**arguments: Any) -> None:
            values = {key: arguments.pop(key) for key in flags}
            for key, item in flags.items():
                if isinstance(item.default, tuple) and values[key] is not None:
                    values[key] = _split(values[key], get_args(item.type)[0])
            function(**arguments, values=values)

        extra = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_flag_type(item.default) | None, _flag(item)],
            )
            for key, item in flags.items()
        ]
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = own.replace(parameters=[*kept, *extra])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*kept, *extra]}
        return command

    return decorate


def _split(text: str, kind: type) -> tuple[Any, ...]:
    """Parts of a comma-separated flag; what is not of the kind stays text and is refused later."""
    parts = tuple(part.strip() for part in text.split(","))
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        return parts


def _flag_type(default: Any) -> type:
    return str if default is None or isinstance(default, tuple) else type(default)


def _flag(item: Any) -> Any:
    default = item.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    text = item.metadata["help"] + ("" if default is None else f" (default: {shown})")
    name = "--" + item.name.replace("_", "-")
    if isinstance(default, bool):
        name += "/--no-" + item.name.replace("_", "-")
    return typer.Option(name, help=text, show_default=False)
