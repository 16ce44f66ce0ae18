"""SAT parquet file -> images and one ShareGPT JSON file, in one streaming pass.

    python process_dataset.py --parquet SAT_train.parquet

writes into --output_dir

    SAT_train_15000.json          the examples: LLaMA-Factory, ms-swift and this repository load it
    SAT_train_15000.info.json     the settings it was made with, how many rows were kept and skipped, and its SHA-256
    images/SAT_train_15000/       the image bytes, untouched, as {row}_{image}.{true extension}

The number in the name is the number asked for (or `all`), so that a script can name the file beforehand. An
interrupted run continues where it was; a finished one says so, or what of it was damaged since.
"""

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "open-r1-multimodal"))
from open_r1.base.errors import Mistake, first_line, printable, run, use_environment

use_environment()

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from open_r1.base.fields import COUNT, Check, Fields, check, is_count
from open_r1.base.files import read_json, replace_file, replacing, to_json, whole_lines
from open_r1.base.locks import owned
from open_r1.tasks.sat import COLUMNS, FOLDS, Example, Skip, convert_row, to_record

FORMAT_VERSION = 1  # of the output; part of the settings, so that a change never continues older work
PAPER_EXAMPLES = 15000
BATCH_BYTES = 8 << 20  # of rows held as Python objects at a time
BUFFER_BYTES = 1 << 20  # of each column read from disk at a time
MAX_WORKERS = 4  # each may hold one decoded image of images.MAX_PIXELS

# What {name}.info.json holds.
INFO: Fields = dict.fromkeys(("settings", "counts"), Check(lambda value: isinstance(value, dict), "an object"))
COUNTS: Fields = {
    "next_row": COUNT,
    "kept": COUNT,
    "skipped": Check(lambda value: isinstance(value, dict) and all(map(is_count, value.values())), "numbers by reason"),
}

Batch = list[tuple[int, dict[str, Any] | None]]  # (row index, columns or None when its text is not UTF-8)


@dataclass(frozen=True)
class Settings:
    """Everything that the output depends on; work done under other settings is never continued."""

    format_version: int
    fold: str
    total_num: int  # 0: all
    seed: int
    multi_image: str
    question_types: list[str] | None  # None: all
    parquet_bytes: int
    parquet_footer: str  # digest, see `fingerprint`

    @property
    def name(self) -> str:
        return f"SAT_{self.fold}_{self.total_num or 'all'}"


@dataclass
class Progress:
    """What has been decided so far, of the rows before `next_row`."""

    next_row: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def add(self, line: dict[str, Any]) -> None:
        """Count one line of the journal: {"row", "record"} for a kept row, {"row", "skip"} for another.

        Raises:
            KeyError, TypeError, ValueError: it is not the next one.
        """
        if line["row"] != self.next_row or ("record" in line) == ("skip" in line):
            raise ValueError(f"expected row {self.next_row}")
        self.next_row = line["row"] + 1
        if "skip" in line:
            self.skipped[line["skip"]] = self.skipped.get(line["skip"], 0) + 1
        else:
            self.kept += 1

    def table(self) -> str:
        """What was kept and what was skipped, by reason, most frequent first."""
        skipped = sorted(self.skipped.items(), key=lambda item: -item[1])
        lines = [
            ("kept", self.kept),
            *((f"skipped: {why}", n) for why, n in skipped),
            ("rows read", self.next_row),
        ]
        return "\n".join(f"  {printable(what):<52}{n:>9,}" for what, n in lines)


# --- reading --------------------------------------------------------------------------------------


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open for streaming. The defaults would hold whole row groups, and SAT_train is one row group of 5 GiB.

    Raises:
        Mistake: missing, not parquet, cut short, or without SAT's columns.
    """
    if not path.is_file():
        a_folder = ", but a folder; name the parquet file in it" if path.is_dir() else ""
        raise Mistake(f"{path}: no such file{a_folder}")
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise Mistake(f"{path}: not a complete parquet file ({first_line(error)}); fetch it again") from error
    check_schema(path, file.schema_arrow)
    return file


def check_schema(path: Path, schema: pa.Schema) -> None:
    """Raises Mistake when a column of SAT is missing or holds something else."""
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise Mistake(f"{path}: no column {', '.join(missing)}; the file has {', '.join(schema.names)}")
    expected: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        "image_bytes": ("a list of binary or of structs {bytes, path}", is_list_of(is_image)),
        "question": ("a string", is_text),
        "answers": ("a list of strings", is_list_of(is_text)),
        "question_type": ("a string", is_text),
        "correct_answer": ("a string", is_text),
    }
    for name, (description, accepts) in expected.items():
        if not accepts(kind := schema.field(name).type):
            raise Mistake(f"{path}: column {name} is {kind}, expected {description}")


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type)
    return is_binary(kind)


def is_list_of(accepts: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    def check(kind: pa.DataType) -> bool:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and accepts(kind.value_type)

    return check


def fingerprint(path: Path) -> str:
    """SHA-256 of the last 64 KiB: parquet's footer, with the sizes and statistics of all that is before it.

    Neither the path nor the time of the file is part of it, so a file that moved is still the same file.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (64 << 10)))
        return hashlib.sha256(file.read()).hexdigest()


def read_batches(path: Path, file: pq.ParquetFile, first_row: int) -> Iterator[Batch]:
    """The rows from `first_row` on, a few megabytes at a time. Row groups before it are not read.

    Raises:
        Mistake: a damaged page.
    """
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    row = first_group = 0
    while first_group < len(groups) and row + groups[first_group].num_rows <= first_row:
        row += groups[first_group].num_rows
        first_group += 1
    bytes_per_row = sum(group.total_byte_size for group in groups) // max(1, metadata.num_rows)
    batches = file.iter_batches(
        batch_size=min(max(1, BATCH_BYTES // max(1, bytes_per_row)), 1024),
        row_groups=range(first_group, len(groups)),
        columns=list(COLUMNS),
        use_threads=False,
    )
    try:
        for batch in batches:
            skip = min(max(0, first_row - row), len(batch))
            if skip < len(batch):
                yield list(enumerate(to_dicts(batch.slice(skip)), start=row + skip))
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise Mistake(f"{path}: damaged after row {row} ({first_line(error)}); fetch it again") from error


def to_dicts(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The batch's rows; None for a row whose text is not UTF-8, which parquet does not check."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in to_dicts(batch.slice(i, 1))]


# --- the journal: what an interrupted run leaves behind -------------------------------------------


@contextmanager
def open_journal(path: Path, settings: Settings) -> Iterator[tuple[BinaryIO, Progress]]:
    """Open the journal for appending, with the progress that it holds if its settings are these.

    Its first line is the settings; then comes one line a decided row, written after that row's images: a
    process killed at any moment leaves whole lines and at most one torn one, which is cut off here.

    Raises:
        Mistake: another process is writing it, or a line in the middle is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = to_json(asdict(settings))
    with owned(path, is_file=True), path.open("a+b") as journal:
        journal.seek(0)
        lines, progress, end = whole_lines(journal), Progress(), 0
        if (found := next(lines, None)) == header:
            end = len(header)
            for line in lines:
                try:
                    progress.add(json.loads(line))
                except (ValueError, RecursionError, KeyError, TypeError) as error:
                    raise Mistake(f"{path}: damaged at byte {end}; delete it to start over") from error
                end += len(line)
        elif found:
            print("Unfinished work with other settings is here; starting over.")
        journal.truncate(end)
        if end == 0:
            journal.write(header)
            journal.flush()
        yield journal, progress


def decide(item: tuple[int, dict[str, Any] | None], convert: Callable[..., Example | Skip]) -> Example | Skip:
    index, row = item
    return Skip.BAD_TEXT if row is None else convert(row, index)


def save_example(example: Example, row: int, name: str, output_dir: Path) -> dict[str, Any]:
    """Write the example's images as they came; returns its record."""
    paths = [f"images/{name}/{row:06d}_{k}.{extension}" for k, (_, extension) in enumerate(example.images)]
    for path, (data, _) in zip(paths, example.images, strict=True):
        (output_dir / path).write_bytes(data)
    return to_record(example, paths)


def process(parquet: Path, file: pq.ParquetFile, settings: Settings, output_dir: Path, journal_path: Path) -> Progress:
    """Decide row after row until enough are kept or the file ends; the journal holds every decision."""
    convert = partial(
        convert_row,
        seed=settings.seed,
        keep_multi_image=settings.multi_image == "keep",
        question_types=settings.question_types,
    )
    wanted = settings.total_num or file.metadata.num_rows
    with open_journal(journal_path, settings) as (journal, progress):
        if progress.next_row:
            print(f"Continuing at row {progress.next_row:,} with {progress.kept:,} examples kept.")
        if progress.kept >= wanted:
            return progress
        # Pillow decodes outside the interpreter's lock, so threads are enough.
        with (
            ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool,
            tqdm(total=wanted, initial=progress.kept, unit=" examples", desc=settings.name) as bar,
        ):
            for batch in read_batches(parquet, file, progress.next_row):
                results = pool.map(partial(decide, convert=convert), batch)
                for (row, _), result in zip(batch, results, strict=True):
                    if isinstance(result, Skip):
                        line = {"row": row, "skip": result.value}
                    else:
                        line = {"row": row, "record": save_example(result, row, settings.name, output_dir)}
                        bar.update()
                    journal.write(to_json(line))
                    progress.add(line)
                    if progress.kept == wanted:
                        return progress
                journal.flush()
                bar.set_postfix(skipped=sum(progress.skipped.values()), refresh=False)
        return progress


# --- the output -----------------------------------------------------------------------------------


def write_records(journal_path: Path, path: Path) -> None:
    """The journal's records as one JSON list, a record a line; one at a time, as there may be many.

    Raises:
        Mistake: an image is lost, as the crash of a machine may leave it.
    """
    with journal_path.open("rb") as journal, path.open("wb") as output:
        next(journal)  # the settings
        separator = b"[\n"
        for line in journal:
            if (record := json.loads(line).get("record")) is not None:
                if lost := lost_image(record, path.parent):
                    raise Mistake(f"{lost}: the image is lost; delete {journal_path} to start over")
                output.write(separator + to_json(record).rstrip(b"\n"))
                separator = b",\n"
        output.write(b"\n]\n")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lost_image(record: dict[str, Any], output_dir: Path) -> Path | None:
    """The first of a record's images that is not there, or is empty."""
    paths = (output_dir / name for name in record["images"])
    return next((path for path in paths if not (path.is_file() and path.stat().st_size)), None)


def read_finished(json_path: Path, info_path: Path, settings: Settings) -> Progress | None:
    """What a finished run with these settings counted; None when there is none.

    Raises:
        Mistake, ValueError: there is one with other settings, which is not ours to overwrite, or a damaged one.
    """
    if not json_path.exists():
        return None
    info = check(read_json(info_path), INFO, {}, info_path) if info_path.is_file() else {"settings": {}}
    made_with, now = info["settings"], asdict(settings)
    if changed := [key for key in now if made_with.get(key) != now[key]]:
        raise Mistake(
            f"{json_path}: is there already, made with another {', '.join(changed)}; "
            "move it away or choose another --output_dir"
        )
    counts = check(info["counts"], COUNTS, {}, f"{info_path}: counts")
    if info.get("sha256", digest(json_path)) != digest(json_path):
        raise Mistake(f"{json_path}: was changed since it was made; delete it to make it anew")
    for record in read_json(json_path):
        if lost := lost_image(record, json_path.parent):
            raise Mistake(f"{lost}: the image is lost; delete {json_path} to make it anew")
    return Progress(**{name: counts[name] for name in COUNTS})


def prepare(parquet: Path, settings: Settings, file: pq.ParquetFile, output_dir: Path) -> None:
    """Make the dataset, or continue to, or say that it is there.

    Raises:
        Mistake: see its message. OSError: the disk is full or not ours to write.
    """
    name = settings.name
    json_path, info_path = output_dir / f"{name}.json", output_dir / f"{name}.info.json"
    if (finished := read_finished(json_path, info_path, settings)) is not None:
        print(f"{json_path} is finished; nothing to do.\n{finished.table()}")
        return
    journal_path = output_dir / "images" / name / "journal.jsonl"
    progress = process(parquet, file, settings, output_dir, journal_path)
    if progress.kept == 0:
        print(progress.table())
        raise Mistake(f"{parquet}: no row was kept; the table says why")
    with replacing(json_path) as temporary:
        write_records(journal_path, temporary)
        info = {"settings": asdict(settings), "counts": asdict(progress), "sha256": digest(temporary)}
        replace_file(info_path, to_json(info))
    journal_path.unlink()
    if progress.kept < settings.total_num:
        print(f"The file has no more than these; {name} still names the {settings.total_num:,} asked for.")
    print(f"{json_path}\n{progress.table()}")


# --- the command ----------------------------------------------------------------------------------


def total_number(text: str) -> int:
    """`"15000"` -> 15000; `"all"` -> 0."""
    if text == "all":
        return 0
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or all, not {text!r}")
    return int(text)


def parse_args() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--parquet", type=Path, help="in SAT's schema (default: SAT_{fold}.parquet beside this script)")
    add("--fold", choices=FOLDS, default="train", help="names the output (default: train)")
    add(
        "--total_num",
        type=total_number,
        metavar="N|all",
        help="examples to keep, the first in the file's order; 0 or all: every one "
        f"(default: {PAPER_EXAMPLES} of train and static, all of val and test)",
    )
    add("--seed", type=int, default=42, help="of the options' order (default: %(default)s)")
    add("--output_dir", type=Path, default=here, help="(default: this script's folder)")
    add(
        "--multi_image",
        choices=("skip", "keep"),
        default="skip",
        help="rows with several images (default: skip)",
    )
    add("--question_types", nargs="+", metavar="TYPE", help="keep only these (default: all)")
    args = parser.parse_args()
    if args.parquet is None:
        args.parquet = here / f"SAT_{args.fold}.parquet"
    if args.total_num is None:
        args.total_num = PAPER_EXAMPLES if args.fold in ("train", "static") else 0
    return args


def main() -> None:
    args = parse_args()
    # sat.sniff_image judges the images; Pillow's notices would only print into the progress bar.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    file = open_parquet(args.parquet)
    settings = Settings(
        format_version=FORMAT_VERSION,
        fold=args.fold,
        total_num=args.total_num,
        seed=args.seed,
        multi_image=args.multi_image,
        question_types=sorted(set(args.question_types)) if args.question_types else None,
        parquet_bytes=args.parquet.stat().st_size,
        parquet_footer=fingerprint(args.parquet),
    )
    prepare(args.parquet, settings, file, args.output_dir.absolute())


if __name__ == "__main__":
    run(main, stopped="the same command continues where it was")
