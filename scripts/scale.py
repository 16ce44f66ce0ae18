"""The arithmetic of docs/scale.md: bytes, multiplications and seconds of one step of the paper's recipe, on H100s.

    python scripts/scale.py

Nothing is measured here. A time is work over the machine's peak and an efficiency that is assumed, and a GPU does one
thing after the other; what launches of kernels, Python and waiting for each other take is not in it.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.front_door import run, use_environment

use_environment()

from open_r1.prompts import REPO_ROOT
from open_r1.published import TEXT, VISION
from open_r1.recipes import merge_recipes

BYTES = 2  # of a weight, an activation, a gradient in bfloat16
MERGE = 2**2  # patches in an image token
PATCH_VALUES = 3 * 2 * 14 * 14  # numbers in a patch: colours, frames, pixels
GPUS = (1, 4, 8, 64)
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Machine:
    """One GPU: peaks a second, and the shares of them that are assumed to be reached."""

    flops: float = 989e12  # bfloat16, dense
    memory: float = 3.35e12  # bytes
    nvlink: float = 450e9  # bytes each way
    infiniband: float = 50e9
    compute_share: float = 0.4
    memory_share: float = 0.6
    network_share: float = 0.8

    def compute(self, flops: float) -> float:
        """Seconds of multiplications."""
        return flops / (self.flops * self.compute_share)

    def move(self, size: float) -> float:
        """Seconds to read or write bytes of its own memory."""
        return size / (self.memory * self.memory_share)

    def send(self, size: float, gpus: int) -> float:
        """Seconds of bytes that each GPU sends to its neighbour in a ring of so many."""
        return size / ((self.nvlink if gpus <= NODE else self.infiniband) * self.network_share)


@dataclass(frozen=True)
class Work:
    """What a step works on. Lengths in tokens; `patches` of a prompt's image, which is patches / 4 of its tokens."""

    completions: int
    group: int
    prompt: int
    patches: int
    completion: int  # in the mean
    longest: int  # of a step's completions

    @property
    def prompts(self) -> int:
        """Different ones."""
        return self.completions // self.group


@dataclass(frozen=True)
class Model:
    """Numbers of parameters in matrices, and what attention takes."""

    layers: int
    hidden: int
    body: int  # of the decoder's layers
    head: int  # which is the embedding, too
    cached: int  # keys and values of a token in all layers
    vision_layers: int
    vision_width: int
    tower: int  # run for every patch
    merger: int  # run for every image token

    @property
    def language(self) -> int:
        return self.body + self.head

    @property
    def parameters(self) -> int:
        return self.language + self.tower + self.merger


def qwen2_vl_2b() -> Model:
    """Qwen2-VL-2B, from its published configuration."""
    hidden, layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    keys = hidden // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * TEXT["intermediate_size"]
    width = VISION["embed_dim"]
    block = 4 * width * width + 2 * width * 4 * width
    merged = MERGE * width
    return Model(
        layers=layers,
        hidden=hidden,
        body=layers * layer,
        head=TEXT["vocab_size"] * hidden,
        cached=2 * layers * keys,
        vision_layers=VISION["depth"],
        vision_width=width,
        tower=PATCH_VALUES * width + VISION["depth"] * block,
        merger=merged * merged + merged * hidden,
    )


def encode_flops(model: Model, patches: float) -> float:
    """The vision tower on one image; every patch sees every other."""
    pairs = 4 * model.vision_layers * model.vision_width * patches**2
    return 2 * patches * (model.tower + model.merger / MERGE) + pairs


def decoder_flops(model: Model, new: float, before: float = 0) -> float:
    """The decoder's layers on `new` tokens that see each the ones before it, and `before` that are cached."""
    return 2 * new * model.body + 4 * model.layers * model.hidden * new * (before + (new + 1) / 2)


def head_flops(model: Model, tokens: float) -> float:
    """Scores of the next token at so many places."""
    return 2 * tokens * model.head


def scoring_flops(model: Model, work: Work, shared: bool) -> dict[str, float]:
    """One forward pass over all completions of a step, by its parts; with the prompt once a group, or each time."""
    prompts = work.prompts if shared else work.completions
    return {
        "vision": prompts * encode_flops(model, work.patches),
        "prompt": prompts * decoder_flops(model, work.prompt),
        "completions": work.completions
        * (decoder_flops(model, work.completion, work.prompt) + head_flops(model, work.completion)),
    }


def decode_bytes(model: Model, work: Work, rows: float) -> float:
    """What one GPU reads to decode its rows to the longest: all weights a token, and the cache of rows that go on."""
    weights = BYTES * model.language * work.longest
    row = work.completion * (work.prompt + work.completion / 2)  # cached tokens read over its steps
    return weights + BYTES * model.cached * rows * row


@dataclass(frozen=True)
class Step:
    """A step's seconds on each GPU."""

    decode: float
    prefill: float
    reference: float
    policy: float
    optimiser: float
    zero2: float

    @property
    def total(self) -> float:
        return self.decode + self.prefill + self.reference + self.policy + self.optimiser + self.zero2


def micro_batches(work: Work, gpus: int, batch: int) -> int:
    """Backward passes of a GPU in a step."""
    return math.ceil(work.completions / (gpus * batch))


def zero2_bytes(model: Model, gpus: int, passes: int) -> float:
    """What a GPU sends under ZeRO-2: gradients once a backward pass, new weights once."""
    return (gpus - 1) / gpus * BYTES * model.parameters * (passes + 1)


def zero3_bytes(model: Model, gpus: int, passes: int) -> float:
    """Under ZeRO-3: the reference's and, to sample, the policy's weights; for each pass weights twice and gradients."""
    return (gpus - 1) / gpus * BYTES * model.parameters * (passes * 4 + 1)


def step(model: Model, machine: Machine, work: Work, gpus: int, batch: int, shared: bool = True) -> Step:
    """Seconds of a step with `batch` completions a GPU and backward pass."""
    forward = sum(scoring_flops(model, work, shared).values()) / gpus
    prompts = (work.prompts if shared else work.completions) / gpus
    prefill = prompts * (encode_flops(model, work.patches) + decoder_flops(model, work.prompt))
    shard = model.parameters / gpus
    return Step(
        decode=machine.move(decode_bytes(model, work, work.completions / gpus)),
        prefill=machine.compute(prefill),
        reference=machine.compute(forward),
        policy=machine.compute(4 * forward),  # forward, again for what was not kept, and twice that backward
        # gradient, two moments and master weight in float32, read, and but the gradient written; a new bfloat16
        optimiser=machine.move(shard * (7 * 4 + BYTES)),
        zero2=machine.send(zero2_bytes(model, gpus, micro_batches(work, gpus, batch)), gpus),
    )


def recipe_work(gpus: int) -> tuple[Work, int]:
    """A step of configs/grpo_sat.yaml, as SAT's questions are, and its micro-batch; where a step has too few
    completions for the GPUs, as many as go round once."""
    recipe = merge_recipes([str(REPO_ROOT / "configs/grpo_sat.yaml")])
    batch = recipe["per_device_train_batch_size"]
    work = Work(
        completions=max(recipe["completions_per_step"], gpus * batch),
        group=recipe["num_generations"],
        prompt=450,
        patches=1296,
        completion=200,
        longest=recipe["max_completion_length"],
    )
    return work, batch


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flops_table(model: Model) -> str:
    """Where the multiplications of a forward pass over a step are."""
    work, _ = recipe_work(1)
    ways = [scoring_flops(model, work, shared) for shared in (True, False)]
    rows = [[part, *(f"{way[part] / 1e12:.0f}" for way in ways)] for part in ways[0]]
    rows.append(["all", *(f"{sum(way.values()) / 1e12:.0f}" for way in ways)])
    return table(["TFLOP of one forward pass over 64 completions", "prompt once a group", "once a completion"], rows)


def seconds_table(model: Model, machine: Machine) -> str:
    """Seconds of a step, term by term."""
    steps, others = [], []
    for gpus in GPUS:
        work, batch = recipe_work(gpus)
        steps.append(step(model, machine, work, gpus, batch))
        others.append(step(model, machine, work, gpus, batch, shared=False))
    terms = {
        "rollout: decode": "decode",
        "rollout: images and prefill": "prefill",
        "reference": "reference",
        "policy": "policy",
        "optimiser": "optimiser",
        "ZeRO-2's traffic": "zero2",
    }
    rows = [[name, *(f"{getattr(each, field):.3f}" for each in steps)] for name, field in terms.items()]
    rows.append(["**step**", *(f"**{each.total:.2f}**" for each in steps)])
    rows.append(["decode's share", *(f"{each.decode / each.total:.0%}" for each in steps)])
    rows.append(["the step without shared prefix", *(f"{each.total:.2f}" for each in others)])
    return table(["seconds", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS)], rows)


def other_table(model: Model, machine: Machine) -> str:
    """What other choices cost."""
    work, batch = recipe_work(8)
    weights = BYTES * model.parameters
    many, _ = recipe_work(64)
    short = machine.move(decode_bytes(model, Work(**{**vars(work), "longest": 300}), 8))
    rows = [
        ["ZeRO-3's traffic, 8 GPUs", f"{machine.send(zero3_bytes(model, 8, micro_batches(work, 8, batch)), 8):.3f}"],
        [
            "ZeRO-3's traffic, 64 GPUs",
            f"{machine.send(zero3_bytes(model, 64, micro_batches(many, 64, batch)), 64):.3f}",
        ],
        ["weights to a vLLM in the same GPUs (a copy)", f"{machine.move(2 * weights):.3f}"],
        ["weights to a vLLM on another node (a broadcast)", f"{machine.send(weights, 64):.3f}"],
        ["decode of 64 completions on one GPU", f"{machine.move(decode_bytes(model, work, 64)):.3f}"],
        ["decode of 512 completions on one GPU", f"{machine.move(decode_bytes(model, many, 512)):.3f}"],
        ["decode, 8 GPUs, if the longest has 300 tokens", f"{short:.3f}"],
    ]
    return table(["seconds of", ""], rows)


def tables() -> str:
    """The page's tables."""
    model, machine = qwen2_vl_2b(), Machine()
    return "\n\n".join((flops_table(model), seconds_table(model, machine), other_table(model, machine)))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    print(tables())


if __name__ == "__main__":
    run(main)
