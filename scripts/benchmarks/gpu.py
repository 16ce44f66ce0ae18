"""What `gpu_check.py` measures, a function each, from a model of random weights: figures by their names, with units.

On a GPU the model has Qwen2-VL-2B's configuration and Qwen's tokenizer. On a CPU it is a toy, and the figures say only
that these lines run.
"""

import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, ProcessorMixin

from benchmarks.step import (
    PRESETS,
    ROWS,
    Preset,
    count_work,
    given_completions,
    instrument,
    make_dataset,
    make_trainer,
    memory_status,
    run_step,
    write_checkpoint,
)
from open_r1 import grpo
from open_r1.backends import Backend
from open_r1.entry import quiet
from open_r1.evaluate.answering import (
    BACKENDS,
    Answerer,
    answer_batches,
    generation_settings,
    load_prompting,
    make_batches,
)
from open_r1.evaluate.answering import messages as with_images
from open_r1.front_door import Mistake
from open_r1.images import open_image
from open_r1.published import save_random_2b
from open_r1.recipes import read_recipe
from open_r1.shared_prefix import (
    Layout,
    attend_groups,
    attend_paths,
    choose_attention,
    decode_attention,
    locate_group,
)
from open_r1.tasks.benchmarks import BENCHMARKS, read
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS

Figures = dict[str, float]

# Dense FLOP/s in 16 bits with float32 sums, by a part of the card's name, as NVIDIA's data sheets have them.
PEAK_FLOPS = {
    "A100": 312e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
CARDS = (16, 24)  # GB of the smaller cards that an adapter is tried on
TOLERANCE = 0.02  # of attention in bfloat16, relative: its numbers have 8 bits
ROUNDS = 2  # steps that are timed, after one to warm up
GPU_PRESET = replace(PRESETS["sat-2b"], min_length=100, max_length=400)
TOY_PRESET = replace(
    PRESETS["sat-cpu"],
    image_side=112,
    question_words=8,
    group_size=4,
    min_length=4,
    max_length=12,
    mean_extra=4,
)


class Impossible(Exception):
    """What cannot be measured here, and why."""


@dataclass(frozen=True)
class Bench:
    """Where the measurements find what they share.

    Attributes:
        preset: sizes of model, prompts and completions.
        folder: everything that is made.
        data: prompts of one step, as the trainers take them.
        questions: of the evaluation.
    """

    preset: Preset
    folder: Path
    data: Dataset
    questions: int

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / "model"

    @property
    def is_toy(self) -> bool:
        """Whether this only rehearses the check."""
        return self.preset is TOY_PRESET


def prepare(folder: Path, is_toy: bool) -> Bench:
    """Make the checkpoint, the prompts of a step in both forms that trainers read, and an evaluation's questions."""
    quiet()
    preset, questions = (TOY_PRESET, 4) if is_toy else (GPU_PRESET, 64)
    if is_toy:
        write_checkpoint(preset, folder / "model")
    else:
        save_random_2b(folder / "model", device="cuda")
    data = make_dataset(preset, folder)
    examples = [
        {
            "messages": [
                {"role": "user", "content": "<image>" + row["prompt"][0]["content"]},
                {"role": "assistant", "content": "left"},
            ],
            "images": row["images"],
        }
        for row in data
    ]
    (folder / "examples.json").write_text(json.dumps(examples))
    write_cvbench(folder / "cvbench", questions, 0, LEVELS["full"])
    release()
    return Bench(preset, folder, data, questions)


# --- the device ----------------------------------------------------------------------------------------------


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    torch.cuda.empty_cache()


def mean_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, after one to warm up."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeats


@contextmanager
def peak_memory(figures: Figures) -> Iterator[None]:
    """Add the most memory that the block held, with all that was held before it; of a CPU this process's so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
    most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory_status("VmHWM")
    figures["peak memory, GB"] = most / 1e9


@contextmanager
def at_most(gigabytes: float) -> Iterator[None]:
    """In the block, take no more of the GPU than a smaller one has; what lies outside of torch's allocator counts."""
    if not torch.cuda.is_available():
        yield
        return
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((gigabytes * 1e9 - outside) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_flops() -> float | None:
    """Dense FLOP/s of the GPU in 16 bits; None for one that is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [part for part in PEAK_FLOPS if part in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def utilisation(multiply_adds: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: the share of a card's peak FLOP/s that work amounts to; a multiply-add is two."""
    return 2 * multiply_adds / seconds / peak


# --- attention -----------------------------------------------------------------------------------------------


def draw(shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Normal numbers that bfloat16 holds, on the device."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(device(), torch.bfloat16) for shape in shapes]


def largest_difference(some: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest relative difference of a tensor from what it should be.

    Raises:
        Mistake: it is more than rounding.
    """
    differences = [
        ((mine.float().cpu() - theirs).norm() / theirs.norm()).item() for mine, theirs in zip(some, exact, strict=True)
    ]
    if not max(differences) <= TOLERANCE:  # nor NaN
        raise Mistake(f"bfloat16 on {device()} differs from float32 on the CPU by {max(differences):.1%}")
    return max(differences)


def head_sizes(preset: Preset) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and their dimension."""
    heads = preset.text["num_attention_heads"]
    return heads, preset.text["num_key_value_heads"], preset.text["hidden_size"] // heads


def prompt_length(preset: Preset) -> int:
    """About how many tokens a prompt has: a token a word and 28x28 pixels."""
    return (preset.image_side // 28) ** 2 + preset.question_words


def packed_attention(bench: Bench, attend: Callable[..., torch.Tensor]) -> Figures:
    """A packed row of two groups, forward and backward: bfloat16 here, and float32 on the CPU."""
    if attend is attend_paths and choose_attention(*draw([(1,)])) is not attend_paths:
        raise Impossible("torch's flash attention runs on NVIDIA GPUs of compute capability 8.0 or more")
    size, lengths = bench.preset.group_size, list(map(len, given_completions(bench.preset)))

    def make_layout(place: torch.device | str) -> Layout:
        first = locate_group(0, prompt_length(bench.preset), lengths[:size], place)
        return Layout([first, locate_group(first.length, first.prefix, lengths[size : 2 * size], place)])

    layout = make_layout(device())
    heads, key_heads, dim = head_sizes(bench.preset)
    length = sum(group.length for group in layout.groups)
    *states, weights = draw([(1, n, length, dim) for n in (heads, key_heads, key_heads)] + [(1, length, heads, dim)])
    for state in states:
        state.requires_grad_()

    def forward_and_backward(
        way: Callable[..., torch.Tensor], states: list[torch.Tensor], layout: Layout
    ) -> list[torch.Tensor]:
        output = way(*states, layout, None)
        return [output.detach(), *torch.autograd.grad(output, states, weights.to(output))]

    exact = [state.detach().float().cpu().requires_grad_() for state in states]
    made = forward_and_backward(attend, states, layout)
    difference = largest_difference(made, forward_and_backward(attend_groups, exact, make_layout("cpu")))
    seconds = mean_seconds(lambda: forward_and_backward(attend, states, layout), 1 if bench.is_toy else 20)
    return {"difference from float32": difference, "forward and backward, ms": seconds * 1e3}


def decoding_attention(bench: Bench) -> Figures:
    """The newest token of every completion of a step, over a cache of full length."""
    heads, key_heads, dim = head_sizes(bench.preset)
    batch = bench.preset.group_size * bench.preset.prompts_per_step
    length = prompt_length(bench.preset) + bench.preset.max_length
    states = draw([(batch, heads, 1, dim), (batch, key_heads, length, dim), (batch, key_heads, length, dim)])
    mask = (torch.arange(length) >= torch.arange(batch)[:, None] % length)[:, None, None]  # of padding on the left
    exact = decode_attention(*(state.float().cpu() for state in states), mask, None)
    on_device = mask.to(device())
    difference = largest_difference([decode_attention(*states, on_device, None)], [exact])
    seconds = mean_seconds(lambda: decode_attention(*states, on_device, None), 1 if bench.is_toy else 100)
    return {"difference from float32": difference, "ms": seconds * 1e3}


# --- training ------------------------------------------------------------------------------------------------


def step(bench: Bench, way: str) -> Figures:
    """An optimiser step of everything with plain AdamW, on the same completions for both ways.

    The utilisation counts what has to be computed, each prompt once, whatever the way computes.
    """
    trainer = make_trainer(way, bench.preset, bench.model, bench.data, checkpointing=False)
    completions = given_completions(bench.preset)
    watch = instrument(trainer, completions)
    run_step(trainer, watch)
    memory: Figures = {}
    with peak_memory(memory):
        rounds = [run_step(trainer, watch) for _ in range(ROUNDS)]
    seconds = {part: statistics.median(each[part] for each in rounds) for part in ROWS}
    figures = {f"{part}, s": value for part, value in seconds.items()}
    figures["completion tokens a second"] = sum(map(len, completions)) / seconds["whole step"]
    if peak := peak_flops():
        work = count_work(trainer, bench.preset, completions)
        for part in ("reference scoring", "policy update", "whole step"):
            figures[f"MFU of {part}, %"] = 100 * utilisation(work[part]["ours"], seconds[part], peak)
    return figures | memory


def adapter_step(bench: Bench, overlay: str) -> Figures:
    """The first step of the shipped recipe with an adapter, every completion at full length, in a smaller card's room.

    Raises:
        Impossible: it fits none.
    """
    for size in CARDS:
        try:
            with at_most(size):
                room = {"runs within, GB": size} if torch.cuda.is_available() else {}
                return room | first_step(bench, overlay)
        except torch.OutOfMemoryError:
            pass  # its trainer is released with the exception
        release()
    raise Impossible(f"out of memory within {CARDS[-1]} GB")


def first_step(bench: Bench, overlay: str) -> Figures:
    """The first step of `grpo_sat.yaml` with an overlay, in this process."""
    settings = {
        "model_name_or_path": bench.model,
        "dataset_name": bench.folder / "examples.json",
        "output_dir": bench.folder / overlay,
        "max_completion_length": bench.preset.max_length,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "reward_funcs": "format",
    }
    if bench.is_toy:
        size, batch = bench.preset.group_size, bench.preset.group_size * bench.preset.prompts_per_step
        settings |= {"num_generations": size, "per_device_train_batch_size": size, "completions_per_step": batch}
        settings |= {"use_cpu": "true", "bf16": "false", "dtype": "float32"}
    recipes = ("configs/grpo_sat.yaml", f"configs/overlays/{overlay}.yaml")
    arguments = [text for recipe in recipes for text in ("--config", recipe)]
    arguments += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    figures: Figures = {}
    with peak_memory(figures):
        trainer = grpo.build_trainer(*read_recipe(grpo.COMMAND.arguments, arguments))
        trainer.train()
    log = next(event for event in trainer.state.log_history if "loss" in event)
    parts = {"rollout": "time/rollout", "reference scoring": "time/scoring", "update": "time/update"}
    return {f"{part}, s": log[name] for part, name in parts.items()} | {"whole step, s": log["step_time"]} | figures


# --- generating ----------------------------------------------------------------------------------------------


def generate(bench: Bench, name: str) -> Figures:
    """An evaluation's questions, greedily, and a step's completions, sampled, by a backend of the evaluation.

    Everything runs to its full length: random weights hardly ever end it.
    """
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise Impossible("vLLM is not installed; setup.sh installs it where there is an NVIDIA GPU")
    style = {"style": "reasoning"}
    processor, _ = load_prompting(bench.model, "base", **style)
    backend = BACKENDS[name](bench.model, processor, device(), bench.preset.dtype, **style)
    answered, answering_seconds = answer(bench, Answerer(backend, processor, bench.preset.max_length))
    sampled, sampling_seconds = sample(bench, backend, processor)
    return {
        "evaluation, questions a second": bench.questions / answering_seconds,
        "evaluation, tokens a second": answered / answering_seconds,
        "rollout, s": sampling_seconds,
        "rollout, tokens a second": sampled / sampling_seconds,
    }


def answer(bench: Bench, answerer: Answerer) -> tuple[int, float]:
    """Tokens and seconds of answers to questions of CV-Bench's kind, 640x480, in one batch."""
    batches = make_batches(answerer, read(BENCHMARKS["CV-Bench"], str(bench.folder / "cvbench")), bench.questions)
    start = time.perf_counter()
    tokens = sum(response.tokens for batch in answer_batches(answerer, batches) for _, response in batch)
    return tokens, time.perf_counter() - start


def sample(bench: Bench, backend: Backend, processor: ProcessorMixin) -> tuple[int, float]:
    """Tokens and seconds of a step's rollout; the prompts are new to the backend, so that none is in a cache."""
    settings = generation_settings(processor, bench.preset.max_length)
    settings |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    start = time.perf_counter()
    prompts = [
        backend.encode(with_images([open_image(path) for path in row["images"]], row["prompt"][0]["content"]))
        for row in bench.data
    ]
    repeats = [bench.preset.group_size] * len(prompts)
    completions = backend.generate(prompts, repeats, GenerationConfig(**settings))
    return sum(map(len, completions.ids)), time.perf_counter() - start


# In the order of what is wanted most, should time run out; vLLM last, since it keeps memory.
MEASUREMENTS: dict[str, Callable[[Bench], Figures]] = {
    "attention of packed groups, SDPA": partial(packed_attention, attend=attend_groups),
    "attention of packed groups, flash along paths": partial(packed_attention, attend=attend_paths),
    "attention of a decoding step": decoding_attention,
    "step, this trainer": partial(step, way="ours"),
    "step, stock TRL": partial(step, way="stock"),
    "step with LoRA": partial(adapter_step, overlay="lora"),
    "step with QLoRA": partial(adapter_step, overlay="qlora"),
    "evaluation and rollout, transformers": partial(generate, name="hf"),
    "evaluation and rollout, vLLM": partial(generate, name="vllm"),
}
