r"""Splits a response into parts, and finds the passages in which it commits itself to an answer.

What a passage answers is read in `options`; here it is only found. Every step is linear in the length of the response.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from open_r1.answers.latex import braces
from open_r1.answers.values import MAX_TEXT_CHARS, tidy

MAX_BOXES = 4  # of more, the last count
MAX_SENTENCE_CHARS = 1_000  # of a longer one, the end counts
_BOX = re.compile("f?box(?:ed)?")
# "one" as a pronoun is no number
_PRONOUN_ONE = re.compile(
    r"(?i)\b(the|this|that|each|every|which|another|other|no|some|first|second|left|right) one\b|\bone of\b"
)
_NEXT_QUESTION = re.compile(r"\n[ \t]*\**(?:Question|Q|User|Human|问题)\b[ \d]{0,9}\**[::]")
# After a full stop; but not after that of "B. left", at the start of a line, or of "3.5".
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!^[A-Za-z]\.)(?<!\b[ei]\.[ge]\.)[\"')\]]?\s+|(?<=[。!?])")
_LIST_ITEM = re.compile(r"[(\[]?(?P<letter>[A-Za-z])[)\].:]+\s*\S")
_SENTENCE_PUNCTUATION = tuple(".!?。:)]}>$\"'*|")
LONG_RESPONSE_CHARS = 300  # a shorter one need not end like a sentence


@dataclass(frozen=True)
class Sentence:
    text: str
    line: int


class Response:
    """A response in the parts that the rules of `answers` look at."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def body(self) -> str:
        """What follows an open `<answer>`, or else `</think>`, or else everything; at most its end."""
        tails = (self.text.rpartition(tag)[2] for tag in ("<answer>", "</think>") if tag in self.text)
        return next((tail for tail in tails if tail.strip()), self.text)[-MAX_TEXT_CHARS:]

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without markup."""
        lines = tidy(_PRONOUN_ONE.sub(r"\1", self.body)).splitlines()
        return [" ".join(line.split()) for line in lines if line.strip(" \t$*_`-=#|\\")]

    @cached_property
    def sentences(self) -> list[Sentence]:
        return [
            Sentence(sentence[-MAX_SENTENCE_CHARS:], number)
            for number, line in enumerate(self.lines)
            for sentence in _SENTENCE_END.split(line)
            if sentence.strip()
        ]

    @property
    def boxes(self) -> list[str]:
        r"""The contents of the last `\boxed{}`, the last first."""
        boxes = [pair for pair in braces(self.body) if (command := pair[0]["command"]) and _BOX.fullmatch(command)]
        return [self.body[opening.end() : closing.start()] for opening, closing in boxes[: -MAX_BOXES - 1 : -1]]

    @property
    def refuses(self) -> bool:
        """Whether it begins or ends by saying that it cannot tell."""
        return any(_REFUSAL.search(sentence.text) for sentence in (*self.sentences[:2], *self.sentences[-1:]))

    @property
    def conclusion(self) -> str | None:
        """The last sentence that begins with "Therefore" or its like."""
        return next((sentence.text for sentence in reversed(self.sentences) if _THEREFORE.match(sentence.text)), None)

    @property
    def opening(self) -> str | None:
        """The first sentence, unless it begins a list, describes the picture, denies, or says what is to be done."""
        if not self.sentences or is_list(self.lines[:2]):
            return None
        first = self.sentences[0].text
        return None if _DESCRIBES.search(first) or _NEGATES.search(first) or first.startswith("To ") else first

    @property
    def closing(self) -> str | None:
        """The last sentence, unless it ends a list or denies."""
        if not self.sentences or is_list(self.lines[-2:]) or _NEGATES.search(self.sentences[-1].text):
            return None
        return self.sentences[-1].text

    @property
    def is_cut_off(self) -> bool:
        """Whether a tag or a long text ends in the middle."""
        end = self.text.rstrip()
        unclosed = any(end.rfind(f"<{tag}>") > end.rfind(f"</{tag}>") for tag in ("think", "answer"))
        return unclosed or (len(end) > LONG_RESPONSE_CHARS and not end.endswith(_SENTENCE_PUNCTUATION))

    def before_next_question(self) -> "Response | None":
        """What a model wrote before it ran on and asked itself another question."""
        starts = (match.start() for match in _NEXT_QUESTION.finditer(self.text))
        before = (self.text[:start] for start in starts)
        return next((Response(text) for text in before if text.strip()), None)


def is_list(lines: Sequence[str]) -> bool:
    """Whether two lines are the items of two different letters."""
    letters = [match["letter"] for line in lines if (match := _LIST_ITEM.match(line))]
    return len(letters) == 2 and letters[0] != letters[1]


# "The answer is", "the best option would be", "答案为"; what follows is the clause.
_SAID = re.compile(
    r"(?:(?i:\banswers?\b(?!\s+(?:choices?|options?|keys?|the|this|your)\b)"
    r"|\b(?:correct|right|best|final|closest|appropriate|likely|suitable|accurate)\s+"
    r"(?:\w+\s+)?(?:option|choice|match|selection|candidate)s?\b)"
    r"[^?\n]{0,80}?(?:\b(?i:is|are|be|was)\b|[:=])"
    r"|(?:答案|选项|选择|应选|故选)[^。\n]{0,10}?[是为:选])[\s:*\"']*"
)
# "I would choose", "we conclude that", "the diagnosis is (B)"; what follows is the clause.
_CHOSEN = re.compile(
    r"(?i)\b(?:I|we)(?:'d|'ll)?"
    r"(?: (?:would|will|must|might|can|could|should|had|have|to|also|therefore|thus|then)\b){0,3}"
    r" (?:choose|select|pick|go with|say|opt for|lean towards?|conclude|believe|think|guess|determine)\b(?: that\b)?"
    r"|\b(?:is|be)\b:?\s*(?=[(\[][A-Z][)\]])"
)
# "is the correct option", "appears to be most similar"; what stands before is the clause.
_PRAISED = re.compile(
    r"(?i:\b(?:is|are|seems?|appears?|be)\b(?: (?:to be|likely|therefore|thus|indeed|actually|probably)\b){0,2}"
    r"(?: (?:the|my|a|our)\b)?"
    r" (?:most|best|correct|right|final|answer|closest|nearest|more (?:likely|similar|appropriate|suitable|accurate)"
    r"|only (?:correct|right|option|choice))\b|正确)"
)
_DENIAL = re.compile(
    r"(?i)(?:(?:therefore|thus|probably|likely|actually|simply) )?(?:unclear|unknown|impossible|missing"
    r"|not (?:listed|given|provided|available|clear|possible|shown|visible|among|one of|in the|here|present)"
    r"|cannot\b|can't\b|none of (?:the|these))"
)
_REFUSAL = re.compile(
    r"(?i)\b(?:(?:can(?:no|')t|can not|(?:un|not )able to|(?:not |im)possible to|(?:difficult|hard|challenging) to)"
    r" (?:\w+ ){0,3}?(?:tell|determined?|provided?|see|view|answer(?:ed)?|identify|help|assist|say|interpret"
    r"|analy[sz]e)"
    r"|unclear|i'm sorry|i am sorry|apologi[sz]e|not listed"
    r"|(?:not (?:\w+ )?|no |in)(?:enough|sufficient) (?:\w+ ){0,2}?(?:information|context|data|details)"
    r"|not (?:provide|give|contain) (?:\w+ )?(?:information|details)"
    r"|(?:none of the|no) (?:\w+ )?(?:options?|choices|answers?) (?:\w+ ){0,2}?(?:match|correct|right|fit|for)"
    r"|need (?:a|an|the|more|to see)\b|without (?:knowing|seeing|(?:the|an) (?:actual )?image|more|further|additional))"
)
_THEREFORE = re.compile(
    r"(?i)\W*(?:(?:and|but)\b\W*)?(?:therefore|thus|so|hence|consequently|overall|accordingly|to conclude|finally"
    r"|in (?:conclusion|summary|short|total|all)|altogether|based on|given|considering)\b|因此|所以"
)
_NEGATES = re.compile(r"(?i)\b(?:not|cannot|never)\b|n't\b")
_DESCRIBES = re.compile(
    r"(?i)\b(?:shows?|depicts?|features?|displays?|portrays?|contains?|located|labell?ed|provided)\b"
)


@dataclass(frozen=True)
class Declaration:
    """Where "the answer is B" stands: its beginning, "the answer is", and what it declares, "B"."""

    sentence: int
    line: int
    lead: str
    clause: str


def denies(clause: str) -> bool:
    """Whether the clause of a declaration says that there is no answer: "not listed"."""
    return _DENIAL.match(clause) is not None


def said(response: Response) -> Iterator[Declaration]:
    """ "The answer is B"; of two in a sentence the last ("the answer is not listed, the closest option is B")."""
    for number, sentence in enumerate(response.sentences):
        *_, end = [0, *(match.end() for match in _SAID.finditer(sentence.text))]
        if not end:
            continue
        clause = sentence.text[end:]
        if not clause:  # it announces the next line, or the options once more
            following = [after.text for after in response.sentences[number + 1 : number + 3]]
            clause = " ".join(following if is_list(following) else following[:1])
        yield Declaration(number, sentence.line, sentence.text[:end], clause)


def announced(response: Response) -> Iterator[str]:
    """A line that stands alone behind a colon."""
    for number, (line, following) in enumerate(pairwise(response.lines)):
        if line.endswith(":") and not is_list(response.lines[number + 1 : number + 3]):
            yield following


def chosen(response: Response) -> Iterator[str]:
    """ "I would choose B": what is chosen."""
    for sentence in response.sentences:
        match = _CHOSEN.search(sentence.text)
        if match and not _NEGATES.search(sentence.text, 0, match.start()):
            yield sentence.text[match.end() :]


def praised(response: Response) -> Iterator[str]:
    """ "B is the best choice": what is praised."""
    for sentence in response.sentences:
        if match := _PRAISED.search(sentence.text):
            yield sentence.text[: match.start()]
