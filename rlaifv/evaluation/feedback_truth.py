"""Score feedback itself against the truth, which the embedded world knows: are judgements right, are pairs right?

    python -m rlaifv.evaluation.feedback_truth --iteration 1     # prints the numbers of a finished iteration

The counterpart of the paper's human check (section 3.3: with divide-and-conquer 96.7 % of the pairs agree with people).
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rlaifv import ROOT
from rlaifv.evaluation.bootstrap import intervals
from rlaifv.evaluation.scores import Scores
from rlaifv.params import ParamsError, load_params
from rlaifv.records import Candidate, Claim, Instruction, Judgement, read_records, to_json
from rlaifv.stage import PREPARED, Paths
from rlaifv.tinyworld.coco import read_scenes
from rlaifv.tinyworld.language import claim_type, false_of, is_true, to_question
from rlaifv.tinyworld.scenes import Scene


def false_claims(text: str, scene: Scene) -> int:
    """How many claims of a text do not hold in the scene; a claim that is said twice counts twice."""
    return len(false_of(text, scene))


def known_truth(instances: Path) -> Callable[[str, str], int] | None:
    """`false_claims` of an answer to the image at a path, for the embedded world's images that `instances` lists; None
    where there is no such file: of real images nobody knows."""
    if not instances.is_file():
        return None
    scenes = read_scenes(instances)
    return lambda image_path, answer: false_claims(answer, scenes[int(Path(image_path).stem)])


def truth_scenes(instances: Path) -> dict[int, Scene]:
    """The embedded world's scenes of the images that `instances` lists; FileNotFoundError where it is not there."""
    if not instances.is_file():
        raise FileNotFoundError(f"{instances} is absent: the truth is known of the embedded world only")
    return read_scenes(instances)


def truth_of(claim: Claim, scene: Scene) -> tuple[bool, str, bool]:
    """Whether a claim is true, its type, and whether its question is another text than this world's question for it:
    the labeler is then asked about something else, which is the divider's error.

    A text that is no atomic claim (ablation `whole_answer`) is true when all its claims are, and has no such question.
    """
    try:
        return is_true(claim.claim, scene), claim_type(claim.claim), claim.question != to_question(claim.claim)
    except ValueError:
        return false_claims(claim.claim, scene) == 0, "whole answer", False


def claim_accuracy(judged: Sequence[tuple[Claim, Judgement]], scene_of: Callable[[str], Scene]) -> dict[str, object]:
    """Share of judgements that agree with the truth, overall and per type of claim, and the two kinds of error.

    `scene_of` maps a candidate's id to its scene. `false_accepted` is the share of false claims that were accepted,
    `true_rejected` that of true claims that were rejected. The interval resamples images, not claims.
    """
    if not judged:
        return {"n": 0}
    scenes = [scene_of(claim.candidate_id) for claim, _ in judged]
    known = [truth_of(claim, scene) for (claim, _), scene in zip(judged, scenes, strict=True)]
    truth, types, other = map(np.array, zip(*known, strict=True))
    said = np.array([judgement.accepted for _, judgement in judged])
    right = truth == said
    return {
        "accuracy": float(right.mean()),
        "accuracy_interval": interval(right, [scene.image_id for scene in scenes]),
        "per_type": {str(kind): float(right[types == kind].mean()) for kind in sorted(set(types))},
        "false_accepted": float(said[~truth].mean()) if (~truth).any() else 0.0,
        "true_rejected": float((~said[truth]).mean()) if truth.any() else 0.0,
        "misquoted": float(other.mean()),
        "wrong_misquoted": float(other[~right].mean()) if (~right).any() else 0.0,
        "n": len(judged),
    }


def pair_agreement(pairs: Sequence[Mapping], scene_of: Callable[[str], Scene]) -> dict[str, object]:
    """Share of pairs whose chosen answer really makes fewer false claims than the rejected one.

    `pairs` have `image_path`, `chosen`, `rejected`; `scene_of` maps an image path to its scene. A pair whose answers
    make equally many false claims is a `tie`, and no agreement.
    """
    if not pairs:
        return {"n": 0}
    scenes = [scene_of(pair["image_path"]) for pair in pairs]
    gaps = np.array(
        [
            false_claims(pair["rejected"], scene) - false_claims(pair["chosen"], scene)
            for pair, scene in zip(pairs, scenes, strict=True)
        ]
    )
    return {
        "agreement": float((gaps > 0).mean()),
        "agreement_interval": interval(gaps > 0, [scene.image_id for scene in scenes]),
        "tie": float((gaps == 0).mean()),
        "against": float((gaps < 0).mean()),
        "n": len(pairs),
    }


def interval(
    right: np.ndarray, images: Sequence[int] | Sequence[str], weights: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval of a share, or a weighted share; what belongs to one image is drawn together."""
    drawn, image = np.unique(images, return_inverse=True)
    weights = np.ones(len(right)) if weights is None else weights
    sums = np.bincount(image, weights=weights * right), np.bincount(image, weights=weights)
    return intervals(Scores("feedback", [{"id": i} for i in drawn], {"share": sums}, {}), resamples=1000)["share"]


def judged_claims(folder: Path, prepared: Path) -> list[tuple[Claim, Judgement, str]]:
    """Every judged claim of the iteration in `folder`, its judgement, and the path of the image that it is about."""
    path_of = {i.id: i.image_path for i in read_records(prepared / "train.jsonl", Instruction)}
    candidates = read_records(folder / "candidates" / "candidates.jsonl", Candidate)
    image_of = {c.id: path_of[c.instruction_id] for c in candidates}
    judgements = {j.claim_id: j for j in read_records(folder / "judgements" / "judgements.jsonl", Judgement)}
    found = read_records(folder / "claims" / "claims.jsonl", Claim)
    return [(c, judgements[c.id], image_of[c.candidate_id]) for c in found if c.id in judgements]


def score_iteration(folder: Path, prepared: Path, instances: Path) -> dict[str, dict[str, object]]:
    """Claim accuracy and pair agreement of the iteration in `folder`; `instances` lists its images."""
    scenes, judged = truth_scenes(instances), judged_claims(folder, prepared)
    image_of = {claim.candidate_id: image for claim, _, image in judged}
    columns = ["image_path", "chosen", "rejected"]
    pairs = pq.read_table(folder / "pairs" / "pairs.parquet", columns=columns).to_pylist()

    def scene_of(image_path: str) -> Scene:
        return scenes[int(Path(image_path).stem)]

    return {
        "claims": claim_accuracy([row[:2] for row in judged], lambda candidate: scene_of(image_of[candidate])),
        "pairs": pair_agreement(pairs, scene_of),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.evaluation.feedback_truth", description="Feedback against truth"
    )
    parser.add_argument("--iteration", default="1")
    parser.add_argument("--params", default="params.yaml")
    options = parser.parse_args(arguments)
    try:
        instructions = ROOT / load_params(options.params).prepare.instructions
        instances = instructions.with_name("instances_train.json")
        result = score_iteration(Paths(options.iteration).folder, PREPARED, instances)
    except (ParamsError, OSError, ValueError) as error:
        print(f"truth: {error}", file=sys.stderr)
        return 1
    print(to_json(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
