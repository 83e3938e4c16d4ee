"""Fine-tuning on conversations: the answers alone are learned, all of them, in the tokens of the whole text."""

import dataclasses
from pathlib import Path

import pytest
import torch
from architectures import BUILDERS, build
from architectures import picture as noise
from tiny_llava import picture, save_tiny_llava
from training_runs import digests, log_rows
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from rlaifv.params import TrainParams
from rlaifv.records import read_records, write_jsonl
from rlaifv.steps.sft_rows import SftRow
from rlaifv.training.checkpoints import WriteCheckpoints
from rlaifv.training.job import TrainResult
from rlaifv.training.sft import IGNORED, encode_conversation, train_sft
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import load_vlm

TALK = ["What is it?", "A cat.", "Is it a large dog?", "No."]
PARAMS = TrainParams(
    dtype="float32", learning_rate=3e-3, epochs=3, batch_size=2, micro_batch_size=1, checkpoints_per_epoch=1
)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_answers_and_the_last_end_token_are_learned_and_nothing_else(name):
    vlm = build(name)
    ids, labels, _ = encode_conversation(vlm, noise(), TALK)
    learned = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert all(label in (i, IGNORED) for i, label in zip(ids, labels, strict=True))
    text = vlm.tokenizer.decode(learned)
    said = text.replace("<end_of_utterance>", "").replace("</s>", "")
    assert "".join(said.split()) == "Acat.No.", text
    assert learned[-1] in vlm.eos_token_ids
    assert ids == encode(vlm, noise(), TALK[:3], TALK[3:]).rows[0], "what inference and DPO read"


def test_trls_own_collator_splits_the_text_between_prompt_and_answer():
    """Why rows are ours: the day this fails, TRL's collator can be used."""
    vlm = build("llava")
    collate = DataCollatorForVisionLanguageModeling(vlm.processor, completion_only_loss=True)
    prompt, completion = ({"role": role, "content": TALK[k]} for k, role in enumerate(("user", "assistant")))
    (theirs,) = collate([{"images": [noise()], "prompt": [prompt], "completion": [completion]}])["input_ids"].tolist()
    ours = encode(vlm, noise(), TALK[0], TALK[1:2]).rows[0]
    assert theirs != ours and vlm.tokenizer.eos_token_id not in theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    save_tiny_llava(folder / "model")
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))
    talks = [["what is it ?", "a dog"], ["is it red ?", "no", "is it blue ?", "yes"], ["describe it .", "a big cat ."]]
    rows = [SftRow(f"r{i}", f"{i}.png", talks[i % 3], "test") for i in range(4)]
    bad = [SftRow("gone", "9.png", talks[0], "test"), SftRow("long", "0.png", ["it ?", "dog " * 300], "test")]
    write_jsonl(folder / "rows.jsonl", [*rows, *bad])
    return folder


def run(folder: Path, name: str, params: TrainParams = PARAMS) -> TrainResult:
    out, scratch = folder / name / "out", folder / name / "scratch"
    return train_sft(str(folder / "model"), folder / "rows.jsonl", folder, params, out, scratch, seed=1)


@pytest.fixture(scope="module")
def trained(folder) -> TrainResult:
    return run(folder, "trained")


def test_a_run_learns_rejects_by_id_and_its_first_loss_is_that_of_the_answers(folder, trained):
    assert trained.steps == 6 and len(trained.checkpoints) == 3
    assert {identity for identity, _ in trained.rejects} == {"gone", "long"}
    losses = [row["loss"] for row in log_rows(trained)]
    assert losses[-1] < losses[0] - 0.3
    before, after = (
        load_vlm(path, device="cpu").model.state_dict() for path in (str(folder / "model"), trained.checkpoints[-1])
    )
    assert not any("vision_tower" in name for name in before if not before[name].equal(after[name]))


def test_with_lora_and_activations_computed_again_adapters_learn_and_the_checkpoint_is_a_whole_model(folder):
    params = dataclasses.replace(PARAMS, lora_r=4, gradient_checkpointing=True, learning_rate=3e-2)
    result = run(folder, "lora", params)
    losses = [row["loss"] for row in log_rows(result)]
    assert losses[-1] < losses[0] - 0.1
    before, after = (
        load_vlm(path, device="cpu").model.state_dict() for path in (str(folder / "model"), result.checkpoints[-1])
    )
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name for name in moved)


def test_the_loss_is_the_mean_over_answer_tokens_of_the_whole_step(folder):
    first = log_rows(run(folder, "one", dataclasses.replace(PARAMS, batch_size=4, micro_batch_size=2)))[0]["loss"]
    vlm = load_vlm(str(folder / "model"), device="cpu")
    nll = []
    for row in read_records(folder / "rows.jsonl", SftRow)[:4]:
        ids, labels, inputs = encode_conversation(vlm, open_image(folder / row.image_path), row.conversation)
        logits = vlm.model(input_ids=torch.tensor([ids]), **inputs).logits[0].log_softmax(-1)
        nll += [-logits[k - 1, label] for k, label in enumerate(labels) if label != IGNORED]
    assert first == pytest.approx(float(torch.stack(nll).mean()), abs=1e-5)


def test_a_killed_run_goes_on_to_the_same_bytes(folder, trained, monkeypatch):
    def die(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt  # one of the first half of the second epoch

    with monkeypatch.context() as patch:
        patch.setattr(WriteCheckpoints, "on_step_begin", die)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "killed")
    (left,) = (folder / "killed" / "scratch").glob("sft-*/trainer/*")
    assert left.name == "checkpoint-2"
    run(folder, "killed")
    assert digests(folder / "killed" / "out") == digests(folder / "trained" / "out")
