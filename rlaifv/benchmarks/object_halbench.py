"""Object HalBench (arXiv 2312.00849): CHAIR on objects that a judge lists from each answer.

    python -m rlaifv.benchmarks.object_halbench --answers answers.jsonl --objects instances.json captions.json \\
        --judge NAME --base-url http://localhost:8000/v1 --json

The judge turns an answer into a list of objects; their nouns are looked up in the CHAIR vocabulary, repeated words
of an answer count once, and the published rates are `chair_s_refine` ("response") and `chair_i` ("mention").
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from rlaifv import ROOT
from rlaifv.benchmarks.cli import add_judge_options, cache_of, command, judge_of, run
from rlaifv.benchmarks.judge import Judge, Request, ask_all, prompt_label, published_prompt
from rlaifv.benchmarks.spec import V1, V2, Spec, published
from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import Answer, image_key, read_answers
from rlaifv.evaluation.nouns import SOURCE, is_adjective, is_participle, noun_forms, noun_lemma, tokenize
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams

PROMPT = """\
You are an expert in finding the objects that an answer about an image names.

### Question
{question}

### Answer
{answer}

Take the answer to be correct. List every visible object that the answer says is in the image.
- List only objects that the answer names itself.
- Give the name alone, without color, material, size, number or any other attribute.
- Reply with one JSON list of strings, such as ["dog", "coffee table"], and with [] when there is no object."""

WORDS = (
    ("brother", "person"),
    ("pedestrian", "person"),
    ("coffee table", "dining table"),
    ("remote control", "remote"),
    ("cheesecake", "cake"),
    ("motor bike", "motorcycle"),
)
"""Words that Object HalBench counts beyond CHAIR's own."""

_LONG_ENOUGH = 4  # shorter answers ("Yes it is.") are not shown to the judge: they name nothing
_FUNCTION_WORDS = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "by", "to", "as", "or", "and", "no", "with", "for", "be", "it", "his"]
)
_TAGGER = "en_core_web_trf"


def parse_objects(reply: str) -> list[str] | None:
    """The last JSON list of strings in a reply; None when there is none."""
    for text in reversed(re.findall(r"\[[^\[\]]*\]|\(\s*\)", reply)):
        try:
            objects = json.loads("[]" if text.startswith("(") else text)
        except json.JSONDecodeError:
            continue
        if all(isinstance(name, str) for name in objects):
            return objects
    return None


def phrase_words(phrase: str, vocabulary: chair.Vocabulary) -> list[str]:
    """The vocabulary's two-word phrases in an object's name, else its runs of nouns, each run as one word.

    "wooden dining table" → dining table; "large dog" → dog; "coffee mug" → coffee mug, which is no word of the
    vocabulary, so that no coffee and no cup is counted.
    """
    tokens = [token for token in tokenize(phrase) if any(map(str.isalnum, token))]
    lemmas = [_singular(token) for token in tokens]
    nouns = [_is_noun(tokens, place) for place in range(len(tokens))]
    return _phrases(lemmas, vocabulary) or _runs(lemmas, nouns)


def tagged_words(words: Iterable[tuple[str, str]], vocabulary: chair.Vocabulary) -> list[str]:
    """The same from a tagger's (Penn tag, lemma) pairs, as published."""
    words = list(words)
    lemmas = [lemma for _, lemma in words]
    return _phrases(lemmas, vocabulary) or _runs(lemmas, [tag in ("NN", "NNS", "NNP", "NNPS") for tag, _ in words])


def _phrases(lemmas: Sequence[str], vocabulary: chair.Vocabulary) -> list[str]:
    found, at = [], 0
    while at < len(lemmas):
        phrase = " ".join(lemmas[at : at + 2])
        if phrase in vocabulary.phrases:
            found.append(vocabulary.phrases[phrase])
        at += 2 if phrase in vocabulary.phrases else 1
    return found


def _runs(lemmas: Sequence[str], nouns: Sequence[bool]) -> list[str]:
    """Neighboring nouns, joined."""
    text = " ".join(lemma if noun else "\n" for lemma, noun in zip(lemmas, nouns, strict=True))
    return [run.strip() for run in text.split("\n") if run.strip()]


def _is_noun(tokens: Sequence[str], place: int) -> bool:
    token, last = tokens[place], place == len(tokens) - 1
    if token in _FUNCTION_WORDS or not noun_forms(token):
        return False
    if place and is_participle(token):  # "person standing"
        return False
    return last or not is_adjective(token)


def _singular(token: str) -> str:
    return "man" if token == "men" else noun_lemma(token)


def word_finder(vocabulary: chair.Vocabulary) -> tuple[Callable[[str], list[str]], str]:
    """How an object's name becomes words: by spaCy's en_core_web_trf where installed, as published, else by ours.

    Returns:
        The function, and its name for the settings of a score.
    """
    if find_spec(_TAGGER) is None:
        return (lambda phrase: phrase_words(phrase, vocabulary)), SOURCE
    import spacy

    tagger = spacy.load(_TAGGER)
    return (lambda phrase: tagged_words([(t.tag_, t.lemma_) for t in tagger(f"a {phrase}")], vocabulary)), _TAGGER


def score(
    answers: Sequence[Answer],
    listed: Mapping[int, Sequence[str]],
    objects: Mapping[str, Iterable[str]],
    vocabulary: chair.Vocabulary | None = None,
    words_of: Callable[[str], list[str]] | None = None,
) -> Scores:
    """CHAIR with "unique" counting on listed objects.

    Args:
        answers: the answers.
        listed: position in `answers` → the objects that the answer names; an answer without an entry is missing.
        objects: image id → class names (`chair.load_objects`).
        vocabulary: default CHAIR's with `WORDS`.
        words_of: object name → words (`word_finder`).
    """
    vocabulary = vocabulary or chair.load_vocabulary(extra=WORDS)
    words_of = words_of or (lambda phrase: phrase_words(phrase, vocabulary))
    places = [place for place in range(len(answers)) if place in listed]
    mentions = []
    for place in places:
        words = [word for name in listed[place] for word in words_of(name)]
        mentions.append(chair.known_words(list(dict.fromkeys(words)), vocabulary))
    result = chair.score([answers[place] for place in places], objects, vocabulary, "unique", mentions)
    unlisted = [answers[place].id for place in range(len(answers)) if place not in listed]
    missing = [{"id": identity, "reason": "its objects are not listed"} for identity in unlisted]
    return replace(result, benchmark="object_halbench", missing=[*missing, *result.missing])


def judge_and_score(
    answers: Sequence[Answer],
    objects: Mapping[str, Iterable[str]],
    judge: Judge,
    vocabulary: chair.Vocabulary | None = None,
    cache: str | Path | None = None,
    attempts: int = 3,
    prompt_file: str | Path | None = None,
) -> Scores:
    """Ask the judge for the objects of every answer and score them.

    Answers of three words or fewer name nothing and are not shown to the judge. Answers about unknown images are
    not shown either and listed. An answer that got no list is missing; it neither lowers nor raises a rate.

    Args:
        prompt_file: the published scorer's `eval_gpt_obj_halbench.py`, to use its prompt instead of ours.
    """
    vocabulary = vocabulary or chair.load_vocabulary(extra=WORDS)
    template = published_prompt(prompt_file, "prompt_template") if prompt_file else PROMPT
    known = [answer for answer in answers if image_key(answer.image, objects)]
    unknown = [answer for answer in answers if not image_key(answer.image, objects)]
    listed: dict[int, Sequence[str]] = {}
    places: dict[str, int] = {}
    requests = []
    for place, answer in enumerate(known):
        if len(answer.text.split()) < _LONG_ENOUGH:
            listed[place] = []
            continue
        text = template.replace("{question}", answer.question).replace("{answer}", answer.text)
        identity = answer.id if answer.id not in places else f"{answer.id} (row {place})"
        places[identity] = place
        # the published scorer sends its whole prompt as the system turn
        requests.append(Request(identity, "", text) if prompt_file else Request(identity, text))
    judged = ask_all(requests, judge, parse_objects, cache, attempts)
    listed |= {places[identity]: names for identity, names in judged.verdicts.items()}
    words_of, nouns = word_finder(vocabulary)
    result = score(known, listed, objects, vocabulary, words_of)
    reasons = list(judged.missing)
    reasons += [{"id": answer.id, "reason": chair.unknown_image(answer)} for answer in unknown]
    counts = {**result.counts, "n_unparsed": len(judged.unparsed), "n_without_verdict": len(judged.missing)}
    settings = {
        **result.settings,
        "nouns": nouns,
        "judge": judge.name,
        "prompt": prompt_label(template, bool(prompt_file)),
    }
    return replace(result, counts=counts, settings=settings, missing=reasons)


def score_entry(item: BenchmarkParams, answers: Path, judge: Judge, replies: Path) -> tuple[Scores, list[dict]]:
    """Score one entry of the parameter file (`spec.Scorer`)."""
    given, bad = read_answers(answers)
    vocabulary = chair.load_vocabulary(ROOT / item.vocabulary if item.vocabulary else chair.COCO_WORDS, WORDS)
    objects = chair.load_objects([ROOT / path for path in item.truth], vocabulary, [a.image for a in given])
    prompt = ROOT / item.judge.prompts[0] if item.judge.prompts else None
    return judge_and_score(given, objects, judge, vocabulary, replies, prompt_file=prompt), bad


SPEC = Spec(
    kind="object_halbench",
    score=score_entry,
    headlines=("chair_s_refine", "chair_i", "recall", "mean_words"),
    prompts=1,
    truth=True,
    rows=(
        published("LLaVA-1.5-7B", V1, chair_s_refine=0.536, chair_i=0.252),
        published("LLaVA-1.5-7B", V2, chair_s_refine=0.545, chair_i=0.278),
        published("LLaVA-RLHF 13B", V1, chair_s_refine=0.381, chair_i=0.189),
        published("OmniLMM-12B", V1, chair_s_refine=0.194, chair_i=0.109),
        published("RLAIF-V 7B", V1, chair_s_refine=0.085, chair_i=0.043),
        published("RLAIF-V 7B", V2, chair_s_refine=0.105, chair_i=0.052),
        published("RLAIF-V 7B, best of N", V2, chair_s_refine=0.068, chair_i=0.038),
        published("RLAIF-V 12B", V1, chair_s_refine=0.045, chair_i=0.029),
        published("GPT-4V", V1, chair_s_refine=0.136, chair_i=0.073),
    ),
    protocol={
        "judge": "gpt-3.5-turbo-0613",
        "prompt": "published",
        "nouns": "en_core_web_trf",
        "vocabulary": "synonyms_refine.txt",
        "n": 300,
    },
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, ask, score, print."""
    parser = command("object_halbench", "Object HalBench: CHAIR on the objects that a judge lists from each answer")
    parser.add_argument("--objects", required=True, nargs="+", help="COCO instances and captions, or {image: [names]}")
    parser.add_argument("--vocabulary", default=chair.COCO_WORDS, help="a synonym table (default: ours)")
    add_judge_options(parser)
    options = parser.parse_args(arguments)

    def scorer(path):
        vocabulary = chair.load_vocabulary(options.vocabulary, WORDS)
        answers, bad = read_answers(path)
        objects = chair.load_objects(options.objects, vocabulary, [answer.image for answer in answers])
        cache, prompt = cache_of(options, path), options.published_prompt
        return judge_and_score(answers, objects, judge_of(options), vocabulary, cache, options.attempts, prompt), bad

    run(options, scorer, SPEC)


if __name__ == "__main__":
    main()
