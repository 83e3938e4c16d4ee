"""Rates of answers whose claims a labeler has judged: what is measured where nobody has said what is in the images.

An answer's row has its `claims`, rows of `p_yes` and `p_no` (accepted iff p_yes > p_no), or none and a `problem`, and
says who judged it: `labeler`, and whether that is the `same_labeler` that made the feedback.
"""

from collections.abc import Mapping, Sequence

from rlaifv.evaluation.scores import Scores
from rlaifv.records import CLAIM_RATES


def score_claims(answers: Sequence[Mapping]) -> Scores:
    """Scores of judged answers, rows of `id`, `image`, `answer`, `claims` and `problem`.

    With R the rejected and A the accepted claims of an answer:

    - response_rejection: share of answers with R ≠ ∅ among those with any claim
    - claim_rejection: Σ|R| / Σ|R ∪ A|
    - accepted_claims: Σ|A| / answers
    - mean_words: words an answer, separated by white space

    An answer that could not be divided or judged counts as one that claims nothing, so that it lowers the accepted
    claims and no rate of rejection; `missing` names it. `settings` say who judged, as every row does (`labeler`,
    `same_labeler`). Raises ValueError for a row that nobody has judged, and for rows of several labelers.
    """
    if unjudged := [row["id"] for row in answers if "claims" not in row]:
        raise ValueError(f"{len(unjudged)} answers without annotations were not judged by claims, first {unjudged[0]}")
    judges = {(row["labeler"], row["same_labeler"]) for row in answers}
    if len(judges) > 1:
        raise ValueError(f"answers judged by different labelers do not compare: {sorted(judges)}")
    settings = dict(zip(("labeler", "same_labeler"), *judges, strict=True)) if judges else {}
    rows = []
    for row in answers:
        accepted = sum(claim["p_yes"] > claim["p_no"] for claim in row["claims"])
        counts = {"claims": len(row["claims"]), "accepted": accepted, "words": len(row["answer"].split())}
        rows.append({"id": row["id"], "image": row["image"], **counts})
    ones, claims, accepted = [1] * len(rows), [row["claims"] for row in rows], [row["accepted"] for row in rows]
    rejected = [made - true for made, true in zip(claims, accepted, strict=True)]
    any_rejected, any_claim = [int(n > 0) for n in rejected], [int(n > 0) for n in claims]
    sums = (any_rejected, any_claim), (rejected, claims), (accepted, ones), ([row["words"] for row in rows], ones)
    rates = dict(zip((*CLAIM_RATES, "mean_words"), sums, strict=True))
    missing = [{"id": row["id"], "reason": row["problem"]} for row in answers if row["problem"]]
    counts = {"n": len(rows), "not_judged": len(missing)}
    return Scores("claims", rows, rates, counts, settings, missing, ("accepted_claims", "mean_words"), drawn_by="image")
