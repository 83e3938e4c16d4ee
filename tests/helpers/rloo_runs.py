"""Small runs of reinforcement learning on a random model, with judges that look at words."""

import dataclasses
from pathlib import Path

from tiny_llava import picture, save_tiny_llava

from rlaifv.params import RewardWeights, RlooParams, TrainParams
from rlaifv.training.rewards import Judged
from rlaifv.training.rloo import RlooResult, train_rloo
from rlaifv.training.verdicts import Task

PARAMS = RlooParams(
    steps=6,
    prompts=2,
    samples=4,
    micro_batch_size=4,
    learning_rate=3e-3,
    beta=0.05,
    captions=None,
    temperature=1.0,
    max_new_tokens=10,
    checkpoints=3,
    compared=2,
)
TRAIN = TrainParams(dtype="float32", warmup_ratio=0.0)
NONE = RewardWeights(
    claims=0.0,
    recall=0.0,
    length=0.0,
    stop=0.0,
    correct=0.0,
    reward_model=0.0,
    scored_by=None,
    steps=None,
    learning_rate=None,
)
WEIGHTS = dataclasses.replace(NONE, claims=1.0, length=0.5, stop=1.0)
TASKS = [Task(f"task-{k}", f"{k}.png", "what is in the image ?", usual=4.0) for k in range(5)]
"""Two steps to a pass: a run of six has three."""


class WordJudges:
    """Every word is a claim, "dog" and "cat" are false ones; of an answer with a "kite" nothing can be said."""

    needs_facts = False

    def judge(self, tasks, answers):
        return [[self.look(task, answer) for answer in row] for task, row in zip(tasks, answers, strict=True)]

    def look(self, task: Task, answer) -> Judged:
        words = answer.text.split()
        known = "kite" not in words
        return Judged(
            text=answer.text,
            tokens=len(answer.token_ids),
            finished=answer.finish_reason == "stop",
            usual=task.usual,
            claims=tuple(words) if known else None,
            accepted=tuple(word not in ("dog", "cat") for word in words) if known else (),
        )


def save_inputs(folder: Path) -> Path:
    save_tiny_llava(folder / "model")
    (folder / "images").mkdir()
    for k in range(len(TASKS)):
        (folder / "images" / f"{k}.png").write_bytes(picture(k))
    return folder


def run(folder: Path, name: str, params=PARAMS, tasks=TASKS, **others) -> RlooResult:
    settings = {"weights": WEIGHTS, "train": TRAIN, "seed": 3, **others}
    return train_rloo(
        policy=str(folder / "model"),
        tasks=tasks,
        load_judges=WordJudges,
        made_of={},
        params=params,
        image_root=folder / "images",
        out=folder / name / "out",
        scratch=folder / name / "scratch",
        **settings,
    )
