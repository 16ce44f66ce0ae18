"""The model card of a run: huggingface_hub reads its header, and it says what the run's files say."""

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from fake_run import fake_events, fake_rows, write_images, write_run
from hub import serve
from open_r1.base.errors import Mistake
from open_r1.evaluation.run import make_result, write_result
from open_r1.reporting.card import write_card
from open_r1.running.callbacks import ModelCardMixin
from support import run_grpo

FENCE = "```"


@pytest.fixture
def run(tmp_path) -> Path:
    questions = write_images(tmp_path / "images", 6)
    rows = list(fake_rows(questions, range(1, 5), 4, prompts=2, group=4))
    rows[0]["prompt"] = f"{FENCE}\n<script>alert(1)</script>\n{FENCE}"
    held_out = fake_rows(questions, (2, 4), 4, prompts=6, group=1)
    about = {"recipes": ["grpo_sat.yaml", "no_kl.yaml"], "changed": {"max_steps": 4}, "dataset": "data/SAT_train.json"}
    about["data"] = {"train": {"rows": 48, "content": "ab" * 32, "images": "cd" * 32}, "held_out": None}
    return write_run(tmp_path / "my-run", rows, held_out, fake_events(4, eval_every=2), **about)


def result(folder: Path) -> Path:
    row = {"question": "Where?", "options": ["left", "right"], "task": "Relation", "ground_truth": "(A)"}
    rows = [{**row, "id": n, "response": f"<answer>({'AB'[n % 4 == 0]})</answer>"} for n in range(20)]
    about = {"benchmark": "CV-Bench", "prompt": {"name": "base", "style": "reasoning", "template": ""}}
    write_result(folder / "CVBench_result.json", make_result(rows, about, "lenient"))
    return folder / "CVBench_result.json"


def test_the_card_says_what_the_files_say(run, tmp_path):
    card = ModelCard.load(write_card(run, [result(tmp_path)]))
    assert card.data.base_model == "Qwen/Qwen2-VL-2B" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text" and "grpo" in card.data.tags
    [score] = card.data.eval_results
    assert (score.dataset_name, score.metric_value) == ("CV-Bench", 75.0)
    for part in (
        "48 examples, SHA-256 `abababababababab`",
        "`accuracy_reward` and `format_reward`",
        "Held-out accuracy at step 4: ",
        "(95 % interval ",
        "| Total    |    75.00 |",
        'style="reasoning"',
        "| recipe | grpo\\_sat.yaml + no\\_kl.yaml |",
    ):
        assert part in card.content, part


def test_the_card_keeps_the_name_of_a_held_out_set(run):
    path = run / "trajectories/eval.jsonl"
    rows = [json.loads(line) | {"dataset": "SAT-val"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Held-out accuracy, SAT-val at step 4: " in write_card(run).read_text()


def test_a_teacher_is_named_without_its_path(run):
    info = json.loads((run / "run.json").read_text())
    info["arguments"] = info["changed"] = {"teacher_model_name_or_path": "/home/me/Teacher-7B"}
    (run / "run.json").write_text(json.dumps(info))
    content = ModelCard.load(write_card(run)).content
    assert "`format_reward` and a teacher on" in content and "| teacher | Teacher-7B |" in content
    assert "/home/me" not in content


def test_texts_of_a_run_cannot_leave_their_place(run):
    info = json.loads((run / "run.json").read_text())
    info["changed"] = {"run_name": "a | b\n\n# headline <img src=x>"}
    (run / "run.json").write_text(json.dumps(info))
    content = ModelCard.load(write_card(run)).content
    assert "a \\| b # headline \\<img src=x\\>" in content
    assert f"````\n{FENCE}\n<script>" in content, "a longer fence is around a prompt with fences"


def test_no_path_of_this_machine_is_published(run, tmp_path):
    info = json.loads((run / "run.json").read_text())
    info |= {
        "model": f"{tmp_path}/base",
        "dataset": f"{tmp_path}/SAT.json",
        "recipes": [f"{tmp_path}/r.yaml"],
        "changed": {"output_dir": str(tmp_path)},
    }
    (run / "run.json").write_text(json.dumps(info))
    content = write_card(run).read_text()
    prompt = content.index("a prompt:")
    assert "`base`, trained" in content and "on `SAT.json`" in content
    assert str(tmp_path) not in content[:prompt] + content[content.index("## How it was trained") :]


def test_an_adapter_is_loaded_onto_its_base_and_a_folder_is_no_base_of_the_hub(run, tmp_path):
    (run / "adapter_config.json").write_text("{}")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"model": str(tmp_path), "command": "sft", "reward_funcs": []}))
    card = ModelCard.load(write_card(run))
    assert card.data.library_name == "peft" and card.data.base_model is None and "grpo" not in card.data.tags
    assert "load_adapter" in card.content and "supervised fine-tuning" in card.content


@pytest.mark.slow
def test_a_pushed_run_is_a_repository_with_this_card_and_weights_that_load(tiny_model, examples_json, tmp_path):
    """As a user launches it, by the Hub's own client."""
    output, repository = tmp_path / "run", tmp_path / "hub"
    options = ("--push_to_hub", "true", "--hub_model_id", "me/tiny", "--max_steps", "2", "--save_steps", "1")
    with serve({"me/tiny": repository, "they/base": tiny_model}) as hub:
        env = hub.environment(tmp_path / "home")
        pushed = run_grpo("they/base", examples_json, output, *options, NUM_PROCESSES="1", **env)
        assert pushed.returncode == 0 and (repository / "report.html").is_file(), pushed.stderr
    assert not list(repository.glob("*in_use")) and not list(repository.glob("checkpoint-*"))
    card = ModelCard.load(repository / "README.md")
    assert card.content == (output / "README.md").read_text() and card.data.base_model == "they/base"
    assert card.data.pipeline_tag == "image-text-to-text" and "grpo" in card.data.tags
    digest = json.loads((output / "run.json").read_text())["data"]["train"]["content"]
    for part in (f"8 examples, SHA-256 `{digest[:16]}", "`accuracy_reward`", "| recipe | grpo.yaml |", "<think>"):
        assert part in card.content, part
    published, kept = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (repository, output))
    for (name, weight), other in zip(published.named_parameters(), kept.parameters(), strict=True):
        assert weight.equal(other), name


def test_results_that_are_not_scored_are_one_line(run, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(json.loads(result(tmp_path).read_text())["results"]))
    with pytest.raises(Mistake, match=f"^{path}: no scores in it"):
        write_card(run, [path])


def test_a_hub_that_takes_nothing_is_one_line_before_a_run_and_after_it():
    class Parent:
        """A trainer without a network."""

        args, hub_model_id = SimpleNamespace(output_dir="outputs/run", hub_model_id="me/tiny"), "me/tiny"

        def push_to_hub(self, token: str | None = None) -> None:
            raise httpx.ConnectError("Connection refused")

        init_hf_repo = push_to_hub

    class Pushing(ModelCardMixin, Parent):
        pass

    told = r"--push_to_hub: the Hub does not take me/tiny \(Connection refused\); "
    with pytest.raises(Mistake, match=f"{told}`hf auth login`, and name a repository of yours in --hub_model_id"):
        Pushing().init_hf_repo()
    command = "hf upload me/tiny outputs/run . --exclude"
    with pytest.raises(Mistake, match=f"{told}all is saved in outputs/run; upload it with `{command}"):
        Pushing().push_to_hub()


@pytest.mark.parametrize("refused", ["/commit/", "/me/tiny/lfs/"])
def test_weights_that_the_hub_refuses_are_one_line(refused, tmp_path, monkeypatch):
    """By the Hub's own client, which has another error for large files than for the rest."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")

    class Parent:
        args, hub_model_id = SimpleNamespace(output_dir=str(tmp_path)), "me/tiny"

        def push_to_hub(self) -> None:
            HfApi(hub.url, token="any").upload_folder(repo_id=self.hub_model_id, folder_path=self.args.output_dir)

    class Pushing(ModelCardMixin, Parent):
        pass

    with serve({"me/tiny": tmp_path / "hub"}) as hub:
        hub.fail(refused, 403)
        with pytest.raises(Mistake, match=r"--push_to_hub: the Hub does not take me/tiny \(.*403 .*upload it with"):
            Pushing().push_to_hub()
