"""Reward functions as TRL calls them; among the cases, the reference's mistakes."""

import asyncio
import inspect
import re
import sys
from pathlib import Path

import pytest

from open_r1.base.errors import Mistake
from open_r1.rewards import (
    accuracy_reward,
    bare_accuracy_reward,
    check_columns,
    check_gold,
    consistency_reward,
    format_reward,
    get_reward_funcs,
    length_reward,
    needs_gold,
    order_consistency_reward,
    repetition_reward,
)
from open_r1.settings.recipes import merge_recipes

SIDES = ["left", "right"]


def as_conversation(text):
    return [{"role": "assistant", "content": text}]


def accuracy(text, solution="left", options=SIDES):
    (reward,) = accuracy_reward([as_conversation(text)], solution=[solution], options=[options])
    return reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        *((f"<think>hm</think><answer>{answer}</answer>", 1.0) for answer in ("\nleft\n", "Left", "left.", "(left)")),
        *((f"<answer>{answer}</answer>", 0.0) for answer in ("right", " ", "left or right", "A or B or C", "A")),
        *((text, 0.0) for text in ("left", "<think>hm</think> left", "<answer>left", "<answer>左</answer>")),
        ("<answer>right</answer> But wait! <answer>left</answer>", 1.0),
        ("<answer>left</answer> But wait! <answer>right</answer>", 0.0),
    ],
)
def test_accuracy_of_the_last_tagged_answer(text, reward):
    assert accuracy(text) == reward


def test_accuracy_of_numbers_and_symbols():
    assert accuracy("<answer>3.0</answer>", "3", ["3", "4"]) == 1.0
    assert accuracy("<answer>three</answer>", "3", None) == 1.0
    assert accuracy("<answer>0.5</answer>", r"\frac{1}{2}", None) == 1.0  # the symbolic branch, on a tagged answer
    assert accuracy("The values are 3 and <answer>4</answer>", "3", None) == 0.0


def test_accuracy_mixes_questions_with_and_without_options():
    texts = ["<answer>left</answer>", "<answer>7</answer>", "<answer>(B)</answer>"]
    for completions in (texts, [as_conversation(text) for text in texts]):
        rewards = accuracy_reward(completions, solution=["left", "7", "(B)"], options=[SIDES, None, SIDES])
        assert rewards == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("gold", [None, " ", "\u200b"])
def test_a_gold_answer_that_nobody_sees_is_none(gold):
    with pytest.raises(ValueError, match="no answer, which the accuracy reward compares with"):
        check_gold({"solution": gold, "options": []})


def test_consistency_among_right_answers_needs_to_know_them():
    alone, among_right = get_reward_funcs(["consistency", "consistency(among_right=True)"])
    assert not needs_gold(alone) and needs_gold(among_right)
    assert needs_gold(accuracy_reward) and not needs_gold(format_reward)


def test_a_tagged_solution_is_unwrapped_unless_the_tags_are_an_options_own():
    assert accuracy("<answer>left</answer>", "<answer> left </answer>") == 1.0
    gold = r"\boxed{<answer><think></answer>"  # found by test_fuzz.py
    assert accuracy("<answer>left</answer>", gold, [gold, "left"]) == 0.0
    check_gold({"solution": gold, "options": [gold]})


def test_accuracy_hides_no_bug():
    with pytest.raises(ValueError, match="none of the options"):
        accuracy("<answer>left</answer>", "behind")
    with pytest.raises(ValueError):
        accuracy_reward(["<answer>left</answer>"], solution=[])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        *((text, 1.0) for text in ("left", "\nLeft.\n", '"left"', "**left**", "<answer>left</answer>")),
        *((text, 0.0) for text in ("right", "", "left or right", "It is left.", "I look. left", "A")),
        *((text, 0.0) for text in ("<think>hm</think>left", "hm</think>\n<answer>left</answer>")),
    ],
)
def test_bare_accuracy_pays_for_the_answer_alone(text, reward):
    for completion in (text, as_conversation(text)):
        assert bare_accuracy_reward([completion], solution=["left"], options=[SIDES]) == [reward]
        assert bare_accuracy_reward([completion], solution=["<answer>left</answer>"]) == [reward]  # dressed, no options


def test_bare_accuracy_reads_what_accuracy_reads():
    """Another dress, the same checker."""
    texts, golds = ["3.0", "three", "4", r"\frac{1}{2}"], ["3", "3", "3", "0.5"]
    tagged = accuracy_reward([f"<answer>{text}</answer>" for text in texts], solution=golds)
    assert bare_accuracy_reward(texts, solution=golds) == tagged == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "reward", "among_right"),
    [
        ("First right. So it is left.</think><answer>Left.</answer>", 1.0, 1.0),
        ("It is right.</think><answer>left</answer>", 0.0, 0.0),
        ("It is right.</think><answer>right</answer>", 1.0, None),  # wrong, and meant
        ("It is left.</think><answer>right</answer>", 0.0, None),
        ("I look.</think><answer>left</answer>", None, None),
        ("It is left.</think><answer>left or right</answer>", None, None),
        ("It is left.", None, None),
    ],
)
def test_consistency_pays_an_answer_that_the_thought_came_to(text, reward, among_right):
    (plain,), (careful,) = get_reward_funcs(["consistency"]), get_reward_funcs(["consistency(among_right=True)"])
    for completion in (text, as_conversation(text)):
        assert plain([completion], solution=["left"], options=[SIDES]) == [reward]
        assert careful([completion], solution=["<answer>left</answer>"], options=[SIDES]) == [among_right]
    assert consistency_reward([text] * 2, options=[None, []]) == consistency_reward([text] * 2) == [None] * 2


def test_with_the_faithful_overlay_no_thought_makes_up_for_a_wrong_answer():
    recipe = merge_recipes(["configs/grpo_sat.yaml", "configs/overlays/faithful.yaml"])
    rewards = get_reward_funcs(recipe["reward_funcs"], think_prefilled=True)

    def earned(said, answer):
        text = f"I look. {said}</think><answer>{answer}</answer>"
        values = [reward([text], solution=["left"], options=[SIDES])[0] for reward in rewards]
        return sum(weight * (value or 0.0) for weight, value in zip(recipe["reward_weights"], values, strict=True))

    meant, against = earned("It is left.", "left"), [earned(said, "left") for said in ("It is right.", "")]
    wrong = [earned(said, "right") for said in ("It is right.", "It is left.", "")]
    assert meant > max(against) and min(against) > max(wrong)


GOOD = "<think>I look.</think>\n<answer>left</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (f"\n {GOOD} \n", 1.0),
        ("<think>I\nlook.</think><answer>\nleft\n</answer>", 1.0),
        ("left", 0.0),
        ("I look.</think><answer>left</answer>", 0.0),
        ("<think> \n</think><answer>left</answer>", 0.0),
        ("<think>I look.</think><answer>\u2060 \ufe0f</answer>", 0.0),  # nobody sees it
        ("<think>\u200bI look.</think><answer>left\u200b</answer>", 1.0),
        ("<answer>left</answer><think>I look.</think>", 0.0),
        ("<think>I look.</think> so <answer>left</answer>", 0.0),
        (f"{GOOD} Done.", 0.0),
        (GOOD * 2, 0.0),
        ("<think>I look.<answer>left</answer></think>", 0.0),
        ("<think>I <think>look.</think></think><answer>left</answer>", 0.0),
        ("<think>I look.</think><answer>left", 0.0),
    ],
)
def test_format(text, reward):
    assert format_reward([as_conversation(text)]) == [reward]
    assert format_reward([text]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("I look.</think>\n<answer>left</answer>", 1.0),
        (GOOD, 0.0),  # the prompt has opened the tag already
        ("</think><answer>left</answer>", 0.0),
        ("I look.</think><answer>left</answer> User:", 0.0),
    ],
)
def test_format_after_a_prompt_that_opened_the_think_tag(completion, reward):
    assert format_reward([as_conversation(completion)], think_prefilled=True) == [reward]


@pytest.mark.parametrize(
    ("piece", "within", "around"),
    [
        ("<think", 1.0, 0.0),
        ("x\n", 1.0, 0.0),
        (" ", 0.0, 1.0),
        ("\u200b", 0.0, 0.0),
        *((tag, 0.0, 0.0) for tag in ("<think>", "</think><answer>")),
    ],
)
def test_format_of_a_megabyte(piece, within, around):
    """In a block it is something unless nobody sees it; around the blocks only white space may stand.

    No clock: a backtracking pattern would need hours.
    """
    text = piece * (1_000_000 // len(piece))
    for completion, reward in (
        (text, 0.0),
        (f"<think>{text}</think><answer>{text}</answer>", within),
        (f"<think>{text}</think><answer>left</answer>", within),
        (f"<think>I look.</think><answer>{text}</answer>", within),
        (f"<think>I look.</think>{text}<answer>left</answer>", around),
        (f"<think>I look.</think><answer>left</answer>{text}", around),
        (f"<think>x</think>{text}", 0.0),
    ):
        assert format_reward([completion]) == [reward]
        assert format_reward([completion.removeprefix("<think>")], think_prefilled=True) == [reward]


def test_length_is_linear_and_bounded():
    ids = [[7] * length for length in (0, 1, 500, 1000, 5000)]
    assert length_reward(["x"] * 5, completion_ids=ids) == pytest.approx([0.0, 0.001, 0.5, 1.0, 1.0])
    assert length_reward(["x"], completion_ids=[[7] * 50], target_length=100) == [0.5]


def test_repetition_is_the_share_of_what_was_there_before():
    ids = [[], [7] * 7, list(range(50)), [7] * 17, [*range(8), *range(100, 108), *range(8)]]
    rewards = repetition_reward(["x"] * 5, completion_ids=ids)
    assert rewards == pytest.approx([0.0, 0.0, 0.0, -9 / 10, -1 / 17])
    # a phrase that is said again, as by who looks again, is none; a loop is nearly -1
    again = [*range(20), 1, 2, 3, 4, *range(30, 50)]
    assert repetition_reward(["x"] * 2, completion_ids=[again, [1, 2, 3] * 200]) == pytest.approx([0.0, -1.0], abs=0.01)
    assert repetition_reward(["x"], completion_ids=[again], ngram=3) == pytest.approx([-2 / 42])


def test_soft_overlong_punishes_the_last_fifth_of_the_limit():
    ids = [[7] * length for length in (0, 80, 81, 90, 100)]
    for limit, expected in ((100, [0, 0, -0.05, -0.5, -1]), (700, [0] * 5)):
        (reward,) = get_reward_funcs(["soft_overlong"], max_completion_length=limit, think_prefilled=True)
        assert reward(completions=["x"] * 5, completion_ids=ids, prompts=["p"] * 5) == pytest.approx(expected)
    (reward,) = get_reward_funcs(["soft_overlong"], max_completion_length=4)  # no fifth of it is a whole token
    assert reward(completions=["x"], completion_ids=[[7] * 4]) == [0.0]


def consistency(*asked, options=SIDES):
    """Rewards of completions, each with its question and whether its options are in the second order."""
    orders = [options[::-1] if second else options for _, second, _ in asked]
    texts = [f"<think>hm</think><answer>{answer}</answer>" for *_, answer in asked]
    numbers = [question for question, *_ in asked]
    return order_consistency_reward(texts, options=orders, rotation_of=numbers)


def test_order_consistency_is_the_share_of_the_other_order_that_agrees():
    left, right = (1, False, "left"), (1, True, "right")
    assert consistency(left, left, left, (1, True, "Left."), right, right) == pytest.approx([1 / 3] * 3 + [1, 0, 0])
    # whether it is right plays no part; what cannot be read agrees with nothing, not with its like either
    assert consistency((1, False, "right"), right) == [1, 1]
    assert consistency((1, False, "left or right"), (1, True, "left or right"), (1, True, "")) == [0, 0, 0]


def test_order_consistency_compares_one_question_in_two_orders_alone():
    assert consistency((1, False, "left"), (1, False, "left")) == [None, None]
    assert consistency((1, False, "left"), (2, True, "left")) == [None, None]
    assert consistency((None, False, "left"), (None, True, "left")) == [None, None]
    assert order_consistency_reward(["<answer>left</answer>"], options=[SIDES]) == [None]  # held-out, in one order
    numbers = ["3", "4"]
    assert consistency((1, False, "three"), (1, True, "3.0"), (1, True, "4"), options=numbers) == [0.5, 1, 0]


def test_registry_resolves_in_order_and_keeps_names():
    rewards = get_reward_funcs(["format", "accuracy", "length", "repetition", "soft_overlong"], max_completion_length=9)
    names = ["format_reward", "accuracy_reward", "length_reward", "repetition_reward", "soft_overlong_reward"]
    assert [reward.__name__ for reward in rewards] == names
    # what reads a run's accuracy knows one name
    assert [reward.__name__ for reward in get_reward_funcs(["bare_accuracy"])] == ["accuracy_reward"]


OWN = """import sys
import numpy
def unlike(completions): return [0.0] * len(completions)
def text(completions, **kwargs): return ["1.0"] * len(completions)
def infinite(completions, **kwargs): return [1.0] + [float("inf")] * (len(completions) - 1)
def huge(completions, **kwargs): return [10**400] * len(completions)
async def nan(completions, **kwargs): return [float("nan")] * len(completions)
def nested(completions, **kwargs): return numpy.zeros((len(completions), 2))
def one(completions, **kwargs): return [1.0]
def leaves(completions, **kwargs): sys.exit(0)
def breaks(completions, **kwargs): return numpy.zeros(2).reshape(3)
def misses(texts, **kwargs): return [0.0] * len(texts)
def good(completions, **kwargs): return numpy.float32(0.5), True, None
def by_index(completions, **kwargs): return dict.fromkeys(range(len(completions)), 1.0)
def unordered(completions, **kwargs): return {0.0, 0.5, 1.0}
def word(completions, **kwargs): return "abc"
async def raises(completions, **kwargs): raise KeyError("score")
async def late(completions, **kwargs): return [1.0, None, "good"]
def plain(completions, **kwargs): return [float("think_prefilled" in kwargs) for _ in completions]
def aware(completions, think_prefilled, **kwargs): return [float(think_prefilled) for _ in completions]
constant = 1.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own with this text; its file."""

    def write(text: str) -> Path:
        path = tmp_path / "own_rewards.py"
        path.write_text(text)
        return path

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    yield write
    sys.modules.pop("own_rewards", None)


def test_rewards_get_of_the_run_only_what_they_ask_for(own):
    own(OWN)
    rewards = get_reward_funcs(["own_rewards:plain", "own_rewards:aware", "format"], think_prefilled=True)
    assert [reward(completions=["I look.</think><answer>left</answer>"]) for reward in rewards] == [[0.0], [1.0], [1.0]]
    assert [reward.__name__ for reward in rewards] == ["plain", "aware", "format_reward"]
    assert not inspect.iscoroutinefunction(rewards[1])


def test_parameters_stand_behind_a_reward(own):
    own("def short(completions, limit=10, words=(), **_):\n    return [float(len(c) < limit) for c in completions]\n")
    names = ["own_rewards:short(limit=3, words=['a', 'b'])", "own_rewards:short", "length(target_length=4)"]
    rewards = get_reward_funcs(names, max_completion_length=9)
    assert [reward.__name__ for reward in rewards] == ["short", "short", "length_reward"]
    given = {"completions": ["abcde"], "completion_ids": [[1, 2]]}
    assert [reward(**given) for reward in rewards] == [[0.0], [1.0], [0.5]]


@pytest.mark.parametrize(
    "name, message",
    [
        ("length(target=4)", "length has no parameter 'target'; it has target_length"),
        ("accuracy(limit=4)", "accuracy has no parameter 'limit'; it has options"),
        ("length(target_length=0)", r"length\(target_length=0\): expected a whole number of at least 1"),
        ("repetition(ngram='x')", r"repetition\(ngram='x'\): expected a whole number of at least 1"),
        ("soft_overlong(max_completion_length=None)", "expected a whole number of at least 1"),
        ("length(4)", "parameters of a reward are written as in length"),
        ("length(target_length=4", "parameters of a reward are written as in length"),
        ("length(target_length=print(1))", "parameters of a reward are written as in length"),
        ("length(**{})", "parameters of a reward are written as in length"),
        ("length(target_length=4) + 1", "parameters of a reward are written as in length"),
    ],
)
def test_parameters_that_a_reward_has_not_are_one_line(name, message):
    with pytest.raises(Mistake, match=f"^reward_funcs: .*{message}"):
        get_reward_funcs([name])


@pytest.mark.parametrize(
    "name, message",
    [
        ("acuracy", "'acuracy'.*accuracy, bare_accuracy, consistency, format, length"),
        ("", ""),
        ("own_rewards:", ""),
        (":plain", ""),
        ("own_rewards:missing", "missing"),
        ("own_rewards:constant", "constant"),
        ("no_such_package.module:reward", "no module 'no_such.* or in this folder$"),
        ("own_rewards.py:plain", "'own_rewards.py:plain': write own_rewards:plain, as Python imports it; "),
        ("./mine/own_rewards.py:plain", "write own_rewards:plain, as Python imports it"),
    ],
)
def test_unknown_rewards_are_one_clear_line(own, name, message):
    own(OWN)
    with pytest.raises(Mistake, match=f"^reward_funcs: .*{message}"):
        get_reward_funcs([name])


@pytest.mark.parametrize(
    "text, message",
    [
        ("import no_such_dependency", r"ModuleNotFoundError: No module named 'no_such_dependency' \({path}, line 1\)"),
        ("import sys; sys.exit(0)", r"SystemExit: 0 \({path}, line 1\)"),
        ("def f(:", r"SyntaxError: invalid syntax \(own_rewards\.py, line 1\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(own, text, message):
    path = own(text)
    with pytest.raises(Mistake) as raised:
        get_reward_funcs(["own_rewards:reward"])
    expected = "reward_funcs: module 'own_rewards' cannot be imported: " + message.format(path=path)
    assert re.fullmatch(expected, str(raised.value))


@pytest.mark.parametrize("name", ["own_rewards:unlike", "builtins:max"])
def test_a_function_that_trl_could_not_call_is_no_reward(own, name):
    own(OWN)
    with pytest.raises(Mistake, match=rf"^reward_funcs: {name} must take \*\*kwargs"):
        get_reward_funcs([name])


@pytest.mark.parametrize(
    "name, message",
    [
        ("text", r"returned '1.0' for completion 0 \(asked 'Who\?'\); expected a list of 3, a finite number "),
        ("infinite", "returned inf for completion 1 "),
        ("huge", "returned 10000.* for completion 0 "),
        ("nan", "returned nan for completion 0 "),
        ("nested", r"returned array\(\[0\., 0\.\]\) for completion 0 "),
        ("one", "returned 1 rewards; expected a list of 3"),
        ("leaves", r"raised SystemExit: 0 \({path}, line 10\)$"),
        ("breaks", r"raised ValueError: cannot reshape .* \({path}, line 11\)$"),
        ("by_index", r"returned {{0: 1.0, 1: 1.0, 2: 1.0}}; expected a list of 3"),
        ("unordered", r"returned {{0.0, .*}}; expected a list of 3"),
        ("word", r"returned 'abc'; expected a list of 3"),
        ("raises", r"raised KeyError: 'score' \({path}, line 17\)$"),
        ("late", r"returned 'good' for completion 2 \(asked 'Which\?'\); expected a list of 3"),
        ("misses", r"raised TypeError: misses\(\) missing 1 required positional argument: 'texts'$"),
    ],
)
def test_what_is_no_reward_names_its_function(own, name, message):
    path = own(OWN)
    (reward,) = get_reward_funcs([f"own_rewards:{name}"])
    with pytest.raises(Mistake) as raised:
        rewards = reward(prompts=["Who?", "Where?", "Which?"], completions=["x", "y", "z"])
        asyncio.run(rewards)  # of the one that TRL has to await
    expected = f"reward_funcs: own_rewards:{name} " + message.format(path=path)
    assert re.match(expected, str(raised.value)) and len(str(raised.value)) < 250


def test_a_reward_that_needs_a_column_which_the_data_has_not(own):
    own(OWN)
    names = ["accuracy", "own_rewards:good", "own_rewards:aware", "own_rewards:misses"]
    rewards = get_reward_funcs(names, think_prefilled=True)
    check_columns(rewards, ["prompt", "images", "texts"])
    check_columns(rewards[:3], ["prompt"])
    with pytest.raises(Mistake, match=r"^reward_funcs: misses needs texts, which is no column .*; it gets .*, images$"):
        check_columns(rewards, ["prompt", "images"])


def test_numbers_of_any_kind_are_rewards(own):
    own(OWN)
    (reward,) = get_reward_funcs(["own_rewards:good"])
    assert reward(completions=["x", "y", "z"]) == [0.5, 1.0, None] and reward.__name__ == "good"
