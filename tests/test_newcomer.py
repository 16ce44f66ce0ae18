"""The paper's commands as a newcomer types them: a fresh clone, a new shell, and a hub that is not always well.

Only lengths and step counts are overridden. What is fetched comes from the stand-in hub of `hub.py`: SAT and CV-Bench
as `open_r1.world` draws them, and the quick start's tiny base under the name Qwen/Qwen2-VL-2B.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fresh import SYSTEM_PATH, new_shell
from hub import BREAK_OFF, Hub, render_repositories, serve
from open_r1.base.errors import REPO_ROOT
from support import write_script

pytestmark = pytest.mark.slow
SHORT = "--max_steps 1 --max_completion_length 16"
LORA = 'CONFIG="configs/grpo_sat.yaml configs/overlays/lora.yaml"'
ROWS = 16  # of each fold and of CV-Bench


@dataclass
class Newcomer:
    """Someone at a shell in a fresh clone."""

    root: Path
    hub: Hub
    env: dict[str, str]

    def types(self, folder: str, command: str, shell: str = "bash", fails: bool = False) -> str:
        """What a command prints; typed in this folder of the clone. Fails the test when it does not end as expected."""
        start = time.monotonic()
        result = subprocess.run(
            [shell, "-c", command], cwd=self.root / folder, env=self.env, capture_output=True, text=True
        )
        print(f"{time.monotonic() - start:6.1f} s  {folder or '.'} $ {command}")
        assert (result.returncode != 0) == fails, f"{command}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}"
        assert "Traceback" not in result.stderr, result.stderr[-3000:]
        return result.stderr if fails else result.stdout


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> Iterator[Newcomer]:
    folder = tmp_path_factory.mktemp("newcomer")
    root = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", REPO_ROOT, root], check=True)
    with serve(render_repositories(folder / "hub", ROWS)) as hub:
        # `python` is one without the packages: this one's own, of no environment, which a system may call python3 alone
        write_script(folder / "bin/python", f'exec {sys.base_prefix}/bin/python3 "$@"')
        path = f"{folder}/bin:{sys.base_prefix}/bin:{SYSTEM_PATH}"
        env = new_shell(path, **hub.environment(folder / "home"))
        env.pop("HF_HUB_OFFLINE")
        yield Newcomer(root, hub, env)


def test_the_papers_commands(newcomer):
    types, hub, root = newcomer.types, newcomer.hub, newcomer.root
    assert "bash setup.sh" in types("src/eval", "python test_qwen2vl_CVBench.py", fails=True)
    assert "environment" in types("", "bash setup.sh")
    assert "is up to date" in types("", "sh setup.sh", "sh")

    hub.fail("SAT_train.parquet", BREAK_OFF, times=1)
    types("src/data/SAT", "bash prepare_dataset.sh")
    assert "SAT_train_15000" in types("src/data/SAT", "sh prepare_dataset.sh", "sh")
    assert len(json.loads((root / "src/data/SAT/SAT_train_15000.json").read_text())) == ROWS

    # GRPO with the paper's recipe, then what it left: the evaluation's default model
    run = types("src/open-r1-multimodal", f"bash run_grpo_SAT.sh {SHORT}")
    assert "\nstep 1/1" in run, run[-2000:]
    assert (root / "outputs/grpo_sat/config.json").is_file()
    assert f"grpo_sat: {ROWS} prompts" in types("src/eval", "python test_qwen2vl_CVBench.py --max_new_tokens 16")

    # the same with LoRA, under sh
    types("src/open-r1-multimodal", f"{LORA} sh run_grpo_SAT.sh {SHORT}", "sh")
    assert f"grpo_sat_lora: {ROWS} prompts" in types("src/eval", "python test_qwen2vl_CVBench.py --max_new_tokens 16")
    types("", "python scripts/export.py --adapter outputs/grpo_sat_lora --output outputs/merged")
    assert (root / "outputs/merged/config.json").is_file()

    types("src/open-r1-multimodal", "bash run_sft.sh --max_steps 1")
    assert (root / "outputs/sft_sat/config.json").is_file()

    command = "python test_qwen2vl_CVBench.py --model_path Qwen/Qwen2-VL-2B --max_new_tokens 16"
    assert f"Qwen/Qwen2-VL-2B: {ROWS} prompts, chat template base" in types("src/eval", command)
    results = root / "src/eval/results"
    paths = [results / f"CVBench_result_{name}_reasoning.json" for name in ("Qwen2-VL-2B", "grpo_sat", "grpo_sat_lora")]
    base, full, lora = (json.loads(path.read_text()) for path in paths)
    assert base["pixels"] == full["pixels"] == lora["pixels"] == {"min": 3136, "max": 401408}  # the paper's
    assert base["questions"] == full["questions"] and len({r["model"] for r in (base, full, lora)}) == 3
    assert "parser: strict" in types(
        "src/eval",
        "python test_qwen2vl_CVBench.py --precomputed_json results/CVBench_result_grpo_sat_reasoning.json "
        "--parser strict",
    )
    table = types("src/eval", f"python ../../scripts/compare.py results/{paths[0].name} results/{paths[2].name}")
    assert "McNemar" in table and (results / "comparison.png").is_file()

    image = next((root / "src/data/SAT/images").rglob("*.png"))
    for model in ("outputs/grpo_sat_lora", "Qwen/Qwen2-VL-2B"):
        question = f'--image {image} --question "How many chairs are there?" --max_new_tokens 8'
        assert "completion:" in types("", f"python scripts/ask.py --model {model} {question}")
    assert types("", "python scripts/report.py outputs/grpo_sat").strip() == "outputs/grpo_sat/report.html"
    assert types("", "python scripts/card.py outputs/grpo_sat").strip() == "outputs/grpo_sat/README.md"
    assert "peak" in types("", "python scripts/doctor.py --memory --config configs/grpo_sat.yaml --num_processes 4")
    types("", "python scripts/world.py --output world.parquet --rows 4 --level easy")
    types("src/data/SAT", "SAT_PARQUET=../../../world.parquet bash prepare_dataset.sh --total_num 4")


@pytest.mark.parametrize(
    ("folder", "command", "named"),
    [
        ("src/eval", "python test_qwen2vl_CVBench.py --model_path outputs/grpo_st", "outputs/grpo_st"),
        ("src/eval", "python test_qwen2vl_CVBench.py --precomputed_json no.json", "no.json"),
        ("", "python scripts/ask.py --model outputs/no --image docs/report.png --question Why?", "outputs/no"),
        ("", "python scripts/export.py --adapter outputs/no --output outputs/new", "outputs/no"),
        ("", "python scripts/doctor.py --memory --config configs/no.yaml", "configs/no.yaml"),
        ("src/data/SAT", "SAT_PARQUET=no.parquet bash prepare_dataset.sh", "no.parquet"),
    ],
)
def test_a_mistake_is_one_line(newcomer, folder, command, named):
    newcomer.types("", "bash setup.sh")
    (line,) = newcomer.types(folder, command, fails=True).splitlines()
    assert "error: " in line and named in line


@pytest.mark.parametrize(
    ("folder", "command", "named", "status"),
    [
        ("src/eval", "python test_qwen2vl_CVBench.py --model_path Qwen/Qwen2-VL-2B", "Qwen/Qwen2-VL-2B", 503),
        ("", "python scripts/doctor.py --memory --config configs/grpo_sat.yaml", "Qwen/Qwen2-VL-2B", 429),
        ("src/data/SAT", "FOLD=val bash prepare_dataset.sh", "SAT_val.parquet of array/SAT", None),
    ],
)
def test_a_hub_on_a_bad_day_is_one_line(newcomer, tmp_path, folder, command, named, status):
    """It is the last line, and comes soon, the tries of the hub's own client among it. None: nobody answers."""
    newcomer.types("", "bash setup.sh")
    env = {**newcomer.env, "HF_HOME": str(tmp_path)}  # nothing cached
    if status is None:
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    else:
        newcomer.hub.fail("/", status)
    start = time.monotonic()
    error = Newcomer(newcomer.root, newcomer.hub, env).types(folder, command, fails=True)
    newcomer.hub.recover()
    line = error.splitlines()[-1]
    assert "error: " in line and named in line and sum("error: " in line for line in error.splitlines()) == 1
    assert time.monotonic() - start < 120  # mostly imports, on a busy machine
