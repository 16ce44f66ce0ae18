"""The Qwen families: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5."""

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from open_r1.base.errors import Mistake
from open_r1.models.families.base import Family, ImageInputs, Size, black_pixel
from open_r1.models.image_tags import QWEN_IMAGE_TAGS


def embed_patches(proj: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """What a convolution, whose kernel is as large as a patch, makes of patches (N, channels, frames, patch, patch).

    Returns:
        (N, width).
    """
    return functional.linear(patches.flatten(1), proj.weight.flatten(1), proj.bias)


def forward_of_conv(proj: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """In place of a patch embedding's own: on a GPU the matmul, on a CPU what it was, bit for bit."""
    return embed_patches(proj, patches) if patches.is_cuda else nn.Conv3d.forward(proj, patches)


class QwenVL(Family):
    """What the Qwen families share: patches in rows of one tensor, a grid an image, M-RoPE."""

    blocks = "blocks"
    has_image_rows = True
    video_processor = Qwen2VLVideoProcessor  # this and the side of a patch in pixels: of a tiny processor
    patch_size = 14

    def mend(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        """Let a GPU compute the patch embedding as a matmul: cuDNN has no fast Conv3d in bfloat16, or none at all.

        Weights and their names stay. vLLM computes it so, too.
        """
        proj = self.patch_embedding(model).proj
        if isinstance(proj, nn.Conv3d):  # not within an adapter
            proj.forward = MethodType(forward_of_conv, proj)

    def patch_embedding(self, model: nn.Module) -> nn.Module:
        """Named here, since transformers 5.17 does not find that of Qwen3-VL and Qwen3.5."""
        return self.vision_tower(model).patch_embed

    def plain_inputs(self, is_image: torch.Tensor) -> dict[str, Any]:
        return {"mm_token_type_ids": is_image}

    def join_features(self, features: Sequence[Any]) -> BaseModelOutputWithPooling:
        """Embeddings an image, and Qwen3-VL's deepstack features a layer."""
        joined = super().join_features(features)
        if getattr(features[0], "deepstack_features", None) is not None:
            layers = zip(*(each.deepstack_features for each in features), strict=True)
            joined.deepstack_features = [torch.cat(layer) for layer in layers]
        return joined

    def feature_tensors(self, features: Any) -> list[torch.Tensor]:
        return super().feature_tensors(features) + (getattr(features, "deepstack_features", None) or [])

    def blank_image(self, config: PreTrainedConfig) -> ImageInputs:
        vision = config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        pixels = torch.zeros(merge**2, vision.in_channels * vision.temporal_patch_size * patch**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, merge, merge]])}

    def blacken(
        self, images: ImageInputs, processor: ProcessorMixin, share: float, rng: np.random.Generator
    ) -> ImageInputs:
        pixels = images["pixel_values"]  # (patches, channels * frames * patch * patch)
        black = black_pixel(processor, pixels.dtype)
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
        return sum(images.get_number_of_image_patches(*size) for size in sizes) // images.merge_size**2

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

    def tiny_processor(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ProcessorMixin:
        """Of 16 tokens an image, of 28x28 pixels each."""
        size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        images = Qwen2VLImageProcessor(patch_size=self.patch_size, size=size)
        return self.processor(images, tokenizer, self.video_processor(), chat_template=chat_template)

    def tiny_config(self, text: Mapping[str, Any], vision_size: int, vision_layers: int) -> dict[str, Any]:
        return {
            "text_config": self.tiny_text(text),
            "vision_config": self.tiny_vision(text["hidden_size"], vision_size, vision_layers),
            "tie_word_embeddings": True,
        }

    def tiny_text(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The text configuration as this family has it."""
        size = _head_size(text)
        section = [size // 8, 3 * size // 16, 3 * size // 16]  # time, height, width: half of a head
        return {**text, "rope_parameters": {**text["rope_parameters"], "mrope_section": section}}

    def tiny_vision(self, text_size: int, size: int, layers: int) -> dict[str, Any]:
        """The configuration of a vision tower of this width, in front of a language model of `text_size`."""
        widths = {"hidden_size": size, "intermediate_size": 2 * size, "out_hidden_size": text_size}
        return {"depth": layers, "num_heads": size // 16, **widths}


class Qwen2VL(QwenVL):
    """Qwen2-VL, whose configuration has other names for the widths of its vision tower."""

    def tiny_vision(self, text_size: int, size: int, layers: int) -> dict[str, Any]:
        return {"depth": layers, "num_heads": size // 16, "embed_dim": size, "hidden_size": text_size}


class Qwen25VL(QwenVL):
    """Qwen2.5-VL, whose vision tower attends within windows in all but some layers."""

    def tiny_vision(self, text_size: int, size: int, layers: int) -> dict[str, Any]:
        windows = {"window_size": 56, "fullatt_block_indexes": [1]}
        return super().tiny_vision(text_size, size, layers) | windows


class Qwen3VL(QwenVL):
    """Qwen3-VL, whose vision tower also hands features to the first layers of the language model (deepstack)."""

    video_processor = Qwen3VLVideoProcessor
    patch_size = 16

    def tiny_text(self, text: Mapping[str, Any]) -> dict[str, Any]:
        text = super().tiny_text(text)
        rope = {**text["rope_parameters"], "mrope_interleaved": True}
        return {**text, "head_dim": _head_size(text), "rope_parameters": rope}

    def tiny_vision(self, text_size: int, size: int, layers: int) -> dict[str, Any]:
        others = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        return super().tiny_vision(text_size, size, layers) | others


class Qwen35(QwenVL):
    """Qwen3.5: most of its layers are recurrent (see `open_r1.engines.recurrent`)."""

    video_processor = Qwen3VLVideoProcessor
    patch_size = 16

    def tiny_text(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Every fourth layer attends, or the last of fewer; half of a head is rotated."""
        size, heads = _head_size(text), text["num_attention_heads"]
        section = [size // 8, size // 16, size // 16]
        return {
            **text,
            "head_dim": size,
            "full_attention_interval": min(text["num_hidden_layers"], 4),
            "linear_num_key_heads": heads // 2,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": size,
            "linear_value_head_dim": size,
            "rope_parameters": {**text["rope_parameters"], "mrope_section": section, "partial_rotary_factor": 0.5},
        }

    def tiny_vision(self, text_size: int, size: int, layers: int) -> dict[str, Any]:
        return super().tiny_vision(text_size, size, layers) | {"num_position_embeddings": 64}


def _head_size(text: Mapping[str, Any]) -> int:
    """Dimensions of an attention head of a text configuration."""
    return text["hidden_size"] // text["num_attention_heads"]


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
    *QWEN_IMAGE_TAGS,
)
QWEN: dict[str, Any] = {
    "end_tokens": ("<|endoftext|>", "<|im_end|>"),
    "vision_tokens": QWEN_IMAGE_TAGS,
    "special_tokens": QWEN_TOKENS,
    "tokenizer_roles": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "config_tokens": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "image_inputs": ("pixel_values", "image_grid_thw"),
    "tower": "visual",
    "merger": r"\bvisual\.\w*merger",  # Qwen3-VL has a list of them too
    "published_pixels": 12845056,  # 16384 image tokens of Qwen2-VL
}
QWEN_FAMILIES = (
    Qwen2VL("qwen2_vl", Qwen2VLProcessor, **QWEN),
    Qwen25VL("qwen2_5_vl", Qwen2_5_VLProcessor, **QWEN),
    Qwen3VL("qwen3_vl", Qwen3VLProcessor, **QWEN),
    Qwen35("qwen3_5", Qwen3VLProcessor, **QWEN),
)
