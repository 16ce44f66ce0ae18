"""Load a checkpoint and ask it a question of a prepared dataset, or one of your own about an image.

python scripts/ask.py --model outputs/grpo_sat --data src/data/SAT/SAT_train_15000.json --row 3
python scripts/ask.py --model Qwen/Qwen2-VL-2B --image photo.jpg --question "How many chairs are there?"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, naming_option, printable, run, use_environment

use_environment()

import torch
from transformers import GenerationConfig

from open_r1.base.hub import model_folder
from open_r1.base.images import open_image
from open_r1.base.prompts import check_text
from open_r1.engines.backends import load_transformers
from open_r1.evaluate.answering import generation_settings, load_prompting, messages
from open_r1.models.families import control_tokens
from open_r1.tasks.examples import iter_rows
from open_r1.tasks.unshown import unshown_texts


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a run (LoRA too) or Hub name")
    parser.add_argument("--data", help="prepared JSON file to take the question from")
    parser.add_argument("--row", type=int, default=0, help="which of its examples (default: 0)")
    parser.add_argument("--image", help="image file to ask about")
    parser.add_argument("--question", help="the question to ask about --image")
    parser.add_argument(
        "--chat_template",
        default="auto",
        help="base, instruct or a file; auto: as the evaluation chooses, the one that the checkpoint was trained with",
    )
    parser.add_argument("--max_new_tokens", type=int, default=700, help="longest answer in tokens (default: 700)")
    args = parser.parse_args()
    if bool(args.data) == bool(args.image and args.question):
        parser.error("give --data, or --image and --question")
    example, unshown = {"prompt": [{"content": args.question}], "images": [args.image]}, []
    if args.data:
        examples = list(iter_rows(args.data))
        if not 0 <= args.row < len(examples):
            raise Mistake(f"--row {args.row}: {args.data} has {len(examples)} rows")
        example, unshown = examples[args.row]
    *system, question = (message["content"] for message in example["prompt"])
    conversation = messages([open_image(path) for path in example["images"]], question)
    conversation[:0] = [{"role": "system", "content": [{"type": "text", "text": text}]} for text in system]
    with naming_option("--model"):
        folder = model_folder(args.model)
    processor, _ = load_prompting(folder, args.chat_template)
    for text in (*system, question):
        check_text(text, control_tokens(processor))
    if args.data:
        rendered = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        if unshown := [*unshown, *unshown_texts(example["prompt"], rendered)]:
            raise Mistake(f"{args.data}: row {args.row}: its prompt does not show {', '.join(unshown)}")
    backend = load_transformers(folder, processor, "cuda" if torch.cuda.is_available() else "cpu")
    settings = GenerationConfig(**generation_settings(processor, args.max_new_tokens))
    (ids,) = backend.generate([backend.encode(conversation)], [1], settings).ids
    completion = processor.decode(ids, skip_special_tokens=True)
    print(f"question:   {printable(question)}")
    if "solution" in example:
        print(f"solution:   {printable(example['solution'])}")
    print(f"completion: {completion!r}")


if __name__ == "__main__":
    run(main)
