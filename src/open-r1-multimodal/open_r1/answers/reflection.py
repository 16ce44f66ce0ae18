"""Finds where a completion turns back to its own reasoning (the "aha moment"), and whether its answer changed.

A *reflection* is a phrase in which the writer stops, doubts, checks again or takes something back: "wait,", "let me
double-check", "on second thought". A *self-correction* is a completion whose text named one option before its first
reflection and whose final answer is another.

Phrases are found by the patterns below, not by a model: the measure costs nothing, is the same for every run, and
everyone can read what it counts. They are made to count nothing wrong rather than to find everything, so the shares
are lower bounds with which to compare steps and runs. tests/data/reflections.jsonl is the hand-labelled table that
holds them to that; of 30 reflective sentences in the thoughts of other models, they found about half, and none wrong
among 18 others. Whether the text around a phrase makes sense they cannot tell: a model that was not trained says such
words in babble, too. So the report says how many of the reflective completions keep the format and answer rightly.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_r1.answers.checker import judge
from open_r1.answers.values import normalize

MAX_CONTEXT_CHARS = 2_000  # how far before its first reflection a text is searched for the option that it favoured
ACCURACY = "accuracy_reward"  # the reward that says whether a final answer is right

# --- the phrases ---------------------------------------------------------------------------------------------

# Where a clause begins: at the start of the text, after punctuation, or after a word that leads over.
_MARKS = r"\n.!?…。,;:—\u2013()\"*>"
_LEADS = ("but", "no", "oh", "so", "and", "ok", "okay", "hmm", "wait", "actually")
_START = "|".join(
    [rf"(?<![^{_MARKS}])", rf"(?<=[-{_MARKS}]\s)", rf"(?<=[-{_MARKS}]\s\s)", *(rf"(?<=\b{lead}\s)" for lead in _LEADS)]
)
_START = f"(?:{_START})"
# Where an interjection ends: before punctuation, the end of the text, or a dash (not a hyphen inside a word).
_END = r"(?=\s{0,2}(?:[,.!?…。:;—\u2013]|-+\s|$))"
_NEAR = r"[^.!?\n]{0,40}?"  # further on in the same sentence
_I_WILL = (
    r"(?:let me|let's|let us|i'll|i'm going to|i (?:will|should|must|need to|have to|want to|am going to))"
    r"(?: (?:just|also|now|quickly|carefully))?"
)
_ZH_START = r"(?<![^\s。….,;:!?])"
_ZH_END = r"(?=[\s。….,;:!?]|$)"

# Language -> {name: regular expression}. This is data: add a phrase or a language here, and examples that should and
# should not match to tests/data/reflections.jsonl. Patterns see the text in lower case, with plain quotes, apostrophes
# and punctuation, and begin where a word does. Every repetition is bounded: no text takes more than linear time.
PATTERNS: dict[str, dict[str, str]] = {
    "en": {
        "wait": rf"{_START}(?:wait|hang on|hold on)(?: (?:a|one|just a) (?:sec|second|minute|moment))?(?:{_END}"
        r"|(?= (?:no|but|actually|maybe|is (?:it|that|this)|that's|this is|what if|i (?:forgot|see|think)|let me)\b))",
        "hmm": rf"{_START}h{{1,4}}m{{1,8}}{_END}",
        "verify": rf"{_I_WILL} (?:verify|confirm|validate|make sure|be sure)\b|{_START}(?:just )?to be sure{_END}",
        # not "let me check which options there are": a look at the task, not back
        "check": r"(?:let me|let's)(?: just| quickly)? check\b(?! (?:which|what|who|the (?:options|choices)))",
        "recheck": rf"{_I_WILL} (?:double[- ]?check"
        r"|re-?(?:check|examine|consider|count|think|evaluate|assess|read|verify|visit|trace|do))\b",
        "look again": rf"{_I_WILL} (?:look|check|count|think|read|see|examine|inspect|consider|compare|go|take)"
        rf"\b{_NEAR}\b(?:again|once more|one more time|(?:another|closer|second) look|more closely)\b(?! and again)",
        "start over": rf"{_I_WILL} (?:start over|start again|begin again|go back|correct|revise|fix|retrace)\b",
        "looking again": rf"{_START}looking at the (?:image|picture|photo|scene|question)s? (?:again|once more)\b"
        r"(?! and again)"
        rf"|{_START}(?:looking|checking|counting|thinking|reading)(?: it| them| this| that)? (?:again|once more)\b"
        rf"|{_START}(?:looking|going) back (?:at|to) (?:the|this|my)\b",
        "second thought": rf"{_START}on second thoughts?(?=[,:…—]| \w)",
        "closer look": rf"{_START}(?:up)?on (?:re-?(?:examination|inspection|consideration)\b|reflection,"
        r"|(?:closer|further|second|careful) (?:inspection|look|examination|consideration)\b)",
        "another idea": r"come to think of it\b|now that i think (?:about|of) it\b"
        r"|i can think of (?:something|another)\b",
        "mistake": r"i(?:'ve| have| think i| may have| might have| must have)?(?: just)? (?:made an? (?:\w{1,12} )?"
        r"(?:mistake|error)|was (?:wrong|mistaken|incorrect)|mis(?:read|judged|counted|understood|interpreted|took)"
        r"|mixed up|confused|overlooked|forgot|got (?:it|this|that) wrong)\b|(?:that|this|it) was (?:a|my) mistake\b",
        "take back": rf"{_START}(?:my (?:mistake|bad)|oops|whoops|scratch that|never mind|i take (?:that|it) back)"
        rf"{_END}|{_START}correction:",
        "not right": r"(?:that|this)(?: can't be| cannot be|'s not| is not| isn't| doesn't (?:look|seem|sound))"
        r"(?: quite| really)? (?:right|correct|true)\b|(?:that|this)(?:'s| is) (?:wrong|incorrect)\b"
        r"|(?:that|this) does(?:n't| not) (?:make sense|add up|fit)\b|contradicts what i\b",
        # at the start of a text there is nothing to take back, without a comma it only stresses
        "actually": r"actually,? no(?:t quite)?(?:[,.!;:…—]|(?= (?:the|it|that|this|wait)\b))"
        r"|(?:(?<=[.!?…*]\s)|(?<=\n))actually,",
        "oh no": rf"{_START}(?:ah|oh|hm|um),? no\b",
        "doubt": rf"{_START}(?:am i (?:really )?(?:sure|right)|could i be (?:wrong|mistaken)"
        r"|is (?:that|this|it) (?:really )?(?:right|correct|true)\?|(?:i'm|i am) not (?:so |entirely |quite )?sure\b)"
        r"|i wonder (?:if|whether) i\b|is (?:that|this) really (?:true|right|correct|so)\b",
        "change of mind": r"i(?:'ll|'ve| will| have| must)? changed? my (?:mind|answer)\b",
    },
    "zh": {
        "等等": rf"{_ZH_START}(?:等等|等一下|等一等|等会儿?|且慢|慢着){_ZH_END}",
        "不对": rf"{_ZH_START}(?:不对|不是这样){_ZH_END}",
        "嗯": rf"{_ZH_START}嗯{{1,4}}{_ZH_END}",
        "重新": r"重新(?:考虑|检查|思考|审视|审题|看|数|计算|评估|观察|分析|确认)",
        "检查": r"(?:让我|我需要|我应该|我要|我得|我们来)(?:再次|再|仔细)?(?:检查|核对|确认|验证|核实)",
        "再看": r"再(?:次|仔细)?(?:检查|核对|确认|看|想|数|思考|考虑)(?:[一1](?:遍|下|次)|想|看|数)",
        "仔细一看": r"仔细(?:一看|再看|想想|一想)|转念一想|话说回来|回过头来?看",
        "错": r"我(?:刚才|刚刚|之前|可能|好像|似乎)?(?:弄错|搞错|看错|数错|算错|想错|记错|理解错|搞混|弄混|搞反|忽略)",
        "不确定": r"我不太?确定|好像(?:有问题|不对)|真的是这样吗",
    },
    "de": {
        "warte": rf"{_START}(?:warte|wart|moment|halt|stopp)(?: mal| bitte)?{_END}",
        "hm": rf"{_START}(?:hm{{1,6}}|äh){_END}",
        "noch einmal": r"(?:lass mich|lasst uns|ich (?:muss|sollte|will|werde|möchte|prüfe|schaue|zähle))\b"
        rf"{_NEAR}\b(?:noch ?mals?|noch einmal|erneut|genauer|überprüfen|überdenken)\b",
        "stimmt nicht": r"das (?:stimmt|passt) (?:so |doch |aber ){0,2}nicht\b"
        r"|das (?:ist|war) (?:falsch|nicht richtig)\b",
        "geirrt": rf"ich habe? mich (?:geirrt|vertan|verzählt|verlesen)\b|ich lag falsch\b|{_START}mein fehler\b",
        "genauer": r"bei (?:genauerem|näherem) (?:hinsehen|hinschauen|betrachten)\b|bei genauerer betrachtung\b",
    },
    "fr": {
        "attends": rf"{_START}(?:attends|attendez|un instant|une minute)(?: une (?:seconde|minute))?{_END}",
        "hum": rf"{_START}(?:hum|euh){_END}",
        "vérifier": r"(?:laisse[zr]?-moi|je (?:dois|vais|devrais)|il faut que je)\b"
        rf"{_NEAR}\b(?:encore une fois|à nouveau|de nouveau|re(?:vérifier|compter|considérer|penser))\b",
        "de plus près": r"(?:en y regardant|à y regarder) de plus près\b",
        "trompé": r"je me (?:suis )?trompée?\b|j'ai fait une erreur\b",
        "à la réflexion": r"(?:à la réflexion|réflexion faite|tout bien réfléchi)\b",
        "pas ça": r"ce n'est pas (?:ça|correct|juste|exact|possible)\b",
    },
    "es": {
        "espera": rf"{_START}(?:espera|espere|un momento|un segundo){_END}",
        "otra vez": r"(?:déjame|permíteme|voy a|debo|tengo que|necesito)\b"
        rf"{_NEAR}\b(?:otra vez|de nuevo|nuevamente|una vez más|reconsiderar|recontar)\b",
        "pensándolo bien": r"pensándolo (?:bien|mejor)\b",
        "me equivoqué": r"me (?:equivoqué|he equivocado)\b|cometí un error\b|estaba equivocad[oa]\b",
        "no es correcto": r"eso no (?:es|está|puede ser) (?:correcto|cierto|bien)\b",
        "mirando": r"mirando(?:lo)? (?:con más atención|más de cerca|de nuevo|otra vez)\b",
    },
}
_UNSPACED = {"zh"}  # languages whose words are written together, without boundaries


def _compile(language: str, patterns: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile(("" if language in _UNSPACED else r"\b(?=\w)") + f"(?:{'|'.join(patterns.values())})")


_COMPILED = [_compile(language, patterns) for language, patterns in PATTERNS.items()]


class _Plain(dict[int, str]):
    """For `str.translate`: one plain character for each, so that offsets stay those of the text."""

    def __missing__(self, code: int) -> str:
        plain = unicodedata.normalize("NFKC", chr(code)).lower()
        self[code] = plain if len(plain) == 1 else chr(code)
        return self[code]


_PLAIN = _Plain(
    str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"), **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"')})
)


def find_reflections(text: str) -> list[tuple[int, int]]:
    """The reflective phrases of a text as [start, end) offsets of its characters, in order, overlapping ones merged."""
    plain = text.translate(_PLAIN)
    spans: list[tuple[int, int]] = []
    for start, end in sorted(match.span() for pattern in _COMPILED for match in pattern.finditer(plain)):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


# --- self-correction -----------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s|(?<=[。\uff01\uff1f\uff1b])|\n")


@dataclass(frozen=True)
class Reflection:
    """What a completion reflected on.

    `spans` are those of `find_reflections`. `considered` is the option that the text named last before its first
    reflection, `final` the option in its last `<answer>` block; each None when there is none to read.
    """

    spans: tuple[tuple[int, int], ...]
    considered: str | None
    final: str | None

    @property
    def self_corrected(self) -> bool:
        """Whether the final answer is another than the one that was considered."""
        return self.considered is not None and self.final is not None and self.considered != self.final


def analyse(completion: str, options: Sequence[str] | None) -> Reflection:
    """Where a completion reflects, and the option that it held before and in the end.

    Options are read by `open_r1.answers.checker`: before the reflection leniently, sentence by sentence from the last
    one backwards, as evaluation reads untagged text; at the end strictly, as the accuracy reward does. Without options
    there is nothing to compare.
    """
    spans = tuple(find_reflections(completion))
    options = [option for option in options or () if normalize(option)]
    if not options:
        return Reflection(spans, None, None)
    final = judge(completion, options[0], options).answer
    return Reflection(spans, _last_named(completion[: spans[0][0]], options) if spans else None, final)


def concluded(completion: str, options: Sequence[str]) -> tuple[str | None, str | None]:
    """The option that the thought names last, and the one in the last `<answer>` block; None where none can be read.

    The thought is what stands before `</think>`, or else before that block. Options are read as in `analyse`.
    """
    options = [option for option in options if normalize(option)]
    final = judge(completion, options[0], options).answer if options else None
    if final is None:  # nothing to compare, and a thought may be long
        return None, None
    thought = completion.partition("</think>" if "</think>" in completion else "<answer>")[0]
    return _last_named(thought, options), final


def _last_named(text: str, options: Sequence[str]) -> str | None:
    """The option that the last sentence which names exactly one names."""
    for sentence in reversed(_SENTENCE_END.split(text[-MAX_CONTEXT_CHARS:])):
        # which option counts as right does not matter here
        if sentence.strip() and (named := judge(sentence, options[0], options, lenient=True).answer):
            return named
    return None


def reflection_shares(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of a rollout, from its trajectory rows (see `open_r1.base.trajectories`).

    `reflection/share` and `reflection/self_correction` are shares of all completions. `reflection/correction_success`
    is the share of the self-corrections that the row's accuracy reward calls right; it is left out when there is no
    self-correction, or no such reward in the run.
    """
    rows = list(rows)
    corrected = [row for row in rows if row["self_corrected"]]
    metrics = {
        "reflection/share": sum(bool(row["reflections"]) for row in rows) / len(rows),
        "reflection/self_correction": len(corrected) / len(rows),
    }
    judged = [row["rewards"][ACCURACY] for row in corrected if row["rewards"].get(ACCURACY) is not None]
    if judged:
        metrics["reflection/correction_success"] = sum(reward == 1 for reward in judged) / len(judged)
    return metrics
