"""Ways of doing the same that take turns, and their medians."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way in each round, and what each made in the last.

    The ways take turns, so that a slow spell of the machine hits all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made = {}
    for number in range(1, rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            made[name] = run()
            seconds[name].append(time.perf_counter() - start)
            print(f"round {number} of {rounds}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr)
    return seconds, made


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and by what factor `ours` is faster than `baseline`."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "median": medians, "ratio": medians["baseline"] / medians["ours"]}
