"""Annotators of the embedded world: they know the truth, have a taste for length, and sometimes err.

What a reward model learns from people depends on the people. Here all of it is stated: which of two answers one of
these annotators prefers is

    u = (false claims of the other - false claims of this one) / 3 + w · (tokens of this one - tokens of the other) / 20

above zero, with w the taste for length (0: none); then a share of the labels, drawn at random, is flipped.
"""

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from rlaifv.records import Candidate, Instruction
from rlaifv.steps.preferences import Preference
from rlaifv.tinyworld.language import TYPES, claim_type, false_of
from rlaifv.tinyworld.scenes import Scene


def annotate(
    instructions: Sequence[Instruction],
    candidates: Sequence[Candidate],
    scene_of: Callable[[str], Scene],
    taste: float,
    flipped: float,
    per_instruction: int,
    seed: int,
) -> list[Preference]:
    """Preferences between answers to one instruction that make different numbers of false claims.

    Which pairs are asked about, and which labels are flipped, is drawn from (seed, instruction) and does not depend on
    the taste: annotators of all tastes see the same pairs. `scene_of` maps an image path to its scene. With taste 0 and
    nothing flipped the labels are the truth. A preference's kind is `kind_of`.
    """
    answers: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        answers[candidate.instruction_id].append(candidate)
    found = []
    for instruction in instructions:
        scene = scene_of(instruction.image_path)
        false = {c.id: false_of(c.answer, scene) for c in answers[instruction.id]}
        possible = [
            (a, b)
            for a, b in itertools.combinations(answers[instruction.id], 2)
            if len(false[a.id]) != len(false[b.id])
        ]
        draw = random.Random(hashlib.blake2b(f"{seed}/{instruction.id}/annotator".encode()).digest())
        for a, b in draw.sample(possible, min(per_instruction, len(possible))):
            utility = (len(false[b.id]) - len(false[a.id])) / 3 + taste * (a.n_tokens - b.n_tokens) / 20
            first = utility > 0
            if draw.random() < flipped:
                first = not first
            chosen, rejected = (a, b) if first else (b, a)
            found.append(
                Preference(
                    id=f"{a.id}/{b.id}",
                    image_path=instruction.image_path,
                    conversation=[instruction.question],
                    chosen=chosen.answer,
                    rejected=rejected.answer,
                    kind=kind_of(false[a.id], false[b.id]),
                )
            )
    return found


def kind_of(false_a: Sequence[str], false_b: Sequence[str]) -> str:
    """What two answers differ in: the first of `language.TYPES` of which one makes more false claims. An imagined
    object is "existence", whatever else is said of it."""
    of_a, of_b = ([claim_type(claim) for claim in false] for false in (false_a, false_b))
    return next(kind for kind in TYPES if of_a.count(kind) != of_b.count(kind))
