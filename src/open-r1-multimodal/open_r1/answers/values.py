r"""Decides whether two answers are equal: spelling, numbers, units, and as a last resort symbolic equality.

Model output is untrusted text: every step is linear in its length or works on a bounded length, nothing is
evaluated, and math-verify sees only short arithmetic that cannot blow up.
"""

import cmath
import html
import math
import re
import threading
import unicodedata
from typing import Any

from open_r1.answers.latex import undressed

MAX_TEXT_CHARS = 8_192  # of a longer text, the end counts
MAX_EXPRESSION_CHARS = 64
MAX_DRESSED_CHARS = 1_000  # of an expression with the LaTeX around it
PARSING_TIMEOUT_S = 1
RELATIVE_TOLERANCE = 1e-7  # of 1.3333333 to 4/3
ROUNDING = 1e-15  # what may be left of 1 - 1
_COMMA = re.compile(" ?, ?")
_ASSIGNED = re.compile(r"^[A-Za-z]{1,2} ?= ?(?=[^=]*$)")  # "x = 5", "AB = 5"; not "x = 5 or x = 3"


def normalize(text: str) -> str:
    """The form in which two answers are compared, e.g. `' "The Three chairs." '` -> `'3 chairs'`."""
    text = " ".join(tidy(text).casefold().split())
    bare = text.lstrip(_OPENERS).rstrip(_CLOSERS)
    return _ARTICLE.sub("", bare) or text  # an option may be a lone punctuation mark


def same_value(gold: str, answer: str) -> bool:
    """Whether two short expressions are equal, such as `1/2` and `0.5`, or `9πcm^{2}` and `9pi`.

    A unit that only one of them names is left out of it; two different units differ. Spaces beside commas, as in a
    point or a list, do not count. An answer may say what it is the value of (`x = 5`), as in the MATH data set.
    """
    if _COMMA.sub(",", normalize(gold)) == _COMMA.sub(",", normalize(answer)):
        return True
    if "=" not in gold:
        answer = _ASSIGNED.sub("", answer.strip(" $"))
    (gold, gold_unit), (answer, answer_unit) = _quantity(gold), _quantity(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    if not (_is_expression(gold) and _is_expression(answer)):
        return False
    if normalize(gold) == normalize(answer):  # without their units
        return True
    if _NUMBER.fullmatch(gold) and _NUMBER.fullmatch(answer):
        return False

    from math_verify import parse  # imports sympy: a second that plain answers need not wait for

    # Its timeout is a signal, which only the main thread can take; elsewhere the grammar below is the bound.
    timeout = PARSING_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(f"${text}$", parsing_timeout=timeout) for text in (gold, answer)]
    at_points = [_evaluate(expressions) for expressions in parsed]
    return all(at_points) and all(
        cmath.isclose(value, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=ROUNDING)
        for value, other in zip(*at_points, strict=True)
    )


def _evaluate(parsed: list[Any]) -> list[complex]:
    """An expression's value with its letters at two points in general position; empty when it has none there.

    To simplify the difference of two symbolically could take seconds.
    """
    if not parsed or not hasattr(parsed[0], "evalf"):
        return []
    values = []
    for seed in (1.2345, 0.6789):
        point = {letter: math.sqrt(seed + ord(letter.name[0])) for letter in parsed[0].free_symbols}
        values.append(parsed[0].evalf(subs=point))
    has_values = all(value.is_number and value.is_finite for value in values)
    return [complex(value) for value in values] if has_values else []


def is_quantity(text: str) -> bool:
    """Whether a text is a number or short arithmetic, with or without a unit, and nothing else."""
    return _is_expression(_quantity(text)[0])


_FIGURE = re.compile(r"(?<![\w.,])[-+]?\d+(?:,\d+)*(?:\.\d+)?(?:/\d+)?")


def figures(text: str) -> dict[str, None]:
    """The numbers in a text, as they are written, each once and in order."""
    return dict.fromkeys(_FIGURE.findall(text))


def only_number(text: str) -> float | None:
    """The one number in a text, in figures or words and without its unit: `about 3.5 m²` -> 3.5; None of several."""
    text = tidy(text)
    found = list(figures(_quantity(text)[0] or text))
    try:
        return float(found[0]) if len(found) == 1 else None
    except ValueError:  # a fraction, or 1,5, which may be one and a half
        return None


# --- spelling -----------------------------------------------------------------------------------------------

_OPENERS = " \"'([{#$*_`«"
_CLOSERS = " \"')]}$*_`».,;:!?。、"
_LOOK_ALIKES = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{HYPHEN}": "-",
        "\N{EN DASH}": "-",
        "\N{MINUS SIGN}": "-",
        "\N{FRACTION SLASH}": "/",
        "\N{DIVISION SIGN}": "/",
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{ARABIC DECIMAL SEPARATOR}": ".",
        "\N{ARABIC THOUSANDS SEPARATOR}": ",",
        "\N{ARABIC PERCENT SIGN}": "%",
        "\N{COMBINING ENCLOSING KEYCAP}": "",
    }
)
_TAG = re.compile(r"<[/!|]?[a-zA-Z][^<>]*>")  # HTML, stray <answer>, special tokens such as <|im_end|>
_EMPHASIS = re.compile(r"(?<!\w)[*_`]+|[*_`]+(?!\w)|(?m:^[ \t]*(?:[-*•]|#+|>)[ \t]+)")
# Not "a 3" and not "a b", where "a" is a letter, nor "A is closer", where it is a name.
_ARTICLE = re.compile(r"^(?:the|an?(?!\s+(?:is|and|or|has|looks|seems|appears)\b))\s+(?=[^\W\d_]{2})")

# fmt: off
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_NUMBER_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[-\s](?P<ones>{'|'.join(_ONES[1:10])}))?"
    rf"|(?P<unit>{'|'.join(_ONES)}))\b",
    re.IGNORECASE,
)
_NUMERAL = re.compile(
    r"(?<![A-Za-z0-9.])(?<!\d,)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<decimals>\.\d+)?(?![A-Za-z0-9]|[.,]\d)"
)
_BARE_DECIMALS = re.compile(r"(?<![A-Za-z0-9.])\.(?=\d)")


# NFKC alone would make 11/2 of "1½", and 103 of ten to the third; what it makes of a unit's power, "cm2", is read.
_MIXED = re.compile(r"(?<!\d)(\d{1,18})([\u00bc-\u00be\u2150-\u215e])")
_POWER = re.compile(r"(?:(?<=\d)|(?<=\b[A-Za-z]))[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,9}")


def plain(text: str) -> str:
    """One spelling for what looks alike (NFKC, digits, quotes, minus), without unseen characters and LaTeX's dress."""
    text = _POWER.sub(r"^{\g<0>}", _MIXED.sub(r"(\1+\2)", seen(text)[-MAX_TEXT_CHARS:]))
    text = unicodedata.normalize("NFKC", text)[-MAX_TEXT_CHARS:]  # which can make a text 18 times longer
    text = text.translate(_LOOK_ALIKES)
    return undressed(text)


def tidy(text: str) -> str:
    """Plain text without markup, numbers in one spelling; keeps case and line breaks."""
    text = _TAG.sub(" ", plain(text))
    if "&" in text:
        text = plain(html.unescape(text))  # "&lrm;", "&nbsp;", "&frac12;"
    text = _EMPHASIS.sub("", text)
    text = _NUMBER_WORD.sub(_word_to_digits, text)
    return _NUMERAL.sub(_shortest_numeral, _BARE_DECIMALS.sub("0.", text))


def _word_to_digits(match: re.Match[str]) -> str:
    if match["unit"]:
        return str(_ONES.index(match["unit"].lower()))
    ones = _ONES.index(match["ones"].lower()) if match["ones"] else 0
    return str(20 + 10 * _TENS.index(match["tens"].lower()) + ones)


def _shortest_numeral(match: re.Match[str]) -> str:
    """`1,000.50` -> `1000.5`, on the characters: a number from a model may have any length."""
    whole = match["whole"].replace(",", "").lstrip("0") or "0"
    return whole + (match["decimals"] or "").rstrip("0").rstrip(".")


# --- characters that nobody sees ----------------------------------------------------------------------------

_UNSEEN = re.compile("VARIATION SELECTOR|FILLER|GRAPHEME JOINER|VOWEL INHERENT|PATTERN BLANK")  # in Unicode's names
_REGION = re.compile("(?<=\N{WAVING BLACK FLAG})[\N{TAG DIGIT ZERO}-\N{TAG LATIN SMALL LETTER Z}]{1,6}")


class _Seen(dict[int, str]):
    """For `str.translate`, by Unicode's categories: 0 to 9 for a digit of any script, nothing for what nobody sees."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        is_control = category == "Cc" and not character.isspace()
        if category == "Nd":
            seen = str(unicodedata.digit(character))
        elif category == "Cf" or is_control or _UNSEEN.search(unicodedata.name(character, "")):
            seen = ""
        else:
            seen = character
        self[code] = seen
        return seen


_SEEN = _Seen()


def seen(text: str) -> str:
    """The text as a reader sees it: no direction marks, joiners, soft hyphens or variation selectors; plain digits."""
    # The unseen letters behind a black flag say whose it is: England's is not Scotland's.
    text = _REGION.sub(lambda match: match[0].translate({ord(tag): ord(tag) - 0xE0000 for tag in match[0]}), text)
    return text.translate(_SEEN)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in a text."""
    return not seen(text).strip()


# --- quantities ---------------------------------------------------------------------------------------------

# The unit as we write it -> how others write it, behind a number and in front of an exponent.
_UNITS = {
    "°": r"°|∘|\^\s*\{?\s*(?:\\circ|∘)\s*\}?|\\degree|degrees?|度",
    "mm": r"mm|毫米|millimet(?:er|re)s?",
    "cm": r"cm|厘米|centimet(?:er|re)s?",
    "dm": r"dm|分米",
    "km": r"km|千米|公里|kilomet(?:er|re)s?",
    "m": r"m|米|met(?:er|re)s?",
    "inch": r"inch(?:es)?",
    "ft": r"ft|feet|foot",
    "mile": r"miles?",
    "kg": r"kg|千克|公斤|kilograms?",
    "g": r"g|克|grams?",
    "h": r"h|小时|hours?",
    "min": r"min|分钟|minutes?",
    "s": r"s|秒|seconds?",
    "%": r"\\?%|percent",
    "$": r"dollars?|元",
}
_UNIT = re.compile(
    r"(?<=[\d\s})πi])[\s~]*(?:"
    + "|".join(rf"(?P<u{number}>{forms})" for number, forms in enumerate(_UNITS.values()))
    + r")\s*(?P<power>\^?\{?[23]\}?)?[\s.]*$"
)
_ROOT = re.compile(r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\{(?P<braces>[^{}]*)\}|\((?P<parens>[^()]*)\)|(?P<bare>\d+|[a-z]))")
_PI = re.compile(r"π|(?<![\\A-Za-z])pi(?![A-Za-z])")


def _quantity(text: str) -> tuple[str, str]:
    r"""A short expression's value in LaTeX and its unit, if it has one: `2√{3}cm²` -> `2\sqrt{3}`, `cm2`.

    Both are empty for a text that is no short one.
    """
    text = plain(text).strip(" \n\t$").rstrip(".") if len(text) <= MAX_DRESSED_CHARS else ""
    if len(text) > MAX_EXPRESSION_CHARS:
        return "", ""
    text = _PI.sub(r"\\pi", _ROOT.sub(lambda match: rf"\sqrt{{{match[match.lastgroup]}}}", text))
    match = _UNIT.search(text)
    if not match:
        return text, ""
    number = next(number for number in range(len(_UNITS)) if match[f"u{number}"])
    return text[: match.start()].rstrip(" $~"), list(_UNITS)[number] + (match["power"] or "").strip("^{}")


# Short arithmetic only: numbers, six brackets, one-letter symbols; no words, no two numbers side by side, no
# towers of powers, no factorials. So "3 or 4" never gets here, and no input makes the computer algebra run away.
_EXPRESSION = re.compile(
    r"""(?=[^({]*(?:[({][^({]*){0,6}\Z)
        (?: \d{1,9}(?:\.\d{1,18})?(?!\s*[\d.])
          | (?<!\d)\.\d{1,18}(?!\s*[\d.])
          | (?<![A-Za-z\\])[A-Za-z](?![A-Za-z])
          | \\(?:[dt]?frac|sqrt|pi|times|cdot|div|left|right)(?![A-Za-z])
          | (?<=[A-Za-z0-9])\^(?:\{-?\d{1,2}\}|\d)(?![\d^])
          | \*(?!\*)
          | [-+/(){}\s]
        )+""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def _is_expression(text: str) -> bool:
    return re.search(r"\d|\\pi", text) is not None and _EXPRESSION.fullmatch(text) is not None
