"""Reads any data set (a file, a folder or the Hub) into rows to train on, in TRL's form.

A record names its images, and nothing here opens one. The forms of a record:

- a dialogue: `messages` (`role`, `content`), LLaMA-Factory's `conversations` (`from`, `value`) or TRL's `prompt`, with
  `images` and `<image>` marks in front of the question, or with content parts as qwen-vl-utils and TRL read them;
- columns: a question, an answer, an image or several, options, under names of the data set's own (`Columns`).
"""

import csv
import dataclasses
import difflib
import glob
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_r1.base.edits import split_edit
from open_r1.base.errors import FileMistake, MissingFile, Mistake
from open_r1.base.images import image_bytes, local_path
from open_r1.base.prompts import IMAGE_PLACEHOLDER, sat_question, without_surrogates
from open_r1.tasks.pretext import read_pretext
from open_r1.tasks.unshown import unshown_fields, unshown_in_messages, unshown_marks, unshown_options

DIALOGUES = ("messages", "conversations", "prompt")
ROLES = {"human": "user", "gpt": "assistant"}  # LLaMA-Factory's names
# Where a question, an answer and images are looked for unless the user names the columns.
QUESTIONS, ANSWERS, IMAGES = ("question", "problem"), ("solution", "answer"), ("images", "image")
# What a trainer hands to reward functions itself, beside the fields of a row.
TAKEN = ("prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# What can be asked about pictures without labels: a folder and a split -> records.
FOLDER_TASKS: dict[str, Callable[[Path, str], list[dict[str, Any]]]] = {"pretext": read_pretext}
LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FILES = (".json", *LINES, ".parquet", *DELIMITERS)
csv.field_size_limit(2**31 - 1)  # a cell may hold an image in base64; Python's own limit is 128 KiB


@dataclass(frozen=True)
class Columns:
    """The names of a data set's own columns; None looks for the usual ones.

    Attributes:
        options: they are written behind the question, as in SAT. None: the question names them itself, if it has any.
    """

    question: str | None = None
    answer: str | None = None
    image: str | None = None
    options: str | None = None


def read_examples(
    source: str | Path, columns: Columns | None = None, config: str | None = None, split: str = "train"
) -> list[dict[str, Any]]:
    """The rows of `iter_rows` as a list; what of a record no prompt shows is not told."""
    return [row for row, _ in iter_rows(source, columns, config, split)]


def iter_rows(
    source: str | Path,
    columns: Columns | None = None,
    config: str | None = None,
    split: str = "train",
    must_exist: bool = True,
    task: str | None = None,
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The rows of a data set, in its order, each with what of its record no prompt shows; images are named, not opened.

    Args:
        source: a file (JSON, JSON Lines, CSV, TSV, parquet, or of another suffix that `datasets` reads), a folder that
            `datasets` reads or has saved, or a name on the Hub.
        columns: of a data set without dialogues; those that are named must be there.
        config: of a folder or a Hub data set that has several.
        split: of a folder or a Hub data set.
        must_exist: whether an image file that is not there is an error.
        task: what to ask about a folder of pictures without labels, a name in FOLDER_TASKS.

    Yields:
        One dict a record: `prompt` (conversational, without `<image>` marks), `images` (absolute paths, or what
        carries its bytes), `solution` (None without an answer), `options` (maybe none), `question_type` (maybe
        empty), and every other field of the record as it is. With it what `tasks/unshown.py` finds, in words.

    Raises:
        Mistake: no such file, data set or image, or content of another form; it names the file and the row.
    """
    path = Path(source).absolute()
    folder = path.parent if path.is_file() else path if path.is_dir() else Path.cwd()
    row = None
    for row, record in enumerate(read_records(source, config, split, task)):
        try:
            yield to_row(mended(record), folder, columns or Columns(), must_exist)
        except RecursionError as error:
            raise Mistake(f"{source}: row {row}: nested too deeply") from error
        except Mistake as error:
            kind = MissingFile if isinstance(error, MissingFile) else Mistake
            raise kind(f"{source}: row {row}: {error}") from error
    if row is None:
        raise Mistake(f"{source}: expected at least one record")


# --- reading --------------------------------------------------------------------------------------------------


def read_records(
    source: str | Path, config: str | None = None, split: str = "train", task: str | None = None
) -> Iterable[Any]:
    """The records of a file, a folder or a Hub data set, unchecked. Arguments and errors: see `iter_rows`.

    A table is told by its suffix, JSON by that or its first character; all else is read by `datasets`.
    """
    path = Path(source)
    if not path.exists() and is_local(str(source)):
        raise MissingFile(f"{path}: no such file{meant(path)}")
    if task:
        return FOLDER_TASKS[task](path, split)
    if not path.is_file():
        return read_dataset(str(source), config, split)
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix in DELIMITERS:
        return read_table(path)
    with path.open("rb") as file:
        if path.suffix in (".json", *LINES) or file.read(64).lstrip()[:1] in (b"", b"[", b"{"):
            return read_list(path)
    return read_dataset(str(path.parent), None, "train", path.name)


def is_local(name: str) -> bool:
    """Whether a name is evidently that of a file or a folder, and of nothing on the Hub (`owner/name`)."""
    path = Path(name)
    is_below = "/" not in name or path.parent.is_dir()
    return path.is_absolute() or name.count("/") > 1 or path.suffix in FILES or bool(path.suffix and is_below)


def meant(path: Path) -> str:
    """The end of an error about a missing file: a file of nearly that name, or how several or SAT's files are named."""
    several = str(path).replace(",", " ").split()
    is_pattern = "*" in path.name and any(path.parent.glob(path.name))
    if is_pattern or (len(several) > 1 and all(map(os.path.exists, several))):
        return "; several data sets are named in a YAML file (docs/data.md says how)"
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    there = {file.stem: file for file in files if file.exists()}  # a link may lead nowhere
    if close := difflib.get_close_matches(path.stem, there, n=1):
        return f"; did you mean {there[close[0]]}?"
    return "; make it with src/data/SAT/prepare_dataset.sh" if path.name.startswith("SAT_") else ""


def read_table(path: Path) -> Iterator[dict[str, str | None]]:
    """The lines of a CSV or TSV file as texts, under the names in its first one; an empty cell is null."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix], strict=True)
        try:
            check_header(reader.fieldnames or [], path)
            for record in reader:
                if None in record or None in record.values():
                    names = f"names in the first line ({len(reader.fieldnames)})"
                    raise Mistake(f"{path}: line {reader.line_num}: not as many cells as {names}")
                yield {name: cell or None for name, cell in record.items()}
        except UnicodeDecodeError as error:
            raise Mistake(f"{path}: not in UTF-8 behind line {reader.line_num} ({error}); save it as UTF-8") from error
        except csv.Error as error:
            raise Mistake(f"{path}: not a table behind line {reader.line_num}: {error}") from error


def check_header(names: Sequence[str], path: Path) -> None:
    """Raise Mistake for a table's first line without its file's delimiter, or with one name twice."""
    expected = DELIMITERS[path.suffix]
    if len(names) == 1 and (other := next((mark for mark in ";,\t|" if mark in names[0]), None)):
        where = f"{path}: line 1: {other!r} between the names"
        raise Mistake(f"{where}; in a {path.suffix} file it is {expected!r}; save it with that one")
    for place, name in enumerate(names):
        if name and name in names[:place]:
            raise Mistake(f"{path}: line 1: {name} is there twice; every column needs a name of its own")


def read_list(path: Path) -> list[Any]:
    """The records of a JSON list or of JSON Lines; a file named .json may hold either."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        records = None if path.suffix in LINES else json.loads(text)
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8
        if getattr(error, "msg", None) != "Extra data":  # behind a first value: a file of lines
            raise Mistake(f"{path}: not a JSON file ({error})") from error
        records = None
    if records is not None:
        if not isinstance(records, list) or not records:
            raise Mistake(f"{path}: expected a list with at least one record")
        return records
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise Mistake(f"{path}: line {number}: not JSON ({error})") from error
    return records


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, a few at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: damaged in the middle
        raise Mistake(f"{path}: not a parquet file that can be read ({one_line(error)})") from error


def read_dataset(name: str, config: str | None, split: str, file: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a folder or a Hub data set, or of one file of it, through `datasets`; media stay encoded."""
    import datasets
    import httpx
    import pyarrow as pa

    if any(Path(name).glob("*config.json")) and any(Path(name).glob("*.safetensors")):
        raise Mistake(f"{name} is the folder of a model; name the data (DATA and MODEL may be swapped)")
    saved = any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    try:
        if saved and not file:
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, config, split=split, data_files=file and glob.escape(file))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise Mistake(f"no split {split!r}; it has {', '.join(data)}")
            data = data[split]
        for column, feature in data.features.items():
            if (encoded := undecoded(feature)) is not feature:
                data = data.cast_column(column, encoded)
        yield from data
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        pa.ArrowException,
        httpx.HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:  # a folder of any content, a network, a hub
        where = Path(name, file) if file else name
        reason = textwrap.shorten(one_line(error), 240, placeholder=" ...")  # it may list every suffix there is
        raise FileMistake(f"{where}: cannot be read as a data set: {reason}") from error


def undecoded(feature: Any) -> Any:
    """A feature of media, or of lists of them, that leaves them encoded; any other feature as it is."""
    import datasets

    if getattr(feature, "decode", False):  # images, sounds, videos
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = undecoded(feature.feature)
        return feature if inner is feature.feature else datasets.List(inner)
    return feature


def one_line(error: Exception) -> str:
    """What an error says first, and what its cause says."""
    texts = [str(part).strip().partition("\n")[0] for part in (error, error.__cause__) if part is not None]
    return ": ".join(filter(None, texts)) or type(error).__name__


# --- a record -> a row ----------------------------------------------------------------------------------------


def mended(value: Any) -> Any:
    """A record, or a value in it, with U+FFFD for every half of a character in its texts."""
    match value:
        case str():
            return value if value.isascii() else without_surrogates(value)
        case list():
            return [mended(item) for item in value]
        case Mapping():
            return {mended(key): mended(item) for key, item in value.items()}
    return value


def to_row(record: Any, folder: Path, columns: Columns, must_exist: bool = True) -> tuple[dict[str, Any], list[str]]:
    """One record -> what `iter_rows` yields for it; relative image paths start in `folder`."""
    if not isinstance(record, Mapping):
        raise Mistake("expected an object")
    fields = {key: value for key, value in record.items() if value is not None}  # null is absent
    for key in TAKEN:
        if key in fields:
            raise Mistake(f"the field {key} has a name that reward functions get from the trainer; rename it")
    for key in asdict(columns).values():
        if key is not None and key not in record:
            raise Mistake(f"no field {key}; it has {names(record)} (null where a row has none)")
    image_field, references = find_images(fields, columns.image)
    form = None if columns.question else next((key for key in DIALOGUES if key in fields), None)
    if form and not isinstance(fields[form], str):
        system, user, answer = dialogue(form, fields[form])
        if isinstance(user, list):
            text, references = from_parts(user, references, form)
        else:
            text = without_marks(user, len(references), must_have=form != "prompt")
        unshown = unshown_in_messages(fields[form], form)
    else:
        system, answer, unshown = [], None, []
        form, question = text_of(fields, columns.question, ("prompt", *QUESTIONS))
        if question is None:
            raise Mistake(
                f"no messages, conversations, prompt or question; it has {names(record)}: name one with "
                "--question_column"
            )
        text = without_marks(question, len(references), must_have=False)
    if not text.strip():
        raise Mistake("the question is empty")
    shown = [form, image_field]
    if not system and isinstance(fields.get("system"), str) and fields["system"].strip():  # LLaMA-Factory's
        system = [{"role": "system", "content": fields["system"]}]
        shown.append("system")
    answer_field, solution = None, answer
    if answer is None or columns.answer:
        answer_field, solution = text_of(fields, columns.answer, ANSWERS)
    if solution is not None and not solution.strip():
        raise Mistake("the answer is empty; leave its field out where there is none")
    options = strings(fields, columns.options or "options")
    if columns.options and options:
        text = sat_question(text, options)
    row = {
        "prompt": [*system, {"role": "user", "content": text}],
        "images": [locate_image(reference, folder, must_exist) for reference in references],
        "solution": solution,
        "options": options,
        "question_type": str(fields.get("question_type", "")),
    }
    # A second question or image, unless the user named the first
    others = [*(() if columns.question else DIALOGUES), *(() if columns.image else IMAGES)]
    others = [key for key in others if key in fields and key not in shown]
    unshown += [f"the field {key}" for key in others if fields[key] not in (text, references, *references)]
    shown += [*others, answer_field, columns.options or "options"]
    unshown += unshown_marks(row["prompt"], len(references)) + unshown_fields(fields, shown, len(references))
    unshown += [] if columns.options else unshown_options(fields, solution, text)
    read = {*DIALOGUES, *IMAGES, columns.image} | ({"system"} & set(shown))
    return {**{key: value for key, value in record.items() if key not in read}, **row}, unshown


def dialogue(form: str, messages: Any) -> tuple[list[dict[str, str]], str | list[Any], str | None]:
    """The system messages, the user's content and the assistant's text, if there is one."""
    pairs = []
    if isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages):
        for message in messages:
            role = str(message.get("role", message.get("from")))
            role, content = ROLES.get(role, role), message.get("content", message.get("value"))
            pairs.append((role, content if role == "user" else joined(content)))
    system = [{"role": "system", "content": text} for role, text in pairs[:1] if role == "system"]
    if system and not isinstance(system[0]["content"], str):
        raise Mistake(f"{form}: expected a system message with text")
    match pairs[len(system) :]:
        case [("user", str() | list() as user)]:
            return system, user, None
        case [("user", str() | list() as user), ("assistant", str(answer))]:
            return system, user, answer
    raise Mistake(f"{form}: expected one user and one assistant message with text")


def joined(content: Any) -> Any:
    """The text of a message whose parts are all texts; another content as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def names(fields: Mapping[Any, Any]) -> str:
    """The names of the fields, in one line whatever they hold."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in map(str, fields))


def find_images(fields: Mapping[str, Any], column: str | None) -> tuple[str, list[Any]]:
    """The field that the user named, or the usual one, and the image references in it: one, or a list of them."""
    key = column or next((key for key in IMAGES if key in fields), IMAGES[0])
    value = fields.get(key, [])
    if not isinstance(value, list):
        value = [value]
    if not all(isinstance(item, str | bytes | Mapping) for item in value):
        raise Mistake(f"{key}: expected a list of strings (paths), or of images with their bytes")
    return key, value


def text_of(fields: Mapping[str, Any], column: str | None, known: Sequence[str]) -> tuple[str | None, str | None]:
    """The field that the user named, or the first known one that is there, and the text or number in it, if any."""
    key = column or next((name for name in known if name in fields), None)
    if key not in fields:
        return key, None
    value = fields[key]
    is_number = type(value) is int or (isinstance(value, float) and math.isfinite(value))  # true is an int, too
    if not (is_number or isinstance(value, str)):
        raise Mistake(f"{key}: expected a text or a finite number, not {value!s:.80}")
    return key, str(value)


def strings(fields: Mapping[str, Any], key: str) -> list[str]:
    """A field that is a list of strings, or none at all."""
    value = fields.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Mistake(f"{key}: expected a list of strings")
    return value


def without_marks(text: str, images: int, must_have: bool) -> str:
    """The text without the `<image>` marks in front of it, as many as there are images.

    Args:
        must_have: whether images without any mark are a mistake; else they go in front too.
    """
    count, rest = 0, text
    while rest.lstrip().startswith(IMAGE_PLACEHOLDER):
        count, rest = count + 1, rest.lstrip().removeprefix(IMAGE_PLACEHOLDER)
    if IMAGE_PLACEHOLDER in rest or (count != images and (must_have or count)):
        raise Mistake(
            f"{text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} marks for {images} images; "
            "expected one mark an image, all of them in front of the question"
        )
    return rest.lstrip("\n") if count else rest


def from_parts(parts: list[Any], images: list[Any], form: str) -> tuple[str, list[Any]]:
    """The text and the image references of a user message's parts, images first.

    Args:
        parts: an image part without an image, as TRL has it, is the place of the next of `images`.
        images: of the record; without such places they come before those of the parts.
        form: of the dialogue, for errors.
    """
    texts, references = [], []
    for part in parts:
        match part:
            case {"type": "image", "image": str() | bytes() | Mapping() as reference} if not texts:
                references.append(reference)
            case {"type": "image", **rest} if not texts and all(value is None for value in rest.values()):
                references.append(None)
            case {"type": "text", "text": str(text)} if IMAGE_PLACEHOLDER not in text:
                texts.append(text)
            case _:
                raise Mistake(
                    f"{form}: cannot read the part {str(part)[:80]}; expected images "
                    '{"type": "image", "image": ...} and after them texts {"type": "text", "text": ...}'
                )
    places, given = references.count(None), iter(images)
    if places not in (0, len(images)):
        raise Mistake(f'{form}: {places} parts {{"type": "image"}} for {len(images)} images; expected one an image')
    filled = [next(given) if reference is None else reference for reference in references]
    return "".join(texts), [*given, *filled]


def locate_image(reference: Any, folder: Path, must_exist: bool = True) -> Any:
    """An image reference as an absolute path, with its edit; what carries its bytes stays what it is."""
    data, text = image_bytes(reference), reference
    if isinstance(reference, Mapping):
        text = reference.get("path")
        if not (isinstance(data, bytes | None) and isinstance(text, str | None)):
            raise Mistake("an image: expected its encoded bytes or a path in {bytes, path}")
    if data is not None:
        return reference
    if not text:
        raise Mistake("an image without bytes and without a path")
    if text.startswith(("http://", "https://")):
        raise Mistake(f"image {text}: download it first and name the file")
    file, edit = split_edit(text)
    path = folder / local_path(file)
    if must_exist and not os.path.isfile(path):  # also of a name that is too long for one
        raise MissingFile(f"no image {path}" + (", that is a folder" if os.path.isdir(path) else ""))
    return f"{path}{edit or ''}"
