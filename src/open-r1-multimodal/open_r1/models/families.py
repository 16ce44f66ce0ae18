"""Everything that differs between model families, one entry each; no other file knows a family.

A new family is an entry in `FAMILIES`, a tiny configuration in `tiny.py` and, if it writes images or turns in its own
way, templates; the tests then run over it. What families share is written in `Family`, what the Qwen ones do alone in
`QwenVL`, and what those do that cut an image into tiles in `Tiled`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from qwen_vl_utils.vision_process import smart_resize
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.image_processing_idefics3 import get_resize_output_image_size

from open_r1.base.errors import Mistake

ImageInputs = dict[str, torch.Tensor]  # what a processor makes of images, by the names of the model's arguments
Size = tuple[int, int]  # height and width in pixels

PARTS = ("vision tower", "merger", "language model", "adapter")


@dataclass(frozen=True)
class Family(ABC):
    """A model family.

    Attributes:
        model_type: in its configuration.
        processor: the name of its processor's class.
        end_tokens: each ends a completion, whatever the checkpoint says: a base model writes one, a chat model another.
        vision_tokens: sampling one would announce an image that is not there and break the next forward pass.
        config_tokens: the names of tokens' ids in its configuration, and the tokens.
        special_tokens: of a tiny tokenizer, behind its bytes.
        unread_tokens: of the published tokenizer that neither this project nor the processor writes; the model need
            have no place for them.
        image_inputs: the model's arguments that hold images, in the order that its `get_image_features` takes them.
        tower, merger: patterns in the names of the vision tower's modules, and of the layers between it and the
            language model.
        tiny_vision: settings of a tiny vision tower of two layers that other families have not.
        published_pixels: as large an area as the published checkpoints let an image have, or more: no recipe's prompt
            has room for it, and nothing was trained at it here.
        templates: the folder below `configs/chat_templates` with its `base` and `instruct`.
        has_vllm: whether vLLM can be told to bound its images as the processor does.
    """

    model_type: str
    processor: str
    end_tokens: tuple[str, ...]
    vision_tokens: tuple[str, ...]
    config_tokens: Mapping[str, str]
    special_tokens: tuple[str, ...]
    image_inputs: tuple[str, ...]
    tower: str
    merger: str
    tiny_vision: Mapping[str, Any]
    published_pixels: int
    templates: str = ""
    has_vllm: bool = True
    unread_tokens: tuple[str, ...] = ()

    image_axis = 0  # of the image inputs, along which those of several prompts are joined
    has_image_rows = False  # whether the vision tower takes the patches of all images in one row, and where each ends

    # ---- parts of a model

    def part_of(self, name: str) -> str:
        """The one of `PARTS` that a parameter or module belongs to, by its name in `named_parameters`."""
        if "lora_" in name:
            return "adapter"
        if re.search(self.merger, name):
            return "merger"
        return "vision tower" if re.search(self.tower, name) else "language model"

    def modules_of(self, part: str) -> str:
        """A pattern of the whole names of modules that belong to one of `PARTS`, but for the adapter's."""
        return {
            "vision tower": rf"(?!.*{self.merger}).*{self.tower}.*",
            "merger": rf".*{self.merger}.*",
            "language model": rf"(?!.*{self.merger})(?!.*{self.tower}).*",
        }[part]

    def trains_vision(self, model: nn.Module) -> bool:
        """Whether gradients go into a model's vision tower or merger, or into an adapter there."""
        return any(
            re.search(f"{self.tower}|{self.merger}", name) and parameter.requires_grad
            for name, parameter in model.named_parameters()
        )

    def mend(self, model: PreTrainedModel) -> None:
        """Mend, in a model that is about to run, what transformers does wrong with this family."""
        return None

    # ---- images as a model takes them

    def images_of(self, inputs: Mapping[str, Any]) -> ImageInputs:
        """The image inputs among a processor's outputs or a model's arguments; empty where there is no image."""
        images = {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}
        return images if all(len(values) for values in images.values()) else {}

    def encode_images(self, model: PreTrainedModel, images: ImageInputs) -> Any:
        """What the vision tower makes of images, as `join_features` and `image_features` of a packed batch take it."""
        return model.base_model.get_image_features(*(images[name].to(model.device) for name in self.image_inputs))

    def join_images(self, images: Sequence[ImageInputs], device: torch.device) -> ImageInputs:
        """The image inputs of several prompts as one, in their order; empty for none."""
        images = [each for each in images if each]
        if not images:
            return {}
        joined = {name: torch.cat([each[name] for each in images], dim=self.image_axis) for name in self.image_inputs}
        return {name: values.to(device) for name, values in joined.items()}

    def stock_inputs(self, images: Sequence[ImageInputs], is_image: torch.Tensor) -> dict[str, Any]:
        """What TRL's own scoring takes beside the images of B prompts; `is_image` (B, T) is 1 at their tokens."""
        return {}

    @abstractmethod
    def join_features(self, features: Sequence[Any]) -> Any:
        """The vision tower's outputs for several prompts as one."""

    @abstractmethod
    def feature_tensors(self, features: Any) -> list[torch.Tensor]:
        """Every tensor in the vision tower's output."""

    @abstractmethod
    def blank_image(self, config: PreTrainedConfig) -> ImageInputs:
        """The smallest image that the model takes, of one colour."""

    @abstractmethod
    def blacken(
        self, images: ImageInputs, processor: ProcessorMixin, share: float, rng: np.random.Generator
    ) -> ImageInputs:
        """The images with each patch black with probability `share`."""

    @abstractmethod
    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Positions (P,), or of M-RoPE (3, P), of a prompt: what a processor made of it, one row."""

    @abstractmethod
    def count_image_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        """Tokens of images of these sizes, all together; no pixel is touched."""

    def count_frame_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        """Tokens that the processor writes around those of images of these sizes, all together."""
        return 0

    @abstractmethod
    def bound_images(
        self, processor: ProcessorMixin, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        """Let a processor enlarge smaller images and shrink larger ones to these areas; None keeps its own.

        Raises:
            ValueError: no image has a size within the bounds.
        """

    @abstractmethod
    def pixel_bounds(self, processor: ProcessorMixin) -> tuple[int, int]:
        """The smallest and the largest area that its processor gives an image."""

    # ---- for the memory count: a model's parts on torch's `meta` device

    @abstractmethod
    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The vision tower of a policy, with or without an adapter."""

    @abstractmethod
    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Its layers."""

    @abstractmethod
    def count_patches(self, config: PreTrainedConfig, pixels: int) -> int:
        """Patches of an image of this area."""

    @abstractmethod
    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        """A forward pass over patches without numbers, merger included; the last layer's states (patches, width)."""


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: patches in rows of one tensor, a grid an image, M-RoPE."""

    has_image_rows = True

    def stock_inputs(self, images: Sequence[ImageInputs], is_image: torch.Tensor) -> dict[str, Any]:
        return {"mm_token_type_ids": is_image}

    def join_features(self, features: Sequence[Any]) -> BaseModelOutputWithPooling:
        """Embeddings an image, and Qwen3-VL's deepstack features a layer."""
        joined = type(features[0])(pooler_output=[image for each in features for image in each.pooler_output])
        if getattr(features[0], "deepstack_features", None) is not None:
            layers = zip(*(each.deepstack_features for each in features), strict=True)
            joined.deepstack_features = [torch.cat(layer) for layer in layers]
        return joined

    def feature_tensors(self, features: Any) -> list[torch.Tensor]:
        return [*features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]

    def blank_image(self, config: PreTrainedConfig) -> ImageInputs:
        vision = config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        pixels = torch.zeros(merge**2, vision.in_channels * vision.temporal_patch_size * patch**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, merge, merge]])}

    def blacken(
        self, images: ImageInputs, processor: ProcessorMixin, share: float, rng: np.random.Generator
    ) -> ImageInputs:
        pixels = images["pixel_values"]  # (patches, channels * frames * patch * patch)
        black = _black(processor, pixels.dtype)
        black = black.repeat_interleave(pixels.shape[1] // len(black))
        is_black = torch.from_numpy(rng.random(len(pixels)) < share)
        return {**images, "pixel_values": torch.where(is_black[:, None], black, pixels)}

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """M-RoPE: time, height, width."""
        positions, _ = model.base_model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
        )  # (3, 1, P)
        return positions[:, 0]

    def count_image_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        images = processor.image_processor
        factor, bounds = images.patch_size * images.merge_size, images.size
        resized = [smart_resize(*size, factor, bounds["shortest_edge"], bounds["longest_edge"]) for size in sizes]
        # a thin image, which it rounds down to nothing, keeps one row of tokens, as the processor has it
        return sum(max(height, factor) * max(width, factor) for height, width in resized) // factor**2

    def bound_images(
        self, processor: ProcessorMixin, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        # The image processor reads its bounds from `size` alone; its min_pixels and max_pixels are constructor
        # arguments that a later assignment does not reach.
        smallest, largest = self.pixel_bounds(processor)
        smallest, largest = min_pixels or smallest, max_pixels or largest
        if smallest > largest:
            raise Mistake(f"--max_pixels {largest}: below the smallest area that an image is enlarged to, {smallest}")
        processor.image_processor.size = {"shortest_edge": smallest, "longest_edge": largest}

    def pixel_bounds(self, processor: ProcessorMixin) -> tuple[int, int]:
        size = processor.image_processor.size
        return size["shortest_edge"], size["longest_edge"]

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return _find_module(model, "visual")

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.vision_tower(model).blocks

    def count_patches(self, config: PreTrainedConfig, pixels: int) -> int:
        patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
        return pixels // (patch * merge) ** 2 * merge**2

    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        tower = self.vision_tower(model)
        patch = tower.patch_embed.proj.weight.shape[1:].numel()
        states = tower.patch_embed(torch.empty(patches, patch, dtype=dtype))  # (patches, width)
        rotary = torch.empty(patches, states.shape[-1] // tower.blocks[0].attn.num_heads, dtype=dtype)
        for block in tower.blocks:
            lengths = torch.tensor([0, patches], device="cpu")
            states = block(states, cu_seqlens=lengths, position_embeddings=(rotary, rotary))
        tower.merger(states)
        return states


class Tiled(Family):
    """Families that resize an image, cut it into square tiles of one size and make each as many tokens.

    An image that fits one tile is one; another is its tiles and, behind them, all of it in one tile. Images are always
    enlarged to a tile, so `min_pixels` has nothing to say. Positions are those of text.
    """

    @abstractmethod
    def tile_side(self, processor: ProcessorMixin) -> int:
        """Pixels."""

    @abstractmethod
    def tile_tokens(self, processor: ProcessorMixin) -> int:
        """Tokens of a tile, a square number."""

    @abstractmethod
    def count_tiles(self, processor: ProcessorMixin, size: Size) -> int:
        """Tiles of an image of this size, the one that shows all of it included."""

    @abstractmethod
    def set_room(self, processor: ProcessorMixin, tiles: int) -> None:
        """Let an image become so many tiles at most."""

    @abstractmethod
    def most_tiles(self, processor: ProcessorMixin) -> int:
        """How many tiles the processor makes of an image at most."""

    @abstractmethod
    def tiles_within(self, room: int) -> int:
        """The most tiles of an image where there is room for so many."""

    @abstractmethod
    def tile_patches(self, config: PreTrainedConfig) -> int:
        """Patches of a tile."""

    def join_features(self, features: Sequence[Any]) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=torch.cat([each.pooler_output for each in features]))

    def feature_tensors(self, features: Any) -> list[torch.Tensor]:
        return [features.pooler_output.flatten(0, 1)]  # (tiles * tokens, width)

    def blacken(
        self, images: ImageInputs, processor: ProcessorMixin, share: float, rng: np.random.Generator
    ) -> ImageInputs:
        """Black are squares of patches that become one token."""
        pixels = images["pixel_values"]  # (..., channels, side, side)
        tiles, squares = math.prod(pixels.shape[:-3]), math.isqrt(self.tile_tokens(processor))
        is_black = torch.from_numpy(rng.random((tiles, 1, squares, squares)) < share)
        is_black = (
            F.interpolate(is_black.float(), pixels.shape[-2:]).bool().view(*pixels.shape[:-3], 1, *pixels.shape[-2:])
        )
        return {**images, "pixel_values": torch.where(is_black, _black(processor, pixels.dtype)[:, None, None], pixels)}

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        return torch.arange(inputs["input_ids"].shape[1])

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

    def count_patches(self, config: PreTrainedConfig, pixels: int) -> int:
        return self.tiles_within(pixels // _side(config.vision_config.image_size) ** 2) * self.tile_patches(config)


class SmolVLM(Tiled):
    """SmolVLM2 and, as Idefics3, SmolVLM: N tiles of a prompt in (1, N, channels, side, side); text by Llama.

    With `do_image_splitting` the longer side of every image becomes `size`, a multiple of the tile's.
    """

    image_axis = 1

    def mend(self, model: PreTrainedModel) -> None:
        """Let weights in float32 run under autocast, where SmolVLM puts features in 16 bits into float32 embeddings."""
        embeddings = model.get_input_embeddings()
        _find_module(model, "connector").register_forward_hook(
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
        """Rows and columns of tiles; 0, 0 for an image that is one tile. As the image processor resizes, twice."""
        images, side = processor.image_processor, self.tile_side(processor)
        if not images.do_image_splitting:
            return 0, 0
        height, width = get_resize_output_image_size(torch.empty(size, device="meta"), images.size["longest_edge"])
        ratio = width / height
        if width >= height:
            width = math.ceil(width / side) * side
            height = int(width / ratio)
        else:
            height = math.ceil(height / side) * side
            width = int(height * ratio)
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        return (rows, columns) if max(rows, columns) > 1 else (0, 0)

    def count_tiles(self, processor: ProcessorMixin, size: Size) -> int:
        rows, columns = self.split(processor, size)
        return rows * columns + 1

    def count_frame_tokens(self, processor: ProcessorMixin, sizes: Sequence[Size]) -> int:
        """Two around each tile of a row, an end of each row, and three around the tile that shows all."""
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

    def tile_patches(self, config: PreTrainedConfig) -> int:
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return _find_module(model, "vision_model")

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.vision_tower(model).encoder.layers

    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        tower, config = self.vision_tower(model), model.config.vision_config
        tiles = patches // self.tile_patches(model.config)
        pixels = torch.empty(tiles, config.num_channels, config.image_size, config.image_size, dtype=dtype)
        # not the embeddings' own forward pass: it looks at a mask, which has no numbers here
        states = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (tiles, patches, width)
        states = states + tower.embeddings.position_embedding.weight
        for layer in tower.encoder.layers:
            states = layer(states, None)
        _find_module(model, "connector")(tower.post_layernorm(states))
        return states.flatten(0, 1)


class InternVL(Tiled):
    """InternVL3 as transformers has it: the tiles of all images in (tiles, channels, side, side); text by Qwen2."""

    def stock_inputs(self, images: Sequence[ImageInputs], is_image: torch.Tensor) -> dict[str, Any]:
        return {"num_tiles": [len(each.get("pixel_values", ())) for each in images]}

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

    def tile_patches(self, config: PreTrainedConfig) -> int:
        height, width = config.vision_config.image_size
        rows, columns = config.vision_config.patch_size
        return (height // rows) * (width // columns)

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return _find_module(model, "vision_tower")

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return self.vision_tower(model).encoder.layer

    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        tower, config = self.vision_tower(model), model.config.vision_config
        patch_count = self.tile_patches(model.config)
        tiles = patches // patch_count
        states = tower.embeddings(torch.empty(tiles, config.num_channels, *config.image_size, dtype=dtype))
        for layer in tower.encoder.layer:
            states = layer(states)  # (tiles, 1 + patches, width)
        merged = round(1 / model.config.downsample_ratio) ** 2
        _find_module(model, "multi_modal_projector")(states[:, 1:].reshape(tiles, patch_count // merged, -1))
        return states.flatten(0, 1)


def _find_module(model: nn.Module, ending: str) -> nn.Module:
    """The outermost module whose name ends so, with or without an adapter around the model."""
    return next(module for name, module in model.named_modules() if name.endswith(ending))


def _black(processor: ProcessorMixin, dtype: torch.dtype) -> torch.Tensor:
    """Black as the processor hands it to the model, (channels,)."""
    images = processor.image_processor
    mean, std = (torch.tensor(values, dtype=dtype) for values in (images.image_mean, images.image_std))
    return -mean / std


def _side(size: int | Sequence[int]) -> int:
    """The side of a square that a configuration writes as a number or as two."""
    return size if isinstance(size, int) else size[0]


def _tiles_across(room: int) -> int:
    """How many tiles SmolVLM may have side by side where there is room for so many, one for the whole image included.

    Its vocabulary names those of 6 rows and columns.
    """
    return max(1, min(math.isqrt(max(room - 1, 0)), 6))


# Qwen2-VL's special tokens in the order of their ids (151643 ... 151656 in the published vocabulary)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN: dict[str, Any] = {
    "end_tokens": ("<|endoftext|>", "<|im_end|>"),
    "vision_tokens": ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    "special_tokens": QWEN_TOKENS,
    "config_tokens": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "image_inputs": ("pixel_values", "image_grid_thw"),
    "tower": r"\bvisual\.",
    "merger": r"\bvisual\.\w*merger",  # Qwen3-VL has a list of them too
    "published_pixels": 12845056,  # 16384 image tokens of Qwen2-VL
}
_WINDOWS = {"window_size": 56, "fullatt_block_indexes": [1]}
_POSITIONS = {"num_position_embeddings": 64}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1], **_POSITIONS}

# SmolVLM's, but for those that SmolLM2 writes code with
_SMOL_IMAGE = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
)
_SMOLVLM: dict[str, Any] = {
    "end_tokens": ("<|endoftext|>", "<|im_end|>", "<end_of_utterance>"),
    "vision_tokens": _SMOL_IMAGE,
    "config_tokens": {"image_token_id": "<image>"},
    "special_tokens": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_SMOL_IMAGE, "<end_of_utterance>"),
    "image_inputs": ("pixel_values", "pixel_attention_mask"),
    "tower": r"\bvision_model\.",
    "merger": r"\bconnector\.",
    "tiny_vision": {},
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
    "vision_tokens": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    "config_tokens": {"image_token_id": "<IMG_CONTEXT>"},
    "special_tokens": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_INTERN_TOKENS),
    "image_inputs": ("pixel_values",),
    "tower": r"\bvision_tower\.",
    "merger": r"\bmulti_modal_projector\.",
    "tiny_vision": {},
    "published_pixels": 13 * 448**2,  # 12 tiles and one
    "templates": "internvl",
    "has_vllm": False,
    "unread_tokens": ("<video>",),
}
FAMILIES: dict[str, Family] = {
    "qwen2_vl": QwenVL("qwen2_vl", "Qwen2VLProcessor", tiny_vision={}, **_QWEN),
    "qwen2_5_vl": QwenVL("qwen2_5_vl", "Qwen2_5_VLProcessor", tiny_vision=_WINDOWS, **_QWEN),
    "qwen3_vl": QwenVL("qwen3_vl", "Qwen3VLProcessor", tiny_vision=_DEEPSTACK, **_QWEN),
    "qwen3_5": QwenVL("qwen3_5", "Qwen3VLProcessor", tiny_vision=_POSITIONS, **_QWEN),  # recurrent: see recurrent.py
    "idefics3": SmolVLM("idefics3", "Idefics3Processor", **_SMOLVLM),
    "smolvlm": SmolVLM("smolvlm", "SmolVLMProcessor", **_SMOLVLM),
    "internvl": InternVL("internvl", "InternVLProcessor", **_INTERNVL),
}


def find_family(model_type: str) -> Family:
    """The family of this name in a configuration; ValueError for one that this project was not tested with."""
    if model_type not in FAMILIES:
        raise Mistake(f"a {model_type!r} model; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of(model: nn.Module) -> Family:
    """The family of a model, also of one inside an adapter. Raises what `find_family` raises."""
    return find_family(model.config.model_type)


def family_of_processor(processor: ProcessorMixin) -> Family:
    """A family whose processor this is; those that share one, Qwen3-VL and Qwen3.5, count images alike."""
    return next(family for family in FAMILIES.values() if family.processor == type(processor).__name__)


def end_token_ids(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's own, and its family's."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return sorted({tokenizer.eos_token_id, *_known_ids(tokenizer, [f.end_tokens for f in FAMILIES.values()])} - {None})


def control_tokens(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer takes for something else than text."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def vision_token_ids(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """The ids that a policy must never sample."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return sorted(_known_ids(tokenizer, [family.vision_tokens for family in FAMILIES.values()]))


def _known_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[str]]) -> set[int]:
    """The ids of those tokens that the vocabulary has; a tokenizer alone does not say what family it is of."""
    vocab = tokenizer.get_vocab()
    return {vocab[token] for some in tokens for token in some if token in vocab}
