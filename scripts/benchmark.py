"""Benchmarks: this repository's way against the usual one, in alternating rounds on this machine.

    python scripts/benchmark.py data --rows 15000
    python scripts/benchmark.py eval
    python scripts/benchmark.py step --preset sat-cpu

Medians and their ratio are printed; `--json FILE` keeps every round as well.
"""

import argparse
import codecs
import copy
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.front_door import use_environment

use_environment()

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from open_r1.prompts import REPO_ROOT

# --- what every benchmark shares ---------------------------------------------------------------------


def alternate(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the ways take turns, so that a slow spell of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1, rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"round {number} of {rounds}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and by what factor `ours` is faster than `baseline`."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "median": medians, "ratio": medians["baseline"] / medians["ours"]}


def machine() -> dict[str, Any]:
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}


# --- data: SAT parquet -> images and JSON -------------------------------------------------------------


DISTINCT_SCENES = 300  # drawing more would take longer than what is measured; each is repeated in turn


def write_sat_rows(path: Path, rows: int) -> None:
    """`rows` rows in SAT's schema with 640x480 JPEG images of the rendered world, in one row group as SAT's."""
    from open_r1.world.parquet import SAT_SCHEMA, sat_row
    from open_r1.world.scene import LEVELS

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


def run_data(args: argparse.Namespace) -> dict[str, Any]:
    """Time both routes over the same file; each starts from the parquet file and an empty folder every round."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        parquet = scratch / "sat.parquet"
        write_sat_rows(parquet, args.rows)
        outputs: dict[str, Path] = {}

        def fresh(way: str, prepare: Callable[[Path, Path], Path]) -> Callable[[], None]:
            def run() -> None:
                outputs[way] = prepare(parquet, Path(tempfile.mkdtemp(dir=scratch)) / "out")

            return run

        seconds = alternate(
            {"ours": fresh("ours", prepare_ours), "baseline": fresh("baseline", prepare_baseline)}, args.rounds
        )
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


def add_data_parser(commands: Any) -> None:
    parser = commands.add_parser("data", help="prepare SAT, against the route over CSV")
    parser.add_argument("--rows", type=int, default=15000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: the system's)")
    parser.set_defaults(run=run_data)


# --- eval: answering questions ------------------------------------------------------------------------


def make_uneven_model(items: Sequence[Any], hazard: float, hidden_size: int) -> tuple[Any, Any]:
    """A random Qwen2-VL whose greedy responses end unevenly, as real ones do, and its processor.

    The head raises the end token whenever a random projection of the hidden state falls into a narrow band, which
    happens with probability `hazard` a token and depends on nothing but the row itself: not on its batch, and not
    on who decodes.
    """
    import torch

    from open_r1 import tiny
    from open_r1.modeling import end_token_ids

    class UnevenHead(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # (B, T, D) -> (B, T, V)
            logits = super().forward(hidden)
            logits[..., self.end] += 1e4 * (torch.cos(hidden @ self.direction) > self.threshold)
            return logits

    tokenizer = tiny.make_tokenizer([item.prompt for item in items], vocab_size=1024)
    tokenizer.padding_side = "left"
    processor = tiny.make_processor(tokenizer)
    model = tiny.make_model(tiny.make_config(tokenizer, hidden_size=hidden_size, num_layers=2)).eval()
    head = UnevenHead(hidden_size, len(tokenizer), bias=False)
    head.weight = model.lm_head.weight
    direction = torch.randn(hidden_size, generator=torch.Generator().manual_seed(1))
    head.direction = direction * 20 / hidden_size**0.5  # phases with a standard deviation of 20
    head.threshold = math.cos(math.pi * hazard)
    head.end = end_token_ids(processor)[0]
    model.lm_head = head
    return model, processor


def answer_ours(backend: Any, items: Sequence[Any], batch_size: int) -> list[Any]:
    """Our loop: sorted by length, preprocessed ahead, finished rows dropped. Returns the responses in file order."""
    from open_r1.evaluate.answering import answer_batches, make_batches

    batches = make_batches(backend, items, batch_size)
    responses = {item.key: response for batch in answer_batches(backend, batches) for item, response in batch}
    return [responses[item.key] for item in items]


def answer_plainly(backend: Any, items: Sequence[Any], batch_size: int) -> list[str]:
    """The usual loop: batches in file order, preprocessed in turn, through the model's own `generate`."""
    from open_r1.evaluate.answering import messages, open_image

    texts = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        conversations = [messages([open_image(data) for data in item.images], item.prompt) for item in batch]
        inputs = backend.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            style=backend.style,
        ).to(backend.model.device)
        ids = backend.model.generate(**inputs, generation_config=backend.generation_config)
        texts += backend.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    """Time both loops over the same questions; they must give the same answers."""
    import torch

    from open_r1.evaluate.answering import TransformersBackend
    from open_r1.tasks.benchmarks import BENCHMARKS, read
    from open_r1.world.parquet import write_cvbench
    from open_r1.world.scene import LEVELS

    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        write_cvbench(Path(name), args.rows, 0, LEVELS["full"])
        items = read(BENCHMARKS["CV-Bench"], name)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, processor = make_uneven_model(items, 1 / args.mean_tokens, args.hidden_size)
    made: dict[str, list[Any]] = {}

    def way(answer: Callable[..., list[Any]], name: str) -> Callable[[], None]:
        # Ours changes how the model attends, so that each way has a model of its own.
        backend = TransformersBackend(copy.deepcopy(model), processor, "reasoning", args.max_new_tokens)

        def run() -> None:
            made[name] = answer(backend, items, args.bs)

        return run

    ways = {"ours": way(answer_ours, "ours"), "baseline": way(answer_plainly, "baseline")}
    seconds = alternate(ways, args.rounds)
    if [response.response for response in made["ours"]] != made["baseline"]:
        raise SystemExit("benchmark: error: the two ways answered differently")
    lengths = [response.tokens for response in made["ours"]]
    result = {"benchmark": "eval", "rows": args.rows, "bs": args.bs, "threads": torch.get_num_threads()}
    result |= {"lengths": lengths} | summarise(seconds)
    low, middle, high = (int(value) for value in np.quantile(lengths, (0.25, 0.5, 0.75)))
    print(
        f"{args.rows} questions, batches of {args.bs}, threads: {result['threads']}; medians of {args.rounds} rounds\n"
        f"  tokens in a response: quartiles {low}, {middle}, {high}; longest {max(lengths)}\n"
        f"  sorted, prepared ahead, finished rows dropped   {result['median']['ours']:9.2f} s\n"
        f"  model.generate in file order                    {result['median']['baseline']:9.2f} s\n"
        f"  faster by a factor of                           {result['ratio']:9.2f}\n"
        "Equal: the questions, the batch size, every answer."
    )
    return result


def add_eval_parser(commands: Any) -> None:
    parser = commands.add_parser("eval", help="answer questions, against a loop over model.generate")
    parser.add_argument("--rows", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--bs", type=int, default=16, help="questions a batch (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=350, help="(default: %(default)s)")
    parser.add_argument("--mean_tokens", type=float, default=60, help="about, of a response (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=256, help="of the model (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch, in both loops (default: its own choice)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: the system's)")
    parser.set_defaults(run=run_eval)


# --- the command --------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    commands = parser.add_subparsers(required=True)
    add_data_parser(commands)
    add_eval_parser(commands)
    if "step" in sys.argv or "--help" in sys.argv:  # it imports torch, which the others start faster without
        from benchmark_step import add_step_parser

        add_step_parser(commands)
    args = parser.parse_args()
    result = {"machine": machine(), **args.run(args)}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
