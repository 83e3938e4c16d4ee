"""What the judges of reinforcement learning say of a step's answers: divider, labeler and, if there is one, a reward
model. Divider and labeler are asked in the words of the method's own steps (`steps.divide`, `steps.feedback`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from PIL import Image

from rlaifv import ROOT
from rlaifv.inference.reward import Rated, score
from rlaifv.inference.roles import Model, load_role, look
from rlaifv.inference.sampling import Generation
from rlaifv.inference.yes_no import judge_fit
from rlaifv.params import DivideParams, RewardWeights, ServerParams
from rlaifv.records import Candidate, Instruction, ModelRecord
from rlaifv.stage import REWARD_MODELS
from rlaifv.steps.divide import Division, divide_answers
from rlaifv.training.rewards import Judged
from rlaifv.vlm.chat_format import UnfitText
from rlaifv.vlm.images import open_image
from rlaifv.vlm.reward_format import RewardModel, load_reward_model

Prompted = tuple[Image.Image, str, Sequence[str], Sequence[str]]
"""Image, question, answers to it, and facts."""

Score = Callable[[Sequence[Prompted]], list[list[float]]]
"""A reward model: from prompts to the scores of their answers."""


@dataclass(frozen=True)
class Task:
    """An instruction as reinforcement learning asks it: `usual` is the mean length in tokens of the base model's
    answers to it, `facts` are texts that are true of the image (captions), `gold` is the right answer, "" if unknown.
    """

    id: str
    image_path: str
    question: str
    usual: float
    facts: tuple[str, ...] = ()
    gold: str = ""


SHORT = 3
"""Words of a reference that is itself the right answer ("no", "a red cup"); a longer one is a text about the image."""


def make_tasks(
    instructions: Sequence[Instruction],
    candidates: Sequence[Candidate],
    captions: Mapping[str, Sequence[str]] = {},
) -> list[Task]:
    """The instructions with the mean length of the base model's `candidates` to them (0 where it has none). An
    instruction's reference is the right answer where it is `SHORT`, else the facts, in whose place come the `captions`
    of its image where there are any (`steps.facts.read_facts`)."""
    lengths: dict[str, list[int]] = {}
    for candidate in candidates:
        lengths.setdefault(candidate.instruction_id, []).append(candidate.n_tokens)
    tasks = []
    for i in instructions:
        usual, short = fmean(lengths.get(i.id, [0])), len(i.reference.split()) <= SHORT
        facts, gold = ((), i.reference) if short else ((i.reference,), "")
        facts = tuple(captions.get(Path(i.image_path).name, ())) or facts
        tasks.append(Task(i.id, i.image_path, i.question, usual, facts, gold))
    return tasks


def reward_model_folder(scored_by: str | None) -> Path | None:
    """Where a run's reward model lies: that of an entry of reward_runs, or the folder that is named."""
    if scored_by is None:
        return None
    return ROOT / scored_by if "/" in scored_by else REWARD_MODELS / scored_by / "model"


def load_judges(
    divider: ModelRecord,
    labeler: ModelRecord,
    weights: RewardWeights,
    server: ServerParams,
    params: DivideParams,
    suffix: str,
    seed: int,
    image_root: Path,
    reward_model: Path | None = None,
    dtype: str = "float32",
) -> "Judges":
    """The judges that a run's weights count, and the reward model in a folder where there is one; all are in memory at
    once, beside the policy. Without `claims` no labeler is asked, without `claims` and `recall` nothing is divided."""
    asked = reward_model and load_reward_model(str(reward_model), dtype=dtype)
    splits = load_role(divider, server) if weights.claims or weights.recall else None
    judges = load_role(labeler, server) if weights.claims else None
    needs_facts = bool(asked) and asked.format.facts
    return Judges(splits, judges, params, suffix, seed, image_root, asked and scorer(asked), needs_facts)


def scorer(model: RewardModel) -> Score:
    """A reward model as the judges ask it; it reads facts only where it was trained with them."""

    def ask(prompts: Sequence[Prompted]) -> list[list[float]]:
        facts = [list(facts) if model.format.facts else None for *_, facts in prompts]
        return score(model, [Rated(*prompt[:3], known) for prompt, known in zip(prompts, facts, strict=True)])

    return ask


@dataclass
class Judges:
    """The loaded models that rewards are computed with, and how they are asked; one that no reward needs is None.
    `needs_facts` says that the reward model reads facts about an image."""

    divider: Model | None
    labeler: Model | None
    params: DivideParams
    suffix: str
    seed: int
    image_root: Path
    score: Score | None = None
    needs_facts: bool = False
    facts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # a task's as claims, divided when first needed

    def judge(self, tasks: Sequence[Task], answers: Sequence[Sequence[Generation]]) -> list[list[Judged]]:
        """What rewards look at, of the answers to each task."""
        texts = [[answer.text.strip() for answer in row] for row in answers]
        divisions = self._divide(tasks, texts)
        verdicts = self._ask_labeler(tasks, divisions)
        scores = self._score(tasks, texts)
        return [
            [
                Judged(
                    text=text,
                    tokens=len(answer.token_ids),
                    finished=answer.finish_reason == "stop",
                    usual=task.usual,
                    claims=None if division.problem else tuple(division.claims),
                    accepted=tuple(said[q] for q in division.questions if q in said),
                    facts=self.facts.get(task.id) or None,
                    gold=task.gold,
                    score=score,
                )
                for answer, text, division, score in zip(*of_task, strict=True)
            ]
            for task, said, *of_task in zip(tasks, verdicts, answers, texts, divisions, scores, strict=True)
        ]

    def _divide(self, tasks: Sequence[Task], texts: Sequence[Sequence[str]]) -> list[list[Division]]:
        """The divider's claims of every answer and of the facts of new tasks; equal texts are divided once."""
        if self.divider is None:
            return [[Division([], [], "no reward looks at claims")] * len(row) for row in texts]
        new = [task for task in tasks if task.id not in self.facts]
        asked = [(task.question, text) for task, row in zip(tasks, texts, strict=True) for text in row]
        asked += [(task.question, fact) for task in new for fact in task.facts]
        asked = list(dict.fromkeys(asked))
        found = dict(zip(asked, divide_answers(self.divider, asked, self.params, self.seed), strict=True))
        for task in new:
            claims = [claim for fact in task.facts for claim in found[task.question, fact].claims]
            self.facts[task.id] = tuple(dict.fromkeys(claims))
        return [[found[task.question, text] for text in row] for task, row in zip(tasks, texts, strict=True)]

    def _ask_labeler(self, tasks: Sequence[Task], divisions: Sequence[Sequence[Division]]) -> list[dict[str, bool]]:
        """For each task, question → whether its claim is accepted (a tie is not); all of a step's questions about an
        image are asked together, each once. One that the labeler cannot be asked, or has no finite answer to, is left
        out."""
        if self.labeler is None:
            return [{} for _ in tasks]
        questions: dict[str, list[str]] = {}
        for task, row in zip(tasks, divisions, strict=True):
            of_image = [*questions.get(task.image_path, ()), *(q for division in row for q in division.questions)]
            questions[task.image_path] = list(dict.fromkeys(of_image))
        items = [
            (look(self.labeler, self.image_root / path), [f"{q} {self.suffix}" for q in asked])
            for path, asked in questions.items()
        ]
        said = {
            path: {
                question: answer[0] > answer[1]
                for question, answer in zip(asked, replies, strict=True)
                if not isinstance(answer, UnfitText) and math.isfinite(sum(answer))
            }
            for (path, asked), replies in zip(questions.items(), judge_fit(self.labeler, items), strict=True)
        }
        return [said[task.image_path] for task in tasks]

    def _score(self, tasks: Sequence[Task], texts: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """The reward model's scores; None where there is none."""
        if self.score is None:
            return [[None] * len(row) for row in texts]
        images = [open_image(self.image_root / task.image_path) for task in tasks]
        return self.score([(i, t.question, row, t.facts) for i, t, row in zip(images, tasks, texts, strict=True)])
