"""Everything that differs between model families: what a family is, one entry for each, and how to find a model's.

`base.py` says what a family is. A new one is an entry in the file of those like it (`qwen.py`, `tiled.py`), a file of
its own whose entry is added to `FAMILIES`, or one of a user's, named `module:NAME` (docs/families.md). Two things are
elsewhere: the tokens of its images, if they are new, in `open_r1.models.image_tags`, and its chat templates, if it has
its own, in `configs/chat_templates`.
"""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from open_r1.base.errors import Mistake
from open_r1.base.plugins import import_named
from open_r1.models.families.base import PARTS, Family, ImageInputs
from open_r1.models.families.qwen import QWEN_FAMILIES
from open_r1.models.families.tiled import TILED_FAMILIES

__all__ = [
    "FAMILIES",
    "PARTS",
    "Family",
    "ImageInputs",
    "control_tokens",
    "end_token_ids",
    "family_of",
    "family_of_processor",
    "find_family",
    "tokenizer_of",
    "use_family",
    "vision_token_ids",
]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*QWEN_FAMILIES, *TILED_FAMILIES)}


def find_family(model_type: str) -> Family:
    """The family of this name in a configuration; Mistake for one that this project was not tested with."""
    if model_type not in FAMILIES:
        raise Mistake(f"a {model_type!r} model; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def use_family(name: str | None) -> Family | None:
    """Know a family of the user's, `module:NAME`, in this process, and return it; raises what `import_named` raises."""
    if name is None:
        return None
    family = import_named("family", "family", name, fits=lambda value: isinstance(value, Family))
    FAMILIES[family.model_type] = family
    return family


def family_of(model: nn.Module) -> Family:
    """The family of a model, also of one inside an adapter; raises what `find_family` raises."""
    return find_family(model.config.model_type)


def family_of_processor(processor: ProcessorMixin) -> Family:
    """A family whose processor this is; those that share one, Qwen3-VL and Qwen3.5, count images alike."""
    return next(family for family in FAMILIES.values() if family.processor is type(processor))


def tokenizer_of(processor: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor, or the one that is given in its place."""
    return getattr(processor, "tokenizer", processor)


def end_token_ids(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the tokenizer's own, and its family's."""
    tokenizer = tokenizer_of(processor)
    known = _known_ids(tokenizer, (token for family in FAMILIES.values() for token in family.end_tokens))
    return sorted({tokenizer.eos_token_id, *known} - {None})


def control_tokens(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer takes for something else than text."""
    return [str(token) for token in tokenizer_of(processor).added_tokens_decoder.values() if token.special]


def vision_token_ids(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """The ids that a policy must never sample."""
    tokens = (token for family in FAMILIES.values() for token in family.vision_tokens)
    return sorted(_known_ids(tokenizer_of(processor), tokens))


def _known_ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> set[int]:
    """The ids of those tokens that the vocabulary has; a tokenizer alone does not say what family it is of."""
    vocab = tokenizer.get_vocab()
    return {vocab[token] for token in tokens if token in vocab}
