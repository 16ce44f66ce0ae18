"""Starts the vLLM server of a recipe's rollouts as TRL's client needs it.

    python -m open_r1.running.serving --config configs/grpo_sat.yaml [ARGUMENTS OF grpo.py]

`scripts/serve_rollouts.sh` calls it, and says what it takes from the environment.
"""

import json
import os
import shlex
import sys

from trl import ModelConfig

from open_r1.base.errors import run
from open_r1.configs import GRPOScriptArguments, Qwen2VLGRPOConfig, longest_row, need_vllm
from open_r1.engines.vllm_backends import engine_dtype, engine_settings
from open_r1.models.loading import load_config
from open_r1.running.data import load_processor_from_args
from open_r1.settings.recipes import read_recipe

# The endpoints through which a trainer sends weights are vLLM's for development.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
# What TRL's client asks for: weights by NCCL, log-probabilities after temperature and bans, any number of them, and
# the endpoints for token ids with images (trl.scripts.vllm_serve).
FOR_TRL = (
    *("--weight-transfer-config", json.dumps({"backend": "nccl"})),
    *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enable-scale-out"),
)
# Values for settings that a recipe may leave out, and that a server does not use: data, output folder, GPUs, trackers.
UNUSED = ("--dataset_name", "-", "--output_dir", "-", "--use_cpu", "true", "--report_to", "none")


def serve_arguments(script_args: GRPOScriptArguments, args: Qwen2VLGRPOConfig, model_args: ModelConfig) -> list[str]:
    """What follows `vllm serve`: model, port, seed, the longest row in tokens, and `engine_settings`."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    dtype = model_args.dtype
    if dtype in (None, "auto"):
        dtype = load_config(name, revision).dtype or "float32"
    processor = load_processor_from_args(model_args, script_args, args.chat_template_kwargs or {})
    settings = engine_settings(processor, engine_dtype(args, dtype))
    arguments = [name, "--revision", revision, "--port", str(args.vllm_server_port), "--seed", str(args.seed)]
    length = longest_row(script_args, args)
    arguments += ["--max-model-len", str(length)] if length else []
    for option, value in settings.items():
        text = json.dumps(value) if isinstance(value, dict) else value
        arguments += [f"--{option.replace('_', '-')}", text]
    return [*arguments, *FOR_TRL]


def main() -> None:
    """Become the server."""
    kinds = (GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig)
    arguments = serve_arguments(*read_recipe(kinds, [*UNUSED, *sys.argv[1:]]))
    arguments += shlex.split(os.environ.get("VLLM_ARGUMENTS", ""))  # vLLM's own, which win
    if os.environ.get("DRY_RUN"):
        setting = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        print(f"{setting} vllm serve {shlex.join(arguments)}")
        return
    need_vllm("serve_rollouts.sh")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})


if __name__ == "__main__":
    run(main)
