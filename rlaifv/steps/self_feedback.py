"""Self-feedback: an aligned model scores its own answers with the reward that DPO taught it (RLAIF-V, section 2.4).

    r(y) = β/|y| · (log π_θ(y | image, x) − log π_ref(y | image, x))

π_θ is the aligned policy, π_ref the model that it was aligned from, |y| the number of tokens. Without 1/|y| the sum
favors one length, which is why the paper divides (how much it matters depends on the model: notebook 85 measures it).
Many answers to one prompt share its image and text (rlaifv.inference.logprobs), and both models read the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from PIL import Image

from rlaifv.inference.logprobs import continuation_logprobs
from rlaifv.inference.reward import Rated, score
from rlaifv.records import Candidate, Instruction, ModelRecord, Reject, batched
from rlaifv.store import Store
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, load_model, loaded
from rlaifv.vlm.reward_format import RewardModel


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probs in nats of one answer, summed over its `tokens` (the end token is one, unless the answer was cut)."""

    policy: float
    reference: float
    tokens: int

    def reward(self, beta: float, normalize: bool = True) -> float:
        """r(y) = β (log π_θ − log π_ref), divided by |y| if `normalize`."""
        return beta * (self.policy - self.reference) / (self.tokens if normalize else 1)


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs in nats of one answer's tokens: `ids`, and two fp64 CPU tensors (tokens,). The end token is the last
    one, unless the answer was cut."""

    ids: list[int]
    policy: torch.Tensor
    reference: torch.Tensor

    def summed(self) -> AnswerLogps:
        return AnswerLogps(self.policy.sum().item(), self.reference.sum().item(), max(len(self.ids), 1))


@dataclass(frozen=True)
class Asked:
    """Answers to one question about one image. `cut[i]`: answer i was ended by the token limit, not by the model."""

    image: Image.Image | None
    question: str
    answers: Sequence[str]
    cut: Sequence[bool] | None = None


def token_logps(policy: VLM, reference: VLM, asked: Sequence[Asked]) -> list[list[TokenLogps]]:
    """Log-probs of every token of every answer under both models; equal answers to one question are computed once.

    Args:
        policy: π_θ.
        reference: π_ref.
        asked: prompts with their answers, several to a forward.

    Returns:
        For each prompt, for each answer in order, its TokenLogps.

    Raises:
        ValueError: the two models do not read the same tokens.
    """
    check_same_tokens(policy, reference)
    encoded = [encode(policy, item.image, item.question, list(dict.fromkeys(item.answers))) for item in asked]
    of_policy = continuation_logprobs(policy, encoded)
    of_reference = continuation_logprobs(reference, encoded)
    results = []
    for item, coded, ours, theirs in zip(asked, encoded, of_policy, of_reference, strict=True):
        tokens = [row[start:] for row, start in zip(coded.rows, coded.answer_starts, strict=True)]
        rows = dict(zip(dict.fromkeys(item.answers), zip(tokens, ours, theirs, strict=True), strict=True))
        scored = []
        for answer, cut in zip(item.answers, item.cut or [False] * len(item.answers), strict=True):
            ids, a, b = rows[answer]
            said = len(ids) - cut  # a cut answer never said the end token
            scored.append(TokenLogps(ids[:said], a[:said].double(), b[:said].double()))
        results.append(scored)
    return results


def answer_logps(policy: VLM, reference: VLM, asked: Sequence[Asked]) -> list[list[AnswerLogps]]:
    """`token_logps`, summed over each answer's tokens."""
    return [[tokens.summed() for tokens in answers] for answers in token_logps(policy, reference, asked)]


def check_same_tokens(policy: VLM, reference: VLM) -> None:
    """Raise ValueError unless both models have one vocabulary and one chat template."""
    problem = None
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        problem = "vocabularies"
    elif len({(vlm.processor or vlm.tokenizer).chat_template for vlm in (policy, reference)}) > 1:
        problem = "chat templates"
    if problem:
        raise ValueError(f"{policy.name} and {reference.name} have different {problem}: log-probs cannot be compared")


def load_pair(model: ModelRecord, policy: Path, reference: Path) -> tuple[VLM, VLM]:
    """π_θ and π_ref from their folders, in the dtype and on the device of the run's policy."""
    return load_model(model, policy), load_model(model, reference)


def best_of_n(scored: Sequence[AnswerLogps], beta: float, normalize: bool = True) -> int:
    """The index of the answer with the highest reward; the first of equals. Raises ValueError without answers."""
    if not scored:
        raise ValueError("no answer to choose from")
    return max(range(len(scored)), key=lambda i: scored[i].reward(beta, normalize))


@dataclass(frozen=True)
class CandidateLogps:
    """A candidate's log-probs as they are stored, with the fingerprints of both models."""

    candidate_id: str
    policy_logp: float
    reference_logp: float
    tokens: int
    policy: str
    reference: str


def write_logps(
    load: Callable[[], tuple[VLM, VLM]],
    candidates: Sequence[Candidate],
    instructions: Sequence[Instruction],
    image_root: Path,
    batch_size: int,
    store: Store,
    out: Path,
    max_reject_rate: float = 0.05,
) -> tuple[int, int]:
    """Write the log-probs of every candidate to `out`, `batch_size` instructions at a time.

    `load` gives the policy and the reference; it is called when something is left to do. Candidates whose image cannot
    be read are rejected. Returns the counts of rows and rejects.
    """

    def rows(group: Sequence[Candidate], asked: Sequence[Asked]) -> list[CandidateLogps]:
        policy, reference = models()
        names = policy.fingerprint, reference.fingerprint
        scored = chain.from_iterable(answer_logps(policy, reference, asked))
        pairs = zip(group, scored, strict=True)
        return [CandidateLogps(c.id, s.policy, s.reference, s.tokens, *names) for c, s in pairs]

    with loaded(load) as models:
        return write_rows(rows, candidates, instructions, image_root, batch_size, store, out, max_reject_rate)


@dataclass(frozen=True)
class CandidateScore:
    """What a reward model gives a candidate, as it is stored, with its fingerprint."""

    candidate_id: str
    reward: float
    model: str


def write_scores(
    load: Callable[[], RewardModel],
    candidates: Sequence[Candidate],
    instructions: Sequence[Instruction],
    image_root: Path,
    batch_size: int,
    store: Store,
    out: Path,
    max_reject_rate: float = 0.05,
) -> tuple[int, int]:
    """Write what a reward model that reads no facts gives every candidate to `out`, as `write_logps` does log-probs."""

    def rows(group: Sequence[Candidate], asked: Sequence[Asked]) -> list[CandidateScore]:
        rewards = chain.from_iterable(score(model(), [Rated(a.image, a.question, a.answers) for a in asked]))
        name = model().vlm.fingerprint
        return [CandidateScore(c.id, r, name) for c, r in zip(group, rewards, strict=True)]

    with loaded(load) as model:
        return write_rows(rows, candidates, instructions, image_root, batch_size, store, out, max_reject_rate)


def write_rows(
    rows: Callable[[Sequence[Candidate], Sequence[Asked]], list],
    candidates: Sequence[Candidate],
    instructions: Sequence[Instruction],
    image_root: Path,
    batch_size: int,
    store: Store,
    out: Path,
    max_reject_rate: float,
) -> tuple[int, int]:
    """Write a row for every candidate, `batch_size` instructions at a time, and reject those whose image cannot be
    read; `rows` makes a batch's from its candidates and what they were asked. Returns the counts of rows and rejects.
    """
    of_instruction: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        of_instruction.setdefault(candidate.instruction_id, []).append(candidate)
    with_answers = [i for i in instructions if i.id in of_instruction]

    def score_chunk(chunk: Sequence[Instruction]) -> tuple[list, list[Reject]]:
        rejects, asked, readable = [], [], []
        for instruction in chunk:
            group = of_instruction[instruction.id]
            try:
                image = open_image(image_root / instruction.image_path)
            except (OSError, ValueError) as error:
                rejects += [Reject(c.id, store.stage, str(error)) for c in group]
                continue
            cut = [c.finish_reason == "length" for c in group]
            asked.append(Asked(image, instruction.question, [c.answer for c in group], cut))
            readable += group
        return rows(readable, asked), rejects

    store.run(batched(with_answers, batch_size), score_chunk)
    return store.publish(out, sum(len(of_instruction[i.id]) for i in with_answers), max_reject_rate)
