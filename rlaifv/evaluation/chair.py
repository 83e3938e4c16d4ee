"""CHAIR (arXiv 1809.02156): the objects that an answer names and that are not in the image.

    python -m rlaifv.benchmarks.chair --answers answers.jsonl --objects instances.json captions.json --json

Words are looked up in a vocabulary of the 80 COCO classes; the truth of an image is its annotated classes and
those that its reference captions name. Two ways to count, both published:

- "original": every mention counts, all answers are in the denominator of the response rate.
- "unique": an answer's repeated surface words count once, as in Object HalBench (there a judge lists the
  objects: `rlaifv.benchmarks.object_halbench`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlaifv.evaluation.answers import (
    IMAGE_FIELDS,
    Answer,
    coco_number,
    image_key,
    image_keys,
    read_json_objects,
)
from rlaifv.evaluation.nouns import SOURCE, noun_lemma, tokenize
from rlaifv.evaluation.scores import Scores

COCO_WORDS = Path(__file__).with_name("coco_vocabulary.txt")

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_PHRASES = {
    "home plate": "home plate",  # no plate of the class, and no word of the vocabulary
    "train track": "train track",  # no train
    "motor bike": "motor bike",  # no bicycle; a motorcycle where the table lists it
    "toilet seat": "toilet",  # no chair
    "bow tie": "tie",
    "passenger jet": "jet",
    "passenger train": "train",
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},  # no person
}
COUNTINGS = ("original", "unique")


@dataclass(frozen=True)
class Vocabulary:
    """Which words name which class.

    Attributes:
        name: where it came from; stated beside every score.
        classes: word or two-word phrase, singular and lower case → class.
        phrases: two words → the word that counts for them; matched before single words.
    """

    name: str
    classes: Mapping[str, str]
    phrases: Mapping[str, str]


@cache
def load_vocabulary(path: str | Path = COCO_WORDS, extra: tuple[tuple[str, str], ...] = ()) -> Vocabulary:
    """Read a synonym table: one class a line, comma and blank between the words, the class name first.

    Reads our own table and the published ones (LisaAnne/Hallucination `synonyms.txt`, RLAIF-V
    `synonyms_refine.txt`). As there, only the line's ends are stripped: a word behind two blanks ("
    cheesecake" of the first table) never matches, and published scores depend on it. Lines that start with #
    and empty lines are skipped.

    Args:
        path: the table.
        extra: further (word, class) pairs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a table without a class, or an extra word of an unknown class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary at {path}: expected a text file, one class and its synonyms a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text: expected one class and its synonyms a line") from None
    classes: dict[str, str] = {}
    for line in lines:
        words = line.strip().split(", ")
        if words[0] and not line.startswith("#"):
            classes |= dict.fromkeys(words, words[0])
    if not classes:
        raise ValueError(f"{path} names no class: expected one class and its synonyms a line, a comma between them")
    for word, name in extra:
        if name not in classes.values():
            raise ValueError(f"{path} has no class {name!r} for the extra word {word!r}")
        classes[word] = name
    phrases = {word: word for word in classes if word.count(" ") == 1}
    return Vocabulary(path.name, classes, {**phrases, **_PHRASES})


def known_words(words: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """The words and phrases that name a class of the vocabulary."""
    if "toilet" in words:  # "the seat of the toilet" is no chair
        words = [word for word in words if word != "seat"]
    return [word for word in words if word in vocabulary.classes]


def find_mentions(text: str, vocabulary: Vocabulary) -> list[str]:
    """Every word of a text that names a class, in order, repetitions included; phrases before single words."""
    return mentions_of([noun_lemma(token) for token in tokenize(text)], vocabulary)


def mentions_of(lemmas: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """`find_mentions` of a text that somebody else has split and lemmatized; phrases may be joined already."""
    words, at = [], 0
    while at < len(lemmas):
        phrase = " ".join(lemmas[at : at + 2])
        words.append(vocabulary.phrases.get(phrase, lemmas[at]))
        at += 2 if phrase in vocabulary.phrases else 1
    return known_words(words, vocabulary)


def score(
    answers: Iterable[Answer],
    objects: Mapping[str, Iterable[str]],
    vocabulary: Vocabulary | None = None,
    counting: str = "original",
    mentions: Sequence[Sequence[str]] | None = None,
) -> Scores:
    """Score answers against the objects of their images (arXiv 1809.02156, equations 1 and 2).

    With M the mentions of an answer, gt the classes in its image, and B those of M whose class is not in gt:

    - chair_s: share of answers with B ≠ ∅; chair_s_refine: the same among answers with M ≠ ∅
    - chair_i: Σ|B| / Σ|M|
    - recall: Σ|classes(M) ∩ gt| / Σ|gt|
    - mean_words: words an answer, separated by white space

    An empty answer is an answer, without mentions.

    Args:
        answers: any number an image.
        objects: image id → class names (`load_objects`).
        vocabulary: default our table of the 80 COCO classes.
        counting: "original" or "unique".
        mentions: one list of the vocabulary's words an answer, found otherwise (by a judge); default: in the text.

    Returns:
        Scores; answers about images that `objects` does not know are listed as missing and count nowhere.

    Raises:
        ValueError: an unknown way to count, or not one list of mentions an answer.
    """
    if counting not in COUNTINGS:
        raise ValueError(f"counting={counting!r}: expected one of {', '.join(COUNTINGS)}")
    vocabulary = vocabulary or load_vocabulary()
    rows, missing = [], []
    answers = list(answers)
    if mentions is None:
        mentions = [find_mentions(answer.text, vocabulary) for answer in answers]
    for answer, found in zip(answers, mentions, strict=True):
        key = image_key(answer.image, objects)
        if key is None:
            missing.append({"id": answer.id, "image": answer.image, "reason": unknown_image(answer)})
            continue
        truth = {vocabulary.classes.get(name, name) for name in objects[key]}
        found = list(dict.fromkeys(found)) if counting == "unique" else list(found)
        wrong = [word for word in found if vocabulary.classes[word] not in truth]
        named = {vocabulary.classes[word] for word in found}
        rows.append(
            {
                "id": answer.id,
                "image_id": key,
                "words": len(answer.text.split()),
                "mentions": found,
                "classes": sorted(named),
                "hallucinated": wrong,
                "hallucinated_classes": sorted(named - truth),
                "covered": sorted(named & truth),
                "truth": sorted(truth),
            }
        )
    ones = [1] * len(rows)
    wrong_answers = [int(bool(row["hallucinated"])) for row in rows]
    wrong_mentions = [len(row["hallucinated"]) for row in rows]
    all_mentions = [len(row["mentions"]) for row in rows]
    rates = {
        "chair_s": (wrong_answers, ones),
        "chair_s_refine": (wrong_answers, [int(count > 0) for count in all_mentions]),
        "chair_i": (wrong_mentions, all_mentions),
        "recall": ([len(row["covered"]) for row in rows], [len(row["truth"]) for row in rows]),
        "mean_words": ([row["words"] for row in rows], ones),
    }
    counts = {
        "n": len(rows),
        "n_images": len({row["image_id"] for row in rows}),
        "n_with_mentions": sum(rates["chair_s_refine"][1]),
        "mentions": sum(all_mentions),
    }
    settings = {"counting": counting, "vocabulary": vocabulary.name, "nouns": SOURCE}
    return Scores("chair", rows, rates, counts, settings, missing)


def unknown_image(answer: Answer) -> str:
    """Why an answer's image has no known objects."""
    if answer.image:
        return f"unknown image {answer.image!r}"
    return f"the row names no image (expected one of {', '.join(IMAGE_FIELDS)})"


def load_objects(
    paths: Iterable[str | Path], vocabulary: Vocabulary | None = None, images: Iterable[str] | None = None
) -> dict[str, set[str]]:
    """The classes in each image: annotated instances ∪ classes that the reference captions name.

    Args:
        paths: COCO `instances_*.json` and `captions_*.json` in any number and order, and maps {image id:
            [names]} or rows {"image_id", "objects"}; .gz is read as well.
        vocabulary: default our table of the 80 COCO classes.
        images: keep only these (ids, file names or paths): reading the 616,000 captions of COCO takes a
            minute.

    Returns:
        image id as a string (of a COCO file name its number) → classes. An image that is only listed
        ("images"), without an annotation, has none.

    Raises:
        ValueError: a file of another form, or a category that the vocabulary does not know.
    """
    vocabulary = vocabulary or load_vocabulary()
    wanted = None if images is None else {key for image in images for key in image_keys(image)}
    objects: dict[str, set[str]] = {}
    for path in paths:
        records, bad = read_json_objects(path)
        if bad:
            raise ValueError(f"{path}, {bad[0]['id']}: {bad[0]['reason']}")
        try:
            for image, classes in _named_objects(records, vocabulary, wanted, path):
                objects.setdefault(coco_number(image) or image, set()).update(classes)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not in COCO's form ({type(error).__name__}: {error}): expected instances, captions or "
                "{image: [class names]}"
            ) from None
    return objects


def _named_objects(records: list[dict], vocabulary: Vocabulary, wanted: set[str] | None, path):
    """(image id, classes) of any of the forms that `load_objects` reads."""
    for record in records:
        if "annotations" in record:
            categories = {category["id"]: category["name"] for category in record.get("categories", [])}
            pairs = [(image["id"], []) for image in record.get("images", [])]
            pairs += [(row["image_id"], row) for row in record["annotations"]]
        elif "objects" in record and "image_id" in record:
            pairs = [(record["image_id"], record["objects"])]
        else:
            pairs = record.items()
        for image, names in pairs:
            if wanted is not None and not wanted.intersection(image_keys(str(image))):
                continue
            if isinstance(names, dict) and "caption" in names:
                names = find_mentions(names["caption"], vocabulary)
            elif isinstance(names, dict) and "category_id" in names:
                number = names["category_id"]
                if number not in categories:
                    raise ValueError(f"{path}: image {image} has category {number!r}, which its categories do not list")
                names = [categories[number]]
            if not isinstance(names, list):
                raise ValueError(f"{path}: image {image!r} has {names!r}, expected a list of class names")
            if unknown := [name for name in names if name not in vocabulary.classes]:
                raise ValueError(
                    f"{path}: {unknown[0]!r} (image {image}) is no class of the vocabulary {vocabulary.name}; "
                    "give a --vocabulary that lists it"
                )
            yield str(image), [vocabulary.classes[name] for name in names]
