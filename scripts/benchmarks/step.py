"""The GRPO step of this repository against stock `trl.GRPOTrainer`; the `step` command of `benchmark.py`.

Both trainers live in one process with the same weights, data, settings and number of threads, and take turns. A round
is one optimiser step each, so a slow spell of the machine hits both. Timed are, inside the real trainer code: the
rollout, image preprocessing, reference scoring, the policy's forward and backward, and the step around them.

What is equal: both sample with the same law (an end token made likely, so that lengths vary as a model's do); scoring
and update then run on one fixed set of completions, so that both do the same job. tests/test_shared_prefix.py holds the
numbers of both equal.

"possible" is arithmetic: the multiply-adds that stock runs over those of the unique tokens and patches. "reached" is
the measured ratio's share of it; it can exceed 1 where stock loses time on other things than multiply-adds.
"""

import argparse
import ctypes
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PreTrainedModel
from trl import GRPOTrainer

from benchmarks.published import TEXT, VISION, make_2b_config
from open_r1.base.errors import positive
from open_r1.base.prompts import load_chat_template
from open_r1.engines.backends import Completions
from open_r1.models.families import FAMILIES, family_of
from open_r1.models.loading import load_config, load_model, load_processor
from open_r1.tiny import make_config, make_model, make_processor, make_tokenizer
from open_r1.trainer.trainer import Qwen2VLGRPOConfig, Qwen2VLGRPOTrainer

WAYS = {"stock": GRPOTrainer, "ours": Qwen2VLGRPOTrainer}
WORDS = ("where", "is", "the", "red", "ball", "large", "green", "box", "seen", "from", "left", "side", "of", "room")


@dataclass(frozen=True)
class Preset:
    """A size to measure at. Lengths in tokens, image sides in pixels."""

    text: dict[str, Any]
    vision: dict[str, Any]
    dtype: str
    image_side: int
    question_words: int
    group_size: int
    prompts_per_step: int
    min_length: int
    max_length: int
    mean_extra: float  # of a completion beyond min_length; the end token's probability is its inverse
    family: str = "qwen2_vl"  # another has its tiny configuration, of these widths and depths


PRESETS = {
    "sat-cpu": Preset(
        text={
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        # as in the 2B model at 512x512, the tower is about 1.5 times the work of the prompt's tokens
        vision={"depth": 4, "embed_dim": 256, "num_heads": 4, "hidden_size": 256},
        dtype="float32",
        image_side=280,
        question_words=60,
        group_size=8,
        prompts_per_step=2,
        min_length=32,
        max_length=128,
        mean_extra=32,
    ),
    # Qwen2-VL-2B's own configuration, random weights
    "sat-2b": Preset(
        text=TEXT,
        vision=VISION,
        dtype="bfloat16",
        image_side=512,
        question_words=60,
        group_size=8,
        prompts_per_step=8,
        min_length=50,
        max_length=700,
        mean_extra=150,
    ),
}


# --- what is measured ------------------------------------------------------------------------------


def write_checkpoint(preset: Preset, folder: Path) -> None:
    """A random checkpoint of the preset's size with a tokenizer of one token a byte."""
    # about a token a word, as the published vocabulary has it
    texts = [" ".join(WORDS), load_chat_template("base")] * 9
    tokenizer = make_tokenizer(texts, vocab_size=1024, model_type=preset.family)
    make_processor(tokenizer, preset.family).save_pretrained(folder)
    if preset.family == "qwen2_vl":
        config = make_2b_config(tokenizer, preset.text, preset.vision)
    else:
        widths = {name: preset.text[name] for name in ("hidden_size", "intermediate_size")}
        widths |= {"vision_size": preset.vision["embed_dim"], "head_dim": 64}
        depths = {"num_layers": preset.text["num_hidden_layers"], "vision_layers": preset.vision["depth"]}
        config = make_config(tokenizer, preset.family, **widths, **depths)
    make_model(config).to(getattr(torch, preset.dtype)).save_pretrained(folder)


def make_dataset(preset: Preset, folder: Path) -> Dataset:
    """As many noise images with random questions as a step needs."""
    draw = random.Random(0)
    rows = []
    for index in range(preset.prompts_per_step):
        path = folder / f"{index}.png"
        Image.effect_noise((preset.image_side, preset.image_side), 60).convert("RGB").save(path)
        question = " ".join(draw.choice(WORDS) for _ in range(preset.question_words))
        rows.append({"prompt": [{"role": "user", "content": question}], "images": [str(path)]})
    return Dataset.from_list(rows)


def make_trainer(way: str, preset: Preset, checkpoint: Path, data: Dataset, checkpointing: bool) -> GRPOTrainer:
    """A trainer that is ready to step, with its optimiser."""
    processor = load_processor(checkpoint, chat_template="base", max_pixels=401408)
    end, tokens = processor.tokenizer.eos_token_id, load_config(checkpoint).get_text_config().vocab_size
    args = Qwen2VLGRPOConfig(
        output_dir=tempfile.mkdtemp(dir=checkpoint.parent),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # weights and computation are in the preset's dtype
        gradient_checkpointing=checkpointing,
        num_generations=preset.group_size,
        per_device_train_batch_size=preset.group_size,
        gradient_accumulation_steps=preset.prompts_per_step,
        max_completion_length=preset.max_length,
        beta=0.04,
        loss_type="grpo",
        report_to=[],
        generation_kwargs={
            "min_new_tokens": preset.min_length,
            # logits of random weights are about equal, so this gives the end token a probability of 1 / mean_extra
            "sequence_bias": [[[end], math.log(tokens / preset.mean_extra)]],
        },
    )
    if way == "stock":
        data = data.cast_column("images", List(ImageFeature(mode="RGB")))  # paths -> decoded images
    trainer = WAYS[way](
        model=load_model(checkpoint, dtype=preset.dtype),
        reward_funcs=lambda completions, **kwargs: [random.random() for _ in completions],
        args=args,
        train_dataset=data,
        processing_class=processor,
    )
    # Stock TRL is not to wait for cuDNN's attention and its convolution either: see `prepare_model`.
    torch.backends.cuda.enable_cudnn_sdp(False)
    family_of(trainer.model).mend(trainer.model, processor)
    trainer.create_optimizer()
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    return trainer


def given_completions(preset: Preset) -> list[list[int]]:
    """The completions that both score: lengths drawn by the law that sampling follows."""
    draw = random.Random(1)
    lengths = [
        min(preset.min_length + int(draw.expovariate(1 / preset.mean_extra)), preset.max_length)
        for _ in range(preset.group_size * preset.prompts_per_step)
    ]
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


class Stopwatch:
    """Seconds by part of the step; on a GPU it waits for the device at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[part] += time.perf_counter() - start

    def wrap(self, owner: Any, name: str, part: str, only_without_gradients: bool = False) -> None:
        """Time every call of a method under `part`."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if only_without_gradients and torch.is_grad_enabled():
                return method(*args, **kwargs)
            with self.timing(part):
                return method(*args, **kwargs)

        setattr(owner, name, timed)


def instrument(trainer: GRPOTrainer, completions: list[list[int]]) -> Stopwatch:
    """Time the parts of the trainer's step; scoring gets the given completions in place of the sampled ones."""
    watch = Stopwatch()
    # Where each samples: ours in its backend, TRL's in a method of its own.
    owner, name = (trainer.backend, "generate") if hasattr(trainer, "backend") else (trainer, "_generate_single_turn")
    watch.wrap(owner, name, "rollout")
    sample = getattr(owner, name)

    def sample_and_replace(*args: Any) -> Any:
        sampled = sample(*args)
        return replace(sampled, ids=completions) if isinstance(sampled, Completions) else (completions, None)

    setattr(owner, name, sample_and_replace)
    watch.wrap(trainer, "_get_per_token_logps_and_entropies", "reference scoring", only_without_gradients=True)
    watch.wrap(trainer.processing_class.image_processor, "preprocess", "image preprocessing")
    watch.wrap(trainer, "_prepare_inputs", "before the update")
    return watch


def run_step(trainer: GRPOTrainer, watch: Stopwatch) -> dict[str, float]:
    """One optimiser step as `Trainer` does it; returns the seconds of its parts."""
    watch.seconds.clear()
    rows = next(iter(trainer.get_train_dataloader()))
    with watch.timing("whole step"):
        for _ in range(trainer.args.gradient_accumulation_steps):
            trainer.training_step(trainer.model, rows, None)
        with watch.timing("optimiser"):
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    seconds = dict(watch.seconds)
    seconds["policy update"] = seconds["whole step"] - seconds["before the update"] - seconds["optimiser"]
    trainer.state.global_step += 1
    return seconds


def peak_memory(trainer: GRPOTrainer, watch: Stopwatch) -> float:
    """GB of a step, after one to warm up, above what is held before it: of the device, or resident in this process."""
    run_step(trainer, watch)
    if torch.cuda.is_available():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_step(trainer, watch)
        return (torch.cuda.max_memory_allocated() - held) / 1e9
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand freed memory back, so that it does not hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (proc_pid_clear_refs(5))
    held = memory_status("VmRSS")
    run_step(trainer, watch)
    return (memory_status("VmHWM") - held) / 1e9


def memory_status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# --- what is possible ------------------------------------------------------------------------------


def count_work(trainer: GRPOTrainer, preset: Preset, completions: list[list[int]]) -> dict[str, dict[str, float]]:
    """Multiply-adds of a step's parts: what stock runs, and those of unique tokens and patches.

    A linear layer costs its weights once a token; attention 2 x heads x head size for every pair of tokens that see
    each other; a gated delta net three times its state for a token: read, corrected, read. Embeddings, norms and
    softmax are left out on both sides, and that a chunk of 64 tokens costs as much when it is not full.
    """
    model = trainer.model
    text = model.config.text_config
    rows = next(iter(trainer.get_train_dataloader()))
    prompt, image_tokens, states = prompt_size(trainer, rows[0])
    patches, seen, width = states[:-1].numel(), states[-2], states[-1]  # each patch attends to those it is seen with
    head = text.vocab_size * text.hidden_size
    body = linear_weights(model, "language model") - head
    recurrent = (getattr(text, "layer_types", None) or []).count("linear_attention")
    if recurrent:
        body += 3 * recurrent * text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    pair = 2 * (text.num_hidden_layers - recurrent) * text.hidden_size
    depth = len(family_of(model).vision_blocks(model))
    image = patches * linear_weights(model, "vision tower") + image_tokens * linear_weights(model, "merger")
    image += 2 * depth * width * patches * seen

    group, prompts = preset.group_size, preset.prompts_per_step
    lengths = [len(completion) for completion in completions]
    longest = max(lengths)

    def causal(prefix: int, new: int) -> float:
        return pair * (new * prefix + new * (new + 1) / 2)

    # scoring: stock pads a generation batch to its longest completion; without Triton its head runs at every position
    width = prompt + longest
    stock_forward = sum(
        image + width * body + causal(0, width) + head * (length if torch.cuda.is_available() else width)
        for length in lengths
    )
    unique_forward = prompts * (image + prompt * body + causal(0, prompt))
    unique_forward += sum(length * (body + head) + causal(prompt, length) for length in lengths)
    # rollout: stock prefills every row and decodes every row to the longest of the batch
    prefill = image + prompt * body + causal(0, prompt) + head
    stock_rollout = sum(prefill + longest * (body + head) + causal(prompt, longest) for _ in lengths)
    unique_rollout = prompts * prefill + sum(length * (body + head) + causal(prompt, length) for length in lengths)
    return {
        "rollout": {"stock": stock_rollout, "ours": unique_rollout},
        "reference scoring": {"stock": stock_forward, "ours": unique_forward},
        "policy update": {"stock": 3 * stock_forward, "ours": 3 * unique_forward},
        "whole step": {
            "stock": stock_rollout + 4 * stock_forward,
            "ours": unique_rollout + 4 * unique_forward,
        },
        "image preprocessing": {"stock": 2 * group, "ours": 1},  # images processed for each one
        "sizes": {"prompt": prompt, "patches": patches, "completions": sum(lengths)},
    }


def linear_weights(model: PreTrainedModel, part: str) -> int:
    """Weights of the linear layers and convolutions in one of `families.PARTS`: multiply-adds a token or patch."""
    kinds, family = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), family_of(model)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, kinds) and family.part_of(f"{name}.weight") == part
    )


def prompt_size(trainer: GRPOTrainer, row: dict[str, Any]) -> tuple[int, int, torch.Size]:
    """Tokens of a prompt, those of its image among them, and the shape (..., patches, width) of the tower's states."""
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": row["prompt"][0]["content"]}]
    inputs = trainer.processing_class.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model, family, shapes = trainer.model, family_of(trainer.model), []
    hook = family.vision_blocks(model)[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with torch.no_grad():
        family.encode_images(model, family.images_of(inputs))
    hook.remove()
    image_tokens = int((inputs["input_ids"] == trainer.processing_class.image_token_id).sum())
    return inputs["input_ids"].shape[1], image_tokens, shapes[0]


# --- the command -----------------------------------------------------------------------------------


def measure(preset: Preset, rounds: int, checkpointing: bool) -> dict[str, Any]:
    """Alternating rounds of both trainers, after one each to warm up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(preset, folder / "model")
        data = make_dataset(preset, folder)
        completions = given_completions(preset)
        trainers = {way: make_trainer(way, preset, folder / "model", data, checkpointing) for way in WAYS}
        watches = {way: instrument(trainer, completions) for way, trainer in trainers.items()}
        seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: {way: [] for way in WAYS})
        for number in range(rounds + 1):
            for way, trainer in trainers.items():
                for part, value in run_step(trainer, watches[way]).items():
                    if number:
                        seconds[part][way].append(value)
                print(f"round {number} of {rounds}: {way} {watches[way].seconds['whole step']:.2f} s", file=sys.stderr)
        result: dict[str, Any] = {"seconds": seconds, "work": count_work(trainers["ours"], preset, completions)}
        if torch.cuda.is_available():
            result["peak memory"] = {way: peak_memory(trainers[way], watches[way]) for way in WAYS}
        else:
            result["peak memory"] = {way: peak_memory_alone(way, preset, checkpointing) for way in WAYS}
        step = statistics.median(seconds["whole step"]["ours"])
        result["completion tokens per second"] = {"ours": sum(map(len, completions)) / step}
    return result


def peak_memory_alone(way: str, preset: Preset, checkpointing: bool) -> float:
    """`peak_memory` in a process of its own, since resident memory never shrinks back."""
    call = f"print(step.prepare_and_measure_memory({way!r}, step.{preset!r}, {checkpointing}))"
    command = [sys.executable, "-c", f"import sys; sys.path = {sys.path}; from benchmarks import step; {call}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def prepare_and_measure_memory(way: str, preset: Preset, checkpointing: bool) -> float:
    """`peak_memory` of one trainer, which is made for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(preset, folder / "model")
        trainer = make_trainer(way, preset, folder / "model", make_dataset(preset, folder), checkpointing)
        return peak_memory(trainer, instrument(trainer, given_completions(preset)))


ROWS = ("rollout", "reference scoring", "policy update", "whole step", "image preprocessing")


def table(result: dict[str, Any]) -> str:
    """The figures as text: medians, and the range of the rounds."""
    lines = [f"{'':22}{'stock':>22}{'ours':>22}{'ratio':>8}{'possible':>10}{'reached':>9}"]
    for row in ROWS:
        values = result["seconds"][row]
        medians = {way: statistics.median(values[way]) for way in WAYS}
        cells = [f"{medians[way]:.3f} s [{min(values[way]):.3f}, {max(values[way]):.3f}]" for way in WAYS]
        ratio = medians["stock"] / medians["ours"]
        possible = result["work"][row]["stock"] / result["work"][row]["ours"]
        lines.append(f"{row:22}{cells[0]:>22}{cells[1]:>22}{ratio:7.2f}x{possible:9.2f}x{ratio / possible:9.0%}")
    memory = result["peak memory"]
    ratio = memory["stock"] / memory["ours"]
    lines.append(f"{'peak memory of a step':22}{memory['stock']:19.3f} GB{memory['ours']:19.3f} GB{ratio:7.2f}x")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return what `--json` keeps."""
    preset = replace(PRESETS[args.preset], family=args.family)
    if args.group_size:
        preset = replace(preset, group_size=args.group_size, prompts_per_step=1)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "benchmark": "step",
        "preset": args.preset,
        "family": args.family,
        "device": device,
        "rounds": args.rounds,
        "group_size": preset.group_size,
    }
    result |= measure(preset, args.rounds, args.gradient_checkpointing)
    sizes = result["work"]["sizes"]
    print(
        f"{args.preset}, {args.family}, on {device}: {preset.prompts_per_step} prompts of {sizes['prompt']} tokens "
        f"with {sizes['patches']} patches, {preset.group_size} completions each, "
        f"{sizes['completions']} completion tokens; medians of {args.rounds} rounds [lowest, highest]\n"
        f"{table(result)}\n"
        f"completion tokens per second of a whole step, ours: {result['completion tokens per second']['ours']:.0f}"
    )
    return result


def add_parser(commands: Any) -> None:
    """The `step` command of `benchmark.py`."""
    parser = commands.add_parser(
        "step",
        help="a GRPO step, against stock TRL",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="sat-cpu", help="(default: %(default)s)")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_vl", help="model family (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="of torch on the CPU (default: one a core)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both trainers")
    parser.add_argument(
        "--group_size",
        type=positive,
        metavar="G",
        help="measure one prompt a step, with G completions, in place of the preset's",
    )
    parser.set_defaults(run=run)
