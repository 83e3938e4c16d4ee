"""Every architecture trains exactly the answer and its end token, in the fastest layout that is exact for it."""

import io
from pathlib import Path

import architectures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlaifv.params import TrainParams
from rlaifv.training.dpo import PairScorer, answer_logps
from rlaifv.training.packed_pairs import build_batch, choose_layout
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import freeze

LAYOUTS = {
    "llava": "packed, features kept",
    "llava-next": "packed, features kept",
    "qwen2.5-vl": "packed",  # its projector is a part of the tower and learns
    "qwen3-vl": "packed",
    "idefics3": "packed, features kept",
    "smolvlm": "packed, features kept",
    "internvl": "packed, features kept",
    "gemma3": "packed, features kept",
    "minicpm-v-4.6": "plain",  # linear attention carries a state from one branch into the next
    "omnilmm": "packed, features kept",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Four pairs about images of three shapes, with answers of different lengths; those of the last begin alike."""
    rows, (a, b, c) = [], architectures.ANSWERS
    answers = [(a, b), (b, c), (c, a), (c, f"{c[: len(c) // 2]} {a}")]
    for i, (width, height) in enumerate([(40, 40), (64, 40), (40, 80), (40, 40)]):
        buffer = io.BytesIO()
        architectures.picture(width, height, i).save(buffer, "PNG")
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": ""},
                "question": architectures.QUESTIONS[i],
                "chosen": answers[i][0],
                "rejected": answers[i][1],
                "idx": i,
            }
        )
    path = tmp_path_factory.mktemp("architectures") / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", architectures.BUILDERS)
def test_layout_is_exact_and_trained_tokens_are_the_answer_and_the_end_token(name, pairs):
    vlm = architectures.build(name)
    data = PairData(vlm, pairs)
    assert not data.rejects
    freeze(vlm.model, TrainParams())
    pad = vlm.tokenizer.pad_token_id
    assert data.pairs[3].common > 1
    scorer = PairScorer(vlm.model)
    assert choose_layout(scorer, vlm, data, TrainParams()) == LAYOUTS[name]
    batch = build_batch(data.pairs, pad, packed=LAYOUTS[name].startswith("packed"))
    table = pq.read_table(pairs)
    answers = [*table["chosen"].to_pylist(), *table["rejected"].to_pylist()]
    for ids, mask, answer in zip(batch["answers"], batch["answer_mask"], answers, strict=True):
        assert vlm.tokenizer.decode(ids[mask]).strip() == answer + "</s>"

    def gradients(batch: dict) -> dict[str, torch.Tensor]:
        vlm.model.zero_grad()
        logps = answer_logps(scorer(batch), batch).flatten()
        (logps * torch.arange(1, len(logps) + 1)).sum().backward()
        return {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}

    ours, plain = gradients(batch), gradients(build_batch(data.pairs, pad, packed=False))
    assert ours.keys() == plain.keys()
    off = sum((ours[key] - plain[key]).square().sum() for key in plain).sqrt()
    assert off / sum(grad.square().sum() for grad in plain.values()).sqrt() < 1e-4
