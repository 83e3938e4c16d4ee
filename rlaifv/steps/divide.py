"""Divide: split an answer into atomic claims and turn each claim into a yes/no question (RLAIF-V, section 2.2).

Two prompts to a language model. Claims and questions must pair up one to one: a list that does not parse, or a
question list of another length, is asked for once more and then rejected; it is never zipped short.
"""

import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlaifv.inference.roles import Model, OpenQuestion, draw_answers
from rlaifv.inference.sampling import Decoding
from rlaifv.inference.served import Sampled
from rlaifv.params import DivideParams
from rlaifv.records import Candidate, Claim, Reject
from rlaifv.store import Store
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.loading import loaded

log = logging.getLogger(__name__)

CLAIMS_PROMPT = """\
You are an expert in extracting facts from a question-answer pair for an image. \
Extract and rewrite the facts of the answer into self-contained sentences. \
Leave out opinions and subjective statements. Present the result in this format:

### Facts:
- (fact 1)
- (fact 2)

### Question-answer pair:
Question: {question}
Answer: {answer}"""

QUESTIONS_PROMPT = """\
You are an expert in modifying a declarative sentence into a general question. \
Modify the sentences one by one. Keep the tense and every negation, and add no content. \
Present the result in this format:

### Modified sentences:
- (question 1)
- (question 2)

### Declarative sentences:
{claims}"""

WHOLE_QUESTION = 'Is everything in this description of the image correct: "{answer}"?'
"""What the ablation `whole_answer` asks: the undivided answer in one question."""

NO_CLAIM = "the answer makes no claim"
"""Why an answer has no claims that was divided well: nothing in it can be checked."""

ATTEMPTS = 2
"""The first try and one retry."""

_BULLET = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.):])\s+")
_NOTHING = re.compile(r"^\(?(none|n/?a|no facts?|nothing)\)?\.?$", re.IGNORECASE)


class Unparsable(ValueError):
    """The divider's reply is not the list that was asked for."""


@dataclass(frozen=True)
class Division:
    """What became of one answer: claims with their questions, or the reason why there are none."""

    claims: list[str]
    questions: list[str]
    problem: str = ""


def parse_list(reply: str, header: str) -> list[str]:
    """The items below `### header:`; without that header, the reply's bulleted lines.

    Accepts -, *, • and numbered bullets and unbulleted lines (kept whole), ends at the next `###` header, and reads
    an explicit "None" as the empty list. Raises Unparsable when there is neither the header nor a bullet.
    """
    lines = reply.replace("\r\n", "\n").split("\n")
    wanted = header.lower().rstrip(":")
    start = next((i for i, line in enumerate(lines) if line.strip().strip("#*: ").lower() == wanted), None)
    if start is None:
        body = [line for line in lines if _BULLET.match(line)]
        if not body:
            raise Unparsable(f"no '### {header}' and no bulleted line in the divider's reply {reply[:60]!r}")
    else:
        body = itertools.takewhile(lambda line: not line.lstrip().startswith("###"), lines[start + 1 :])
    items = [_BULLET.sub("", line).strip() for line in body]
    return [item for item in items if item and not _NOTHING.match(item)]


def divide_answers(
    model: Model, asked: Sequence[tuple[str, str]], params: DivideParams, seed: int, whole_answer: bool = False
) -> list[Division]:
    """Divide each (question, answer); an unusable reply is asked for again with other random numbers.

    With the ablation `whole_answer` nothing is divided: each answer is one claim.
    """
    if whole_answer:
        return [Division([answer], [WHOLE_QUESTION.format(answer=answer)]) for _, answer in asked]
    divisions: list[Division | None] = [None] * len(asked)
    for attempt in range(ATTEMPTS):
        todo = [i for i, division in enumerate(divisions) if division is None or division.problem]
        if not todo:
            break
        if attempt:
            log.info(
                "divide: %d of %d answers are asked for again: %s", len(todo), len(asked), divisions[todo[0]].problem
            )
        for i, division in zip(todo, _attempt(model, [asked[i] for i in todo], params, seed, attempt), strict=True):
            divisions[i] = division
    return divisions  # type: ignore[return-value]


def _attempt(
    model: Model, asked: Sequence[tuple[str, str]], params: DivideParams, seed: int, attempt: int
) -> list[Division]:
    prompts = [CLAIMS_PROMPT.format(question=question, answer=answer) for question, answer in asked]
    lists = [_parse(reply, "Facts:", params) for reply in _ask(model, prompts, params, seed, attempt)]
    divisions = [Division([], [], problem) for _, problem in lists]
    with_claims = [i for i, (claims, problem) in enumerate(lists) if claims and not problem]
    prompts = [QUESTIONS_PROMPT.format(claims="\n".join(f"- {c}" for c in lists[i][0])) for i in with_claims]
    replies = _ask(model, prompts, params, seed, attempt)
    for i, reply in zip(with_claims, replies, strict=True):
        claims = lists[i][0]
        questions, problem = _parse(reply, "Modified sentences:", params)
        if not problem and len(questions) != len(claims):
            problem = f"{len(claims)} claims but {len(questions)} questions"
        divisions[i] = Division([], [], problem) if problem else Division(claims, questions)
    return divisions


def _ask(model: Model, prompts: list[str], params: DivideParams, seed: int, attempt: int) -> list[Sampled | UnfitText]:
    # a reply depends on its prompt alone: the random numbers are those of (seed, prompt, attempt)
    asked = [OpenQuestion(prompt, prompt) for prompt in dict.fromkeys(prompts)]
    decoding = Decoding(params.temperature, 0, params.top_p, params.max_new_tokens)
    drawn = draw_answers(model, asked, [attempt], seed, decoding)
    replies = {a.text: row if isinstance(row, Exception) else row[0] for a, row in zip(asked, drawn, strict=True)}
    return [replies[prompt] for prompt in prompts]


def _parse(reply: Sampled | UnfitText, header: str, params: DivideParams) -> tuple[list[str], str]:
    if isinstance(reply, UnfitText):
        return [], str(reply)
    if reply.finish_reason == "length":
        return [], f"the divider's reply was cut at divide.max_new_tokens = {params.max_new_tokens}"
    try:
        return parse_list(reply.text, header), ""
    except Unparsable as error:
        return [], str(error)


def divide(
    load: Callable[[], Model],
    candidates: Sequence[Candidate],
    questions: dict[str, str],
    params: DivideParams,
    seed: int,
    store: Store,
    out: Path,
    whole_answer: bool = False,
) -> tuple[int, int]:
    """Write every candidate's claims to `out`; `questions` maps instruction ids to their text.

    `load` gives the divider; it is called when something is left to do.
    An answer that makes no claim at all ("What a lovely picture.") goes to the rejects: nothing in it can be
    checked, and a score of 0 would teach the policy to say nothing. Within a chunk, equal answers to equal
    questions are divided once, and equal lists of claims are turned into questions once. Returns the counts of
    claims and of rejected candidates.
    """

    def divide_chunk(chunk: Sequence[Candidate]) -> tuple[list[Claim], list[Reject]]:
        texts = list(dict.fromkeys((questions[c.instruction_id], c.answer) for c in chunk))
        divisions = dict(zip(texts, divide_answers(divider(), texts, params, seed, whole_answer), strict=True))
        claims: list[Claim] = []
        rejects: list[Reject] = []
        for candidate in chunk:
            division = divisions[questions[candidate.instruction_id], candidate.answer]
            problem = division.problem or ("" if division.claims else NO_CLAIM)
            if problem:
                rejects.append(Reject(candidate.id, "divide", problem))
            for k, (claim, question) in enumerate(zip(division.claims, division.questions, strict=True)):
                claims.append(Claim(f"{candidate.id}/{k}", candidate.id, claim, question))
        return claims, rejects

    with loaded(load) as divider:
        store.run(_chunks(candidates, questions, params.batch_size), divide_chunk)
    return store.publish(out, len(candidates), params.max_reject_rate, of="candidate_id")


def _chunks(candidates: Sequence[Candidate], questions: dict[str, str], batch_size: int) -> list[Sequence[Candidate]]:
    """Chunks of `batch_size` distinct texts. An instruction's candidates stay together: that is where answers are
    equal, and where answers in other words make the same claims."""
    chunks: list[list[Candidate]] = []
    texts: set[tuple[str, str]] = set()
    for candidate in sorted(candidates, key=lambda c: c.instruction_id):
        text = (questions[candidate.instruction_id], candidate.answer)
        if not chunks or (text not in texts and len(texts) == batch_size):
            chunks.append([])
            texts = set()
        texts.add(text)
        chunks[-1].append(candidate)
    return chunks
