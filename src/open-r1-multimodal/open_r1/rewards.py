"""Reward functions in TRL's form: keyword lists with an entry per completion in, a float per completion out.

A recipe names them in `reward_funcs`, by their name in `reward_funcs_registry` or as `module:function`, with values of
their parameters in brackets: `length(target_length=500)`. If a function of the user raises an error, or returns
something that is no reward, the run ends in one line that names the function (`guarded`).
"""

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from open_r1.answers.checker import bare_gold, extract_answer, is_correct
from open_r1.answers.reflection import concluded
from open_r1.answers.values import is_blank
from open_r1.base.errors import Mistake
from open_r1.base.plugins import blamed_on, import_named

Completion = str | list[dict[str, Any]]
Reward = Callable[..., list[float | None]]

_THINK_THEN_ANSWER = re.compile(r"\s*<think>(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL
_LARGEST = 1e15  # of a reward: its square still fits the float32 that advantages are computed in


def accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    options: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 where the last `<answer>` block holds the solution, else 0.0, also without the tag.

    Args:
        completions: texts, or conversations whose last message is the model's.
        solution: the gold answers, bare or (as R1-V's data sets have it) wrapped in `<answer>` tags.
        options: the options of each question, where it has any.

    Raises:
        Mistake: a solution is none of its options, which is a mistake in the data.
    """
    return _compare([extract_answer(completion_text(completion)) for completion in completions], solution, options)


def bare_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    options: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 where the completion is the solution and nothing else, read as strictly as by `accuracy_reward`, else 0.0.

    The equality reward of No-Thinking-RL (arXiv 2503.16188): a completion with a thought before the answer earns
    nothing. It teaches nothing to a model that never answers so briefly, because then all completions of a group earn
    0. Logs and the report have it under the name of `accuracy_reward`. Arguments and errors: as there.
    """
    return _compare([completion_text(completion).strip() for completion in completions], solution, options)


bare_accuracy_reward.__name__ = accuracy_reward.__name__  # whatever reads a run's accuracy finds it under this name

COMPARING = (accuracy_reward, bare_accuracy_reward)  # with a gold answer, which every row then needs


def needs_gold(reward: Reward) -> bool:
    """Whether a reward compares with the gold answer: accuracy, and `consistency(among_right=True)`."""
    return reward in COMPARING or getattr(reward, "keywords", {}).get("among_right", False)


def check_gold(row: Mapping[str, Any]) -> None:
    """Raise Mistake for a row of a dataset that a reward of which `needs_gold` is true could not judge."""
    gold = row["solution"]
    if gold is None or is_blank(gold):
        raise Mistake("no answer, which the accuracy reward compares with (--answer_column names its field)")
    is_correct(None, bare_gold(gold, row["options"]), row["options"])


def format_reward(completions: Sequence[Completion], think_prefilled: bool = False, **kwargs: Any) -> list[float]:
    """1.0 for exactly one `<think>` and then one `<answer>` block, neither blank, only white space around.

    Args:
        completions: texts, or conversations whose last message is the model's.
        think_prefilled: the prompt ended with `<think>`, so completions start inside that block.
    """
    prefix = "<think>" if think_prefilled else ""
    return [float(_well_formed(prefix + completion_text(completion))) for completion in completions]


def consistency_reward(
    completions: Sequence[Completion],
    solution: Sequence[str] | None = None,
    options: Sequence[Sequence[str] | None] | None = None,
    among_right: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 where the option that the thought names last is the one in the `<answer>` block, 0.0 where it is another.

    None where the thought or the answer names no option, and for a question without options. By default it also rewards
    a wrong answer that agrees with its thought: together with accuracy, such an answer can earn as much as a right one.
    With `among_right` wrong answers get None, and the logged mean is a share of the right ones. It goes wrong where a
    thought names an option in words that the answer checker cannot read.

    Args:
        completions: texts, or conversations whose last message is the model's.
        solution: see `accuracy_reward`; needed with `among_right`.
        options: the options of each question, by their texts, where it has any.
        among_right: whether only right answers are judged.
    """
    texts = [completion_text(completion) for completion in completions]
    pairs = [concluded(text, shown or []) for text, shown in zip(texts, options or [None] * len(texts), strict=True)]
    is_judged = accuracy_reward(texts, solution, options) if among_right else [1.0] * len(texts)
    return [
        float(thought == answer) if judged and thought is not None and answer is not None else None
        for (thought, answer), judged in zip(pairs, is_judged, strict=True)
    ]


def length_reward(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    target_length: int = 1000,
    **kwargs: Any,
) -> list[float]:
    """Linear in the number of tokens, from 0.0 for none to 1.0 at `target_length`, and 1.0 beyond.

    The default slope, 0.001 a token, is the one of the paper's code, whose length reward had no upper bound.
    TRL hands over the token ids, so there is nothing to tokenize.
    """
    return [min(len(ids) / target_length, 1.0) for ids in completion_ids]


def repetition_reward(
    completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], ngram: int = 8, **kwargs: Any
) -> list[float]:
    """Minus the share of a completion's n-grams of tokens that were there before: in (-1, 0], 0.0 without repetition.

    TRL's penalty, after arXiv 2502.03373, appendix C.2. The default is eight tokens, not TRL's three: a model that
    checks its answer repeats phrases of three tokens, which should not be punished. It does not detect a loop that
    changes a word each time, or a repetition in other words.
    """
    return get_repetition_penalty_reward(ngram)(completion_ids)


def soft_overlong_reward(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    max_completion_length: int,
    **kwargs: Any,
) -> list[float]:
    """In [-1, 0]: 0.0 up to four fifths of the limit of a completion, then linear down to -1.0 at the limit.

    TRL's soft overlong punishment, DAPO's equation 13 (arXiv 2503.14476), over the same share of the limit. It does not
    control length far from the limit. If it is the only reward that differs within a group, it teaches brevity, whether
    the answers are right or wrong.

    Args:
        completions, completion_ids: see TRL.
        max_completion_length: of the run, in tokens.
    """
    return get_soft_overlong_punishment(max_completion_length, max_completion_length // 5)(completion_ids)


def order_consistency_reward(
    completions: Sequence[Completion],
    options: Sequence[Sequence[str] | None] | None = None,
    rotation_of: Sequence[int | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """The share of the completions for the other order of the options that choose the same option, in [0, 1].

    0.0 without a readable answer; None where the batch has no other order of the question (`rotate_options` adds it).
    After arXiv 2510.10104, which asks the second order after the first one's thought, and pays less for wrong answers.
    It also rewards a model that gives the same wrong answer in every order, so use it with the accuracy reward, with
    less weight.

    Args:
        completions: texts, or conversations whose last message is the model's.
        options: in the order of each question.
        rotation_of: the number of the question that a completion is for, in whatever order.
    """
    if options is None or rotation_of is None:
        return [None] * len(completions)
    samples = []
    for completion, order, question in zip(completions, options, rotation_of, strict=True):
        answer = extract_answer(completion_text(completion))
        samples.append((question, order, _choice(answer, order)))
    rewards: list[float | None] = []
    for question, order, choice in samples:
        others = [other for same, another, other in samples if same == question and another != order]
        agreeing = sum(choice is not None and other == choice for other in others)
        rewards.append(agreeing / len(others) if others and question is not None else None)
    return rewards


reward_funcs_registry: dict[str, Reward] = {
    "accuracy": accuracy_reward,
    "bare_accuracy": bare_accuracy_reward,
    "consistency": consistency_reward,
    "format": format_reward,
    "length": length_reward,
    "order_consistency": order_consistency_reward,
    "repetition": repetition_reward,
    "soft_overlong": soft_overlong_reward,
}


def get_reward_funcs(names: Sequence[str], **of_the_run: Any) -> list[Reward]:
    """The reward functions of a recipe.

    Args:
        names: names in the registry, or `module:function` for a function of the user's own; either with values of its
            parameters in brackets, as Python writes them: `my_rewards:short(limit=40)`.
        of_the_run: `think_prefilled` (see `format_reward`) and `max_completion_length`; each is given to the reward
            functions that have a parameter of this name.

    Raises:
        Mistake: a name is unknown, or its function cannot be called as TRL does, with these parameters.
    """
    return [_get_reward(name, of_the_run) for name in names]


def completion_text(completion: Completion) -> str:
    """The model's text in one completion, which TRL gives as a string or as a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _compare(
    answers: Sequence[str | None], solution: Sequence[str], options: Sequence[Sequence[str] | None] | None
) -> list[float]:
    options = options or [None] * len(answers)
    golds = [bare_gold(*question) for question in zip(solution, options, strict=True)]
    return [float(is_correct(*sample)) for sample in zip(answers, golds, options, strict=True)]


def _choice(answer: str | None, options: Sequence[str] | None) -> str | None:
    """The option that an answer, read strictly, is."""
    return next((option for option in options or () if is_correct(answer, option, options, lettered=False)), None)


def _well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _THINK_THEN_ANSWER.fullmatch(text)
    return match is not None and not any(map(is_blank, match.groups()))


def _get_reward(name: str, of_the_run: Mapping[str, Any]) -> Reward:
    name, chosen = _split_parameters(name)
    ours = reward_funcs_registry.get(name)
    reward = ours or import_named("reward_funcs", "reward", name, reward_funcs_registry)
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # of a function that is not written in Python
        parameters = {}
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise Mistake(
            f"reward_funcs: {name} must take **kwargs: TRL gives it prompts, completions, completion_ids, every column "
            "of the data, and more"
        )
    if unknown := chosen.keys() - parameters.keys():
        own = [key for key, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty]
        raise Mistake(f"reward_funcs: {name} has no parameter {min(unknown)!r}; it has {', '.join(own) or 'none'}")
    for key, value in chosen.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if ours and parameters[key].annotation is int and not is_count:
            raise Mistake(f"reward_funcs: {name}({key}={value!r}): expected a whole number of at least 1")
    bound = {key: value for key, value in of_the_run.items() if key in parameters} | chosen
    if ours:
        return _bound(reward, bound)
    result = guarded(_bound(reward, bound), name)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [key for key, value in parameters.items() if value.kind in named and value.default is value.empty]
    result.needed = [key for key in needed if key not in bound]
    return result


def check_columns(rewards: Sequence[Reward], columns: Iterable[str]) -> None:
    """Raise Mistake for a reward of the user's own that needs what the trainer will not give it.

    Args:
        rewards: of `get_reward_funcs`.
        columns: of the data.
    """
    given = [*_GIVEN, *(name for name in columns if name != "prompt")]
    for reward in rewards:
        for name in getattr(reward, "needed", ()):
            if name not in given:
                reason = f"{reward.__name__} needs {name}, which is no column of the data"
                raise Mistake(f"reward_funcs: {reason}; it gets {', '.join(given)}")


def told(reward: Reward, **of_the_run: Any) -> Reward:
    """A reward of this module with the values of the run that it needs (see `get_reward_funcs`).

    A reward that has them already, and one of the user's own, are returned unchanged.
    """
    if reward not in reward_funcs_registry.values():
        return reward
    parameters = inspect.signature(reward).parameters
    return _bound(reward, {key: value for key, value in of_the_run.items() if key in parameters})


def _bound(reward: Reward, values: Mapping[str, Any]) -> Reward:
    """The reward with these values of its parameters; it keeps its `__name__`, under which TRL logs it."""
    return functools.update_wrapper(functools.partial(reward, **values), reward) if values else reward


def _split_parameters(text: str) -> tuple[str, dict[str, Any]]:
    """`"short(limit=40)"` as `"short"` and `{"limit": 40}`; values are literals, and nothing is run."""
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text, {}
    try:
        call = ast.parse(f"reward({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or None in [keyword.arg for keyword in call.keywords]:
            raise SyntaxError
        return name.strip(), {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise Mistake(
            f"reward_funcs: {text!r}: parameters of a reward are written as in {name}(limit=40, words=['a', 'b'])"
        ) from error


def guarded(reward: Reward, name: str) -> Reward:
    """A reward of the user's own, checked at every call: an error or a wrong result ends in one line that names it.

    Args:
        reward: asynchronous or not. One of this module is returned unchanged: its errors are bugs, or wrong data.
        name: of the function, `function` or `module:function`.
    """
    if getattr(reward, "__module__", None) == __name__:
        return reward

    def checked(*, completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        with blamed_on("reward_funcs", name):
            rewards = reward(completions=completions, **kwargs)
        return _check_rewards(rewards, name, len(completions), kwargs.get("prompts"))

    async def checked_later(*, completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        with blamed_on("reward_funcs", name):
            rewards = await reward(completions=completions, **kwargs)
        return _check_rewards(rewards, name, len(completions), kwargs.get("prompts"))

    is_asynchronous = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    result = checked_later if is_asynchronous else checked
    result.__name__ = name.rpartition(":")[2]  # TRL logs it under this name
    return result


def _check_rewards(rewards: Any, name: str, count: int, prompts: Sequence[Any] | None) -> list[float | None]:
    """The rewards as floats; None, of a function that has no opinion, stays."""
    expected = f"expected a list of {count}, a finite number (or None) for each completion"
    try:
        if isinstance(rewards, Mapping | Set | str | bytes):  # what their order means is not for us to say
            raise TypeError
        values = list(rewards)
    except TypeError as error:
        raise Mistake(f"reward_funcs: {name} returned {_shortened(rewards)}; {expected}") from error
    if len(values) != count:
        raise Mistake(f"reward_funcs: {name} returned {len(values)} rewards; {expected}")
    for index, value in enumerate(values):
        if value is not None and not _is_reward(value):
            asked = f" (asked {_shortened(completion_text(prompts[index]))})" if prompts else ""
            what = f"{_shortened(value)} for completion {index}{asked}"
            raise Mistake(f"reward_funcs: {name} returned {what}; {expected}")
    return [None if value is None else float(value) for value in values]


def _is_reward(value: Any) -> bool:
    try:
        return not isinstance(value, str) and abs(float(value)) < _LARGEST
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a list, a tensor of several numbers, 10**400
        return False


def _shortened(value: Any) -> str:
    """As Python would write it, in one short line; of a message in parts its texts."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = " ".join(str(part["text"]) for part in value if "text" in part)
    return f"{' '.join(repr(value).split()):.60}"


def unique_names(names: list[str]) -> list[str]:
    """The names, with a number behind one that was there before."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    numbered = zip(names, counts, strict=True)
    return [name if count == 1 else f"{name}_{count}" for name, count in numbered]
