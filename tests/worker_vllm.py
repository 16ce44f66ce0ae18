"""The real vLLM on a CPU beside a trainer: `worker_vllm.py colocated|untrained|with_server FOLDER DTYPE [ADDRESS]`.

What it saw is in FOLDER/seen.json.
`test_vllm.py` runs it in an environment that has vLLM, and imports it where training is launched: vLLM for the CPU
packs weights when it loads them, and would not take new ones.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from trl.generation.vllm_client import VLLMClient
from vllm.model_executor.layers import utils

import open_r1.engines.vllm_backends
from open_r1.base.errors import Mistake
from open_r1.base.prompts import load_chat_template
from open_r1.engines.agreement import TOKENS
from open_r1.trainer.callbacks import check_engine
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import load_weights, make_trainer, vowel_share

DIFFERENCE = "sampling/sampling_logp_difference/mean"


def use_weights_as_they_are(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = use_weights_as_they_are


def refused(trainer: Qwen2VLGRPOTrainer) -> str | None:
    """What the check before the first step says."""
    try:
        check_engine(trainer)
    except Mistake as error:
        return str(error)


def colocate(folder: Path, dtype: str, **changes: object) -> Qwen2VLGRPOTrainer:
    """A trainer of FOLDER/model on FOLDER/data whose process has an engine of its own."""
    return make_trainer(
        *(folder / "model", folder / "data/examples.json", folder / dtype, vowel_share),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=512,
        bf16=dtype == "bfloat16",
        **changes,
    )


def colocated(folder: Path, dtype: str) -> dict:
    """Ten steps, and then what the check says."""
    trainer = colocate(folder, dtype, learning_rate=2e-4, max_steps=10)
    seen = {"engine": str(trainer.vllm_generation.llm.model_config.dtype)}
    trainer.train()
    trainer.save_model(folder / dtype)
    seen["differences"] = [log[DIFFERENCE] for log in trainer.state.log_history if DIFFERENCE in log]
    before, after = load_weights(folder / "model"), load_weights(folder / dtype)
    seen["moved"] = sorted({trainer.family.part_of(key) for key in after if not torch.equal(before[key], after[key])})
    return seen | refusals(trainer)


def untrained(folder: Path, dtype: str) -> dict:
    """What the check says of the model as it is."""
    return refusals(colocate(folder, dtype, max_completion_length=TOKENS))


def refusals(trainer: Qwen2VLGRPOTrainer) -> dict[str, str | None]:
    """What the check says of a right engine, and after each thing that makes it sample something else."""
    seen = {"nothing": refused(trainer)}
    backend, policy = trainer.backend, trainer.processing_class
    backend.processor = copy.deepcopy(policy)
    backend.processor.chat_template = load_chat_template("instruct")
    seen["another template"] = refused(trainer)
    backend.processor = policy

    size = policy.image_processor.size
    policy.image_processor.size = {**size, "longest_edge": size["shortest_edge"]}
    seen["another max_pixels"] = refused(trainer)
    policy.image_processor.size = size

    collapse = open_r1.engines.vllm_backends.collapse_image_tokens
    open_r1.engines.vllm_backends.collapse_image_tokens = lambda ids, _: list(ids)
    seen["expanded twice"] = refused(trainer)
    open_r1.engines.vllm_backends.collapse_image_tokens = collapse

    forget = backend.forget_images
    backend.forget_images = lambda: None
    with torch.no_grad():  # an update that shows
        for parameter in trainer.family.vision_tower(trainer.model).parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    seen["images under old weights"] = refused(trainer)
    backend.forget_images = forget
    seen["new weights"] = refused(trainer)
    return seen


def with_server(folder: Path, dtype: str, address: str) -> dict:
    """Three steps that move nothing: weights go to a server by NCCL, which needs GPUs."""
    for name in ("init_communicator", "update_named_params"):
        setattr(VLLMClient, name, lambda *args, **kwargs: None)
    trainer = make_trainer(
        *(folder / "model", folder / "data/examples.json", folder / "served", vowel_share),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=address,
        bf16=dtype == "bfloat16",
        learning_rate=0.0,
        max_steps=3,
    )
    trainer.train()
    return {"differences": [log[DIFFERENCE] for log in trainer.state.log_history if DIFFERENCE in log]}


if __name__ == "__main__":
    name, folder, *arguments = sys.argv[1:]
    seen = {worker.__name__: worker for worker in (colocated, untrained, with_server)}[name](Path(folder), *arguments)
    Path(folder, "seen.json").write_text(json.dumps(seen))
