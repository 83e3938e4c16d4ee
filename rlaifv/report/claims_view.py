"""Browse what a round made of one image: candidates, their claims with P(yes), and the pairs."""

import html
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from rlaifv.records import Candidate, Claim, Instruction, Judgement, read_records
from rlaifv.report.page import STYLE, claim_html, data_uri
from rlaifv.stage import PREPARED, Paths


@dataclass(frozen=True)
class Round:
    """The records of one round, looked up by instruction and candidate."""

    instructions: list[Instruction]
    candidates: dict[str, list[Candidate]]
    claims: dict[str, list[Claim]]
    judgements: dict[str, Judgement]
    pairs: dict[str, list[dict]]
    image_root: Path

    def show(self, index: int) -> None:
        """Display one instruction in a notebook."""
        show_html(self.page(self.instructions[index].id))

    def page(self, instruction_id: str) -> str:
        """HTML of one instruction: image, question, every candidate claim by claim, and its pairs."""
        instruction = next(i for i in self.instructions if i.id == instruction_id)
        rows = "".join(self._candidate_html(c) for c in self.candidates[instruction_id])
        pairs = "".join(
            f"<p><b>chosen</b> ({p['chosen_score']}) {html.escape(p['chosen'])}<br>"
            f"<b>rejected</b> ({p['rejected_score']}) {html.escape(p['rejected'])}</p>"
            for p in self.pairs[instruction_id]
        )
        return (
            f"{header_html(instruction, self.image_root / instruction.image_path)}"
            f"<h4>candidates</h4>{rows}<h4>pairs</h4>{pairs or 'none: every candidate has the same score'}"
        )

    def _candidate_html(self, candidate: Candidate) -> str:
        judged = [(c, self.judgements[c.id]) for c in self.claims[candidate.id] if c.id in self.judgements]
        spans = [claim_html({"claim": c.claim, "p_yes": j.p_yes, "p_no": j.p_no}) for c, j in judged]
        score = -sum(not j.accepted for _, j in judged)
        answer = f"<p>#{candidate.sample} (score {score}) {html.escape(candidate.answer)}</p>"
        return answer + "".join(spans)


def header_html(instruction: Instruction, image: Path) -> str:
    """The report's style, then an instruction's id, question and image."""
    return (
        f"<style>{STYLE}</style><h3>{html.escape(instruction.id)}: {html.escape(instruction.question)}</h3>"
        f'<img src="{data_uri(image)}" width="216" alt="">'
    )


def show_html(page: str) -> None:
    """Display HTML in a notebook."""
    from IPython.display import HTML, display

    display(HTML(page))


def load_round(iteration: str, image_root: Path) -> Round:
    """Read a round's records; FileNotFoundError names the file that a stage has not written yet."""
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
    return Round(instructions, candidates, claims, judgements, pairs, image_root)
