"""What several tests share: rendered examples, a reward that a random model can earn, training runs, slow attention."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from trl.generation import vllm_generation

from open_r1 import configs
from open_r1.base.errors import REPO_ROOT
from open_r1.base.prompts import sat_question
from open_r1.engines.backends import Backend, Completions
from open_r1.engines.layout import Layout, locate_group
from open_r1.engines.shared_prefix import encode_images
from open_r1.models.families import FAMILIES
from open_r1.models.loading import load_model, load_processor
from open_r1.running.data import load_dataset
from open_r1.tiny import make_config as make_model_config
from open_r1.tiny import make_model
from open_r1.trainer.trainer import Qwen2VLGRPOConfig, Qwen2VLGRPOTrainer

COLOURS = ["red", "lime", "blue", "white", "black", "yellow"]


def families(*quick: str) -> list[Any]:
    """Every family as a test's parameter, those but `quick` nightly: they share the code that is slow to test."""
    import pytest  # vLLM's environment, which imports this file, has none

    return [pytest.param(name, marks=() if name in quick else pytest.mark.nightly) for name in FAMILIES]


def hear_signals() -> None:
    """Give a process, before it starts, the signals of a terminal's: `nohup` and `&` let their commands ignore some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def write_examples(folder: Path, count: int = 8, images_per_example: int = 1) -> Path:
    """A prepared dataset of one-colour pictures; questions and picture sizes differ from row to row."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for row in range(count):
        names = []
        for k in range(images_per_example):
            colour = COLOURS[(row + k) % len(COLOURS)]
            names.append(f"images/{row}_{k}.png")
            Image.new("RGB", (56 + 28 * (row % 3), 56 + 28 * k), colour).save(folder / names[-1])
        options = [COLOURS[row % len(COLOURS)], COLOURS[(row + 1) % len(COLOURS)]]
        question = sat_question(f"What colour is picture {row}?", options)
        records.append(
            {
                "messages": [
                    {"role": "user", "content": "<image>" * images_per_example + question},
                    {"role": "assistant", "content": options[0]},
                ],
                "images": names,
                "question_type": "other",
                "options": options,
            }
        )
    path = folder / "examples.json"
    path.write_text(json.dumps(records))
    return path


def write_mixed(folder: Path, count: int = 8, images_per_example: int = 1) -> Path:
    """A prepared dataset in which every other row has no image."""
    path = write_examples(folder, count, images_per_example)
    records = json.loads(path.read_text())
    for record in records[1::2]:
        record["images"] = []
        record["messages"][0]["content"] = record["messages"][0]["content"].removeprefix("<image>" * images_per_example)
    path.write_text(json.dumps(records))
    return path


def vowel_share(completions: list, **kwargs: object) -> list[float]:
    """A reward that varies over the noise of a random model: the share of vowels in the text."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in texts]


def falling(completions: list, trainer_state: TrainerState, **kwargs: object) -> list[float]:
    """A reward that falls with every step, so that the first checkpoint is the best."""
    return [10.0 - trainer_state.global_step + 0.01 * (index % 3) for index in range(len(completions))]


def fake_completions(prompt_ids: list[list[int]], end: int, longest: int, first_row: int = 0) -> list[list[int]]:
    """Completions that depend on the prompt and the row's number alone, of every awkward kind."""
    completions = []
    for row, ids in enumerate(prompt_ids, start=first_row):
        draw = random.Random(f"{sum(ids)}/{row}")
        kind = row % 4  # the end at once; one token; cut at the limit; some length with an end
        length = [0, 1, longest, draw.randrange(2, longest)][kind]
        completions.append([draw.randrange(256) for _ in range(length)] + ([end] if kind in (0, 3) else []))
    return completions


class Scripted:
    """A backend whose completions are a function of the rows' prompts (token ids); images it treats as `backend` does.

    With it a trainer scores and learns from completions that a test knows.
    """

    def __init__(self, backend: Backend, complete: Callable[[list[list[int]]], list[list[int]]]):
        self.backend, self.encode, self.complete = backend, backend.encode, complete

    def generate(self, prompts, repeats, settings):
        rows = [prompt.input_ids.tolist() for prompt, count in zip(prompts, repeats, strict=True) for _ in range(count)]
        if getattr(self.backend, "keep_features", False):
            with self.backend.borrow():
                prompts = [encode_images(self.backend.model, prompt) for prompt in prompts]
        return Completions(self.complete(rows), None, prompts)


class FakeVLLM:
    """As much of vLLM as TRL hands weights to: it keeps the newest of each name."""

    def __init__(self, **settings: object):
        self.settings, self.weights = settings, {}
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights):
        self.weights.update((name, weight.clone()) for name, weight in weights)

    def reset_prefix_cache(self):
        pass


def pretend_vllm(put: Callable[..., None] = setattr) -> None:
    """Let trainers with `use_vllm` start `FakeVLLM`; `put` is setattr or a monkeypatch's."""
    vllm_generation.LLM = None  # what an import leaves where vLLM is
    put(vllm_generation, "LLM", FakeVLLM)
    put(vllm_generation, "is_vllm_available", lambda: True)
    put(configs, "need_vllm", lambda option: None)


def make_config(output_dir: Path, **changes: object) -> Qwen2VLGRPOConfig:
    """A GRPO configuration of two prompts x four completions a step, in one process on the CPU."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "beta": 0.04,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 7,
    }
    return Qwen2VLGRPOConfig(**{**settings, **changes})


def make_trainer(
    model: Path,
    data: Path,
    output: Path,
    reward_funcs: Any = vowel_share,
    eval_data: Path | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **changes: object,
) -> Qwen2VLGRPOTrainer:
    """Our trainer on a tiny checkpoint and a prepared dataset, with the base template and changes of `make_config`."""
    args = make_config(output, **changes)  # before the model: with it DeepSpeed knows how weights are split
    processor = load_processor(model, chat_template="base", max_pixels=12544)
    return Qwen2VLGRPOTrainer(
        model=load_model(model, dtype="float32"),
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=load_dataset(data, processor),
        eval_dataset=load_dataset(eval_data, processor) if eval_data else None,
        processing_class=processor,
        callbacks=callbacks,
    )


def save_teacher(
    folder: Path, student: Path, model_type: str = "qwen2_vl", padding: int = 24, opinion: float = 5
) -> Path:
    """A random model, wider and deeper than a student, of its tokenizer; `opinion` makes its logits larger.

    `padding` rows of its vocabulary are beyond the student's, as Qwen2-VL-7B's has some beyond 2B's.
    """
    processor = load_processor(student)
    config = make_model_config(processor.tokenizer, model_type, hidden_size=128, num_layers=3)
    config.get_text_config().vocab_size += padding
    model = make_model(config, seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(opinion)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_script(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved checkpoint."""
    return load_file(folder / "model.safetensors")


def run_grpo(model: Path, data: Path, output: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """`sh run_grpo_SAT.sh` with the tiny recipe and the tests' reward, from an unrelated directory."""
    return subprocess.run(
        ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_grpo_SAT.sh"), *args],
        env=launch_env(model, data, output, **env),
        cwd=output.parent,
        capture_output=True,
        text=True,
    )


def launch_env(model: Path, data: Path, output: Path, **env: str) -> dict[str, str]:
    """The environment that points `run_grpo_SAT.sh` at a tiny model and the tests' data and reward."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "CONFIG": str(REPO_ROOT / "tests/data/grpo.yaml"),
        "MODEL": str(model),
        "DATA": str(data),
        "OUTPUT": str(output),
        "HF_HUB_OFFLINE": "1",
        **env,
    }


def write_script(path: Path, text: str) -> Path:
    """A shell script that can be called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def processes_naming(text: str) -> list[int]:
    """The processes whose command line holds a text, as a test's folder is one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def enlarge(model: torch.nn.Module) -> None:
    """Three times the weights, so that greedy decoding with a random model does not repeat one token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Qwen3.5 multiplies by 1 + the weight of a norm
            around_one = name.endswith("norm.weight") and not parameter.any()
            parameter.add_(2) if around_one else parameter.mul_(3)


def attend_plainly(query, key, value, scale=None, is_causal=True):
    """One sequence whose queries (H, Q, D) are the last of its keys (K, T, D), by the book -> (H, Q, D)."""
    key, value = (states.repeat_interleave(query.shape[0] // key.shape[0], dim=0) for states in (key, value))
    scores = query @ key.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
    queries, keys = scores.shape[1:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return (scores.masked_fill(hidden, -torch.inf) if is_causal else scores).softmax(dim=-1) @ value


def make_layout(groups: list[tuple[int, list[int]]], device: torch.device | str = "cpu") -> Layout:
    """The layout of a packed row; of each group the tokens of its prefix, and of each branch."""
    located, start = [], 0
    for prefix, lengths in groups:
        located.append(locate_group(start, prefix, lengths, torch.device(device)))
        start += located[-1].length
    return Layout(located)


def slow_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn` where there is no kernel; causality is aligned to the bottom right."""
    assert window_size in [(-1, 0), (-1, -1)] and query.dtype == key.dtype == value.dtype
    assert enable_gqa or query.shape[1] == key.shape[1]
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_q, max_k) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    outputs = [
        attend_plainly(*(states.transpose(0, 1) for states in sequence), scale, is_causal=window_size == (-1, 0))
        for sequence in zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def slow_varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Torch 2.11's, which takes as many heads of keys as of queries."""
    ends, most = (cu_seq_q, cu_seq_k), (max_q, max_k)
    return slow_varlen(query, key, value, *ends, *most, scale=scale, window_size=window_size)


def kept_environment(name: str, make: Callable[[str, Path], None]) -> Path:
    """The Python of an environment that is made once, in the user's cache, whatever test asks first.

    Args:
        name: of its folder; another one where it would hold something else.
        make: takes uv's command and the folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open-r1-zero"
    cache.mkdir(parents=True, exist_ok=True)
    folder, uv = cache / name, Path(sys.prefix) / "bin/uv"
    with FileLock(f"{folder}.lock"):
        if not (folder / "whole").exists():
            make(str(uv) if uv.exists() else "uv", folder)
            (folder / "whole").touch()
    return folder / "bin/python"
