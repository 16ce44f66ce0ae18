"""Which settings of `generation_kwargs` act on a rollout; the others are refused.

A rollout applies the settings that transformers' `generate` turns into logits processors, and the
tokens that end a completion. Any other setting would change nothing, or break what TRL assumes of a
completion.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedConfig

from open_r1.base.errors import Mistake, first_line
from open_r1.settings.limits import SHARE, check_values

TAKEN = frozenset(
    {
        *("do_sample", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_new_tokens"),
        *("suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "watermarking_config"),
        *("remove_invalid_values", "renormalize_logits", "eos_token_id", "pad_token_id"),
    }
)

_SHARES = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

_TEMPERATURE = "completions are scored at the trainer's own temperature; set that one"
_LENGTH = "max_completion_length says how long a completion may be"
_END = (
    "whether a completion is whole or was cut is told by its last token, so an end-of-text token "
    "alone may end one before max_completion_length"
)
_PLAIN = "completions are sampled token by token, without beams, drafts or a second pass"
_COUNT = "num_generations says how many completions a prompt gets"

# Names of GenerationConfig, and of vLLM's SamplingParams, that are refused for a reason of their
# own.
REFUSED: dict[str, str] = {
    "temperature": _TEMPERATURE,
    **dict.fromkeys(("max_new_tokens", "max_length"), _LENGTH),
    "min_length": "it counts the prompt too; min_new_tokens counts the completion alone",
    **dict.fromkeys(("stop_strings", "max_time", "forced_eos_token_id"), f"{_END}; eos_token_id names others"),
    **dict.fromkeys(("num_beams", "penalty_alpha", "guidance_scale", "prompt_lookup_num_tokens"), _PLAIN),
    "num_return_sequences": _COUNT,
}
REFUSED_BY_VLLM: dict[str, str] = {
    "temperature": _TEMPERATURE,
    "max_tokens": _LENGTH,
    **dict.fromkeys(("stop", "ignore_eos"), f"{_END}; stop_token_ids names others"),
    "n": _COUNT,
    **dict.fromkeys(("logprobs", "prompt_logprobs", "output_kind"), "TRL reads the log-probability of each token"),
}

# Under these vLLM's log-probabilities are of the tokens that are left, or penalised, and no longer the policy's -> the
# values that change nothing.
RESHAPING: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),  # of generation_kwargs alone
    **dict.fromkeys(("vllm_structured_outputs_regex", "structured_outputs"), ()),
}


def reshaping(settings: Mapping[str, Any]) -> str | None:
    """The first of a run's settings, generation_kwargs among them, that is in `RESHAPING` and changes something."""
    given = {**settings, **(settings.get("generation_kwargs") or {})}
    changes = (name for name, neutral in RESHAPING.items() if given.get(name) not in (None, *neutral))
    return next(changes, None)


def next_token_processors(
    model: GenerationMixin, settings: GenerationConfig, prompt_length: int, device: torch.device | str
) -> LogitsProcessorList:
    """What transformers' own `generate` does to the scores of the next token under these settings.

    It calls private methods of transformers, since only these give every setting the meaning that it has in `generate`;
    tests/test_decoding.py fails when they read other settings than those in `TAKEN`.
    """
    model._prepare_special_tokens(settings, device=device)
    return model._get_logits_processor(settings, input_ids_seq_length=prompt_length, device=str(device))


def check_generation(settings: Mapping[str, Any] | None, vocabulary: int, use_vllm: bool = False) -> None:
    """See that every setting of `generation_kwargs` has an effect on a rollout; no model is needed.

    Args:
        settings: `generation_kwargs` of the recipe.
        vocabulary: how many tokens the model has.
        use_vllm: whether the settings are those of vLLM's `SamplingParams` instead of `GenerationConfig`.

    Raises:
        Mistake: for the first setting that a rollout refuses or would ignore.
    """
    names, refused = (_names_of_vllm(), REFUSED_BY_VLLM) if settings and use_vllm else (TAKEN, REFUSED)
    for name, value in (settings or {}).items():
        if name in refused:
            raise Mistake(f"generation_kwargs: {name}: {refused[name]}")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            near = f"; did you mean {close[0]}?" if close else f"; those that are: {', '.join(sorted(names))}"
            raise Mistake(f"generation_kwargs: {name} is no setting of a rollout{near}")
        if not use_vllm:
            _try(name, value, vocabulary)


def with_tokens(settings: Mapping[str, Any] | None, end: str, ends: Sequence[int], ban: Mapping[str, Any]) -> dict:
    """`generation_kwargs` with the tokens that end a completion and those that must not occur.

    Args:
        settings: `generation_kwargs` of the recipe, checked by `check_generation`; its end tokens replace `ends`.
        end: the name under which the engine takes the ids that end a completion.
        ends: these ids.
        ban: the engine's setting that bans tokens, with its value: a list of ids, or a dictionary of
            biases by id. What the recipe says of other tokens in this setting is kept.
    """
    settings = dict(settings or {})
    named = settings.get(end)
    settings[end] = [named] if isinstance(named, int) else list(ends if named is None else named)
    for name, banned in ban.items():
        of_recipe = settings.get(name)
        if isinstance(banned, dict):
            settings[name] = {**(of_recipe or {}), **banned}
        else:
            settings[name] = sorted({*banned, *(of_recipe or [])})
    return settings


def _names_of_vllm() -> frozenset[str]:
    from vllm import SamplingParams

    return frozenset(inspect.signature(SamplingParams).parameters)


def _try(name: str, value: Any, vocabulary: int) -> None:
    """Let transformers say what is wrong with a value: each setting by itself, on the scores of one token."""
    model = GenerationMixin()
    model.config = PreTrainedConfig(vocab_size=vocabulary)
    try:
        check_values({name: value})
        if name in _SHARES and not SHARE.admits(value):  # transformers would pass it over
            raise Mistake(f"{name} {value}: expected {SHARE.words}")
        settings = GenerationConfig(**{"do_sample": True, "eos_token_id": [0], "pad_token_id": 0, name: value})
        process = next_token_processors(model, settings, prompt_length=1, device="cpu")
        process(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, vocabulary))
        torch.tensor(settings.eos_token_id, dtype=torch.long)
    except Mistake as error:
        raise Mistake(f"generation_kwargs: {error}") from error
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise Mistake(f"generation_kwargs: {name} {value!r:.60}: {first_line(error)}") from error
