"""The doctor on a real language model: rounding passes, planted faults fail, memory is what is counted."""

from collections.abc import Callable

import pytest
import torch

from open_r1 import grpo
from open_r1.base.errors import REPO_ROOT
from open_r1.doctor import model as checks
from open_r1.doctor.examination import run_check
from open_r1.doctor.finding import Check, Finding, Status
from open_r1.doctor.run import Run
from open_r1.engines import shared_prefix
from open_r1.engines.shared_prefix import Prompt
from open_r1.models.loading import load_processor
from open_r1.models.memory import count_run
from open_r1.running.data import count_prompt_tokens
from open_r1.settings.processes import Launch
from open_r1.settings.recipes import read_recipe
from open_r1.tasks.examples import read_examples
from test_doctor import measure, save_model

pytestmark = pytest.mark.real
RECIPE = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml")]
CPU = ["--use_cpu", "true", "--bf16", "false"]

PRECISION = {
    "float32": ["--dtype", "float32"],
    "bfloat16": ["--dtype", "bfloat16"],
    "autocast": ["--dtype", "float32", "--bf16", "true"],
}


@pytest.fixture(scope="module", params=PRECISION)
def run(request, real_model, examples_json, tmp_path_factory) -> Run:
    """A run in 32 bits, in 16, and in 32 whose products are of 16."""
    arguments = [*RECIPE, *CPU, "--model_name_or_path", str(real_model), "--dataset_name", str(examples_json)]
    arguments += ["--output_dir", str(tmp_path_factory.mktemp("out")), *PRECISION[request.param]]
    return Run(grpo.COMMAND, arguments, Launch())


@pytest.fixture(autouse=True)
def no_time_limit(monkeypatch):
    """On a machine that has other work the checks take longer than the doctor would wait."""
    monkeypatch.setattr(checks, "SECONDS", 10_000)


def found(check: Check, run: Run) -> Finding:
    """What a check finds; the scores of the run's own path are taken anew."""
    vars(checks.scores_of(run)).pop("as_trained", None)
    [finding] = run_check(check, run)
    return finding


@pytest.mark.parametrize("check", checks.CHECKS[2:], ids=lambda check: check.__name__)
def test_a_healthy_model_passes(run, check):
    finding = found(check, run)
    assert finding.verdict is Status.PASS, finding
    assert checks.rounds(run) == (checks.scores_of(run).rounding > 0.01), "as much as trained weights round"


def shift_positions(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    original = Prompt.continue_positions
    monkeypatch.setattr(Prompt, "continue_positions", lambda self, count: original(self, count) + 1)


def swap_images(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    original = shared_prefix.join_images
    swapped = lambda family, prompts, device: original(family, prompts[::-1], device)  # noqa: E731
    monkeypatch.setattr(shared_prefix, "join_images", swapped)


def look_at_padding(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    forward = run.trainer.model.forward

    def see_all(*arguments, attention_mask, **kwargs):
        return forward(*arguments, attention_mask=torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(run.trainer.model, "forward", see_all)


def spoil_reference(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    weight = run.trainer.ref_model.get_decoder().layers[1].mlp.down_proj.weight
    monkeypatch.setattr(weight, "data", weight.data * 1.05)


def kill_tower(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name, parameter in run.trainer.model.named_parameters():
        if ".visual." in name:
            monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))


FAULTS = {
    shift_positions: checks.shared_prefix,
    swap_images: checks.shared_prefix,
    look_at_padding: checks.batching,
    spoil_reference: checks.reference,
    kill_tower: checks.sight,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_fails(run, fault: Callable, monkeypatch):
    assert checks.scores_of(run).bound > 0  # from the model as it is
    fault(monkeypatch, run)
    finding = found(FAULTS[fault], run)
    assert finding.verdict is Status.FAIL and "nan" not in finding.what, finding


LORA = [*PRECISION["bfloat16"], "--config", str(REPO_ROOT / "configs/overlays/lora.yaml")]
MEMORY = {"float32": PRECISION["float32"], "LoRA, bfloat16": LORA}


@pytest.mark.nightly
@pytest.mark.parametrize("case", MEMORY)
def test_count_is_the_peak_within_15_percent(case, real_model, examples_json, tmp_path):
    sizes = {"per_device_train_batch_size": 16, "completions_per_step": 16, "num_generations": 16}
    sizes |= {"max_completion_length": 32, "max_steps": 2}
    arguments = [*RECIPE, *CPU, *MEMORY[case], "--dataset_name", str(examples_json), "--save_strategy", "no"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--reward_funcs", "support:vowel_share"]
    arguments += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    measured = measure("grpo", real_model, save_model(tmp_path / "none", 64, 2), arguments)
    processor = load_processor(real_model, chat_template="base", max_pixels=12544)
    longest = max(count_prompt_tokens(row, processor, style="reasoning") for row in read_examples(examples_json))
    arguments += ["--model_name_or_path", str(real_model), "--max_prompt_length", str(longest)]
    counted = count_run(*read_recipe(grpo.COMMAND.arguments, arguments), Launch(), is_cpu=True)
    print(f"{case}: measured {measured / 1e9:.2f} GB, counted {counted.peak / 1e9:.2f} GB", counted)
    assert counted.peak == pytest.approx(measured, rel=0.15)
