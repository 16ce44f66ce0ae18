"""Fixtures: tiny random checkpoints of every family and a small prepared dataset, made once a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

import sys

if os.access(sys.prefix, os.W_OK):  # as a launch does, so that DeepSpeed's code for the CPU is compiled once
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Imported where they are used: tests that need no torch start without it.

# that a test of this mark takes, about
SECONDS = {"vllm": 200, "nightly": 60, "real": 10, "distributed": 20, "slow": 20, "browser": 5}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that two processes end together; pytest-xdist itself counts tests alone."""
    of_file = Counter()
    for item in items:
        of_file[item.path] += max((SECONDS.get(mark.name, 0) for mark in item.iter_markers()), default=0) or 0.1
    items.sort(key=lambda item: -of_file[item.path])


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or what it runs in this process, sets in the environment is gone at its end."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model type -> folder of a tiny random checkpoint."""
    from open_r1.models.families import FAMILIES
    from open_r1.tiny import save_tiny_model

    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(folder / name, model_type=name, vocab_size=300) for name in FAMILIES}


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    """A tiny random Qwen2-VL checkpoint."""
    return tiny_models["qwen2_vl"]


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real language model, SmolLM2-135M-Instruct in float32, as a Qwen2-VL with the tiny base's vision tower."""
    from laptop.language_model import make_model

    folder = tmp_path_factory.mktemp("real")
    model, processor = make_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def examples_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of eight examples."""
    from support import write_examples

    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An interpreter whose scripts find everything imported; see preloaded.py."""
    folder = tmp_path_factory.mktemp("python")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("preloaded.py")), str(folder / "socket"), str(folder / "python")],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while not os.access(folder / "python", os.X_OK):
        assert server.poll() is None and time.monotonic() < deadline, "preloaded.py did not start"
        time.sleep(0.2)
    yield folder / "python"
    assert server.poll() is None, "a test ended preloaded.py, and with it all that use it"
    server.kill()
    server.wait()
