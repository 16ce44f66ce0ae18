"""SFT: the loss is on the answer alone, the prompt is the one of evaluation, what is frozen stays, the model learns."""

import base64
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl import ModelConfig
from trl.trainer import utils

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.images import open_image
from open_r1.configs import FreezeArguments
from open_r1.models.families import FAMILIES, PARTS, vision_token_ids
from open_r1.models.loading import load_model, load_processor
from open_r1.models.trained import freeze, parameter_table
from open_r1.running.data import load_dataset, render_prompt
from open_r1.settings.recipes import read_recipe
from open_r1.sft import (
    AnswerCollator,
    Qwen2VLSFTConfig,
    SFTScriptArguments,
    answer_checks,
    build_trainer,
    prepare,
)
from open_r1.tasks import sat
from open_r1.tiny import make_config as make_model_config
from open_r1.tiny import make_model, make_processor, make_tokenizer
from open_r1.world.parquet import sat_row
from open_r1.world.scene import LEVELS
from support import families, launch_env, load_weights, write_examples

# One batch of 32 examples a step; the second moment forgets soon, as suits a loss that falls from 6 to 0.01.
MEMORISE = ["--max_steps", "260", "--save_strategy", "no", "--learning_rate", "4e-3", "--lr_scheduler_type", "cosine"]
MEMORISE += ["--warmup_steps", "20", "--adam_beta2", "0.95"]


def parse(arguments: list[str]) -> tuple[SFTScriptArguments, Qwen2VLSFTConfig, ModelConfig]:
    """What a command line says."""
    return read_recipe((SFTScriptArguments, Qwen2VLSFTConfig, ModelConfig), arguments)


def make_trainer(model: Path, data: Path, output: Path, *arguments: str):
    """The trainer of the tiny recipe, in this process."""
    args = ["--config", str(REPO_ROOT / "tests/data/sft.yaml"), "--model_name_or_path", str(model)]
    args += ["--dataset_name", str(data), "--output_dir", str(output), "--use_cpu", "true", "--disable_tqdm", "true"]
    return build_trainer(*parse([*args, *arguments]))


def test_prompts_are_not_scored(tiny_model, examples_json, tmp_path, monkeypatch):
    """On a CPU, too, where TRL would; the loss is that of the plain model, and other trainers find TRL as it was."""
    scored, score, uses_triton = [], utils._ChunkedLogProbFunction.apply, utils._use_triton

    def count(hidden, *arguments):
        scored.append(len(hidden))
        return score(hidden, *arguments)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", count)
    trainer = make_trainer(tiny_model, examples_json, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        plain = trainer.model(**batch).loss
    assert scored == [(batch["labels"] >= 0).sum()] and utils._use_triton is uses_triton
    assert torch.isclose(loss, plain, rtol=1e-5)


@pytest.mark.parametrize("process, own", [(0, 2), (1, 1), (2, 0)])
def test_rows_that_make_processes_even_have_no_part_in_an_evaluation(
    tiny_model, examples_json, tmp_path, monkeypatch, process, own
):
    """Of the last batches, of two rows each, three rows are of the data set."""
    trainer = make_trainer(tiny_model, examples_json, tmp_path, "--per_device_eval_batch_size", "2")
    trainer.model.eval()

    def loss_of(count: int) -> torch.Tensor:
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(count)])
        return trainer.prediction_step(trainer.model, batch, True)[0]

    expected = loss_of(own) if own else torch.zeros(())
    last = SimpleNamespace(end_of_dataloader=True, remainder=3)
    monkeypatch.setattr(trainer.accelerator, "gradient_state", last)
    monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
    assert torch.isclose(loss_of(2), expected, rtol=1e-5)


def run_sft(model: Path, data: Path, output: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """`sh run_sft.sh` with the tiny recipe, from an unrelated directory."""
    env = {"CONFIG": str(REPO_ROOT / "tests/data/sft.yaml"), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        ["sh", str(REPO_ROOT / "src/open-r1-multimodal/run_sft.sh"), *args],
        env=launch_env(model, data, output, **env),
        cwd=output.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("recipe", ["sft_sat", "sft_sat_lora", "tiny/sft"])
def test_recipes_parse(recipe, tmp_path):
    args = ["--config", str(REPO_ROOT / f"configs/{recipe}.yaml"), "--dataset_name", "x.json"]
    script_args, training_args, model_args = parse(
        [*args, "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    )
    assert script_args.chat_template == "base" and training_args.chat_template_kwargs == {"style": "direct"}
    assert training_args.max_length is None and not training_args.packing
    if recipe == "sft_sat":  # the paper's
        assert (training_args.learning_rate, training_args.num_train_epochs) == (2e-5, 2)
        assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == (1, 2)
        assert script_args.max_pixels == 512 * 28 * 28 and training_args.gradient_checkpointing
        assert not model_args.use_peft
    if recipe == "sft_sat_lora":
        assert model_args.use_peft and script_args.freeze_vision


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "idefics3", "internvl"))
def test_loss_is_on_the_answer_and_its_end_alone(tiny_models, examples_json, model_type):
    processor = load_processor(tiny_models[model_type], chat_template="base")
    rows = load_dataset(examples_json, processor, style="direct")
    batch = AnswerCollator(processor=processor, template_kwargs={"style": "direct"})([rows[i] for i in range(4)])
    for ids, labels, mask, row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], rows, strict=False):
        is_answer = labels != -100
        assert processor.decode(labels[is_answer]) == row["solution"] + processor.tokenizer.eos_token
        assert torch.equal(ids[is_answer], labels[is_answer])
        prompt = ids[~is_answer & mask.bool()]
        assert not is_answer[: len(prompt)].any()  # all of the prompt, image tokens included, and then the answer
        assert (prompt == processor.image_token_id).any()
        assert processor.decode(prompt).endswith(f"\nUser: {row['prompt'][0]['content']} \nAssistant: ")
        # and evaluation without reasoning asks with the same tokens
        assert prompt.tolist() == list(render_questions(processor, [row], style="direct")["input_ids"][0])


def render_questions(processor, rows: list[dict], **options: object) -> dict:
    """What a model takes of rows' prompts, as evaluation and GRPO render them."""
    messages = []
    for row in rows:
        content = [{"type": "image", "image": row["images"][0]}]
        content += [{"type": "text", "text": row["prompt"][0]["content"]}]
        messages.append([{"role": "user", "content": content}])
    rendered = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return processor.apply_chat_template(messages, **rendered, **options)


THOUGHT = "I look.\n</think>\n<answer>left</answer>"


@pytest.mark.parametrize("template", ["base", "instruct"])
def test_a_cold_start_learns_a_thought_behind_the_prompt_that_grpo_asks_with(tiny_model, tmp_path, template):
    """And never its `<think>` twice."""
    records = json.loads(write_examples(tmp_path, count=2).read_text())
    answers = [f"<think>{THOUGHT}", f"\n<think>{THOUGHT}" if template == "base" else f"<think>{THOUGHT}"]
    for record, answer in zip(records, answers, strict=True):
        record["messages"][1]["content"] = answer
    (tmp_path / "reasoned.json").write_text(json.dumps(records))
    args = ["--config", "configs/sft_sat.yaml", "--config", "configs/overlays/cold_start.yaml"]
    args += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(tmp_path / "reasoned.json")]
    args += ["--chat_template", template, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false"]
    args += ["--report_to", "none"]
    prepared = prepare(*parse(args))
    rows, processor = list(prepared["train_dataset"]), prepared["processing_class"]
    batch = prepared["data_collator"](rows)
    for ids, labels, mask, row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], rows, strict=True):
        is_answer = labels != -100
        opening = "" if template == "base" else "<think>"
        assert processor.decode(labels[is_answer]).rstrip() == opening + THOUGHT + "<|im_end|>"
        learned = ids[mask.bool()].tolist()
        prompt = list(render_questions(processor, [row])["input_ids"][0])
        assert learned[: len(prompt)] == prompt  # as GRPO renders it, without arguments of the template
        assert processor.decode(learned).count("<think>") == 1 + (template == "instruct")  # which asks for one in words


@pytest.mark.parametrize("answer", ["<answer>left</answer>", f"<think><think>{THOUGHT}"])
def test_an_answer_without_a_thought_is_no_cold_start(tiny_model, tmp_path, answer):
    processor = load_processor(tiny_model, chat_template="base")
    row = {"solution": answer}
    for check in answer_checks(processor, style="direct"):
        check(row)
    with pytest.raises(Mistake, match="the prompt asks for a thought") as raised:
        for check in answer_checks(processor):
            check(row)
    assert "\n" not in str(raised.value)


def test_a_run_gives_reasoned_examples(tiny_model, tmp_path, monkeypatch):
    """As docs/training.md picks them out of its rollouts: completions that earned everything, and their questions."""
    (code,) = re.findall(r"```python\n(import json\n.+?)```", (REPO_ROOT / "docs/training.md").read_text(), re.DOTALL)
    processor = load_processor(tiny_model, chat_template="base")
    questions = load_dataset(write_examples(tmp_path, count=3, images_per_example=2), processor)
    rows = [
        {
            "prompt": render_prompt(row, processor),
            "images": row["images"],
            "options": row["options"],
            "completion": THOUGHT,
            "rewards": {"accuracy_reward": right, "format_reward": 1.0},
        }
        for row, right in zip(questions, (1.0, 0.0, 1.0), strict=True)
    ]
    path = tmp_path / "outputs/grpo_sat/trajectories/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    learned = load_dataset(tmp_path / "reasoned.json", processor, checks=answer_checks(processor))
    same = ("prompt", "images", "options")
    assert [[row[name] for name in same] for row in learned] == [[questions[i][name] for name in same] for i in (0, 2)]
    assert learned[0]["solution"] == f"<think>{THOUGHT}"


def test_images_in_messages(tiny_model, tmp_path):
    """A path, a file:// URL and base64 in qwen-vl-utils' form give the pixels of the ShareGPT form."""
    records = json.loads(write_examples(tmp_path, count=3).read_text())
    picture = tmp_path / records[0]["images"][0]
    encoded = base64.b64encode(picture.read_bytes()).decode()
    forms = ["images/0_0.png", f"file://{picture}", f"data:image/png;base64,{encoded}"]
    question, answer = records[0]["messages"][0]["content"].removeprefix("<image>"), records[0]["messages"][1]
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "image": form}, {"type": "text", "text": question}]},
            answer if form == forms[0] else {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
        for form in forms
    ]
    data = tmp_path / "messages.json"
    data.write_text(json.dumps([records[0], *({"messages": pair} for pair in messages)]))
    processor = load_processor(tiny_model, chat_template="base")
    rows = load_dataset(data, processor)
    assert all(row["prompt"] == rows[0]["prompt"] and row["solution"] == "red" for row in rows)
    assert rows[1]["options"] == [] and rows[1]["question_type"] == ""
    expected = open_image(str(picture)).tobytes()
    assert all(open_image(row["images"][0]).tobytes() == expected for row in rows)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "image", "image": "https://example.org/a.png"}, "row 0: image https.*: download it first"),
        ({"type": "video", "video": "a.mp4"}, "row 0: messages: cannot read the part"),
        ({"type": "image", "image": "data:image/png;base64,a?"}, "row 0: image data:.*: not an image in base64"),
    ],
)
def test_unreadable_parts_are_one_clear_line(tiny_model, tmp_path, part, message):
    content = [part, {"type": "text", "text": "What?"}]
    pair = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": pair}]))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load_dataset(tmp_path / "data.json", load_processor(tiny_model, chat_template="base"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("frozen", [{"vision tower", "merger"}, {"language model"}])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_state(tiny_model, examples_json, tmp_path, frozen):
    flags = ["--freeze_vision", str("vision tower" in frozen), "--freeze_llm", str("language model" in frozen)]
    trainer = make_trainer(tiny_model, examples_json, tmp_path, "--max_steps", "2", "--save_steps", "2", *flags)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert_moved(before, dict(trainer.model.named_parameters()), frozen)
    state = torch.load(tmp_path / "checkpoint-2/optimizer.pt", weights_only=True)["state"]
    trained = [name for name in before if FAMILIES["qwen2_vl"].part_of(name) not in frozen]
    assert len(state) == len(trained)
    table = parameter_table(trainer.model).splitlines()
    assert [line[:16].strip() for line in table] == ["part", *PARTS[:3], "all"]
    total = int(table[-1].split()[-1].replace(",", ""))
    assert total == sum(before[name].numel() for name in trained)
    assert all(line.split()[-1] == "0" for line in table if line[:16].strip() in frozen)


def assert_moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], frozen: set[str]) -> None:
    """Every parameter of the frozen parts is as before, every other one is not."""
    for name in before:
        # the bias of keys shifts every score of a softmax alike, so it has no gradient by construction
        if "k_proj.bias" not in name and "attn.qkv.bias" not in name:
            assert torch.equal(before[name], after[name]) == (FAMILIES["qwen2_vl"].part_of(name) in frozen), name


def test_merger_alone_can_be_trained_but_not_nothing(tiny_models):
    for model_type, path in tiny_models.items():
        model = load_model(path, dtype="float32")
        freeze(model, FreezeArguments(freeze_vision=True, freeze_llm=True, freeze_merger=False))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all(FAMILIES[model_type].part_of(name) == "merger" for name in trained)
        with pytest.raises(ValueError, match="nothing is left to train"):
            freeze(model, FreezeArguments(freeze_vision=True, freeze_llm=True))


def test_checkpoint_carries_the_prompt_and_resume_is_exact(tiny_model, examples_json, tmp_path):
    settings = ["--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-3"]
    make_trainer(tiny_model, examples_json, tmp_path, *settings).train()
    whole = load_weights(tmp_path / "checkpoint-4")
    resumed = make_trainer(tiny_model, examples_json, tmp_path, *settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    again = load_weights(tmp_path / "checkpoint-4")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    saved = load_processor(tmp_path / "checkpoint-4")
    assert saved.chat_template == load_processor(tiny_model, chat_template="base").chat_template
    generation = json.loads((tmp_path / "checkpoint-4/generation_config.json").read_text())
    assert "top_k" not in generation and len(set(generation["eos_token_id"])) == 2


def test_the_best_model_is_the_one_at_the_end(tiny_model, examples_json, tmp_path):
    """As if a greater loss were better: that of the first checkpoint."""
    settings = ["--max_steps", "2", "--save_steps", "1", "--learning_rate", "1e-3", "--eval_strategy", "steps"]
    settings += ["--eval_steps", "1", "--eval_dataset_name", str(examples_json), "--load_best_model_at_end", "true"]
    settings += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    trainer = make_trainer(tiny_model, examples_json, tmp_path, *settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    trainer.save_model(str(tmp_path / "final"))
    final, best, last = (load_weights(tmp_path / name) for name in ("final", "checkpoint-1", "checkpoint-2"))
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert not all(torch.equal(final[name], last[name]) for name in last)


# --- several processes ------------------------------------------------------------------------------


@pytest.mark.distributed
def test_frozen_parameters_stay_under_zero3(tiny_model, examples_json, quick_python, tmp_path):
    env = {"ACCELERATE_CONFIG": "zero3", "PYTHON": str(quick_python)}
    arguments = ["--max_steps", "2", "--learning_rate", "1e-3", "--freeze_vision", "true"]
    result = run_sft(tiny_model, examples_json, tmp_path / "out", *arguments, **env)
    assert result.returncode == 0, result.stderr[-3000:]
    # as part_of knows them
    before, after = (
        {f"model.{name}": weight for name, weight in load_weights(folder).items()}
        for folder in (tiny_model, tmp_path / "out")
    )
    assert_moved(before, after, {"vision tower", "merger"})
    counts = {line[:16].strip(): line.split()[-1] for line in result.stdout.splitlines() if line[:6] in "vision"}
    assert counts.get("vision tower") == "0"
    # Adam's two moments and the master copy of one of two processes: no more than half of what trains
    trained = sum(weight.numel() for name, weight in before.items() if "visual" not in name)
    states = list((tmp_path / "out").glob("checkpoint-2/global_step2/*optim_states.pt"))
    assert len(states) == 2 and all(path.stat().st_size < 3 * 4 * trained / 2 * 1.3 + 2**18 for path in states)


def write_scenes(folder: Path, count: int) -> Path:
    """A prepared dataset of rendered scenes."""
    (folder / "images").mkdir(parents=True)
    records = []
    for row in range(count):
        example = sat.convert_row(sat_row(row, 0, LEVELS["easy"]), row, seed=0)
        (image, extension) = example.images[0]
        (folder / f"images/{row}.{extension}").write_bytes(image)
        records.append(sat.to_record(example, [f"images/{row}.{extension}"]))
    (folder / "scenes.json").write_text(json.dumps(records))
    return folder / "scenes.json"


@pytest.mark.distributed
@pytest.mark.parametrize("processes, strategy", [("2", "zero3"), pytest.param("1", "ddp", marks=pytest.mark.nightly)])
def test_sft_memorises_64_scenes(tmp_path, quick_python, processes, strategy):
    data = write_scenes(tmp_path, 64)
    texts = [message["content"] for record in json.loads(data.read_text()) for message in record["messages"]]
    tokenizer = make_tokenizer(texts, 1024)
    make_processor(tokenizer).save_pretrained(tmp_path / "model")
    make_model(make_model_config(tokenizer, hidden_size=128)).save_pretrained(tmp_path / "model")
    result = run_sft(
        tmp_path / "model",
        data,
        tmp_path / "out",
        *["--per_device_train_batch_size", str(32 // int(processes)), *MEMORISE],
        NUM_PROCESSES=processes,
        ACCELERATE_CONFIG=strategy,
        PYTHON=str(quick_python),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    processor = load_processor(tmp_path / "out")
    model = load_model(tmp_path / "out", dtype="float32")
    rows = load_dataset(data, processor)
    answers = []
    for start in range(0, 64, 16):
        batch = [rows[i] for i in range(start, start + 16)]
        options = {"style": "direct", "padding": True, "return_tensors": "pt"}
        inputs = render_questions(processor, batch, **options)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=32, suppress_tokens=vision_token_ids(processor))
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    exact = sum(answer == row["solution"] for answer, row in zip(answers, rows, strict=True))
    assert exact >= 0.95 * 64
