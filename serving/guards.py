"""What an embedding cannot see: a small word that turns a question into another one, and words it has never met.

MiniLM as it comes puts "What are you capable of?" and "What are you not capable of?" at cosine 0.87; trained, it tells
most such turns apart, and a guard makes sure of it. Each looks for one turn and lets a question pass only if some of
the intent's own phrasings make the same turn. Guards only ever object, and every objection has a reason. `novelty` is
the measure beside them: the share of a question's words that no text of the intent uses.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.text import lowered

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")

NEGATION = re.compile(
    r"\b(?!(?:don't|do not|can't) (?:know|understand|remember) )"  # of who asks, not of what is asked
    r"(not|no|never|none|nobody|nothing|nowhere|neither|nor|without|cannot|unable|fail(?:s|ed)? to|refuse[sd]? to"
    r"|(?:is|are|was|were|do|does|did|ca|could|wo|would|should|have|has|had|ai|must)n'?t)\b"
)
HYPOTHETICAL = re.compile(
    r"\b(what if|if only|suppos(?:e|ing)|imagine|imagining|pretend|had (?:not |never )?\w+ed|would have|could have"
    r"|might have|would (?!like|love)\w+ (?:still )?(?:be|have)"
    r"|(?<!know )(?<!see )(?<!wonder )(?<!wondering )(?<!wondered )(?<!ask )(?<!me )"  # there it means "whether"
    r"if (?:i|you|we|he|she|they|it|there|the|dorothy|a|an|nobody|someone))\b"
)
COMPARISON = re.compile(r"\b(than|versus|vs|compared|difference|differs?|different|rather|as \w+ as|or)\b")
CONTINUATION = re.compile(r"^(and|so|but|or|also|then|what about|how about|why not|what else|really|ok|okay|yes|no)\b")
REFERENCE = re.compile(
    r"\b(he|she|it|they|him|her|them|his|hers|its|their|theirs|this|these|those|then|ones|else|again|instead|too"
    r"|over there)\b"
)
EARLIER = re.compile(
    r"\b(the (?:last|other|former|latter|same)(?: one)?|the others|you (?:just )?(?:said|mentioned)|before that"
    r"|earlier)\b"
)
SEVERAL = re.compile(
    r"\?.*\w.*\?|[.!;]\s*\w+.*\?.*\w|[?]\s*\w{2,}"
    r"|(?:,\s*|\b)(?:and|also|plus|or)\s+(?:also\s+)?(?:who|what|where|when|why|how|which|is|are|was|were|do|does|did"
    r"|can|could|will|would|should|may|must|tell|show|write|give|explain|sing|solve|recommend|translate|list|name)\b"
)
KINDS = ("why", "when", "where", "who", "how many", "what")
KIND = re.compile(
    r"\b(?:(why|how come|what for|reasons?|purpose|what makes|what made)"
    r"|(when|what time|what year|what day|how long|how old|how soon|how often)"
    r"|(where|what place|which place|whereabouts)"
    r"|(who|whose|whom|which person)"
    r"|(how many|how much|number of)"
    r"|(what|which|how))\b"
)
"""The first of these in a question says what it asks for; the groups are in the order of `KINDS`."""
PREAMBLE = re.compile(
    r"\b(?:(?:i|i'd|we) (?:would |really )?(?:want|like|love|wish) to (?:know|hear|learn|ask|understand|see)"
    r"|(?:can|could|would|will) you (?:please |kindly )?(?:tell|explain|describe)|please|tell me|do you know"
    r"|i wonder|i'm curious|just curious)\b"
)
FUNCTION_WORDS = frozenset(
    """a an the of to in on at by for with from into onto over under about up down out off as is are was were be been
    being am do does did done doing have has had having can could will would shall should may might must i me my mine
    myself you your yours yourself we us our ours he him his she her hers it its they them their theirs this that these
    those who whom whose what which when where why how there here and or but if so than then too very just also only any
    some all both each every one more most much many no not never exactly really actually possible
    im id ive whats whos hows wheres thats lets dont doesnt didnt cant wont isnt ca wo ai r u ur n w b wat wut frm wud
    cud shud ppl pls plz gonna wanna gotta cuz""".split()
)
"""Words of grammar, also as they are typed in a hurry."""
ASKING_WORDS = frozenset(
    """ask tell explain describe know let like learn hear wonder hope curious enjoy fancy show give way kind sort thing
    stuff go come get""".split()
)
"""What people ask with, whatever they ask for; in every form that has the same stem."""
CONTRACTION = re.compile(r"(?:n't|'(?:s|d|ll|re|ve|m))$")
ALIKE = 0.05
"""Share of an intent's phrasings that must make a turn before a question may; one odd phrasing disarms no guard."""
ENDINGS = ("ation", "ing", "er", "est", "ied", "ful", "ed", "ly", "e", "y")


@dataclass(frozen=True)
class Intent:
    """What the guards know of an intent, in lower case: its phrasings, and its content words."""

    phrasings: tuple[str, ...]
    content: frozenset[str]

    @classmethod
    def of(cls, phrasings: Sequence[str], answer: str) -> "Intent":
        read = tuple(lowered(phrasing) for phrasing in phrasings)
        return cls(read, frozenset(content_words(" ".join([*read, lowered(answer)]))))


Guard = Callable[[str, Intent], str | None]
"""Takes a question as `lowered` gives it and an intent; returns the reason to reject, or None."""


def negation(question: str, intent: Intent) -> str | None:
    return _turn(NEGATION, "negated", question, intent)


def hypothetical(question: str, intent: Intent) -> str | None:
    return _turn(HYPOTHETICAL, "hypothetical", question, intent)


def comparison(question: str, intent: Intent) -> str | None:
    return _turn(COMPARISON, "a comparison or an alternative", question, intent)


def several_questions(question: str, intent: Intent) -> str | None:
    return _turn(SEVERAL, "more than one question", question, intent)


def question_kind(question: str, intent: Intent) -> str | None:
    """A why, when, where, who or how-many question needs a phrasing of that kind."""
    kind = _kind(question)
    if kind in (None, "what") or any(_kind(phrasing) == kind for phrasing in intent.phrasings):
        return None
    return f"it asks {kind}, and no phrasing of this answer does"


def conversation(question: str, intent: Intent) -> str | None:
    """Words that point to something said before the question, unless the intent's own phrasings use the same word.

    A pronoun after a word of substance has what it stands for in the question: "What did Dorothy do with her shoes?"
    Not so in a question that goes on from an earlier message, such as "So who built it?": there only a phrasing that
    goes on, too, excuses a pronoun.
    """
    goes_on = CONTINUATION.search(question)
    phrasings = intent.phrasings
    if goes_on:
        phrasings = tuple(phrasing for phrasing in phrasings if CONTINUATION.search(phrasing))
        if not phrasings:
            return "it continues an earlier message"
    found = [m for m in REFERENCE.finditer(question) if goes_on or not content_words(question[: m.start()])]
    pointing = {match.group() for match in (*found, *EARLIER.finditer(question))}
    known = {word for phrasing in phrasings for word in WORD.findall(phrasing)}
    unknown = sorted(word for word in pointing if not set(word.split()) <= known)
    return f"it refers to something said before ({unknown[0]!r})" if unknown else None


GUARDS: dict[str, Guard] = {
    "negation": negation,
    "question kind": question_kind,
    "several questions": several_questions,
    "hypothetical": hypothetical,
    "comparison": comparison,
    "conversation": conversation,
}


def novelty(question: str, intent: Intent) -> float:
    """Share of the content words of a lowered question that neither the phrasings nor the answer use; 0 without any."""
    stems = content_words(question)
    return sum(stem not in intent.content for stem in stems) / len(stems) if stems else 0.0


def content_words(text: str) -> dict[str, str]:
    """The words of a lowered text that carry its subject, by their rough stems."""
    whole = (CONTRACTION.sub("", word) for word in WORD.findall(PREAMBLE.sub(" ", text)))
    words = {_stem(word): word for word in whole if word not in FUNCTION_WORDS}
    return {stem: word for stem, word in words.items() if stem not in ASKING_STEMS}


def _stem(word: str) -> str:
    """One form for "city" and "cities", and for "build", "building" and "builder"."""
    if word.endswith("ies"):
        word = word.removesuffix("ies") + "y"
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        word = word.removesuffix("s")
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word


ASKING_STEMS = frozenset(map(_stem, ASKING_WORDS))


def _kind(text: str) -> str | None:
    found = KIND.search(text)
    return KINDS[found.lastindex - 1] if found and found.lastindex else None


def _turn(pattern: re.Pattern[str], what: str, question: str, intent: Intent) -> str | None:
    found = pattern.search(question)
    if found is None:
        return None
    alike = sum(pattern.search(phrasing) is not None for phrasing in intent.phrasings)
    if alike >= ALIKE * len(intent.phrasings):
        return None
    return f"it is {what} ({found.group(0)!r}), and this answer's phrasings are not"
