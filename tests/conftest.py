"""Fixtures: tiny random checkpoints of every family and a small prepared dataset, made once a session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

from pathlib import Path

import pytest

# Imported where they are used: tests that need no torch start without it.


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model type -> folder of a tiny random checkpoint."""
    from open_r1.tiny import MODEL_CLASSES, save_tiny_model

    folder = tmp_path_factory.mktemp("models")
    return {name: save_tiny_model(folder / name, model_type=name, vocab_size=300) for name in MODEL_CLASSES}


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    """A tiny random Qwen2-VL checkpoint."""
    return tiny_models["qwen2_vl"]


@pytest.fixture(scope="session")
def examples_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of eight examples."""
    from support import write_examples

    return write_examples(tmp_path_factory.mktemp("examples"))
