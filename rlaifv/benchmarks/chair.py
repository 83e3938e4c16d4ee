"""CHAIR as a command; the metric itself is `rlaifv.evaluation.chair`, for the pipeline counts with it too.

python -m rlaifv.benchmarks.chair --answers A.jsonl --objects instances_val2014.json captions_val2014.json --json
"""

from collections.abc import Sequence
from pathlib import Path

from rlaifv import ROOT
from rlaifv.benchmarks.cli import command, run
from rlaifv.benchmarks.spec import Spec
from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import read_answers
from rlaifv.evaluation.scores import Scores
from rlaifv.params import BenchmarkParams


def score_entry(item: BenchmarkParams, answers: Path, judge: None, replies: Path) -> tuple[Scores, list[dict]]:
    """Score one entry of the parameter file (`spec.Scorer`)."""
    given, bad = read_answers(answers)
    vocabulary = chair.load_vocabulary(ROOT / item.vocabulary if item.vocabulary else chair.COCO_WORDS)
    objects = chair.load_objects([ROOT / path for path in item.truth], vocabulary, [a.image for a in given])
    return chair.score(given, objects, vocabulary), bad


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
        return chair.score(answers, objects, vocabulary, options.counting), bad

    run(options, scorer, SPEC)


if __name__ == "__main__":
    main()
