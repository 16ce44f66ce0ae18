"""Defines the benchmarks of the evaluation: where each is, and how its rows become questions.

`base.py` says what a benchmark is. A new one is a function from a row to its `Item`s and an entry in the file of those
that are scored like it (`choice.py`, `circular.py`, `video.py`); everything else (reading parquet files and JSON Lines
from a file, a folder or the Hub, stratified limits, generation, resuming, scores) is shared.
"""

from open_r1.tasks.benchmarks.base import Benchmark, Item, MissingImages, digest, locate, read, stratified
from open_r1.tasks.benchmarks.choice import CHOICE, VSR_CATEGORY
from open_r1.tasks.benchmarks.circular import CIRCULAR
from open_r1.tasks.benchmarks.video import VIDEO

__all__ = [
    "BENCHMARKS",
    "SUITES",
    "VSR_CATEGORY",
    "Benchmark",
    "Item",
    "MissingImages",
    "digest",
    "locate",
    "read",
    "stratified",
]

BENCHMARKS: dict[str, Benchmark] = {**CHOICE, **CIRCULAR, **VIDEO}
# The eight that EASI asks for (`EvolvingLMMs-Lab/EASI`, 0c1a41e, `docs/Submit_results.md`).
SUITES = {
    "easi-8": (
        *("VSI-Bench", "MMSI-Bench", "MindCube", "ViewSpatial", "SITE", "BLINK-full", "3DSRBench", "EmbSpatial"),
    )
}
