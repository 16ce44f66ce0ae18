"""Merge a LoRA checkpoint into its base model: one folder that transformers and vLLM load.

    python scripts/export.py --adapter outputs/grpo_sat_lora --output outputs/grpo_sat_lora_merged

The folder also has the chat template and the image bounds. A QLoRA adapter is merged into the 16-bit base weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import Mistake, naming_option, printable, run, use_environment

use_environment()

from open_r1.base.files import check_new_folder, replacing
from open_r1.base.hub import model_folder
from open_r1.models.families import use_family
from open_r1.models.loading import adapter_base, load_checkpoint, load_processor, reset_generation_config
from open_r1.running.failures import full_disk


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", type=Path, required=True, help="folder with adapter_config.json: a run's or a checkpoint"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; a new or an empty one")
    parser.add_argument("--base", help="base model (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of the merged weights (default: auto, the base model's)",
    )
    parser.add_argument("--family", help="the model's family, if it is one of your own: module:NAME")
    args = parser.parse_args()
    use_family(args.family)
    check_new_folder(args.output)
    if not args.adapter.is_dir():
        raise Mistake(f"--adapter: no folder {args.adapter}")
    if not (args.adapter / "adapter_config.json").is_file():
        raise Mistake(f"--adapter: no adapter_config.json in {args.adapter}; a full checkpoint needs no export")
    with naming_option("--base" if args.base else "--adapter"):
        base = model_folder(args.base) if args.base else adapter_base(args.adapter)
    model = load_checkpoint(args.adapter, args.dtype, base)
    processor = load_processor(str(args.adapter))
    reset_generation_config(model, processor)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with full_disk(args.output), replacing(args.output) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    print(printable(f"{args.output}: {base} with the adapter of {args.adapter} merged in"))


if __name__ == "__main__":
    run(main)
