"""A step of eight micro-batches under DeepSpeed, by transformers' Trainer; tests/test_launch.py starts it.

    ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=2 python worker_deepspeed.py FOLDER bf16|no

The one weight starts at 0 and learns by SGD at a rate of 1. Its gradients are 256 and seven times 1, in any order:
263 in float32, and an even number in bfloat16, which has no odd ones from 257 on.
"""

import json
import sys

import torch
from deepspeed.utils import safe_get_full_fp32_param
from transformers import Trainer, TrainingArguments

from open_r1.running.entry import accumulate_in_float32

GRADIENTS = [256.0, *[1.0] * 7]


class Line(torch.nn.Module):
    """weight * x, as loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of one number."""
        return {"loss": (self.weight * x.to(self.weight.dtype)).sum()}


folder, precision = sys.argv[1:]
args = TrainingArguments(
    folder,
    use_cpu=True,
    bf16=precision == "bf16",
    per_device_train_batch_size=1,
    gradient_accumulation_steps=len(GRADIENTS),
    max_steps=1,
    optim="sgd",
    learning_rate=1.0,
    lr_scheduler_type="constant",
    max_grad_norm=0,
    save_strategy="no",
    report_to=[],
)
accumulate_in_float32(args)
trainer = Trainer(Line(), args, train_dataset=[{"x": torch.tensor(value)} for value in GRADIENTS])
trainer.train()
engine = trainer.model_wrapped
dtypes = [str(dtype).removeprefix("torch.") for dtype in engine.get_data_types()]
weight = str(engine.module.weight.dtype).removeprefix("torch.")
total = -len(GRADIENTS) * safe_get_full_fp32_param(engine.module.weight).item()
print(json.dumps({"dtypes": dtypes, "weight": weight, "sum": total}))
