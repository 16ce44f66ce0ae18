"""Defines the benchmarks of the evaluation: where each is, and how its rows become questions.

`base.py` says what a benchmark is. A new one is a function from a row to its `Item`s and an entry in the file of those
that are scored like it (`choice.py`, `circular.py`); everything else (reading parquet files and JSON Lines from a file,
a folder or the Hub, stratified limits, generation, resuming, scores) is shared.
"""

from open_r1.tasks.benchmarks.base import Benchmark, Item, digest, read, stratified
from open_r1.tasks.benchmarks.choice import CHOICE, VSR_CATEGORY
from open_r1.tasks.benchmarks.circular import CIRCULAR

__all__ = ["BENCHMARKS", "VSR_CATEGORY", "Benchmark", "Item", "digest", "read", "stratified"]

BENCHMARKS: dict[str, Benchmark] = {**CHOICE, **CIRCULAR}
