"""As much English grammar as rewording a question needs: what it asks for, its subject, its verb.

A question is taken apart only where there is no doubt how; where there is, nothing is said, as nonsense would be studied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FUNCTION_WORDS = _words(
    "who whom whose where when what which how why is are was were do does did has have can could will would should may must the a an of in on "
    "at to for from by with tell name me please whether"
)
_ASKING = _words("who whom whose where when what which how why")
_VERBS_OF_QUESTIONS = _words("is are was were has have had do does did can could will would should may might must")
_DETERMINERS = _words(
    "the a an my your our their his her its this that these those every each one two three new old any no"
)
_PRONOUNS = _words("me us it him them you")
_PREPOSITIONS = _words(
    "of in on at to for from by with as about into onto over under after before during until since per within without near"
)

_VERBS = _words(
    "accept allow answer arrive ask attach attend award become begin belong bear border breed bring build buy call carry celebrate charge check "
    "choose collect come compete cook cost cover cross deliver depart depend drink drive eat employ end expire fall feed fight find finish flow fly follow "
    "get give go grow guard happen hatch have head hold host house import include join keep know land last lead learn leave lie like live look lose "
    "love make manage mean meet need offer open own paint pay perform plan play prefer produce publish read receive reply represent require return "
    "ring rise run sail save sell send serve share ship show sing sit sleep smell speak spend stand start stay stop store study support take teach treat "
    "travel turn use visit wait want wear weigh win work worship write "
    "bake knit put hang mine catch harvest plant wash clean repair fix reset cancel change order book reach contact apply register park "
    "fit ride practise practice print hide draw marry hate enjoy admire dance train coach supply contain measure owe lend rent hire report"
)  # fmt: skip
_IRREGULAR = {
    "become": "became", "begin": "began", "bear": "bore", "breed": "bred", "bring": "brought", "build": "built", "buy": "bought", "choose": "chose",
    "come": "came", "cost": "cost", "drink": "drank", "drive": "drove", "eat": "ate", "fall": "fell", "feed": "fed", "fight": "fought", "find": "found",
    "fly": "flew", "get": "got", "give": "gave", "go": "went", "grow": "grew", "have": "had", "hold": "held", "keep": "kept", "know": "knew", "lead": "led",
    "leave": "left", "lie": "lay", "lose": "lost", "make": "made", "mean": "meant", "meet": "met", "pay": "paid", "read": "read", "ring": "rang",
    "rise": "rose", "run": "ran", "sell": "sold", "send": "sent", "show": "showed", "sing": "sang", "sit": "sat", "sleep": "slept", "speak": "spoke",
    "spend": "spent", "stand": "stood", "take": "took", "teach": "taught", "wear": "wore", "hang": "hung", "catch": "caught", "put": "put", "ride": "rode", "hide": "hid", "draw": "drew", "lend": "lent", "win": "won", "write": "wrote",
}  # fmt: skip
_DOUBLED = frozenset(("plan", "ship", "stop", "knit", "fit"))
_PARTICIPLES = _words(
    "born built called kept held made sold found known written spoken taught given paid sent led run worn bought brought grown drawn hung "
    "allowed closed opened located based delivered named used required needed served accepted founded invented caught hidden mined baked owned open valid available free returned included celebrated"
)
_QUESTION = re.compile(
    r"(?P<wh>(?:(?:in|on|at|by|to|from|for|of|with|under|until|since) )?"
    r"(?:who|whom|where|when|why|what|which|how)(?: (?:many|much|long|often|old|far|tall|high|big|large|deep|heavy|fast))?)"
    r"(?P<noun>(?: [\w'-]+){0,4}?) (?P<aux>is|are|was|were|does|do|did|has|have|can|could|will|would|should|may|must) (?P<rest>.+)",
    re.IGNORECASE,
)
_SECOND_CLAUSE = re.compile(
    r"\b(?:if|because|and|or|that|while|who|which|whom) (?:\w+ )*(?:is|are|was|were|does|do|did|has|have|can|will)\b.*\b(?:is|are|was|were|does|do|did|has|have|can|will)\b",
    re.I,
)
_MAY_BE_ADJECTIVE = re.compile(
    r"(?:[a-z]+(?:al|ic|ful|less|ous|ive|able|ible|est|ant|ent|y)|full|due|cold|warm|hot|safe|ripe|dead|alive|good|bad|best|quiet|dark|light"
    r"|wet|dry|cheap|high|low|loud|still|white|green|red|blue|black|dangerous|asleep|awake|late|early|fresh|clear|clean|strong|weak|rare|common)"
)
_YES_NO = re.compile(
    r"(?P<aux>is|are|was|were|does|do|did|can|could|will|would|should|may|must) (?P<rest>.+)", re.IGNORECASE
)


@dataclass(frozen=True)
class Question:
    """A question, taken apart: `wh` is what is asked for, with its noun, or empty where yes or no is. `subject` is empty
    where it is what is asked for; `predicate` has its verb as a statement has it.
    """

    wh: str
    aux: str
    subject: str
    predicate: str

    @property
    def clause(self) -> str:
        """The rest in the order of a statement."""
        return f"{self.subject} {self.predicate}".lstrip()


def is_english(text: str) -> bool:
    """Whether a question has function words of English, and no letters beyond Latin."""
    found = re.findall(r"[^\W\d_]+", text.casefold())
    known = 2 if not found or found[0] not in _ASKING else 1
    return sum(word in _FUNCTION_WORDS for word in found) >= known and all(
        ord(letter) < 0x250 for letter in text if letter.isalpha()
    )


def parse(question: str) -> Question | None:
    """Take a question apart that is one sentence with one clause; None where it is not, or where its subject's end is in doubt."""
    bare = question.strip().rstrip("?! ").replace("\u2019", "'")
    if not question.strip().endswith("?") or re.search(r"[,;:()?!\"]|\.\s", bare) or _SECOND_CLAUSE.search(bare):
        return None
    found = _QUESTION.fullmatch(bare) or _YES_NO.fullmatch(bare)
    if found is None:
        return None
    parts = found.groupdict()
    wh = f"{parts.get('wh') or ''}{parts.get('noun') or ''}"
    aux, words = parts["aux"].lower(), parts["rest"].split()
    wh = wh[:1].lower() + wh[1:]
    split = _split(aux, words, wh)
    return None if split is None else Question(wh, aux, *split)


def asks_for_subject(question: str) -> bool:
    """Whether a question has the order of a statement, as `Who wrote it?` has, which asks for its subject."""
    found = re.findall(r"[\w']+", question.casefold())
    return (
        bool(re.fullmatch(r"(?:who|what|which \w+|how many \w+) [^,;:()?!\"]+\?", question.strip(), re.IGNORECASE))
        and not _VERBS_OF_QUESTIONS & set(found)
        and len(found) > 2
    )


def _split(aux: str, words: list[str], wh: str) -> tuple[str, str] | None:
    """Subject and predicate of what follows an auxiliary verb, in the order of a statement; no subject where it is asked for."""
    if aux in {"has", "have"}:
        return None
    if aux not in {"is", "are", "was", "were"}:
        places = [at for at in range(1, len(words)) if _may_be_verb(words, at)]
        if len(places) != 1:
            return None
        at = places[0]
        verb = [_inflect(words[at], aux)] if aux in {"does", "do", "did"} else [aux, words[at]]
        return " ".join(words[:at]), " ".join([*verb, *words[at + 1 :]])
    asks_for = wh.split()[0] if wh else ""
    if asks_for in {"who", "what", "which"} and (words[0] in _PARTICIPLES or words[0] in _PREPOSITIONS):
        return "", " ".join([aux, *words])
    places = [at for at in range(1, len(words)) if _may_be_participle(words, at)]
    if len(places) == 1:
        return " ".join(words[: places[0]]), " ".join([aux, *words[places[0] :]])
    is_noun = words[0].lower() in _DETERMINERS or words[0][0].isupper() or words[0][0].isdigit()
    if places or not is_noun or any(_is_doing(words, at) for at in range(1, len(words))):
        return None
    if words[-1] in _PREPOSITIONS:
        is_place = len(words) > 2 and words[-1] in {"in", "on", "at"} and words[-2][0].isupper() and " " in wh
        return (" ".join(words[:-1]), f"{aux} {words[-1]}") if is_place else None
    is_bare = wh in {"who", "what"} or (
        (wh in {"where", "when"} or asks_for in _PREPOSITIONS) and not _MAY_BE_ADJECTIVE.fullmatch(words[-1])
    )
    return (" ".join(words), aux) if is_bare else None


def _may_be_verb(words: list[str], at: int) -> bool:
    if words[at] not in _VERBS or not _ends_noun(words[at - 1]):
        return False
    # Many of them are nouns, too, and stand before a verb that is not known here.
    after = words[at + 1] if at + 1 < len(words) else ""
    is_goal = after in _PREPOSITIONS | _DETERMINERS | _PRONOUNS or not after[:1].islower()
    return is_goal or after.endswith(("s", "ly", "ing", "ed"))


def _may_be_participle(words: list[str], at: int) -> bool:
    return words[at] in _PARTICIPLES and _ends_noun(words[at - 1])


def _is_doing(words: list[str], at: int) -> bool:
    """Whether this may belong to the verb: `is` has a second part then, which is not known here."""
    return words[at][0].islower() and words[at].endswith(("ed", "ing")) and _ends_noun(words[at - 1])


def _ends_noun(word: str) -> bool:
    """Whether a subject may end with this word."""
    return word.lower() not in _DETERMINERS | _PREPOSITIONS and not word.endswith("'s")


def _inflect(verb: str, aux: str) -> str:
    """The verb as it stands in a statement where a question has it beside `does`, `do` or `did`."""
    if aux == "do":
        return verb
    if aux == "does":
        if verb == "have":
            return "has"
        if re.search(r"(?:s|x|z|ch|sh|o)$", verb):
            return f"{verb}es"
        return f"{verb[:-1]}ies" if re.search(r"[^aeiou]y$", verb) else f"{verb}s"
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb in _DOUBLED:
        return f"{verb}{verb[-1]}ed"
    if verb.endswith("e"):
        return f"{verb}d"
    return f"{verb[:-1]}ied" if re.search(r"[^aeiou]y$", verb) else f"{verb}ed"
