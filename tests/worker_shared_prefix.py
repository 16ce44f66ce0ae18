"""Three seeded steps on given completions, saved: `worker_shared_prefix.py MODEL DATA OUTPUT PER_DEVICE_BATCH [JSON]`.

The JSON changes settings. `test_shared_prefix.py` and `test_perception.py` run it in one process and under ZeRO in two.
"""

import json
import sys

import open_r1.trainer.trainer
from support import Scripted, fake_completions, make_trainer

model_path, data, output, per_device, *changes = sys.argv[1:]
open_r1.trainer.trainer.shuffle_groups = lambda batch: (
    batch
)  # the same completions in every micro-batch, whatever the layout


def remainder(completion_ids, **kwargs):
    """A reward that differs from one completion to the next."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


trainer = make_trainer(
    *(model_path, data, output, remainder),
    optim="sgd",
    learning_rate=0.1,
    max_steps=3,
    per_device_train_batch_size=int(per_device),
    gradient_accumulation_steps=2,
    **json.loads(changes[0] if changes else "{}"),
)
end = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>")


def complete(prompt_ids):
    first_row = trainer.accelerator.process_index * len(prompt_ids)
    return fake_completions(prompt_ids, end, trainer.max_completion_length, first_row)


trainer.backend = Scripted(trainer.backend, complete)
trainer.train()
trainer.save_model(output)
