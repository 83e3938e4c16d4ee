"""Reinforcement learning from claims: REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740).

Of every step's instructions the policy samples k answers each, the judges say what is true of them (`verdicts`), and

    r_i = Σ w·reward(y_i) - β log π(y_i|x)/π_ref(y_i|x),    A_i = r_i - mean of r_j over the k - 1 others

weighs the gradient of log π(y_i|x). The rewards are those of `rewards`, the loss and the KL term are TRL's
(`RLOOTrainer`); answers are drawn by `inference.sampling` in place of TRL's generation: an image and its question are
computed once for all k answers, and answer s of instruction i in step t comes from the random numbers of
(seed, t, i, s) alone, so that a killed run goes on to the same bytes.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from trl import RLOOConfig, RLOOTrainer

from rlaifv.fingerprint import digest, stage_sources
from rlaifv.inference.sampling import Decoding, Generation, sample_encoded, uniforms
from rlaifv.params import RewardWeights, RlooParams, TrainParams
from rlaifv.records import Reject, to_json, write_atomic
from rlaifv.store import FINISHED
from rlaifv.training import library_quirks
from rlaifv.training.checkpoints import WriteCheckpoints, checkpoints, published
from rlaifv.training.policy import freeze, load_policy, lora_config
from rlaifv.training.rewards import REWARDS, Judged, neutral
from rlaifv.training.run_folder import carry_out, go_on_from, record_whole
from rlaifv.training.trainer import Habits, Line, trainer_settings
from rlaifv.training.verdicts import Judges, Task
from rlaifv.vlm.chat_format import control_ids, encode_questions
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

Truth = Callable[[str, str], int | None]
"""How many claims of an answer are false: from an image's path and the answer; None where nobody knows."""


@dataclass(frozen=True)
class RlooResult:
    """What a run did; `rejects` are (instruction id, reason)."""

    checkpoints: list[str]
    steps: int
    answers: int
    rejects: list[tuple[str, str]]
    log: str


def train_rloo(
    policy: str,
    tasks: Sequence[Task],
    load_judges: Callable[[], Judges],
    made_of: dict,
    weights: RewardWeights,
    params: RlooParams,
    train: TrainParams,
    image_root: Path,
    out: Path,
    scratch: Path,
    seed: int,
    truth: Truth | None = None,
) -> RlooResult:
    """Train `policy` on its own answers to `tasks` and write `out/checkpoint-<k>`, k = 1..n, and `out/log.csv`.

    `load_judges` is called when something is left to do; `made_of` says what else determines the result (the judges'
    fingerprints and settings). `truth` is written to the log beside the rewards and changes nothing. Work lives in
    `scratch/rloo-<h>`, h a hash of all that determines the result; kill the run, call it again, and it ends with the
    same bytes. Optimizer settings that `params` has not are those of `train`; one process trains.

    Raises ValueError for fewer tasks than a step has, RuntimeError when another process trains the same,
    FloatingPointError when loss or gradient is not finite.
    """
    rate = weights.learning_rate or params.learning_rate
    params = dataclasses.replace(params, steps=weights.steps or params.steps, learning_rate=rate)
    settings = dataclasses.replace(
        train,
        learning_rate=params.learning_rate,
        epochs=1,
        checkpoints_per_epoch=params.checkpoints,
        keep_checkpoints=None,
        processes=1,
        accelerate_config=None,
    )
    identity = {
        "policy": fingerprint_checkpoint(policy),
        "tasks": [dataclasses.asdict(task) for task in tasks],
        "made_of": made_of,
        "weights": dataclasses.asdict(weights),
        "params": dataclasses.asdict(params),
        "train": dataclasses.asdict(settings) | {"collapse_nats": None, "resume_every": None},
        "source": stage_sources("rloo"),
        "seed": seed,
    }
    run = (scratch / f"rloo-{digest(identity)}").resolve()

    def work() -> None:
        run_rloo(policy, tasks, load_judges(), weights, params, settings, image_root, run, seed, truth)

    result = carry_out("rloo", run, published(settings), out, work)
    return RlooResult(
        checkpoints=[str(out / Path(part).name) for part in checkpoints(settings)],
        rejects=[tuple(reject) for reject in result.pop("rejects")],
        log=str(out / "log.csv"),
        **result,
    )


def run_rloo(
    policy: str,
    tasks: Sequence[Task],
    judges: Judges,
    weights: RewardWeights,
    params: RlooParams,
    train: TrainParams,
    image_root: Path,
    run: Path,
    seed: int,
    truth: Truth | None,
) -> None:
    """Load, train (or go on), and write `finished.json` into the run's folder."""
    library_quirks.be_quiet()
    vlm = load_policy(policy, train)
    usable, rejects = readable(vlm, tasks, image_root, params.max_new_tokens, judges.needs_facts)
    freeze(vlm.model, train)
    set_seed(seed)
    last = go_on_from(run)
    if last:
        log.info("rloo: resuming from %s", last.name)
    trainer = ClaimTrainer(vlm, usable, judges, weights, params, train, image_root, run / "trainer", seed, truth)
    trainer.add_callback(WriteCheckpoints(trainer, vlm, train, run, policy))
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    write_log(trainer.state.log_history, run / "published" / "log.csv")
    record_whole(run, "published/log.csv")
    result = {
        "steps": trainer.state.global_step,
        "answers": trainer.state.global_step * params.prompts * params.samples,
        "rejects": [(reject.id, reject.reason) for reject in rejects],
    }
    write_atomic(run / FINISHED, to_json(result))


def readable(
    vlm: VLM, tasks: Sequence[Task], image_root: Path, room: int, needs_facts: bool = False
) -> tuple[list[Task], list[Reject]]:
    """The tasks that the policy can be asked, and why the others cannot: an image that cannot be read, a question that
    holds a special token, no room in the context for `room` tokens of an answer, or no facts for a reward model that
    reads them."""
    usable, rejects = [], []
    for task in tasks:
        try:
            if not task.usual > 0:
                raise ValueError("the base model has no answer to it, so that there is no length to compare with")
            if needs_facts and not task.facts:
                raise ValueError("the reward model reads facts, and there are none of its image: name rloo.captions")
            encode_questions(vlm, open_image(image_root / task.image_path), [task.question], room=room)
            usable.append(task)
        except (OSError, ValueError) as error:
            log.warning("rloo: instruction %s is left out: %s", task.id, error)
            rejects.append(Reject(task.id, "rloo", str(error)))
    return usable, rejects


class StepOrder(Sampler[int]):
    """Which instructions a step asks: a new permutation of them for every pass, from (seed, pass) alone, in steps of
    `prompts`; the incomplete last step is left out. Each comes `samples` times, and a whole step `repeats` times: TRL
    reads a step's batch anew for each of its forward passes.

    The pass is read off the trainer's step, so that a run which goes on does so in its own order.
    """

    def __init__(self, count: int, params: RlooParams, repeats: int, seed: int, step: Callable[[], int]):
        if count < params.prompts:
            raise ValueError(f"{count} instructions do not fill a step: set rloo.prompts (now {params.prompts}) lower")
        self.count, self.params, self.repeats, self.seed, self.step = count, params, repeats, seed, step
        self.steps_per_pass = count // params.prompts

    def __len__(self) -> int:
        return self.steps_per_pass * self.params.prompts * self.params.samples * self.repeats

    def __iter__(self) -> Iterator[int]:
        number = self.step() // self.steps_per_pass
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
        for step in order[: self.steps_per_pass * self.params.prompts].view(-1, self.params.prompts):
            yield from step.repeat_interleave(self.params.samples).repeat(self.repeats).tolist()


class ClaimTrainer(Habits, RLOOTrainer):
    """TRL's RLOOTrainer (1.16) with our sampling and rewards. Its private methods are overridden in four places, each
    said there; `trl` is pinned for them."""

    section = "rloo"

    def __init__(
        self,
        vlm: VLM,
        tasks: Sequence[Task],
        judges: Judges,
        weights: RewardWeights,
        params: RlooParams,
        train: TrainParams,
        image_root: Path,
        folder: Path,
        seed: int,
        truth: Truth | None = None,
    ):
        self.tasks, self.judges, self.params, self.truth = tasks, judges, params, truth
        self.image_root = image_root
        self.rewards: dict[str, list[float | None]] = {}  # of this step's answers, by name
        self.answers: list[list[Generation]] = []  # this step's, by task
        weighed = {name: weight for name, weight in weights.of_rewards.items() if weight}
        # TRL puts a prompt's padding on the left; the policy's own processor is written with its checkpoints
        processor = copy.deepcopy(vlm.processor)
        processor.tokenizer.padding_side = "left"
        super().__init__(
            model=vlm.model,
            reward_funcs=[self._column(name) for name in weighed],
            args=rloo_arguments(params, train, list(weighed.values()), folder, seed),
            train_dataset=Dataset.from_dict({"number": range(len(tasks))}).with_transform(self._read),
            processing_class=processor,
            peft_config=lora_config(vlm.model, train) if train.lora_r else None,
        )
        self.vlm = dataclasses.replace(vlm, model=self.model)
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch())

    def _read(self, rows: dict[str, list[int]]) -> dict[str, list]:
        """What TRL sees of some rows: the prompt as a chat and the image, opened now."""
        tasks = [self.tasks[number] for number in rows["number"]]
        return {
            "number": rows["number"],
            "prompt": [[{"role": "user", "content": task.question}] for task in tasks],
            "image": [open_image(self.image_root / task.image_path) for task in tasks],
        }

    def _column(self, name: str) -> Callable[..., list[float | None]]:
        """One reward as TRL calls it; they are computed together, in `_calculate_rewards`."""

        def reward(**_: object) -> list[float | None]:
            return neutral(self.rewards[name], self.params.samples)

        reward.__name__ = name
        return reward

    def _get_train_sampler(self, dataset: Dataset | None = None) -> StepOrder:
        """TRL's goes on from another permutation when a run is resumed after its first pass."""
        repeats = self.args.steps_per_generation
        return StepOrder(len(self.tasks), self.params, repeats, self.args.seed, lambda: self.state.global_step)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """Nothing of a step is random but by (seed, step): TRL shuffles a step's answers between forward passes."""
        step = self.state.global_step
        torch.manual_seed(int(digest([self.args.seed, step]), 16) >> 1)
        self.now = [self.tasks[row["number"]] for row in inputs[:: self.params.samples]]
        self.images = [row["image"] for row in inputs[:: self.params.samples]]
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], images, multimodal_fields) -> list[list[int]]:
        """Our samples in place of TRL's, with their end token."""
        vlm, params = self.vlm, self.params
        encoded = [
            encode_questions(vlm, image, [task.question]) for image, task in zip(self.images, self.now, strict=True)
        ]
        for item, ids, task in zip(encoded, prompt_ids[:: params.samples], self.now, strict=True):
            if item.prompt_ids != list(ids):
                raise RuntimeError(f"{vlm.name}: TRL tokenizes the prompt of {task.id} in another way than it is asked")
        length, step = params.max_new_tokens, self.state.global_step
        streams = [
            np.stack([uniforms(self.args.seed, f"{step}/{task.id}", s, length) for s in range(params.samples)])
            for task in self.now
        ]
        self.model.eval()  # activation checkpointing would leave the prompts' keys and values out
        with torch.no_grad(), self.accelerator.autocast():
            drawn = sample_encoded(vlm, encoded, streams, Decoding(params.temperature, 0, 1.0, length))
        self.model.train()
        self.answers = [[cut_at_control_token(vlm, answer) for answer in row] for row in drawn]
        return [
            [*answer.token_ids, *([] if answer.end_id is None else [answer.end_id])] or [vlm.tokenizer.pad_token_id]
            for row in self.answers
            for answer in row
        ]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """The judges look at the whole step at once, before TRL asks for one reward after another."""
        judged = [answer for row in self.judges.judge(self.now, self.answers) for answer in row]
        self.rewards = {name: [function(answer) for answer in judged] for name, function in REWARDS.items()}
        for name, value in watched(judged, self.rewards).items():
            self._log_metric(name, value)
        if self.truth:
            paths = [task.image_path for task in self.now for _ in range(self.params.samples)]
            false = [self.truth(path, answer.text) for path, answer in zip(paths, judged, strict=True)]
            if known := [count > 0 for count in false if count is not None]:
                self._log_metric("true_hallucination", fmean(known))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def trained_on(self) -> tuple[str, str]:
        return f", instructions {', '.join(task.id for task in self.now)}", ""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Adapters as PEFT does."""
        if isinstance(self.model, PeftModel):
            return RLOOTrainer.save_model(self, output_dir, _internal_call)
        super().save_model(output_dir, _internal_call)


def cut_at_control_token(vlm: VLM, answer: Generation) -> Generation:
    """The answer up to the first token that steers a model (an image's placeholder, with which the next forward pass
    would look for an image that is not there); it then counts as cut."""
    place = next((k for k, token in enumerate(answer.token_ids) if token in control_ids(vlm.tokenizer)), None)
    if place is None:
        return answer
    ids = answer.token_ids[:place]
    return Generation(vlm.tokenizer.decode(ids, skip_special_tokens=True), ids, "length")


def watched(judged: Sequence[Judged], rewards: dict[str, list[float | None]]) -> dict[str, float]:
    """What a step's row of the log says of its answers: the mean of each reward where it applies, the share of answers
    with a rejected claim (of those with any claim), of answers that could not be judged, and mean tokens."""
    means = {name: [value for value in values if value is not None] for name, values in rewards.items()}
    means |= {
        "judged_hallucination": [not all(answer.accepted) for answer in judged if answer.accepted],
        "unjudged": [not answer.accepted for answer in judged],
        "tokens": [answer.tokens for answer in judged],
    }
    return {name: fmean(values) for name, values in means.items() if values}


class Watch(Line):
    key = "reward"

    def say(self, state, logs: dict[str, float], rate: float) -> None:
        shown = {"answers with a rejected claim": "judged_hallucination", "recall": "recall", "score": "reward_model"}
        log.info(
            "rloo: step %d/%d, reward %.3f%s, %.1f tokens, KL %.3f, %.1f s a step, %.0f s left",
            *(state.global_step, state.max_steps, logs["reward"]),
            "".join(f", {name} {logs[key]:.3f}" for name, key in shown.items() if key in logs),
            *(logs["tokens"], logs.get("kl", 0.0), 1 / rate, (state.max_steps - state.global_step) / rate),
        )


def rloo_arguments(params: RlooParams, train: TrainParams, weights: list[float], folder: Path, seed: int) -> RLOOConfig:
    """TRL's arguments for our parameters; `folder` is where the Trainer writes what it goes on from."""
    args = RLOOConfig(
        **trainer_settings(train, folder, seed) | {"learning_rate": params.learning_rate},
        max_steps=params.steps,
        per_device_train_batch_size=params.micro_batch_size,
        gradient_accumulation_steps=params.prompts * params.samples // params.micro_batch_size,
        num_generations=params.samples,
        max_completion_length=params.max_new_tokens,
        temperature=params.temperature,
        beta=params.beta,
        reward_weights=weights,
        bf16=train.dtype == "bfloat16",
        gradient_checkpointing=train.gradient_checkpointing,
        report_to="none",
    )
    library_quirks.one_gpu_a_process(args)
    return args


LOG_COLUMNS = ("step", "reward", *REWARDS, "judged_hallucination", "true_hallucination", "unjudged", "tokens", "kl")
LOG_COLUMNS += ("entropy", "frac_reward_zero_std", "learning_rate", "grad_norm", "loss")


def write_log(history: list[dict], path: Path) -> None:
    """The trainer's history as CSV, one row a step; no times, so the same run writes the same bytes. A reward that did
    not apply is empty."""
    steps = pd.DataFrame([entry for entry in history if "reward" in entry], columns=LOG_COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    steps.to_csv(path, index=False, float_format="%.8g", lineterminator="\n")
