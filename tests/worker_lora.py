"""Two steps of GRPO with LoRA beside a vLLM that keeps what it is handed: `worker_lora.py MODEL DATA OUTPUT`.

`test_lora.py` runs it under ZeRO-3 in two processes.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from open_r1.trainer.callbacks import CheckEngine
from support import Scripted, fake_completions, pretend_vllm
from test_lora import make_trainer

model, data, output = map(Path, sys.argv[1:])
pretend_vllm()
trainer = make_trainer(
    *(model, data, output, "--use_vllm", "true", "--vllm_mode", "colocate"),
    *("--vllm_importance_sampling_correction", "false", "--optim", "sgd", "--learning_rate", "1"),
)
trainer.remove_callback(CheckEngine)  # nothing is sampled
trainer.backend = Scripted(trainer.backend, lambda prompts: fake_completions(prompts, 0, trainer.max_completion_length))
trainer.train()
trainer.save_model(str(output))
trainer.vllm_generation.sync_weights()
if trainer.accelerator.is_main_process:
    save_file(trainer.vllm_generation.llm.weights, output / "handed.safetensors")
