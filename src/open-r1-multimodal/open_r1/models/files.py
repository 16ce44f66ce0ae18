"""Checks a model's folder before anything is loaded: its files are whole, and none of a kind that runs code.

Weights come from safetensors files alone, because opening a pickle runs whatever code is in it.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from open_r1.base.errors import FileMistake, Mistake, first_line
from open_r1.base.files import read_json

MODEL, ADAPTER = "model", "adapter_model"  # names of weight files, without their ends


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file; Mistake where it is missing or holds something else than an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise Mistake(f"{path}: expected an object, not {type(content).__name__}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's config.json; Mistake where there is none."""
    if (folder / "config.json").is_file():
        return read_object(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise FileMistake(f"{folder} holds an adapter; make a model of it with scripts/export.py")
    raise no_model(folder)


def no_model(folder: Path) -> FileMistake:
    """What is wrong with a folder without a model; it names the newest one inside it, such as a run's checkpoint."""
    inside = max(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime, default=None)
    hint = f"; {inside.parent} holds one" if inside else ""
    return FileMistake(f"{folder} holds no model (config.json, *.safetensors){hint}")


def check_processor_files(folder: Path) -> None:
    """See that a folder has the files of a processor and a tokenizer, and that they are JSON, else Mistake."""
    for names in (("processor_config.json", "preprocessor_config.json"), ("tokenizer.json", "vocab.json")):
        if not any((folder / name).is_file() for name in names):
            if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
                raise no_model(folder)
            raise FileMistake(f"{folder} holds no {names[0]}; copy it from the model that this one was made from")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)


def check_weight_files(folder: Path, name: str = MODEL) -> None:
    """See that a folder has all of its weight files, and that none is cut off, else Mistake.

    The files' headers alone are read.
    """
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.is_file():
        check_whole(single)
    elif index.is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise FileMistake(f"{index}: has no weight_map of tensors to files")
        for shard in sorted(set(shards.values())):
            if not (folder / shard).is_file():
                raise FileMistake(f"{folder / shard} is missing, and {index.name} names it; fetch the model again")
            check_whole(folder / shard)
    elif pickles := sorted(path.name for path in folder.glob("*model*.bin")):
        raise FileMistake(
            f"{folder}: {pickles[0]} is a pickle, which runs code when it is opened; save it as safetensors"
        )
    else:
        raise FileMistake(f"{folder} holds no {name}.safetensors")


def check_whole(path: Path) -> None:
    """Raise Mistake where a safetensors file is cut off or damaged."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise FileMistake(f"{path}: not a whole safetensors file ({first_line(error)}); fetch it again") from error
