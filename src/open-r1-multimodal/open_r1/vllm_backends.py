"""vLLM, which decodes many completions at once, as a backend: for training as TRL runs it, for evaluation by itself.

An engine processes images by itself, so what it takes in their place must fit: one image token an image where it reads
prompts (it writes as many as the image has, and would do so again for each that it finds), the pixel bounds of the
recipe and not of the model's folder, and the dtype of the policy. `agreement` sees whether it all does.
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
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from open_r1.backends import Completions
from open_r1.configs import need_vllm
from open_r1.families import family_of_processor
from open_r1.modeling import adapter_base, check_model_files, load_checkpoint
from open_r1.shared_prefix import Prompt, encode_prompt, images_of

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM, SamplingParams

NEVER = -100.0  # the least that may be added to a token's score


def collapse_image_tokens(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Token ids with every run of image tokens as one: the engine writes as many as the image has."""
    return [i for position, i in enumerate(ids) if i != image_token_id or position == 0 or ids[position - 1] != i]


def engine_dtype(args: TrainingArguments, own: torch.dtype | str) -> str:
    """The dtype in which a policy computes whose weights are of the dtype `own`."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return str(own).removeprefix("torch.")


def engine_settings(processor: ProcessorMixin | PreTrainedTokenizerBase, dtype: str) -> dict[str, Any]:
    """What `vllm.LLM` must be told to see images as `processor` does, and to compute as the policy does.

    Raises:
        ValueError: it cannot be told how this family bounds images.
    """
    if not isinstance(processor, ProcessorMixin):
        return {"dtype": dtype}
    family = family_of_processor(processor)
    if not family.has_vllm:
        raise ValueError(f"vLLM: not tried with {family.model_type!r} models; let transformers generate")
    return {
        "dtype": dtype,
        "mm_processor_kwargs": {"size": dict(processor.image_processor.size)},
        "limit_mm_per_prompt": {"video": 0},  # it would keep room for the longest one
    }


@contextmanager
def engines_with(**settings: Any) -> Iterator[None]:
    """In the block, every engine that TRL starts has these settings.

    TRL 1.16 has no option for dtype and pixel bounds: an engine takes those of the model's folder, and 16 bits where
    that has 32.
    """
    module = importlib.import_module("trl.generation.vllm_generation")
    engine = module.LLM
    module.LLM = lambda **others: engine(**{**others, **settings})
    try:
        yield
    finally:
        module.LLM = engine


def banned(ids: Sequence[int]) -> dict[int, float]:
    """A bias of the tokens' scores with which none of `ids` is sampled."""
    return dict.fromkeys(ids, NEVER)


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
            # TRL asks for one completion of each row. A prompt and its images go in once, but where several processes
            # share an engine: TRL hands them as many completions as they had rows.
            each = math.gcd(*repeats) if engine.tensor_parallel_size == 1 else 1
            engine.generation_kwargs = {**engine.generation_kwargs, "n": each}
            copies = [count // each for count in repeats]
        # A server is told of all image tokens where they are, and asked once for what is the same in all processes.
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
        """Drop what an earlier vision tower made of images: TRL, which hands over new weights, drops prompts alone."""
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
        asked = []
        for prompt in prompts:
            images = {"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}
            asked.append({"prompt_token_ids": prompt.input_ids.tolist(), **images})
        params = [sampling_params(settings, n=count) for count in repeats]
        answers = self.engine.generate(asked, params, use_tqdm=False)
        return Completions([list(each.token_ids) for answer in answers for each in answer.outputs], None, prompts)


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
    """vLLM with the model of a folder; a LoRA run's folder is merged into its base first. Each process has its own.

    Args:
        folder, dtype: see `backends.load_transformers`.
        processor: its pixel bounds hold.
        device: where vLLM runs by itself; it is the one of this process.
        template_kwargs: for the chat template.

    Raises:
        Mistake: vLLM is not installed.
        OSError, ValueError: what `modeling.check_model_files` and `modeling.load_checkpoint` raise.
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
