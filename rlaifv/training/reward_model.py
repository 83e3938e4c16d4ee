"""A reward model from preferences (Fact-RLHF, arXiv 2309.14525, section 3), from a file of them to its checkpoints.

In reading order: `write_preferences` tokenizes them, `RewardScorer` gives both answers' rewards, `preference_loss`
compares these, `RewardTrainer` takes the steps, and `train_reward_model` is the public call. Two answers share their
image and question as in DPO, whose rows, layouts and run folder are used here as they are.
"""

import dataclasses
import logging
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import set_seed

from rlaifv import ROOT
from rlaifv.fingerprint import digest_files, stage_sources
from rlaifv.inference.yes_no import yes_no_ids
from rlaifv.params import RewardModelParams, RewardRun, TrainParams, as_train_params, check_train
from rlaifv.records import Reject, read_records, write_jsonl
from rlaifv.steps.preferences import Preference
from rlaifv.store import link_or_copy, progress
from rlaifv.training import library_quirks
from rlaifv.training.checkpoints import WriteCheckpoints
from rlaifv.training.dpo import PairCollator, PairScorer, StepTrainer, training_arguments
from rlaifv.training.job import TrainResult, kept_layout, require_rows, run_in, start_process, take_steps
from rlaifv.training.packed_pairs import image_source
from rlaifv.training.pair_data import IMAGES, PAIRS, PROMPTS, TOKEN_TYPES, EncodedPair, PairData, arrow_file
from rlaifv.training.policy import add_lora, freeze, load_policy, sharded, whole_device
from rlaifv.training.run_folder import remove
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.images import decode_image
from rlaifv.vlm.loading import VLM
from rlaifv.vlm.reward_format import PLACE, RewardFormat, RewardHead, encode_answers, write_reward_files

log = logging.getLogger(__name__)


# ---- preferences as rows


def write_preferences(vlm: VLM, path: Path, limit: int, folder: Path, form: RewardFormat, image_root: Path) -> None:
    """Tokenize the preferences of a JSONL file into the files of `PairData`, as `write_pairs` does pairs.

    A row ends where its reward is read. One token more is put there, which nothing sees: `predictors` of packed and
    plain rows lead to the place before each answer token, and so that one leads to the last.
    """
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    rejects: list[Reject] = []
    with (
        arrow_file(partial / "images.arrow", IMAGES) as add_image,
        arrow_file(partial / "prompts.arrow", PROMPTS) as add_prompt,
        arrow_file(partial / "pairs.arrow", PAIRS) as add_pair,
    ):
        numbers: dict[str, int] = {}
        for row, preference in enumerate(progress(read_records(path, Preference), "tokenize")):
            name = preference.image_path
            try:
                data = (image_root / name).read_bytes()
                pair = encode_preference(vlm, form, preference, data, limit)
            except (OSError, ValueError) as error:
                rejects.append(Reject(preference.id, "reward_model", str(error)))
                continue
            if name not in numbers:
                number = numbers[name] = len(numbers)
                add_image({"bytes": data})
                add_prompt({"image": number, "question": preference.conversation[-1], "pair_id": preference.id})
            cells = {**vars(pair), "image": numbers[name], "row": row, "row_length": pair.row_length}
            add_pair({**cells, **pair.token_types})
    write_jsonl(partial / "rejects.jsonl", rejects)
    partial.rename(folder)


def encode_preference(vlm: VLM, form: RewardFormat, preference: Preference, image: bytes, limit: int) -> EncodedPair:
    """Both answers' texts, each up to where its reward is read and one token further. ValueError for what cannot be
    used: a broken image, special tokens in a text, more than `limit` tokens."""
    shown = decode_image(image, f"of preference {preference.id}")
    answers, facts = [preference.chosen, preference.rejected], preference.facts or None
    coded = encode_answers(vlm, form, shown, preference.conversation, answers, facts)
    if (longest := max(map(len, coded.rows))) > limit:
        raise ValueError(f"the longer answer with its prompts is {longest} tokens, the limit is {limit}")
    # one token of each stays its own, should one answer begin as the other does and end there
    shared = min(len(coded.prompt_ids), *(len(row) - 1 for row in coded.rows))
    types = {k: v[0].numpy().astype(np.int8)[:shared] for k, v in coded.inputs.items() if k in TOKEN_TYPES}
    ends = [np.array([*row[shared:], vlm.tokenizer.eos_token_id], np.int32) for row in coded.rows]
    return EncodedPair(
        pair_id=preference.id,
        image=0,
        prompt=np.array(coded.rows[0][:shared], np.int32),
        chosen=ends[0],
        rejected=ends[1],
        chosen_start=len(ends[0]) - 1,
        rejected_start=len(ends[1]) - 1,
        token_types={key: np.pad(value, (0, shared - len(value))) for key, value in types.items()},
    )


# ---- rewards and their loss


class RewardScorer(PairScorer):
    """A policy and a vector as a function from a batch of pairs to the rewards of their answers."""

    def __init__(self, policy, head: RewardHead, images=None):
        super().__init__(policy, images)
        self.reward_head = head

    def _score_tokens(self, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rewards [T] of the last hidden states [T, H] of T rows."""
        return {"rewards": self.reward_head(hidden)[:, 0]}


def answer_rewards(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rewards [2, B] of chosen and rejected answers: of each row, what stands at its one scored token."""
    return scores["rewards"].sum(1).view(2, -1)


def preference_loss(rewards: torch.Tensor, regularizer: float) -> torch.Tensor:
    """The loss of B preferences, a number, from `rewards` [2, B] of chosen and rejected answers.

    That the chosen answer is preferred has the probability σ(r_1 - r_0) (Bradley and Terry); Fact-RLHF's published code
    adds a weak pull of the mean towards zero, which the first term leaves free:

        L = mean(-log σ(r_1 - r_0)) + λ · |mean(r_1 + r_0)|
    """
    chosen, rejected = rewards
    return -F.logsigmoid(chosen - rejected).mean() + regularizer * (chosen + rejected).mean().abs()


def start_head(vlm: VLM, start: str, seed: int) -> RewardHead:
    """The vector as training begins: "yes_no" is the mean row of the output layer that gives a yes, less that of a no
    (the policy's own answer to the prompt's question); "random" is drawn from the seed, as the published one."""
    rows = vlm.network.get_output_embeddings().weight
    head = RewardHead(rows.shape[1])
    with torch.no_grad():
        head.bias.zero_()
        if start == "yes_no":
            ids = yes_no_ids(vlm)
            head.weight[0] = rows[list(ids.yes)].float().mean(0) - rows[list(ids.no)].float().mean(0)
        else:
            scale = rows.shape[1] ** -0.5
            head.weight.normal_(0.0, scale, generator=torch.Generator().manual_seed(seed))
    return head


class RewardTrainer(StepTrainer):
    """Steps of `preference_loss`."""

    section = "reward_model"

    def __init__(self, scorer: RewardScorer, collate: PairCollator, params: TrainParams, regularizer: float, args):
        super().__init__(scorer, collate, params, args)
        self.regularizer = regularizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """The loss of a micro-batch; its metrics are added up for the next log entry."""
        rewards = answer_rewards(scores := self.score(model, inputs))
        loss = self.finite(preference_loss(rewards, self.regularizer))
        chosen, rejected = rewards.detach()
        values = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        self.watch({**values, "rewards/accuracies": chosen > rejected}, inputs["tokens"])
        return (loss, scores) if return_outputs else loss


class WriteRewardModels(WriteCheckpoints):
    """Writes each checkpoint as a reward model: with its vector, its prompt and the base's fingerprint."""

    def __init__(self, trainer: RewardTrainer, vlm: VLM, params: TrainParams, run: Path, base: str, form: RewardFormat):
        super().__init__(trainer, vlm, params, run, base)
        self.form = form

    def complete(self, out: Path, weights: dict[str, torch.Tensor]) -> None:
        head = RewardHead(weights["reward_head.weight"].shape[1])
        head.load_state_dict({name: weights[f"reward_head.{name}"].float().cpu() for name in ("weight", "bias")})
        write_reward_files(out, head, self.form, self.vlm)


# ---- the run


def train_reward_model(
    base: str,
    preferences: Path,
    image_root: Path,
    prompt: str,
    reward: RewardModelParams,
    train: TrainParams,
    out: Path,
    scratch: Path,
    seed: int,
) -> TrainResult:
    """Make a reward model of the checkpoint `base` and write `out/checkpoint-<k>` and `out/log.csv`.

    Args:
        preferences: a JSONL file of `Preference`s, whose images lie below `image_root`.
        prompt: the text that asks for a score (`RewardFormat.prompt`).

    A killed run goes on as one of `job.train` does, whose other promises hold as well. Raises FloatingPointError with
    the preferences' ids when the loss or gradient is not finite.
    """
    # LoRA's own dropout would make rewards noisy in training alone
    params = dataclasses.replace(as_train_params(reward, train), lora_dropout=0.0)
    check_train(params)
    preferences, image_root = Path(preferences).resolve(), Path(image_root).resolve()
    form = RewardFormat(prompt, reward.facts_intro, reward.fact_line, fingerprint_checkpoint(base), reward.head)
    made_of = {
        "base": form.base,
        "data": [digest_files(preferences), digest_files(image_root, by_stat_from=0)],
        "source": stage_sources("reward_model"),
    }
    settings, format_ = dataclasses.asdict(params), dataclasses.asdict(form)
    asked = {"form": format_, "regularizer": reward.regularizer, "seed": seed}
    identity = {**made_of, **asked, "params": {**settings, "collapse_nats": None}}
    job = {"base": base, "preferences": str(preferences), "image_root": str(image_root), "params": settings, **asked}
    return run_in("reward_model", identity, job, params, out, scratch, run_job)


def read_prompt(reward: RewardModelParams, run: RewardRun) -> str:
    """What asks a run's reward model for a score: the joint, and its file's text without space around it.

    Raises ValueError where the file has a place for facts and the run none to put there, or the other way round.
    """
    name = reward.prompt if run.facts == "none" else reward.facts_prompt
    if not (ROOT / name).is_file():
        raise FileNotFoundError(f"no file {name}: write what asks for a score into it (reward_model.prompt)")
    text = (ROOT / name).read_text(encoding="utf-8").strip()
    if (PLACE in text) != (run.facts != "none"):
        has = "has a" if PLACE in text else "has no"
        raise ValueError(f"{name} {has} {PLACE}, and the facts of the run are {run.facts}")
    return reward.joint + text


def publish_last(result: TrainResult, out: Path) -> None:
    """Make the last checkpoint of a run the reward model in `out`."""
    partial = out.with_name(out.name + ".partial")
    for old in (partial, out):
        remove(old)
    shutil.copytree(result.checkpoints[-1], partial, copy_function=link_or_copy)
    partial.rename(out)


def run_job(job: dict) -> None:
    """One process of a run, as `job.run_job` of DPO's."""
    library_quirks.be_quiet()
    if sharded():
        raise RuntimeError(f"reward models train on whole copies, not on weights spread by {sharded()}")
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    run, params, form = Path(job["run"]), TrainParams(**job["params"]), RewardFormat(**job["form"])
    vlm = load_policy(job["base"], params)
    write = partial(write_preferences, form=form, image_root=Path(job["image_root"]))
    data = PairData(vlm, Path(job["preferences"]), params.max_length, run / "pairs", write)
    require_rows(data, "preference")
    freeze(vlm.model, params)
    if not params.load_in_4bit:
        vlm.model.to(whole_device(vlm.model))
    layout = kept_layout(PairScorer(vlm.model), vlm, data, params, run)
    head = start_head(vlm, form.head, job["seed"])
    set_seed(job["seed"])
    model = add_lora(vlm.model, params) if params.lora_r else vlm.model
    scorer = RewardScorer(model, head.to(vlm.device), image_source(layout, data, vlm.model))
    rows = vlm.network.get_output_embeddings().weight
    rows.requires_grad_(rows.requires_grad and rows is vlm.network.get_input_embeddings().weight)  # else it is unused
    if params.gradient_checkpointing:
        library_quirks.checkpoint_activations(scorer.policy, lora=bool(params.lora_r))
    collate = PairCollator(data, vlm.tokenizer.pad_token_id, packed=layout.startswith("packed"))
    arguments = training_arguments(params, run / "trainer", job["seed"])
    trainer = RewardTrainer(scorer, collate, params, job["regularizer"], arguments)
    writer = WriteRewardModels(trainer, vlm, params, run, job["base"], form)
    take_steps(trainer, writer, run, data, layout=layout, reference="none")


if __name__ == "__main__":
    start_process(run_job, "reward_model")
