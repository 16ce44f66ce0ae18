"""SAT parquet file -> images and one ShareGPT JSON file, in one streaming pass.

    python process_dataset.py --parquet SAT_train.parquet

writes into --output_dir

    SAT_train_15000.json          the examples, as LLaMA-Factory, ms-swift and this repository load them
    SAT_train_15000.info.json     the settings, how many rows were kept and skipped, and the file's SHA-256
    images/SAT_train_15000/       the image bytes, untouched, as {row}_{image}.{true extension}

The number in the name is the number asked for (or `all`), so that a script can name the file beforehand. Files have
temporary names until they are complete: after an interruption the next run starts anew (the paper's 15,000 examples
take 12 s). If the data set exists already, the script says so, or says which part of it is damaged.
"""

import argparse
import hashlib
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "open-r1-multimodal"))
from open_r1.base.errors import Mistake, command_line, first_line, printable, run, use_environment

use_environment()

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from open_r1.base.fields import Count, Record, Text, check
from open_r1.base.files import delete, file_digest, read_json, replace_file, replacing, to_json
from open_r1.base.locks import owned
from open_r1.tasks.sat import FOLDS, Example, Skip, convert_row, to_record

FORMAT_VERSION = 1  # of the output; part of the settings, so that a change never passes for older work
PAPER_EXAMPLES = 15000
BATCH_ROWS = 48  # held as Python objects at a time
BUFFER_BYTES = 1 << 20  # of each column read from disk at a time
MAX_WORKERS = 4  # each may hold one decoded image of images.MAX_PIXELS

TEXT = "(large_)?string"
LIST = r"(large_)?list<\w+: ({})( not null)?>"
# What each column of SAT must be: in words, and as pyarrow writes its type.
COLUMN_TYPES = {
    "image_bytes": (
        "a list of binary or of structs {bytes, path}",
        LIST.format("(large_)?binary|struct<(.*, )?bytes: (large_)?binary.*>"),
    ),
    "question": ("a string", TEXT),
    "answers": ("a list of strings", LIST.format(TEXT)),
    "question_type": ("a string", TEXT),
    "correct_answer": ("a string", TEXT),
}

# Everything that the output depends on; what was made with other settings is not overwritten.
Settings = dict[str, Any]


class Counts(Record):
    """Rows read (`next_row`), rows `kept`, and rows `skipped` by reason."""

    next_row: Count
    kept: Count
    skipped: dict[str, Count]


class Info(Record):
    """What a finished dataset says of itself; an older one has no digest."""

    settings: Settings
    counts: Counts
    sha256: Text | None = None


def table(counts: Counts) -> str:
    """What was kept and what was skipped, by reason, most frequent first."""
    lines = [("kept", counts.kept)]
    lines += [(f"skipped: {reason}", number) for reason, number in Counter(counts.skipped).most_common()]
    lines += [("rows read", counts.next_row)]
    return "\n".join(f"  {printable(what):<52}{number:>9,}" for what, number in lines)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open for streaming. The defaults would hold whole row groups, and SAT_train is one row group of 5 GiB.

    Raises:
        Mistake: missing, not parquet, cut short, or without SAT's columns.
    """
    if not path.is_file():
        a_folder = ", but a folder; name the parquet file in it" if path.is_dir() else ""
        raise Mistake(f"{path}: no such file{a_folder}")
    try:
        # the system's pool gives memory back; arrow's own keeps the pages of a large row group
        pa.set_memory_pool(pa.system_memory_pool())
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise Mistake(f"{path}: not a complete parquet file ({first_line(error)}); fetch it again") from error
    schema = file.schema_arrow
    if missing := [name for name in COLUMN_TYPES if name not in schema.names]:
        raise Mistake(f"{path}: no column {', '.join(missing)}; the file has {', '.join(schema.names)}")
    for name, (expected, pattern) in COLUMN_TYPES.items():
        actual = str(schema.field(name).type)
        if not re.fullmatch(pattern, actual):
            raise Mistake(f"{path}: column {name} is {actual}, expected {expected}")
    return file


def fingerprint(path: Path) -> str:
    """SHA-256 of the last 64 KiB: parquet's footer, with the sizes and statistics of all that is before it.

    Neither the path nor the time of the file is part of it, so a file that moved is still the same file.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (64 << 10)))
        return hashlib.sha256(file.read()).hexdigest()


def convert_rows(
    path: Path, file: pq.ParquetFile, convert: Callable[..., Example | Skip]
) -> Iterator[tuple[int, Example | Skip]]:
    """The rows in their order, with their numbers, each as an example or the reason to skip it.

    Raises:
        Mistake: a damaged page.
    """
    row, columns = 0, list(COLUMN_TYPES)
    # Pillow decodes outside the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                results = pool.map(convert, batch.to_pylist(), range(row, row + len(batch)))
                yield from enumerate(results, start=row)
                row += len(batch)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            where = f"{path}: damaged after row {row}"
            raise Mistake(f"{where} ({first_line(error)}); fetch it again") from error


def save_example(example: Example, row: int, name: str, folder: Path) -> dict[str, Any]:
    """Write the example's images as they came into a folder that will be images/{name}; returns its record."""
    names = [f"{row:06d}_{k}.{extension}" for k, (_, extension) in enumerate(example.images)]
    for file, (data, _) in zip(names, example.images, strict=True):
        (folder / file).write_bytes(data)
    return to_record(example, [f"images/{name}/{file}" for file in names])


def process(
    parquet: Path, file: pq.ParquetFile, settings: Settings, name: str, json_path: Path, images: Path
) -> Counts:
    """Take row after row until enough are kept or the file ends: images into a folder, records into a JSON list."""
    convert = partial(
        convert_row,
        seed=settings["seed"],
        keep_multi_image=settings["multi_image"] == "keep",
        question_types=settings["question_types"],
    )
    wanted, read, kept, skipped = settings["total_num"] or file.metadata.num_rows, 0, 0, Counter()
    with json_path.open("wb") as output, tqdm(total=wanted, unit=" examples", desc=name) as bar:
        for row, result in convert_rows(parquet, file, convert):
            read += 1
            if isinstance(result, Skip):
                skipped[result.value] += 1
                bar.set_postfix(skipped=skipped.total(), refresh=False)
                continue
            record = save_example(result, row, name, images)
            output.write((b",\n" if kept else b"[\n") + to_json(record).rstrip(b"\n"))
            kept += 1
            bar.update()
            if kept == wanted:
                break
        output.write(b"\n]\n")
    return Counts(next_row=read, kept=kept, skipped=dict(skipped))


def check_finished(json_path: Path, info_path: Path, settings: Settings) -> str:
    """The table of a dataset that is there already.

    Raises:
        Mistake: it was made with other settings, which is not ours to overwrite, or is damaged.
    """
    try:
        info = check(Info, read_json(info_path), info_path) if info_path.is_file() else None
    except Mistake as error:
        raise Mistake(f"{error}; delete {json_path} to make both anew") from error
    made_with = info.settings if info else {}
    if changed := [key for key in settings if made_with.get(key) != settings[key]]:
        raise Mistake(
            f"{json_path}: is there already, made with another {', '.join(changed)}; "
            "move it away or choose another --output_dir"
        )
    if info.sha256 not in (None, file_digest(json_path)):
        raise Mistake(f"{json_path}: was changed since it was made; delete it to make it anew")
    for record in read_json(json_path):
        for image in (json_path.parent / name for name in record["images"]):
            if not image.is_file() or not image.stat().st_size:
                raise Mistake(f"{image}: the image is lost; delete {json_path} to make it anew")
    return table(info.counts)


def prepare(parquet: Path, settings: Settings, file: pq.ParquetFile, output_dir: Path) -> None:
    """Make the dataset, or say that it is there.

    Raises:
        Mistake: see its message. OSError: the disk is full or not ours to write.
    """
    name = f"SAT_{settings['fold']}_{settings['total_num'] or 'all'}"
    json_path, info_path = output_dir / f"{name}.json", output_dir / f"{name}.info.json"
    if json_path.exists():
        finished = check_finished(json_path, info_path, settings)
        print(f"{json_path} is finished; nothing to do.\n{finished}")
        return
    images = output_dir / "images" / name
    images.parent.mkdir(parents=True, exist_ok=True)
    # Images first, then what names them: whoever finds the JSON file finds all of it.
    with owned(json_path, is_file=True), replacing(json_path) as new_json:
        with replacing(images) as new_images:
            new_images.mkdir()
            counts = process(parquet, file, settings, name, new_json, new_images)
            if counts.kept == 0:
                print(table(counts))
                raise Mistake(f"{parquet}: no row was kept; the table says why")
            delete(images)
        info = {"settings": settings, "counts": counts.model_dump(), "sha256": file_digest(new_json)}
        replace_file(info_path, to_json(info))
    if counts.kept < settings["total_num"]:
        print(f"The file has no more than these; {name} still names the {settings['total_num']:,} asked for.")
    print(f"{json_path}\n{table(counts)}")


def total_number(text: str) -> int:
    """`"15000"` -> 15000; `"all"` -> 0."""
    if text == "all":
        return 0
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or all, not {text!r}")
    return int(text)


def parse_args() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = command_line(__doc__)
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
    add("--seed", type=int, default=42, help="seed of the options' order (default: %(default)s)")
    add("--output_dir", type=Path, default=here, help="(default: this script's folder)")
    add("--multi_image", choices=("skip", "keep"), default="skip", help="rows with several images (default: skip)")
    add("--question_types", nargs="+", metavar="TYPE", help="keep only these (default: all)")
    args = parser.parse_args()
    if args.parquet is None:
        args.parquet = here / f"SAT_{args.fold}.parquet"
    if args.total_num is None:
        args.total_num = PAPER_EXAMPLES if args.fold in ("train", "static") else 0
    return args


def main() -> None:
    args = parse_args()
    # sat.convert_row judges the images; Pillow's notices would only print into the progress bar.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    file = open_parquet(args.parquet)
    settings = {
        "format_version": FORMAT_VERSION,
        "fold": args.fold,
        "total_num": args.total_num,  # 0: all
        "seed": args.seed,
        "multi_image": args.multi_image,
        "question_types": sorted(set(args.question_types)) if args.question_types else None,  # None: all
        "parquet_bytes": args.parquet.stat().st_size,
        "parquet_footer": fingerprint(args.parquet),
    }
    prepare(args.parquet, settings, file, args.output_dir.absolute())


if __name__ == "__main__":
    run(main, stopped="nothing was written, and the same command starts anew")
