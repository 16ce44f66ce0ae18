"""R1-Zero for vision-language models: grouped GRPO on Qwen2-VL and its siblings."""

import logging

# bitsandbytes says it at every import on processors with bfloat16 of AVX-512; its own kernels serve there as elsewhere.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)
