"""Initialises the merger's new last layer, so that an image token is near the embeddings of the words for its cell.

    python scripts/laptop/first_words.py --model outputs/laptop/blind --output outputs/laptop/first_words

Ridge regression over rendered scenes, from the input of that layer to the mean embedding of the words for what is in
the cell: its name, its column and how deep it is, or "nothing". There is no gradient step. SFT on captions starts from
here (`configs/laptop/sft_sight.yaml`).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import run, use_environment

use_environment()

import torch
from transformers import PreTrainedModel, ProcessorMixin

from open_r1.base.files import check_new_folder, replacing
from open_r1.models.loading import load_model, load_processor
from open_r1.running.failures import full_disk
from open_r1.world.parquet import row_rng
from open_r1.world.words import Thing, draw, things_in

SCENES, SEED = 2500, 30
BATCH = 250  # images at a time
CELL = 28  # pixels of an image token's side
RIDGE = 0.1
SCALE = 2.0  # the mean of several embeddings is shorter than one


def say(model: PreTrainedModel, processor: ProcessorMixin, text: str) -> torch.Tensor:
    """The mean embedding (H,) of a text's tokens, times `SCALE`."""
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
    return SCALE * model.get_input_embeddings().weight[ids].mean(dim=0)


def targets(model: PreTrainedModel, processor: ProcessorMixin, things: list[Thing], cells: int) -> torch.Tensor:
    """What each of the cells x cells image tokens (rows first) should be: (cells^2, H).

    Without a blank in front of a digit, which would be a token by itself, and say nothing.
    """
    wanted = say(model, processor, " nothing").repeat(cells * cells, 1)
    for thing in things:
        row, column = (min(cells - 1, int(pixel // CELL)) for pixel in (thing.v, thing.u))
        wanted[row * cells + column] = say(model, processor, f" {thing.name}{thing.place.replace(' ', '')}")
    return wanted


@torch.no_grad()
def fit(model: PreTrainedModel, processor: ProcessorMixin) -> float:
    """Fit the layer to scenes, and return the share of the wanted embeddings' variance that it explains."""
    layer, inputs, wanted = model.model.visual.merger.mlp[2], [], []
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    drawn = [draw(row_rng(SEED, row), row) for row in range(SCENES)]
    for start in range(0, SCENES, BATCH):
        images = [[image] for _, image in drawn[start : start + BATCH]]
        pixels = processor.image_processor(images, return_tensors="pt")
        model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    hook.remove()
    cells = drawn[0][1].width // CELL
    wanted = torch.cat([targets(model, processor, things_in(asked), cells) for asked, _ in drawn])  # (N, H)
    features = torch.cat(inputs)
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)  # (N, D + 1)
    gram = features.T @ features + RIDGE * torch.eye(features.shape[1])
    weights = torch.linalg.solve(gram, features.T @ wanted)  # (D + 1, H)
    layer.weight.copy_(weights[:-1].T)
    layer.bias.copy_(weights[-1])
    rest = (wanted - features @ weights).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    return 1 - rest.item()


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of scripts/laptop/language_model.py")
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint; a new or an empty one")
    args = parser.parse_args()
    check_new_folder(args.output)
    model, processor = load_model(args.model, dtype="float32"), load_processor(args.model)
    explained = fit(model, processor)
    with full_disk(args.output), replacing(args.output) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        processor.save_pretrained(temporary)
    print(f"{args.output}: image tokens explain {explained:.0%} of the variance of the words for their cells")


if __name__ == "__main__":
    run(main)
