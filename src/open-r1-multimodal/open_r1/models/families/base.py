"""What a model family is: all that the package asks about one, with what most families share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Qwen2Tokenizer

from open_r1.base.errors import Mistake

ImageInputs = dict[str, torch.Tensor]  # images as a processor makes them, by the model's arguments
Size = tuple[int, int]  # height and width in pixels

PARTS = ("vision tower", "merger", "language model", "adapter")


@dataclass(frozen=True)
class Family(ABC):
    """A model family.

    Attributes:
        model_type: in its configuration.
        processor: the class of its processor.
        end_tokens: each ends a completion: a base model writes one, a chat model another.
        vision_tokens: never sampled: one would announce an image that is not there.
        config_tokens: the names of tokens' ids in its configuration, and the tokens.
        special_tokens: of a tiny tokenizer, in the order of their ids, which come behind those of its bytes.
        tokenizer_roles: arguments of the tokenizer's class that give some of them a role, such as `eos_token`.
        unread_tokens: of the published tokenizer that neither this project nor the processor writes; the model need
            have no place for them.
        image_inputs: the arguments of the model, and of its `get_image_features`, that hold images.
        tower: name of the vision tower's module.
        merger: pattern in the names of the layers between the vision tower and the language model.
        published_pixels: the largest area in pixels that published checkpoints allow an image. A processor with this
            bound, or a larger one, was not set by a recipe, so the evaluation takes the paper's (`PAPER_MAX_PIXELS`).
        templates: the folder with its `base` and `instruct`, below `configs/chat_templates` or a whole path.
        has_vllm: whether vLLM can be told to bound its images as the processor does.
        tokenizer_class: of a tiny tokenizer.
    """

    model_type: str
    processor: type[ProcessorMixin]
    end_tokens: tuple[str, ...]
    vision_tokens: tuple[str, ...]
    config_tokens: Mapping[str, str]
    special_tokens: tuple[str, ...]
    tokenizer_roles: Mapping[str, Any]
    image_inputs: tuple[str, ...]
    tower: str
    merger: str
    published_pixels: int
    templates: str = ""
    has_vllm: bool = True
    tokenizer_class: type[PreTrainedTokenizerBase] = Qwen2Tokenizer
    unread_tokens: tuple[str, ...] = ()

    blocks = "encoder.layers"  # name of the vision tower's layers within it
    image_axis = 0  # of the image inputs, along which those of several prompts are joined
    has_image_rows = False  # whether the vision tower takes the patches of all images in one row, and where each ends

    # ---- parts of a model

    def part_of(self, name: str) -> str:
        """The one of `PARTS` that a parameter or module of this name belongs to."""
        if "lora_" in name:
            return "adapter"
        if re.search(self.merger, name):
            return "merger"
        return "vision tower" if re.search(self._in_tower, name) else "language model"

    @property
    def _in_tower(self) -> str:
        return rf"\b{self.tower}\."

    def modules_of(self, part: str) -> str:
        """A pattern of the whole names of modules of one of `PARTS`, but for the adapter's."""
        return {
            "vision tower": rf"(?!.*{self.merger}).*{self._in_tower}.*",
            "merger": rf".*{self.merger}.*",
            "language model": rf"(?!.*{self.merger})(?!.*{self._in_tower}).*",
        }[part]

    def trains_vision(self, model: nn.Module) -> bool:
        """Whether gradients go into a model's vision tower or merger, or into an adapter there."""
        return any(
            re.search(f"{self._in_tower}|{self.merger}", name) and parameter.requires_grad
            for name, parameter in model.named_parameters()
        )

    def mend(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        """Mend, in a model that is about to run, what does not fit this processor, or is transformers' mistake."""
        return None

    # ---- images as a model takes them

    def images_of(self, inputs: Mapping[str, Any]) -> ImageInputs:
        """The image inputs among a processor's outputs or a model's arguments; empty for none."""
        images = {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}
        return images if all(len(values) for values in images.values()) else {}

    def encode_images(self, model: PreTrainedModel, images: ImageInputs) -> Any:
        """What the vision tower makes of images, as `join_features` takes it."""
        inputs = {name: images[name].to(model.device) for name in self.image_inputs}
        return self.join_features([model.base_model.get_image_features(**inputs)])  # without the tower's states

    def join_images(self, images: Sequence[ImageInputs], device: torch.device) -> ImageInputs:
        """The image inputs of several prompts as one, in their order; empty for none."""
        images = [inputs for inputs in images if inputs]
        if not images:
            return {}
        return {
            name: torch.cat([inputs[name] for inputs in images], dim=self.image_axis).to(device)
            for name in self.image_inputs
        }

    def plain_inputs(self, is_image: torch.Tensor) -> dict[str, Any]:
        """What a plain forward pass over B rows takes beside images; `is_image` (B, T) is 1 at their tokens."""
        return {}

    def join_features(self, features: Sequence[Any]) -> Any:
        """The vision tower's outputs for several prompts as one; here embeddings (tokens, width) an image."""
        return type(features[0])(pooler_output=[image for each in features for image in each.pooler_output])

    def feature_tensors(self, features: Any) -> list[torch.Tensor]:
        """Every tensor in the vision tower's output."""
        return [*features.pooler_output]

    @abstractmethod
    def blank_image(self, config: PreTrainedConfig) -> ImageInputs:
        """The smallest image that the model takes, of one colour."""

    def blacken(
        self, images: ImageInputs, processor: ProcessorMixin, share: float, rng: np.random.Generator
    ) -> ImageInputs:
        """The images with each patch black with probability `share`, for `papo_coef`; a family may do without."""
        raise self.lacks("blacken")

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Positions (P,), those of text, or of M-RoPE (3, P), of a prompt as a processor made it, one row."""
        return torch.arange(inputs["input_ids"].shape[1])

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
        """Let a processor enlarge or shrink images to these areas; None keeps its own.

        Raises:
            Mistake: no image has a size within the bounds.
        """

    @abstractmethod
    def pixel_bounds(self, processor: ProcessorMixin) -> tuple[int, int]:
        """The smallest and the largest area that its processor gives an image."""

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The vision tower of a policy, with or without an adapter."""
        return find_module(model, self.tower)

    def patch_embedding(self, model: nn.Module) -> nn.Module:
        """The module whose output goes into the first layer of the vision tower."""
        return self.vision_tower(model).get_input_embeddings()

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        """The layers of the vision tower."""
        return self.vision_tower(model).get_submodule(self.blocks)

    # ---- for the memory count: a model's parts on torch's `meta` device; a family may do without

    def count_patches(self, config: PreTrainedConfig, pixels: int) -> int:
        """Patches of an image of this area."""
        raise self.lacks("count_patches")

    def run_tower(self, model: nn.Module, patches: int, dtype: torch.dtype) -> torch.Tensor:
        """A forward pass over patches without numbers; the last layer's states (patches, width)."""
        raise self.lacks("run_tower")

    def lacks(self, method: str) -> Mistake:
        """What is said where a family does without a method that is asked for."""
        return Mistake(f"the family {self.model_type} does not define {method}, which this needs")

    # ---- a tiny model, for `open_r1.tiny`; a family may do without

    def tiny_processor(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ProcessorMixin:
        """A processor with room for images of 112x112 pixels."""
        raise self.lacks("tiny_processor")

    def tiny_config(self, text: Mapping[str, Any], vision_size: int, vision_layers: int) -> dict[str, Any]:
        """The arguments of a tiny configuration, but for the ids of `config_tokens`.

        Args:
            text: the text configuration, as far as all families have the same.
            vision_size: width of the vision tower, whose heads have 16 dimensions.
            vision_layers: of the vision tower.
        """
        raise self.lacks("tiny_config")


def find_module(model: nn.Module, ending: str) -> nn.Module:
    """The outermost module whose name ends so, with or without an adapter around the model."""
    return next(module for name, module in model.named_modules() if name.endswith(ending))


def black_pixel(processor: ProcessorMixin, dtype: torch.dtype) -> torch.Tensor:
    """Black as the processor hands it to the model, (channels,)."""
    images = processor.image_processor
    mean, std = (torch.tensor(values, dtype=dtype) for values in (images.image_mean, images.image_std))
    return -mean / std
