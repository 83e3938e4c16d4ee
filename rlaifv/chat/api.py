"""What `import rlaifv` offers (docs/api.md); a model is a folder, a hub id, or one that is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rlaifv.chat.conversation import Chat, local_first, read_image
from rlaifv.evaluation import chair
from rlaifv.evaluation.answers import read_answers, to_answers
from rlaifv.evaluation.scores import Scores
from rlaifv.inference import yes_no
from rlaifv.params import DivideParams, TrainParams, build
from rlaifv.steps.divide import divide_answers
from rlaifv.steps.public_pairs import fetch_pairs
from rlaifv.store import SCRATCH
from rlaifv.training import job
from rlaifv.training.job import TrainResult
from rlaifv.vlm.loading import VLM, load_vlm

Source = str | Path | bytes | Image.Image
"""An image: its file, the bytes of one, or pixels."""

SUFFIX = "Please answer yes or no."
"""What every question to a labeler ends with."""


@cache
def load(model: str) -> VLM:
    """A model, ready to be asked: a folder (of the working directory or the repository) or a hub id. It is loaded once
    and stays in memory. Raises FileNotFoundError or ValueError, in one line, for what is none."""
    return load_vlm(local_first(model), dtype=None)


def divide(divider: str | VLM, question: str, answer: str, max_new_tokens: int = 512) -> list[tuple[str, str]]:
    """The claims of an answer, each with its yes/no question (section 2.2); [] for an answer that claims nothing.

    `divider` is any instruct language model. Raises ValueError with the reason when its lists cannot be read.
    """
    # as in the paper; one answer is one batch
    settings = DivideParams(
        temperature=0.2, top_p=0.9, max_new_tokens=max_new_tokens, batch_size=1, max_reject_rate=0.0
    )
    (found,) = divide_answers(_model(divider), [(question, answer)], settings, seed=0)
    if found.problem:
        raise ValueError(f"the answer could not be divided: {found.problem}")
    return list(zip(found.claims, found.questions, strict=True))


def judge(
    labeler: str | VLM, image: Source, questions: Sequence[str], suffix: str = SUFFIX
) -> list[tuple[float, float]]:
    """(P(yes), P(no)) of each yes/no question about an image; a claim is accepted iff P(yes) > P(no) (section 2.2)."""
    return yes_no.judge(_model(labeler), read_image(image), [f"{question} {suffix}".strip() for question in questions])


def score(answers: str | Path | Sequence[Mapping], objects: Sequence[str | Path]) -> Scores:
    """CHAIR (arXiv 1809.02156) of answers: `.metrics`, `.rows`, and what is `.missing`.

    `answers` is a file, or rows with an answer and its image (docs/benchmarks.md has the names of fields); `objects`
    are COCO's instances and captions, or files {image: [class names]}. `intervals` and `compare_paired` of
    `rlaifv.evaluation.bootstrap` go on from there.
    """
    given, bad = read_answers(answers) if isinstance(answers, str | Path) else to_answers(answers)
    scores = chair.score(given, chair.load_objects(objects, images=[answer.image for answer in given]))
    return replace(scores, missing=[*bad, *scores.missing])


def best_of_n(
    model: str | VLM,
    reference: str | VLM,
    image: Source,
    question: str,
    n: int = 8,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> str:
    """The best of `n` sampled answers by the model's own reward against what it was aligned from (section 2.4)."""
    talk = Chat(_model(model), read_image(image), _model(reference), max_new_tokens=max_new_tokens, seed=seed)
    return talk.ask_best(question, n)[0]


def train(model: str, pairs: str | Path, out: str | Path, seed: int = 0, **settings: Any) -> TrainResult:
    """Preference training (DPO): checkpoints `out/checkpoint-1` …, the last of them of the last epoch.

    `pairs` is parquet in the columns of the public RLAIF-V dataset, a file, a folder or a dataset of the hub
    (`openbmb/RLAIF-V-Dataset`); `settings` are keys of the section `train` of a parameter file, with the paper's values
    where they are not given (dtype: bfloat16 on a GPU, else float32). Call it again after a kill, it goes on.
    """
    settings = {"dtype": "bfloat16" if torch.cuda.is_available() else "float32", **settings}
    params = build(TrainParams, {**vars(TrainParams()), **settings}, "train")
    result = job.train(local_first(model), fetch_pairs(pairs), params, Path(out).resolve(), SCRATCH, seed)
    load.cache_clear()  # a checkpoint of this name may have been another before
    return result


def _model(model: str | VLM) -> VLM:
    return load(model) if isinstance(model, str) else model
