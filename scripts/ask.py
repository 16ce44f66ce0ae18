"""Load a checkpoint and ask it one question: one of a prepared dataset, or your own about an image.

python scripts/ask.py --model outputs/grpo_sat --data src/data/SAT/SAT_train_15000.json --row 3
python scripts/ask.py --model Qwen/Qwen2-VL-2B --image photo.jpg --question "How many chairs are there?"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, positive, printable, run, use_environment

use_environment()

from open_r1.evaluation.asking import Query, ask
from open_r1.models.families import use_family
from open_r1.tasks.examples import iter_rows


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a run (also with LoRA) or Hub name")
    parser.add_argument("--data", help="prepared JSON file to take the question from")
    parser.add_argument("--row", type=int, default=0, help="number of the example in --data, from 0 (default: 0)")
    parser.add_argument("--image", help="image file to ask about")
    parser.add_argument("--question", help="the question to ask about --image")
    parser.add_argument(
        "--chat_template",
        default="auto",
        help="base, instruct or a file; auto: as the evaluation chooses, the one that the checkpoint was trained with",
    )
    parser.add_argument("--max_new_tokens", type=positive, default=700, help="longest answer in tokens (default: 700)")
    parser.add_argument("--family", help="the model's family, if it is one of your own: module:NAME")
    args = parser.parse_args()
    use_family(args.family)
    if {bool(args.image), bool(args.question)} != {not args.data}:
        parser.error("give --data, or --image and --question")
    solution, asked = None, Query(args.question, [args.image])
    if args.data:
        examples = list(iter_rows(args.data))
        if not 0 <= args.row < len(examples):
            raise Mistake(f"--row {args.row}: {args.data} has {len(examples)} rows")
        example, unshown = examples[args.row]
        *system, question = (message["content"] for message in example["prompt"])
        asked = Query(question, example["images"], system, unshown, f"{args.data}: row {args.row}")
        solution = example.get("solution")
    completion = ask(args.model, asked, args.chat_template, args.max_new_tokens)
    print(f"question:   {printable(asked.question)}")
    if solution is not None:
        print(f"solution:   {printable(solution)}")
    print(f"completion: {completion!r}")


if __name__ == "__main__":
    run(main)
