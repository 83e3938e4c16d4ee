"""What each reward model of a run of Fact-RLHF learns from, and what is measured of it on held-out images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlaifv import ROOT
from rlaifv.evaluation.feedback_truth import false_claims
from rlaifv.evaluation.reward_accuracy import ScoredAnswers, ScoredPair, accuracy, best_of_n, length_correlation
from rlaifv.inference.reward import Rated, score
from rlaifv.params import DivideParams, RewardModelParams, RewardRun
from rlaifv.records import Candidate, Claim, Instruction, Judgement, Reject, read_records
from rlaifv.steps.facts import (
    accepted_claims,
    claims_of_others,
    fact_claims,
    in_order,
    read_facts,
    unsupported,
    with_facts,
)
from rlaifv.steps.preferences import Preference, held_out, hold_out, read_preferences
from rlaifv.tinyworld.annotator import annotate
from rlaifv.tinyworld.coco import read_scenes
from rlaifv.tinyworld.scenes import Scene
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM
from rlaifv.vlm.reward_format import RewardModel

Find = Callable[[str, Sequence[str]], Sequence[str]]
"""(image path, answers to it) → all facts that these answers may be held against."""


@dataclass(frozen=True)
class Asked:
    """One held-out instruction with all candidates of its answers, the facts for each, and their false claims."""

    instruction: Instruction
    candidates: list[Candidate]
    facts: list[list[str] | None]
    false_claims: list[int]


@dataclass(frozen=True)
class RewardData:
    """Preferences to learn from and held-out ones to be measured on, whose labels are the truth where it is known;
    `agreement` is the share of all labels that are the truth; None where it is not known, and `asked` is empty."""

    learn: list[Preference]
    held: list[Preference]
    rejects: list[Reject]
    agreement: float | None
    asked: list[Asked]


def reward_data(
    settings: RewardModelParams, run: RewardRun, iteration: Path, prepared: Path, instances: Path, seed: int, root: Path
) -> RewardData:
    """The data of one run; images lie below `root`.

    Without `settings.preferences` it is that of the embedded world's annotators, who are asked about the candidates in
    the folder of an `iteration`; `instances` says what is true of the images.
    """
    find = facts_finder(settings, run.facts, iteration, prepared)
    if settings.preferences:
        labels, rejects = read_preferences(ROOT / settings.preferences, root)
        truth, agreement, asked = labels, None, []
    else:
        scenes = read_scenes(instances)
        candidates = read_records(iteration / "candidates" / "candidates.jsonl", Candidate)
        answers: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            answers.setdefault(candidate.instruction_id, []).append(candidate)
        instructions = [i for i in read_records(prepared / "train.jsonl", Instruction) if i.id in answers]

        def scene_of(path: str) -> Scene:
            return scenes[int(Path(path).stem)]

        def facts_for(path: str, answer: str) -> list[str] | None:
            return in_order(find(path, [answer]), settings.facts, seed, path) if find else None

        about = instructions, candidates, scene_of
        labels = annotate(*about, run.taste, settings.flipped, settings.per_instruction, seed)
        truth, rejects = annotate(*about, 0.0, 0.0, settings.per_instruction, seed), []
        agreement = float(np.mean([a.chosen == b.chosen for a, b in zip(labels, truth, strict=True)]))
        asked = [
            Asked(
                i,
                answers[i.id],
                [facts_for(i.image_path, c.answer) for c in answers[i.id]],
                [false_claims(c.answer, scene_of(i.image_path)) for c in answers[i.id]],
            )
            for i in instructions
            if held_out(i.image_path, settings.held_out, seed)
        ]
    learn, held = hold_out(labels, settings.held_out, seed)[0], hold_out(truth, settings.held_out, seed)[1]
    if find:
        (learn, lost), (held, lost_too) = (
            with_facts(part, lambda p: find(p.image_path, [p.chosen, p.rejected]), settings.facts, seed)
            for part in (learn, held)
        )
        rejects = [*rejects, *lost, *lost_too]
    return RewardData(learn[: settings.pairs], held, rejects, agreement, asked)


def facts_finder(settings: RewardModelParams, source: str, iteration: Path, prepared: Path) -> Find | None:
    """How facts of a source are found; None for none."""
    if source == "none":
        return None
    if source == "captions":
        table = read_facts(ROOT / settings.captions)
        return lambda image, answers: table.get(Path(image).name, [])
    images = {i.id: i.image_path for i in read_records(prepared / "train.jsonl", Instruction)}
    files = {"candidates": Candidate, "claims": Claim, "judgements": Judgement}
    rows = [read_records(iteration / name / f"{name}.jsonl", kind) for name, kind in files.items()]
    known = accepted_claims(*rows, images)
    return lambda image, answers: claims_of_others(known.get(image, []), answers)


def measure(model: RewardModel, data: RewardData, root: Path, batch_size: int = 50) -> dict[str, object]:
    """What `evaluation.reward_accuracy` says of a reward model, and how far its rewards of held-out pairs move when
    each pair is shown another one's image, in standard deviations of the rewards: 0 would be a blind model."""
    pairs = [(p.image_path, Rated(None, p.conversation, [p.chosen, p.rejected], p.facts or None)) for p in data.held]
    scored = look_and_score(model, pairs, root, batch_size)
    others = [image for image, _ in pairs[1:] + pairs[:1]]
    moved = look_and_score(model, [(o, rated) for o, (_, rated) in zip(others, pairs, strict=True)], root, batch_size)
    rows = [ScoredPair(p.id, p.image_path, p.kind, *both) for p, both in zip(data.held, scored, strict=True)]
    found = {"accuracy": accuracy(rows), "agreement": data.agreement}
    found["image_effect"] = float(np.mean(np.abs(np.subtract(scored, moved))) / max(np.std(scored), 1e-12))
    if not data.asked:
        return found
    alone = [
        (item.instruction.image_path, Rated(None, item.instruction.question, [c.answer], facts))
        for item in data.asked
        for c, facts in zip(item.candidates, item.facts, strict=True)
    ]
    rewards = iter(look_and_score(model, alone, root, batch_size))
    answers = [
        ScoredAnswers(
            item.instruction.image_path,
            [next(rewards)[0] for _ in item.candidates],
            [c.n_tokens for c in item.candidates],
            item.false_claims,
        )
        for item in data.asked
    ]
    return {**found, "length_correlation": length_correlation(answers), "best_of_n": best_of_n(answers)}


def measure_claims(
    divider: VLM, data: RewardData, settings: RewardModelParams, iteration: Path, params: DivideParams, seed: int
) -> dict[str, object]:
    """The same of facts as claims, without a reward model: an answer's reward is minus the number of its claims that
    are none of the claims in its image's captions (`steps.facts.unsupported`)."""
    table = read_facts(ROOT / settings.captions)
    images = dict.fromkeys([p.image_path for p in data.held] + [item.instruction.image_path for item in data.asked])
    texts = {i: in_order(table.get(Path(i).name, []), settings.facts, seed, i) for i in images}
    known = fact_claims(divider, texts, params, seed)
    answer_of = {c.id: c.answer for c in read_records(iteration / "candidates" / "candidates.jsonl", Candidate)}
    claims: dict[str, list[str]] = {}
    for claim in read_records(iteration / "claims" / "claims.jsonl", Claim):
        said = claims.setdefault(answer_of[claim.candidate_id], [])
        if claim.claim not in said:
            said.append(claim.claim)

    def reward(image: str, answer: str) -> float:
        return -float(unsupported(claims.get(answer, []), known[image]))

    pairs = [
        ScoredPair(p.id, p.image_path, p.kind, *(reward(p.image_path, answer) for answer in (p.chosen, p.rejected)))
        for p in data.held
    ]
    answers = [
        ScoredAnswers(
            item.instruction.image_path,
            [reward(item.instruction.image_path, c.answer) for c in item.candidates],
            [c.n_tokens for c in item.candidates],
            item.false_claims,
        )
        for item in data.asked
    ]
    return {
        "accuracy": accuracy(pairs),
        "length_correlation": length_correlation(answers),
        "best_of_n": best_of_n(answers),
    }


def look_and_score(
    model: RewardModel, rated: Sequence[tuple[str, Rated]], root: Path, batch_size: int
) -> list[list[float]]:
    """The rewards of answers about the images at these paths, a batch in memory at a time; what asks the same of the
    same image goes through the model together."""
    groups: dict[tuple, list[int]] = {}
    for number, (image, item) in enumerate(rated):
        key = image, tuple([item.question] if isinstance(item.question, str) else item.question), str(item.facts)
        groups.setdefault(key, []).append(number)
    found: list[list[float]] = [[] for _ in rated]
    keys = list(groups)
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        asked = [
            replace(
                rated[groups[key][0]][1],
                image=open_image(root / key[0]),
                answers=[answer for number in groups[key] for answer in rated[number][1].answers],
            )
            for key in part
        ]
        for key, rewards in zip(part, score(model, asked), strict=True):
            left = iter(rewards)
            for number in groups[key]:
                found[number] = [next(left) for _ in rated[number][1].answers]
    return found


def table_row(measured: dict) -> dict[str, object]:
    """A reward model's `measure` in one row; of what has an interval [value, low, high]."""

    def bounds(rate: dict) -> list[float]:
        return [rate["value"], *rate["interval"]]

    row = {name: measured[name] for name in ("run", "taste", "facts", "pairs")}
    row |= {"labels_right": measured["agreement"], "right": bounds(measured["accuracy"])}
    row["calibration_error"] = measured["accuracy"]["calibration"]["error"]
    if "best_of_n" in measured:
        best = measured["best_of_n"]
        row["length_correlation"] = bounds(measured["length_correlation"])
        row |= {f"best_of_n_{name}": bounds(best[name]) for name in ("error", "tokens")}
        row |= {f"all_{name}": bounds(best[f"{name}_of_all"]) for name in ("error", "tokens")}
    return row | {"image_effect": measured.get("image_effect")}
