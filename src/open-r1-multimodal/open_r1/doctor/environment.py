"""Checks the machine: versions, GPUs, shared memory; needs no recipe."""

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from open_r1.base.errors import REPO_ROOT
from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.run import Run
from open_r1.running.launch import OTHER_TORCH, gpu_without_kernels
from open_r1.running.launch_settings import listed_gpus

SHARED_MEMORY = 10**9  # bytes that NCCL and the workers of a few processes need


def versions(run: Run) -> Iterator[Finding]:
    """The installed packages against the pins in requirements.txt."""
    wrong, lines = [], (REPO_ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        try:
            installed = version(pin.name)
        except PackageNotFoundError:
            wrong.append(f"{pin.name} is not installed")
            continue
        if not pin.specifier.contains(Version(installed), prereleases=True):
            wrong.append(f"{pin.name} {installed} is not {pin.specifier}")
    if wrong:
        yield failed("; ".join(wrong), "bash setup.sh installs the tested set")
    else:
        yield passed(f"{len(pins)} packages as pinned in requirements.txt")


def gpus(run: Run) -> Iterator[Finding]:
    """The GPUs that the driver lists against those that torch can use."""
    listed = listed_gpus()
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable and (old := gpu_without_kernels()):
        yield failed(old, OTHER_TORCH)
    elif usable:
        sizes = [torch.cuda.get_device_properties(device).total_memory / 1e9 for device in range(usable)]
        yield passed(f"{usable} x {torch.cuda.get_device_name()}, {min(sizes):.0f} GB")
    elif listed and "CUDA_VISIBLE_DEVICES" not in os.environ:
        yield failed(
            f"nvidia-smi lists {len(listed)} GPUs, and torch {torch.__version__} can use none",
            f"update the driver (CUDA 13 needs 580 or newer), {OTHER_TORCH}",
        )
    else:
        hidden = f" of {len(listed)} in CUDA_VISIBLE_DEVICES" if listed else ""
        yield passed(f"none{hidden}: CPU processes")


def shared_memory(run: Run) -> Iterator[Finding]:
    """/dev/shm, through which processes talk."""
    if not Path("/dev/shm").is_dir():
        return
    free = shutil.disk_usage("/dev/shm").free
    what = f"{free / 1e9:.1f} GB free in /dev/shm"
    if free < SHARED_MEMORY and run.launch.processes_here > 1:
        yield warned(what, "start the container with --shm-size 8g or --ipc host")
    else:
        yield passed(what)


CHECKS: Checks = (versions, gpus, shared_memory)
