"""Fuzzing: whatever a model writes is judged, and whatever a file holds is a row or an error in one line.

The examples are the same in every run. What they find becomes a case of its own in the file of what it was about.
"""

import io
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from PIL import Image

from open_r1.answers.checker import extract_answer, is_correct, judge
from open_r1.answers.values import is_blank
from open_r1.base.prompts import without_surrogates
from open_r1.rewards import accuracy_reward, format_reward
from open_r1.tasks.examples import iter_rows
from open_r1.tasks.sat import Example, Skip, convert_row, to_record

# It mixes in constants of this project's modules that are imported, which other tests decide: not the same every time.
assert providers.is_local_module_file("mine.py")
providers.is_local_module_file = lambda path: False
SECONDS = 1.0  # of a processor, for a response of 100,000 characters; it takes a twentieth of them


def fuzz(examples: int) -> settings:
    """So many examples, always the same ones."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# --- answers and rewards ----------------------------------------------------------------------------------------

PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "The answer is ", "Answer: ", "答案是"),
    *("(A)", "(B) ", "C.", "[D]", " A ", "option b", "left", "right", "3", "three", " 1/2", "-5", "3.0", "√{", "9π"),
    *(" or ", "not ", "either ", "because ", "while a", "I would choose ", "Therefore, ", "\n", "\nQuestion: ", ". "),
    *("。", "、", "İ", "ß", "\0", "\u202e", "\ud800", "\x1b[2J", "**", "``", "$", "%", "&lt;", "<|im_end|>", " ", "\t"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join)
OPTIONS = st.lists(TEXTS | st.sampled_from(["left", "right", "3", "4", "yes", "no", "point A"]), min_size=1, max_size=5)


@st.composite
def questions(draw: st.DrawFn) -> dict:
    """A gold answer, and the options that it is one of; or none."""
    options = draw(st.none() | OPTIONS)
    return {"gold": draw(TEXTS if options is None else st.sampled_from(options)), "options": options}


@fuzz(250)
@given(TEXTS, questions(), st.sampled_from([None, False]), st.booleans())
def test_every_response_gets_a_verdict(response, question, lettered, lenient):
    verdict = judge(response, **question, lettered=lettered, lenient=lenient)
    assert verdict.reading and verdict.correct in (True, False)
    assert verdict.answer is not None or not verdict.correct
    if question["options"] and verdict.answer is not None:
        letters = [f"({chr(ord('A') + index)})" for index in range(len(question["options"]))]
        assert verdict.answer in {*question["options"], *letters}
    if not lenient:
        assert verdict.correct == is_correct(extract_answer(response), **question, lettered=lettered)


@fuzz(200)
@given(TEXTS, questions(), st.randoms(use_true_random=False))
def test_the_order_of_options_decides_nothing(answer, question, draw):
    shuffled = draw.sample(question["options"] or [], len(question["options"] or []))
    expected = is_correct(answer, **question, lettered=False)
    assert is_correct(answer, question["gold"], shuffled, lettered=False) == expected


@fuzz(100)
@given(st.lists(st.sampled_from(range(-99, 99)).map(str), min_size=1, max_size=8, unique=True), st.data())
def test_a_letter_means_the_option_at_its_place(options, data):
    chosen, gold = (data.draw(st.integers(0, len(options) - 1)) for _ in range(2))
    dress = data.draw(st.sampled_from(["{}", "({})", "{}.", "[{}]", "Option {}", "**{}**"]))
    answer = dress.format(chr(ord("A") + chosen))
    assert is_correct(answer, options[gold], options, lettered=True) == (chosen == gold)


@fuzz(60)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join), questions(), st.booleans())
def test_a_long_response_is_judged_in_time(piece, question, lenient):
    response = piece * (100_000 // len(piece))
    start = time.process_time()
    judge(response, **question, lenient=lenient)
    assert time.process_time() - start < SECONDS


@fuzz(300)
@given(st.lists(st.tuples(TEXTS, questions()), min_size=1, max_size=4), st.booleans())
def test_rewards_are_0_or_1_for_any_text(rows, think_prefilled):
    texts = [text for text, _ in rows]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    golds, options = ([question[key] for _, question in rows] for key in ("gold", "options"))
    for rewards in (
        [accuracy_reward(form, solution=golds, options=options) for form in (texts, conversations)],
        [format_reward(form, think_prefilled=think_prefilled) for form in (texts, conversations)],
    ):
        assert rewards[0] == rewards[1] and len(rewards[0]) == len(rows)
        assert all(type(reward) is float and reward in (0, 1) for reward in rewards[0])


@fuzz(200)
@given(TEXTS, TEXTS, st.sampled_from(["", " ", "\n\n"]))
def test_the_right_format_is_rewarded_whatever_it_holds(thought, answer, space):
    is_clean = not any(tag in thought + answer for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    text = f"{space}<think>{thought}</think>{space}<answer>{answer}</answer>{space}"
    expected = float(is_clean and not is_blank(thought) and not is_blank(answer))
    assert format_reward([text]) == format_reward([text.replace("<think>", "", 1)], think_prefilled=True) == [expected]


# --- rows of files ----------------------------------------------------------------------------------------------

FIELDS = ["messages", "conversations", "prompt", "question", "problem", "solution", "answer", "images", "image"]
FIELDS += ["options", "question_type"]
NAMES = [*FIELDS, "completions", "role", "content", "from", "value", "type", "text", "path", "bytes"]
WORDS = ["user", "assistant", "human", "gpt", "system", "image", "text", "<image>", "<image>What?", "a.png", "left", ""]
WORDS += ["file://a.png", "data:image/png;base64,AAAA", "http://127.0.0.1/x.png", "\ud800", "\0", "/dev/zero"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=4)
        | st.fixed_dictionaries({"role": st.sampled_from(WORDS), "content": inner})
        | st.fixed_dictionaries({"type": st.sampled_from(["image", "text"]), "text": inner, "image": inner})
    ),
    max_leaves=12,
)
TURNS = st.tuples(VALUES, VALUES).map(
    lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
)
RECORDS = st.dictionaries(st.sampled_from(FIELDS), VALUES | TURNS, max_size=5) | VALUES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with one picture."""
    path = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (4, 4)).save(path / "a.png")
    return path


GOOD = {"question": "Where?", "answer": "left", "image": "a.png", "mine": 1}


def good_row(folder: Path) -> dict:
    """What a file's `GOOD` is read as, whatever stands before and behind it."""
    prompt = [{"role": "user", "content": "Where?"}]
    row = {"prompt": prompt, "images": [str(folder / "a.png")], "solution": "left", "options": [], "question_type": ""}
    return {"question": "Where?", "answer": "left", "mine": 1, **row}


def read(path: Path) -> tuple[list[dict], str]:
    """The rows of a file up to its first mistake, and that mistake, one line that begins with the file, or nothing."""
    rows, error = [], ""
    try:
        for row, _ in iter_rows(path):
            rows.append(row)
    except (OSError, ValueError) as mistake:
        error = str(mistake)
        assert error.startswith(f"{path}: ") and "\n" not in error, error
    for row in rows:
        assert row["prompt"] and all(isinstance(message["content"], str) for message in row["prompt"])
        assert isinstance(row["images"], list) and isinstance(row["question_type"], str)
        assert row["solution"] is None or isinstance(row["solution"], str)
        assert all(isinstance(option, str) for option in row["options"])
    return rows, error


@fuzz(400)
@given(RECORDS, st.sampled_from([".json", ".jsonl"]))
def test_any_json_record_is_a_row_or_one_line(folder, record, ending):
    path, records = folder / f"rows{ending}", [GOOD, record, GOOD]
    path.write_text(json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records)))
    rows, error = read(path)
    assert rows[0] == good_row(folder)
    if error:
        assert error.startswith(f"{path}: row 1: ") and len(rows) == 1
    else:
        assert rows[2] == good_row(folder) and len(rows) == 3


@fuzz(100)
@given(TEXTS.filter(lambda text: text.strip()), TEXTS.filter(lambda text: text.strip()), st.sampled_from(range(5)))
def test_any_text_is_a_question_and_an_answer_in_every_form(folder, question, answer, form):
    record = [
        {"question": question, "answer": answer},
        {"prompt": question, "solution": answer},
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": question}]}], "answer": answer},
    ][form]
    path = folder / "texts.json"
    path.write_text(json.dumps([record, GOOD]))
    rows, error = read(path)
    question, answer = (without_surrogates(text) for text in (question, answer))
    assert not error and rows[1] == good_row(folder)
    assert (rows[0]["prompt"][0]["content"], rows[0]["solution"]) == (question, answer)


@fuzz(150)
@given(st.randoms(use_true_random=False), st.integers(0, 8))
def test_any_damaged_parquet_file_is_rows_or_one_line(folder, draw, count):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD] * 9), file)
    content = bytearray(file.getvalue())
    for _ in range(count):
        content[draw.randrange(len(content))] = draw.randrange(256)
    whole = draw.random() < 0.8
    path = folder / "damaged.parquet"
    path.write_bytes(content if whole else content[: draw.randrange(len(content))])
    rows, error = read(path)
    if whole and bytes(content) == file.getvalue():
        assert rows == [good_row(folder)] * 9 and not error
    assert error or rows


PICTURE = io.BytesIO()
Image.new("RGB", (4, 4)).save(PICTURE, "PNG")
SAT_TEXTS = st.none() | st.sampled_from(["left", "right", " ", "Left ", "<image>", "<|im_end|>", "\ud800"]) | st.text()
SAT_IMAGES = st.sampled_from([None, b"", b"x", PICTURE.getvalue(), PICTURE.getvalue()[:50]])
SAT_IMAGES |= st.fixed_dictionaries({"bytes": SAT_IMAGES, "path": st.none()})
SAT_ROWS = st.fixed_dictionaries(
    {
        "image_bytes": st.none() | st.lists(SAT_IMAGES, max_size=2),
        "question": SAT_TEXTS,
        "answers": st.none() | st.lists(SAT_TEXTS, max_size=4),
        "question_type": SAT_TEXTS,
        "correct_answer": SAT_TEXTS,
    }
)


@fuzz(300)
@given(SAT_ROWS, st.booleans())
def test_any_row_of_sat_is_an_example_or_has_a_reason(folder, row, keep_multi_image):
    result = convert_row(row, 0, seed=0, keep_multi_image=keep_multi_image)
    if isinstance(result, Skip):
        return
    assert isinstance(result, Example) and result.answer in result.options and set(result.options) == {*row["answers"]}
    assert len(result.images) == len(row["image_bytes"])
    path = folder / "sat.json"
    path.write_text(json.dumps([to_record(result, ["a.png"] * len(result.images))]))
    (example,), error = read(path)
    assert not error and example["solution"] == result.answer and example["options"] == list(result.options)
