"""Chat templates of strangers: a mistake is one line with file and line, and what never ends is ended."""

import subprocess
import time

import pytest

from open_r1.base.prompts import REPO_ROOT
from open_r1.models import templates
from open_r1.models.loading import check_template, load_processor
from open_r1.models.templates import try_template, within_bounds

BROKEN = {  # a template -> how its error begins
    "{% for m in messages %}\n{{ m.role }}": "line 2: Unexpected end of template",
    "one\ntwo\n{% if %}": "line 3: Expected an expression",
    "{{ messages | nofilter }}": "line 1: No filter named",
    "{% nosuch %}": "line 1: Encountered unknown tag 'nosuch'",
    "a\n{{ raise_exception('roles must alternate') }}": "line 2: roles must alternate",
    "a\n\n{{ messages[0].nothing.more }}": "line 3: ",
    "{{ nothing() }}": "line 1: 'nothing' is undefined",
    "a\n{{ 1 + 'a' }}": "line 2: TypeError: ",
    "{{ 1 / 0 }}": "line 1: ZeroDivisionError: ",
    "{% for i in range(10**12) %}x{% endfor %}": "line 1: OverflowError: Range too big",
    "{{ messages.__class__.__mro__ }}": "line 1: ",
    "{{ raise_exception('x' * 100000) }}": "line 1: xxxx",
    "{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}": "line 1: RecursionError: ",
}


@pytest.fixture(scope="module")
def processor():
    return load_processor(REPO_ROOT / "configs/tiny/base")


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_template_is_told_with_its_file_and_line(processor, text):
    processor.chat_template = text
    with pytest.raises(ValueError) as told:
        try_template(processor, "/my/template.jinja")
    assert str(told.value).startswith(f"chat_template: /my/template.jinja: {BROKEN[text]}"), told.value
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "text, said",
    [
        (f"a\n{LOOP}", "line 2: has not made a prompt after 1 s; it may loop"),
        ("{{ 10 ** (10 ** 9) }}", "has not made a prompt after 1 s, or in 1024 MiB; it may loop"),
        ("{{ 'a' * 10 ** 11 }}", "takes more than 1024 MiB"),
        ("{{ 'a' * 10 ** 7 }}", "makes a prompt of 10000000 letters of one image and one word"),
    ],
)
def test_a_template_that_never_ends_is_ended(processor, monkeypatch, text, said):
    monkeypatch.setattr(templates, "MOST_SECONDS", 1)
    processor.chat_template = text
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^chat_template: mine: ") as told:
        try_template(processor, "mine")
    assert said in str(told.value) and time.monotonic() - start < 20


def test_a_template_that_works_is_rendered_as_it_is(processor):
    processor.chat_template = (
        "{{ kind }}: {% for part in messages[0].content %}{{ part.type }} {% endfor %}\N{GRINNING FACE}"
    )
    assert try_template(processor, "mine", kind="yes") == "yes: image text \N{GRINNING FACE}"
    with pytest.raises(ValueError, match=r"writes 0 <\|image_pad\|> for a message with one image"):
        check_template(processor, "mine")


def test_the_child_does_nothing_of_its_parents(quick_python):
    """It flushes none of its output, and runs no exit handler of its parent."""
    code = """if True:
        import atexit
        from open_r1.models.templates import within_bounds
        atexit.register(print, "left")
        print("begun")
        print(within_bounds(lambda: "made"))
        try:
            within_bounds(lambda: exit("gone"))
        except ValueError:
            print("refused")
    """
    done = subprocess.run([quick_python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["begun", "made", "refused", "left"] and done.stderr == ""


def test_limits_end_with_the_child():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    assert within_bounds(lambda: "x") == "x" and resource.getrlimit(resource.RLIMIT_AS) == before
