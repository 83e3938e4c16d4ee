"""How often the labeler and people agree: claims and pairs are drawn, people answer blind, the numbers follow.

The counterpart of the paper's human check (RLAIF-V, section 3.3: 96.7 % of the pairs made claim by claim agree with
people, 66.7 % of those made from whole answers). `notebooks/explore/agreement.ipynb` is where it is used.
"""

import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import krippendorff
import numpy as np
import pyarrow.parquet as pq

from rlaifv.evaluation.feedback_truth import false_claims, interval, judged_claims, truth_of, truth_scenes
from rlaifv.inference.roles import load_role, look
from rlaifv.inference.yes_no import judge_fit
from rlaifv.params import ServerParams
from rlaifv.records import Claim, Judgement, ModelRecord, read_jsonl, to_json, write_jsonl, yes_share
from rlaifv.stage import Paths
from rlaifv.steps.claims_made import kind_of
from rlaifv.steps.divide import WHOLE_QUESTION
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import loaded

RESAMPLES = 1000

BINS = (0.1, 0.5, 0.9)
"""Borders of P(yes) between the strata: sure of no, rather no, rather yes, sure of yes."""


@dataclass(frozen=True)
class ClaimItem:
    """A claim to answer with yes, no or unsure. `weight` is how many claims of the iteration it stands for."""

    id: str
    image_path: str
    claim: str
    kind: str
    p_yes: float
    p_no: float
    weight: float

    @property
    def accepted(self) -> bool:
        return self.p_yes > self.p_no


@dataclass(frozen=True)
class PairItem:
    """Two answers to say the better of ("0", "1") or "equal" or "unsure"; the method chose `answers[chosen]`."""

    id: str
    image_path: str
    question: str
    answers: tuple[str, str]
    chosen: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers))


Item = TypeVar("Item", ClaimItem, PairItem)
Answers = Mapping[str, Mapping[str, str]]
"""Annotator → id of an item → answer."""


# ---- what is asked


def draw_claims(paths: Paths, prepared: Path, n: int, seed: int) -> list[ClaimItem]:
    """`n` claims of an iteration, evenly over its strata (P(yes) by `BINS` × type) as far as these go, in random order.

    Equal claims about one image are one. Each item's `weight` makes the sample stand for all claims of the iteration.
    """
    strata: dict[tuple[int, str], dict[tuple[str, str], list[tuple[Claim, Judgement]]]]
    strata = defaultdict(lambda: defaultdict(list))
    for claim, judgement, image in judged_claims(paths.folder, prepared):
        stratum = (int(np.searchsorted(BINS, yes_share(judgement.p_yes, judgement.p_no))), kind_of(claim.claim))
        strata[stratum][image, claim.claim].append((claim, judgement))
    chance = random.Random(f"{seed}/agreement/claims")
    left = {name: chance.sample(sorted(strata[name]), len(strata[name])) for name in sorted(strata)}
    taken: dict[tuple[int, str], list[tuple[str, str]]] = defaultdict(list)
    while sum(map(len, taken.values())) < n and any(left.values()):
        for name, keys in left.items():
            if keys and sum(map(len, taken.values())) < n:
                taken[name].append(keys.pop())
    items = []
    for name, keys in taken.items():
        weight = sum(map(len, strata[name].values())) / sum(len(strata[name][key]) for key in keys)
        for key in keys:
            same = strata[name][key]
            claim, judgement = same[0]
            about = (claim.id, *key, name[1], judgement.p_yes, judgement.p_no, weight * len(same))
            items.append(ClaimItem(*about))
    chance.shuffle(items)
    return items


def draw_pairs(paths: Paths, n: int, seed: int) -> list[PairItem]:
    """`n` of an iteration's pairs, each of another image as far as possible; which answer comes first is drawn."""
    columns = ["idx", "image_path", "question", "chosen", "rejected"]
    rows = pq.read_table(paths.pairs, columns=columns).to_pylist()
    chance = random.Random(f"{seed}/agreement/pairs")
    chance.shuffle(rows)
    nth: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((nth[row["image_path"]], row))
        nth[row["image_path"]] += 1
    items = []
    for _, row in sorted(ranked, key=lambda pair: pair[0])[:n]:
        chosen = chance.randrange(2)
        answers = (row["rejected"], row["chosen"]) if chosen else (row["chosen"], row["rejected"])
        items.append(PairItem(row["idx"], row["image_path"], row["question"], answers, chosen))
    return items


class Annotation:
    """What people are asked, and their answers, in a folder: `items.jsonl`, and a file of answers a person.

    Each answer is on disk before the next question is shown; asked again, an item's last answer counts.

    Raises ValueError where the folder holds other items, and for a name that is no file name.
    """

    def __init__(self, folder: Path, items: Sequence[Item], annotator: str) -> None:
        if not re.fullmatch(r"[\w.-]+", annotator) or annotator in ("items", ".", ".."):
            raise ValueError(f"annotator {annotator!r}: expected letters, digits, '-', '_' or '.'")
        self.folder, self.items, self.annotator = folder, list(items), annotator
        there = folder / "items.jsonl"
        if not there.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(there, items)
        elif read_jsonl(there) != [json.loads(to_json(item)) for item in items]:
            raise ValueError(f"{there} holds other items: another run, number or seed; move the folder away")
        self.file = folder / f"{annotator}.jsonl"
        order = random.Random(f"{annotator}/order")
        self.order = order.sample(self.items, len(self.items))

    def answers(self) -> dict[str, str]:
        """What this person has said so far: id → answer."""
        return read_answers(self.file)

    def waiting(self) -> list[Item]:
        """What is still to be asked, in this person's own order."""
        said = self.answers()
        return [item for item in self.order if item.id not in said]

    def save(self, item: Item, answer: str) -> None:
        """Add an answer to the file, for good, on a line of its own even where a crash has cut the last one."""
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        line = to_json({"id": item.id, "annotator": self.annotator, "answer": answer})
        with self.file.open("a") as stream:
            stream.write("\n" * cut + line + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def read_answers(file: Path) -> dict[str, str]:
    """id → last answer; a line that a crash cut short is no answer."""
    said = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        said[row["id"]] = row["answer"]
    return said


def all_answers(folder: Path) -> dict[str, dict[str, str]]:
    """Annotator → answers, of everybody who has answered in a folder."""
    return {file.stem: read_answers(file) for file in sorted(folder.glob("*.jsonl")) if file.stem != "items"}


def answer_from_truth(annotation: Annotation, instances: Path) -> None:
    """Answer all that waits from what the embedded world knows of the images that `instances` lists.

    FileNotFoundError where there is no such file: of real images nobody knows."""
    scenes = truth_scenes(instances)
    for item in annotation.waiting():
        scene = scenes[int(Path(item.image_path).stem)]
        if isinstance(item, ClaimItem):
            answer = "yes" if truth_of(Claim(item.id, "", item.claim, ""), scene)[0] else "no"
        else:
            first, second = (false_claims(text, scene) for text in item.answers)
            answer = "equal" if first == second else str(int(second < first))
        annotation.save(item, answer)


# ---- what it says


def majority(item: str, people: Answers) -> str | None:
    """What most of those said who were not unsure; None where nobody was or two answers are even."""
    said = [answers[item] for answers in people.values() if answers.get(item, "unsure") != "unsure"]
    counts = sorted(((said.count(answer), answer) for answer in set(said)), reverse=True)
    if not counts or (len(counts) > 1 and counts[0][0] == counts[1][0]):
        return None
    return counts[0][1]


def decided(items: Sequence[Item], people: Answers) -> tuple[list[Item], dict[str, str], int]:
    """The items that people have answered by a majority, those answers, and how many others they were asked in vain."""
    asked = [item for item in items if any(item.id in answers for answers in people.values())]
    said = {item.id: answer for item in asked if (answer := majority(item.id, people))}
    return [item for item in asked if item.id in said], said, len(asked) - len(said)


def claim_agreement(items: Sequence[ClaimItem], people: Answers) -> dict[str, object]:
    """The labeler's verdicts against what people said (their majority).

    Returns `n`, `undecided` (asked, but unsure or split), and with n > 0 `accuracy` of the claims that were asked,
    `estimate` (of all the iteration's claims: strata by their size), Krippendorff's `alpha` of labeler and majority,
    each with its 95 % interval over images, `per_kind` and `per_p_yes` (kind or mean of P(yes) → accuracy and number).
    """
    known, said, undecided = decided(items, people)
    if not known:
        return {"n": 0, "undecided": undecided}
    images = [item.image_path for item in known]
    machine = np.array([item.accepted for item in known])
    person = np.array([said[item.id] == "yes" for item in known])
    right, weights = machine == person, np.array([item.weight for item in known])
    share = np.array([yes_share(item.p_yes, item.p_no) for item in known])
    kinds, bins = np.array([item.kind for item in known]), np.searchsorted(BINS, share)
    alpha = partial(nominal_alpha, np.array([machine, person], dtype=float))
    return {
        "n": len(known),
        "undecided": undecided,
        "accuracy": float(right.mean()),
        "accuracy_interval": interval(right, images),
        "estimate": float(np.average(right, weights=weights)),
        "estimate_interval": interval(right, images, weights),
        "alpha": alpha(),
        "alpha_interval": resampled(alpha, images),
        "per_kind": {
            str(kind): (float(right[kinds == kind].mean()), int((kinds == kind).sum())) for kind in sorted(set(kinds))
        },
        "per_p_yes": {
            round(float(share[bins == number].mean()), 3): (
                float(right[bins == number].mean()),
                int((bins == number).sum()),
            )
            for number in sorted(set(bins))
        },
    }


def pair_agreement(
    items: Sequence[PairItem], people: Answers, whole: Mapping[str, Sequence[float]] | None = None
) -> dict[str, object]:
    """How often people prefer the answer that the method chose, and that which the labeler would choose if it judged
    whole answers (`whole`: id → its P(yes) of the two); "equal" is no agreement, nor is a tie of the labeler's.

    Returns `n`, `undecided`, and with n > 0 `agreement`, and `whole_answers` where `whole` is given, with 95 %
    intervals over images.
    """
    known, said, undecided = decided(items, people)
    if not known:
        return {"n": 0, "undecided": undecided}
    images = [item.image_path for item in known]
    right = np.array([said[item.id] == str(item.chosen) for item in known])
    found = {"n": len(known), "undecided": undecided}
    found |= {"equal": float(np.mean([said[item.id] == "equal" for item in known]))}
    found |= {"agreement": float(right.mean()), "agreement_interval": interval(right, images)}
    if whole is not None:
        better = {key: str(int(second > first)) for key, (first, second) in whole.items() if first != second}
        same = np.array([said[item.id] == better.get(item.id) for item in known])
        found |= {"whole_answers": float(same.mean()), "whole_answers_interval": interval(same, images)}
    return found


def between_people(items: Sequence[Item], people: Answers) -> dict[str, object]:
    """Krippendorff's alpha (nominal) of two or more people over what at least two of them answered; unsure is no
    answer. Returns `n` and, with n > 0, `alpha` and its 95 % interval over images."""
    answers = sorted({said for one in people.values() for said in one.values()} - {"unsure"})
    rows = np.full((len(people), len(items)), np.nan)
    for row, one in zip(rows, people.values(), strict=True):
        for column, item in enumerate(items):
            if one.get(item.id) in answers:
                row[column] = answers.index(one[item.id])
    both = (~np.isnan(rows)).sum(axis=0) > 1
    if not both.any():
        return {"n": 0}
    alpha = partial(nominal_alpha, rows[:, both])
    images = [item.image_path for item, kept in zip(items, both, strict=True) if kept]
    return {"n": int(both.sum()), "alpha": alpha(), "alpha_interval": resampled(alpha, images)}


def nominal_alpha(ratings: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> float:
    """Krippendorff's alpha of [raters, items] (NaN: not rated); 1.0 where all are of one value, which has no alpha."""
    drawn = ratings[:, chosen]
    values = drawn[~np.isnan(drawn)]
    if len(np.unique(values)) < 2:
        return 1.0
    return float(krippendorff.alpha(reliability_data=drawn, level_of_measurement="nominal"))


def resampled(statistic: Callable[[np.ndarray], float], images: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of some rows; what belongs to one image is drawn together."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, image in enumerate(images):
        rows_of[image].append(row)
    groups, chance = [np.array(rows) for rows in rows_of.values()], np.random.default_rng(0)
    draws = chance.integers(len(groups), size=(RESAMPLES, len(groups)))
    values = [statistic(np.concatenate([groups[group] for group in draw])) for draw in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def whole_answer_verdicts(
    items: Sequence[PairItem], labeler: ModelRecord, image_root: Path, suffix: str, server: ServerParams
) -> dict[str, tuple[float, float]]:
    """P(yes) of the labeler, among yes and no, when it is asked whether a whole answer is right: id → of the two.

    Raises ValueError that names an answer which cannot be put to the labeler.
    """
    with loaded(partial(load_role, labeler, server)) as model:
        asked = [
            (
                look(model(), image_root / item.image_path),
                [f"{WHOLE_QUESTION.format(answer=text)} {suffix}" for text in item.answers],
            )
            for item in items
        ]
        verdicts = judge_fit(model(), asked)
    found = {}
    for item, pair in zip(items, verdicts, strict=True):
        for verdict in pair:
            if isinstance(verdict, UnfitText):
                raise ValueError(f"pair {item.id}: {verdict}")
        found[item.id] = tuple(yes_share(*verdict) for verdict in pair)
    return found
