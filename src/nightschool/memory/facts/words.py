"""The words by which simple English sentences are taken apart. All lists are in lower case."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _phrases(text: str) -> frozenset[str]:
    return frozenset(" ".join(phrase.split()) for phrase in text.split(","))


PREPOSITIONS = _words(
    """
    about after as at by for from in into near of on to under with
    """
)

VERBS = _words(
    """
    adores affects attends authored became belongs borders bought built causes coaches collects comes commands
    communicated contains cooks created dances dates defeated designed detests develops died directed discovered
    dislikes drinks drives eats employs enjoys enters exports fears features follows founded graduated grew has
    hates heads held hosts imports includes invented joined keeps knows lacks leads learned likes lives loves
    maintains makes manages married means moved needs opens orbits owns paints passed played plays practices prefers
    produced produces published reads represents resides rides runs says sells serves shares signed sings speaks
    specializes spoke stands starred starts studied studies supports takes taught teaches trains travels treats
    understands uses visited visits volunteers wears weighs won worked works wrote
    """
)
"""Verbs that may stand between subject and value, with a preposition behind them or not."""

BEING = _words(
    """
    are is was were
    """
)

DESCRIBING = _words(
    """
    affiliated afraid allergic available based born built buried capable certain close composed descended different
    directed driven employed engaged equal famous followed fond founded full good headquartered held hosted
    interested known led located made married named native owned painted part proud published related responsible
    similar situated sold spoken sung taught used written
    """
)
"""Words that follow `is` or `was` and go on with a preposition: born in, married to. So do those that end in `ed`."""

KINDS = _words(
    """
    branch child citizen colleague example fan follower form friend instance kind member native neighbor neighbour
    part partner relative resident sibling student subclass supporter type
    """
)
"""What one of several is called: `is a member of the board`."""

ADVERBS = _words(
    """
    already also currently now often originally presently recently still today usually
    """
)
"""Words between subject and verb that change nothing about the fact."""

NO_SUBJECTS = _words(
    """
    after although and at because before but by during everyone for from he her here his how i if in it its maybe my
    nobody not nothing on or our perhaps she since so somebody someone something that their then there these they
    this those today tomorrow we what when where which while who why with yesterday you your
    """
)
"""Words that no subject begins with: pronouns stand for something that an entry alone does not say."""

DOUBTS = _words(
    """
    allegedly almost although aren't because believes but can't cannot claims could didn't doesn't don't formerly
    hadn't hasn't hopes if isn't longer may maybe might must nearly never no nor not perhaps possibly previously
    probably said says should that think thinks unless used wants wasn't weren't whereas whether which who whom
    whose will won't would
    """
)
"""Words after which a sentence does not plainly state what its verb says."""

OPENINGS = _words(
    """
    again also however instead later meanwhile next once soon still therefore thus
    """
)
"""Words that open a sentence before a comma."""

# Ways of saying the same relation. What they mean is what decides which values contradict each other.
SAME_RELATIONS = {
    "is an": "is a",
    "was an": "was a",
    "is a part of": "is part of",
    "resides in": "lives in",
    "is living in": "lives in",
    "moved to": "lives in",
    "has moved to": "lives in",
    "relocated to": "lives in",
    "is employed by": "works for",
    "is employed at": "works at",
    "is wed to": "is married to",
    "got married to": "is married to",
    "married": "is married to",
    "is situated in": "is located in",
    "capital city": "capital",
    "mother tongue": "native language",
    "mom": "mother",
    "mum": "mother",
    "dad": "father",
    "headquarter": "headquarters",
}

SINGLE_VALUED = _phrases(
    """
    became, belongs to, comes from, costs, died in, died of, died on, drives, follows, graduated from, grew up in,
    heads, leads, lives at, lives in, lives on, lives with, means, plays as, plays for, plays the position of,
    plays the sport of, ranks, reports to, retired in, serves as, stands in, weighs, works as, works at, works for,
    works in, works in the field of
    """
)
"""Relations with a verb that have one value at a time."""

MULTI_VALUED = _phrases(
    """
    allergic to, allergy, are a, author of, award received, awards, brother, cast member, child, children, daughter,
    diplomatic relation, educated at, field of work, friend, friend of, friends, genre, has child, has part,
    has sibling, hobbies, hobby, instance of, is a, is a child of, is a colleague of, is a fan of, is a form of,
    is a friend of, is a kind of, is a member of, is a part of, is a relative of, is a sibling of, is a subclass of,
    is a supporter of, is a type of, is afraid of, is allergic to, is an, is an example of, is an instance of,
    is composed of, is famous for, is fond of, is full of, is interested in, is known for, is made of, is member of,
    is part of, is related to, is sold in, is spoken in, is taught by, is used by, is used for, is used in,
    languages spoken, member of, notable work, occupation, official language, part of, profession, sibling, sister,
    son, subclass of, twinned administrative body, was a, was an
    """
)
"""Relations without a verb, or with `is`, that have several values at a time."""
