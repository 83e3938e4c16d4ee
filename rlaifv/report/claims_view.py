"""Browse what an iteration made of one image: candidates, their claims with P(yes), and the pairs."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from markupsafe import Markup

from rlaifv.records import Candidate, Claim, Instruction, Judgement, read_records
from rlaifv.report.render import render, show_html
from rlaifv.stage import PREPARED, Paths


@dataclass(frozen=True)
class IterationView:
    """The records of one iteration, looked up by instruction and candidate."""

    instructions: list[Instruction]
    candidates: dict[str, list[Candidate]]
    claims: dict[str, list[Claim]]
    judgements: dict[str, Judgement]
    pairs: dict[str, list[dict]]
    image_root: Path

    def show(self, index: int) -> None:
        """Display one instruction in a notebook."""
        show_html(self.page(self.instructions[index].id))

    def page(self, instruction_id: str) -> Markup:
        """HTML of one instruction: image, question, every candidate claim by claim, and its pairs."""
        instruction = next(i for i in self.instructions if i.id == instruction_id)
        candidates = []
        for candidate in self.candidates[instruction_id]:
            judged = [(c, self.judgements[c.id]) for c in self.claims[candidate.id] if c.id in self.judgements]
            claims = [{"claim": c.claim, "p_yes": j.p_yes, "p_no": j.p_no} for c, j in judged]
            score = -sum(not j.accepted for _, j in judged)
            shown = {"sample": candidate.sample, "answer": candidate.answer, "score": score, "claims": claims}
            candidates.append(shown)
        return render(
            "claims.html",
            instruction=instruction,
            image=self.image_root / instruction.image_path,
            candidates=candidates,
            pairs=self.pairs[instruction_id],
        )


def load_iteration(iteration: str, image_root: Path) -> IterationView:
    """Read an iteration's records; FileNotFoundError names the file that a stage has not written yet."""
    paths = Paths(iteration)
    candidates: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in read_records(paths.candidates, Candidate):
        candidates[candidate.instruction_id].append(candidate)
    claims: dict[str, list[Claim]] = defaultdict(list)
    for claim in read_records(paths.claims, Claim):
        claims[claim.candidate_id].append(claim)
    judgements = {j.claim_id: j for j in read_records(paths.judgements, Judgement)}
    pairs: dict[str, list[dict]] = defaultdict(list)
    columns = ["origin_split", "chosen", "rejected", "chosen_score", "rejected_score"]
    for row in pq.read_table(paths.pairs, columns=columns).to_pylist():
        pairs[row["origin_split"]].append(row)
    instructions = [i for i in read_records(PREPARED / "train.jsonl", Instruction) if i.id in candidates]
    return IterationView(instructions, candidates, claims, judgements, pairs, image_root)
