"""Facts: reading them from files and sentences, writing them as statements, and telling what they are about.

as_fact(new)                a new entry, cleaned, with its subject, relation and value, and its canonical statement
key_of(words)               the normalised form under which two ways of writing a name or a relation are one
"""

from nightschool.memory.facts.normalise import key_of
from nightschool.memory.facts.statements import Fact, as_fact

__all__ = ["Fact", "as_fact", "key_of"]
