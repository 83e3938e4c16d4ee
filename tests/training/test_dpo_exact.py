"""Packed training computes what two plain rows through the whole model, full logits and the DPO formula would."""

import collections
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava import save_pairs, save_tiny_llava
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlaifv.params import LOSSES, TrainParams
from rlaifv.training import dpo
from rlaifv.training.dpo import PairCollator, PairScorer, PairTrainer, reference_logps, training_arguments
from rlaifv.training.packed_pairs import block_mask, build_batch, changed_tokens, choose_layout
from rlaifv.training.pair_data import EncodedPair, PairData
from rlaifv.training.policy import freeze
from rlaifv.vlm.collate import stack_inputs
from rlaifv.vlm.loading import load_vlm

PARAMS = TrainParams(dtype="float32", batch_size=4, micro_batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    save_tiny_llava(folder / "model")
    save_pairs(folder / "pairs.parquet", 8)
    return folder


def make_trainer(folder: Path, params: TrainParams = PARAMS, change: float = 0.1) -> tuple[PairTrainer, str]:
    """A trainer whose policy has moved away from its reference, so that the loss is not just log 2."""
    vlm = load_vlm(str(folder / "model"), device="cpu")
    data = PairData(vlm, folder / "pairs.parquet")
    freeze(vlm.model, params)
    scorer = PairScorer(vlm.model)
    layout = choose_layout(scorer, vlm, data, params)
    collate = PairCollator(data, vlm.tokenizer.pad_token_id, packed=params.packed, segment_weight=params.segment_weight)
    reference = reference_logps(scorer, collate, 4, torch.device("cpu"), "float32")
    trainer = PairTrainer(scorer, collate, reference, params, training_arguments(params, folder / "trainer", seed=0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.requires_grad:
                parameter += change * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return trainer, layout


def plain_answer_logps(model, data: PairData, pairs: list[EncodedPair]) -> list[list[torch.Tensor]]:
    """Log-probs of chosen and rejected answer tokens, each row alone through the model's own forward and logits."""
    rows = []
    for pair in pairs:
        row = []
        for answer, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer])).long()[None]
            logits = type(model).forward(model, input_ids=ids, **data.image_inputs(pair.image)).logits[0]
            logps = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
            row.append(logps[len(pair.prompt) + start - 1 :])
        rows.append(row)
    return rows


def plain_loss(trainer: PairTrainer, reference_model, indices: list[int], loss_type: str, beta: float) -> torch.Tensor:
    """Equation 7 of the DPO paper (arXiv 2305.18290), and its variants, from scratch."""
    pairs = [trainer.data_collator.data.pairs[i] for i in indices]
    policy = plain_answer_logps(trainer.model.policy, trainer.data_collator.data, pairs)
    with torch.no_grad():
        reference = plain_answer_logps(reference_model, trainer.data_collator.data, pairs)
    losses = []
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True):
        gain, loss = chosen.sum() - ref_chosen.sum(), rejected.sum() - ref_rejected.sum()
        if loss_type == "sigmoid":
            losses.append(-F.logsigmoid(beta * (gain - loss)))
        elif loss_type == "sigmoid_norm":
            losses.append(-F.logsigmoid(beta * (gain / len(chosen) - loss / len(rejected))))
        elif loss_type == "ipo":
            losses.append((gain / len(chosen) - loss / len(rejected) - 1 / (2 * beta)) ** 2)
        elif loss_type == "apo_zero":
            losses.append(1 - torch.sigmoid(beta * gain) + torch.sigmoid(beta * loss))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "ipo", "apo_zero"])
def test_loss_and_gradient_equal_the_formula_on_two_plain_rows(folder, loss_type, packed):
    params = dataclasses.replace(PARAMS, loss_type=(loss_type,), packed=packed)
    trainer, layout = make_trainer(folder, params)
    assert layout == ("packed, features kept" if packed else "plain, features kept")
    reference = load_vlm(str(folder / "model"), device="cpu").model
    indices = [0, 3, 5, 6]
    batch = trainer.data_collator(indices)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    expected = plain_loss(trainer, reference, indices, loss_type, params.beta)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    off = sum((ours[n] - plain[n]).square().sum() for n in plain).sqrt()
    assert off / sum(g.square().sum() for g in plain.values()).sqrt() < 1e-5
    assert any("projector" in name and grad.abs().sum() > 0 for name, grad in ours.items())
    assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if "vision_tower" in n)


def trl_step(trainer: PairTrainer, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and metrics of TRL's own `DPOTrainer._compute_loss` on two plain rows per pair, with TRL's own head."""
    params, policy, data = trainer.params, trainer.model.policy, trainer.data_collator.data
    plain = build_batch([data.pairs[i] for i in batch["pairs"]], 0, packed=False)
    rows, images = plain["rows"], [data.image_inputs(i) for i in plain["rows"]["images"]]
    ids, seen = rows["input_ids"], (rows["branch"] >= 0).long()
    completion = torch.zeros_like(ids)
    for row, predictors, mask in zip(completion, rows["predictors"] % ids.shape[1], plain["answer_mask"], strict=True):
        row[predictors[mask] + 1] = 1
    trl = DPOTrainer.__new__(DPOTrainer)
    trl.args = SimpleNamespace(discopop_tau=DPOConfig.__dataclass_fields__["discopop_tau"].default)
    trl.model, trl.accelerator, trl.beta = policy, trainer.accelerator, params.beta
    trl.loss_types, trl.loss_weights = params.loss_type, params.loss_weights or [1.0] * len(params.loss_type)
    trl.ld_alpha, trl.f_divergence_type, trl.label_smoothing = None, "reverse_kl", params.label_smoothing
    trl.precompute_ref_logps, trl.use_weighting, trl.aux_loss_enabled, trl._tp_size = True, False, False, 1
    trl._metrics, trl._total_train_tokens = {"train": collections.defaultdict(list)}, 0
    chosen, rejected = trainer.reference[:, batch["pairs"]]
    inputs = {"input_ids": ids, "attention_mask": seen, "completion_mask": completion, **stack_inputs(images, "cpu")}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trl._compute_loss(policy, inputs, return_outputs=False)
    return loss, {key: values[0] for key, values in trl._metrics["train"].items()}


@pytest.fixture(scope="module")
def beside_trl(folder) -> PairTrainer:
    """A trainer whose policy TRL can read as well."""
    trainer, _ = make_trainer(folder)
    add_fused_lm_head(trainer.model.policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return trainer


@pytest.mark.parametrize("at_once", [1 << 25, 1000], ids=["at once", "in parts"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_its_gradient_and_its_metrics_are_those_of_trls_own_trainer(
    beside_trl, monkeypatch, loss_type, at_once
):
    trainer, smoothing = beside_trl, 0.1 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    monkeypatch.setattr(dpo, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(
        trainer, "params", dataclasses.replace(PARAMS, loss_type=(loss_type,), label_smoothing=smoothing)
    )
    monkeypatch.setattr(trainer, "_tokens", 0)
    batch = trainer.data_collator([0, 3, 5, 6])
    trainer.model.train()
    seen = []
    for step in (lambda: trainer.compute_loss(trainer.model, batch), lambda: trl_step(trainer, batch)):
        trainer.model.zero_grad()
        result = step()
        loss, metrics = result if isinstance(result, tuple) else (result, trainer.metrics())
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        seen.append((loss.item(), metrics, gradient))
    (loss, metrics, gradient), (trl_loss, trl_metrics, trl_gradient) = seen
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert metrics.keys() >= trl_metrics.keys() >= {"entropy", "logits/chosen", "mean_token_accuracy"}
    for key in trl_metrics:
        assert metrics[key] == pytest.approx(trl_metrics[key], rel=1e-5), key
    assert (gradient - trl_gradient).norm() < 1e-5 * trl_gradient.norm()


def test_a_loss_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="unknown loss 'dpo'"):
        dpo.dpo_loss("dpo", torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1), PARAMS)


def test_weighted_combination_of_losses_is_their_weighted_sum(folder):
    values = []
    for types, weights in ((("sigmoid",), None), (("ipo",), None), (("sigmoid", "ipo"), (0.7, 0.2))):
        trainer, _ = make_trainer(folder, dataclasses.replace(PARAMS, loss_type=types, loss_weights=weights))
        trainer.model.train()
        batch = trainer.data_collator(range(4))
        values.append(trainer.compute_loss(trainer.model, batch).item())
    assert values[2] == pytest.approx(0.7 * values[0] + 0.2 * values[1], rel=1e-6)


def test_segment_weight_multiplies_the_log_probs_of_changed_tokens_in_policy_and_reference(folder):
    params = dataclasses.replace(PARAMS, segment_weight=5.0)
    trainer, _ = make_trainer(folder, params)
    reference = load_vlm(str(folder / "model"), device="cpu").model
    indices, data = [1, 2, 4, 7], trainer.data_collator.data
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(indices))
    pairs = [data.pairs[i] for i in indices]
    expected = []
    for pair, now, before in zip(
        pairs,
        plain_answer_logps(trainer.model.policy, data, pairs),
        plain_answer_logps(reference, data, pairs),
        strict=True,
    ):
        sums = []
        for ids, other, a, b in (
            (pair.chosen, pair.rejected, now[0], before[0]),
            (pair.rejected, pair.chosen, now[1], before[1]),
        ):
            weight = torch.tensor([5.0 if changed else 1.0 for changed in changed_tokens(ids, other)])[-len(a) :]
            sums.append((weight * (a - b)).sum())
        expected.append(-F.logsigmoid(params.beta * (sums[0] - sums[1])))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_trained_tokens_are_exactly_the_answer_and_the_end_token(folder):
    vlm = load_vlm(str(folder / "model"), device="cpu")
    data = PairData(vlm, folder / "pairs.parquet")
    batch = build_batch(data.pairs, vlm.tokenizer.pad_token_id, packed=True)
    table = pq.read_table(folder / "pairs.parquet")
    answers = [*table["chosen"].to_pylist(), *table["rejected"].to_pylist()]
    for ids, mask, answer in zip(batch["answers"], batch["answer_mask"], answers, strict=True):
        assert vlm.tokenizer.decode(ids[mask]) == answer + " </s>"


def test_a_branch_sees_the_prompt_and_itself_and_nothing_else():
    branch = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    seen = block_mask(branch)[0]
    assert seen[3].tolist() == [True, True, True, True, False, False, False]
    assert seen[5].tolist() == [True, True, False, False, True, True, False]
    assert seen.any(dim=1).all()  # a padded query that saw nothing would be NaN


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_batches_of_any_pairs_predict_every_branch_token_from_its_predecessor(draw):
    ids = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda x: np.array(x, np.int32))
    pairs = [
        EncodedPair(str(i), i, draw.draw(ids), draw.draw(ids), draw.draw(ids), 0, 0, {})
        for i in range(draw.draw(st.integers(1, 4)))
    ]
    for packed in (True, False):
        batch = build_batch(pairs, 0, packed=packed)
        rows = batch["rows"]
        flat, n = rows["input_ids"].flatten(), rows["input_ids"].shape[1]
        for out in range(2 * len(pairs)):
            pair = pairs[out % len(pairs)]
            answer = pair.chosen if out < len(pairs) else pair.rejected
            length = len(answer)
            assert batch["answers"][out, :length].tolist() == answer.tolist()
            assert batch["answer_mask"][out].sum() == length
            predictors = rows["predictors"][out, :length]
            assert flat[predictors].tolist() == [pair.prompt[-1], *answer[:-1]]
            if packed:
                assert (rows["branch"][out % len(pairs)] >= 0).sum() == pair.row_length
                positions = rows["position_ids"].flatten()[predictors].tolist()
                assert positions == list(range(len(pair.prompt) - 1, len(pair.prompt) - 1 + length))
            assert {int(p) // n for p in predictors} == {out % len(pairs) if packed else out}
        assert batch["tokens"] == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def test_what_both_answers_begin_with_is_in_a_row_once():
    pair = EncodedPair("0", 0, np.array([1, 2]), np.array([5, 6, 7, 3]), np.array([5, 6, 8]), 0, 0, {})
    rows = build_batch([pair], 0, packed=True)["rows"]
    assert rows["input_ids"].tolist() == [[1, 2, 5, 6, 7, 3, 8]] and rows["branch"].tolist() == [[0, 0, 0, 0, 1, 1, 2]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    assert rows["predictors"].tolist() == [[1, 2, 3, 4], [1, 2, 3, 0]]


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_changed_tokens_are_what_remains_beside_a_common_subsequence(a, b):
    kept_a = np.array(a)[~changed_tokens(np.array(a), np.array(b))] if a else np.array([])
    kept_b = iter(b)
    assert all(any(x == y for y in kept_b) for x in kept_a)
    assert not changed_tokens(np.array(a), np.array(a)).any()


def test_a_model_that_reads_packed_rows_wrongly_is_trained_on_plain_rows(folder, monkeypatch, caplog):
    import rlaifv.training.packed_pairs

    monkeypatch.setattr(
        rlaifv.training.packed_pairs, "block_mask", lambda branch: torch.ones_like(branch)[:, None].bool()
    )
    vlm = load_vlm(str(folder / "model"), device="cpu")
    data = PairData(vlm, folder / "pairs.parquet")
    freeze(vlm.model, PARAMS)
    assert choose_layout(PairScorer(vlm.model), vlm, data, PARAMS) == "plain, features kept"
    assert "cannot train packed" in caplog.text and str(folder / "model") in caplog.text


def test_batches_move_between_devices_whole():
    batch = build_batch([EncodedPair("0", 0, np.array([1]), np.array([2]), np.array([3]), 0, 0, {})], 0, packed=True)
    moved = send_to_device(batch, torch.device("cpu"))
    assert moved["rows"]["images"] == [0] and moved["rows"]["predictors"].equal(batch["rows"]["predictors"])
