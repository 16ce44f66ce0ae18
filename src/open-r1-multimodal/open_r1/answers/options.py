r"""Finds the one option or number that a passage of a response names, or that nothing can be read.

A question knows what an answer to it looks like. It reads a passage in one of four ways, from strict to lenient: as an
answer and nothing else (`exact`), as a line that begins with one (`stated`), as the clause of a declaration
(`declared`), and as running text (`named`).
"""

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import lru_cache

from open_r1.answers.values import figures, is_blank, is_quantity, normalize, same_value, tidy
from open_r1.base.errors import Mistake

Answer = int | str  # the index of an option; without options, the answer as it stands


class Unread(StrEnum):
    """Why no answer could be read."""

    REFUSED = "refused"  # the response says that it cannot tell, or that no option is right
    SEVERAL = "several named"
    CONFLICT = "letter and text disagree"
    CUT_OFF = "cut off"
    UNREADABLE = "unreadable"


Outcome = Answer | Unread | None  # None: the passage names nothing


def is_answer(outcome: Outcome) -> bool:
    return outcome is not None and not isinstance(outcome, Unread)


def make_question(gold: str, options: Sequence[str] | None, lettered: bool | None) -> "Question":
    if not options:
        return Open(gold)
    for letters in (False, True) if lettered is None else (lettered,):
        choice = Choice(tuple(options), letters)
        index = choice.equal(gold)
        if index is not None:
            choice.gold = index
            return choice
    raise Mistake(f"gold answer {gold!r} is none of the options {list(options)!r}")


DRESS_CHARS = 200  # a text that is longer than every option by more is none of them, whatever its markup
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:my )?(?:(?:final|correct|right|best) )?"
    r"(?:answer|option|choice)(?: is)?(?: option)?[: ]+"
    r"|^(?:正确)?(?:答案|选项|选择|选)(?:是|为)?:? ?"
)
_LETTER = re.compile(r"(?P<letter>[a-z])(?:(?:[)\].:,\s]+(?:-\s+|-(?=\D))?|-\s*)(?P<text>.+))?")  # "b) -5" is minus 5
_SHORTENED = re.compile(r"\s|[,;:(]")  # what may follow on the part of an option's text that stands for it
_LEADING = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:[(\[](?P<bracketed>[A-Za-z])[)\]]|(?P<bare>[A-Z])[).:])[.:]*(?P<rest>.*)"
)
_MORE_LETTERS = re.compile(r"[(\[][A-Z][)\]]|^\s*(?:and\b|or\b|[&,/])\W*[A-Z]\b(?!')")

# What Qwen models that answer in Chinese write.
_TRANSLATED = {"左": "left", "左边": "left", "左侧": "left", "右": "right", "右边": "right", "右侧": "right"}
_TRANSLATED |= {"是": "yes", "是的": "yes", "否": "no", "不是": "no"}

# Directly around a mention: words that take it back, and words that leave it open.
_LINKS = r"\s*(?:(?:the|an?|option|choice|in|on|to|at|be|that of|is|answer)\s+){0,2}[\"'(]?$"
_ASIDE_BEFORE = re.compile(
    r"(?i:(?:\b(?:not|nor|than|never|without|unlike|except(?: for)?|neither|besides|instead of|rather than"
    rf"|opposed to|compared (?:to|with)|none of|no)\b|n't|不是){_LINKS})"
)
_ASIDE_AFTER = re.compile(
    r"[\"')\]]*\s*(?i:(?:is|are|was|does|do|can|could|would)(?:n't| not)\b|cannot\b|fails?\b"
    r"|(?:is|are|was) (?:wrong|incorrect|false|ruled|too)\b|不)"
)
_OPEN_BEFORE = re.compile(rf"(?i:(?:\b(?:or|either|both|any of|all of|one of|1 of)\b|[/~]|或){_LINKS})")
_OPEN_AFTER = re.compile(r"[\"')\]]*\s*(?i:(?:or|nor)\b|[/~或]|(?:to|-)\s*\d)")
_CONTEXT_CHARS = 32

# A reason or a comparison is no answer: what it names is not chosen.
_PREAMBLE = re.compile(
    r"(?i)^\W*(?:while|although|though|whereas|unlike|compared (?:to|with)|if|since|because|given|considering"
    r"|based on)\b[^,]*,\s*(?=\S)"
)
_REASON = re.compile(
    r"(?i)\b(?:whereas|than|compared (?:to|with)|unlike|as opposed to|rather than|instead of|because|since|due to"
    r"|in contrast|as (?:it|both|the|they|this|these|there|its|seen|shown|indicated))\b"
    r"|,? while\b|, (?:but|although|though|given|not)\b|;|因为"
)


class Choice:
    """A question with options."""

    ends_with_answer = False  # a choice may be named first and then defended

    def __init__(self, options: tuple[str, ...], lettered: bool) -> None:
        self.options, self.lettered, self.gold = options, lettered, 0
        self.texts, self.labels = _texts(options), _labels(options)

    def label(self, answer: Answer) -> str:
        """What a verdict calls the answer."""
        return f"({chr(ord('A') + answer)})" if self.lettered else self.options[answer]

    def is_right(self, answer: Answer) -> bool:
        # By text, not by index: a data set may list the same option twice.
        return self.texts[answer] == self.texts[self.gold]

    def exact(self, text: str) -> Outcome:
        """The answer that the text is, read strictly."""
        if is_blank(text):  # an option may be blank; no answer is
            return None
        index = self.equal(text)
        return self.gold if index is None and same_value(self.options[self.gold], text) else index

    def equal(self, text: str) -> int | None:
        """The option that the text equals: its text or, if lettered, its letter, or both."""
        if len(text) > max(map(len, self.options)) + DRESS_CHARS:
            return None
        text = normalize(text)
        led_in = _LEAD_IN.match(text)
        # The text as it stands comes first, because an option's own text may start with "option".
        for candidate in (text, normalize(text[led_in.end() :])) if led_in else (text,):
            match = _LETTER.fullmatch(candidate) if self.lettered else None
            if match:
                index = ord(match["letter"]) - ord("a")
                if index < len(self.texts) and (match["text"] is None or self._stands_for(match["text"], index)):
                    return index
            if candidate in self.texts:
                return self.texts.index(candidate)
        return None

    def _stands_for(self, text: str, index: int) -> bool:
        """Whether a text beside an option's letter is the option's, or the beginning of it and no other's."""
        text, option = normalize(text), self.texts[index]
        begins = option.startswith(text) and _SHORTENED.match(option, len(text)) is not None
        shortened = begins and not text.replace(".", "").isdigit()
        return text == option or bool(text and shortened and text not in self.texts)

    def stated(self, line: str) -> Outcome:
        """The answer that a line begins with or is."""
        index = self.equal(_TRANSLATED.get(line.strip(" .。"), line))
        match = _LEADING.match(line) if self.lettered and index is None else None
        if not match:
            return index
        index, rest = _index(match["bracketed"] or match["bare"]), normalize(match["rest"])
        if _MORE_LETTERS.search(match["rest"]) or _ASIDE_AFTER.match(match["rest"]):
            return None
        if index >= len(self.texts):
            return Unread.CONFLICT if rest else None
        begun = [text for text in self.texts if text and _begins(rest, text)]  # "left, front" begins with "left", too
        return Unread.CONFLICT if begun and self.texts[index] != max(begun, key=len) else index

    def declared(self, clause: str) -> Outcome:
        """The answer in a clause that is said to hold it."""
        return self.named([clause])

    def named(self, passages: Sequence[str]) -> Outcome:
        """The only answer that running text names."""
        letters, texts = set(), set()
        for passage in passages:
            clause = _main_clause(passage)
            stated = self.stated(clause)
            if isinstance(stated, Unread):
                return stated
            if stated is not None:
                texts.add(stated)
                continue
            for start, end, index, is_letter in self._mentions(clause):
                before = clause[max(start - _CONTEXT_CHARS, 0) : start]
                if _ASIDE_BEFORE.search(before) or _ASIDE_AFTER.match(clause, end):
                    continue
                if _OPEN_BEFORE.search(before) or _OPEN_AFTER.match(clause, end):
                    return Unread.SEVERAL
                (letters if is_letter else texts).add(index)
        named = letters | texts
        if len(named) > 1:
            return Unread.CONFLICT if len(letters) == len(texts) == 1 else Unread.SEVERAL
        return named.pop() if named else None

    def _mentions(self, clause: str) -> Iterator[tuple[int, int, int, bool]]:
        """Start, end and option of everything in the clause that names one, and whether by a letter."""
        lowered = clause.lower()
        if len(lowered) != len(clause):  # the lower case of "İ" is two characters
            lowered = "".join(character.lower()[0] for character in clause)
        taken = bytearray(len(clause))
        for text, index in _forms(self.options):
            start = lowered.find(text)
            while start >= 0:
                end = start + len(text)
                if _stands_alone(lowered, start, end) and not any(taken[start:end]):
                    taken[start:end] = b"\1" * len(text)
                    yield start, end, index, False
                start = lowered.find(text, end)
        for match in _LETTERS.finditer(clause) if self.lettered or self.labels else ():
            form = match.lastgroup
            start, letter = match.start(form), match[form].upper()
            if form == "label" or (form == "lone" and letter in self.labels):
                index = self.labels.get(letter)
            else:
                index = _index(letter) if self.lettered else None
            if index is not None and index < len(self.texts) and not taken[start]:
                yield start, match.end(), index, True


@lru_cache(maxsize=256)
def _texts(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(normalize, options))


@lru_cache(maxsize=256)
def _forms(options: tuple[str, ...]) -> list[tuple[str, int]]:
    """The ways to write each option out ("5 cm", "5cm"), the longest first: "left front" is not "left"."""
    forms = {
        (form, index)
        for index, text in enumerate(_texts(options))
        for form in (text, _UNIT_APART.sub(" ", text), _UNIT_APART.sub("", text))
        if len(form) > 1 or not form.isalpha()  # one letter is a label
    }
    return sorted((form for form in forms if form[0]), key=lambda form: (-len(form[0]), form))


_UNIT_APART = re.compile(r"(?<=\d) ?(?=[a-z°])")
_LABELLED = re.compile(r"(?:(?:the )?[A-Za-z]+ )?(?P<label>[A-Z])(?: (?:is|looks|seems|appears|has)\b.*)?$")


@lru_cache(maxsize=256)
def _labels(options: tuple[str, ...]) -> dict[str, int]:
    """Which option has which label in its text ("Point A", "A is closer"), if the labels go from A on."""
    matches = ((_LABELLED.match(tidy(option).strip(" $()")), index) for index, option in enumerate(options))
    labels = {match["label"]: index for match, index in matches if match}
    return labels if len(labels) > 1 and sorted(map(_index, labels)) == list(range(len(labels))) else {}


# "A" before a word is the article and "I" the pronoun, unless that word shows that the letter is meant.
_ALONE = r"(?![A-Za-z0-9'°])(?!-\w)(?!\s*[=^_\\])"  # nor a variable in a formula
_NO_ARTICLE = (
    rf"{_ALONE}(?![^\S\n]+(?!(?:is|or|and|because|since|appears|looks|seems|has|does|fits|matches)\b)[A-Za-z])"
)
_NO_NOUN = (
    r"(?i:(?:is|be|are|was|as|by|to|so|for|with|and|or|nor|not|than|only|but|thus|hence|therefore|answers?|n?either|both"
    r"|choose|chose|select|pick|say|go|letter|options?|choice|because|since)\b)"
)
_LETTERS = re.compile(
    r"(?<![A-Za-z])[(\[]\s*(?P<bracketed>[A-Za-z])\s*[)\]]|(?<!\w)([\"'])(?P<quoted>[A-Z])[.,]?\2"
    rf"|(?i:\boptions?|\bchoice|选项|选择|选)\s*(?P<option>(?![AaIi])[A-Za-z]{_ALONE}|[AaIi]{_NO_ARTICLE})"
    rf"|\b(?!{_NO_NOUN})[A-Za-z]{{2,}}\s+(?P<label>[A-Z]){_ALONE}"  # of something else: "point A"
    rf"|(?<![A-Za-z0-9°])(?P<lone>(?![AI])[A-Z]{_ALONE}|[AI]{_NO_ARTICLE})"
)
# A right angle, "all right", "right now": no direction. "All right of the table" is one.
_NO_SIDE = re.compile(r"[- ](?:angle[sd]?|triangles?|now|away)\b")
# Two choices, two different instances: a number of what is spoken of, and not of what is seen.
_OF_THE_QUESTION = re.compile(
    r" (?:(?:different|possible|other) )?(?:choices|options|possibilities)\b| different instances\b"
)
_BARE_INTERJECTION = re.compile(r"\s*(?:$|[^\w\s]|\b(?:because|since)\b)")


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _begins(text: str, beginning: str) -> bool:
    return text.startswith(beginning) and _stands_alone(text, 0, len(beginning))


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is a whole word or number. ASCII only: Chinese has no spaces between words."""
    before, after = text[max(start - 1, 0) : start], text[end : end + 1]
    if (before.isascii() and before.isalnum()) or (after.isascii() and after.isalnum()):
        return False
    if text[start].isdigit() and before and before in ".,/-":
        return False  # not the 5 of 3.5, of 1,5 or of -5
    if text[end - 1].isdigit() and (after == "%" or (after and after in ".,/:-" and text[end + 1 : end + 2].isdigit())):
        return False
    if text.endswith("right", start, end):
        is_all_right = text.endswith("all ", 0, start) and not text.startswith(" of", end)
        if is_all_right or _NO_SIDE.match(text, end):
            return False
    if text[end - 1].isdigit() and _OF_THE_QUESTION.match(text, end):
        return False
    # "no" is an answer, "no doubt" is none
    return text[start:end] not in ("yes", "no") or _BARE_INTERJECTION.match(text, end) is not None


def _main_clause(passage: str) -> str:
    passage = _PREAMBLE.sub("", passage)
    match = _REASON.search(passage)
    return passage[: match.start()] if match and match.start() > 0 else passage


# "B", "(B)" as a gold answer; "B. left", "Option B" as an answer.
_GOLD_LETTER = re.compile(r"[(\[]?([A-Z])[)\].]?")
_LETTERED = re.compile(r"(?i:option |choice )?[(\[]?(?P<letter>[A-Z])(?:[)\].:]+|$)(?P<rest>.*)")
_LONE_CAPITAL = re.compile(r"(?<![\w'])[A-Z](?![\w'])")

_IS = re.compile(r"=|≈|\b(?:is|are|was|be|equals)\b")
_SURROUNDINGS = " \t.,:;$*"


class Open:
    """A question without options; its methods are those of `Choice`."""

    ends_with_answer = True  # a computation starts from what is given

    def __init__(self, gold: str) -> None:
        self.gold = gold

    def label(self, answer: Answer) -> str:
        return str(answer)

    def is_right(self, answer: Answer) -> bool:
        is_equal = normalize(answer) == normalize(self.gold) or same_value(self.gold, answer)
        return is_equal or self._has_its_letter(answer)

    def _has_its_letter(self, answer: str) -> bool:
        """Whether the gold answer is the letter of an option that only the question lists, and the answer has it first.

        Another letter behind it is a hedge.
        """
        gold, match = _GOLD_LETTER.fullmatch(self.gold.strip()), _LETTERED.fullmatch(tidy(answer).strip())
        is_same = gold is not None and match is not None and gold[1] == match["letter"]
        return is_same and not _LONE_CAPITAL.search(match["rest"])

    def exact(self, text: str) -> Outcome:
        return None if is_blank(text) else text.strip()

    def stated(self, line: str) -> Outcome:
        value = line.rpartition("=")[2].strip(_SURROUNDINGS)
        return value if is_quantity(value) else None

    def declared(self, clause: str) -> Outcome:
        figure = self.named([clause])
        return figure if figure is not None else clause.strip(_SURROUNDINGS) or None

    def named(self, passages: Sequence[str]) -> Outcome:
        named: dict[str, None] = {}
        for passage in passages:
            passage = _main_clause(passage)
            *_, last = [0, *(match.end() for match in _IS.finditer(passage))]
            for part in (passage[last:], passage):
                if (value := self.stated(part)) is not None:
                    named[value] = None
                    break
                if numbers := figures(part):
                    named |= numbers
                    break
        if len(named) > 1:
            return Unread.SEVERAL
        return next(iter(named), None)


Question = Choice | Open
