"""Pairs: score answers by their rejected claims and make length-balanced preference pairs (RLAIF-V, section 2.2)."""

import hashlib
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from rlaifv.params import PairsParams
from rlaifv.records import Candidate, Claim, Instruction, Judgement

COLUMNS = {
    "ds_name": "string",
    "image": "image",
    "question": "string",
    "chosen": "string",
    "rejected": "string",
    "origin_dataset": "string",
    "origin_split": "string",
    "idx": "string",
    "image_path": "string",
    "chosen_score": "int64",
    "rejected_score": "int64",
    "trl_prompt": "messages",
    "trl_chosen": "messages",
    "trl_rejected": "messages",
}
"""The columns of the public RLAIF-V dataset, the two scores, and the texts once more as the turns of a chat: TRL puts a
picture into no other."""

VALUE = {"_type": "Value"}
TYPES = {
    "string": (pa.string(), VALUE | {"dtype": "string"}),
    "int64": (pa.int64(), VALUE | {"dtype": "int64"}),
    "image": (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}),
    "messages": (
        pa.list_(pa.field("element", pa.struct([("role", pa.string()), ("content", pa.string())]))),
        [dict.fromkeys(("role", "content"), VALUE | {"dtype": "string"})],
    ),
}
"""What a column is to Arrow, and to `datasets`, which reads it in the file's own schema."""

FEATURES = {name: TYPES[kind][1] for name, kind in COLUMNS.items()}
SCHEMA = pa.schema(
    [(name, TYPES[kind][0]) for name, kind in COLUMNS.items()],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


@dataclass(frozen=True)
class Pair:
    """Two answers to one instruction; `chosen` has fewer rejected claims."""

    instruction: Instruction
    chosen: Candidate
    rejected: Candidate
    chosen_score: int
    rejected_score: int


def score_candidates(claims: Sequence[Claim], judgements: Sequence[Judgement]) -> dict[str, int]:
    """Score of each candidate: −(number of rejected claims). Only candidates with every claim judged have one.

    Raises ValueError for judgements that are not of one labeler or not of these claims.
    """
    if len(labelers := sorted({j.labeler for j in judgements})) > 1:
        raise ValueError(f"judgements of {len(labelers)} labelers ({', '.join(labelers)}): run feedback again")
    if strange := {j.claim_id for j in judgements} - {claim.id for claim in claims}:
        raise ValueError(f"{len(strange)} judgements are of no known claim, first {min(strange)}: run feedback again")
    accepted = {j.claim_id: j.accepted for j in judgements}
    by_candidate: dict[str, list[str]] = defaultdict(list)
    for claim in claims:
        by_candidate[claim.candidate_id].append(claim.id)
    return {
        candidate: -sum(not accepted[i] for i in ids)
        for candidate, ids in by_candidate.items()
        if all(i in accepted for i in ids)
    }


def make_pairs(
    instructions: Sequence[Instruction],
    candidates: Sequence[Candidate],
    scores: Mapping[str, int],
    params: PairsParams,
    seed: int,
) -> list[Pair]:
    """All pairs of an instruction's answers whose scores differ by at least `min_gap`, a few drawn at random of each.

    At most `max_per_instruction` are drawn per (image, question), with random numbers that belong to the
    instruction, so that one instruction's pairs never depend on another's. Equal answers never make a pair, even where
    the coin of an ablation has judged their equal claims differently.
    """
    by_instruction: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.id in scores:
            by_instruction[candidate.instruction_id].append(candidate)
    pairs: list[Pair] = []
    for instruction in instructions:
        ranked = sorted(by_instruction[instruction.id], key=lambda c: (-scores[c.id], c.sample))
        possible = [
            Pair(instruction, better, worse, scores[better.id], scores[worse.id])
            for better, worse in itertools.combinations(ranked, 2)
            if scores[better.id] - scores[worse.id] >= params.min_gap and better.answer != worse.answer
        ]
        draw = random.Random(hashlib.blake2b(f"{seed}/{instruction.id}/pairs".encode()).digest())
        pairs += draw.sample(possible, min(len(possible), params.max_per_instruction))
    return pairs


def require_pairs(pairs: Sequence[Pair], scored: int, params: PairsParams) -> None:
    """Raise ValueError when there is nothing to train on, with the way out."""
    if not pairs:
        raise ValueError(
            f"no pairs: among {scored} scored candidates no two answers to one instruction differ by pairs.min_gap = "
            f"{params.min_gap} rejected claims; lower it, sample more (generate.samples), or look at the judgements"
        )


def words(text: str) -> int:
    """Length of an answer in words."""
    return len(text.split())


def relative_length_gap(pairs: Sequence[Pair]) -> float:
    """|mean length of rejected − mean length of chosen| / mean length of rejected, in words."""
    chosen = sum(words(p.chosen.answer) for p in pairs)
    rejected = sum(words(p.rejected.answer) for p in pairs)
    return abs(rejected - chosen) / rejected


def balance_lengths(pairs: Sequence[Pair]) -> tuple[list[Pair], float]:
    """Drop the pairs whose rejected answer is much longer, so that "shorter" is not what is learned.

    For r in 0, .02, … .98, pairs with (len_rejected − len_chosen)/len_rejected > r are dropped; the r with the
    smallest relative gap of mean lengths is kept (the larger r on a tie: it keeps more). Returns pairs and r.
    """
    best, best_r, best_gap = list(pairs), 1.0, relative_length_gap(pairs) if pairs else 0.0
    for r in (step / 50 for step in reversed(range(50))):
        kept = [p for p in pairs if words(p.rejected.answer) - words(p.chosen.answer) <= r * words(p.rejected.answer)]
        if kept and (gap := relative_length_gap(kept)) < best_gap:
            best, best_r, best_gap = kept, r, gap
    return best, best_r


def keep_pairs(drawn: Sequence[Pair], balance_length: bool = True) -> tuple[list[Pair], float]:
    """The drawn pairs, length-balanced unless the ablation `balance_length: false` leaves them as they are, and r."""
    return balance_lengths(drawn) if balance_length else (list(drawn), 1.0)


def statistics(pairs: Sequence[Pair], before_balance: Sequence[Pair], r: float) -> dict[str, object]:
    """What a reader wants to know of the pairs: counts, lengths in words, score gaps."""
    gaps = Counter(p.chosen_score - p.rejected_score for p in pairs)
    return {
        "pairs": len(pairs),
        "pairs_before_balance": len(before_balance),
        "instructions_with_pairs": len({p.instruction.id for p in pairs}),
        "length_threshold_r": r,
        "mean_words_chosen": fmean(words(p.chosen.answer) for p in pairs) if pairs else 0.0,
        "mean_words_rejected": fmean(words(p.rejected.answer) for p in pairs) if pairs else 0.0,
        "score_gaps": {str(gap): gaps[gap] for gap in sorted(gaps)},
    }


def write_pairs(path: Path, pairs: Sequence[Pair], image_root: Path, name: str) -> None:
    """Write parquet in the public dataset's columns, images inside, so that any tool for that dataset reads it.

    `origin_split` is JSON as there: the model that answered, and with us the id of the instruction.
    """
    rows = [
        {
            "ds_name": name,
            "image": {
                "bytes": (image_root / pair.instruction.image_path).read_bytes(),
                "path": pair.instruction.image_path,
            },
            "question": pair.instruction.question,
            "chosen": pair.chosen.answer,
            "rejected": pair.rejected.answer,
            "origin_dataset": pair.instruction.source,
            "origin_split": json.dumps({"model": pair.chosen.model, "instruction": pair.instruction.id}),
            "idx": str(index),
            "image_path": pair.instruction.image_path,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "trl_prompt": [{"role": "user", "content": pair.instruction.question}],
            "trl_chosen": [{"role": "assistant", "content": pair.chosen.answer}],
            "trl_rejected": [{"role": "assistant", "content": pair.rejected.answer}],
        }
        for index, pair in enumerate(pairs)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # the whole file or nothing, whenever the process dies
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
    partial.replace(path)
