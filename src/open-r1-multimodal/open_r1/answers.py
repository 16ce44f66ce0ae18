r"""The one answer checker. Rewards and evaluation both call it, so both mean the same by "correct".

An answer is read in one of two ways:

- strictly, for rewards: the answer *is* an option, up to case, white space, quotes, brackets, markup, a final
  full stop and the spelling of numbers (3 = 3.0 = three). What only contains an option is wrong, so neither a
  hedge ("left or right") nor a list of letters can win;
- leniently, for evaluating models that were never taught the tag: the answer *names* exactly one option, by
  its letter ("(B)", "B.", "The answer is B") or by its text. Naming two, or hedging about one, is no answer.

Model output is untrusted text: every step is linear in its length or works on a bounded length, nothing is
evaluated, and math-verify sees only short arithmetic that cannot blow up.
"""

import html
import re
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_ANSWER_CHARS = 1_000  # an answer is an option or a number; anything longer is not an answer
MAX_RESPONSE_CHARS = 8_192  # of a longer response, lenient reading sees the end
MAX_EXPRESSION_CHARS = 64
SYMBOLIC_TIMEOUT_S = 1

_OTHER = -1  # in a set of named options: something that is not one clear option was named, too


@dataclass(frozen=True)
class Verdict:
    """What a response was understood to answer, and whether that is right.

    `answer` is the option chosen: its letter, as in `"(B)"`, when the options are lettered, otherwise its
    text; for a question without options, the answer as it stands. None means that no answer could be read.
    """

    answer: str | None
    correct: bool


def extract_answer(text: str) -> str | None:
    """The content of the last closed `<answer>...</answer>` block, stripped; None when there is none.

    Of nested blocks the innermost counts; one that is never closed does not: the model did not finish.
    """
    opening, closing = "<answer>", "</answer>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    return text[start + len(opening) : text.find(closing, start)].strip()


def normalize(text: str) -> str:
    """The form in which two answers are compared, e.g. `' "The Three chairs." '` -> `'3 chairs'`."""
    text = " ".join(_tidy(text).casefold().split())
    bare = text.lstrip(_OPENERS).rstrip(_CLOSERS)
    return _ARTICLE.sub("", bare) or text  # an option may be a lone punctuation mark


def is_correct(
    answer: str | None, gold: str, options: Sequence[str] | None = None, *, lettered: bool | None = None
) -> bool:
    """Whether an extracted answer, read strictly, is the gold answer.

    Args:
        answer: what `extract_answer` returned; None and blank are wrong.
        gold: the right option's text or, when the options are lettered, its letter in any form ("C", "(C)").
        options: the options in the order shown; None or empty for a question without options.
        lettered: whether the model was shown letters. None: yes if `gold` is a letter and no option's text.

    Raises:
        ValueError: when there are options and the gold answer is none of them.
    """
    return _judge(answer, gold, options or (), lettered, lenient=False).correct


def judge(
    response: str,
    gold: str,
    options: Sequence[str] | None = None,
    *,
    lettered: bool | None = None,
    lenient: bool = False,
) -> Verdict:
    """Read the answer out of a whole response and compare it with the gold answer.

    Not lenient, the answer must stand in an `<answer>` block and is read strictly. Lenient, it is read
    leniently from where it most likely stands: the `<answer>` block, closed or not, else what follows
    `</think>`, else the whole response. The other arguments are those of `is_correct`.

    Raises:
        ValueError: when there are options and the gold answer is none of them.
    """
    answer = _likely_answer(response) if lenient else extract_answer(response)
    return _judge(answer, gold, options or (), lettered, lenient)


def _judge(answer: str | None, gold: str, options: Sequence[str], lettered: bool | None, lenient: bool) -> Verdict:
    blank = answer is None or not answer.strip() or (len(answer) > MAX_ANSWER_CHARS and not lenient)
    if not options:
        if blank:
            return Verdict(None, False)
        return Verdict(answer.strip(), normalize(answer) == normalize(gold) or _same_value(gold, answer))

    gold_index, lettered = _gold_option(gold, options, lettered)
    if blank:
        return Verdict(None, False)
    index = (_named_option if lenient else _equal_option)(answer, tuple(options), lettered)
    if index is None and _same_value(options[gold_index], answer):
        index = gold_index
    if index is None:
        return Verdict(None, False)
    label = f"({chr(ord('A') + index)})" if lettered else options[index]
    # By text, not by index: a data set may list the same option twice.
    return Verdict(label, normalize(options[index]) == normalize(options[gold_index]))


def _gold_option(gold: str, options: Sequence[str], lettered: bool | None) -> tuple[int, bool]:
    """The gold option's index, and whether the options are lettered (see `is_correct`)."""
    for letters in (False, True) if lettered is None else (lettered,):
        index = _equal_option(gold, options, letters)
        if index is not None:
            return index, letters
    raise ValueError(f"gold answer {gold!r} is none of the options {list(options)!r}")


def _likely_answer(response: str) -> str:
    """The part of an untidy response that most likely holds the answer; see `judge`."""
    answer = extract_answer(response)
    if answer is None:
        tails = (response.rpartition(tag)[2] for tag in ("<answer>", "</think>") if tag in response)
        answer = next((tail for tail in tails if tail.strip()), response)
    return answer[-MAX_RESPONSE_CHARS:]


# --- text --------------------------------------------------------------------------------------------------

_OPENERS = " \"'([{#$*_`«"
_CLOSERS = " \"')]}$*_`».,;:!?。、"
_LOOK_ALIKES = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EN DASH}": "-",
        "\N{MINUS SIGN}": "-",
        "\N{FRACTION SLASH}": "/",
        "\N{DIVISION SIGN}": "/",
        "\N{MULTIPLICATION SIGN}": "*",
    }
)
_BOX = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_TAG = re.compile(r"<[/!|]?[a-zA-Z][^<>]*>")  # HTML, stray <answer>, special tokens such as <|im_end|>
_EMPHASIS = re.compile(r"(?<!\w)[*_`]+|[*_`]+(?!\w)|(?m:^[ \t]*(?:[-*•]|#+|>)[ \t]+)")
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=[^\W\d_]{2})")  # not "a 3", not "a b": there "a" is a letter

# fmt: off
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_NUMBER_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[-\s](?P<ones>{'|'.join(_UNITS[1:10])}))?"
    rf"|(?P<unit>{'|'.join(_UNITS)}))\b",
    re.IGNORECASE,
)
_NUMERAL = re.compile(
    r"(?<![A-Za-z0-9.])(?<!\d,)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<decimals>\.\d+)?(?![A-Za-z0-9]|[.,]\d)"
)
_BARE_DECIMALS = re.compile(r"(?<![A-Za-z0-9.])\.(?=\d)")


def _plain(text: str) -> str:
    r"""One spelling for characters that look alike (NFKC, quotes, minus), and no `\boxed{}` around them."""
    text = unicodedata.normalize("NFKC", text)[-MAX_RESPONSE_CHARS:]  # NFKC can make a text 18 times longer
    text = text.translate(_LOOK_ALIKES)
    return _BOX.sub(r"\1", _BOX.sub(r"\1", text))  # twice: \boxed{\text{left}}


def _tidy(text: str) -> str:
    """Plain text without markup, numbers in one spelling; keeps case and line breaks."""
    text = html.unescape(_TAG.sub(" ", _plain(text)))
    text = _EMPHASIS.sub("", text.replace("\xa0", " "))
    text = _NUMBER_WORD.sub(_word_to_digits, text)
    return _NUMERAL.sub(_shortest_numeral, _BARE_DECIMALS.sub("0.", text))


def _word_to_digits(match: re.Match[str]) -> str:
    if match["unit"]:
        return str(_UNITS.index(match["unit"].lower()))
    ones = _UNITS.index(match["ones"].lower()) if match["ones"] else 0
    return str(20 + 10 * _TENS.index(match["tens"].lower()) + ones)


def _shortest_numeral(match: re.Match[str]) -> str:
    """`1,000.50` -> `1000.5`, on the characters: a number from a model may have any length."""
    whole = match["whole"].replace(",", "").lstrip("0") or "0"
    return whole + (match["decimals"] or "").rstrip("0").rstrip(".")


# --- strict reading: the answer is an option ---------------------------------------------------------------

_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:my )?(?:(?:final|correct|right|best) )?"
    r"(?:answer|option|choice)(?: is)?(?: option)?[: ]+"
    r"|^(?:正确)?(?:答案|选项|选择|选)(?:是|为)?:? ?"
)
_LETTER = re.compile(r"(?P<letter>[a-z])(?:[)\].:,\s-]+(?P<text>.+))?")


def _equal_option(answer: str, options: Sequence[str], lettered: bool) -> int | None:
    """The index of the option that the answer equals: its text or, if lettered, its letter, or both."""
    texts = [normalize(option) for option in options]
    text = normalize(answer)
    # The answer as it stands comes first, because an option's own text may start with "option".
    for candidate in (text, normalize(_LEAD_IN.sub("", text))):
        found = _LETTER.fullmatch(candidate) if lettered else None
        if found:
            index = ord(found["letter"]) - ord("a")
            if index < len(texts) and (found["text"] is None or normalize(found["text"]) == texts[index]):
                return index
        if candidate in texts:
            return texts.index(candidate)
    return None


# --- lenient reading: the answer names one option ----------------------------------------------------------

# "The answer is ...", up to the end of its sentence or its reason.
_DECLARATION = re.compile(
    r"(?:\b(?i:answer|(?:correct|right|best|final) (?:option|choice))\b[^.?\n]{0,40}?(?:\b(?i:is|be)\b|[:=])"
    r"|答案[^。\n]{0,10}?[是为:])[\s:]*"
    r"(?P<clause>[^\n]*?)(?=[.!?;。](?:\s|$)|\n|$|\b(?i:because|since)\b|因为)"
)
_PRONOUN_ONE = re.compile(
    r"(?i)\b(the|this|that|each|every|which|another|other|no|some|first|second|left|right) one\b|\bone of\b"
)
# Directly around a named option: words that take the naming back or leave it open.
_HEDGE_BEFORE = re.compile(
    r"(?i:(?:\b(?:or|nor|not|never|neither|than|(?:none|all|both|any|either|one|1) of)\b|n't|[/~]|或|不是)"
    r"\s*(?:(?:the|an?|option|choice|in|on|to|at)\s+){0,2}[\"']?)$"
)
_HEDGE_AFTER = re.compile(
    r"[\"']?\s*(?i:(?:or|nor)\b|[/~或]|(?:to|-)\s*\d|is(?:n't| not)\b|is (?:wrong|incorrect|false)\b|不)"
)
_CONTEXT_CHARS = 32


def _named_option(answer: str, options: tuple[str, ...], lettered: bool) -> int | None:
    """The index of the only option that the answer names; a declared answer outweighs the talk around it."""
    text = _tidy(_PRONOUN_ONE.sub(r"\1", answer))
    declared = {match["clause"] for match in _DECLARATION.finditer(text)}
    for clauses in (declared, {text}):
        named = set().union(*(_named_options(clause, options, lettered) for clause in clauses))
        if named:
            return named.pop() if len(named) == 1 and _OTHER not in named else None
    return None


def _named_options(clause: str, options: tuple[str, ...], lettered: bool) -> set[int]:
    """The indices of the options that a clause names, and `_OTHER` if it hedges about one of them."""
    index = _equal_option(clause, options, lettered)
    if index is not None:
        return {index}
    named = set()
    for match in _mention_pattern(options, lettered).finditer(clause):
        before = clause[max(match.start() - _CONTEXT_CHARS, 0) : match.start()]
        hedged = _HEDGE_BEFORE.search(before) or _HEDGE_AFTER.match(clause, match.end())
        if hedged:
            named.add(_OTHER)
        elif match.lastgroup.startswith("text"):
            named.add(int(match.lastgroup.removeprefix("text")))
        else:
            named.add(ord(match[match.lastgroup].upper()) - ord("A"))
    return named


@lru_cache(maxsize=256)
def _mention_pattern(options: tuple[str, ...], lettered: bool) -> re.Pattern[str]:
    """One pattern for every way to name an option: group `textN` is option N's text, `letterN` any letter."""
    texts = [(normalize(option), index) for index, option in enumerate(options)]
    # Longest first, so that "left front" is not read as "left".
    forms = [_text_form(text, index) for text, index in sorted(texts, key=lambda form: -len(form[0])) if text]
    return re.compile("|".join(forms + (_letter_forms(len(options)) if lettered else [])))


def _text_form(text: str, index: int) -> str:
    # ASCII boundaries instead of \b: Chinese text has no spaces between words.
    left, right = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
    if text[0].isdigit():
        left += r"(?<![.,/-])"  # not the 5 of 3.5, of 1,5 or of -5
    if text[-1].isdigit():
        right += r"(?![.,/:-]\d|%)"
    words = r"\s+".join(map(re.escape, text.split()))
    return rf"(?P<text{index}>{left}(?i:{words}){right})"


def _letter_forms(count: int) -> list[str]:
    last = chr(ord("A") + min(count, 26) - 1)
    upper, either_case = f"[A-{last}]", f"[A-{last}a-{last.lower()}]"
    # "A" before a word is the article and "I" the pronoun, unless that word shows that the letter is meant.
    alone = r"(?![A-Za-z0-9'])(?!-\w)"
    no_article = rf"{alone}(?![^\S\n]+(?!(?:is|or|and|because|since)\b)[A-Za-z])"

    def standing_alone(letter: str) -> str:
        return rf"(?:(?![AaIi]){letter}{alone}|{letter}{no_article})"

    return [
        rf"(?<![A-Za-z])[(\[]\s*(?P<letter0>{either_case})\s*[)\]]",
        rf"(?i:\boption|\bchoice|选项|选择|选)\s*(?P<letter1>{standing_alone(either_case)})",
        rf"(?<![A-Za-z0-9])(?P<letter2>{standing_alone(upper)})",
    ]


# --- symbolic equality, the last resort --------------------------------------------------------------------

# Short arithmetic only: numbers, six brackets, one-letter symbols; no words, no two numbers side by side, no
# towers of powers, no factorials. So "3 or 4" never gets here, and no input makes the computer algebra run away.
_EXPRESSION = re.compile(
    r"""(?=[^({]*(?:[({][^({]*){0,6}\Z)
        (?: \d{1,9}(?:\.\d{1,9})?(?!\s*[\d.])
          | (?<!\d)\.\d{1,9}(?!\s*[\d.])
          | (?<![A-Za-z\\])[A-Za-z](?![A-Za-z])
          | \\(?:[dt]?frac|sqrt|pi|times|cdot|div|left|right)(?![A-Za-z])
          | (?<=[A-Za-z0-9])\^(?:\{-?\d{1,2}\}|\d)(?![\d^])
          | \*(?!\*)
          | [-+/(){}\s]
        )+""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def _same_value(gold: str, answer: str) -> bool:
    """Whether math-verify finds two short expressions equal, such as `1/2` and `0.5`."""
    if len(answer) > MAX_EXPRESSION_CHARS or len(gold) > MAX_EXPRESSION_CHARS:
        return False
    gold, answer = (_plain(text).strip(" \n\t$").rstrip(".") for text in (gold, answer))
    if not all(re.search(r"\d", text) and _EXPRESSION.fullmatch(text) for text in (gold, answer)):
        return False
    if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer):
        return False  # normalisation has compared them already

    from math_verify import parse, verify  # imports sympy: a second that plain answers need not wait for

    # Its timeout is a signal, which only the main thread can take; elsewhere the grammar above is the bound.
    timeout = SYMBOLIC_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    gold_value, answer_value = (parse(f"${text}$", parsing_timeout=timeout) for text in (gold, answer))
    return bool(verify(gold_value, answer_value, timeout_seconds=timeout))
