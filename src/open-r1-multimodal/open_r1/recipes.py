"""Read a recipe and its overrides into dataclasses. What is wrong with either is one line that names it."""

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import yaml
from trl import TrlParser

# Set while a launch checks a recipe in one process: how many it is going to start.
PLANNED_PROCESSES = "OPEN_R1_PLANNED_PROCESSES"


def count_processes() -> int:
    """The processes of this run, planned or running."""
    return int(os.environ.get(PLANNED_PROCESSES) or os.environ.get("WORLD_SIZE") or 1)


class RecipeParser(TrlParser):
    """TRL's parser that raises `ValueError` where argparse prints a usage of 200 lines, and takes no abbreviations."""

    def __init__(self, dataclass_types: Sequence[type]):
        super().__init__(dataclass_types, allow_abbrev=False)
        self.recipe = ""  # its file
        self.hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}

    def error(self, message: str) -> None:
        """What argparse has to say about an argument."""
        raise ValueError(message.removeprefix("argument "))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's; what it does not know is refused here, before anything is made of what it knows."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise ValueError(self._unknown("argument", unknown[0]))
        return namespace, unknown

    def set_defaults_with_config(self, **recipe: Any) -> list[str]:
        """TRL's, which believes every value; here each is read as it would be on the command line."""
        try:
            recipe = self._read(recipe)
        except ValueError as error:
            raise ValueError(f"{self.recipe}: {error}") from error
        return super().set_defaults_with_config(**recipe)

    def _read(self, recipe: dict[str, Any]) -> dict[str, Any]:
        actions = {action.dest: action for action in reversed(self._actions)}  # --x, and not the --no_x after it
        for name, value in recipe.items():
            if name not in actions:
                raise ValueError(self._unknown("setting", name))
            if actions[name].nargs == "+" and isinstance(value, str):
                recipe[name] = [value]
            self._check(actions[name], recipe[name])
        return recipe

    def _unknown(self, kind: str, name: str) -> str:
        known = [action.dest for action in self._actions]
        close = difflib.get_close_matches(name.partition("=")[0].lstrip("-").replace("-", "_"), known, n=1)
        return f"unknown {kind} {name!r}" + (f"; did you mean {close[0]}?" if close else "; --help lists them")

    def _check(self, action: argparse.Action, value: Any) -> None:
        if value is None:
            if type(None) not in get_args(self.hints[action.dest]):
                raise ValueError(f"{action.dest}: needs a value")
            return
        if action.type in (str, dict):  # what may also be something else, and is read by its dataclass
            return
        if isinstance(value, list) != (action.nargs == "+"):
            raise ValueError(
                f"{action.dest}: expected {'a list' if action.nargs == '+' else 'one value'}, not {value!r}"
            )
        for item in value if isinstance(value, list) else [value]:
            try:
                read = action.type(str(item))
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"{action.dest}: invalid {action.type.__name__} value: {item!r}") from error
            if action.choices and read not in action.choices:
                raise ValueError(f"{action.dest}: {item!r} is none of {', '.join(map(str, action.choices))}")


def read_recipe(dataclass_types: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Fill dataclasses from `--config RECIPE.yaml` and the arguments that override it.

    Args:
        dataclass_types: what the recipe's settings belong to.
        arguments: of the command line.

    Returns:
        One instance of each type.

    Raises:
        ValueError: for an unknown name, or a value that its setting or the dataclasses do not take.
        OSError: when the recipe cannot be read.
    """
    parser = RecipeParser(dataclass_types)
    if "--config" in arguments[:-1]:
        parser.recipe = arguments[arguments.index("--config") + 1]
    try:
        return parser.parse_args_and_config(arguments)
    except yaml.YAMLError as error:
        raise ValueError(f"{parser.recipe}: not YAML: {error}") from error
    except TypeError as error:  # of a dictionary among the settings, whose keys the dataclasses pass on
        raise ValueError(f"{parser.recipe or 'arguments'}: {error}") from error
