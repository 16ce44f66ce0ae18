"""Checks what a run takes: computes memory and disk, and measures steps for the hours."""

import math
import os
import shutil
from collections.abc import Iterator

import psutil
import torch

from open_r1.doctor.finding import Checks, Finding, failed, passed, skipped, warned
from open_r1.doctor.run import MEASURED_STEPS, Run, existing
from open_r1.models.memory import MemoryCount, free_memory
from open_r1.settings.processes import Launch

GB = 1e9
LONG = 20  # seconds after which a line says what is waited for
MEASURED_SECONDS = 300  # that the steps which are measured may take on a CPU
PASSES = 5  # of a token: sampling, scoring by the reference, forward, and backward as two


def memory(run: Run) -> Iterator[Finding]:
    """What `models.memory` counts against the card, or all processes against this machine."""
    args, on_cpu, processes = run.args, run.on_cpu, run.launch.processes_here
    count, free = run.count(run.launch), free_memory(on_cpu)
    total = psutil.virtual_memory().total if on_cpu else torch.cuda.mem_get_info()[1]
    remedy = "a smaller per_device_train_batch_size or max_completion_length, or configs/overlays/lora.yaml"
    about_vllm = ""
    if getattr(args, "use_vllm", False) and args.vllm_mode == "colocate" and not on_cpu:
        share, shares = args.vllm_gpu_memory_utilization, vllm_shares(run, count, total)
        about_vllm = f", {share * total / GB:.1f} of them vLLM's; fits: {shares or 'no share'}"
        remedy = shares or "configs/overlays/lora.yaml, more GPUs, or --vllm_mode server"
        count = count.with_vllm(share, total, args.vllm_enable_sleep_mode)
    needed = count.peak * processes if on_cpu else count.peak
    what = f"{processes} x {count.peak / GB:.1f} GB at most, of {total / GB:.1f} GB "
    what += f"{'' if on_cpu else 'of a GPU '}{free / GB:.1f} are free{about_vllm}"
    if on_cpu and processes > 1:
        remedy = f"NUM_PROCESSES=1, {remedy}"
    if needed > total:
        yield failed(what, f"{remedy}; docs/memory.md")
    elif needed > free:
        yield warned(what, "end other programs that take memory there")
    else:
        yield passed(what)


def vllm_shares(run: Run, count: MemoryCount, card: float) -> str:
    """The largest shares of a card that vLLM can take beside training, as options; empty: none.

    A share that is too small for vLLM's own copy of the weights is left out.
    """
    weights = sum(parameter.nbytes for parameter in run.model_outline.parameters())
    fitting = []
    for sleeps, option in ((False, ""), (True, " with --vllm_enable_sleep_mode true")):
        share = count.largest_share(card, sleeps)
        if share * card > weights:
            fitting.append(f"--vllm_gpu_memory_utilization up to {share:.2f}{option}")
    return ", or ".join(fitting)


def total_steps(run: Run) -> int:
    """Optimiser steps of the run."""
    args = run.args
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.per_device_train_batch_size * run.launch.num_processes * args.gradient_accumulation_steps
    samples = len(run.rows) * (args.num_generations * args.num_iterations if run.is_grpo else 1)
    return math.ceil(args.num_train_epochs * samples / per_step)


def checkpoint_bytes(run: Run) -> tuple[float, float]:
    """What a checkpoint takes on the disk, and what of it the model at the end takes."""
    base = run.count(Launch(1, run.launch.zero_stage)).base
    weights = base["weights"]
    if run.model_args.use_peft:
        weights = sum(p.nbytes for p in run.model_outline.parameters() if p.requires_grad)
    if run.args.save_only_model:
        return weights, weights
    copies = 2 if run.launch.zero_stage else 1  # DeepSpeed writes them again
    return copies * weights + base["optimiser"], weights


def disk(run: Run) -> Iterator[Finding]:
    """What the checkpoints to come and the model at the end take, against the free space of the disk."""
    args, steps = run.args, total_steps(run)
    one, last = checkpoint_bytes(run)
    interval = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    written = {"no": 0, "epoch": math.ceil(args.num_train_epochs)}.get(args.save_strategy, math.ceil(steps / interval))
    if args.save_total_limit:
        written = min(written, args.save_total_limit + 1)  # the oldest goes after the newest is there
    needed = written * one + last
    folder = existing(args.output_dir)
    free = shutil.disk_usage(folder).free
    what = f"{written} checkpoints of {one / GB:.2f} GB and the model: {needed / GB:.1f} GB, "
    what += f"{free / GB:.1f} GB are free in {folder}"
    if needed > free:
        yield failed(what, "another OUTPUT, --save_total_limit 2, or --save_only_model true (without resuming)")
    else:
        yield passed(what)


def hours(run: Run) -> Iterator[Finding]:
    """How long the run takes, from two steps in this process, which does the work of all, or of a part of a step."""
    trainer, launch, steps = run.trainer, run.launch, total_steps(run)
    needed = run.count(Launch(), trainer.args).peak
    parts, expected = 1.0, MEASURED_STEPS * step_flops(run) / run.speed if run.on_cpu else 0.0
    if expected > MEASURED_SECONDS:
        parts = parts_of_step(run)
    if getattr(run.args, "use_vllm", False):
        why = "vLLM generates in this recipe: see the seconds of the log's first steps"
    elif needed > free_memory(run.on_cpu):
        why = f"a step in one process takes {needed / GB:.1f} GB, more than is free"
    elif expected / parts > MEASURED_SECONDS:
        one, all_of_them = (lasting(count * expected / MEASURED_STEPS) for count in (1, steps))
        why = f"computed, not measured: a step takes this CPU about {one}, all {steps} steps {all_of_them}"
    else:
        why = ""
    if why:
        yield skipped(why)
        return
    if expected / parts > LONG:
        yield passed(f"measuring, which takes about {math.ceil(expected / parts / 60)} minutes")
    if parts > 1:
        args = trainer.args
        args.gradient_accumulation_steps = size = round(args.gradient_accumulation_steps / parts)
        if run.is_grpo:
            args.steps_per_generation = size
            args.generation_batch_size = size * args.per_device_train_batch_size
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads * launch.processes_here, os.cpu_count() or 1))  # as those here together
    try:
        seconds = parts * trainer.train().metrics["train_runtime"] / MEASURED_STEPS
    finally:
        torch.set_num_threads(threads)
    logged = [event["time/rollout"] for event in trainer.state.log_history if "time/rollout" in event]
    # A token takes a GPU about as long for few completions as for many: more GPUs do not shorten a rollout.
    rollout = 0.0 if run.on_cpu else parts * sum(logged) / MEASURED_STEPS
    seconds = rollout + (seconds - rollout) / (launch.num_machines if run.on_cpu else launch.num_processes)
    part = f" of 1/{parts:.0f} of the work, which are slower" if parts > 1 else ""
    yield passed(
        f"{seconds:.1f} s a step, measured over {MEASURED_STEPS} steps{part}; {steps} take {lasting(seconds * steps)}"
    )


def lasting(seconds: float) -> str:
    """A time in minutes or hours."""
    return f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"


def step_flops(run: Run) -> float:
    """A rough count for a step that one process takes, at the recipe's limits."""
    args = run.trainer.args
    examples = prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens = 0
    if run.is_grpo:
        prompts, tokens = examples / args.num_generations, examples * args.max_completion_length
    return PASSES * run.flops(prompts * run.script_args.max_prompt_length + tokens, prompts)


def parts_of_step(run: Run) -> float:
    """How often the least that can be trained on, a batch or a group, goes into a step."""
    args = run.trainer.args
    batch = args.per_device_train_batch_size
    least = 1
    if run.is_grpo:  # rotate_options asks a question in two groups
        groups = 1 + run.script_args.rotate_options
        least = math.lcm(batch, groups * args.num_generations) // batch
    return max(args.gradient_accumulation_steps / least, 1)


CHECKS: Checks = (memory, disk, hours)
