"""The evaluation with a model: what is asked, how it is decoded, and that no work is lost."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin
from trl import ModelConfig

from open_r1.base import errors
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.prompts import load_chat_template, sat_question
from open_r1.configs import FreezeArguments
from open_r1.engines.backends import TransformersBackend
from open_r1.evaluation import answering
from open_r1.evaluation import run as evaluation
from open_r1.evaluation.asking import style_of
from open_r1.models.families import FAMILIES, family_of_processor
from open_r1.models.loading import load_model, load_processor, reset_generation_config
from open_r1.models.trained import get_adapter_config
from open_r1.tasks.benchmarks import BENCHMARKS, Item, read
from open_r1.tiny import make_processor, make_tokenizer, save_tiny_model
from open_r1.world.parquet import sat_row, write_cvbench
from open_r1.world.scene import LEVELS
from support import families, load_script

SCRIPT = REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py"
GOLDEN = json.loads((Path(__file__).parent / "data/prompts.json").read_text())
QWEN_BASE = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
TOKENS = 24


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The evaluation script as a module."""
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def model_path(tiny_model, tmp_path_factory) -> Path:
    """A tiny model with something to say: as initialised it repeats its last token for ever.

    Large weights make every response another one, of another length.
    """
    model, processor = load_model(str(tiny_model), "float32"), load_processor(str(tiny_model))
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    folder = tmp_path_factory.mktemp("models") / "talkative"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """CV-Bench's two files with questions of different lengths and images of different sizes."""
    folder = tmp_path_factory.mktemp("cvbench")
    write_cvbench(folder, 24, 3, LEVELS["easy"])
    return folder


@pytest.fixture(scope="module")
def items(rendered) -> list[Item]:
    return read(BENCHMARKS["CV-Bench"], str(rendered))


def make_answerer(model: PreTrainedModel, processor: ProcessorMixin, style: str, tokens: int) -> answering.Answerer:
    reset_generation_config(model, processor)
    backend = TransformersBackend(model, processor, lambda: contextlib.nullcontext(model), style=style)
    return answering.Answerer(backend, processor, tokens)


@pytest.fixture(scope="module")
def answerer(model_path) -> answering.Answerer:
    processor, _ = answering.load_prompting(str(model_path), "base", 12544)
    return make_answerer(load_model(str(model_path), "float32"), processor, "reasoning", TOKENS)


@pytest.fixture
def arguments(model_path, rendered, tmp_path) -> list[str]:
    """Arguments of a quick run; one batch is four questions of 24."""
    return [
        *("--model_path", str(model_path), "--dataset_path", str(rendered), "--output_dir", str(tmp_path / "results")),
        *("--bs", "4", "--max_new_tokens", str(TOKENS)),
    ]


def answers(answerer: answering.Answerer, items: list[Item], batch_size: int) -> dict[tuple, answering.ItemResponse]:
    batches = answering.make_batches(answerer, items, batch_size)
    return {item.key: response for batch in answering.answer_batches(answerer, batches) for item, response in batch}


def run(script: ModuleType, arguments: list[str]) -> dict:
    """Run the script in this process; returns the result file's content."""
    args = script.parse_args(arguments)
    evaluation.evaluate(args)
    return json.loads(evaluation.result_path(args).read_text())


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base/reasoning", "instruct/direct"])
def test_prompts_are_the_golden_ones(name, answerer, tmp_path):
    template, style = name.split("/")
    processor = make_processor(make_tokenizer(), chat_template=template)  # one token a byte, as the golden ids
    Image.new("RGB", (56, 56)).save(tmp_path / "image.png")
    question = sat_question("Is the red ball to the left of the box?", ["yes", "no"])
    item = Item(0, "other", question, ("yes", "no"), "yes", question, ((tmp_path / "image.png").read_bytes(),))
    one_a_byte = make_answerer(answerer.backend.model, processor, style, TOKENS)
    assert one_a_byte.encode(item).input_ids.tolist() == GOLDEN[name]["ids"]


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("auto", load_chat_template("instruct"), "instruct"),
        ("auto", QWEN_BASE, "base"),
        ("auto", CHATML, "instruct"),
        ("auto", None, "base"),
        ("auto", "{{ style }}", "checkpoint"),
        ("base", load_chat_template("instruct"), "base"),
    ],
)
def test_the_chat_template_says_what_kind_of_model_it_is(name, own, expected):
    chosen, text = answering.choose_chat_template(name, own)
    assert chosen == expected
    assert text == (own if expected == "checkpoint" else load_chat_template(expected))


def test_the_template_is_found_in_the_checkpoint_whatever_its_path(tmp_path):
    """The reference looked for `os.path.join(path, "/chat_template.json")`, a file at the root of the disk."""
    folder = save_tiny_model(tmp_path / "some-base-model", vocab_size=256, chat_template="instruct")
    for path in (folder, f"{folder}/"):
        assert answering.load_prompting(path, "auto", 12544)[1] == "instruct"


@pytest.mark.parametrize("place", ["", "checkpoint-3"])
def test_a_run_is_asked_in_the_prompt_and_style_of_its_training(place, tmp_path):
    """Also in a template that knows no style, and in a checkpoint; a file that is no run's record counts nothing."""
    folder = save_tiny_model(tmp_path / place, vocab_size=256, chat_template="base")
    mine = load_chat_template("base").replace("style", "manner")
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"arguments": {"chat_template_kwargs": {"style": "direct"}}}))
    assert answering.load_prompting(folder, "auto")[1] == "base" and style_of(folder) == {"style": "direct"}
    (folder / "chat_template.jinja").write_text(mine)
    processor, name = answering.load_prompting(folder, "auto")
    assert name == "checkpoint" and processor.chat_template == mine
    for text in ("[1]", "{", '{"arguments": 1}'):
        record.write_text(text)
        assert answering.load_prompting(folder, "auto")[1] == "base" and style_of(folder) == {}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt", "llama", "no template of that name (known: base, instruct)"),
        ("--model_path", "/no/such/model", "/no/such/model"),
        ("--dataset_path", "/no/such/data", "/no/such/data: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(script, arguments, option, value, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments, option, value])
    with pytest.raises(SystemExit) as end:
        errors.run(script.main)
    assert end.value.code.startswith("test_qwen2vl_CVBench: error: ") and message in end.value.code
    assert "\n" not in end.value.code


def test_large_images_are_shrunk_to_max_pixels(tiny_model, items):
    big = replace(items[0], images=(sat_row(1, 1, LEVELS["full"])["image_bytes"][0],))
    model = load_model(str(tiny_model), "float32")
    for max_pixels in (56 * 56, 224 * 224):
        processor, _ = answering.load_prompting(str(tiny_model), "base", max_pixels)
        small = make_answerer(model, processor, "reasoning", 1)
        pixels = int(small.encode(big).image_inputs["image_grid_thw"][0].prod()) * 14 * 14
        assert max_pixels / 3 < pixels <= max_pixels
        assert small.length(big) == len(processor.tokenizer(big.prompt)["input_ids"]) + pixels // 28**2


@pytest.mark.parametrize(
    ("saved", "asked", "used"),
    [
        (802816, None, 802816),  # what the run was trained at
        (12845056, None, 401408),  # Qwen2-VL as published: the paper's
        (16777216, None, 401408),  # Qwen3-VL as published
        (200704, 401408, 401408),
    ],
)
def test_images_are_shrunk_as_in_training(tiny_model, tmp_path, saved, asked, used):
    load_processor(str(tiny_model), min_pixels=6272, max_pixels=saved).save_pretrained(tmp_path)
    processor, _ = answering.load_prompting(tmp_path, "base", asked)
    assert processor.image_processor.size["longest_edge"] == used
    assert processor.image_processor.size["shortest_edge"] == 6272
    assert family_of_processor(processor).count_image_tokens(processor, [(10000, 10000)]) <= used // 28**2


# --- how it is decoded ----------------------------------------------------------------------------


def test_batch_size_does_not_change_answers(answerer, items):
    one, four, sixteen = (answers(answerer, items, size) for size in (1, 4, 16))
    assert one == four == sixteen and len(one) == len(items)
    assert len({response.response for response in one.values()}) > len(items) / 2
    assert len({response.tokens for response in one.values()}) > 3


def test_decoding_is_plainly_greedy(answerer, items):
    """As argmax over the whole prompt, token for token: no repetition penalty, no top-k, no vision token."""
    settings = answerer.generation_config
    assert settings.repetition_penalty == 1.0 and not settings.do_sample
    assert answerer.backend.model.generation_config.repetition_penalty in (None, 1.0)
    got = answers(answerer, items[:3], 3)
    for item in items[:3]:
        prompt = answerer.encode(item)
        ids = prompt.input_ids[None]
        banned = torch.tensor(settings.suppress_tokens)
        for _ in range(TOKENS):
            with torch.no_grad():
                logits = answerer.backend.model(
                    input_ids=ids,
                    **prompt.image_inputs,
                    mm_token_type_ids=(ids == answerer.processor.image_token_id).int(),
                ).logits[0, -1]
            logits[banned] = -torch.inf
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            if ids[0, -1] in torch.tensor(settings.eos_token_id):
                break
        expected = answerer.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        assert got[item.key].response == expected


def test_an_ended_response_is_not_truncated(answerer, items):
    ends = answerer.generation_config.eos_token_id
    got = answers(answerer, items, 8).values()
    assert {response.truncated for response in got} == {False, True}
    assert all(response.tokens == TOKENS for response in got if response.truncated)
    biased = make_answerer(answerer.backend.model, answerer.processor, "reasoning", TOKENS)
    biased.generation_config.sequence_bias = [[[token], 1e3] for token in ends]
    assert set(answers(biased, items[:2], 2).values()) == {answering.ItemResponse("", 1, False)}


def test_batches_are_of_like_length_the_longest_first(answerer, items):
    batches = answering.make_batches(answerer, items, 5)
    lengths = [answerer.length(item) for batch in batches for item in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]


def test_missing_and_broken_images_are_counted(answerer, items):
    whole = items[0].images[0]
    long = io.BytesIO()
    Image.new("RGB", (3, 900)).save(long, "PNG")
    broken = [None, b"no image", whole[: len(whole) // 2], long.getvalue()]
    asked = [*items[:2], *(replace(items[2], id=f"broken {n}", images=(data,)) for n, data in enumerate(broken))]
    got = answers(answerer, asked, 3)
    assert [bool(got[item.key].error) for item in asked] == [False] * 2 + [True] * len(broken)
    assert got[items[0].key] == answers(answerer, [items[0]], 1)[items[0].key]
    rows = [item.to_row() | vars(got[item.key]) for item in asked]
    result = evaluation.make_result(rows, {"benchmark": "CV-Bench"}, "lenient")
    assert result["shares"]["image_errors"] == len(broken) and result["scores"]["Total"]["n"] == len(asked)
    (alone,) = answers(answerer, [replace(items[0], images=(None,))], 2).values()  # a batch of its own
    assert alone.error == "missing image"


# --- no work is lost ------------------------------------------------------------------------------


def test_a_result_records_what_it_depends_on(script, arguments, tmp_path):
    result = run(script, arguments)
    path = next((tmp_path / "results").iterdir())
    assert path.name == "CVBench_result_talkative_reasoning.json"
    assert len(result["results"]) == 24
    reference = {"question", "options", "task", "ground_truth", "response", "model_answer", "correct"}
    assert all(reference <= row.keys() for row in result["results"])
    assert list(result["accuracy"]) == ["Total", "Count", "Relation", "Depth", "Distance", "2D", "3D", "CV-Bench"]
    assert result["prompt"] == {"name": "base", "style": "reasoning", "template": load_chat_template("base")}
    assert result["prompt_example"].endswith("<think>") and "<|image_pad|>" in result["prompt_example"]
    assert result["parser"] == "lenient" and result["args"]["bs"] == 4
    assert result["generation"]["repetition_penalty"] == 1.0 and result["generation"]["max_new_tokens"] == TOKENS
    assert result["pixels"] == {"min": 3136, "max": 12544} and result["dtype"] == "float32"  # the checkpoint's own


def test_an_interrupted_run_continues_and_ends_the_same(script, arguments, tmp_path, monkeypatch):
    undisturbed = run(script, arguments)
    path = next((tmp_path / "results").iterdir())
    whole = path.read_bytes()
    path.unlink()

    saved = evaluation.append_rows

    def save_or_die(partial: Path, rows: list[dict]) -> None:
        if partial.exists() and len(partial.read_text().splitlines()) > 8:  # settings and two batches
            with partial.open("a") as file:
                file.write('{"id": 3, "resp')  # what a kill in the middle of a write leaves
            raise KeyboardInterrupt
        saved(partial, rows)

    monkeypatch.setattr(evaluation, "append_rows", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        run(script, arguments)
    monkeypatch.undo()
    assert not path.exists()

    assert run(script, arguments) == undisturbed
    assert path.read_bytes() == whole
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_finished_run_is_scored_again_and_another_is_kept_aside(script, arguments, tmp_path, monkeypatch, capsys):
    first = run(script, arguments)
    with monkeypatch.context() as patch:
        patch.setitem(answering.BACKENDS, "hf", lambda *args, **kwargs: pytest.fail("loads the model again"))
        assert run(script, arguments) == first
        assert "answered before" in capsys.readouterr().out
        assert not list((tmp_path / "results").glob("*.old"))
        assert run(script, [*arguments, "--parser", "strict"])["parser"] == "strict"
        first = run(script, arguments)
    for kept in (tmp_path / "results").glob("*.old"):
        kept.unlink()
    (path,) = (tmp_path / "results").iterdir()
    path.write_text(json.dumps(first | {"results": first["results"][:-1]}))
    assert run(script, arguments) == first  # a row was lost
    (kept,) = (tmp_path / "results").glob("*.old")
    assert len(json.loads(kept.read_text())["results"]) == 23
    kept.unlink()
    second = run(script, [*arguments, "--limit", "8"])
    assert len(second["results"]) == 8
    kept = list((tmp_path / "results").glob("*.old"))
    assert len(kept) == 1 and json.loads(kept[0].read_text()) == first


def test_unfinished_work_of_other_settings_is_kept_aside(tmp_path, items):
    path = tmp_path / "x.json"
    partial = tmp_path / "x.partial0.jsonl"
    row = items[1].to_row() | vars(answering.ItemResponse("?", 1, False))
    evaluation.append_rows(partial, [{"dtype": "float32"}, row])
    whole = partial.read_text()
    assert evaluation.collect_answered(path, {"dtype": "bfloat16"}) == {}
    assert not partial.exists() and len(list(tmp_path.glob("*.old"))) == 1
    partial.write_text(f'{whole}{{"id": 2')
    assert evaluation.collect_answered(path, {"dtype": "float32"}) == {items[1].key: row}
    assert partial.read_text() == whole


def test_new_weights_at_the_same_place_are_another_model(adapter, tmp_path):
    folder = save_tiny_model(tmp_path / "model", vocab_size=256)
    before = answering.model_fingerprint(folder)
    save_tiny_model(folder, vocab_size=256, seed=1)
    assert answering.model_fingerprint(folder) != before
    # an adapter over another base
    other = shutil.copytree(adapter, tmp_path / "other")
    assert answering.model_fingerprint(other) == answering.model_fingerprint(adapter)
    name_base(other, str(folder))
    assert answering.model_fingerprint(other) != answering.model_fingerprint(adapter)


def test_a_run_killed_in_its_first_line_continues(script, arguments):
    path = evaluation.result_path(script.parse_args(arguments))
    path.parent.mkdir()
    path.with_name(f"{path.stem}.partial0.jsonl").write_text('{"bench')
    assert len(run(script, arguments)["results"]) == 24
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2-VL-2B", "Qwen2-VL-2B"),
        ("grpo_sat/", "grpo_sat"),
        ("grpo_sat/checkpoint-100/", "grpo_sat_checkpoint-100"),
        (".", "outputs"),
        ("grpo_sat/checkpoint-100/..", "grpo_sat"),
        ("grpo_sat/checkpoint-100/.", "grpo_sat_checkpoint-100"),
    ],
)
def test_a_model_is_named_by_the_folder_that_its_path_leads_to(path, name, tmp_path, monkeypatch):
    (tmp_path / "outputs/grpo_sat/checkpoint-100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outputs")
    assert evaluation.model_name(path) == name


@pytest.mark.parametrize("option", ["--model_path", "--output_dir"])
def test_an_option_without_a_value_is_no_default(script, arguments, option, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args([*arguments, option, " "])
    assert end.value.code == 2
    assert f"error: argument {option}: expected a value, got none" in capsys.readouterr().err


def test_default_model_is_the_newest_grpo_output(tmp_path):
    assert evaluation.newest_grpo_output(tmp_path) is None
    marks = ["old/trainer_state.json", "new/checkpoint-20/complete.json", "sft/trainer_state.json"]
    for age, mark in enumerate(reversed(marks)):
        (tmp_path / mark).parent.mkdir(parents=True)
        (tmp_path / mark).touch()
        os.utime(tmp_path / mark, (1000 - age, 1000 - age))
        (tmp_path / mark).with_name("config.json").touch()
    (tmp_path / "new/checkpoint-30").mkdir()  # half-written
    for run_name in ("old", "new"):
        (tmp_path / run_name / "trajectories").mkdir()
    assert evaluation.newest_grpo_output(tmp_path) == tmp_path / "new/checkpoint-20"
    (tmp_path / "lora/trajectories").mkdir(parents=True)
    (tmp_path / "lora/trainer_state.json").touch()
    assert evaluation.newest_grpo_output(tmp_path) == tmp_path / "new/checkpoint-20"  # no model in it
    (tmp_path / "lora/adapter_config.json").touch()
    assert evaluation.newest_grpo_output(tmp_path) == tmp_path / "lora"


# --- an adapter -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """What a LoRA run leaves."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    folder = tmp_path_factory.mktemp("runs") / "lora"
    get_peft_model(load_model(str(tiny_model), "float32"), settings).save_pretrained(folder)
    load_processor(str(tiny_model)).save_pretrained(folder)
    return folder


def name_base(adapter: Path, base: str) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))


@pytest.mark.parametrize("model_type", families("qwen2_vl", "qwen3_5", "smolvlm", "internvl"))
def test_an_adapter_of_every_family_is_exported_evaluated_and_asked(
    model_type, script, rendered, tiny_models, tmp_path, monkeypatch, capsys
):
    """One as the recipes make it, over what they adapt in this family."""
    settings = yaml.safe_load((REPO_ROOT / "configs/overlays/lora.yaml").read_text())
    chosen = ModelConfig(use_peft=True, lora_r=4, lora_target_modules=settings["lora_target_modules"])
    torch.manual_seed(0)
    lora = get_adapter_config(chosen, FreezeArguments(freeze_vision=True), FAMILIES[model_type])
    lora.init_lora_weights = False
    model = get_peft_model(load_model(str(tiny_models[model_type]), "float32"), lora)
    model.save_pretrained(tmp_path / "lora")
    processor = load_processor(tiny_models[model_type], chat_template="instruct", max_pixels=6272)
    processor.save_pretrained(tmp_path / "lora")

    def call(name: str, *options: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        capsys.readouterr()
        runpy.run_path(str(REPO_ROOT / "scripts" / name), run_name="__main__")
        return capsys.readouterr().out

    call("export.py", "--adapter", tmp_path / "lora", "--output", tmp_path / "merged")
    arguments = ["--dataset_path", str(rendered), "--limit", "6", "--max_new_tokens", "12"]
    arguments += ["--output_dir", str(tmp_path / "results"), "--bs", "3"]
    of_lora, merged, base = (
        run(script, [*arguments, "--model_path", str(path)])
        for path in (tmp_path / "lora", tmp_path / "merged", tiny_models[model_type])
    )
    assert of_lora["results"] == merged["results"] != base["results"] and len(merged["results"]) == 6
    assert of_lora["model"] != merged["model"]
    assert of_lora["prompt"]["name"] == merged["prompt"]["name"] == "instruct" and merged["pixels"]["max"] <= 6272
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    options = ["--image", tmp_path / "red.png", "--question", "Which colour?", "--max_new_tokens", 4]
    asked = [call("ask.py", "--model", tmp_path / name, *options) for name in ("lora", "merged")]
    assert asked[0] == asked[1] and "completion: " in asked[0]


def test_an_export_that_finds_no_room_is_one_line(adapter, tmp_path, monkeypatch):
    def save(self, folder: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    monkeypatch.setattr(sys, "argv", ["", "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    with pytest.raises(Mistake, match=f"^{tmp_path / 'merged'}: takes no more, is the disk full"):
        load_script(REPO_ROOT / "scripts/export.py").main()
    assert not list(tmp_path.iterdir())


def test_an_adapter_whose_base_is_gone_is_one_line(script, arguments, adapter, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter, tmp_path / "lora")
    name_base(folder, "gone/away/base")
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments, "--model_path", str(folder)])
    with pytest.raises(SystemExit) as end:
        errors.run(script.main)
    reason = f"{folder} is an adapter without its base model: gone/away/base: no such file or folder"
    assert end.value.code == f"test_qwen2vl_CVBench: error: {reason}"


# --- saved responses ------------------------------------------------------------------------------


@pytest.fixture
def reference_file(items, tmp_path) -> Path:
    """A result file as the reference writes it, in the data set's order."""
    names = ("question", "options", "task", "ground_truth")
    rows = [{**{name: item.to_row()[name] for name in names}, "response": "(A)"} for item in items]
    path = tmp_path / "CVBench_result_reference.json"
    path.write_text(json.dumps({"results": rows, "accuracy": 0.5, "args": {}}))
    return path


def rescored(script: ModuleType, path: Path, *more: str) -> dict:
    args = script.parse_args(["--precomputed_json", str(path), "--output_dir", str(path.parent / "scored"), *more])
    evaluation.rescore(args)
    return json.loads((path.parent / "scored" / path.name).read_text())


def test_the_references_rows_get_type_and_source_from_the_data_set(script, reference_file, rendered, items):
    alone = rescored(script, reference_file)
    assert "2D" not in alone["scores"] and alone["accuracy"]["CV-Bench"] is None
    joined = rescored(script, reference_file, "--dataset_path", str(rendered))
    assert joined["scores"]["Total"] == alone["scores"]["Total"]
    for name, key in (("2D", "type"), ("3D", "type"), ("COCO", "source"), ("Omni3D", "source")):
        chosen = [item.answer == "(A)" for item in items if getattr(item, key) == name]
        assert joined["scores"][name]["accuracy"] == sum(chosen) / len(chosen)
    assert 0 < joined["accuracy"]["CV-Bench"] < 1
    assert [row["id"] for row in joined["results"]] == [item.id for item in items]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmark", "VSR"], r"^--benchmark VSR: .*reference\.json answers CV-Bench; leave --benchmark out$"),
        (["--limit", "8"], "^--limit: --precomputed_json scores every response of its file; leave --limit out$"),
    ],
)
def test_what_a_file_of_responses_decides_is_no_option(script, reference_file, more, message):
    reference_file.write_text(json.dumps(json.loads(reference_file.read_text()) | {"benchmark": "CV-Bench"}))
    options = ["--precomputed_json", str(reference_file), "--output_dir", str(reference_file.parent / "scored")]
    with pytest.raises(Mistake, match=message):
        evaluation.run(script.parse_args([*options, *more]))
    evaluation.run(script.parse_args([*options, "--benchmark", "CV-Bench"]))


def test_rows_of_the_reference_join_their_questions_or_are_named(script, reference_file, rendered, items):
    def refused(rows: list[dict]) -> str:
        reference_file.write_text(json.dumps({"results": rows}))
        with pytest.raises(Mistake) as caught:
            rescored(script, reference_file, "--dataset_path", str(rendered))
        return str(caught.value)

    rows = json.loads(reference_file.read_text())["results"]
    other = [*rows[:7], rows[7] | {"question": "How many?"}, *rows[8:]]
    assert re.search(r"reference\.json: row 7: 'How many\?' is not .*--dataset_path", refused(other))
    answer = "(B)" if rows[7]["ground_truth"] == "(A)" else "(A)"
    assert "reference.json: row 7: " in refused([*rows[:7], rows[7] | {"ground_truth": answer}, *rows[8:]])
    assert "25 rows, but the data set has 24 questions" in refused([*rows, rows[0]])
    prompts = [row | {"question": item.prompt} for row, item in zip(rows, items, strict=True)]
    reference_file.write_text(json.dumps({"results": prompts}))
    assert rescored(script, reference_file, "--dataset_path", str(rendered))["scores"]["3D"]["n"] == 12


# --- several processes ----------------------------------------------------------------------------


LAUNCHES = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--config_file", str(REPO_ROOT / "src/open-r1-multimodal/configs/ddp.yaml")),
        *("--num_processes", "2", "--main_process_port", "0"),
    ],
    # accelerate starts one process here, whatever the number, without MPI
    "accelerate --cpu": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launch", "batch"),  # 32: one process gets no batch
    [("torchrun", "4"), ("torchrun", "32"), ("accelerate", "4"), ("accelerate --cpu", "4")],
)
def test_several_processes_answer_as_one(script, arguments, quick_python, tmp_path, launch, batch):
    expected = run(script, arguments)
    output = tmp_path / "two"
    command = [quick_python, "-m", *LAUNCHES[launch], str(SCRIPT), *arguments, "--bs", batch]
    result = subprocess.run(
        [*command, "--output_dir", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answered = dict(re.findall(r"process (\d): (\d+) questions", result.stdout))
    if launch == "accelerate --cpu":
        assert answered == {"0": "24"}
    else:
        assert answered == ({"0": "12", "1": "12"} if batch == "4" else {"0": "24", "1": "0"})
    assert result.stdout.count("parser: lenient") == 1  # one of them is the main one
    (path,) = output.iterdir()
    got = json.loads(path.read_text())
    assert got["results"] == expected["results"] and got["scores"] == expected["scores"]
