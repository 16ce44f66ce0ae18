"""SAT parquet file -> images and one ShareGPT JSON file, in one streaming pass.

    python process_dataset.py --parquet SAT_train.parquet

writes into --output_dir

    SAT_train_15000.json          the examples: LLaMA-Factory, ms-swift and this repository load it
    SAT_train_15000.info.json     the settings it was made with, how many rows were kept and skipped, and its SHA-256
    images/SAT_train_15000/       the image bytes, untouched, as {row}_{image}.{true extension}

The number in the name is the number asked for (or `all`), so that a script can name the file beforehand. All is written
under temporary names: an interrupted run leaves nothing that looks finished, and the next one starts anew (the paper's
15,000 examples take 12 s). Where the data set is there already, it says so, or what of it was damaged since.
"""

import argparse
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "open-r1-multimodal"))
from open_r1.base.errors import Mistake, first_line, printable, run, use_environment

use_environment()

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from open_r1.base.fields import Count, Expected, Record, check
from open_r1.base.files import delete, read_json, replace_file, replacing, to_json
from open_r1.base.locks import owned
from open_r1.tasks.sat import COLUMNS, FOLDS, Example, Skip, convert_row, to_record

FORMAT_VERSION = 1  # of the output; part of the settings, so that a change never passes for older work
PAPER_EXAMPLES = 15000
BATCH_BYTES = 8 << 20  # of rows held as Python objects at a time
BUFFER_BYTES = 1 << 20  # of each column read from disk at a time
MAX_WORKERS = 4  # each may hold one decoded image of images.MAX_PIXELS


class Info(Record):
    """What {name}.info.json holds."""

    settings: dict[str, Any]
    counts: dict[str, Any]


class SavedCounts(Record):
    """Its counts."""

    next_row: Count
    kept: Count
    skipped: Annotated[dict[str, Count], Expected("numbers by reason")]


Batch = list[tuple[int, dict[str, Any] | None]]  # (row index, columns or None when its text is not UTF-8)


@dataclass(frozen=True)
class Settings:
    """Everything that the output depends on; what was made with other settings is not overwritten."""

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
class Counts:
    """What was decided of the rows before `next_row`."""

    next_row: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def add(self, result: Example | Skip) -> None:
        """Count the next row."""
        self.next_row += 1
        if isinstance(result, Skip):
            self.skipped[result.value] = self.skipped.get(result.value, 0) + 1
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


def read_batches(path: Path, file: pq.ParquetFile) -> Iterator[Batch]:
    """The rows, a few megabytes at a time.

    Raises:
        Mistake: a damaged page.
    """
    metadata = file.metadata
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    bytes_per_row = max(1, size // max(1, metadata.num_rows))
    batch_size = min(max(1, BATCH_BYTES // bytes_per_row), 1024)
    row = 0
    try:
        for batch in file.iter_batches(batch_size=batch_size, columns=list(COLUMNS), use_threads=False):
            yield list(enumerate(to_dicts(batch), start=row))
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


# --- from rows to images and records ---------------------------------------------------------------


def decide(item: tuple[int, dict[str, Any] | None], convert: Callable[..., Example | Skip]) -> Example | Skip:
    index, row = item
    return Skip.BAD_TEXT if row is None else convert(row, index)


def save_example(example: Example, row: int, name: str, folder: Path) -> dict[str, Any]:
    """Write the example's images as they came into a folder that will be images/{name}; returns its record."""
    names = [f"{row:06d}_{k}.{extension}" for k, (_, extension) in enumerate(example.images)]
    for file, (data, _) in zip(names, example.images, strict=True):
        (folder / file).write_bytes(data)
    return to_record(example, [f"images/{name}/{file}" for file in names])


def process(parquet: Path, file: pq.ParquetFile, settings: Settings, json_path: Path, images: Path) -> Counts:
    """Take row after row until enough are kept or the file ends: images into a folder, records into a JSON list."""
    convert = partial(
        convert_row,
        seed=settings.seed,
        keep_multi_image=settings.multi_image == "keep",
        question_types=settings.question_types,
    )
    wanted, counts = settings.total_num or file.metadata.num_rows, Counts()
    # Pillow decodes outside the interpreter's lock, so threads are enough.
    with (
        json_path.open("wb") as output,
        ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool,
        tqdm(total=wanted, unit=" examples", desc=settings.name) as bar,
    ):
        for batch in read_batches(parquet, file):
            for (row, _), result in zip(batch, pool.map(partial(decide, convert=convert), batch), strict=True):
                counts.add(result)
                if not isinstance(result, Skip):
                    record = save_example(result, row, settings.name, images)
                    output.write((b",\n" if counts.kept > 1 else b"[\n") + to_json(record).rstrip(b"\n"))
                    bar.update()
                if counts.kept == wanted:
                    break
            if counts.kept == wanted:
                break
            bar.set_postfix(skipped=sum(counts.skipped.values()), refresh=False)
        output.write(b"\n]\n")
    return counts


# --- the output -----------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lost_image(record: dict[str, Any], output_dir: Path) -> Path | None:
    """The first of a record's images that is not there, or is empty."""
    paths = (output_dir / name for name in record["images"])
    return next((path for path in paths if not (path.is_file() and path.stat().st_size)), None)


def read_finished(json_path: Path, info_path: Path, settings: Settings) -> Counts | None:
    """What a finished run with these settings counted; None when there is none.

    Raises:
        Mistake, ValueError: there is one with other settings, which is not ours to overwrite, or a damaged one.
    """
    if not json_path.exists():
        return None
    info = read_json(info_path) if info_path.is_file() else {"settings": {}, "counts": {}}
    made_with, now = check(Info, info, info_path).settings, asdict(settings)
    if changed := [key for key in now if made_with.get(key) != now[key]]:
        raise Mistake(
            f"{json_path}: is there already, made with another {', '.join(changed)}; "
            "move it away or choose another --output_dir"
        )
    counts = check(SavedCounts, info["counts"], f"{info_path}: counts")
    if info.get("sha256", digest(json_path)) != digest(json_path):
        raise Mistake(f"{json_path}: was changed since it was made; delete it to make it anew")
    for record in read_json(json_path):
        if lost := lost_image(record, json_path.parent):
            raise Mistake(f"{lost}: the image is lost; delete {json_path} to make it anew")
    return Counts(**vars(counts))


def prepare(parquet: Path, settings: Settings, file: pq.ParquetFile, output_dir: Path) -> None:
    """Make the dataset, or say that it is there.

    Raises:
        Mistake: see its message. OSError: the disk is full or not ours to write.
    """
    name = settings.name
    json_path, info_path = output_dir / f"{name}.json", output_dir / f"{name}.info.json"
    if (finished := read_finished(json_path, info_path, settings)) is not None:
        print(f"{json_path} is finished; nothing to do.\n{finished.table()}")
        return
    images = output_dir / "images" / name
    images.parent.mkdir(parents=True, exist_ok=True)
    # Images first, then what names them: whoever finds the JSON file finds all of it.
    with owned(json_path, is_file=True), replacing(json_path) as new_json:
        with replacing(images) as new_images:
            new_images.mkdir()
            counts = process(parquet, file, settings, new_json, new_images)
            if counts.kept == 0:
                print(counts.table())
                raise Mistake(f"{parquet}: no row was kept; the table says why")
            delete(images)
        replace_file(
            info_path, to_json({"settings": asdict(settings), "counts": asdict(counts), "sha256": digest(new_json)})
        )
    if counts.kept < settings.total_num:
        print(f"The file has no more than these; {name} still names the {settings.total_num:,} asked for.")
    print(f"{json_path}\n{counts.table()}")


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
    run(main, stopped="nothing was written, and the same command starts anew")
