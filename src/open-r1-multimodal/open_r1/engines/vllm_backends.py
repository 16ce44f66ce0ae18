"""vLLM as an engine: for training as TRL runs it, and for evaluation by itself.

vLLM processes images itself, so it must be told what the policy's processor knows: one image token
an image in the prompt (it expands each that it finds), the pixel bounds of the recipe in place of
those in the model's folder, and the policy's dtype. `agreement` checks the result.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from trl import GRPOConfig

from open_r1.base.errors import Mistake
from open_r1.configs import need_vllm
from open_r1.engines.backends import Completions
from open_r1.engines.shared_prefix import Prompt, encode_prompt, images_of
from open_r1.models.families import family_of_processor
from open_r1.models.loading import adapter_base, adapts_tied_weights, check_model_files, load_checkpoint
from open_r1.settings.generation import RESHAPING

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM, SamplingParams

NEVER = -100.0  # the lowest logit bias that vLLM takes


def collapse_image_tokens(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Token ids with each run of image tokens as one: the engine writes as many as it needs."""
    return [i for position, i in enumerate(ids) if i != image_token_id or position == 0 or ids[position - 1] != i]


def engine_dtype(args: TrainingArguments, weights: torch.dtype | str) -> str:
    """The dtype in which a policy computes, with weights of the dtype `weights`."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return str(weights).removeprefix("torch.")


def engine_settings(processor: ProcessorMixin | PreTrainedTokenizerBase, dtype: str) -> dict[str, Any]:
    """What `vllm.LLM` must be told to see images as `processor` does, in the policy's dtype.

    Raises:
        Mistake: it cannot be told how this family bounds images.
    """
    if not isinstance(processor, ProcessorMixin):
        return {"dtype": dtype}
    family = family_of_processor(processor)
    if not family.has_vllm:
        raise Mistake(f"vLLM: not tried with {family.model_type!r} models; let transformers generate")
    return {
        "dtype": dtype,
        "mm_processor_kwargs": {"size": dict(processor.image_processor.size)},
        "limit_mm_per_prompt": {"video": 0},  # it would keep room for the longest one
    }


@contextmanager
def engines_of_run(
    args: GRPOConfig, model: str | PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase
) -> Iterator[None]:
    """In the block, every engine that TRL starts has the settings of a run's policy, and samples by the run's seed.

    TRL 1.16 has no option for dtype and pixel bounds: an engine takes those of the model's folder, and 16 bits where
    that has 32. Its seed is the number of the engine alone, so that runs of several seeds would draw alike. It raises
    what `engine_settings` raises.
    """
    # TRL loads a model given by its name in float32, if it is told nothing else
    own = (args.model_init_kwargs or {}).get("dtype", "float32") if isinstance(model, str) else model.dtype
    settings = engine_settings(processor, engine_dtype(args, own))
    # Of a 4-bit policy TRL would start vLLM in 4 bits, too; but it gets unquantised, merged weights (`adapted_weights`)
    settings["quantization"] = None
    module = importlib.import_module("trl.generation.vllm_generation")
    engine = module.LLM
    module.LLM = lambda **trls: engine(**{**trls, **settings, "seed": args.seed + trls["seed"]})
    try:
        yield
    finally:
        module.LLM = engine


def check_vllm_adapter(model: PeftModel) -> None:
    """Raise Mistake where vLLM, which takes whole weights, could not compute as this policy does."""
    for name, part in model.named_modules():
        is_adapter = isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if not is_adapter or isinstance(part, ModulesToSaveWrapper):
            continue
        is_lora = isinstance(part, LoraLayer) and type(part).__name__ in ("Linear", "Linear4bit", "Embedding")
        if not is_lora or any(part.lora_bias.values()):
            raise Mistake(
                f"use_vllm: vLLM is handed W + BA of LoRA adapters without lora_bias, of linear layers and embeddings; "
                f"{name.removeprefix('base_model.model.')} has another one ({type(part).__name__})"
            )
    if adapts_tied_weights(model):
        raise Mistake(
            "use_vllm: the model has one matrix as embeddings and lm_head, and an adapter changes one of the two "
            "uses, which vLLM cannot tell apart; leave both out of lora_target_modules and lora_modules_to_save"
        )


def whole_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is computed with: unpacked where bitsandbytes quantised it to 4 bits."""
    return dequantize_bnb_weight(weight) if get_bnb_param_type(weight) == "4bit" else weight.data


@torch.no_grad()
def merged_weight(layer: LoraLayer) -> torch.Tensor:
    """A layer's weight W + BA with its active adapters (DoRA, too), as a new tensor."""
    weight = whole_weight(layer.get_base_layer().weight)
    for name in layer.active_adapters:
        if name in layer.lora_variant:
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
        elif name in layer.scaling:
            weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)
    return weight


def adapted_weights(engine: "VLLMGeneration") -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of a policy with LoRA as its engine takes them, a merged tensor at a time.

    It stands in for `_iter_named_params` of TRL 1.16, which adds the adapter to the base weights in place and takes it
    off again: each time rounds, so that the frozen base drifts (docs/measured.md). Under ZeRO-3 all processes must run
    through it, and a layer at a time is gathered.
    """
    model = engine.model
    layers = {
        f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
    }
    for name, weight in model.named_parameters():
        layer = layers.get(name)
        is_other = model.prefix in name or "original_module" in name
        if is_other or (".modules_to_save." in name and f".modules_to_save.{model.active_adapter}." not in name):
            continue
        with engine._dist.gather_params([weight] if layer is None else list(layer.parameters())):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            name = engine._fix_param_name_to_vllm(name, [f"modules_to_save.{model.active_adapter}."])
            yield name, whole_weight(weight) if layer is None else merged_weight(layer)


def hand_over_whole_weights(engine: "VLLMGeneration") -> None:
    """Let TRL's engine get a policy with LoRA as `adapted_weights` has it; raises what `check_vllm_adapter` raises."""
    if is_peft_model(engine.model):
        check_vllm_adapter(engine.model)
        engine._iter_named_params = partial(adapted_weights, engine)


def banned(ids: Sequence[int]) -> dict[int, float]:
    """A bias of the tokens' scores with which none of `ids` is sampled."""
    return dict.fromkeys(ids, NEVER)


@contextmanager
def sampling_plainly(engine: "VLLMGeneration") -> Iterator[None]:
    """In the block, TRL's engine samples from the policy as it is: nothing that a recipe cuts off or penalises.

    Its log-probabilities are those of what is left (`settings.generation.RESHAPING`), and no measure of the engine.
    """
    kept = {name: value for name, value in engine.generation_kwargs.items() if name not in RESHAPING}
    plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "structured_outputs_regex": None}
    given = {name: getattr(engine, name) for name in (*plain, "generation_kwargs")}
    vars(engine).update(plain, generation_kwargs=kept)
    try:
        yield
    finally:
        vars(engine).update(given)


class TrainerVLLMBackend:
    """The engine that TRL keeps in step with the policy: colocated with it, or a server.

    Of the sampling settings it takes those that TRL gave the engine, and `max_new_tokens`.

    Args:
        model: gives the prompts' positions (not wrapped).
        processor: renders the prompts.
        engine: TRL's.
        group_size: completions of a prompt over all processes.
        profile: a context that measures the engine's call.
        template_kwargs: for the chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        engine: "VLLMGeneration",
        group_size: Callable[[], int],
        profile: Callable[[], AbstractContextManager[Any]],
        **template_kwargs: Any,
    ):
        self.model, self.processor, self.engine = model, processor, engine
        self.group_size, self.profile, self.template_kwargs = group_size, profile, template_kwargs

    def encode(self, prompt: list[dict[str, Any]] | str) -> Prompt:
        encoded = encode_prompt(self.model, self.processor, prompt, **self.template_kwargs)
        return encoded if isinstance(prompt, str) else replace(encoded, images=tuple(images_of(prompt)))

    def generate(self, prompts: Sequence[Prompt], repeats: Sequence[int], settings: GenerationConfig) -> Completions:
        engine = self.engine
        self.forget_images()
        ids = [prompt.input_ids.tolist() for prompt in prompts]
        copies = list(repeats)
        if engine.mode == "colocate":
            ids = [collapse_image_tokens(row, self.processor.image_token_id) for row in ids]
            # TRL asks for one completion of each row. So a prompt and its images go in once, for n completions; but not
            # where several processes share an engine (tensor parallelism): there TRL gives each process as many
            # completions as it passed rows.
            count_a_row = math.gcd(*repeats) if engine.tensor_parallel_size == 1 else 1
            engine.generation_kwargs = {**engine.generation_kwargs, "n": count_a_row}
            copies = [count // count_a_row for count in repeats]
        # A server takes prompts with all of their image tokens, and TRL itself asks it once a group.
        engine.max_completion_length = settings.max_new_tokens
        rows = [row for row, count in enumerate(copies) for _ in range(count)]
        images = [list(prompts[row].images) or None for row in rows]
        _, completions, logprobs, _ = engine.generate(
            prompts=[ids[row] for row in rows],
            images=images if any(images) else None,
            num_generations=self.group_size(),
            profiler=self.profile(),
        )
        return Completions(completions, [[token[0] for token in tokens] for tokens in logprobs], prompts)

    def forget_images(self) -> None:
        """Drop what earlier weights of the vision tower made of images; TRL drops prompts alone."""
        if self.engine.mode == "colocate":
            self.engine.llm.llm_engine.reset_encoder_cache()
        elif self.engine.accelerator.is_main_process:
            client = self.engine.vllm_client
            client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()


class VLLMBackend:
    """An engine of its own, for evaluation.

    Args:
        engine: vLLM's.
        processor: renders the prompts.
        template_kwargs: for the chat template.
    """

    def __init__(self, engine: "LLM", processor: ProcessorMixin, **template_kwargs: Any):
        self.engine, self.processor, self.template_kwargs = engine, processor, template_kwargs

    def encode(self, prompt: list[dict[str, Any]] | str) -> Prompt:
        """Render and tokenize; images and positions are the engine's work."""
        images: list[Any] = []
        if not isinstance(prompt, str):
            images = images_of(prompt)
            prompt = self.processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False, **self.template_kwargs
            )
        ids = self.processor.tokenizer(prompt, return_tensors="pt")["input_ids"][0]
        return Prompt(ids, torch.empty(3, 0, dtype=torch.long), images=tuple(images))

    def generate(self, prompts: Sequence[Prompt], repeats: Sequence[int], settings: GenerationConfig) -> Completions:
        requests = []
        for prompt in prompts:
            images = {"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}
            requests.append({"prompt_token_ids": prompt.input_ids.tolist(), **images})
        params = [sampling_params(settings, n=count) for count in repeats]
        answers = self.engine.generate(requests, params, use_tqdm=False)
        ids = [list(completion.token_ids) for answer in answers for completion in answer.outputs]
        return Completions(ids, None, prompts)


def sampling_params(settings: GenerationConfig, n: int) -> "SamplingParams":
    """transformers' sampling settings in vLLM's words, for `n` completions of a prompt."""
    from vllm import SamplingParams

    return SamplingParams(
        n=n,
        temperature=settings.temperature if settings.do_sample else 0.0,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        top_k=settings.top_k or 0,
        repetition_penalty=settings.repetition_penalty or 1.0,
        max_tokens=settings.max_new_tokens,
        stop_token_ids=list(settings.eos_token_id),
        logit_bias=banned(settings.suppress_tokens or []),
        detokenize=False,
    )


def load_vllm(
    folder: str | Path,
    processor: ProcessorMixin,
    device: torch.device | str,
    dtype: str = "auto",
    **template_kwargs: Any,
) -> VLLMBackend:
    """vLLM with the model of a folder, an engine a process; a LoRA run is merged into its base first.

    Args:
        folder, dtype: see `backends.load_transformers`.
        processor: its pixel bounds hold.
        device: where vLLM runs by itself; it is the one of this process.
        template_kwargs: for the chat template.

    Raises:
        Mistake: vLLM is not installed, or what `check_model_files` and `load_checkpoint` raise.
    """
    need_vllm("--backend vllm")
    from vllm import LLM

    start = partial(
        LLM,
        seed=0,
        trust_remote_code=False,
        # Of several processes each has the device that its launcher gave it.
        distributed_executor_backend="external_launcher" if PartialState().num_processes > 1 else None,
        **engine_settings(processor, dtype),
    )
    if adapter_base(folder) is None:
        check_model_files(folder)
        return VLLMBackend(start(model=str(folder)), processor, **template_kwargs)
    with TemporaryDirectory() as merged:
        load_checkpoint(folder, dtype).save_pretrained(merged)
        processor.save_pretrained(merged)
        return VLLMBackend(start(model=merged), processor, **template_kwargs)
