"""Reads recipes (YAML), overlays and command-line overrides into dataclasses."""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from trl import TrlParser

from open_r1.base.errors import REPO_ROOT, MissingFile, Mistake, naming_option, settings_of
from open_r1.base.fields import Record, check
from open_r1.base.files import parse_json, read_json, read_yaml
from open_r1.settings.limits import CHOICES, check_values

BASE = "base"  # in a recipe: the files that it changes, one or a list, as seen from its own folder
# Settings that may name a file or a folder -> the test that a value does, and not something on the Hub
# or of this project.
PATHS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("model_name_or_path", "teacher_model_name_or_path", "resume_from_checkpoint"), os.path.isdir),
    **dict.fromkeys(("dataset_name", "eval_dataset_name", "chat_template_path"), os.path.exists),
    **dict.fromkeys(("chat_template", "deepspeed", "accelerator_config", "fsdp_config"), os.path.isfile),
}
CONFIG = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
CONFIG.add_argument(
    "--config",
    action="append",
    default=argparse.SUPPRESS,
    metavar="RECIPE",
    help="A file of settings, as seen from here or from the repository's root. May be given several times: "
    "`--config configs/grpo_sat.yaml --config configs/overlays/lora.yaml`; where they differ, the "
    "later one counts.",
)
# Names of other projects' recipes, and of older ones of transformers -> the one of ours that spelling does not lead to.
ELSEWHERE = {
    **{"torch_dtype": "dtype", "no_cuda": "use_cpu", "model": "model_name_or_path", "dataset": "dataset_name"},
    **{"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"},
    **{"kl_coef": "beta", "lora_rank": "lora_r"},
}
TEXTS = ConfigDict(coerce_numbers_to_str=True)  # of YAML, which reads `run_name: 7` as a number
# Environment variable, set while one process checks a recipe before a launch: how many processes that will start.
PLANNED_PROCESSES = "OPEN_R1_PLANNED_PROCESSES"


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The recipes that `--config` names in a command line, and its other arguments."""
    try:
        named, others = CONFIG.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise Mistake(str(error).removeprefix("argument ")) from error
    return getattr(named, "config", []), others


def overridden(arguments: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that its command line gives beside its recipes.

    All of the spellings `--max_steps 2`, `--max-steps=2` and, for a flag that is on, `--no_bf16` count.
    """
    _, others = split_arguments(arguments)
    names = _named(others).keys()
    return {name: value for name, value in settings.items() if not names.isdisjoint((name, f"no_{name}"))}


def _named(arguments: Sequence[str]) -> dict[str, str]:
    """What a command line gives, as text: a setting's first value by its name, and values by themselves."""
    pairs = ((argument.partition("="), after) for argument, after in zip(arguments, [*arguments[1:], ""], strict=False))
    return {name.removeprefix("--").replace("-", "_"): value or after for (name, _, value), after in pairs}


def read_files(names: Sequence[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The files that recipes are made of, with their settings; of two, the later one counts.

    Args:
        names: of recipes and overlays, as seen from the current folder or from the repository's
        root.

    Returns:
        Each file's path and settings, in which files and folders have their absolute paths.

    Raises:
        Mistake: a file is not there, or does not hold settings.
    """
    files = []
    for name in names:
        path = find(name, os.path.isfile)
        if path is None:
            raise MissingFile(f"CONFIG, --config: no recipe {name}{_near_recipe(name)}")
        files += _with_bases(path)
    return files


def find(name: str, is_there: Callable[[str], bool], *folders: Path) -> Path | None:
    """The path of a name, looked up in these folders, the current one and the repository's root, or None."""
    places = (Path(folder, os.path.expanduser(name)) for folder in (*folders, Path(), REPO_ROOT)) if name else ()
    return next(filter(is_there, places), None)


def find_setting(setting: str, value: Any, *folders: Path) -> Any:
    """The value of a setting; of one in `PATHS` that leads to something, its absolute path."""
    if setting not in PATHS or not isinstance(value, str):
        return value
    path = find(value, PATHS[setting], *folders)
    return value if path is None else os.path.abspath(path)


def default_output(names: Sequence[str]) -> str | None:
    """The folder of a run whose recipes name none: the repository's `outputs/` and their names."""
    return str(REPO_ROOT / "outputs" / "_".join(Path(name).stem for name in names)) if names else None


def _near_recipe(name: str) -> str:
    """The recipe that a mistyped name may mean, as the end of an error's line."""
    if "," in name:
        return "; several stand between blanks in CONFIG, and each behind a --config of its own"
    known = {path.stem: path for path in sorted((REPO_ROOT / "configs").rglob("*.yaml"), reverse=True)}
    known |= {path.stem: path for path in Path(name).parent.glob("*.yaml")}
    close = difflib.get_close_matches(Path(name).stem.replace("-", "_"), known, n=1)
    if not close:
        return "; configs/README.md lists them"
    path = known[close[0]]
    return f"; did you mean {path.relative_to(REPO_ROOT) if path.is_relative_to(REPO_ROOT) else path}?"


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The files that a recipe names as its `base`, then the recipe; `above` are the recipes whose `base` led to it."""
    if path.resolve() in above:
        raise Mistake(f"{path}: {BASE}: leads back to this file")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise Mistake(f"{path}: a recipe must contain a YAML mapping")
    bases = settings.pop(BASE, [])
    files = []
    for name in bases if isinstance(bases, list) else [bases]:
        base = find(str(name), os.path.isfile, path.parent)
        if base is None:
            raise MissingFile(f"{path}: {BASE}: no file {path.parent / str(name)}")
        files += _with_bases(base, (*above, path.resolve()))
    return [*files, (path, {name: find_setting(str(name), value, path.parent) for name, value in settings.items()})]


def merge_recipes(names: Sequence[str]) -> dict[str, Any]:
    """The settings of recipes and overlays as one recipe; raises what `read_files` raises."""
    return _merged(read_files(names))


def _merged(files: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """The settings of files as `read_files` gives them; of two, the later one counts."""
    return {name: value for _, settings in files for name, value in settings.items()}


def count_processes() -> int:
    """The processes of this run, planned or running."""
    return int(os.environ.get(PLANNED_PROCESSES) or os.environ.get("WORLD_SIZE") or 1)


def check_mapping(name: str, text: str) -> None:
    """Raise Mistake for a setting of names and values whose text is no JSON; those in `PATHS` may name its file."""
    if text.startswith("{"):
        parse_json(text.encode(errors="surrogatepass"), name)
    elif name not in PATHS:
        raise Mistake(f"{name}: expected JSON, as in '{{\"a\": 1}}', not {text!r}")
    elif os.path.isfile(text):
        with naming_option(name):
            check(Record, read_json(Path(text)), text)
    elif name != "deepspeed":  # of which transformers takes base64, too, and names a missing file itself
        raise MissingFile(f"{name}: no file {text}")


def set_variable(name: Any, value: Any) -> None:
    """Set an environment variable, or raise Mistake for what the system takes for none."""
    try:
        os.environ[name] = str(value)
    except (TypeError, ValueError, OSError) as error:  # a number, a "=" or NUL in it, no name at all
        raise Mistake(f"env: {name!r}: cannot be set ({error})") from error


class RecipeParser(TrlParser):
    """TRL's parser, which takes its defaults from recipes, but reads them as strictly as arguments.

    It raises `Mistake` where argparse prints a usage of 200 lines, and takes no abbreviations.
    """

    def __init__(self, dataclass_types: Sequence[type]):
        super().__init__(dataclass_types, allow_abbrev=False, parents=[CONFIG])
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)  # argparse's: not -1e-5
        self.hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
        kinds = {name: {get_origin(kind) or kind for kind in get_args(hint)} for name, hint in self.hints.items()}
        self.mappings = [name for name in kinds if dict in kinds[name]]

    def error(self, message: str) -> None:
        """What argparse has to say about an argument."""
        raise Mistake(message.removeprefix("argument "))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's; refuses what it does not know, and values that mean nothing."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise Mistake(self._unknown("argument", unknown[0]))
        for name in PATHS:
            if hasattr(namespace, name):
                setattr(namespace, name, find_setting(name, getattr(namespace, name)))
        for name in self.mappings:
            if isinstance(value := getattr(namespace, name), str):
                check_mapping(name, value)
        check_values(vars(namespace))
        return namespace, unknown

    def read(self, path: Path, settings: dict[str, Any]) -> None:
        """Take the settings of a file for defaults; those of a later file replace them.

        Raises:
            Mistake: for an unknown name or a value that its setting does not take; it names the
            file.
        """
        actions = {action.dest: action for action in reversed(self._actions)}  # --x, and not the --no_x after it
        environment = settings.pop("env", {})  # TRL's word for variables to set
        try:
            if not isinstance(environment, dict):
                raise Mistake(f"env: expected names and values, not {environment!r}")
            for name, value in settings.items():
                if name not in self.hints or name not in actions:
                    raise Mistake(self._unknown("setting", str(name)))
                if actions[name].nargs == "+" and isinstance(value, str):
                    if len(parts := value.split()) > 1:
                        raise Mistake(f"{name}: expected a list, [{', '.join(parts)}], not {value!r}")
                    settings[name] = [value]
                settings[name] = self._read(actions[name], settings[name])
            for name, value in environment.items():
                set_variable(name, value)
        except Mistake as error:
            raise Mistake(f"{path}: {error}") from error
        self.set_defaults_with_config(**settings)

    def _unknown(self, kind: str, name: str) -> str:
        known = [action.dest for action in self._actions]
        bare = name.partition("=")[0].lstrip("-").replace("-", "_")
        close = [ours for ours in (ELSEWHERE.get(bare),) if ours in known] or difflib.get_close_matches(bare, known, 1)
        return f"unknown {kind} {name!r}" + (f"; did you mean {close[0]}?" if close else "; --help lists them")

    def _read(self, action: argparse.Action, value: Any) -> Any:
        """What a recipe says of a setting, checked; a number becomes a text where only that is taken."""
        name, hint, is_list = action.dest, self.hints[action.dest], action.nargs == "+"
        if value is None and type(None) not in get_args(hint):
            raise Mistake(f"{name}: needs a value")
        if value is None or value in (action.const, *CHOICES.get(name, ())):  # fsdp, scale_rewards: texts, or true
            return value
        if action.type is str:
            try:
                read = TypeAdapter(hint, config=TEXTS).validate_python(value)
            except ValidationError as error:
                kind = "a list of texts" if is_list else "names and values" if name in self.mappings else "a text"
                raise Mistake(f"{name}: expected {kind}, not {value} ({type(value).__name__})") from error
            for key in read if isinstance(read, dict) else ():
                if not isinstance(key, str):
                    raise Mistake(f"{name}: {key!r} is no name")
            return read
        if isinstance(value, list) != is_list:
            raise Mistake(f"{name}: expected {'a list' if is_list else 'one value'}, not {value!r}")
        for item in value if is_list else [value]:
            try:
                read = action.type(str(item))
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                raise Mistake(f"{name}: invalid {action.type.__name__} value: {item!r}") from error
            if action.choices and read not in action.choices:
                raise Mistake(f"{name}: {item!r} is none of {', '.join(map(str, action.choices))}")
        return value


def _implied(recipe: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """Defaults that follow from what a user gives.

    Args:
        recipe: the settings of the recipes.
        named: what the command line gives.
    """
    given, implied = {**recipe, **named}, {}
    if given.get("eval_dataset_name"):  # asked when a checkpoint is saved, not after every step that is logged
        asked = {"eval_strategy": "steps", "eval_steps": given.get("save_steps", TrainingArguments.save_steps)}
        implied = {name: value for name, value in asked.items() if name not in given}
    if "num_train_epochs" in named and "max_steps" not in named:
        implied["max_steps"] = -1  # a recipe's would win
    if "lr_scheduler_type" in named and "lr_scheduler_kwargs" not in named:
        implied["lr_scheduler_kwargs"] = None  # a recipe's are those of its own schedule
    return implied


def read_recipe(dataclass_types: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Fill dataclasses from the recipes that `--config` names and the arguments that override them.

    Args:
        dataclass_types: what the settings belong to.
        arguments: of the command line.

    Returns:
        One instance of each type.

    Raises:
        Mistake: for a recipe that cannot be read, an unknown name, or a value that its setting does
        not take.
    """
    parser = RecipeParser(dataclass_types)
    names, others = split_arguments(arguments)
    parser.set_defaults(output_dir=default_output(names))
    files = read_files(names)
    recipe = _merged(files)
    for path, settings in files:
        parser.read(path, settings)
    parser.set_defaults_with_config(**_implied(recipe, _named(others)))
    try:
        with settings_of("trl", "transformers", "accelerate"):
            return parser.parse_args_into_dataclasses(others)
    except TypeError as error:  # of a dictionary among the settings, whose keys the dataclasses pass on
        raise Mistake(f"{' '.join(names) or 'arguments'}: {error}") from error
