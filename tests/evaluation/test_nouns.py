"""Noun lemmas and tokens are those of WordNet and NLTK, on which published scores rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaifv.evaluation.nouns import noun_forms, noun_lemma, tokenize


@pytest.mark.parametrize(
    ("word", "lemma"),
    [
        ("dogs", "dog"),
        ("knives", "knife"),
        ("women", "woman"),
        ("children", "child"),
        ("people", "people"),
        ("glasses", "glass"),
        ("buses", "bus"),
        ("geese", "goose"),
        ("skis", "ski"),
        ("sandwiches", "sandwich"),
        ("scissors", "scissors"),
        ("smartphones", "smartphones"),  # no word of WordNet 3
    ],
)
def test_a_noun_lemma_is_wordnets(word, lemma):
    assert noun_lemma(word) == lemma


def test_verbs_are_not_lemmatized_so_nobody_seated_becomes_a_chair():
    assert noun_lemma("seated") == "seated"
    assert noun_lemma("parked") == "parked"


def test_men_stays_men_as_in_the_published_scores():
    assert noun_lemma("men") == "men"
    assert noun_forms("men") == ("men", "man")


def test_tokens_are_those_of_the_penn_treebank():
    text = "The dog's bed, unmade. A \"cat\" isn't there... at 5:30 (mid-air); 3,000 cups!\n\nNo table.The end"
    assert tokenize(text) == [
        *["the", "dog", "'s", "bed", ",", "unmade", ".", "a", '"', "cat", '"', "is", "n't", "there", "..."],
        *["at", "5:30", "(", "mid-air", ")", ";", "3,000", "cups", "!", "no", "table.the", "end"],
    ]


@given(st.text(max_size=200))
def test_tokens_lose_no_letter(text):
    assert "".join(tokenize(text)) == "".join(text.lower().split())
