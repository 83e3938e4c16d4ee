"""Whether a shared prefix gives what plain rows give: tried once a model, on a real row, before anything is trusted.

In bfloat16 a wrong mask hides in rounding: at 60 layers two right ways of computing a log-prob differ by more than a
tenth of a nat, and one token too many or too few in a mask may change less. So the two questions are asked apart:

- *Is it the same function?* In float32, where right ways differ by less than 1e-4 nats and a single token shows. No
  second model is loaded for it: bfloat16 weights are float32 numbers already, and `Float32` widens those of one
  operation at a time, so that a 34B model needs a GB or two and half a minute for a check of all its layers.
- *Is it as exact?* In the model's own dtype. Its noise is measured, not guessed: how far plain rows lie from the
  float32 ones, and a shared prefix may lie three times as far.
"""

import logging
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rlaifv.inference.plain_rows import Results, Tree, plant, run_plain
from rlaifv.vlm.chat_format import EncodedPrompt
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Difference between shared and plain log-probs that is always accepted, in nats, weighted by the plain
probabilities."""

NOISE = 3
"""In half precision, a shared prefix may lie this many times as far from float32 as plain rows do."""

FINER = 1000
"""In float32 it may lie a thousandth as far as half precision's noise: float32 rounds 8,192 to 65,536 times finer."""

CHECKED_TOKENS = 8
"""Tokens of each answer that are compared (a whole vocabulary each)."""

HALF = (torch.bfloat16, torch.float16)


class Float32(TorchDispatchMode):
    """Every operation in float32, whatever the weights are kept in: half-precision tensors are widened as an operation
    reads them, and what asks for half precision gets float32."""

    def __enter__(self):
        # convolutions in TF32, torch's default, round to ten bits (H200: 0.01 nats of a 34B between two batch sizes)
        self.tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        return super().__enter__()

    def __exit__(self, *raised):
        torch.backends.cudnn.allow_tf32 = self.tf32
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def widened(x):
            if isinstance(x, torch.Tensor):
                return x.float() if x.dtype in HALF else x
            return torch.float32 if isinstance(x, torch.dtype) and x in HALF else x

        if func.is_view and func.overloadpacket is not torch.ops.aten.to:
            return func(*args, **(kwargs or {}))  # of weights as they are: what computes with the view widens it
        args, kwargs = tree_map(widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def disagreement(vlm: VLM, encoded: EncodedPrompt, run: Callable[..., Results]) -> str | None:
    """None when `run` gives the log-probs of plain rows at the places that are asked, else why it cannot or does not.

    A model in float32, or one whose kernels take nothing but half precision, is asked in its own dtype alone and
    measured against plain rows one by one.
    """
    trees = [checked_rows(encoded)]
    truth = in_float32(vlm, trees) if vlm.network.dtype in HALF else None
    try:
        shared = run(vlm, trees, full_distribution)
        if truth:
            with Float32():
                widened = run(vlm, trees, full_distribution)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"the shared prefix raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    reference = truth or run_plain(vlm, trees, full_distribution, batch=1)
    noise = distance(reference, run_plain(vlm, trees, full_distribution))
    found = [("", distance(reference, shared), max(TOLERANCE[vlm.network.dtype], NOISE * noise))]
    if truth:
        found.append((" in float32", distance(truth, widened), max(TOLERANCE[torch.float32], noise / FINER)))
    for how, difference, limit in found:
        if not difference <= limit:
            return f"the shared prefix changes log-probs by {difference:.2g} nats{how} (more than {limit:.2g})"
        log.info("%s: shared prefix within %.1e of %.1e nats%s", vlm.name, difference, limit, how)
    return None


def checked_rows(encoded: EncodedPrompt) -> Tree:
    """Three rows and a shortened one, so that branches of different lengths are packed, their answers cut."""
    chosen = zip(encoded.rows[:3], encoded.answer_starts[:3], strict=True)
    rows = [(row[: start + CHECKED_TOKENS], start) for row, start in chosen]
    first, start = rows[0]
    if len(first) > 2:
        rows.append((first[:-1], min(start, len(first) - 1)))
    return plant(0, EncodedPrompt(encoded.prompt_ids, *map(list, zip(*rows, strict=True)), encoded.inputs))


def in_float32(vlm: VLM, trees: list[Tree]) -> Results | None:
    """Plain rows computed in float32, None where the model cannot."""
    try:
        with Float32():
            return run_plain(vlm, trees, full_distribution)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        log.warning("%s cannot be checked in float32, only in its own dtype: %s", vlm.name, reason)
        return None


def distance(plain: Results, other: Results) -> float:
    """The largest difference of two sets of log-probs in nats, each place's weighted by the plain probabilities."""
    return max(float((plain[key].exp() * (plain[key] - other[key]).abs()).sum(-1).max()) for key in plain)


def full_distribution(logits: torch.Tensor, _target: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)
