"""The words that the examiner knows."""

from __future__ import annotations


def word_list(text: str) -> frozenset[str]:
    """Words that are written with spaces between them."""
    return frozenset(text.split())


def _word_map(text: str) -> dict[str, str]:
    """`b=a`: what is read as what."""
    return dict(pair.split("=") for pair in text.split())


ARTICLES = word_list("a an the")
HEDGES = word_list("or either but instead rather than maybe perhaps possibly probably formerly oder ou vielleicht")
TAKES_BACK = word_list("no not actually sorry wait or correction")
ASSENTS = word_list("yes yeah sure ok okay certainly")
INTERJECTIONS = ASSENTS | word_list("well right")
CONJUNCTIONS = word_list("and where who which because since while when")
MAGNITUDES = word_list("hundred thousand million billion trillion dozen percent")
FUNCTION_WORDS = word_list(
    "a an the i you he she it we they his her its their my your our this that these those there here in "
    "on at to of for from by with as into and is are was were be been being am do does did has have had "
    "will would can could may might shall should who whom which what where when how"
)

# --- English ---

ENGLISH = word_list(
    "the is are does did of what which who whom whose where when why how can may must should has have tell name to"
)
"""Words by which a question is known to be an English one."""
AUXILIARIES = word_list(
    "is are was were be been being am do does did has have had will would can could may might shall should must"
)
SMALL_WORDS = FUNCTION_WORDS | word_list(
    "but or must whose why about up down out off over only also just so than then if each every per some any all both more most "
    "very own one's s not back near me us him them what's it's exactly called"
)
PRONOUNS = word_list(
    "i you he she it we they it's he's she's they're that's there who which where that this these those"
)
PLAIN_VERBS = word_list(
    "work call name keep hold live lie stand come go get take need use cost belong contain consist include locate situate "
    "base make become serve happen mean give have be know find reside bear require weigh spend store provide"
)
"""Stems of verbs that join a subject to what is said of it and carry nothing themselves."""
NO_NAMES = word_list("nobody everybody everyone anybody anyone somebody someone none nothing everything all only no")
TITLES = word_list("mr mrs ms dr prof professor sir lady captain president king queen saint st mayor duke british")
COMPANY = word_list("corporation inc ltd company co group gmbh plc llc interactive entertainment")
UNSURE = word_list(
    "maybe perhaps possibly probably might believed attributed supposedly allegedly either unclear unknown debated guess "
    "think believe formerly instead rather seems seem apparently evidence considered unsure likely unlikely"
)
COMPARED = word_list("than least most over under nearly almost up")
COMPARED_BEHIND = word_list("than more less fewer away apart ago later earlier")
DENIED = word_list("unable forbidden prohibited impossible")
CONTRARY = word_list("but however though although actually no instead")

READ_AS = _word_map(
    "metre=meter litre=liter kilometre=kilometer centimetre=centimeter millimetre=millimeter centre=center theatre=theater "
    "colour=color harbour=harbor neighbour=neighbor grey=gray catalogue=catalog programme=program snowplough=snowplow "
    "plough=plow aeroplane=airplane fall=autumn soccer=football bro=brother feet=foot children=child men=man women=woman "
    "people=person got=get held=hold kept=keep made=make took=take taken=take came=come went=go gave=give given=give "
    "paid=pay lost=lose found=find wrote=write written=write spoke=speak spoken=speak taught=teach led=lead built=build "
    "said=say left=leave sold=sell bought=buy met=meet began=begin ran=run won=win sent=send told=tell born=bear stood=stand "
    "lay=lie grew=grow grown=grow drove=drive driven=drive has=have had=have"
)
"""Stems of American spellings, and of verbs and nouns that do not end as others do."""
UNITS = _word_map(
    "m=meter km=kilometer cm=centimeter mm=millimeter kg=kilogram g=gram lb=pound ft=foot mi=mile gb=gigabyte mb=megabyte "
    "tb=terabyte l=liter ha=hectare h=hour hr=hour min=minute sec=second usd=dollar eur=euro gbp=pound c=celsius f=fahrenheit "
    "cent=cent kilo=kilogram"
)
"""Stems of abbreviations behind a number."""
MONTHS = tuple("january february march april may june july august september october november december".split())  # noqa: SIM905
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: number for number, word in enumerate(_SMALL.split())} | {
    word: 10 * number for number, word in enumerate(_TENS.split(), start=2)
}
