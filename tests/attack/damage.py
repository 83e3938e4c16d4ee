"""Scratch, records and weights that somebody or something has changed, and two runs at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from checkout import dvc_repository, environment
from harness import Attempts, Case
from safetensors.torch import load_file, save_file
from stages import NAMED, contents, copy_run, kill, make_checkout, run_stage, same_bytes

SCRATCH = "corrupt scratch and records"


def corrupt_scratch(attempts: Attempts, whole: Path) -> None:
    """Chunks of a killed generate that are cut, emptied, garbled, swapped: made again, to the same bytes."""
    stage, chance = NAMED["generate@1"], attempts.random
    folder = copy_run(whole, attempts.folder, stage)
    ways = {
        "cut": lambda data: data[: chance.randrange(1, len(data))],
        "emptied": lambda data: b"",
        "a digit changed": lambda data: data.replace(b"#1", b"#7", 1),
        "bytes that are no text": lambda data: b"\xff\x00" + data[2:],
    }
    # killed when publishing: every chunk is there
    run_stage(folder, stage, ATTACK_FAULT="kill rlaifv.store Store.publish 0")
    chunks = sorted(folder.glob("scratch/generate@1-*/*.jsonl"))
    with attempts.attack(SCRATCH, "chunks are there after the kill"):
        assert len(chunks) == 3
    for chunk, (_, how) in zip(chunks, ways.items(), strict=False):
        chunk.write_bytes(how(chunk.read_bytes()))
    done = run_stage(folder, stage)
    for name in list(ways)[: len(chunks)]:
        with attempts.attack(SCRATCH, f"a chunk of generate: {name}"):
            assert done.code == 0 and "broken" in done.text, done.text[-600:]
            same_bytes(folder, whole, stage.outs)


def corrupt_records(attempts: Attempts, whole: Path) -> None:
    """Judgements and claims that contradict, repeat or lack something: pairs names file and row; mended, same bytes."""
    stage = NAMED["pairs@1"]
    folder = copy_run(whole, attempts.folder, stage)
    file = folder / "data/iterations/1/judgements/judgements.jsonl"
    good = file.read_text()
    rows = [json.loads(line) for line in good.splitlines()]
    number = attempts.random.randrange(len(rows) - 1)
    row = rows[number]
    spoiled = {
        "accepted contradicts P": {**row, "accepted": not row["accepted"]},
        "false as text": {**row, "accepted": "false"},
        "twice": rows[number + 1],
        "NaN": {**row, "p_yes": float("nan")},
        "another claim": {**row, "claim_id": "nobody's"},
        "a field more": {**row, "more": 1},
        "a field less": {key: value for key, value in row.items() if key != "p_no"},
        "another labeler": {**row, "labeler": "0" * 16},
    }
    for name, change in spoiled.items():
        with attempts.attack(SCRATCH, f"a judgement: {name}"):
            lines = [json.dumps(change if place == number else one) for place, one in enumerate(rows)]
            file.write_text("\n".join(lines) + "\n")
            done = run_stage(folder, stage)
            assert "judgements" in done.one_line(stage.notebook), done.one_line(stage.notebook)
            assert not contents(folder, stage.outs), "pairs were written"
    file.write_text(good)
    with attempts.attack(SCRATCH, "the same bytes with the right judgements"):
        assert run_stage(folder, stage).code == 0
        same_bytes(folder, whole, stage.outs)


def nan_weights(attempts: Attempts, whole: Path) -> None:
    """A labeler one of whose tokens has NaN for an embedding: nothing is judged by it; mended, the same bytes."""
    stage = NAMED["feedback@1"]
    folder = copy_run(whole, attempts.folder, stage)
    weights = folder / "models/tiny/labeler/model.safetensors"
    good, tensors = weights.read_bytes(), load_file(weights)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][attempts.random.randrange(100, len(tensors[name]))] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with attempts.attack("not a number", "a labeler with an embedding of NaN"):
        if run_stage(folder, NAMED["models"]).code == 0:
            done = run_stage(folder, stage)
            done.one_line(stage.notebook)
        assert not contents(folder, stage.outs), "judgements were written"
    weights.write_bytes(good)
    with attempts.attack("not a number", "the same bytes with the right labeler"):
        for each in (NAMED["models"], stage):
            done = run_stage(folder, each)
            assert done.code == 0, done.text[-600:]
        same_bytes(folder, whole)


def dvc(folder: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *command],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=900)
    return process.returncode, text


def with_dvc(attempts: Attempts, whole: Path) -> None:
    """Two runs at once, an output edited by hand, a cache that was corrupted or is gone."""
    folder = dvc_repository(make_checkout(attempts.folder))
    made = ["data/world", "data/prepared"]
    with attempts.attack("DVC", "two runs at once"):
        both = [ended(run) for run in [dvc(folder, "repro", "prepare") for _ in range(2)]]
        assert any(code == 0 for code, _ in both) or "lock" in both[0][1] + both[1][1], both
        code, text = ended(dvc(folder, "repro", "prepare"))
        assert code == 0, text[-600:]
        same_bytes(folder, whole, made)
    rows = folder / "data/prepared/train.jsonl"
    with attempts.attack("DVC", "an output edited by hand"):
        text = rows.read_text()
        rows.unlink()
        rows.write_text(text.replace("?", "!"))
        code, text = ended(dvc(folder, "repro", "prepare"))
        assert code == 0, text[-600:]
        same_bytes(folder, whole, made)
    cached = [file for file in (folder / ".dvc/cache").rglob("*") if file.is_file()]
    with attempts.attack("DVC", "a file of the cache cut in half"):
        file = attempts.random.choice(cached)
        file.chmod(0o644)
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[: len(data) // 2])
        shutil.rmtree(folder / "data")
        code, text = ended(dvc(folder, "repro", "prepare"))
        assert code == 0, text[-600:]
        same_bytes(folder, whole, made)
    with attempts.attack("DVC", "no cache at all"):
        shutil.rmtree(folder / ".dvc/cache")
        shutil.rmtree(folder / "data")
        code, text = ended(dvc(folder, "repro", "prepare"))
        assert code == 0, text[-600:]
        same_bytes(folder, whole, made)
    with attempts.attack("DVC", "the same stage by hand beside it"):
        beside = dvc(folder, "repro", "--force", "prepare")
        done = run_stage(folder, NAMED["prepare"])
        code, text = ended(beside)
        assert code == 0, text[-600:]
        if done.code:  # DVC has removed what it reads, to make it anew
            done.one_line("10_prepare")
        same_bytes(folder, whole, made)


def killed_twice_at_once(attempts: Attempts, whole: Path) -> None:
    """The same stage twice at once: the second is told so in one line, and the first ends in the same bytes."""
    stage, folder, second = NAMED["feedback@1"], attempts.folder, []
    copy_run(whole, folder, stage)

    def start_second(*_) -> None:
        second.append(run_stage(folder, stage, 1e9, kill))

    with attempts.attack("DVC", "one stage twice at once"):
        used = float(dict(line.split() for line in (whole / "cpu.txt").read_text().splitlines())[str(stage)])
        first = run_stage(folder, stage, 0.6 * used, start_second)
        assert first.code == 0, first.text[-600:]
        if second[0].code:
            assert "another process is at this work" in second[0].one_line(stage.notebook), second[0].text[-600:]
        same_bytes(folder, whole, stage.outs)


DAMAGE = [
    Case("corrupt scratch", (SCRATCH,), corrupt_scratch),
    Case("corrupt records", (SCRATCH,), corrupt_records),
    Case("labeler with NaN in its weights", ("not a number",), nan_weights),
    Case("DVC", ("DVC",), with_dvc),
    Case("one stage twice at once", ("DVC",), killed_twice_at_once),
]
