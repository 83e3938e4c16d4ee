"""Facts about an image: what Fact-RLHF's reward model reads beside an answer (arXiv 2309.14525, section 3.3).

Three sources: reference captions; the right answers and rationales of questions; and, where nobody has annotated
anything, what the labeler has accepted of *other* answers to the same image. Facts are text (in the reward model's
prompt), or, split by the divider, claims that an answer's claims are held against.
"""

import dataclasses
import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaifv.params import DivideParams
from rlaifv.records import Candidate, Claim, Judgement, Reject, parse_json
from rlaifv.steps.divide import divide_answers
from rlaifv.steps.preferences import Preference
from rlaifv.vlm.loading import VLM

CAPTION_QUESTION = "Describe the image."
"""What a caption answers, for the divider."""


def read_facts(path: Path) -> dict[str, list[str]]:
    """Facts by image file: of COCO captions JSON; of an object {file: [captions]} (Fact-RLHF's
    `image_to_caption.json`, whose key `aok_FILE` has the facts of A-OKVQA's questions); or of a list of A-OKVQA's
    questions, under such keys.

    Raises ValueError for any other content.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found: dict[str, list[str]] = defaultdict(list)
    try:
        if isinstance(content, list):
            for row in content:
                found[f"aok_{row['image_id']:012d}.jpg"] += gold_facts(row)
        elif "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for row in content["annotations"]:
                found[names[row["image_id"]]].append(row["caption"].strip())
        else:
            for name, texts in content.items():
                found[name] = [text.strip() for text in ([texts] if isinstance(texts, str) else texts)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds neither COCO captions, nor facts by image, nor A-OKVQA: {error!r}") from None
    return dict(found)


def gold_facts(row: Mapping[str, Any]) -> list[str]:
    """The facts in a question whose answer is known: A-OKVQA's right choice and its rationales, or a VQA row's
    `answer`."""
    answer = row["choices"][row["correct_choice_idx"]] if "choices" in row else row["answer"]
    return [f"{row['question'].strip()} {answer.strip()}.", *(reason.strip() for reason in row.get("rationales", ()))]


def accepted_claims(
    candidates: Sequence[Candidate],
    claims: Sequence[Claim],
    judgements: Sequence[Judgement],
    images: Mapping[str, str],
) -> dict[str, list[tuple[str, str]]]:
    """(answer, claim) of every claim that the labeler accepts, by image; `images` maps instruction ids to paths."""
    accepted = {judgement.claim_id for judgement in judgements if judgement.accepted}
    of = {candidate.id: candidate for candidate in candidates}
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for claim in claims:
        if claim.id in accepted:
            candidate = of[claim.candidate_id]
            found[images[candidate.instruction_id]].append((candidate.answer, claim.claim))
    return dict(found)


def claims_of_others(accepted: Sequence[tuple[str, str]], answers: Sequence[str]) -> list[str]:
    """The distinct accepted claims of an image's answers that are none of `answers`: what speaks for one of them must
    not be its own word."""
    return list(dict.fromkeys(claim for answer, claim in accepted if answer not in answers))


def in_order(facts: Sequence[str], most: int, seed: int, image_path: str) -> list[str]:
    """At most so many of the distinct facts in an order drawn from (seed, image): both answers of a pair, and every
    answer that is scored later, meet the same facts in the same order."""
    distinct = list(dict.fromkeys(fact for fact in facts if fact.strip()))
    draw = random.Random(hashlib.blake2b(f"{seed}/{image_path}/facts".encode()).digest())
    return draw.sample(distinct, min(most, len(distinct)))


def with_facts(
    preferences: Sequence[Preference], find: Callable[[Preference], Sequence[str]], most: int, seed: int
) -> tuple[list[Preference], list[Reject]]:
    """Preferences with what `find` knows of their images; one of whose image nothing is known is rejected."""
    kept, rejects = [], []
    for preference in preferences:
        facts = in_order(find(preference), most, seed, preference.image_path)
        if facts:
            kept.append(dataclasses.replace(preference, facts=facts))
        else:
            reason = f"no facts are known of image {preference.image_path}"
            rejects.append(Reject(preference.id, "preferences", reason))
    return kept, rejects


def fact_claims(
    divider: VLM, facts: Mapping[str, Sequence[str]], params: DivideParams, seed: int
) -> dict[str, list[str]]:
    """The distinct claims that the divider finds in each image's facts; an image none of whose facts it can split has
    an empty list."""
    asked = [(image, text) for image, texts in facts.items() for text in texts]
    divisions = divide_answers(divider, [(CAPTION_QUESTION, text) for _, text in asked], params, seed)
    found: dict[str, list[str]] = {image: [] for image in facts}
    for (image, _), division in zip(asked, divisions, strict=True):
        found[image] += [claim for claim in division.claims if claim not in found[image]]
    return found


def unsupported(claims: Sequence[str], facts: Sequence[str]) -> int:
    """How many of an answer's claims none of an image's fact claims says in the same words, whatever their case.

    It takes no training, and knows as little as its facts: what they leave out counts as false.
    """
    known = {fact.casefold() for fact in facts}
    return sum(claim.casefold() not in known for claim in claims)
