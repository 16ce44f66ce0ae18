"""What a row holds that its prompt does not show is named and counted, and nothing is trained on it by accident."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Audio, Dataset, Video
from PIL import Image

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.evaluation import asking
from open_r1.models.loading import load_processor
from open_r1.running.data import DataArguments, load_dataset, load_datasets_from_args
from open_r1.tasks.examples import Columns, iter_rows
from open_r1.tasks.unshown import unshown_texts
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import load_script, make_config, vowel_share


def talk(question: str = "What is it?", **of_the_question: object) -> list[dict]:
    return [{"role": "user", "content": question, **of_the_question}, {"role": "assistant", "content": "a ball"}]


def columns(**fields: object) -> dict:
    return {"question": "What is it?", "answer": "a ball", **fields}


def asked(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


ENCODED = {"bytes": b"RIFF", "path": None}
UNSHOWN = {
    "a video that its text marks": ({"messages": talk("<video>What?"), "videos": ["none.mp4"]}, "field videos"),
    "a mark alone": ({"messages": talk("<video>What?")}, "<video>"),
    "a mark of a picture by number": (columns(question="Is it as in <image 2>?", image="a.png"), "<image 2>"),
    "a video under another name": (columns(clip="clips/none.webm"), "the video in the field clip"),
    "a video in bytes": (columns(video=ENCODED), "field video"),
    "a sound under another name": (columns(heard={"bytes": b"", "path": "none.flac"}), "the audio in the field heard"),
    "LLaMA-Factory's tools": ({"messages": talk(), "tools": '[{"name": "zoom"}]'}, "the field tools"),
    "settings of the template": (columns(chat_template_kwargs={"style": "direct"}), "the field chat_template_kwargs"),
    "Alpaca's input": (columns(input="A ball rolls."), "the field input"),
    "calls of tools": ({"messages": talk(tool_calls=[{"name": "zoom"}])}, "the tool_calls of a message in messages"),
    "an image in a message": ({"messages": talk(images=["a.png"])}, "the images of a message in messages"),
    "bounds of one image": (
        {"prompt": asked({"type": "image", "image": "a.png", "max_pixels": 784}, {"type": "text", "text": "What?"})},
        "the max_pixels of a message in prompt",
    ),
    "an image in no known field": (columns(picture="a.png"), r"the image in the field picture \(--image_column"),
    "numbered images": (columns(image="a.png", image_2="a.png"), "the image in the field image_2"),
    "images in two fields": (columns(images=[], image="a.png"), "the field image"),
    "options of which the answer is a letter": (
        columns(answer="<answer>B</answer>", options=["A. a cube", "B. a ball"]),
        r"the options, of which the answer is a letter \(--options_column options",
    ),
    "choices, as others call them": (columns(answer="(B)", choices=["a cube", "a ball"]), "the choices, of which"),
    "two questions": ({"messages": talk(), "prompt": "And who?"}, "the field prompt"),
}
SHOWN = {
    "empty fields": columns(videos=[], tools="[]", system="", audio=None, history=[], chat_template_kwargs={}),
    "a mask for a reward": columns(image="a.png", mask="a.png", image_id="a.png"),
    "an image in two fields": columns(images=["a.png"], image="a.png"),
    "weights of messages": {"messages": talk(weight=1, train=False)},
    "pictures by number": columns(question="Is <image 1> a ball?", image="a.png"),
    "arrows": columns(question="Is 1 <video game> 2?", notes="a list\nb.mp4"),
    "options that the question lists": columns(
        question="What is it?\n(A) A cube\n(B) A ball", answer="B", options=["A. a cube", "B. a ball"]
    ),
    "options of which the answer is a text": columns(answer="b", options=["a", "b"]),
    "images as answers": columns(answer="a.png", options=["a.png", "b.png"], question_type="a"),
    "TRL's parts": {
        "prompt": asked(
            {"type": "image", "image": "a.png", "text": None}, {"type": "text", "text": "What?", "image": None}
        )
    },
}


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture(scope="module")
def processors(tiny_model) -> dict:
    return {name: load_processor(tiny_model, chat_template=name) for name in ("base", "instruct")}


def write(folder: Path, *records: dict) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(records, default=lambda data: data.decode()))
    return path


@pytest.mark.parametrize("name", UNSHOWN)
def test_what_a_prompt_does_not_show_is_refused_with_file_row_and_count(name, folder, processors):
    record, named = UNSHOWN[name]
    path = write(folder, columns(), record, columns(), record)
    with pytest.raises(ValueError, match=named) as caught:
        load_dataset(path, processors["base"])
    told = str(caught.value)
    assert told.startswith(f"{path}: row 1: its prompt does not show ") and "\n" not in told
    assert told.endswith("; rows like this: 2; mend them, or train without it by --drop_unshown true")


@pytest.mark.parametrize("feature", [Audio(), Video()])
def test_media_that_datasets_would_decode_are_refused_and_not_decoded(feature, folder, processors):
    """Decoding needs packages that nothing else here does."""
    rows = Dataset.from_list([columns(seen={"bytes": b"no medium", "path": "a.mp4"})]).cast_column("seen", feature)
    rows.save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match=r"row 0: its prompt does not show the video in the field seen \(only images"):
        load_dataset(folder / "saved", processors["base"])


@pytest.mark.parametrize("name", SHOWN)
def test_what_rewards_alone_are_given_is_no_part_of_a_prompt(name, folder, processors):
    path = write(folder, SHOWN[name])
    (row,) = load_dataset(path, processors["base"])
    assert [unshown for _, unshown in iter_rows(path)] == [[]] and row["prompt"]


def test_what_is_dropped_on_purpose_is_named_once_and_reaches_the_rewards(folder, processors, capsys):
    record = {"messages": talk("<video>What?"), "videos": ["none.mp4"]}
    path = write(folder, record, record, columns())
    rows = load_dataset(path, processors["base"], drop_unshown=True)
    assert [row["videos"] for row in rows] == [["none.mp4"], ["none.mp4"], None]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert line.startswith(f"warning: {path}: row 0: its prompt does not show what <video> stands for, the video ")
    assert line.endswith("; rows like this: 2, all trained on (drop_unshown)")


def test_a_row_that_is_left_out_for_its_length_hides_nothing(folder, processors):
    path = write(folder, columns(), {"messages": talk("<video>What is it? " * 100), "videos": ["none.mp4"]})
    rows = load_dataset(path, processors["base"], max_prompt_length=400)
    assert len(rows) == 1


def test_dropping_is_a_setting(folder, processors):
    path = write(folder, columns(tools=["zoom"]))
    arguments = DataArguments(str(path), eval_dataset_name=str(path), drop_unshown=True)
    train, held_out = load_datasets_from_args(arguments, processors["base"], {})
    assert len(train) == len(held_out) == 1


# --- messages that the chat template leaves out -----------------------------------------------------------------

SYSTEM = {
    "in the dialogue": {"messages": [{"role": "system", "content": "Speak  Latin.\n"}, *talk()]},
    "LLaMA-Factory's": {
        "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a ball"}],
        "system": "Speak  Latin.\n",
    },
}


@pytest.mark.parametrize("where", SYSTEM)
def test_a_system_message_is_in_the_prompt_or_refused(where, folder, processors):
    path = write(folder, SYSTEM[where])
    (row,) = load_dataset(path, processors["instruct"])
    assert row["prompt"][0] == {"role": "system", "content": "Speak  Latin.\n"} and "system" not in row
    with pytest.raises(ValueError, match="row 0: its prompt does not show the system message, which the chat template"):
        load_dataset(path, processors["base"])
    assert len(load_dataset(path, processors["base"], drop_unshown=True)) == 1


def test_a_second_system_message_is_refused(folder, processors):
    path = write(folder, {**SYSTEM["in the dialogue"], "system": "Speak Greek."})
    with pytest.raises(ValueError, match="does not show the field system"):
        load_dataset(path, processors["instruct"])


@pytest.mark.parametrize(
    "rendered, missing",
    [
        ("Be\n  brief.\nUser:  What\tis it?", []),
        ("User: What is it? Be brief.", ["the user message, which the chat template leaves out"]),  # another order
        ("User: What is it?", ["the system message, which the chat template leaves out"]),
    ],
)
def test_messages_are_looked_for_one_behind_the_other(rendered, missing):
    prompt = [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": "What is\nit?"}]
    assert unshown_texts(prompt, rendered) == missing


# --- columns that are named --------------------------------------------------------------------------------------


def test_a_column_that_is_named_must_be_there(folder):
    path = write(folder, columns(picture="a.png"))
    for column in ("question", "answer", "image", "options"):
        message = f"{path}: row 0: no field pictrue; it has question, answer, picture (null where a row has none)"
        with pytest.raises(Mistake, match=re.escape(message)):
            list(iter_rows(path, Columns(**{column: "pictrue"})))


def test_a_column_that_is_named_may_be_null(folder):
    path = write(folder, columns(picture="a.png", choices=["a ball"]), columns(picture=None, choices=None, answer=None))
    (first, _), (second, _) = iter_rows(path, Columns("question", "answer", "picture", "choices"))
    assert (first["images"], second["images"]) == ([str(folder / "a.png")], [])
    assert (first["options"], second["options"], second["solution"]) == (["a ball"], [], None)


def test_an_answer_that_is_named_wins_over_the_dialogues(folder):
    path = write(folder, {"messages": talk(), "gold": "a cube"})
    assert [row["solution"] for row, _ in iter_rows(path, Columns(answer="gold"))] == ["a cube"]
    assert [row["solution"] for row, _ in iter_rows(path)] == ["a ball"]


# --- a trainer in a script of one's own --------------------------------------------------------------------------


def script(model: Path, folder: Path, **fields: object) -> Qwen2VLGRPOTrainer:
    data = Dataset.from_dict({"prompt": [talk()[:1]] * 4, **{name: [value] * 4 for name, value in fields.items()}})
    return Qwen2VLGRPOTrainer(
        str(model), vowel_share, make_config(folder), train_dataset=data, eval_dataset={"a": data}
    )


def test_columns_that_a_trainer_shows_nobody_are_named(tiny_model, folder, capsys):
    script(tiny_model, folder, videos=["a.mp4"], audio=[], tools='[{"name": "zoom"}]', mask="a.png")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert lines == ["warning: no prompt shows the columns videos, tools; only rewards get them"]


def test_parts_that_a_trainer_does_not_show_are_refused(tiny_model, folder):
    video = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(ValueError, match="prompt: a part of type video is not shown to the model"):
        script(tiny_model, folder, prompt=video).train()


# --- one question ------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(tiny_model, folder, monkeypatch):
    """`scripts/ask.py` about a record, with a backend that answers nothing -> the conversation that it was asked."""
    script = load_script(REPO_ROOT / "scripts/ask.py")
    asked = []
    monkeypatch.setattr(
        asking,
        "load_transformers",
        lambda *_, **__: SimpleNamespace(encode=asked.append, generate=lambda *_: SimpleNamespace(ids=[[1]])),
    )

    def run(record: dict, template: str) -> list[dict]:
        path = write(folder, record)
        monkeypatch.setattr(
            sys, "argv", ["ask.py", "--model", str(tiny_model), "--data", str(path), "--chat_template", template]
        )
        script.main()
        return asked.pop()

    return run


def test_a_single_question_is_asked_with_all_that_its_row_holds(ask):
    system, user = ask(SYSTEM["in the dialogue"], "instruct")
    assert system["content"] == [{"type": "text", "text": "Speak  Latin.\n"}]
    assert user["content"] == [{"type": "text", "text": "What is it?"}]
    with pytest.raises(Mistake, match=r"rows\.json: row 0: its prompt does not show the system message"):
        ask(SYSTEM["in the dialogue"], "base")
    with pytest.raises(Mistake, match=r"rows\.json: row 0: its prompt does not show the video in the field clip"):
        ask(columns(clip="a.mp4"), "instruct")
