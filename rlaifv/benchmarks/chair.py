"""CHAIR as a command; the metric itself is `rlaifv.evaluation.chair`, for the pipeline counts with it too.

python -m rlaifv.benchmarks.chair --answers A.jsonl --objects instances_val2014.json captions_val2014.json --json
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlaifv import ROOT
from rlaifv.benchmarks.cli import command, run
from rlaifv.benchmarks.spec import Spec
from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import Answer, read_answers
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams


def score_entry(item: BenchmarkParams, answers: Path, judge: None, replies: Path) -> tuple[Scores, list[dict]]:
    """Score one entry of the parameter file (`spec.Scorer`)."""
    given, bad = read_answers(answers)
    vocabulary = chair.load_vocabulary(ROOT / item.vocabulary if item.vocabulary else chair.COCO_WORDS)
    objects = chair.load_objects([ROOT / path for path in item.truth], vocabulary, [a.image for a in given])
    return score(given, objects, vocabulary), bad


def score(
    answers: Sequence[Answer],
    objects: Mapping[str, Iterable[str]],
    vocabulary: chair.Vocabulary,
    counting: str = "original",
) -> Scores:
    """`chair.score` of the text; where every answer brings the lemmas that another scorer made of it (`words` in
    chair.py's output), of these as well: the rates `stored_…`, and a line of how far the two rules differ."""
    scores = chair.score(answers, objects, vocabulary, counting)
    stored = [answer.record.get("words") for answer in answers]
    if not scores.rows or not all(isinstance(w, list) and all(isinstance(x, str) for x in w) for w in stored):
        return scores
    mentions = [chair.mentions_of([word.lower() for word in words], vocabulary) for words in stored]
    others = chair.score(answers, objects, vocabulary, counting, mentions)
    names = ("chair_s", "chair_i", "recall")
    differ = sum(a["mentions"] != b["mentions"] for a, b in zip(scores.rows, others.rows, strict=True))
    moved = ", ".join(f"{name} {100 * (others.metrics[name] - scores.metrics[name]):+.2f}" for name in names)
    said = f"by the file's own lemmas, in points: {moved}; mentions differ in {differ} of {len(scores.rows)} answers"
    return replace(
        scores,
        rates={**scores.rates, **{f"stored_{name}": others.rates[name] for name in names}},
        counts={**scores.counts, "n_stored_differ": differ},
        settings={**scores.settings, "stored_words": said},
    )


SPEC = Spec("chair", score_entry, headlines=("chair_s", "chair_i", "recall", "mean_words"), truth=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: read, score, print."""
    parser = command("chair", "CHAIR: objects that an answer names and that are not in the image")
    parser.add_argument("--objects", required=True, nargs="+", help="COCO instances and captions, or {image: [names]}")
    parser.add_argument("--vocabulary", default=chair.COCO_WORDS, help="a synonym table (default: ours)")
    parser.add_argument("--counting", choices=chair.COUNTINGS, default="original")
    options = parser.parse_args(arguments)

    def scorer(path):
        vocabulary = chair.load_vocabulary(options.vocabulary)
        answers, bad = read_answers(path)
        objects = chair.load_objects(options.objects, vocabulary, [answer.image for answer in answers])
        return score(answers, objects, vocabulary, options.counting), bad

    run(options, scorer, SPEC)


if __name__ == "__main__":
    main()
