"""Loads a policy and its processor as a recipe says: dtype, attention, adapters, chat template."""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from open_r1.base.errors import FileMistake, Mistake, first_line, naming_option
from open_r1.base.hub import model_folder
from open_r1.base.prompts import load_chat_template
from open_r1.models.families import (
    FAMILIES,
    Family,
    end_token_ids,
    family_of,
    family_of_processor,
    find_family,
    tokenizer_of,
)
from open_r1.models.files import ADAPTER, check_processor_files, check_weight_files, read_config, read_object
from open_r1.models.templates import try_template

MODEL_SETTING = "MODEL, model_name_or_path"  # what chooses a recipe's model, for errors


def resolve_dtype(name: str | None) -> torch.dtype | str:
    """The torch dtype of a name such as `"bfloat16"`; `"auto"` and None keep the checkpoint's."""
    if name in (None, "auto"):
        return "auto"
    if name not in ("bfloat16", "float16", "float32"):
        raise Mistake(f"dtype: {name!r} is none of auto, bfloat16, float16, float32")
    return getattr(torch, name)


def resolve_attn_implementation(name: str | None, dtype: torch.dtype | str) -> str:
    """`"auto"` and None -> `"flash_attention_2"` where it can be used, else `"sdpa"`.

    It takes the package flash-attn, a GPU of compute capability 8.0 or more, and 16-bit weights.
    """
    if name not in (None, "auto"):
        return name
    usable = (
        importlib.util.find_spec("flash_attn") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
    )
    return "flash_attention_2" if usable else "sdpa"


def check_model(model_args: ModelConfig) -> Family:
    """Fetch the policy of a recipe from the Hub, and see that it can be loaded, without doing so.

    Returns:
        Its family.

    Raises:
        Mistake: what `check_model_files` raises, or the recipe cannot train the model.
    """
    with naming_option(MODEL_SETTING):
        family = check_model_files(model_args.model_name_or_path, model_args.model_revision)
    quantises = model_args.load_in_4bit or model_args.load_in_8bit
    if quantises and importlib.util.find_spec("bitsandbytes") is None:
        raise Mistake("load_in_4bit, load_in_8bit: bitsandbytes is not installed; run setup.sh again")
    if quantises and not model_args.use_peft:
        raise Mistake(
            "load_in_4bit, load_in_8bit: weights that bitsandbytes quantised cannot be trained; set use_peft: true"
        )
    return family


def check_model_files(model_name_or_path: str | Path, revision: str = "main") -> Family:
    """Fetch a model from the Hub, and see that its files are whole; of weights the headers are read.

    Returns:
        Its family.

    Raises:
        Mistake: there is no such model, or it is not whole, or of no supported family.
    """
    folder = model_folder(model_name_or_path, revision)
    family = family_of_folder(folder)
    check_weight_files(folder)
    return family


def check_teacher(name: str, config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Fetch a teacher from the Hub, and see that it reads what a policy reads and writes.

    Args:
        name: of the teacher on the Hub, or its folder.
        config: of the policy.
        processor: of the policy.

    Raises:
        Mistake: there is no such model, or it is of another family or vocabulary.
    """
    setting = "teacher_model_name_or_path"
    with naming_option(setting):
        family, its_processor = check_model_files(name), load_processor(name)
    if family is not find_family(config.model_type):
        raise Mistake(f"{setting}: {name} is of {family.model_type}, and the policy of {config.model_type}")
    tokens, rows = tokenizer_of(processor).get_vocab(), config.get_text_config().vocab_size
    its_config = load_config(name, settings=setting)
    its_tokens, its_rows = its_processor.tokenizer.get_vocab(), its_config.get_text_config().vocab_size
    # Checkpoints of one tokenizer may have more rows than it has tokens: Qwen2-VL 151936 of 2B, 152064 of 7B.
    if its_tokens != tokens or its_rows < rows:
        raise Mistake(
            f"{setting}: the vocabulary of {name} ({len(its_tokens)} tokens, {its_rows} rows) is not the policy's "
            f"({len(tokens)} tokens, {rows} rows); name a larger model of the same tokenizer"
        )


def load_teacher(name: str, dtype: str, rows: int) -> PreTrainedModel:
    """`load_model`, with the policy's vocabulary of so many rows: a teacher's padding beyond it has no probability."""
    teacher = load_model(name, dtype=dtype)
    if teacher.config.get_text_config().vocab_size > rows:
        teacher.resize_token_embeddings(rows)
    return teacher


def family_of_folder(folder: Path) -> Family:
    """The family that a model's config.json names; raises what `check_model_files` raises."""
    model_type = read_config(folder).get("model_type")
    if not isinstance(model_type, str):
        raise FileMistake(f"{folder / 'config.json'}: names no model_type")
    try:
        return find_family(model_type)
    except Mistake as error:
        raise Mistake(f"{folder} is {error}") from error


def config_of_folder(folder: Path) -> PreTrainedConfig:
    """A model's configuration, or a Mistake where transformers cannot read its file."""
    with reading(folder / "config.json", "configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_config(model_name_or_path: str, revision: str = "main", settings: str = MODEL_SETTING) -> PreTrainedConfig:
    """The configuration of a model; Mistake, which names its settings, where there is none of a supported family."""
    with naming_option(settings):
        folder = model_folder(model_name_or_path, revision, ["config.json"])
        family_of_folder(folder)
    return config_of_folder(folder)


def check_weights(model_name_or_path: str | Path, revision: str = "main") -> None:
    """Raise Mistake unless the weights have the names and shapes of the configuration; none is read."""
    if not is_deepspeed_zero3_enabled():  # then transformers takes no device_map
        read_weights(model_folder(model_name_or_path, revision), device_map="meta")


@contextmanager
def reading(files: str | Path, what: str) -> Iterator[None]:
    """In the block, a library reads a model's files: what it raises about them becomes a Mistake.

    Libraries raise errors of all kinds about damaged files, `tokenizers` for one a plain Exception.
    """
    try:
        yield
    except Exception as error:
        reason = first_line(error) or "without a reason"
        if reason.endswith(":"):  # torch's: tensors are listed below, each with its reason
            reason = " ".join(line.strip() for line in str(error).strip().split("\n")[:2])
        raise FileMistake(f"{files}: its {what} cannot be loaded ({type(error).__name__}: {reason})") from error


def read_weights(name_or_folder: str | Path, **settings: Any) -> PreTrainedModel:
    """transformers' `from_pretrained`: every weight comes from the checkpoint, no file runs code.

    Raises:
        Mistake: weights are missing or of another shape, or transformers cannot load them.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.disabled = True  # what it would warn of is raised below
    try:
        with reading(name_or_folder, "model"):
            model, report = AutoModelForImageTextToText.from_pretrained(
                name_or_folder,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **settings,
            )
    finally:
        logger.disabled = False
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise FileMistake(f"{name_or_folder}: weights are missing: {_first(missing)}; fetch or save the model again")
    if mismatched:
        shapes = [f"{name} is {list(there)}, not {list(needed)}" for name, there, needed in mismatched]
        raise FileMistake(f"{name_or_folder}: weights of another shape than config.json says: {_first(shapes)}")
    if report["error_msgs"]:
        raise FileMistake(f"{name_or_folder}: {_first(report['error_msgs'])}")
    return model


def _first(texts: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return texts[0] + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")


def check_finite(model: nn.Module, name: str | Path) -> None:
    """Raise Mistake with the name of a weight that is NaN or infinite; no weight is copied."""
    for parameter_name, parameter in model.named_parameters():
        with gather_params_ctx(parameter, modifier_rank=None):  # under ZeRO-3 all processes come here
            extremes = parameter.detach().aminmax() if parameter.is_floating_point() and parameter.numel() else ()
            if not all(extreme.isfinite() for extreme in extremes):
                raise Mistake(f"{name}: {parameter_name} holds NaN or infinite weights; fetch or save it again")


def load_model(
    model_name_or_path: str | Path,
    dtype: str | None = "bfloat16",
    attn_implementation: str | None = "auto",
    revision: str = "main",
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load a vision-language policy by the model type in its configuration.

    Args:
        model_name_or_path: Hub name or folder.
        dtype: of the weights; see `resolve_dtype`. With plain AdamW bfloat16 weights cannot hold updates of
            1e-6; under DeepSpeed the optimizer keeps float32 master weights.
        attn_implementation: see `resolve_attn_implementation`.
        revision: branch, tag or commit on the Hub.
        quantization_config: for QLoRA.

    Raises:
        Mistake: what `check_model_files` and `read_weights` raise; or a weight is not finite.
    """
    check_model_files(model_name_or_path, revision)
    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():  # an adapter remembers the name, and is loaded from other folders
        model_name_or_path = str(folder.resolve())
    torch_dtype = resolve_dtype(dtype)
    model = read_weights(
        model_name_or_path,
        revision=revision,
        dtype=torch_dtype,
        attn_implementation=resolve_attn_implementation(attn_implementation, torch_dtype),
        quantization_config=quantization_config,
    )
    check_finite(model, model_name_or_path)
    return model


def adapter_base(folder: str | Path) -> Path | None:
    """The folder of the base model that a LoRA run's folder names; None for whole weights.

    Raises:
        Mistake: the adapter's configuration is damaged, or there is no such base model.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    settings = read_object(path)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise FileMistake(f"{path}: names no base model (base_model_name_or_path)")
    try:
        return model_folder(name, revision if isinstance(revision, str) else "main")
    except OSError as error:
        raise FileMistake(f"{folder} is an adapter without its base model: {error}") from error


def load_checkpoint(folder: str | Path, dtype: str | None = "auto", base: str | Path | None = None) -> PreTrainedModel:
    """`load_model`, or for a LoRA run's folder its base model with the adapter merged into it.

    Args:
        dtype: see `load_model`.
        base: folder in place of the base model that the adapter names.

    Raises:
        Mistake: what `adapter_base` and `load_model` raise; or the adapter is not whole.
    """
    base = base or adapter_base(folder)
    if base is None:
        return load_model(folder, dtype=dtype)
    check_weight_files(Path(folder), ADAPTER)
    model = load_model(base, dtype=dtype)
    with torch.no_grad(), reading(folder, "adapter"):
        adapted = PeftModel.from_pretrained(model, folder)
        check_adapter(adapted, folder)
        if adapts_tied_weights(adapted):
            untie_head(adapted.get_base_model())
        return adapted.merge_and_unload(safe_merge=True)


def adapts_tied_weights(model: PeftModel) -> bool:
    """Whether one matrix is embeddings and head of a model, and an adapter changes one of the two uses."""
    plain = model.get_base_model()
    ends = (plain.get_input_embeddings(), plain.get_output_embeddings())
    is_adapted = any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for part in ends)
    return is_adapted and plain.config.tie_word_embeddings


def untie_head(model: PreTrainedModel) -> None:
    """Give the head of a model with adapters a matrix of its own: PEFT would merge into the other use of it, too."""
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    if not isinstance(head, AuxiliaryTrainingWrapper):  # which has one
        head.weight = nn.Parameter(head.weight.clone())
    model.config.tie_word_embeddings = False  # for whoever loads it from a folder


def restore_weights(model: nn.Module, folder: str | Path) -> None:
    """Put the weights that a run saved back into its model: all of them, or those of its adapters.

    transformers 5.17 saves some families under the names that their weights have on the Hub, and its `Trainer` loads by
    the names in memory, without an error when none matches. `from_pretrained` knows both.

    Args:
        model: the policy, not wrapped, and not split as by ZeRO-3.
        folder: a checkpoint of the run.

    Raises:
        Mistake: the folder does not hold exactly the weights of this model.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            place = adapter_folder(folder, name)
            check_weight_files(place, ADAPTER)
            with torch.no_grad(), reading(place, "adapter"):
                set_peft_model_state_dict(model, load_file(place / f"{ADAPTER}.safetensors"), adapter_name=name)
            check_adapter(model, place, name)
        return
    check_weight_files(folder)
    # The widest dtype of the model, so that nothing is rounded on the way.
    dtype = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
    saved = read_weights(folder, dtype=dtype)
    with reading(folder, "model"):
        model.load_state_dict(saved.state_dict())


def adapter_folder(folder: Path, name: str) -> Path:
    """Where PEFT puts an adapter of a model that is saved in a folder."""
    return folder if name == "default" else folder / name


def check_adapter(model: PeftModel, folder: str | Path, name: str = "default") -> None:
    """See that an adapter in a model is the one that a folder holds, tensor by tensor.

    Args:
        model: not wrapped; it may be split as by ZeRO-3, and then all processes call this.
        folder: with `adapter_model.safetensors`.
        name: of the adapter in the model.

    Raises:
        Mistake: it is another one.
    """
    path = Path(folder) / f"{ADAPTER}.safetensors"
    saved = load_file(path)
    parts = [parameter for parameter_name, parameter in model.named_parameters() if f".{name}." in parameter_name]
    with gather_params_ctx(parts, modifier_rank=None):
        weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if missing := sorted(weights.keys() - saved.keys()):
            raise FileMistake(f"{path}: weights are missing: {_first(missing)}")
        if foreign := sorted(saved.keys() - weights.keys() - model.state_dict().keys()):
            raise FileMistake(f"{path}: weights that this adapter has no place for: {_first(foreign)}")
        other = [
            key
            for key, weight in weights.items()
            if not torch.equal(weight.nan_to_num(), saved[key].to(weight).nan_to_num())  # NaN is told elsewhere
        ]
        if other:
            raise FileMistake(f"{path}: weights that did not reach the model: {_first(other)}")


def load_model_from_args(model_args: ModelConfig) -> PreTrainedModel:
    """`load_model` with the values of TRL's `ModelConfig`, which `check_model` has seen."""
    return load_model(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        revision=model_args.model_revision,
        quantization_config=get_quantization_config(model_args),
    )


def load_processor(
    model_name_or_path: str,
    chat_template: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    revision: str = "main",
) -> ProcessorMixin:
    """Load the processor, left-padding, with the recipe's prompt and image size bounds.

    Args:
        model_name_or_path: Hub name or folder.
        chat_template: file or name in `configs/chat_templates`; None keeps the checkpoint's own.
        min_pixels: smaller images are enlarged to this area; None keeps the checkpoint's bound.
        max_pixels: larger images are shrunk to this area; None keeps the checkpoint's bound.
        revision: branch, tag or commit on the Hub.

    Raises:
        Mistake: there is no such model or chat template; its processor or tokenizer cannot be
            loaded, or is another model's; no image has a size within the bounds.
    """
    folder = model_folder(model_name_or_path, revision)
    family = family_of_folder(folder) if (folder / "config.json").is_file() else None  # an adapter's has none
    check_processor_files(folder)
    with reading(folder, "processor or tokenizer"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, padding_side="left")
    known = dict.fromkeys(family.processor for family in FAMILIES.values())
    if type(processor) not in known:
        names = ", ".join(processor_class.__name__ for processor_class in known)
        raise FileMistake(
            f"{folder} holds no processor for images and text ({names}) but a {type(processor).__name__}; "
            "copy the processor's and tokenizer's files of the model that it was made from"
        )
    if family is not None:
        check_tokens(folder, processor, family)
    family = family_of_processor(processor)
    if chat_template is not None:
        processor.chat_template = load_chat_template(chat_template, family.templates)
    family.bound_images(processor, min_pixels, max_pixels)
    return processor


def check_tokens(folder: Path, processor: ProcessorMixin, family: Family) -> None:
    """See that the tokenizer in a model's folder is the model's.

    Raises:
        Mistake: a special token has another id there, or the model has no place for some token.
    """
    config, vocabulary = config_of_folder(folder), processor.tokenizer.get_vocab()
    rows = config.get_text_config().vocab_size
    for name, token in family.config_tokens.items():
        if vocabulary.get(token) != getattr(config, name, None):
            raise Mistake(
                f"{folder}: {token} is token {vocabulary.get(token)} of the tokenizer, and {name} of config.json is "
                f"{getattr(config, name, None)}; they are of different models"
            )
    last = max(number for token, number in vocabulary.items() if token not in family.unread_tokens)
    if last >= rows:
        raise Mistake(
            f"{folder}: the tokenizer has tokens up to {last}, and vocab_size of config.json is {rows}; they are of "
            "different models"
        )


def check_template(processor: ProcessorMixin, source: str, **template_kwargs: Any) -> None:
    """See that a processor's chat template shows an image where a message has one.

    Raises:
        Mistake: it does not, or cannot be rendered; see `try_template`.
    """
    text = try_template(processor, source, **template_kwargs)
    if (marks := text.count(processor.image_token)) != 1:
        raise Mistake(
            f"chat_template: writes {marks} {processor.image_token} for a message with one image; "
            'it must write one for each part with type == "image"'
        )


def reset_generation_config(model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Drop the sampling settings of a checkpoint (Qwen2-VL: top_k 1, repetition penalty 1.05).

    `generate` fills what a caller leaves unset from the model, and samples drawn that way would not follow the
    policy whose log-probabilities are trained. What is left says only where a completion ends.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=end_token_ids(processor), pad_token_id=tokenizer_of(processor).pad_token_id
    )


def accept_missing_images(model: PreTrainedModel, always_encode: bool) -> None:
    """Let a model take batches in which no row has an image; see tests/test_mixed.py.

    Args:
        model: not wrapped.
        always_encode: run the vision tower on a blank image then, with weight zero, so that every process of a run
            does the same work: under ZeRO the ranks exchange what a part of the model needs whenever it runs. A model
            that learns in its tower or merger alone does so anyway: its loss would have no gradient to take.
    """
    backbone, family = model.base_model, family_of(model)
    if family.trains_vision(model) and not any(p.requires_grad for p in backbone.get_decoder().parameters()):
        always_encode = True
    blank = family.blank_image(model.config)

    def before_backbone(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        backbone.is_without_images = not family.images_of(kwargs)
        if backbone.is_without_images:  # TRL's slice of a batch has tensors of no rows then
            kwargs = {name: value for name, value in kwargs.items() if name not in family.image_inputs}
        return args, kwargs

    # Here, and not where the tokens are embedded, the tower has its usual place in the order of the exchanges.
    def before_language_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        is_decoding = cache is not None and cache.get_seq_length() > 0
        if backbone.is_without_images and not is_decoding:
            embeds = kwargs["inputs_embeds"]
            images = {name: value.to(embeds.device) for name, value in blank.items()}
            for part in family.feature_tensors(family.encode_images(model, images)):
                embeds = embeds + (part * 0).sum().to(embeds.dtype)
            kwargs["inputs_embeds"] = embeds
        return args, kwargs

    backbone.register_forward_pre_hook(before_backbone, with_kwargs=True)
    if always_encode:
        # in front of DeepSpeed's own hook, which a reference model has by now
        backbone.get_decoder().register_forward_pre_hook(before_language_model, prepend=True, with_kwargs=True)
