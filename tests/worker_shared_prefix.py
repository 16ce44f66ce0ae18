"""Three seeded steps on given completions, saved: `worker_shared_prefix.py MODEL DATA OUTPUT PER_DEVICE_BATCH`.

`test_shared_prefix.py` runs it in one process and under ZeRO in two.
"""

import sys

import open_r1.trainer
from open_r1.data import load_dataset
from open_r1.modeling import load_model, load_processor
from support import Scripted, fake_completions, make_config

model_path, data, output, per_device = sys.argv[1:]
open_r1.trainer.shuffle_groups = lambda batch: batch  # the same completions in every micro-batch, whatever the layout


def remainder(completion_ids, **kwargs):
    """A reward that differs from one completion to the next."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


args = make_config(
    output,
    optim="sgd",
    learning_rate=0.1,
    max_steps=3,
    per_device_train_batch_size=int(per_device),
    gradient_accumulation_steps=2,
)
processor = load_processor(model_path, chat_template="base", max_pixels=12544)
trainer = open_r1.trainer.Qwen2VLGRPOTrainer(
    model=load_model(model_path, dtype="float32"),
    reward_funcs=remainder,
    args=args,
    train_dataset=load_dataset(data, processor),
    processing_class=processor,
)
end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def complete(prompt_ids):
    first_row = trainer.accelerator.process_index * len(prompt_ids)
    return fake_completions(prompt_ids, end, trainer.max_completion_length, first_row)


trainer.backend = Scripted(trainer.backend, complete)
trainer.train()
trainer.save_model(output)
