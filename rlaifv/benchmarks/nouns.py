"""Words and noun lemmas as WordNet and NLTK give them, without NLTK and without a download.

Published hallucination scores rest on `nltk.word_tokenize` and on `WordNetLemmatizer().lemmatize(word)`. The
lemma tables here are WordNet 3's own, shipped by the package spacy-lookups-data; only the noun part is read.
Verbs are deliberately not lemmatized: "seated" would become "seat", hence a chair: points too many.
"""

import gzip
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SOURCE = "WordNet noun lemmas (spacy-lookups-data), Treebank tokens"
"""What made the nouns, in words: stated beside every score."""

_QUOTES = re.compile(r"[«»“”‘’„`\"]|''")
_COMMA = re.compile(r"[:,](?!\d)")
_SYMBOL = re.compile(r"\.{2,}|--|[;@#$%&?!*()\[\]{}<>‒-―]")
_STOP = re.compile(r"(?<=[^\s.])\.(?=[)\]}>\"'»”’]*(?:\s|$))")
_OPENING = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
_CLITIC = re.compile(r"(?<=[^' ])(?:'(?:s|m|d|ll|re|ve)|n't|')(?=\s|$)")


def tokenize(text: str) -> list[str]:
    """Lower-cased Penn Treebank tokens: "the dog's bed, unmade." → the dog 's bed , unmade .

    Hyphens and slashes do not split ("mid-air", "man/woman" stay whole), as in NLTK. Every stop before white
    space is a token of its own; NLTK keeps it on abbreviations ("mr."), none of which names an object.
    """
    text = _QUOTES.sub(r" \g<0> ", _STOP.sub(" . ", text.lower()))
    text = _SYMBOL.sub(r" \g<0> ", _COMMA.sub(r" \g<0> ", text))
    return _CLITIC.sub(r" \g<0>", _OPENING.sub(r"' ", text)).split()


@cache
def _tables() -> tuple[frozenset[str], dict[str, list[str]], list[tuple[str, str]]]:
    """WordNet's nouns, its irregular plurals, and the ending rules of its morphy."""
    package = find_spec("spacy_lookups_data")
    if package is None:
        raise ModuleNotFoundError("noun lemmas need the package spacy-lookups-data: pip install spacy-lookups-data")
    data = Path(package.submodule_search_locations[0]) / "data"

    def table(name: str):
        with gzip.open(data / f"en_lemma_{name}.json.gz", "rt", encoding="utf-8") as file:
            return json.load(file)["noun"]

    return frozenset(table("index")), table("exc"), [tuple(rule) for rule in table("rules")]


@cache
def noun_forms(word: str) -> tuple[str, ...]:
    """WordNet's nouns that `word` can be a form of, in morphy's order; none for a word that is no noun."""
    nouns, irregular, rules = _tables()

    def known(forms: list[str]) -> tuple[str, ...]:
        return tuple(form for form in dict.fromkeys(forms) if form in nouns)

    def shorten(forms: list[str]) -> list[str]:
        return [form[: -len(end)] + new for form in forms for end, new in rules if form.endswith(end)]

    if word in irregular:
        return known([word, *irregular[word]])
    forms = shorten([word])
    found = known([word, *forms])
    while forms and not found:
        forms = shorten(forms)
        found = known(forms)
    return found


def noun_lemma(word: str) -> str:
    """The noun lemma that NLTK's WordNetLemmatizer gives: the shortest form, or the word where there is none.

    "men" stays "men" (WordNet lists it as a noun of the same length as "man"); published CHAIR scores contain
    this, so it is kept.
    """
    return min(noun_forms(word), key=len, default=word)
