"""R1-Zero for vision-language models: grouped GRPO on Qwen2-VL and its siblings."""
