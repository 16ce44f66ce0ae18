"""Defines the benchmarks of the evaluation: where each is, and how its rows become questions.

`base.py` says what a benchmark is. A new one is a function from a row to its `Item`s and an entry in the file of those
that are scored like it (`choice.py`, `circular.py`, `video.py`), or a `Benchmark` in a user's module, as `module:NAME`.
Everything else (reading parquet files and JSON Lines from a file, a folder or the Hub, stratified limits, generation,
resuming, scores) is shared.
"""

from open_r1.base.plugins import import_named
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
    "find_benchmark",
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


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, or a user's: `module:NAME`; raises what `import_named` raises."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    known = [*BENCHMARKS, *SUITES]
    return import_named("--benchmark", "benchmark", name, known, fits=lambda value: isinstance(value, Benchmark))
