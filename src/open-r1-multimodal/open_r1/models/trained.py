"""Chooses what of a model is trained (frozen parts, adapters), and lets gradients reach it."""

from collections import Counter

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from open_r1.base.errors import Mistake
from open_r1.configs import FreezeArguments
from open_r1.models.families import PARTS, Family, family_of


def frozen_parts(freezing: FreezeArguments) -> list[str]:
    """The names in `PARTS` that are not trained; Mistake when nothing would be left to train."""
    vision, merger, llm = freezing.freeze_vision, freezing.freeze_merger, freezing.freeze_llm
    flags = (vision, vision if merger is None else merger, llm)
    if all(flags):
        raise Mistake("freeze_vision, freeze_merger, freeze_llm: nothing is left to train; unset one")
    return [part for part, frozen in zip(PARTS, flags, strict=False) if frozen]


def freeze(model: PreTrainedModel, freezing: FreezeArguments) -> None:
    """Stop gradients into the frozen parts of a model; raises what `frozen_parts` raises."""
    frozen, family = frozen_parts(freezing), family_of(model)
    for name, parameter in model.named_parameters():
        if family.part_of(name) in frozen:
            parameter.requires_grad_(False)


def guide_gradients(model: PreTrainedModel) -> None:
    """Let the inputs of layers that learn take gradients, those of the vision tower and those of the language model.

    The checkpoints that TRL chooses for adapters under ZeRO-3 give no gradients to layers whose inputs take none. This
    stands in for `enable_input_require_grads` of transformers 5.17: that hooks the embeddings anew whenever checkpoints
    are switched on, twice a step, so that every token of a rollout takes longer and longer; it finds no embeddings of
    Qwen3-VL's and Qwen3.5's patches, so that adapters in their towers would not learn; and it has a tower whose layers
    are all frozen run backward for nothing.

    Args:
        model: not wrapped, but with its adapter.
    """
    model.disable_input_require_grads()  # of an adapter, which TRL has enabled
    model.enable_input_require_grads = lambda: None
    family = family_of(model)
    parts = {
        family.patch_embedding(model): family.vision_blocks(model),
        model.get_input_embeddings(): model.base_model.get_decoder(),
    }
    for embedding, layers in parts.items():
        if any(parameter.requires_grad for parameter in layers.parameters()):
            embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def get_adapter_config(model_args: ModelConfig, freezing: FreezeArguments, family: Family) -> PeftConfig | None:
    """TRL's LoRA configuration of a recipe, no adapter in a frozen part; None without `use_peft`."""
    config, frozen = get_peft_config(model_args), frozen_parts(freezing)
    if config is not None:
        config.revision = model_args.model_revision  # for whoever merges the adapter
        if frozen:
            config.exclude_modules = "|".join(family.modules_of(part) for part in frozen)
    return config


def check_saved_modules(model: nn.Module, adapter: PeftConfig | None) -> None:
    """Raise Mistake for a module to be trained whole that is none of the model's: PEFT would pass it over."""
    names = [name for name, _ in model.named_modules()]
    for module in getattr(adapter, "modules_to_save", None) or ():
        if not any(name.endswith(module) for name in names):
            raise Mistake(f"lora_modules_to_save: the model has no module {module!r}")


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter: whole under ZeRO-3, unpacked where it is quantised to 4 bits."""
    if hasattr(parameter, "quant_state"):  # bitsandbytes keeps two weights in a byte
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def parameter_table(model: nn.Module) -> str:
    """How many parameters each part of the model has and how many are trained, a line a part."""
    total, trained, family = Counter(), Counter(), family_of(model)
    for name, parameter in model.named_parameters():
        count, part = count_elements(parameter), family.part_of(name)
        total[part] += count
        trained[part] += count * parameter.requires_grad
    rows = [(part, total[part], trained[part]) for part in PARTS if total[part]]
    rows.append(("all", total.total(), trained.total()))
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}"]
    return "\n".join(lines + [f"{part:<16}{count:>16,}{trains:>16,}" for part, count, trains in rows])
