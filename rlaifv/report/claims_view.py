"""Browse what an iteration made of one image: candidates, their claims with P(yes), and the pairs."""

import json
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq

from rlaifv.records import Candidate, Claim, Instruction, Judgement, read_records
from rlaifv.stage import Paths


def load_iteration(paths: Paths, prepared: Path, image_root: Path) -> list[dict]:
    """What an iteration made of each instruction, as the template claims.html shows it: rows of `instruction`, `image`,
    `candidates` and `pairs`.

    Raises FileNotFoundError that names the file which a stage has not written yet.
    """
    judgements = {j.claim_id: j for j in read_records(paths.judgements, Judgement)}
    claims, candidates, pairs = defaultdict(list), defaultdict(list), defaultdict(list)
    for claim in read_records(paths.claims, Claim):
        if judgement := judgements.get(claim.id):
            claims[claim.candidate_id].append({"claim": claim.claim, **vars(judgement)})
    for candidate in read_records(paths.candidates, Candidate):
        judged = claims[candidate.id]
        score = -sum(not claim["accepted"] for claim in judged)
        candidates[candidate.instruction_id].append({**vars(candidate), "score": score, "claims": judged})
    columns = ["origin_split", "chosen", "rejected", "chosen_score", "rejected_score"]
    for pair in pq.read_table(paths.pairs, columns=columns).to_pylist():
        pairs[json.loads(pair["origin_split"])["instruction"]].append(pair)
    return [
        {"instruction": i, "image": image_root / i.image_path, "candidates": candidates[i.id], "pairs": pairs[i.id]}
        for i in read_records(prepared / "train.jsonl", Instruction)
        if i.id in candidates
    ]
