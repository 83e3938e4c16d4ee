"""Supervised fine-tuning on conversations about images, from a file of them to checkpoints.

The steps are TRL's (`SFTTrainer` 1.16: its loss, its fused output layer). The rows are not: TRL's collator for images
tokenizes prompt and answer apart, where a tokenizer may join them otherwise than in a whole text; it cuts rows that are
too long without a word; and of several answers it finds the ends only where the chat template marks them, without an
end token where the template has none (LLaVA-1.5's), so that the model never learns to stop. `encode_conversation` is
exact in all of that and rejects what is too long.
"""

import dataclasses
import logging
import math
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from rlaifv.fingerprint import digest_files, stage_sources
from rlaifv.params import TrainParams, check_train
from rlaifv.records import Reject, read_records
from rlaifv.steps.sft_rows import SftRow
from rlaifv.store import progress
from rlaifv.training import library_quirks
from rlaifv.training.checkpoints import WriteCheckpoints
from rlaifv.training.dpo import EpochOrder
from rlaifv.training.job import TrainResult, require_rows, run_in, start_process, take_steps
from rlaifv.training.policy import add_lora, freeze, load_policy, sharded, whole_device
from rlaifv.training.trainer import Habits, Line, trainer_settings
from rlaifv.vlm.chat_format import Reader, check_length, common_length, prompt_text, tokenize
from rlaifv.vlm.checkpoint import fingerprint_checkpoint
from rlaifv.vlm.collate import collate_inputs, pad_rows
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not learned."""


def encode_conversation(vlm: Reader, image, conversation: list[str]) -> tuple[list[int], list[int], dict]:
    """Token ids [n] of a conversation about an image, its labels [n], and what the processor made of the image.

    Labels are the ids of every answer with the end token that the template gives it; the last answer always has one.
    All else is `IGNORED`. Tokens are those of the whole text. Raises UnfitText as `prompt_text` does.
    """
    answers = range(1, len(conversation), 2)
    asked = [prompt_text(vlm, conversation[:k]) for k in answers]
    said = [
        prompt_text(vlm, conversation[:k], answer=conversation[k], prompt=p)
        for k, p in zip(answers, asked, strict=True)
    ]
    (whole, *rows), inputs = tokenize(vlm, image, [said[-1], *asked, *said])
    labels = [IGNORED] * len(whole)
    for before, after in zip(rows[: len(asked)], rows[len(asked) :], strict=True):
        start, end = common_length(before, whole), common_length(after, whole)
        labels[start:end] = whole[start:end]
    return whole, labels, inputs


class Conversations:
    """Rows of a file that can be learned from, encoded when they are needed, and the others as `rejects`."""

    def __init__(self, vlm: VLM, path: Path, image_root: Path, max_length: int | None):
        self.vlm, self.image_root = vlm, image_root
        self.rows: list[SftRow] = []
        self.lengths: list[int] = []
        self.rejects: list[Reject] = []
        for row in progress(read_records(path, SftRow), "tokenize"):
            try:
                ids, _, _ = self.encode(row)
                check_length(vlm, len(ids), "the conversation and its image are")
                if max_length and len(ids) > max_length:
                    raise ValueError(f"the conversation is {len(ids)} tokens, sft.max_length is {max_length}")
            except (OSError, ValueError) as error:
                self.rejects.append(Reject(row.id, "sft", str(error)))
                continue
            self.rows.append(row)
            self.lengths.append(len(ids))

    @property
    def pairs(self) -> list[SftRow]:
        """What `job.take_steps` counts."""
        return self.rows

    def encode(self, row: SftRow) -> tuple[list[int], list[int], dict]:
        return encode_conversation(self.vlm, open_image(row.image(self.image_root)), row.conversation)

    def __call__(self, examples: list[dict]) -> dict:
        """A batch of rows by their numbers, padded on the right: what SFTTrainer takes for a collator."""
        coded = [self.encode(self.rows[example["image"]]) for example in examples]
        ids, labels, inputs = map(list, zip(*coded, strict=True))
        lengths = [len(row) for row in ids]
        return {
            "input_ids": pad_rows(ids, self.vlm.tokenizer.pad_token_id),
            "attention_mask": pad_rows([[1] * length for length in lengths], 0),
            "labels": pad_rows(labels, IGNORED),
            **{key: value.cpu() for key, value in collate_inputs(self.vlm, inputs, lengths).items()},
        }


class ConversationTrainer(Habits, SFTTrainer):
    """TRL's steps on our rows, in an order that a run that goes on finds again, with a stop at what is not finite."""

    section = "sft"

    def __init__(self, vlm: VLM, model, data: Conversations, params: TrainParams, arguments: SFTConfig):
        self.data, self.params = data, params
        numbers = Dataset.from_dict({"image": list(range(len(data.rows)))})  # TRL sees images in a column of that name
        processor = vlm.processor
        super().__init__(model, arguments, data_collator=data, train_dataset=numbers, processing_class=processor)
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch())

    def _get_train_sampler(self, train_dataset=None) -> EpochOrder:
        return EpochOrder(self.data.lengths, self.params.batch_size, self.args.seed, lambda: self.state.global_step)


class Watch(Line):
    key = "loss"

    def say(self, state, logs: dict[str, float], rate: float) -> None:
        log.info(
            "sft: step %d/%d, loss %.4f, %.1f %% of the answers' tokens right, %.0f s left",
            *(state.global_step, state.max_steps, logs["loss"], 100 * logs.get("mean_token_accuracy", math.nan)),
            (state.max_steps - state.global_step) / rate,
        )


def train_sft(
    policy: str, rows: Path, image_root: Path, params: TrainParams, out: Path, scratch: Path, seed: int
) -> TrainResult:
    """Fine-tune `policy` on a JSONL file of `SftRow`s and write `out/checkpoint-<k>` and `out/log.csv`.

    The loss is the mean negative log-likelihood of an answer token; of `params` those of DPO are not used. A killed run
    goes on as one of `job.train` does. Raises FloatingPointError when the gradient is not finite.
    """
    params = dataclasses.replace(params, keep_checkpoints=None, accelerate_config=None)
    check_train(params)
    rows, image_root = Path(rows).resolve(), Path(image_root).resolve()
    identity = {
        "policy": fingerprint_checkpoint(policy),
        "data": [digest_files(rows), digest_files(image_root, by_stat_from=0)],
        "source": stage_sources("sft"),
        "params": {**dataclasses.asdict(params), "collapse_nats": None, "resume_every": None},
        "seed": seed,
    }
    job = {"policy": policy, "rows": str(rows), "image_root": str(image_root), "seed": seed}
    job["params"] = dataclasses.asdict(params)
    return run_in("sft", identity, job, params, out, scratch, run_job)


def run_job(job: dict) -> None:
    """One process of a run, as `job.run_job` of DPO's."""
    library_quirks.be_quiet()
    if sharded():
        raise RuntimeError(f"conversations are learned by whole copies, not by weights spread by {sharded()}")
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    run, params = Path(job["run"]), TrainParams(**job["params"])
    vlm = load_policy(job["policy"], params)
    data = Conversations(vlm, Path(job["rows"]), Path(job["image_root"]), params.max_length)
    require_rows(data, "row")
    freeze(vlm.model, params)
    if not params.load_in_4bit:
        vlm.model.to(whole_device(vlm.model))
    set_seed(job["seed"])
    model = add_lora(vlm.model, params) if params.lora_r else vlm.model
    trainer = ConversationTrainer(vlm, model, data, params, sft_arguments(params, run / "trainer", job["seed"]))
    take_steps(
        trainer, WriteCheckpoints(trainer, vlm, params, run, job["policy"]), run, data, layout="plain", reference="none"
    )


def sft_arguments(params: TrainParams, folder: Path, seed: int) -> SFTConfig:
    """TRL's arguments for our parameters; `folder` is where the Trainer writes what it goes on from."""
    arguments = SFTConfig(
        **trainer_settings(params, folder, seed),
        num_train_epochs=params.epochs,
        per_device_train_batch_size=params.micro_batch_size,
        gradient_accumulation_steps=params.batch_size // (params.micro_batch_size * params.processes),
        bf16=params.dtype == "bfloat16",
        gradient_checkpointing=params.gradient_checkpointing,
        max_length=None,  # nothing is cut
        remove_unused_columns=False,
        report_to="none",
    )
    library_quirks.one_gpu_a_process(arguments)
    return arguments


if __name__ == "__main__":
    start_process(run_job, "sft")
