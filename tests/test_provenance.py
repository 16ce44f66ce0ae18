"""run.json says what was trained on, how and with which code; a run that goes on says what of it changed."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from PIL import Image
from trl import ModelConfig

from open_r1 import grpo
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.configs import GRPOScriptArguments, Qwen2VLGRPOConfig, Qwen2VLSFTConfig, SFTScriptArguments
from open_r1.doctor.data import unchanged
from open_r1.doctor.examination import run_check
from open_r1.doctor.finding import Status
from open_r1.doctor.run import Run
from open_r1.models.loading import load_processor
from open_r1.running import provenance
from open_r1.running.data import DataArguments, load_dataset
from open_r1.running.entry import train
from open_r1.running.provenance import (
    FREE,
    all_arguments,
    changed_code,
    changed_inputs,
    changed_settings,
    describe_code,
    describe_data,
    describe_inputs,
    is_free,
    settings_in_force,
)
from open_r1.settings.processes import Launch
from support import make_config, write_examples

# --- settings -----------------------------------------------------------------------------------------------------


def test_a_setting_that_trl_adds_must_stay_too(tmp_path):
    @dataclass
    class Later(Qwen2VLGRPOConfig):
        sharpness: float = 0.5
        save_twice: bool = False

    then, now = (
        all_arguments(DataArguments("d"), Later(str(tmp_path), use_cpu=True, bf16=False, **changes), ModelConfig())
        for changes in ({}, {"sharpness": 0.7, "save_twice": True})
    )
    then, now = ({"command": "grpo", "world_size": 1, "arguments": arguments} for arguments in (then, now))
    assert changed_settings(then, now) == {"sharpness": (0.5, 0.7)}
    del then["arguments"]["sharpness"]  # a run of an earlier version did not know it
    assert changed_settings(then, now) == {}


def test_what_is_free_to_change_is_there():
    """A pattern that no setting has is a mistake, or one that TRL took away."""
    kinds = (Qwen2VLGRPOConfig, Qwen2VLSFTConfig, ModelConfig, GRPOScriptArguments, SFTScriptArguments)
    names = {field.name for kind in kinds for field in fields(kind)}
    assert [pattern for pattern in FREE if not any(re.fullmatch(pattern, name) for name in names)] == []
    assert {name for name in names if is_free(name)}.isdisjoint(
        {"learning_rate", "warmup_steps", "max_grad_norm", "seed", "data_seed", "bf16", "lora_dropout", "delta"}
        | {"vllm_importance_sampling_correction", "max_prompt_length", "chat_template", "generation_kwargs", "packing"}
    )


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tiny_model, tmp_path):
    """Read the examples of a folder, as a trainer gets them."""
    processor = load_processor(tiny_model, chat_template="base", max_pixels=12544)
    return lambda folder: load_dataset(folder / "examples.json", processor)


def edit(path: Path, change) -> None:
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


CHANGES = {
    "answer": (lambda records: records[3]["messages"][1].update(content="pink"), {"content"}),
    "order": (lambda records: records.insert(0, records.pop()), {"content", "images"}),
    "other image": (lambda records: records[3].update(images=["images/4_0.png"]), {"content", "images"}),
    "fewer": (lambda records: records.pop(), {"rows", "content", "images"}),
}


def test_a_change_of_the_data_changes_their_digest(prepared, tmp_path):
    """Wherever they lie. A file that is gone counts as another: a run goes on without it, and says so."""
    write_examples(tmp_path / "a")
    before = describe_data(prepared(tmp_path / "a"))
    for name, (change, parts) in CHANGES.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        assert describe_data(prepared(tmp_path / name)) == before
        edit(tmp_path / name / "examples.json", change)
        after = describe_data(prepared(tmp_path / name))
        assert {part for part in before if before[part] != after[part]} == parts, name
    dataset, path = prepared(tmp_path / "a"), tmp_path / "a/images/3_0.png"
    Image.new("RGB", Image.open(path).size, "pink").save(path)
    repainted = describe_data(dataset)
    path.unlink()
    gone = describe_data(dataset)
    assert before["content"] == repainted["content"] == gone["content"]
    assert len({before["images"], repainted["images"], gone["images"]}) == 3


def test_a_stream_is_not_read_for_its_digest():
    def rows():
        raise AssertionError("read")
        yield

    assert describe_data(IterableDataset.from_generator(rows)) is None
    assert describe_data(None) is None


def data(content: str = "a", images: str = "b", rows: int = 8, held_out: object = None, template: str = "t") -> dict:
    train = {"rows": rows, "content": content, "images": images}
    return {"data": {"train": train, "held_out": held_out, "chat_template": template}}


@pytest.mark.parametrize(
    "now, learned, noted",
    [
        (data("x", rows=9), ["the training examples (8 then, 9 now)"], []),
        (data(template="x"), ["the chat template"], []),
        (data(images="x"), [], ["image files of the training examples"]),
        (data(held_out=data("x")["data"]["train"]), [], ["the held-out examples"]),
        ({"data": {"train": None, "held_out": None, "chat_template": "t"}}, [], []),  # a stream
        ({"data": None}, [], []),
    ],
)
def test_what_changed_of_the_data(now, learned, noted):
    assert changed_inputs(data(held_out=data()["data"]["train"]), now) == (learned, noted)
    assert changed_inputs({}, now) == ([], [])  # a record of an earlier version


def test_the_template_is_that_of_the_prompts(tiny_model):
    base, instruct = (load_processor(tiny_model, chat_template=name) for name in ("base", "instruct"))
    digests = [describe_inputs(None, None, processor)["chat_template"] for processor in (base, instruct, base)]
    assert digests[0] == digests[2] != digests[1]


# --- code -----------------------------------------------------------------------------------------------------------


def test_the_code_of_a_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a.py"))
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "requirements.txt").write_text("# pins\ntorch==0.1\nnothing-of-this-name==1  # why\n\n-r more\n")

    def git(*arguments: str) -> None:
        options = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *options, *arguments], check=True, capture_output=True)

    code = describe_code()
    assert (code["commit"], code["changed"]) == (None, None)
    assert code["versions"].keys() == {"python", "torch"} and code["versions"]["torch"].startswith("2.")
    git("init")
    assert describe_code()["commit"] is None  # a repository of the user's that holds an environment
    git("add", "a.py")
    git("commit", "-m", "a")
    first = describe_code()
    assert re.fullmatch("[0-9a-f]{40}", first["commit"]) and first["changed"] is False
    (tmp_path / "a.py").write_text("2")
    assert describe_code() == {**first, "changed": True}
    git("commit", "-am", "b")
    second = describe_code()
    assert changed_code({"code": first}, {"code": second}) == {"commit": (first["commit"], second["commit"])}


# --- what an optimizer goes by --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_an_optimizer_that_came_back_goes_by_its_own_settings(optim, tmp_path):
    args = make_config(tmp_path, optim=optim, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6)
    kind, settings = grpo.Qwen2VLGRPOTrainer.get_optimizer_cls_and_kwargs(args)
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]

    def differing(settings: dict, weight_decay: float) -> dict:
        groups = [{"params": weights[:1], "weight_decay": weight_decay}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, **settings)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        return settings_in_force(args, optimizer)

    assert differing(settings, 0.1) == {}  # a new one
    own = {"weight_decay": 0.0, "learning_rate": 1e-5}
    if optim == "adamw_torch":
        own |= {"adam_beta2": 0.999, "adam_epsilon": 1e-8}
        settings = {**settings, "betas": (args.adam_beta1, 0.999), "eps": 1e-8}
    assert differing({**settings, "lr": 1e-5}, 0.0) == own


# --- the whole of it, through the command ---------------------------------------------------------------------------


def command_line(model: Path, data: Path, output: Path, *arguments: str) -> list[str]:
    """The arguments of a run."""
    settings = ["--config", str(REPO_ROOT / "tests/data/grpo.yaml"), "--use_cpu", "true", "--disable_tqdm", "true"]
    settings += ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    settings += ["--reward_funcs", "support:vowel_share", "--save_steps", "1", "--max_completion_length", "4"]
    return [*settings, "--completions_per_step", "4", *arguments]


def run(model: Path, data: Path, output: Path, *arguments: str) -> dict:
    """Train as the command does; the run's record."""
    train(grpo.COMMAND, command_line(model, data, output, *arguments))
    return json.loads((output / "run.json").read_text())


@pytest.fixture
def one_step(tiny_model, tmp_path, capsys):
    """The folder of a run's data and the record of its first step."""
    write_examples(tmp_path / "data", count=2)
    begun = run(tiny_model, tmp_path / "data/examples.json", tmp_path / "out", "--max_steps", "1")
    capsys.readouterr()
    return tmp_path, begun


def test_a_named_checkpoint_says_what_it_keeps_and_what_changed(one_step, tiny_model, capsys):
    folder, begun = one_step
    assert begun["data"]["train"]["rows"] == 2 and begun["code"]["versions"]["trl"]
    assert begun["arguments"]["generation_kwargs"] is None  # as it was given, not as the trainer filled it in
    edit(folder / "data/examples.json", lambda records: records[0]["messages"][1].update(content="white"))
    checkpoint = folder / "out/checkpoint-1"
    arguments = ["--max_steps", "2", "--resume_from_checkpoint", str(checkpoint)]
    arguments += ["--learning_rate", "1e-3", "--temperature", "0.9"]
    went_on = run(tiny_model, folder / "data/examples.json", folder / "other", *arguments)
    assert went_on["arguments"]["learning_rate"] == 1e-4 and went_on["arguments"]["temperature"] == 0.9
    [resume] = went_on["resumes"]
    assert resume["step"] == 1 and resume["kept"] == {"learning_rate": 1e-4}
    assert resume["changed"] == ["temperature (1.0 then, 0.9 now)", "the training examples"]
    assert went_on["started"] == begun["started"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.partition(":")[2].partition(",")[0].strip() for line in lines] == [
        "changed since this run began: temperature (1.0 then",
        "changed since this run began: the training examples",
        "learning_rate stays 0.0001",
    ]


def test_a_run_that_goes_on_by_itself_wants_the_data_that_it_began_with(one_step, tiny_model, capsys):
    folder, begun = one_step
    path, picture = folder / "data/examples.json", folder / "data/images/1_0.png"
    whole = path.read_text()
    edit(path, lambda records: records[0]["messages"][1].update(content="white"))
    before = (folder / "out/run.json").read_bytes()
    with pytest.raises(Mistake, match="the training examples changed since its run began, so it cannot go on"):
        run(tiny_model, path, folder / "out", "--max_steps", "2")
    assert (folder / "out/run.json").read_bytes() == before
    doctored = Run(grpo.COMMAND, command_line(tiny_model, path, folder / "out", "--max_steps", "2"), Launch())
    [finding] = run_check(unchanged, doctored)
    assert finding.verdict is Status.FAIL and "the training examples changed since its run began" in finding.what
    named = ["--max_steps", "2", "--resume_from_checkpoint", str(folder / "out/checkpoint-1")]
    assert [*unchanged(Run(grpo.COMMAND, command_line(tiny_model, path, folder / "out", *named), Launch()))] == []
    path.write_text(whole)
    Image.new("RGB", Image.open(picture).size, "pink").save(picture)
    went_on = run(tiny_model, path, folder / "out", "--max_steps", "2")
    assert went_on["resumes"][0]["changed"] == ["image files of the training examples"]
    assert "changed since this run began: image files of the training examples" in capsys.readouterr().err
    assert went_on["started"] == begun["started"] and went_on["max_steps"] == 2
