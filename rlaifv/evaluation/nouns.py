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
_OPENING = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=[^' ])(?:'(?:s|m|d|ll|re|ve)|n't|')(?=\s|$)", re.IGNORECASE)

_DETERMINER = re.compile("a|an|the|this|that|these|those|his|her|its|their|my|your|our|another")
_BEFORE_VERB = re.compile(
    "to|can|could|will|would|may|might|must|should|do|does|did|not|n't|he|she|it|they|we|you|i|who"
)
_GERUND = re.compile("painting|drawing|sailing")  # things as well as activities
_CAN_OF = re.compile("a|the|trash|garbage|tin|soda|beer|watering|spray")


def tokenize(text: str, lower: bool = True) -> list[str]:
    """Penn Treebank tokens, lower-cased by default: "The dog's bed, unmade." → the dog 's bed , unmade .

    Hyphens and slashes do not split ("mid-air", "man/woman" stay whole), as in NLTK. Every stop before white
    space is a token of its own; NLTK keeps it on abbreviations ("mr."), none of which names an object.
    """
    text = _QUOTES.sub(r" \g<0> ", _STOP.sub(" . ", text.lower() if lower else text))
    text = _SYMBOL.sub(r" \g<0> ", _COMMA.sub(r" \g<0> ", text))
    return _CLITIC.sub(r" \g<0>", _OPENING.sub(r"' ", text)).split()


@cache
def _tables() -> tuple[dict[str, frozenset[str]], dict[str, list[str]], list[list[str]]]:
    """WordNet's words by kind ("noun", "verb", "adj"), its irregular plurals, and morphy's ending rules."""
    package = find_spec("spacy_lookups_data")
    if package is None:
        raise ModuleNotFoundError("noun lemmas need the package spacy-lookups-data: pip install spacy-lookups-data")
    data = Path(package.submodule_search_locations[0]) / "data"

    def table(name: str):
        with gzip.open(data / f"en_lemma_{name}.json.gz", "rt", encoding="utf-8") as file:
            return json.load(file)

    index = {kind: frozenset(words) for kind, words in table("index").items()}
    return index, table("exc")["noun"], table("rules")["noun"]


@cache
def noun_forms(word: str) -> tuple[str, ...]:
    """WordNet's nouns that `word` can be a form of, in morphy's order; none for a word that is no noun."""
    index, irregular, rules = _tables()

    def known(forms: list[str]) -> tuple[str, ...]:
        return tuple(form for form in dict.fromkeys(forms) if form in index["noun"])

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


def is_adjective(word: str) -> bool:
    """Whether WordNet lists the word as an adjective (as well)."""
    return word in _tables()[0]["adj"]


def text_nouns(text: str) -> list[str]:
    """Lemmas of the words of a text that are nouns where they stand, in order, upper case kept.

    A handful of rules for words that also are verbs ("to board", "she skates", "can be seen", "sailing on")
    or adjectives ("hot air balloons"): enough for closed vocabularies of objects, and nothing to download.
    """
    words = tokenize(text, lower=False)
    neighbors = zip(["", *words], words, [*words[1:], ""], strict=False)
    return [noun_lemma(word) for before, word, after in neighbors if _is_noun(before.lower(), word, after)]


def _is_noun(before: str, word: str, after: str) -> bool:
    if word == "can":
        return bool(_CAN_OF.fullmatch(before)) and after not in ("be", "also")
    if _GERUND.fullmatch(word):
        return bool(_DETERMINER.fullmatch(before)) or is_adjective(before)
    if _BEFORE_VERB.fullmatch(before) and noun_lemma(word) in _tables()[0]["verb"]:
        return False
    return word != "hot" and bool(noun_forms(word))


def is_participle(word: str) -> bool:
    """Whether the word is a verb's -ing or -ed form ("standing", "parked")."""
    verbs = _tables()[0]["verb"]
    stem = word.removesuffix("ing").removesuffix("ed")
    return stem != word and len(stem) > 2 and bool({stem, stem + "e", stem[:-1]} & verbs)
