"""Families that cut an image into tiles: SmolVLM, as Idefics3; SmolVLM2; InternVL3."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GotOcr2ImageProcessor,
    GPT2Tokenizer,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from open_r1.base.errors import Mistake
from open_r1.models.families.base import Family, ImageInputs, Size, black_pixel, find_module
from open_r1.models.image_tags import INTERNVL_IMAGE_TAGS, SMOLVLM_IMAGE_TAGS

# The tiles of tiny models: 4 x 4 patches, 4 tokens; an image becomes 12 of them at most.
TILE, PATCH, TILE_TOKENS = 32, 8, 4
TILES = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}  # SmolVLM's, 3 x 3 and one


class Tiled(Family):
    """Families that cut a resized image into square tiles and make each as many tokens.

    An image that fits one tile is one; another is its tiles and, behind them, all of it in one tile. Images are always
    enlarged to a tile, so `min_pixels` has nothing to say. Positions are those of text.
    """

    @abstractmethod
    def tile_side(self, processor: ProcessorMixin) -> int:
        """The side of a tile in pixels."""

    @abstractmethod
    def tile_tokens(self, processor: ProcessorMixin) -> int:
        """Tokens of a tile, a square number."""

    @abstractmethod
    def count_tiles(self, processor: ProcessorMixin, size: Size) -> int:
        """Tiles of an image of this size, the one that shows all of it included."""

    @abstractmethod
    def set_room(self, processor: ProcessorMixin, tiles: int) -> None:
        """Make the processor cut an image into at most so many tiles."""

    @abstractmethod
    def most_tiles(self, processor: ProcessorMixin) -> int:
        """How many tiles the processor makes of an image at most."""

    @abstractmethod
    def tiles_within(self, room: int) -> int:
        """How many tiles an image has at most where `room` tiles fit; the one that shows all of it is counted."""

    def join_features(self, features: Sequence[Any]) -> BaseModelOutputWithPooling:
        tiles = torch.cat([prompt.pooler_output for prompt in features])
        return BaseModelOutputWithPooling(pooler_output=tiles)

    def feature_tensors(self, features: Any) -> list[torch.Tensor]:
        return [features.pooler_output.flatten(0, 1)]  # (tiles * tokens, width)

    def blacken(
        self, images: ImageInputs, processor: ProcessorMixin, share: float, rng: np.random.Generator
    ) -> ImageInputs:
        """Black are squares of patches that become one token."""
        pixels = images["pixel_values"]  # (..., channels, side, side)
        tiles, squares = math.prod(pixels.shape[:-3]), math.isqrt(self.tile_tokens(processor))
        is_black = torch.from_numpy(rng.random((tiles, 1, squares, squares)) < share)
        is_black = F.interpolate(is_black.float(), pixels.shape[-2:]).bool()
        is_black = is_black.view(*pixels.shape[:-3], 1, *pixels.shape[-2:])
        black = black_pixel(processor, pixels.dtype)[:, None, None]  # (channels, 1, 1)
        return {**images, "pixel_values": torch.where(is_black, black, pixels)}

    def count_image_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        return sum(self.count_tiles(processor, size) for size in sizes) * self.tile_tokens(processor)

    def bound_images(
        self, processor: ProcessorMixin, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        tile = self.tile_side(processor) ** 2
        if (min_pixels or 0) > tile:
            raise Mistake(f"--min_pixels {min_pixels}: images are enlarged to a tile of {tile} pixels, and no further")
        if max_pixels is None:
            return
        if max_pixels < tile:
            raise Mistake(f"--max_pixels {max_pixels}: below the smallest area that an image is enlarged to, {tile}")
        self.set_room(processor, max_pixels // tile)

    def pixel_bounds(self, processor: ProcessorMixin) -> tuple[int, int]:
        tile = self.tile_side(processor) ** 2
        return tile, self.most_tiles(processor) * tile

    def tile_patches(self, config: PreTrainedConfig) -> int:
        """Patches of a tile."""
        vision = config.vision_config
        return (_side(vision.image_size) // _side(vision.patch_size)) ** 2

    def count_patches(self, config: PreTrainedConfig, pixels: int) -> int:
        tiles = self.tiles_within(pixels // _side(config.vision_config.image_size) ** 2)
        return tiles * self.tile_patches(config)

    def tiny_vision(self, size: int, layers: int) -> dict[str, Any]:
        """The configuration of a vision tower of this width."""
        return {
            "hidden_size": size,
            "intermediate_size": 2 * size,
            "num_hidden_layers": layers,
            "num_attention_heads": size // 16,
            "image_size": TILE,
            "patch_size": PATCH,
        }


class SmolVLM(Tiled):
    """SmolVLM2 and, as Idefics3, SmolVLM: N tiles of a prompt in (1, N, channels, side, side).

    With `do_image_splitting` every image's longer side becomes `size`, a multiple of the tile's.
    """

    image_axis = 1

    def mend(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        """Under autocast, turn features in 16 bits to the dtype of the embeddings they go into."""
        embeddings = model.get_input_embeddings()
        find_module(model, "connector").register_forward_hook(
            lambda module, args, features: features.to(embeddings.weight.dtype)
        )

    def blank_image(self, config: PreTrainedConfig) -> ImageInputs:
        vision = config.vision_config
        tile = (1, 1, vision.image_size, vision.image_size)
        pixels = torch.ones(1, 1, vision.num_channels, *tile[2:])  # zeros would be padding, of which nothing is made
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(tile, dtype=torch.long)}

    def tile_side(self, processor: ProcessorMixin) -> int:
        return processor.image_processor.max_image_size["longest_edge"]

    def tile_tokens(self, processor: ProcessorMixin) -> int:
        return processor.image_seq_len

    def split(self, processor: ProcessorMixin, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles, 0 for an image that is one."""
        return processor.image_processor.get_number_of_image_patches(*size)[1:]

    def count_tiles(self, processor: ProcessorMixin, size: Size) -> int:
        rows, columns = self.split(processor, size)
        return rows * columns + 1

    def count_frame_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        """Two around each tile of a row, an end of a row, three around the tile that shows all."""
        one, two = (len(processor.tokenizer(ends, add_special_tokens=False)["input_ids"]) for ends in ("\n", "\n\n"))
        count = 0
        for rows, columns in (self.split(processor, size) for size in sizes):
            count += 3 + (2 * rows * columns + (rows - 1) * one + two if rows else 0)
        return count

    def set_room(self, processor: ProcessorMixin, tiles: int) -> None:
        images, across = processor.image_processor, _tiles_across(tiles)
        images.do_image_splitting = across > 1
        images.size = {"longest_edge": across * self.tile_side(processor)}

    def most_tiles(self, processor: ProcessorMixin) -> int:
        images = processor.image_processor
        across = math.ceil(images.size["longest_edge"] / self.tile_side(processor))
        return across**2 + 1 if images.do_image_splitting and across > 1 else 1

    def tiles_within(self, room: int) -> int:
        across = _tiles_across(room)
        return across**2 + 1 if across > 1 else 1

    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        tower, config = self.vision_tower(model), model.config.vision_config
        tiles = patches // self.tile_patches(model.config)
        pixels = torch.empty(tiles, config.num_channels, config.image_size, config.image_size, dtype=dtype)
        # not the embeddings' own forward pass: it looks at a mask, which has no numbers here
        states = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (tiles, patches, width)
        states = states + tower.embeddings.position_embedding.weight
        for layer in tower.encoder.layers:
            states = layer(states, None)
        find_module(model, "connector")(tower.post_layernorm(states))
        return states.flatten(0, 1)

    def tiny_processor(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ProcessorMixin:
        images, videos = SmolVLMImageProcessor(**TILES), SmolVLMVideoProcessor(**TILES, num_frames=1, fps=1)
        return self.processor(images, tokenizer, videos, TILE_TOKENS, chat_template=chat_template)

    def tiny_config(self, text: Mapping[str, Any], vision_size: int, vision_layers: int) -> dict[str, Any]:
        return {
            "text_config": {**text, "model_type": "llama"},
            "vision_config": self.tiny_vision(vision_size, vision_layers),
            "scale_factor": 2,
            "pad_token_id": text["pad_token_id"],
            "tie_word_embeddings": False,
        }


class Idefics3(SmolVLM):
    """SmolVLM of the first version, whose processor takes no videos."""

    def tiny_processor(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ProcessorMixin:
        images = Idefics3ImageProcessor(**TILES)
        return self.processor(images, tokenizer, TILE_TOKENS, chat_template=chat_template)


class InternVL(Tiled):
    """InternVL3 as transformers has it: the tiles of all images in (tiles, channels, side, side)."""

    blocks = "encoder.layer"

    def blank_image(self, config: PreTrainedConfig) -> ImageInputs:
        vision = config.vision_config
        return {"pixel_values": torch.zeros(1, vision.num_channels, *vision.image_size)}

    def tile_side(self, processor: ProcessorMixin) -> int:
        return processor.image_processor.size["height"]

    def tile_tokens(self, processor: ProcessorMixin) -> int:
        return processor.image_seq_length

    def count_tiles(self, processor: ProcessorMixin, size: Size) -> int:
        # the processor crops whatever its image processor says
        return processor.image_processor.get_number_of_image_patches(*size, {"crop_to_patches": True})

    def count_frame_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        return 2 * len(sizes)

    def set_room(self, processor: ProcessorMixin, tiles: int) -> None:
        processor.image_processor.max_patches = max(self.tiles_within(tiles) - 1, 1)

    def most_tiles(self, processor: ProcessorMixin) -> int:
        cropped = processor.image_processor.max_patches
        return cropped + 1 if cropped > 1 else 1

    def tiles_within(self, room: int) -> int:
        """At most the 12 that the published models were trained with, and one that shows all."""
        return min(room, 13) if room > 2 else 1

    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        tower, config = self.vision_tower(model), model.config.vision_config
        patch_count = self.tile_patches(model.config)
        tiles = patches // patch_count
        states = tower.embeddings(torch.empty(tiles, config.num_channels, *config.image_size, dtype=dtype))
        for layer in tower.encoder.layer:
            states = layer(states)  # (tiles, 1 + patches, width)
        merged = round(1 / model.config.downsample_ratio) ** 2
        find_module(model, "multi_modal_projector")(states[:, 1:].reshape(tiles, patch_count // merged, -1))
        return states.flatten(0, 1)

    def tiny_processor(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ProcessorMixin:
        images = GotOcr2ImageProcessor(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=11)
        return self.processor(images, tokenizer, InternVLVideoProcessor(), TILE_TOKENS, chat_template=chat_template)

    def tiny_config(self, text: Mapping[str, Any], vision_size: int, vision_layers: int) -> dict[str, Any]:
        return {
            "text_config": {**text, "model_type": "qwen2"},
            "vision_config": {**self.tiny_vision(vision_size, vision_layers), "attention_bias": True},
            "downsample_ratio": 0.5,
            "image_seq_length": TILE_TOKENS,
            "tie_word_embeddings": False,
        }


def _side(size: int | Sequence[int]) -> int:
    """The side of a square that a configuration writes as a number or as two."""
    return size if isinstance(size, int) else size[0]


def _tiles_across(room: int) -> int:
    """How many tiles SmolVLM may have side by side, of so many with the one that shows all.

    Its vocabulary names those of 6 rows and columns.
    """
    return max(1, min(math.isqrt(max(room - 1, 0)), 6))


_SMOLVLM: dict[str, Any] = {
    "end_tokens": ("<|endoftext|>", "<|im_end|>", "<end_of_utterance>"),
    "vision_tokens": SMOLVLM_IMAGE_TAGS,
    "config_tokens": {"image_token_id": "<image>"},
    # but for those that SmolLM2 writes code with
    "special_tokens": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *SMOLVLM_IMAGE_TAGS, "<end_of_utterance>"),
    "tokenizer_class": GPT2Tokenizer,
    "tokenizer_roles": {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"},
    "image_inputs": ("pixel_values", "pixel_attention_mask"),
    "tower": "vision_model",
    "merger": r"\bconnector\.",
    "published_pixels": 17 * 384**2,  # 4 x 4 tiles and one, of the 2.2B models; the smaller ones have larger tiles
    "templates": "smolvlm",
    "has_vllm": False,
}
# InternVL3's, in the order of their ids behind Qwen2.5's
_INTERN_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<video>",
)
_INTERNVL: dict[str, Any] = {
    "end_tokens": ("<|endoftext|>", "<|im_end|>"),
    "vision_tokens": INTERNVL_IMAGE_TAGS,
    "config_tokens": {"image_token_id": "<IMG_CONTEXT>"},
    "special_tokens": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_INTERN_TOKENS),
    "tokenizer_roles": {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": {  # what its processor asks the tokenizer for
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    },
    "image_inputs": ("pixel_values",),
    "tower": "vision_tower",
    "merger": r"\bmulti_modal_projector\.",
    "published_pixels": 13 * 448**2,  # 12 tiles and one
    "templates": "internvl",
    "has_vllm": False,
    "unread_tokens": ("<video>",),
}
TILED_FAMILIES = (
    Idefics3("idefics3", Idefics3Processor, **_SMOLVLM),
    SmolVLM("smolvlm", SmolVLMProcessor, **_SMOLVLM),
    InternVL("internvl", InternVLProcessor, **_INTERNVL),
)
