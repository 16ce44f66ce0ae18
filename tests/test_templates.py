"""Chat templates of strangers: a mistake is one line with file and line, and what never ends is ended."""

import time

import pytest

from open_r1.base.errors import REPO_ROOT
from open_r1.evaluation.answering import load_prompting
from open_r1.models import templates
from open_r1.models.loading import check_template, load_processor
from open_r1.models.templates import try_template

MARK = "<|image_pad|>"
BROKEN = {  # a template -> how its error goes on behind the template's name
    "{% for m in messages %}\n{{ m.role }}": "line 2: Unexpected end of template",
    "{{ messages | nofilter }}": "line 1: No filter named",
    "a\n{{ raise_exception('roles must alternate') }}": "line 2: roles must alternate",
    "a\n\n{{ messages[0].nothing.more }}": "line 3: ",
    "a\n{{ 1 + 'a' }}": "line 2: TypeError: ",
    "{{ messages.__class__.__mro__ }}": "line 1: ",
    "{{ raise_exception('x' * 100000) }}": "line 1: xxxx",
    "{{ 'a' * 10 ** 11 }}": "line 1: MemoryError",
}


@pytest.fixture(scope="module")
def processor():
    return load_processor(REPO_ROOT / "configs/tiny/base")


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_template_is_told_with_its_file_and_line(processor, text):
    processor.chat_template = text
    with pytest.raises(ValueError) as error:
        try_template(processor, "/my/template.jinja")
    message = str(error.value)
    assert message.startswith(f"chat_template: /my/template.jinja: {BROKEN[text]}"), message
    assert "\n" not in message and len(message) < 600


LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("text", [LOOP, "{{ 10 ** (10 ** 9) }}"])
def test_a_template_that_never_ends_is_ended(processor, monkeypatch, text):
    monkeypatch.setattr(templates, "MOST_SECONDS", 1)
    processor.chat_template = text
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^chat_template: mine: has not made a prompt after 1 s, .*it may loop$"):
        try_template(processor, "mine")
    assert time.monotonic() - start < 20


def test_a_template_that_works_is_rendered_as_it_is(processor):
    parts = "{% for part in messages[0].content %}{{ part.type }} {% endfor %}"
    processor.chat_template = "{{ kind }}: " + parts + "\N{GRINNING FACE}"
    assert try_template(processor, "mine", kind="yes") == "yes: image text \N{GRINNING FACE}"


@pytest.mark.parametrize("marks", [0, 2])
def test_a_template_shows_an_image_where_a_message_has_one(marks, processor):
    processor.chat_template = MARK * marks
    with pytest.raises(ValueError, match=rf"writes {marks} <\|image_pad\|> for a message with one image"):
        check_template(processor, "mine")


def test_a_template_that_is_no_text_is_told_with_its_file(tiny_model, tmp_path):
    (tmp_path / "mine.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"^chat_template: .*mine\.jinja: not UTF-8"):
        load_prompting(tiny_model, str(tmp_path / "mine.jinja"))
