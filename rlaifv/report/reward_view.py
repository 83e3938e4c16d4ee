"""What the reward likes, in a notebook: an image's sampled answers in the order of their reward, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from rlaifv.records import Candidate, Instruction
from rlaifv.report.render import render, show_html
from rlaifv.steps.self_feedback import Asked, token_logps
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM

FULL_COLOR = 3.0
"""Nats at which the color of a token is full."""
END = "⏎"
"""How the end token is shown."""


@dataclass(frozen=True)
class RewardView:
    """Stored candidates by instruction, and the two models whose log-ratio is the reward."""

    policy: VLM
    reference: VLM
    instructions: Mapping[str, Instruction]
    candidates: Mapping[str, Sequence[Candidate]]
    image_root: Path
    shown: int = 8

    def show(self, instruction_id: str) -> None:
        """Display one instruction in a notebook."""
        show_html(self.page(instruction_id))

    def page(self, instruction_id: str) -> Markup:
        """HTML of one instruction: its image and its `shown` distinct answers of the highest normalized reward."""
        instruction = self.instructions[instruction_id]
        image = self.image_root / instruction.image_path
        cut = {c.answer: c.finish_reason == "length" for c in self.candidates[instruction_id]}
        asked = Asked(open_image(image), instruction.question, list(cut), list(cut.values()))
        rows = []
        for logps in token_logps(self.policy, self.reference, [asked])[0]:
            ratios = logps.policy - logps.reference
            tokens = list(zip(token_texts(self.policy, logps.ids), ratios.tolist(), strict=True))
            rows.append({"mean": ratios.mean().item(), "sum": ratios.sum().item(), "tokens": tokens})
        rows.sort(key=lambda row: -row["mean"])
        for place, row in enumerate(sorted(rows, key=lambda row: -row["sum"]), start=1):
            row["place"] = place
        rows = rows[: self.shown]
        return render("reward.html", instruction=instruction, image=image, rows=rows, full_color=FULL_COLOR)


def token_texts(vlm: VLM, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it."""
    texts = [vlm.tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(len(ids) + 1)]
    ends = [END if token == vlm.tokenizer.eos_token_id else "" for token in ids]
    return [after[len(before) :] + end for before, after, end in zip(texts, texts[1:], ends, strict=False)]
