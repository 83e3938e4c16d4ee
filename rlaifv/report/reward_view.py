"""What the reward likes, in a notebook: an image's sampled answers in the order of their reward, token by token."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlaifv.records import Candidate, Instruction
from rlaifv.report.claims_view import header_html, show_html
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

    def page(self, instruction_id: str) -> str:
        """HTML of one instruction: its image and its `shown` distinct answers of the highest normalized reward."""
        instruction = self.instructions[instruction_id]
        path = self.image_root / instruction.image_path
        cut = {c.answer: c.finish_reason == "length" for c in self.candidates[instruction_id]}
        asked = Asked(open_image(path), instruction.question, list(cut), list(cut.values()))
        logps = token_logps(self.policy, self.reference, [asked])[0]
        ratios = [tokens.policy - tokens.reference for tokens in logps]
        order = sorted(range(len(ratios)), key=lambda i: -ratios[i].mean().item())
        by_sum = sorted(order, key=lambda i: -ratios[i].sum().item())
        rows = ""
        for i in order[: self.shown]:
            pieces = token_texts(self.policy, logps[i].ids)
            rows += (
                f"<tr><td>{ratios[i].mean().item():+.3f}</td><td>{ratios[i].sum().item():+.2f}</td>"
                f"<td>{by_sum.index(i) + 1}</td><td>{len(pieces)}</td>"
                f'<td style="text-align:left">{tokens_html(pieces, ratios[i])}</td></tr>'
            )
        return (
            f"{header_html(instruction, path)}"
            "<table><tr><th>nats a token</th><th>summed</th><th>place by sum</th><th>tokens</th>"
            f'<th style="text-align:left">answer</th></tr>{rows}</table>'
        )


def token_texts(vlm: VLM, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it."""
    texts = [vlm.tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(len(ids) + 1)]
    ends = [END if token == vlm.tokenizer.eos_token_id else "" for token in ids]
    return [after[len(before) :] + end for before, after, end in zip(texts, texts[1:], ends, strict=False)]


def tokens_html(pieces: Sequence[str], ratios: torch.Tensor) -> str:
    """Tokens on a background from red (the policy says it less than the reference) over white to green (more)."""
    spans = ""
    for piece, ratio in zip(pieces, ratios.tolist(), strict=True):
        light = 100 - 35 * min(abs(ratio) / FULL_COLOR, 1)
        hue = 120 if ratio > 0 else 0
        spans += (
            f'<span style="background:hsl({hue} 70% {light:.0f}%)" title="{ratio:+.2f}">{html.escape(piece)}</span>'
        )
    return spans
