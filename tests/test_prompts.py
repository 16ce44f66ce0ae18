"""Golden prompts: the text a model sees, and its token ids, in training and in evaluation."""

import json
from pathlib import Path

import pytest
from PIL import Image

from open_r1.base.prompts import check_text, join_options, load_chat_template, sat_question
from open_r1.evaluation.answering import check_prompts
from open_r1.models.families import control_tokens
from open_r1.models.families.qwen import QWEN_TOKENS
from open_r1.running.data import opens_think
from open_r1.tasks.benchmarks import Item
from open_r1.tiny import make_processor, make_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data/prompts.json").read_text())
QUESTION = sat_question("Is the red ball to the left of the box?", ["yes", "no"])


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that ids pin the text; Qwen's special tokens behind them."""
    return make_tokenizer()


@pytest.mark.parametrize("name", GOLDEN)
def test_prompt_is_the_golden_one(name, tokenizer):
    template, style = name.split("/")
    processor = make_processor(tokenizer, chat_template=template)
    image = Image.new("RGB", (56, 56))  # 2 x 2 image tokens
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, style=style)
    assert rendered == GOLDEN[name]["text"]
    ids = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, style=style
    )["input_ids"][0]
    assert ids == GOLDEN[name]["ids"]
    assert ids.count(processor.image_token_id) == 4


def test_default_style_is_the_training_prompt(tokenizer):
    for template, style in (("base", "reasoning"), ("instruct", "train")):
        processor = make_processor(tokenizer, chat_template=template)
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        rendered = processor.apply_chat_template(message, add_generation_prompt=True)
        assert rendered == GOLDEN[f"{template}/{style}"]["text"]


# What each family writes for an image, and at the end of a turn, where Qwen's write theirs.
IMAGES = {"idefics3": "<image>", "smolvlm": "<image>", "internvl": "<IMG_CONTEXT>"}
OTHERS = [pytest.param(name, IMAGES[name], id=name) for name in IMAGES]


def render(family, template, messages, **settings):
    processor = make_processor(make_tokenizer(model_type=family), family, template)
    return processor.apply_chat_template(messages, tokenize=False, **settings)


@pytest.mark.parametrize("family, image", OTHERS)
@pytest.mark.parametrize("style", ["reasoning", "direct"])
def test_other_families_have_the_same_base_prompt(family, image, style):
    """But for the mark of an image, and the end of an answer."""
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    asked, answered = {"role": "user", "content": parts}, {"role": "assistant", "content": "left"}
    golden = GOLDEN[f"base/{style}"]["text"].replace("<|vision_start|><|image_pad|><|vision_end|>", image)
    assert render(family, "base", [asked], add_generation_prompt=True, style=style) == golden
    end = "<|im_end|>" if family == "internvl" else "<end_of_utterance>"
    assert render(family, "base", [asked, answered], style=style) == f"{golden}left{end}"


@pytest.mark.parametrize("style", ["train", "reasoning", "direct"])
def test_other_families_have_their_own_instruct_prompt(style):
    """InternVL3's is ChatML with a line an image; SmolVLM's names the speakers."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    golden = GOLDEN[f"instruct/{style}"]["text"]
    expected = golden.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
    assert render("internvl", "instruct", messages, add_generation_prompt=True, style=style) == expected
    asked = golden.rpartition("<|vision_end|>")[2].partition("<|im_end|>")[0]
    expected = f"<|im_start|>User:<image>{asked}<end_of_utterance>\nAssistant:"
    assert render("smolvlm", "instruct", messages, add_generation_prompt=True, style=style) == expected
    answered = [*messages, {"role": "assistant", "content": "left"}]
    assert render("smolvlm", "instruct", answered, style=style) == f"{expected} left<end_of_utterance>\n"


def test_only_the_base_prompt_opens_the_think_block(tokenizer):
    base, instruct = (make_processor(tokenizer, chat_template=name) for name in ("base", "instruct"))
    assert opens_think(base) and not opens_think(base, style="direct") and not opens_think(instruct)


def test_answers_are_closed_and_marked_for_the_loss(tokenizer):
    processor = make_processor(tokenizer, chat_template="base")
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "left"}]
    output = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        style="direct",
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [i for i, m in zip(output["input_ids"], output["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "left<|im_end|>"


def test_unknown_style_and_template_are_refused(tokenizer):
    for name in ("base", "instruct"):
        with pytest.raises(Exception, match="style must be"):
            make_processor(tokenizer, chat_template=name).apply_chat_template(
                [{"role": "user", "content": "?"}], style="chat"
            )
    with pytest.raises(FileNotFoundError, match="known: base, instruct"):
        load_chat_template("llama")


def test_options_read_as_in_the_paper():
    assert join_options(["a", "b", "c"]) == "a, b or c" and join_options(["yes", "no"]) == "yes or no"
    assert sat_question("Where?", ["a", "b, c", "d"]) == (
        "Answer in natural language. Where? Choose between the following options: a, b, c or d"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        *((f"a {token} b", "control token of the model") for token in QWEN_TOKENS[:2]),
        (" \n", "is empty"),
        ("half \ud800", "half a character"),
    ],
)
def test_a_prompt_that_would_not_be_read_as_text_is_refused(text, message, tokenizer):
    """By evaluation with its question's name, and by ask.py; training leaves the row out."""
    with pytest.raises(ValueError, match=message):
        check_text(text, control_tokens(tokenizer))
    fine, other = (Item(id, "Count", "?", ("a",), "a", prompt, ()) for id, prompt in ((4, QUESTION), (5, text)))
    with pytest.raises(ValueError, match=f"^question 5: .*{message}"):
        check_prompts([fine, other], make_processor(tokenizer))


@pytest.mark.parametrize(
    "text", [QUESTION, "<image> <|mine|> </think>", "a\0b \x07", "\u202e\u05e9\u05dc", "\U0001f600", "{{ 7*7 }}"]
)
def test_other_texts_are_text(text, tokenizer):
    """They bring no control token, and come back as they are."""
    controls = control_tokens(tokenizer)
    check_text(text, controls)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.convert_tokens_to_ids(controls))
