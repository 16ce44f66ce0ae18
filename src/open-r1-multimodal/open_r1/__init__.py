"""R1-Zero for vision-language models: grouped GRPO on Qwen2-VL and its siblings."""

import logging
import os
from importlib import import_module
from typing import Any

__all__ = ["ask", "evaluate", "report", "train"]

# Before torch is imported, which reads it: threads that wait sleep. Where there are more threads than free cores, those
# that spin keep the others from what is waited for (docs/measured.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What libraries warn about at every start without need: logger -> part of the message.
NOISE = {
    # the recipe's accumulation is in DeepSpeed's configuration, where transformers puts it
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # where there is no GPU, which every command says or needs not say
    "DeepSpeed": "Setting accelerator to CPU",
    # on processors with bfloat16 of AVX-512; its own kernels serve there as elsewhere
    "bitsandbytes.backends.cpu.ops": "kernels-community",
    # CUDA's compiler is there without a GPU
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # of SmolVLM's default configuration, which transformers compares every SmolVLM with
    "transformers.configuration_utils": "pad_token_id must be `None` or an integer within the vocabulary "
    "(between 0 and 31999), got 128002",
    # of a policy that is handed over; the reference model is loaded by them
    "trl.trainer.grpo_trainer": "The `model_init_kwargs` will be ignored",
    # the end-of-text tokens are those that open_r1.models.loading chose
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
for name, part in NOISE.items():
    logging.getLogger(name).addFilter(lambda record, part=part: part not in record.getMessage())


def __getattr__(name: str) -> Any:
    """The commands as functions, which need torch: imported when they are asked for."""
    if name in __all__:
        return getattr(import_module("open_r1.api"), name)
    raise AttributeError(f"module 'open_r1' has no attribute {name!r}")
