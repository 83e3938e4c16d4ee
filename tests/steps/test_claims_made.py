"""What the report says of feedback adds up to the judgements."""

from collections import Counter

from rlaifv.records import Candidate, Claim, Instruction, Judgement
from rlaifv.steps.claims_made import EXAMPLES, OFTEN, describe_feedback
from rlaifv.steps.pairs import Pair


def judged(texts: list[tuple[str, bool]]) -> tuple[list[Claim], list[Judgement]]:
    claims = [Claim(f"{n}", "i#0", text, "?") for n, (text, _) in enumerate(texts)]
    return claims, [Judgement(f"{n}", float(yes), float(not yes), yes, "l") for n, (_, yes) in enumerate(texts)]


def pair(number: int, image: str) -> Pair:
    better, worse = (Candidate(f"{number}#{k}", f"{number}", k, text, 1, "stop", 0, "m") for k, text in enumerate("ab"))
    return Pair(Instruction(f"{number}", image, "?"), better, worse, 0, -1)


def test_every_judged_claim_is_counted_under_its_kind_and_the_frequent_rejected_ones_are_named():
    said = [("There is a cat.", True), ("There is a car.", False), ("There is a car.", False), ("It is red.", False)]
    found = describe_feedback(*judged(said), [], answers=2)
    assert found["per_kind"] == {"color": [1, 1], "existence": [2, 3]} and found["answers"] == 2
    assert found["rejected"] == [("There is a car.", 2), ("It is red.", 1)]


def test_a_claim_without_a_judgement_counts_nowhere():
    claims, judgements = judged([("There is a cat.", True), ("There is a car.", False)])
    assert describe_feedback(claims, judgements[:1], [], answers=1)["per_kind"] == {"existence": [0, 1]}


def test_the_examples_are_of_different_images_and_the_lists_are_short():
    pairs = [pair(n, f"{n // 2}.png") for n in range(20)]
    many = [(f"There is a thing {n}.", False) for n in range(OFTEN + 5)]
    found = describe_feedback(*judged(many), pairs, answers=1)
    assert Counter(row["image"] for row in found["examples"]) == {f"{n}.png": 1 for n in range(EXAMPLES)}
    assert len(found["rejected"]) == OFTEN
