"""Checks what a run takes: memory and disk by counting, hours by measuring two steps."""

import math
import os
import shutil
from collections.abc import Iterator

import psutil
import torch

from open_r1.doctor.finding import Checks, Finding, failed, passed, skipped, warned
from open_r1.doctor.subject import MEASURED_STEPS, Patient, existing
from open_r1.models.memory import Count, Launch, free_memory

GB = 1e9
MAX_CPU_FLOPS = 2e12  # of the steps that are measured; a laptop takes a minute
FLOPS_A_TOKEN = 10  # and parameter: sampling, scoring by the reference, forward, backward


def memory(patient: Patient) -> Iterator[Finding]:
    """The count of `open_r1.models.memory` against the card, or all processes against this machine."""
    launch, on_cpu = patient.launch, patient.on_cpu
    count, free = patient.count(launch), free_memory(on_cpu)
    total = psutil.virtual_memory().total if on_cpu else torch.cuda.mem_get_info()[1]
    args = patient.settings[1]
    has_vllm = getattr(args, "use_vllm", False) and args.vllm_mode == "colocate"
    remedy = "smaller per_device_train_batch_size or max_completion_length, configs/overlays/lora.yaml, docs/memory.md"
    about_vllm = ", vLLM's not counted" if has_vllm else ""
    if has_vllm and not on_cpu:
        shares = vllm_shares(patient, count, total)
        about_vllm = (
            f", {args.vllm_gpu_memory_utilization * total / GB:.1f} of them vLLM's; fits: {shares or 'no share'}"
        )
        remedy = f"{shares or 'configs/overlays/lora.yaml, more GPUs, or --vllm_mode server'}; docs/memory.md"
        count = count.with_vllm(args.vllm_gpu_memory_utilization, total, args.vllm_enable_sleep_mode)
    needed = count.peak * launch.processes_here if on_cpu else count.peak
    what = f"{launch.processes_here} x {count.peak / GB:.1f} GB at most, of {total / GB:.1f} GB "
    what += f"{'' if on_cpu else 'of a GPU '}{free / GB:.1f} are free{about_vllm}"
    if on_cpu and launch.processes_here > 1:
        remedy = f"NUM_PROCESSES=1, {remedy}"
    if needed > total:
        yield failed(what, remedy)
    elif needed > free:
        yield warned(what, "end what else takes memory there")
    else:
        yield passed(what)


def vllm_shares(patient: Patient, count: Count, card: float) -> str:
    """The settings of vLLM that fit beside training on a card, the largest share of each kind; empty: none does.

    One that holds no more than vLLM's own copy of the weights is none.
    """
    least = sum(p.nbytes for p in patient.model_outline.parameters())
    shares = {sleeps: count.largest_share(card, sleeps) for sleeps in (False, True)}
    sleep_mode = {False: "", True: " with --vllm_enable_sleep_mode true"}
    return ", or ".join(
        f"--vllm_gpu_memory_utilization up to {share:.2f}{sleep_mode[sleeps]}"
        for sleeps, share in shares.items()
        if share * card > least
    )


def total_steps(patient: Patient) -> int:
    """Optimiser steps of the run."""
    args = patient.settings[1]
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.per_device_train_batch_size * patient.launch.num_processes * args.gradient_accumulation_steps
    samples = len(patient.prepared_data["train_dataset"]) * (args.num_generations if patient.is_grpo else 1)
    return math.ceil(args.num_train_epochs * samples / per_step)


def checkpoint_bytes(patient: Patient) -> tuple[float, float]:
    """What a checkpoint takes on the disk, and what of it the model at the end takes."""
    _, args, model_args = patient.settings
    whole = Launch(1, patient.launch.zero_stage)
    base = patient.count(whole).base
    weights = base["weights"]
    if model_args.use_peft:
        weights = sum(p.nbytes for p in patient.model_outline.parameters() if p.requires_grad)
    if args.save_only_model:
        return weights, weights
    return weights + base["optimiser"] + (weights if whole.zero_stage else 0), weights  # DeepSpeed writes them again


def disk(patient: Patient) -> Iterator[Finding]:
    """The checkpoints to come, and the model at the end."""
    args, steps = patient.settings[1], total_steps(patient)
    one, last = checkpoint_bytes(patient)
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
        yield failed(what, "another OUTPUT, --save_total_limit 2, or --save_only_model true (which cannot be resumed)")
    else:
        yield passed(what)


def hours(patient: Patient) -> Iterator[Finding]:
    """From two steps in this process, which does the work of all of them."""
    args, steps = patient.settings[1], total_steps(patient)
    trainer = patient.trainer
    if getattr(args, "use_vllm", False):
        yield skipped("vLLM generates in this recipe: the log's first steps tell")
        return
    needed = patient.count(Launch(), trainer.args).peak
    if needed > free_memory(patient.on_cpu):
        yield skipped(f"a step in one process takes {needed / GB:.1f} GB, more than is free")
        return
    if patient.on_cpu and flops(patient) > MAX_CPU_FLOPS:
        yield skipped("a step takes a CPU minutes: the log's first steps tell")
        return
    threads, launch = torch.get_num_threads(), patient.launch
    torch.set_num_threads(min(threads * launch.processes_here, os.cpu_count() or 1))  # as those here together
    try:
        seconds = trainer.train().metrics["train_runtime"] / MEASURED_STEPS
    finally:
        torch.set_num_threads(threads)
    seconds /= launch.num_machines if patient.on_cpu else launch.num_processes
    minutes = seconds * steps / 60
    time = f"{minutes / 60:.1f} hours" if minutes > 60 else f"{minutes:.1f} minutes"
    yield passed(f"{seconds:.1f} s a step, measured over {MEASURED_STEPS}; {steps} take {time}")


def flops(patient: Patient) -> float:
    """A rough count for the steps that are measured."""
    script_args, args = patient.settings[0], patient.trainer.args
    examples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    tokens = examples * script_args.max_prompt_length
    if patient.is_grpo:
        tokens = tokens / args.num_generations + examples * args.max_completion_length
    return MEASURED_STEPS * tokens * FLOPS_A_TOKEN * sum(p.numel() for p in patient.model_outline.parameters())


CHECKS: Checks = {"memory": memory, "disk": disk, "hours": hours}
