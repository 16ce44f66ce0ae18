"""Answering questions, against a loop over `model.generate`; the `eval` command of `benchmark.py`."""

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import alternate, summarise
from open_r1.base.errors import positive
from open_r1.tasks.benchmarks import BENCHMARKS, read
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS

STYLE = "reasoning"  # of the prompts


def make_uneven_model(items: Sequence[Any], hazard: float, hidden_size: int) -> tuple[Any, Any]:
    """A random Qwen2-VL whose greedy responses end unevenly, as real ones do, and its processor.

    The head raises the end token whenever a random projection of the hidden state falls into a narrow band, which
    happens with probability `hazard` a token and depends on nothing but the row itself: not on its batch, and not
    on who decodes.
    """
    import torch

    from open_r1 import tiny
    from open_r1.models.families import end_token_ids

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


def answer_ours(answerer: Any, items: Sequence[Any], batch_size: int) -> list[Any]:
    """Our loop: sorted by length, preprocessed ahead, finished rows dropped. Returns the responses in file order."""
    from open_r1.evaluation.answering import answer_batches, make_batches

    batches = make_batches(answerer, items, batch_size)
    responses = {item.key: response for batch in answer_batches(answerer, batches) for item, response in batch}
    return [responses[item.key] for item in items]


def answer_plainly(answerer: Any, items: Sequence[Any], batch_size: int) -> list[str]:
    """The usual loop: batches in file order, preprocessed in turn, through the model's own `generate`."""
    from open_r1.base.images import open_image
    from open_r1.evaluation.answering import messages

    texts = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        conversations = [messages([open_image(data) for data in item.images], item.prompt) for item in batch]
        inputs = answerer.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            style=STYLE,
        ).to(answerer.backend.model.device)
        ids = answerer.backend.model.generate(**inputs, generation_config=answerer.generation_config)
        texts += answerer.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time both loops over the same questions; they must give the same answers."""
    import torch

    from open_r1.engines.backends import TransformersBackend
    from open_r1.evaluation.answering import Answerer
    from open_r1.models.loading import reset_generation_config

    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        write_cvbench(Path(name), args.rows, 0, LEVELS["full"])
        items = read(BENCHMARKS["CV-Bench"], name)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, processor = make_uneven_model(items, 1 / args.mean_tokens, args.hidden_size)
    reset_generation_config(model, processor)

    def way(answer: Callable[..., list[Any]]) -> Callable[[], list[Any]]:
        # Ours changes how the model attends, so that each way has a model of its own.
        own = copy.deepcopy(model)
        backend = TransformersBackend(own, processor, lambda: nullcontext(own), style=STYLE)
        answerer = Answerer(backend, processor, args.max_new_tokens)
        return partial(answer, answerer, items, args.bs)

    seconds, made = alternate({"ours": way(answer_ours), "baseline": way(answer_plainly)}, args.rounds)
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


def add_parser(commands: Any) -> None:
    """The `eval` command of `benchmark.py`."""
    parser = commands.add_parser("eval", help="answer questions, against a loop over model.generate")
    parser.add_argument("--rows", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--bs", type=positive, default=16, help="questions a batch (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=positive, default=350, help="(default: %(default)s)")
    parser.add_argument(
        "--mean_tokens", type=positive, default=60, help="about how long responses are (default: %(default)s)"
    )
    parser.add_argument(
        "--hidden_size", type=positive, default=256, help="width of the random model (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, help="of PyTorch, in both loops (default: its own choice)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for the files (default: the system's)")
    parser.set_defaults(run=run)
