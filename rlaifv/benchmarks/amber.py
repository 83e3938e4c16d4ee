"""AMBER (arXiv 2311.07397): descriptions and yes/no questions about annotated images, without a judge.

    python -m rlaifv.benchmarks.amber --answers answers.jsonl --data DIR --json

DIR holds AMBER's `annotations.json`, `relation.json` and `safe_words.txt` (`rlaifv.benchmarks.fetch amber`).
Descriptions (ids 1-1004) and yes/no answers may lie in one file; each is scored for what it is.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlaifv import ROOT
from rlaifv.benchmarks.cli import command, run
from rlaifv.benchmarks.pope import yes_no_rates
from rlaifv.benchmarks.spec import V1, Spec, published
from rlaifv.evaluation.answers import Answer, lookup, read_answers
from rlaifv.evaluation.nouns import SOURCE, text_nouns
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams

_GENERATIVE = "generative"
_ID_FIELDS = ("question_id", "id", "qid")
_KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
}  # every other type is a relation
_GROUPS = {
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}

Similar = Callable[[str, str], bool]


@dataclass(frozen=True)
class Annotations:
    """What AMBER knows.

    Attributes:
        images: question id → {"type", "truth", "hallu"} of `annotations.json`.
        associations: word → words that count as it, of `relation.json`.
        safe_words: words that are never counted as hallucinated.
    """

    images: Mapping[str, Mapping]
    associations: Mapping[str, Sequence[str]]
    safe_words: frozenset[str]


def read_annotations(folder: str | Path) -> Annotations:
    """AMBER's three files, from their folder (or by the path of its annotations.json).

    Raises:
        FileNotFoundError: one is missing; says which and how to get it.
    """
    folder = Path(folder).parent if Path(folder).name == "annotations.json" else Path(folder)
    for name in ("annotations.json", "relation.json", "safe_words.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {folder / name}: run `python -m rlaifv.benchmarks.fetch amber`")
    try:
        rows = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        associations = json.loads((folder / "relation.json").read_text(encoding="utf-8"))
        safe = (folder / "safe_words.txt").read_text(encoding="utf-8").splitlines()
        images = {str(row["id"]): row for row in rows}
        if any(not {"type", "truth"} <= set(row) for row in rows):
            raise KeyError("a row without type or truth")
        return Annotations(images, dict(associations), frozenset(filter(None, safe)))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the files in {folder} are not AMBER's ({error}): remove them and fetch them again") from None


def spacy_similar(model: str = "en_core_web_lg", threshold: float = 0.8) -> Similar:
    """Word similarity as published, by the vectors of an installed spaCy model.

    Raises:
        ModuleNotFoundError: the model is not installed.
    """
    import spacy

    if not spacy.util.is_package(model):
        raise ModuleNotFoundError(f"the spaCy model {model} is not installed: python -m spacy download {model}")
    vectors = spacy.load(model)
    return lambda first, second: vectors(first).similarity(vectors(second)) > threshold


def score(answers: Iterable[Answer], annotations: Annotations, similar: Similar | None = None) -> Scores:
    """Score descriptions and yes/no answers.

    Descriptions, with the nouns of an answer that AMBER's associations know:

    - chair: nouns that are neither safe, true nor associated with something true / all such nouns
    - cover: true objects that the answers name / all true objects
    - hal: share of answers with a hallucinated noun
    - cog: objects that annotators expected to be imagined and that were / all such objects

    Yes/no answers: accuracy, precision, recall, F1, overall and by type. The positive class is "no", and only
    the exact answers "Yes" and "No" count; another answer is wrong.

    Args:
        answers: ids are AMBER's.
        similar: whether two words mean the same, by word vectors as published (default: only equal words do).

    Returns:
        Scores; answers without an id or with one that AMBER does not have, and second answers, are listed as missing.
    """
    known = frozenset(annotations.associations).union(*annotations.associations.values())
    rows, seen = [], set()
    answers, missing = _with_ids(list(answers))
    for answer in answers:
        image = annotations.images.get(answer.id)
        if image is None or answer.id in seen:
            reason = "AMBER has no such id" if image is None else "a second answer to this id"
            missing.append({"id": answer.id, "reason": reason})
            continue
        seen.add(answer.id)
        if image["type"] == _GENERATIVE:
            nouns = [noun for noun in text_nouns(answer.text) if noun in known]
            rows.append({"id": answer.id, "kind": _GENERATIVE, **_description(nouns, image, annotations, similar)})
            rows[-1]["words"] = len(answer.text.split())
        else:
            given, label = {"Yes": "yes", "No": "no"}.get(answer.text, "neither"), image["truth"]
            kind = _KINDS.get(image["type"], "relation")
            row = {"id": answer.id, "kind": kind, "label": label, "answer": given, "correct": given == label}
            rows.append(row)

    def add_up(count: Callable[[Mapping], float]) -> list[float]:
        return [count(row) if row["kind"] == _GENERATIVE else 0 for row in rows]

    described = add_up(lambda row: 1)
    rates: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    if any(described):
        rates = {
            "chair": (add_up(lambda row: len(row["hallucinated"])), add_up(lambda row: len(row["nouns"]))),
            "cover": (add_up(lambda row: row["covered"]), add_up(lambda row: row["truth"])),
            "hal": (add_up(lambda row: bool(row["hallucinated"])), described),
            "cog": (add_up(lambda row: row["imagined"]), add_up(lambda row: row["imaginable"])),
            "mean_words": (add_up(lambda row: row["words"]), described),
        }
    asked = [row if row["kind"] != _GENERATIVE else {**row, "label": "", "answer": "", "correct": 0} for row in rows]
    n_asked = len(rows) - sum(described)
    if n_asked:
        rates |= _by_type(asked)
    types = [image["type"] for image in annotations.images.values()]
    counts = {
        "n": len(rows),
        "n_descriptions": sum(described),
        "n_yes_no": n_asked,
        "n_neither_yes_nor_no": sum(row["answer"] == "neither" for row in asked),
    }
    settings = {
        "covers": f"{sum(described)} of {types.count(_GENERATIVE)} descriptions, "
        f"{n_asked} of {len(types) - types.count(_GENERATIVE)} yes/no questions",
        "nouns": SOURCE,
        "similarity": "word vectors" if similar else "equal words only",
    }
    return Scores("amber", rows, rates, counts, settings, missing)


def _with_ids(answers: Sequence[Answer]) -> tuple[list[Answer], list[dict]]:
    """Answers under AMBER's ids, and those that have none, with reasons.

    A row's number is no id. Description n is about image n, so a row that only names its image is a description,
    unless several such rows name one image: these answer the yes/no questions, and nothing says which.
    """
    identified = [not answer.record or bool(lookup(answer.record, _ID_FIELDS)) for answer in answers]
    numbers = [Path(answer.image).stem.removeprefix("AMBER_") for answer in answers]
    unnamed = Counter(number for number, known in zip(numbers, identified, strict=True) if not known)
    found, missing = [], []
    for place, (answer, known, number) in enumerate(zip(answers, identified, numbers, strict=True)):
        if known:
            found.append(answer)
        elif number and unnamed[number] == 1:
            found.append(replace(answer, id=number))
        else:
            reason = f"answer {place + 1} of the file has no id; give AMBER's as id or question_id"
            missing.append({"id": answer.id, "reason": reason})
    return found, missing


def _by_type(rows: Sequence[Mapping]) -> dict[str, tuple[list[int], list[int]]]:
    """Yes/no rates over all types and for each; "yes_ratio" only overall."""
    rates = yes_no_rates(rows, positive="no", chosen=lambda row: row["kind"] != _GENERATIVE)
    for group, kinds in _GROUPS.items():
        for name, sums in yes_no_rates(rows, "no", lambda row, kinds=kinds: row["kind"] in kinds).items():
            if name != "yes_ratio":
                rates[f"{group}_{name}"] = sums
    return rates


def _description(
    nouns: Sequence[str], image: Mapping, annotations: Annotations, similar: Similar | None
) -> dict[str, int | list[str]]:
    """What the nouns of one description say of the image: as in AMBER's `inference.py`."""
    truth, imaginable = _targets(image["truth"], annotations), _targets(image["hallu"], annotations)
    covered, imagined, wrong = set(), set(), []
    for noun in nouns:
        if noun in annotations.safe_words:
            continue
        if noun in truth:
            covered.add(truth[noun])
            continue
        near = _first_similar(noun, imaginable, similar)
        imagined |= {imaginable[word] for word in (noun, near) if word in imaginable}
        near = _first_similar(noun, truth, similar)
        if near is None:
            wrong.append(noun)
        else:
            covered.add(truth[near])
    return {
        "nouns": list(nouns),
        "hallucinated": wrong,
        "covered": len(covered),
        "truth": len(image["truth"]),
        "imagined": len(imagined),
        "imaginable": len(image["hallu"]),
    }


def _targets(objects: Sequence[str], annotations: Annotations) -> dict[str, int]:
    """Every word that names one of the objects → its position; associated words first, as published."""
    words: dict[str, int] = {}
    for place, name in enumerate(objects):
        for word in annotations.associations.get(name, ()):
            words.setdefault(word, place)
    for place, name in enumerate(objects):
        words.setdefault(name, place)
    return words


def _first_similar(noun: str, words: Iterable[str], similar: Similar | None) -> str | None:
    return next((word for word in words if similar(noun, word)), None) if similar else None


def score_entry(item: BenchmarkParams, answers: Path, judge: None, replies: Path) -> tuple[Scores, list[dict]]:
    """Score one entry of the parameter file (`spec.Scorer`)."""
    given, bad = read_answers(answers)
    return score(given, read_annotations(ROOT / item.truth[0])), bad


SPEC = Spec(
    kind="amber",
    score=score_entry,
    headlines=("chair", "hal", "cog", "cover", "mean_words", "accuracy", "f1", "yes_ratio"),
    truth=True,
    rows=(
        published("LLaVA-1.5-7B", V1, accuracy=0.735, f1=0.776),
        published("LLaVA-RLHF 13B", V1, accuracy=0.797, f1=0.839),
        published("OmniLMM-12B", V1, accuracy=0.865, f1=0.895),
        published("RLAIF-V 7B", V1, accuracy=0.768, f1=0.845),
        published("RLAIF-V 12B", V1, accuracy=0.880, f1=0.909),
        published("GPT-4V", V1, accuracy=0.834, f1=0.874),
    ),
    protocol={"n_yes_no": 14216},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, score, print."""
    parser = command("amber", "AMBER: hallucination in descriptions and in yes/no answers, without a judge")
    parser.add_argument(
        "--data", "--annotations", required=True, help="folder of annotations.json, relation.json, safe_words.txt"
    )
    parser.add_argument("--vectors", help="an installed spaCy model with word vectors, as published: en_core_web_lg")
    options = parser.parse_args(arguments)

    def scorer(path):
        answers, bad = read_answers(path)
        similar = spacy_similar(options.vectors) if options.vectors else None
        return score(answers, read_annotations(options.data), similar), bad

    run(options, scorer, SPEC)


if __name__ == "__main__":
    main()
