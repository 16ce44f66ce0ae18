r"""Removes LaTeX that only formats an answer, as `\fbox{\textit{left}}` does, and keeps LaTeX that has a meaning.

Every step is linear in the length of a text.
"""

import re

_WORD_WITHIN_CHARS = 200  # where an argument is searched for a word

# Fonts, sizes and boxes, by the names that LaTeX and its packages give them; with an argument or for what follows.
_LOOK = (
    r"text(?!su[bp]erscript)[a-z]+|math[a-z]+|[a-z]*style|[a-z]{2}(?:series|shape|family)|bf|it|rm|sf|tt|sc|sl|em|cal"
    r"|tiny|small|normalsize|[a-z]*notesize|scriptsize|[Ll]arge|LARGE|[Hh]uge"
)
_DRESS = re.compile(
    rf"{_LOOK}|text|[a-z]*box(?:ed)?|emph|strong|[a-z]*underline|u+line|uwave|hl|bm|pmb|bold[a-z]*|operatorname|ensuremath"
)
# Whatever else has words for its argument dresses them, too, unless it is a number, a mark with a meaning, a denial,
# or strikes or hides them. Around figures, which any symbol may stand before (\pm{3}), nothing else is a dress.
_MEANS = re.compile(
    r"[a-z]*frac|[a-z]*binom|[a-z]*root|sqrt|[a-z]*(?:sin|cos|tan|cot|sec|csc)h?|l[no]g?|exp|[a-z]*mod|gcd|lcm|max|min"
    r"|over[a-z]*|wide[a-z]+|underset|stackrel|hat|bar|d*ot|tilde|check|breve|vec|text[a-z]*script"
    r"|not|neg|lnot|[a-z]*cancel[a-z]*|[a-z]out|st|strike[a-z]*|[a-z]?phantom"
    r"|begin|end|ref|cite|footnote|href|url|includegraphics"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}|[^\W\d_A-Za-z]")

_BRACE = re.compile(r"(?<!\\)(?:\\+(?P<command>[A-Za-z]+)\*?\s*(?:\[[^\[\]{}]{0,40}\]\s*){0,2})?\{|(?<!\\)\}")
_SWITCH = re.compile(rf"\\(?:{_LOOK})(?![A-Za-z])(?!\s*\{{)")
_COLOUR = re.compile(r"\\color\s*\{[^{}]*\}")
_COLOURED = re.compile(r"\\[a-z]*color(?:box)?(?:\s*\{[^{}]*\}(?=\s*\{)){1,2}")
_TERMINATED = re.compile(r"(\\[A-Za-z]+)(?:\s*\{\s*\}|(?=\\))")  # \pi{} and \pi\text{cm}
_BRACKET_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)\s*(?=[()\[\]|]|\\[{}])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3}(?!\d))")
# Around formulas, between words and lines, and what is printed elsewhere.
_GAP = re.compile(
    r"\\(?:[()\[\] ,;:!]|\\(?![A-Za-z\\])|(?:q?quad|enspace|thinspace|newline)(?![A-Za-z])"
    r"|(?:[hv]space|tag|label)\*?\s*\{[^{}]*\})"
)
_ESCAPED = re.compile(r"\\([%$#&_])")


def braces(text: str) -> list[tuple[re.Match[str], re.Match[str]]]:
    """The pairs of braces in a text, in order of the closing ones.

    The match of an opening brace begins where its command does, and has the command's name as its group `command`.
    """
    openings: list[re.Match[str]] = []
    pairs = []
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            openings.append(brace)
        elif openings:
            pairs.append((openings.pop(), brace))
    return pairs


def undressed(text: str) -> str:
    r"""The text without what changes no more than its look: `$\fbox{\textit{left }}$` -> `$left $`."""
    if "\\" not in text and "{," not in text:
        return text
    text = _BRACKET_SIZE.sub("", _THOUSANDS.sub(",", text))
    text = _COLOURED.sub(r"\\text", _COLOUR.sub("", text))
    text = _TERMINATED.sub(r"\1 ", _GAP.sub(" ", _SWITCH.sub("", text)))
    kept, end = [], 0
    for start, stop in sorted(brace.span() for pair in braces(text) if _is_dress(*pair) for brace in pair):
        kept.append(text[end:start])
        end = stop
    return _ESCAPED.sub(r"\1", "".join([*kept, text[end:]]))


def _is_dress(opening: re.Match[str], closing: re.Match[str]) -> bool:
    command, start = opening["command"], opening.end()
    if command is None or _DRESS.fullmatch(command):
        return command is not None
    within = min(closing.start(), start + _WORD_WITHIN_CHARS)
    return _MEANS.fullmatch(command) is None and _WORD.search(opening.string, start, within) is not None
