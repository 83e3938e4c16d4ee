"""Pairs are tokenized once and mapped into memory: a second process, or a run that goes on, only opens them."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_llava import answer, picture, save_pairs, save_tiny_llava

from rlaifv import ROOT
from rlaifv.training import pair_data
from rlaifv.training.pair_data import PairData, read_rows
from rlaifv.vlm.chat_format import encode
from rlaifv.vlm.images import decode_image
from rlaifv.vlm.loading import VLM, load_vlm


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> VLM:
    return load_vlm(str(save_tiny_llava(tmp_path_factory.mktemp("llava"))), device="cpu")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """23 pairs, of which several ask the same about the same image and two cannot be used."""
    path = save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", 23)
    rows = pq.read_table(path).to_pylist()
    for row in rows[3:20:4]:
        row["image"], row["question"] = rows[0]["image"], "what is in the image ?"
    rows[7]["chosen"], rows[12]["image"]["bytes"] = "dog " * 300, b""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path


def test_stored_pairs_are_what_encoding_each_row_alone_gives(vlm, parquet, tmp_path):
    data = PairData(vlm, parquet, folder=tmp_path / "pairs")
    assert {reject.id for reject in data.rejects} == {"7:107", "12:112"} and len(data.pairs) == 21
    rows = {answers.pair_id: (answers, question, image) for answers, question, image in read_rows(parquet)}
    assert data.pairs.ids == [pair.pair_id for pair in data.pairs] == [k for k in rows if k not in ("7:107", "12:112")]
    assert data.pairs.row_lengths.tolist() == [pair.row_length for pair in data.pairs]
    for pair in data.pairs:
        answers, question, image = rows[pair.pair_id]
        alone = encode(vlm, decode_image(image, ""), question, [answers.chosen, answers.rejected])
        assert [*pair.prompt, *pair.chosen] == alone.rows[0] and [*pair.prompt, *pair.rejected] == alone.rows[1]
        assert len(pair.prompt) + pair.chosen_start == alone.answer_starts[0]
        assert data.image_inputs(pair.image)["pixel_values"].equal(alone.inputs["pixel_values"])
        assert all(ids.flags.writeable for ids in (pair.prompt, pair.chosen, pair.rejected)), "PyTorch would warn"


def test_an_image_is_stored_once_and_a_prompt_encoded_once(vlm, parquet, tmp_path):
    data = PairData(vlm, parquet, folder=tmp_path / "pairs")
    images = {image for _, _, image in read_rows(parquet)}
    assert len(data.images) == len(images) and set(data.images["bytes"].to_pylist()) == images
    assert len({pair.image for pair in data.pairs}) < len(data.pairs)


def test_opening_them_again_tokenizes_and_reads_nothing(vlm, parquet, tmp_path, monkeypatch):
    first = PairData(vlm, parquet, folder=tmp_path / "pairs")
    monkeypatch.setattr(pair_data, "encode", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr("rlaifv.steps.public_pairs.pq.ParquetFile", lambda *_, **__: pytest.fail("read again"))
    again = PairData(vlm, parquet, folder=tmp_path / "pairs")
    assert again.rejects == first.rejects and again.pairs.ids == first.pairs.ids
    assert all(np.array_equal(a.chosen, b.chosen) for a, b in zip(again.pairs, first.pairs, strict=True))


def test_a_kill_while_they_are_written_leaves_nothing_that_is_taken_for_all(vlm, parquet, tmp_path, monkeypatch):
    calls = itertools.count()

    def dying(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pair_data, "encode", dying)
        with pytest.raises(KeyboardInterrupt):
            PairData(vlm, parquet, folder=tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()
    assert len(PairData(vlm, parquet, folder=tmp_path / "pairs").pairs) == 21


OPEN = """
import json, re, sys
from pathlib import Path
from accelerate import PartialState
from rlaifv.training.pair_data import PairData
PartialState()
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
warm = PairData(None, None, folder=Path(sys.argv[1]))  # what the libraries take when they are first used
warm.pairs[0]
before = anonymous()
data = PairData(None, None, folder=Path(sys.argv[1]))
lengths = data.pairs.row_lengths
some = [data.pairs[i] for i in range(0, len(data.pairs), 10)]
print(json.dumps({"pairs": len(data.pairs), "mb": anonymous() - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_second_process_holds_none_of_many_megabytes(vlm, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "image": {"bytes": picture(i) + rng.bytes(500_000), "path": ""},  # a PNG may be followed by anything
            "question": "describe it .",
            "chosen": answer(rng, 5),
            "rejected": answer(rng, 6),
        }
        for i in range(80)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "big.parquet")
    PairData(vlm, tmp_path / "big.parquet", folder=tmp_path / "pairs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPEN, str(tmp_path / "pairs")]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert said["pairs"] == 80 and said["mb"] < 20, f"{said['mb']} MB of 40"
