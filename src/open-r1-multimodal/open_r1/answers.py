r"""The one answer checker. Rewards and evaluation both call it, so both mean the same by "correct".

An answer is read in one of two ways:

- strictly, for rewards: the answer *is* an option, up to case, white space, quotes, brackets, markup, a final
  full stop and the spelling of numbers (3 = 3.0 = three). What only contains an option is wrong, so neither a
  hedge ("left or right") nor a list of letters can win;
- leniently, for evaluating models that were never taught the tag: the rules of `EVIDENCE` look for the place
  where the response commits itself, and there it must name exactly one option, by its letter ("(B)", "B.",
  "The answer is B") or by its text. Naming two, or hedging about one, is no answer; `Unread` says what it is.

Model output is untrusted text: every step is linear in its length or works on a bounded length.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Protocol

from open_r1.values import MAX_TEXT_CHARS, is_quantity, normalize, same_value, tidy

MAX_ANSWER_CHARS = 1_000  # an answer is an option or a number; anything longer is not an answer


class Unread(str, Enum):
    """Why no answer could be read."""

    REFUSED = "refused"  # the response says that it cannot tell, or that no option is right
    SEVERAL = "several named"
    CONFLICT = "letter and text disagree"
    CUT_OFF = "cut off"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Verdict:
    """What a response was understood to answer, and whether that is right.

    `answer` is the option chosen: its letter, as in `"(B)"`, when the options are lettered, otherwise its
    text; for a question without options, the answer as it stands. None means that no answer could be read.
    `reading` is the rule of `EVIDENCE` that decided or, without an answer, the value of an `Unread`.
    """

    answer: str | None
    correct: bool
    reading: str = field(default="", compare=False)  # how the verdict came about is not what it says


def extract_answer(text: str) -> str | None:
    """The content of the last closed `<answer>...</answer>` block, stripped; None when there is none.

    Of nested blocks the innermost counts; one that is never closed does not: the model did not finish.
    """
    opening, closing = "<answer>", "</answer>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    return text[start + len(opening) : text.find(closing, start)].strip()


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
    question = _question(gold, options, lettered)
    return question.verdict(*_read_strictly(answer, question)).correct


def judge(
    response: str,
    gold: str,
    options: Sequence[str] | None = None,
    *,
    lettered: bool | None = None,
    lenient: bool = False,
) -> Verdict:
    """Read the answer out of a whole response and compare it with the gold answer.

    Not lenient, the answer must stand in an `<answer>` block and is read strictly. Lenient, the first rule of
    `EVIDENCE` that finds something decides. The other arguments are those of `is_correct`.

    Raises:
        ValueError: when there are options and the gold answer is none of them.
    """
    question = _question(gold, options, lettered)
    if lenient:
        return question.verdict(*_read(response, question))
    return question.verdict(*_read_strictly(extract_answer(response), question))


# --- the order of evidence ----------------------------------------------------------------------------------

Answer = int | str  # the index of an option; without options, the answer as it stands
Outcome = Answer | Unread | None  # None: nothing here, the next rule may find more


def _tag(text: "_Text", question: "_Question") -> Outcome:
    content = extract_answer(text.response)
    if content is None:
        return None
    answer = question.exact(content)
    if answer is None:
        answer, reading = _read(content, question)
        return Unread(reading) if answer is None else answer
    return answer


def _box(text: "_Text", question: "_Question") -> Outcome:
    for content in reversed(_BOX.findall(text.body)[-MAX_BOXES:]):
        for outcome in (question.stated(tidy(content)), question.exact(content)):
            if outcome is not None and not isinstance(outcome, Unread):
                return outcome
    return None


def _declaration(text: "_Text", question: "_Question") -> Outcome:
    """The last declaration, since it corrects the earlier ones; not if it repeats the words of the one before."""
    said = [(place, outcome) for place in _said(text) if (outcome := _declared(place.clause, question)) is not None]
    for (before, first), (after, second) in pairwise(said):
        again = after.sentence == before.sentence + 1 and after.lead == before.lead
        if again and second != first and not isinstance(first, Unread):
            # Line after line of answers: the model runs on, to questions that nobody asked.
            return first if after.line > before.line else Unread.SEVERAL
    if said:
        return said[-1][1]
    announced = (question.stated(line) for line in reversed(list(_announced(text))))
    weaker = (question.named([clause]) for clause in reversed([*_praised(text), *_chosen(text)]))
    return _answer_only(chain(announced, weaker))


def _declared(clause: str, question: "_Question") -> Outcome:
    if _DENIAL.match(clause) and question.stated(clause) is None:
        return Unread.REFUSED
    return question.declared(clause)


def _first_line(text: "_Text", question: "_Question") -> Outcome:
    if not text.lines or _is_list(text.lines[:2]):
        return None
    return _answer_only(question.stated(line) for line in (text.lines[0], text.sentences[0].text))


def _last_line(text: "_Text", question: "_Question") -> Outcome:
    if len(text.lines) < 2 or _is_list(text.lines[-2:]):
        return None
    return _answer_only([question.stated(text.lines[-1])])


def _refusal(text: "_Text", question: "_Question") -> Outcome:
    ends = [sentence.text for sentence in (*text.sentences[:2], *text.sentences[-1:])]
    return Unread.REFUSED if any(map(_REFUSAL.search, ends)) else None


def _conclusion(text: "_Text", question: "_Question") -> Outcome:
    concluding = [sentence.text for sentence in text.sentences if _THEREFORE.match(sentence.text)]
    return _answer_only(question.named([sentence]) for sentence in concluding[-1:])


def _opening(text: "_Text", question: "_Question") -> Outcome:
    if question.ends_with_answer or not text.lines or _is_list(text.lines[:2]):
        return None
    if _DESCRIBES.search(text.sentences[0].text) or text.sentences[0].text.startswith("To "):
        return None
    return _answer_only([question.named([text.sentences[0].text])])


def _closing(text: "_Text", question: "_Question") -> Outcome:
    if not text.lines or _is_list(text.lines[-2:]):
        return None
    return _answer_only([question.named([text.sentences[-1].text])])


def _whole_text(text: "_Text", question: "_Question") -> Outcome:
    return question.named([sentence.text for sentence in text.sentences])


# The first rule that finds something decides, even if what it finds cannot be read.
EVIDENCE: dict[str, Callable[["_Text", "_Question"], Outcome]] = {
    "tag": _tag,  # <answer>B</answer>, the last one that is closed
    "box": _box,  # \boxed{B}, the last one
    "declaration": _declaration,  # the answer is B | I would choose B | B is correct; the last one corrects
    "first line": _first_line,  # (B) left. Because ...
    "last line": _last_line,  # ... In short:  (B) left
    "refusal": _refusal,  # it is not possible to tell
    "conclusion": _conclusion,  # Therefore, the lamp is at B.
    "opening": _opening,  # B fits best. A, on the other hand, ...
    "closing": _closing,  # ... so much for A. Only B has a lamp.
    "whole text": _whole_text,  # names no other option than B
}


def _read(response: str, question: "_Question") -> tuple[Answer | None, str]:
    """The answer, and the rule that found it; or None, and why."""
    text = _Text(response)
    for part in (text.before_next_question(), text):
        for rule, find in EVIDENCE.items() if part else ():
            outcome = find(part, question)
            if isinstance(outcome, Unread):
                reason = outcome
                break
            if outcome is not None:
                return outcome, rule
        else:
            reason = Unread.CUT_OFF if text.is_cut_off else Unread.UNREADABLE
    return None, reason.value


def _read_strictly(answer: str | None, question: "_Question") -> tuple[Answer | None, str]:
    """The answer if the text is one, and nothing else."""
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return None, Unread.UNREADABLE.value
    found = question.exact(answer)
    if found is not None:
        return found, "tag"
    outcome = question.named([answer])
    return None, (outcome if isinstance(outcome, Unread) else Unread.UNREADABLE).value


def _answer_only(outcomes: Iterable[Outcome]) -> Outcome:
    """The first answer; what is no answer is left to later rules."""
    return next((found for found in outcomes if found is not None and not isinstance(found, Unread)), None)


# --- a response, and where in it an answer is declared --------------------------------------------------------

MAX_BOXES = 4
MAX_SENTENCE_CHARS = 1_000  # of a longer one, the end counts
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]{0,99}\}){0,99}\}){0,200})\}")
# "one" as a pronoun is no number
_PRONOUN_ONE = re.compile(
    r"(?i)\b(the|this|that|each|every|which|another|other|no|some|first|second|left|right) one\b|\bone of\b"
)
_NEXT_QUESTION = re.compile(r"(?<=\S)\s*\n\s*\**(?:Question|Q|User|Human|问题)\b[ \d]*\**:")
# After a full stop; but not after that of "B. left", at the start of a line, or of "3.5".
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!^[A-Za-z]\.)(?<!\b[ei]\.[ge]\.)[\"')\]]?\s+|(?<=[。!?])")
_LIST_ITEM = re.compile(r"[(\[]?(?P<letter>[A-Za-z])[)\].:]+\s*\S")
_SENTENCE_PUNCTUATION = tuple(".!?。:)]}>$\"'*|")
LONG_RESPONSE_CHARS = 300


@dataclass(frozen=True)
class _Sentence:
    text: str
    line: int


class _Text:
    """A response in the parts that the rules look at."""

    def __init__(self, response: str) -> None:
        self.response = response

    @cached_property
    def body(self) -> str:
        """What follows an open `<answer>`, or else `</think>`, or else everything; at most its end."""
        tails = (self.response.rpartition(tag)[2] for tag in ("<answer>", "</think>") if tag in self.response)
        return next((tail for tail in tails if tail.strip()), self.response)[-MAX_TEXT_CHARS:]

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without markup."""
        lines = tidy(_PRONOUN_ONE.sub(r"\1", self.body)).splitlines()
        return [" ".join(line.split()) for line in lines if line.strip(" \t$*_`-=#|\\")]

    @cached_property
    def sentences(self) -> list[_Sentence]:
        return [
            _Sentence(sentence[-MAX_SENTENCE_CHARS:], number)
            for number, line in enumerate(self.lines)
            for sentence in _SENTENCE_END.split(line)
            if sentence.strip()
        ]

    @cached_property
    def is_cut_off(self) -> bool:
        """Whether a tag or a long text ends in the middle."""
        end = self.response.rstrip()
        unclosed = any(end.rfind(f"<{tag}>") > end.rfind(f"</{tag}>") for tag in ("think", "answer"))
        return unclosed or (len(end) > LONG_RESPONSE_CHARS and not end.endswith(_SENTENCE_PUNCTUATION))

    def before_next_question(self) -> "_Text | None":
        """What a model wrote before it ran on and asked itself another question."""
        following = _NEXT_QUESTION.search(self.response)
        return _Text(self.response[: following.start()]) if following else None


def _is_list(lines: Sequence[str]) -> bool:
    """Whether two lines are the items of two different letters."""
    letters = [found["letter"] for line in lines if (found := _LIST_ITEM.match(line))]
    return len(letters) == 2 and letters[0] != letters[1]


# "The answer is", "the best option would be", "答案为"; what follows is the clause.
_SAID = re.compile(
    r"(?:(?i:\banswers?\b(?!\s+(?:choices?|options?|keys?|the|this|your)\b)"
    r"|\b(?:correct|right|best|final|closest|appropriate|likely|suitable|accurate)\s+"
    r"(?:\w+\s+)?(?:option|choice|match|selection|candidate)s?\b)"
    r"[^?\n]{0,80}?(?:\b(?i:is|are|be|was)\b|[:=])"
    r"|(?:答案|选项|选择|应选|故选)[^。\n]{0,10}?[是为:选])[\s:*\"']*"
)
# "I would choose", "we conclude that"; what follows is the clause.
_CHOSEN = re.compile(
    r"(?i)\b(?:I|we)(?:'d|'ll)?"
    r"(?: (?:would|will|must|might|can|could|should|had|have|to|also|therefore|thus|then)\b){0,3}"
    r" (?:choose|select|pick|go with|say|opt for|lean towards?|conclude|believe|think|guess|determine)\b(?: that\b)?"
)
# "is the correct option", "appears to be most similar"; what stands before is the clause.
_PRAISED = re.compile(
    r"(?i:\b(?:is|are|seems?|appears?|be)\b(?: (?:to be|likely|therefore|thus|indeed|actually|probably)\b){0,2}"
    r"(?: (?:the|my|a|our)\b)?"
    r" (?:most|best|correct|right|final|answer|closest|nearest|more (?:likely|similar|appropriate|suitable|accurate)"
    r"|only (?:correct|right|option|choice))\b|正确)"
)
_DENIAL = re.compile(
    r"(?i)(?:(?:therefore|thus|probably|likely|actually|simply) )?(?:not (?:listed|given|provided|available|clear|possible|shown|visible|among|one of|in the|here|present)"
    r"|unclear|unknown|impossible|cannot\b|can't\b|none of (?:the|these)|missing)"
)
_REFUSAL = re.compile(
    r"(?i)\b(?:(?:can(?:no|')t|can not|(?:un|not )able to|(?:not |im)possible to|(?:difficult|hard|challenging) to)"
    r" (?:\w+ ){0,3}?(?:tell|determined?|provided?|see|view|answer(?:ed)?|identify|help|assist|say|interpret|analy[sz]e)"
    r"|unclear|i'm sorry|i am sorry|apologi[sz]e|not listed|(?:not (?:\w+ )?|no |in)(?:enough|sufficient) (?:\w+ ){0,2}?"
    r"(?:information|context|data|details)|not (?:provide|give|contain) (?:\w+ )?(?:information|details)"
    r"|(?:none of the|no) (?:\w+ )?(?:options?|choices|answers?) (?:\w+ ){0,2}?(?:match|correct|right|fit|for)"
    r"|need (?:a|an|the|more|to see)\b|without (?:knowing|seeing|(?:the|an) (?:actual )?image|more|further|additional))"
)
_THEREFORE = re.compile(
    r"(?i)\W*(?:(?:and|but)\b\W*)?(?:therefore|thus|so|hence|consequently|overall|accordingly|to conclude|finally"
    r"|in (?:conclusion|summary|short)|based on|given|considering)\b|因此|所以"
)
_DESCRIBES = re.compile(r"(?i)\b(?:shows?|depicts?|features?|displays?|portrays?|contains?|located|labell?ed|provided)\b")


@dataclass(frozen=True)
class _Said:
    """Where "the answer is B" stands: its beginning, "the answer is", and what it declares, "B"."""

    sentence: int
    line: int
    lead: str
    clause: str


def _said(text: _Text) -> Iterator[_Said]:
    for number, sentence in enumerate(text.sentences):
        found = None
        for found in _SAID.finditer(sentence.text):  # "the answer is not listed, the closest option is B": the last
            pass
        if found is None:
            continue
        clause = sentence.text[found.end() :]
        if not clause:  # it announces the next line, or the options once more
            following = [after.text for after in text.sentences[number + 1 : number + 3]]
            clause = " ".join(following if _is_list(following) else following[:1])
        yield _Said(number, sentence.line, sentence.text[: found.end()], clause)


def _announced(text: _Text) -> Iterator[str]:
    """A line that stands alone behind a colon."""
    for number, (line, following) in enumerate(pairwise(text.lines)):
        if line.endswith(":") and not _is_list(text.lines[number + 1 : number + 3]):
            yield following


def _chosen(text: _Text) -> Iterator[str]:
    for sentence in text.sentences:
        if found := _CHOSEN.search(sentence.text):
            yield sentence.text[found.end() :]


def _praised(text: _Text) -> Iterator[str]:
    for sentence in text.sentences:
        if found := _PRAISED.search(sentence.text):
            yield sentence.text[: found.start()]


# --- what a passage names -------------------------------------------------------------------------------------


class _Question(Protocol):
    """What was asked, and so what an answer looks like."""

    ends_with_answer: bool  # a choice may be named first and then defended; a computation starts from what is given

    def exact(self, text: str) -> Outcome:
        """The answer that the text is, read strictly."""

    def stated(self, line: str) -> Outcome:
        """The answer that a line begins with or is."""

    def declared(self, clause: str) -> Outcome:
        """The answer in a clause that is said to hold it."""

    def named(self, passages: Sequence[str]) -> Outcome:
        """The only answer that running text names."""

    def verdict(self, answer: Answer | None, reading: str) -> Verdict:
        """Whether the answer is right."""


def _question(gold: str, options: Sequence[str] | None, lettered: bool | None) -> _Question:
    if not options:
        return _Open(gold)
    for letters in (False, True) if lettered is None else (lettered,):
        choice = _Choice(tuple(options), letters)
        index = choice.equal(gold)
        if index is not None:
            choice.gold = index
            return choice
    raise ValueError(f"gold answer {gold!r} is none of the options {list(options)!r}")


_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:my )?(?:(?:final|correct|right|best) )?"
    r"(?:answer|option|choice)(?: is)?(?: option)?[: ]+"
    r"|^(?:正确)?(?:答案|选项|选择|选)(?:是|为)?:? ?"
)
_LETTER = re.compile(r"(?P<letter>[a-z])(?:(?:[)\].:,\s]+(?:-\s+|-(?=\D))?|-\s*)(?P<text>.+))?")  # "b) -5" is minus 5
_SHORTENED = re.compile(r"\s|[,;:(]")  # what may follow on the part of an option's text that stands for it
_LEADING = re.compile(r"(?:(?i:option|choice)\s+)?(?:[(\[](?P<bracketed>[A-Za-z])[)\]]|(?P<bare>[A-Z])[).:])[.:]*(?P<rest>.*)")
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


class _Choice:
    """A question with options."""

    ends_with_answer = False

    def __init__(self, options: tuple[str, ...], lettered: bool) -> None:
        self.options, self.lettered, self.gold = options, lettered, 0
        self.texts, self.labels = _texts(options), _labels(options)

    def verdict(self, answer: Answer | None, reading: str) -> Verdict:
        if answer is None:
            return Verdict(None, False, reading)
        label = f"({chr(ord('A') + answer)})" if self.lettered else self.options[answer]
        # By text, not by index: a data set may list the same option twice.
        return Verdict(label, self.texts[answer] == self.texts[self.gold], reading)

    def exact(self, text: str) -> Outcome:
        index = self.equal(text)
        return self.gold if index is None and same_value(self.options[self.gold], text) else index

    def equal(self, text: str) -> int | None:
        """The option that the text equals: its text or, if lettered, its letter, or both."""
        text = normalize(text)
        # The text as it stands comes first, because an option's own text may start with "option".
        for candidate in (text, normalize(_LEAD_IN.sub("", text))):
            found = _LETTER.fullmatch(candidate) if self.lettered else None
            if found:
                index = ord(found["letter"]) - ord("a")
                if index < len(self.texts) and (found["text"] is None or self._stands_for(found["text"], index)):
                    return index
            if candidate in self.texts:
                return self.texts.index(candidate)
        return None

    def _stands_for(self, text: str, index: int) -> bool:
        """Whether a text beside an option's letter is the option's, or the beginning of it and no other's."""
        text, own = normalize(text), self.texts[index]
        shortened = own.startswith(text) and _SHORTENED.match(own, len(text)) and not text.replace(".", "").isdigit()
        return text == own or bool(text and shortened and text not in self.texts)

    def stated(self, line: str) -> Outcome:
        index = self.equal(_TRANSLATED.get(line.strip(" .。"), line))
        found = _LEADING.match(line) if self.lettered and index is None else None
        if not found:
            return index
        index, rest = _index(found["bracketed"] or found["bare"]), normalize(found["rest"])
        if index >= len(self.texts) or _MORE_LETTERS.search(found["rest"]) or _ASIDE_AFTER.match(found["rest"]):
            return None
        begun = [other for other, text in enumerate(self.texts) if text and _begins(rest, text)]
        return Unread.CONFLICT if begun and index not in begun else index

    def declared(self, clause: str) -> Outcome:
        return self.named([clause])

    def named(self, passages: Sequence[str]) -> Outcome:
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
        lowered = "".join(low if len(low := character.lower()) == 1 else character for character in clause)
        taken = bytearray(len(clause))  # longest first, so that "left front" is not read as "left"
        for index in sorted(range(len(self.texts)), key=lambda index: -len(self.texts[index])):
            text = self.texts[index]
            if len(text) == 1 and text.isalpha():
                continue  # its own label
            start = lowered.find(text) if text else -1
            while start >= 0:
                end = start + len(text)
                if _stands_alone(lowered, start, end) and not any(taken[start:end]):
                    taken[start:end] = b"\1" * len(text)
                    yield start, end, index, False
                start = lowered.find(text, end)
        for found in _LETTERS.finditer(clause) if self.lettered or self.labels else ():
            form = found.lastgroup
            start, letter = found.start(form), found[form].upper()
            if form == "label" or (form == "lone" and letter in self.labels):
                index = self.labels.get(letter)
            else:
                index = _index(letter) if self.lettered else None
            if index is not None and index < len(self.texts) and not taken[start]:
                yield start, found.end(), index, True


@lru_cache(maxsize=256)
def _texts(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(normalize, options))


_LABELLED = re.compile(r"(?:(?:the )?[A-Za-z]+ )?(?P<label>[A-Z])(?: (?:is|looks|seems|appears|has)\b.*)?$")


@lru_cache(maxsize=256)
def _labels(options: tuple[str, ...]) -> dict[str, int]:
    """Which option has which label in its text ("Point A", "A is closer"), if the labels go from A on."""
    found = ((_LABELLED.match(tidy(option).strip(" $()")), index) for index, option in enumerate(options))
    labels = {match["label"]: index for match, index in found if match}
    return labels if len(labels) > 1 and sorted(map(_index, labels)) == list(range(len(labels))) else {}


# "A" before a word is the article and "I" the pronoun, unless that word shows that the letter is meant.
_ALONE = r"(?![A-Za-z0-9'°])(?!-\w)"
_NO_ARTICLE = rf"{_ALONE}(?![^\S\n]+(?!(?:is|or|and|because|since|appears|looks|seems|has|does|fits|matches)\b)[A-Za-z])"
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
    # "no" is an answer, "no doubt" is none
    return text[start:end] not in ("yes", "no") or _BARE_INTERJECTION.match(text, end) is not None


def _main_clause(passage: str) -> str:
    passage = _PREAMBLE.sub("", passage)
    found = _REASON.search(passage)
    return passage[: found.start()] if found and found.start() > 0 else passage


_FIGURE = re.compile(r"(?<![\w.,])[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?![\w]*[A-Za-z]\d)")
_IS = re.compile(r"=|≈|\b(?:is|are|was|be|equals)\b")
_SURROUNDINGS = " \t.,:;$*"


class _Open:
    """A question without options."""

    ends_with_answer = True

    def __init__(self, gold: str) -> None:
        self.gold = gold

    def verdict(self, answer: Answer | None, reading: str) -> Verdict:
        if answer is None:
            return Verdict(None, False, reading)
        return Verdict(answer, normalize(answer) == normalize(self.gold) or same_value(self.gold, answer), reading)

    def exact(self, text: str) -> Outcome:
        return text.strip() or None

    def stated(self, line: str) -> Outcome:
        value = line.rpartition("=")[2].strip(_SURROUNDINGS)
        return value if is_quantity(value) else None

    def declared(self, clause: str) -> Outcome:
        found = self.named([clause])
        return found if found is not None else clause.strip(_SURROUNDINGS) or None

    def named(self, passages: Sequence[str]) -> Outcome:
        figures: dict[str, None] = {}
        for passage in passages:
            passage = _main_clause(passage)
            *_, last = [0, *(found.end() for found in _IS.finditer(passage))]
            for part in (passage[last:], passage):
                if (value := self.stated(part)) is not None:
                    figures[value] = None
                    break
                if found := dict.fromkeys(_FIGURE.findall(part)):
                    figures |= found
                    break
        if len(figures) > 1:
            return Unread.SEVERAL
        return next(iter(figures), None)
