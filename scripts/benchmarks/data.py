"""SAT parquet -> images and JSON, against the route over CSV; the `data` command of `benchmark.py`."""

import argparse
import codecs
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.rounds import alternate, summarise
from open_r1.base.errors import REPO_ROOT, positive
from open_r1.world.parquet import SAT_SCHEMA, sat_row
from open_r1.world.scene import LEVELS

DISTINCT_SCENES = 300  # drawing more would take longer than what is measured; each is repeated in turn


def write_sat_rows(path: Path, rows: int) -> None:
    """`rows` rows in SAT's schema with 640x480 JPEG images of the rendered world, in one row group as SAT's."""
    scenes = [sat_row(i, 0, LEVELS["full"]) for i in range(min(rows, DISTINCT_SCENES))]
    table = pa.Table.from_pylist(scenes, SAT_SCHEMA)
    with pq.ParquetWriter(path, SAT_SCHEMA) as writer:
        repeats = -(-rows // len(scenes))
        writer.write_table(pa.concat_tables([table] * repeats).slice(0, rows), row_group_size=rows)


def prepare_ours(parquet: Path, folder: Path) -> Path:
    """`process_dataset.py` as users run it: a new process, every image decoded to validate it."""
    script = REPO_ROOT / "src" / "data" / "SAT" / "process_dataset.py"
    command = [sys.executable, script, "--parquet", parquet, "--total_num", "all", "--output_dir", folder]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return folder / "SAT_train_all.json"


def prepare_baseline(parquet: Path, folder: Path) -> Path:
    """The usual route: parquet -> CSV -> pandas -> regular expression over escaped bytes -> PNG.

    The reference splits the answers on ", " and finds no image with current tools. Here the expressions are ones
    that work, and greedy, so that they are fast: what is measured is the route and not its mistakes.
    """
    import pandas as pd

    (folder / "images").mkdir(parents=True)
    csv = folder / "sat.csv"
    pd.read_parquet(parquet).to_csv(csv, index=False)
    records = []
    for index, row in enumerate(pd.read_csv(csv).itertuples(index=False)):
        escaped = re.fullmatch(r"\[b(['\"])(.*)\1\]", row.image_bytes, re.DOTALL)[2]
        data, _ = codecs.escape_decode(escaped.encode("latin-1"))
        path = f"images/{index}.png"
        Image.open(BytesIO(data)).convert("RGB").save(folder / path)
        options = re.findall(r"'([^']*)'", row.answers)
        text = f"<image>{row.question} Choose between the following options: {' or '.join(options)}"
        records.append({"messages": [text, str(row.correct_answer)], "images": [path]})
    output = folder / "sat.json"
    output.write_text(json.dumps(records))
    return output


def check_same(ours: Path, baseline: Path, rows: int) -> None:
    """Both made every example, with the same pixels in the first and the last."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (ours, baseline)]
    if [len(made) for made in records] != [rows, rows]:
        raise SystemExit(f"benchmark: error: {len(records[0])} and {len(records[1])} examples of {rows} rows")
    for index in (0, -1):
        images = [
            np.asarray(Image.open(path.parent / made[index]["images"][0]).convert("RGB"))
            for path, made in zip((ours, baseline), records, strict=True)
        ]
        if not np.array_equal(*images):
            raise SystemExit(f"benchmark: error: example {index} differs in its pixels")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time both routes over the same file; each starts from the parquet file and an empty folder every round."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        parquet = scratch / "sat.parquet"
        write_sat_rows(parquet, args.rows)

        def into_new_folder(prepare: Callable[[Path, Path], Path]) -> Path:
            return prepare(parquet, Path(tempfile.mkdtemp(dir=scratch)) / "out")

        ways = {"ours": partial(into_new_folder, prepare_ours), "baseline": partial(into_new_folder, prepare_baseline)}
        seconds, outputs = alternate(ways, args.rounds)
        check_same(outputs["ours"], outputs["baseline"], args.rows)
        result = {"benchmark": "data", "rows": args.rows, "parquet_bytes": parquet.stat().st_size}
    result |= summarise(seconds)
    print(
        f"{args.rows} rows of 640x480 JPEG, {result['parquet_bytes'] / 1e6:.0f} MB; medians of {args.rounds} rounds\n"
        f"  process_dataset.py, from its start to the finished JSON   {result['median']['ours']:9.2f} s\n"
        f"  CSV, pandas, regular expression, PNG, in a warm process   {result['median']['baseline']:9.2f} s\n"
        f"  faster by a factor of                                     {result['ratio']:9.1f}\n"
        "Equal: the input file, the number of examples, the pixels of the first and the last image."
    )
    return result


def add_parser(commands: Any) -> None:
    """The `data` command of `benchmark.py`."""
    parser = commands.add_parser("data", help="prepare SAT, against the route over CSV")
    parser.add_argument("--rows", type=positive, default=15000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: the system's)")
    parser.set_defaults(run=run)
