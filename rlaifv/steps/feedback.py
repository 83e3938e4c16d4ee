"""Feedback: ask the labeler about every claim (RLAIF-V, section 2.2, "conquer"); a tie is a rejected claim."""

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from rlaifv.inference.roles import Model, look
from rlaifv.inference.served import NO_WORDS, YES_WORDS, Served
from rlaifv.inference.yes_no import judge_fit, yes_no_ids
from rlaifv.params import FeedbackParams
from rlaifv.records import Claim, Judgement, Reject, batched, read_records, to_json, write_atomic
from rlaifv.store import Store
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import loaded

log = logging.getLogger(__name__)


def feedback(
    load: Callable[[], Model],
    claims: Sequence[Claim],
    images: dict[str, str],
    image_root: Path,
    params: FeedbackParams,
    store: Store,
    out: Path,
    coin_share: float = 0.0,
) -> tuple[int, int, int]:
    """Write one judgement per claim to `out`; `images` maps candidate ids to image paths below `image_root`.

    `load` gives the labeler; it is called when something is left to do. Claims are grouped by image; identical
    questions about one image are asked once and their answer is given to all claims that need it. With the ablation
    `coin_share` a coin judges that share of the claims. A claim is rejected when its image cannot be read, when its
    question cannot be put to the labeler (one of its special tokens is in it, or the context is too short) and when
    P(yes) or P(no) is not finite. Returns the counts of judgements, of rejected claims and of distinct questions.
    """
    by_image: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        by_image[images[claim.candidate_id]].append(claim)
    groups = sorted(by_image.items())
    asked = sum(len({claim.question for claim in group}) for _, group in groups)

    def judge_chunk(chunk: Sequence[tuple[str, list[Claim]]]) -> tuple[list[Judgement], list[Reject]]:
        rejects: list[Reject] = []
        readable, items = [], []
        for path, group in chunk:
            try:
                image = look(labeler(), image_root / path)
            except (OSError, ValueError) as error:
                rejects += [Reject(claim.id, "feedback", str(error)) for claim in group]
                continue
            readable.append(group)
            items.append((image, [f"{claim.question} {params.suffix}" for claim in group]))
        record()  # by who has the labeler, before its first judgements are written
        judgements = []
        for group, answers in zip(readable, judge_fit(labeler(), items), strict=True):
            for claim, answer in zip(group, answers, strict=True):
                if isinstance(answer, UnfitText):
                    rejects.append(Reject(claim.id, "feedback", str(answer)))
                    continue
                p_yes, p_no = coin(claim.id, coin_share) or answer
                if not math.isfinite(p_yes + p_no):
                    reason = f"the labeler's P(yes) is {p_yes} and P(no) {p_no}: try another labeler.dtype"
                    rejects.append(Reject(claim.id, "feedback", reason))
                    continue
                judgements.append(Judgement(claim.id, p_yes, p_no, p_yes > p_no, labeler().fingerprint))
        return judgements, rejects

    def record() -> str:
        return store.keep("labeler.json", lambda: describe_labeler(labeler(), params.suffix))

    with loaded(load) as labeler:
        store.run(batched(groups, params.batch_size), judge_chunk)
        who = record()
    judged, rejected = store.publish(out, len(claims), params.max_reject_rate)
    write_atomic(out.parent / "labeler.json", who)
    warn_of_low_mass(read_records(out, Judgement), params.min_answer_mass, json.loads(who)["labeler"])
    return judged, rejected, asked


def describe_labeler(vlm: Model, suffix: str) -> str:
    """A JSON line of who judged, with which suffix, and which tokens counted as yes and no."""
    if isinstance(vlm, Served):  # its tokens have no ids here, only spellings
        tokens = {"yes": YES_WORDS, "no": NO_WORDS}
    else:
        ids = yes_no_ids(vlm)
        tokens = {name: {str(i): vlm.tokenizer.decode([i]) for i in getattr(ids, name)} for name in ("yes", "no")}
    row = {"labeler": vlm.name, "fingerprint": vlm.fingerprint, "suffix": suffix, "tokens": tokens}
    return to_json(row) + "\n"


def warn_of_low_mass(judgements: Sequence[Judgement], minimum: float, name: str) -> None:
    """Warn when the labeler puts little probability on any answer: the prompt does not fit it."""
    mass = sum(j.p_yes + j.p_no for j in judgements) / max(len(judgements), 1)
    if judgements and not mass >= minimum:
        log.warning(
            f"{name} puts only {mass:.2f} of its probability on yes or no (feedback.min_answer_mass is {minimum:.2f}): "
            "the question or feedback.suffix does not fit this labeler"
        )


def coin(claim_id: str, share: float) -> tuple[float, float] | None:
    """(p_yes, p_no) of a coin for that share of all claims, None for the others; a claim's coin never changes."""
    drawn = hashlib.blake2b(f"{claim_id}/coin".encode(), digest_size=9).digest()
    if int.from_bytes(drawn[:8], "big") >= share * 2**64:
        return None
    return (1.0, 0.0) if drawn[8] % 2 else (0.0, 1.0)
