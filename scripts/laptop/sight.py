"""Checks whether the laptop's model can see: the share of objects in unseen scenes that it names, and that it places.

    python scripts/laptop/sight.py --model outputs/laptop/sight --output outputs/laptop/results/sight.json

The model lists the objects of each scene, greedily: "red circle at 3 7, blue square at 8 2." An object counts
as named if it is in the list, and as placed if its place there is off by at most one tenth of the image's width and one
of ten steps of depth. The exit code is 1 unless 80 % of all objects are named and 80 % of these placed.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, positive, run, use_environment

use_environment()

from open_r1.base.files import replace_file, to_json
from open_r1.engines.backends import load_transformers
from open_r1.evaluation.answering import Answerer, load_prompting, messages
from open_r1.world.parquet import row_rng
from open_r1.world.words import LIST_ALL, Thing, column, draw, rank, things_in

SEED = 39  # of the scenes
MAX_NEW_TOKENS = 80
LEAST = 0.8
ITEM = re.compile(r"(\w+ \w+) at (\d) (\d)")


def find(thing: Thing, said: str) -> bool | None:
    """Whether a list has a thing at its place; None where it does not have it."""
    places = [(int(across), int(deep)) for name, across, deep in ITEM.findall(said) if name == thing.name]
    if not places:
        return None
    return any(abs(x - column(thing.u)) <= 1 and abs(z - rank(thing.depth)) <= 1 for x, z in places)


def measure(said: Sequence[str], scenes: Sequence[Sequence[Thing]]) -> dict[str, float]:
    """The share of all objects that the lists of their scenes name, that of these which they place, and the number."""
    pairs = [(thing, text) for text, things in zip(said, scenes, strict=True) for thing in things if thing.name != "X"]
    found = [find(thing, text) for thing, text in pairs]
    named = [placed for placed in found if placed is not None]
    return {"named": len(named) / len(found), "placed": sum(named) / max(1, len(named)), "objects": len(found)}


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model, or of its LoRA run")
    parser.add_argument("--output", required=True, type=Path, help="JSON file for the shares and the lists")
    parser.add_argument("--scenes", type=positive, default=64, help="how many (default: %(default)s)")
    args = parser.parse_args()
    drawn = [draw(row_rng(SEED, row), row) for row in range(args.scenes)]
    processor, _ = load_prompting(args.model, "auto", style="direct")
    backend = load_transformers(args.model, processor, "cpu", "bfloat16", style="direct")
    answerer = Answerer(backend, processor, MAX_NEW_TOKENS)
    prompts = [backend.encode(messages([image], LIST_ALL)) for _, image in drawn]
    said = [answer.response for answer in answerer.answer(prompts)]
    shares = measure(said, [things_in(asked) for asked, _ in drawn])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.output, to_json({**shares, "lists": said}, indent=1))
    print(f"of {shares['objects']} objects {shares['named']:.0%} are named, and {shares['placed']:.0%} of these placed")
    if min(shares["named"], shares["placed"]) < LEAST:
        raise Mistake(
            f"{args.model}: sees too little, {LEAST:.0%} of both are asked for; its lists are in {args.output}"
        )


if __name__ == "__main__":
    run(main)
