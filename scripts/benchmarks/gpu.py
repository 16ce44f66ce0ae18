"""What `gpu_check.py` measures, on a model of random weights: functions that yield figures as they know them.

Figures go by their names, with units. On a GPU the model has Qwen2-VL-2B's configuration and Qwen's tokenizer. On a CPU
it is a toy, and the figures say only that these lines run.
"""

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, ProcessorMixin

from benchmarks.published import MODELS, save_random
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
from open_r1.base.errors import REPO_ROOT, Mistake, first_line
from open_r1.base.files import MADE_BY, replace_file, to_json
from open_r1.base.images import open_image
from open_r1.engines.attention import attend_groups, attend_paths, choose_attention, decode_attention
from open_r1.engines.backends import Backend
from open_r1.engines.layout import Layout, locate_group
from open_r1.engines.shared_prefix import Prompt
from open_r1.evaluation import answering
from open_r1.running.entry import quiet
from open_r1.settings.recipes import read_recipe
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
GPU_PRESET = replace(PRESETS["sat-2b"], min_length=100, max_length=300, mean_extra=100)
TOY_PRESET = replace(
    PRESETS["sat-cpu"],
    image_side=112,
    question_words=8,
    group_size=4,
    min_length=4,
    max_length=12,
    mean_extra=4,
)
# A kernel's launch, and the host's waits for the GPU, by their names in torch's profiler
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Impossible(Exception):
    """What cannot be measured here, and why."""


@dataclass(frozen=True)
class Bench:
    """Where the measurements, each in a process of its own, find what they share.

    Attributes:
        folder: everything that is made.
        is_toy: whether this only rehearses the check.
    """

    folder: Path
    is_toy: bool

    @property
    def preset(self) -> Preset:
        """Sizes of model, prompts and completions."""
        return TOY_PRESET if self.is_toy else GPU_PRESET

    @property
    def questions(self) -> int:
        """Of the evaluation."""
        return 4 if self.is_toy else 64

    def options(self, **settings: Any) -> list[str]:
        """A training command's options, with a group's sizes of the toy where this is one."""
        if self.is_toy:
            group, prompts = self.preset.group_size, self.preset.prompts_per_step
            settings |= {"num_generations": group, "per_device_train_batch_size": group}
            settings["completions_per_step"] = group * prompts
        settings |= {"save_strategy": "no", "report_to": "none", "reward_funcs": "format"}
        return [text for name, value in settings.items() for text in (f"--{name}", str(value))]

    @property
    def model(self) -> Path:
        """The checkpoint that `prepare` made.

        Raises:
            Impossible: it could not.
        """
        path = self.folder / "model"
        if not path.exists():
            raise Impossible("there is no model: making it failed")
        return path

    @cached_property
    def data(self) -> Dataset:
        """Prompts of one step, as the trainers take them."""
        return make_dataset(self.preset, self.folder)


def prepare(bench: Bench) -> Iterator[Figures]:
    """Make the checkpoint, the prompts of a step as the recipes read them, and an evaluation's questions."""
    made = bench.folder / "in the making"
    start = time.perf_counter()
    if bench.is_toy:
        write_checkpoint(bench.preset, made)
    else:
        save_random(MODELS["qwen2_vl_2b"], made, device="cuda")
    yield {"made and written, s": time.perf_counter() - start}
    examples = []
    for row in bench.data:
        question = {"role": "user", "content": "<image>" + row["prompt"][0]["content"]}
        answer = {"role": "assistant", "content": "left"}
        examples.append({"messages": [question, answer], "images": row["images"]})
    (bench.folder / "examples.json").write_text(json.dumps(examples))
    write_cvbench(bench.folder / "cvbench", bench.questions, 0, LEVELS["full"])
    made.rename(bench.folder / "model")  # whole
    yield {"written, GB": sum(path.stat().st_size for path in bench.model.iterdir()) / 1e9}


# --- one measurement ------------------------------------------------------------------------------


def main() -> None:
    """Measure one, in the process that `gpu_check.py` made for it.

    Its arguments are the measurement's name, the folder that all share, `toy` or `gpu`, and the file that gets what is
    known so far, after every figure.
    """
    name, folder, size, path = sys.argv[1:]
    quiet()
    # cuDNN's attention plans anew for every length, which would be most of what is timed; stock TRL goes without, too
    torch.backends.cuda.enable_cudnn_sdp(False)
    bench = Bench(Path(folder), size == "toy")
    about = {"about": describe(bench)}
    attempt(MEASUREMENTS[name], bench, lambda told: replace_file(Path(path), to_json(about | told)))


def attempt(
    measure: Callable[[Bench], Iterator[Figures]], bench: Bench | None, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Measure, and tell what is known after every part, and at the end whatever came of it."""
    figures: Figures = {}
    reason, failed = "", False
    try:
        for part in measure(bench):
            figures |= part
            tell({"figures": figures})
    except Impossible as error:
        reason = f"not run: {error}"
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {first_line(error)}"
    except Exception as error:
        traceback.print_exc()
        reason, failed = f"failed: {type(error).__name__}: {first_line(error)}", True
    tell({"figures": figures, "reason": reason, "failed": failed})


def describe(bench: Bench) -> str:
    """What is measured on what."""
    preset = bench.preset
    if bench.is_toy:
        return "A rehearsal of the check itself: a toy model on the CPU. No figure here says anything about a GPU."
    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.total_memory / 1e9:.0f} GB, {date.today().isoformat()}, torch {torch.__version__}. "
        f"Qwen2-VL-2B's configuration, random weights, {preset.dtype}; a step is {preset.prompts_per_step} prompts "
        f"with an image of {preset.image_side}x{preset.image_side}, {preset.group_size} completions each, of "
        f"{preset.min_length} to {preset.max_length} tokens."
    )


# --- the device -----------------------------------------------------------------------------------


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    torch.cuda.set_per_process_memory_fraction(min((gigabytes * 1e9 - outside) / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_flops() -> float | None:
    """Dense FLOP/s of the GPU in 16 bits; None for one that is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [part for part in PEAK_FLOPS if part in name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


# --- attention ------------------------------------------------------------------------------------


def draw(shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Normal numbers that bfloat16 holds, on the device."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(device(), torch.bfloat16) for shape in shapes]


def largest_difference(made: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest relative difference of a tensor from what it should be.

    Raises:
        Mistake: it is more than rounding.
    """
    differences = []
    for tensor, reference in zip(made, exact, strict=True):
        differences.append(((tensor.float().cpu() - reference).norm() / reference.norm()).item())
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


def attention_tests(bench: Bench) -> Iterator[Figures]:
    """The tests that need a GPU and no model, of the files that have some; without one all are skipped."""
    if importlib.util.find_spec("pytest") is None:
        raise Impossible("pytest is not installed")
    import pytest

    tests = REPO_ROOT / "tests"
    files = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    counts: Counter[str] = Counter()

    class Tally:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1

    sys.path.insert(0, str(tests))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of other packages on the machine
    options = ["-q", "-m", "gpu and not slow", "-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(REPO_ROOT)]
    code = pytest.main([*options, *map(str, files)], plugins=[Tally()])
    yield {"tests passed": counts["passed"], "skipped": counts["skipped"]}
    if code != pytest.ExitCode.OK:
        raise Mistake(f"pytest's exit code is {int(code)}, {counts['failed']} tests failed; they are told above")


def attention(bench: Bench) -> Iterator[Figures]:
    """What attends, in 16 bits: how far it is from float32, and how long it takes."""
    for kind, measure in (
        ("packed groups by SDPA", partial(packed_attention, attend=attend_groups)),
        ("packed groups by flash along paths", partial(packed_attention, attend=attend_paths)),
        ("a decoding step", decoding_attention),
    ):
        if "flash" in kind and choose_attention(*draw([(1,)])) is not attend_paths:
            continue  # it runs on NVIDIA GPUs of compute capability 8.0 or more
        difference, seconds = measure(bench)
        yield {f"{kind}, difference from float32": difference, f"{kind}, ms": seconds * 1e3}


def packed_attention(bench: Bench, attend: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """A packed row of two groups, forward and backward: its difference from float32 on the CPU, and seconds."""
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
    return difference, mean_seconds(lambda: forward_and_backward(attend, states, layout), 1 if bench.is_toy else 20)


def decoding_attention(bench: Bench) -> tuple[float, float]:
    """The newest token of every completion of a step, over a cache of full length."""
    heads, key_heads, dim = head_sizes(bench.preset)
    batch = bench.preset.group_size * bench.preset.prompts_per_step
    length = prompt_length(bench.preset) + bench.preset.max_length
    states = draw([(batch, heads, 1, dim), (batch, key_heads, length, dim), (batch, key_heads, length, dim)])
    mask = (torch.arange(length) >= torch.arange(batch)[:, None] % length)[:, None, None]  # of padding on the left
    exact = decode_attention(*(state.float().cpu() for state in states), mask, None)
    on_device = mask.to(device())
    difference = largest_difference([decode_attention(*states, on_device, None)], [exact])
    return difference, mean_seconds(lambda: decode_attention(*states, on_device, None), 1 if bench.is_toy else 100)


# --- decoding -------------------------------------------------------------------------------------


def growing_decoding(bench: Bench, cudnn: bool) -> Iterator[Figures]:
    """Decode to lengths that the process has not seen, and to the same lengths again.

    Where cuDNN attends it plans for each new length, and keeps the plan: a second rollout hides what the first cost.
    """
    backend, processor = load_backend(bench, "hf")
    torch.backends.cuda.enable_cudnn_sdp(cudnn)  # loading a model may have switched it
    prompts = encode_rows(bench, backend)
    sample(bench, backend, processor, prompts, 2)  # kernels are loaded when they first run
    tokens = 4 if bench.is_toy else 48
    for times in ("new lengths", "the same again"):
        _, seconds = sample(bench, backend, processor, prompts, tokens)
        yield {f"{times}, ms a token with its share of the prefill": 1e3 * seconds / tokens}
    if torch.backends.cuda.cudnn_sdp_enabled() is not cudnn:
        raise Mistake(f"cuDNN's attention was to be {'on' if cudnn else 'off'}, and decoding switched it")


def profiled_rollout(bench: Bench) -> Iterator[Figures]:
    """A rollout of 64 x 100 tokens; then what a token costs in launches, waits and kernels, by torch's profiler.

    A profile of few tokens is taken from one of a few more, so that prefill and images are in none of these.
    """
    backend, processor = load_backend(bench, "hf")
    few, more, whole = (2, 4, 8) if bench.is_toy else (2, 12, 100)
    prompts = encode_rows(bench, backend)
    sample(bench, backend, processor, prompts, few)
    sampled, seconds = sample(bench, backend, processor, prompts, whole)
    yield {"s": seconds, "ms a token": 1e3 * seconds / whole, "tokens a second": sampled / seconds}
    counts = []
    for tokens in (few, more):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]) as seen:
            sample(bench, backend, processor, prompts, tokens)
        counts.append(count_events(seen.key_averages()))
    for name in counts[0]:
        yield {f"{name} a token": (counts[1][name] - counts[0][name]) / (more - few)}
    most = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    text = seen.key_averages().table(sort_by=most, row_limit=60, max_name_column_width=100)
    path = bench.folder.parent / "gpu_check_profile.txt"
    replace_file(path, f"A rollout of {more} tokens, prefill included; {MADE_BY}\n{text}\n".encode())


def count_events(events: Sequence[Any]) -> Figures:
    """What torch's profiler saw, each kind of event with its number and its time in all."""
    # others have their kernels' time, too
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    return {
        "kernel launches": sum(event.count for event in events if event.key.startswith(LAUNCHES)),
        "host waits": sum(event.count for event in events if event.key in WAITS),
        "ms of kernels": sum(event.self_device_time_total for event in kernels) / 1e3,
    }


# --- training -------------------------------------------------------------------------------------


def step(bench: Bench, way: str) -> Iterator[Figures]:
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
    seconds = {part: statistics.median(one_step[part] for one_step in rounds) for part in ROWS}
    figures = {f"{part}, s": value for part, value in seconds.items()}
    figures["completion tokens a second"] = sum(map(len, completions)) / seconds["whole step"]
    if peak := peak_flops():
        work = count_work(trainer, bench.preset, completions)
        for part in ("reference scoring", "policy update", "whole step"):
            # of the card's FLOP/s; a multiply-add is two
            figures[f"MFU of {part}, %"] = 100 * 2 * work[part]["ours"] / seconds[part] / peak
    yield figures | memory


def adapter_step(bench: Bench, overlay: str) -> Iterator[Figures]:
    """The first step of the shipped recipe with an adapter, every completion at full length, in a smaller card's room.

    Raises:
        Impossible: it fits none.
    """
    for size in CARDS:
        try:
            with at_most(size):
                room = {"runs within, GB": size} if torch.cuda.is_available() else {}
                yield room | first_step(bench, overlay)
                return
        except torch.OutOfMemoryError:
            pass  # its trainer is released with the exception
        gc.collect()
        torch.cuda.empty_cache()
    raise Impossible(f"out of memory within {CARDS[-1]} GB")


def first_step(bench: Bench, overlay: str) -> Figures:
    """The first step of `grpo_sat.yaml` with an overlay, in this process."""
    arguments = bench.options(
        model_name_or_path=bench.model,
        dataset_name=bench.folder / "examples.json",
        output_dir=bench.folder / overlay,
        max_completion_length=bench.preset.max_length,
        max_steps=1,
        disable_tqdm="true",
        **({"use_cpu": "true", "bf16": "false", "dtype": "float32"} if bench.is_toy else {}),
    )
    arguments += ["--config", "configs/grpo_sat.yaml", "--config", f"configs/overlays/{overlay}.yaml"]
    figures: Figures = {}
    with peak_memory(figures):
        trainer = grpo.build_trainer(*read_recipe(grpo.COMMAND.arguments, arguments))
        trainer.train()
    log = next(event for event in trainer.state.log_history if "loss" in event)
    parts = {"rollout": "time/rollout", "reference scoring": "time/scoring", "update": "time/update"}
    return {f"{part}, s": log[name] for part, name in parts.items()} | {"whole step, s": log["step_time"]} | figures


def paper_command(bench: Bench) -> Iterator[Figures]:
    """Two steps of `run_grpo_SAT.sh`, under ZeRO-2 where DeepSpeed is installed, else under DDP.

    The second step is what a run's steps take; the first also loads kernels.

    Raises:
        Impossible: it does not fit on this GPU.
    """
    launch = "zero2" if importlib.util.find_spec("deepspeed") else "ddp"
    output = bench.folder / "run"
    arguments = bench.options(max_steps=2, max_completion_length=12 if bench.is_toy else 200)
    env = {"MODEL": bench.model, "DATA": bench.folder / "examples.json", "OUTPUT": output, "PYTHON": sys.executable}
    env |= {"ACCELERATE_CONFIG": launch, "NUM_PROCESSES": 1}
    start = time.perf_counter()
    run = subprocess.Popen(
        ["sh", REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh", *arguments],
        env=os.environ | {name: str(value) for name, value in env.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lacks_memory = False
    for line in run.stdout:
        print(line, end="", file=sys.stderr)
        lacks_memory |= "OutOfMemoryError" in line
    if run.wait() and lacks_memory:
        raise Impossible(f"out of memory, under {launch}")
    if run.returncode:
        raise Mistake(f"run_grpo_SAT.sh under {launch} ended with exit code {run.returncode}; it is told above")
    logs = [log for log in map(json.loads, (output / "log.jsonl").open()) if "loss" in log]
    figures = {f"{launch}, whole command, s": time.perf_counter() - start}
    for order, log in zip(("first", "second"), logs, strict=True):
        figures |= {
            f"{launch}, {order} step, s": log["step_time"],
            f"{launch}, {order} rollout, s": log["time/rollout"],
        }
    yield figures


# --- generating -----------------------------------------------------------------------------------


def load_backend(bench: Bench, name: str) -> tuple[Backend, ProcessorMixin]:
    """An engine of the evaluation with the model, and its processor."""
    style = {"style": "reasoning"}
    processor, _ = answering.load_prompting(bench.model, "base", **style)
    backend = answering.BACKENDS[name](bench.model, processor, device(), bench.preset.dtype, **style)
    return backend, processor


def generate(bench: Bench, name: str) -> Iterator[Figures]:
    """An evaluation's questions, greedily, and a step's completions, sampled, by a backend of the evaluation.

    Everything runs to its full length: random weights hardly ever end it.
    """
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise Impossible("vLLM is not installed; setup.sh installs it where there is an NVIDIA GPU")
    backend, processor = load_backend(bench, name)
    answerer = answering.Answerer(backend, processor, bench.preset.max_length)
    questions = read(BENCHMARKS["CV-Bench"], str(bench.folder / "cvbench"))
    batches = answering.make_batches(answerer, questions, bench.questions)  # one
    start = time.perf_counter()
    (answers,) = answering.answer_batches(answerer, batches)
    answered, seconds = sum(response.tokens for _, response in answers), time.perf_counter() - start
    yield {
        "evaluation, questions a second": bench.questions / seconds,
        "evaluation, tokens a second": answered / seconds,
    }
    start = time.perf_counter()  # the prompts are new to the backend, so that none is in a cache
    sampled, _ = sample(bench, backend, processor, encode_rows(bench, backend), bench.preset.max_length)
    seconds = time.perf_counter() - start
    yield {"rollout, s": seconds, "rollout, tokens a second": sampled / seconds}


def encode_rows(bench: Bench, backend: Backend) -> list[Prompt]:
    """The prompts of a step, as the backend takes them."""
    return [
        backend.encode(answering.messages(list(map(open_image, row["images"])), row["prompt"][0]["content"]))
        for row in bench.data
    ]


def sample(
    bench: Bench, backend: Backend, processor: ProcessorMixin, prompts: Sequence[Prompt], tokens: int
) -> tuple[int, float]:
    """Tokens and seconds of a step's rollout, a completion of so many tokens."""
    settings = answering.generation_settings(processor, tokens)
    settings |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    start = time.perf_counter()
    completions = backend.generate(prompts, [bench.preset.group_size] * len(prompts), GenerationConfig(**settings))
    return sum(map(len, completions.ids)), time.perf_counter() - start


MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Figures]]] = {  # gpu_check.py has their order and limits
    "attention tests": attention_tests,
    "attention": attention,
    "model": prepare,
    "decoding, cuDNN's attention off": partial(growing_decoding, cudnn=False),
    "decoding, cuDNN's attention on": partial(growing_decoding, cudnn=True),
    "rollout of 64 x 100 tokens": profiled_rollout,
    "step, this trainer": partial(step, way="ours"),
    "step, stock TRL": partial(step, way="stock"),
    "step with LoRA": partial(adapter_step, overlay="lora"),
    "step with QLoRA": partial(adapter_step, overlay="qlora"),
    "two steps of run_grpo_SAT.sh": paper_command,
    "evaluation and rollout, transformers": partial(generate, name="hf"),
    "evaluation and rollout, vLLM": partial(generate, name="vllm"),
}
