"""What an iteration's claims are about, and which the labeler rejects: for readers, nothing is trained on it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rlaifv.records import Claim, Judgement
from rlaifv.steps.pairs import Pair

NUMBERS = r"two|three|four|five|six|seven|eight|nine|ten|several|many|\d+"
COLORS = r"black|white|gr[ae]y|red|green|blue|yellow|orange|purple|pink|brown|golden|silver|beige"
PLACES = r"left|right|top|bottom|center|middle|above|below|under|behind|front|next to|between|on|in|at|near|beside"
KINDS = (
    ("count", re.compile(rf"\b({NUMBERS})\b", re.IGNORECASE)),
    ("color", re.compile(rf"\b({COLORS})\b", re.IGNORECASE)),
    ("existence", re.compile(r"^there (is|are)\b", re.IGNORECASE)),
    ("position", re.compile(rf"\b({PLACES})\b", re.IGNORECASE)),
)
"""A rough type of a claim in English: the first that fits, else "other"."""

OFTEN = 200
"""So many of the most frequent rejected claims are kept."""

EXAMPLES = 3


def kind_of(claim: str) -> str:
    """A rough type of any claim: count, color, existence, position or other."""
    return next((kind for kind, pattern in KINDS if pattern.search(claim)), "other")


def describe_feedback(
    claims: Sequence[Claim], judgements: Sequence[Judgement], pairs: Sequence[Pair], answers: int
) -> dict[str, object]:
    """What the labeler made of an iteration, for the report.

    Returns `answers`, `per_kind` (type of claim → rejected and all claims), `rejected` (the `OFTEN` most frequent
    rejected claims with their numbers) and `examples` (the first pairs, of different images).
    """
    accepted: Mapping[str, bool] = {j.claim_id: j.accepted for j in judgements}
    judged = [(kind_of(claim.claim), claim.claim, accepted[claim.id]) for claim in claims if claim.id in accepted]
    everything, rejected = Counter(kind for kind, _, _ in judged), Counter(kind for kind, _, yes in judged if not yes)
    said = Counter(text for _, text, yes in judged if not yes)
    shown = list({pair.instruction.image_path: pair for pair in reversed(pairs)}.values())[::-1][:EXAMPLES]
    return {
        "answers": answers,
        "per_kind": {kind: [rejected[kind], everything[kind]] for kind in sorted(everything)},
        "rejected": sorted(said.items(), key=lambda item: (-item[1], item[0]))[:OFTEN],
        "examples": [
            {
                "image": pair.instruction.image_path,
                "question": pair.instruction.question,
                "chosen": pair.chosen.answer,
                "rejected": pair.rejected.answer,
                "scores": [pair.chosen_score, pair.rejected_score],
            }
            for pair in shown
        ],
    }
