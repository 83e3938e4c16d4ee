"""Every stage with a full disk, with little memory, with a kernel that is killed and with a model that turns NaN, one
after the other: each time it ends in one line, and when the cause is gone the same command ends in the bytes of an
uninterrupted run."""

import re
from functools import partial
from pathlib import Path

import psutil
from harness import Attempts, Case
from stages import STAGES, Done, Stage, copy_run, kill, make_checkout, own_disk, run_stage, same_bytes

DISK, MEMORY, NAN = "disk full", "low memory", "not a number"
TURNS_NAN = {
    "exam": "rlaifv.inference.yes_no next_token_logprobs 0",  # its only batch
    "evaluate@0": "rlaifv.inference.sampling logits_of 20",
    "generate@1": "rlaifv.inference.sampling logits_of 50",
    "divide@1": "rlaifv.inference.sampling logits_of 50",
    "feedback@1": "rlaifv.inference.yes_no next_token_logprobs 1",
    "train@1": "rlaifv.training.dpo PairScorer.forward 8",
}
"""Stage → where its model begins to compute NaN half-way: module, function, call."""
CPU = "cpu.txt"
"""In the whole run: what the kernel of each stage used."""


def build_whole(attempts: Attempts, whole: Path) -> None:
    """The uninterrupted run of every stage, which all others are compared with."""
    folder, used = make_checkout(attempts.folder), []
    for stage in STAGES:
        done = run_stage(folder, stage)
        assert done.code == 0, f"{stage}: {done.text[-2000:]}"
        used.append(f"{stage} {done.cpu:.2f}\n")
    (folder / CPU).write_text("".join(used))
    folder.rename(whole)


def usual(whole: Path, stage: Stage) -> float:
    """Seconds of processor time that a stage's kernel takes when it is left alone."""
    return float(dict(line.split() for line in (whole / CPU).read_text().splitlines())[str(stage)])


def besiege(attempts: Attempts, whole: Path, stage: Stage) -> None:
    """All of it in one checkout, so that what one failure leaves behind meets the next."""
    folder, notebook, chance = attempts.folder / "checkout", stage.notebook, attempts.random
    moment, bytes_written = usual(whole, stage) * chance.uniform(0.1, 0.6), largest(whole, stage)
    with own_disk(folder) as leave:
        copy_run(whole, folder, stage)
        if str(stage) in TURNS_NAN:  # first, while all is still to be computed
            with attempts.attack(NAN, f"not a number half-way in {stage}"):
                done = run_stage(folder, stage, ATTACK_FAULT=f"nan {TURNS_NAN[str(stage)]}")
                assert re.search("not finite|NaN|is nan", done.one_line(notebook)), done.one_line(notebook)
        with attempts.attack(DISK, f"{'full disk' if leave else 'file-size limit'} in {stage}"):
            room = chance.randrange(bytes_written)
            if leave:
                leave(room)
                done = run_stage(folder, stage)
                leave(1 << 30)
            else:
                done = run_stage(folder, stage, 0, partial(limit_files, size=room))
            if done.code or not leave:  # else there was room: what is only linked takes none
                assert "no room to write" in done.one_line(notebook), done.one_line(notebook)
        with attempts.attack(MEMORY, f"killed kernel in {stage}"):
            done = run_stage(folder, stage, moment, kill)
            if done.code:  # else it had too little left to do to live until then
                line = done.one_line(notebook)
                assert "the kernel was killed, usually for memory" in line and "goes on where it was" in line, line
        if chance.random() < 0.5:  # of a random half of the stages: each takes time
            with attempts.attack(MEMORY, f"address-space limit in {stage}"):
                spare = chance.randrange(4 << 20, 256 << 20)
                done = run_stage(folder, stage, moment, partial(no_more_memory, spare=spare))
                if done.code:  # else what it had was enough; IPython may print why it had none to say what was wrong
                    line = Done(done.code, done.text.replace("Traceback", "…"), 0).one_line(notebook)
                    assert "memory" in line, line
        done = run_stage(folder, stage)
        for kind in (DISK, MEMORY, *([NAN] if str(stage) in TURNS_NAN else [])):
            with attempts.attack(kind, f"the same bytes afterwards in {stage}"):
                assert done.code == 0, done.text[-600:]
                same_bytes(folder, whole, stage.outs)


def largest(whole: Path, stage: Stage) -> int:
    """Bytes of the largest file that a stage writes."""
    files = [file for out in stage.outs for file in [whole / out, *(whole / out).rglob("*")] if file.is_file()]
    return max(file.stat().st_size for file in files)


def limit_files(_: psutil.Process, kernel: psutil.Process, size: int) -> None:
    kernel.rlimit(psutil.RLIMIT_FSIZE, (size, size))


def no_more_memory(_: psutil.Process, kernel: psutil.Process, spare: int) -> None:
    """So many bytes more than the kernel has now, and no more."""
    limit = kernel.memory_info().vms + spare
    kernel.rlimit(psutil.RLIMIT_AS, (limit, limit))


SIEGE = [
    Case(f"siege of {stage}", (DISK, MEMORY, NAN), partial(besiege, stage=stage))
    for stage in sorted(STAGES, key=lambda stage: stage.notebook != "90_report")
    if str(stage) not in ("evaluate@1", "test@1")  # the notebooks of iteration 0
    and "benchmarks" not in str(stage)  # none is configured: they start no kernel
]
WHOLE = Case("whole run", (DISK,), build_whole, needs_whole=False)
