"""What only a GPU can show, where there is one: sharded training in bfloat16, and 4 bits."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_dev_scores import dev
from tiny_llava import picture, save_pairs, save_tiny_llava
from training_runs import PARAMS, log_rows, run
from transformers import AutoModelForImageTextToText

from rlaifv import ROOT
from rlaifv.inference.logprobs import prefix_path
from rlaifv.inference.yes_no import judge
from rlaifv.vlm.chat_format import encode_questions
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import load_vlm

__all__ = ["dev"]  # a fixture: pytest finds it by its name in this module
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

BFLOAT16 = dataclasses.replace(
    PARAMS, dtype="bfloat16", gradient_checkpointing=True, micro_batch_size=1, learning_rate=1e-4
)
QUESTIONS = ["is there a dog ?", "is it a red kite ?", "is there a big blue cat left of it ?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    model = AutoModelForImageTextToText.from_pretrained(save_tiny_llava(folder / "tiny", hidden=128), dtype="bfloat16")
    shutil.copytree(folder / "tiny", folder / "model")
    model.save_pretrained(folder / "model")  # in bfloat16, as hub models are: a sharded run starts from such weights
    save_pairs(folder / "pairs.parquet", 13)
    (folder / "0.png").write_bytes(picture(0))
    return folder


def test_fsdp_in_bfloat16_keeps_the_best_checkpoints_and_trains_what_a_plain_run_does(folder, dev):
    plain = log_rows(run(folder, "plain", BFLOAT16))
    work = folder / "fsdp"
    params = dataclasses.replace(BFLOAT16, keep_checkpoints=2)
    (work / "run").mkdir(parents=True)
    job = {"policy": str(folder / "model"), "pairs": str(folder / "pairs.parquet"), "run": str(work / "run")}
    job |= {"params": dataclasses.asdict(params), "seed": 3, "made_of": {}, "dev": dataclasses.asdict(dev)}
    (work / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "params/accelerate/fsdp2.yaml"), "-m", "rlaifv.training.job"]
    done = subprocess.run([*command, str(work / "job.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["loss"] for row in log_rows(SimpleNamespace(log=work / "run/published/log.csv"))]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses == pytest.approx([row["loss"] for row in plain], abs=0.03)
    kept = [path for path in sorted((work / "run/published").iterdir()) if path.is_dir()]
    assert len(kept) == 2 and len(list((work / "run/published").glob("checkpoint-*.json"))) == 4
    weights = AutoModelForImageTextToText.from_pretrained(kept[-1]).state_dict()
    expected = AutoModelForImageTextToText.from_pretrained(folder / "plain/out" / kept[-1].name).state_dict()
    assert weights.keys() == expected.keys()


def test_a_labeler_in_4_bits_says_what_its_weights_say_in_16_and_shares_its_prefix(folder):
    labeler = load_vlm(str(folder / "model"), dtype="bfloat16", device="cuda:0", load_in_4bit=True)
    image = open_image(folder / "0.png")
    assert prefix_path(labeler, [encode_questions(labeler, image, QUESTIONS)]) == "packed"
    shared = judge(labeler, image, QUESTIONS)
    widened = dataclasses.replace(labeler, model=labeler.model.dequantize(), fingerprint="in 16 bits")
    assert shared == [pytest.approx(answer, abs=0.02) for answer in judge(widened, image, QUESTIONS)]


def test_lora_on_a_4_bit_base_starts_at_log_2_and_learns(folder):
    params = dataclasses.replace(BFLOAT16, lora_r=4, lora_alpha=8, learning_rate=1e-2, load_in_4bit=True)
    result = run(folder, "qlora", params)
    rows = log_rows(result)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.01), "the reference was computed in fours"
    assert rows[-1]["loss"] < 0.6
    AutoModelForImageTextToText.from_pretrained(result.checkpoints[-1])
