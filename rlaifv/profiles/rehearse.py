"""What `rehearsal` does once it knows which profile: a copy of the repository, small models, data, and every stage."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from ruamel.yaml import YAML

from rlaifv import ROOT
from rlaifv.inference.server import is_served
from rlaifv.inference.yes_no import yes_no_ids
from rlaifv.params import ModelParams, Params, load_params, read_content
from rlaifv.plan import Machine, machine_here, make_plan, model_at
from rlaifv.profiles.rehearsal_beside import (
    check_scorer,
    named_beside,
    prompts_beside,
    run_beside,
    shorten_beside,
    shrink_beside,
    write_beside_data,
)
from rlaifv.profiles.rehearsal_data import FOLDER, PHOTO, ROWS, write_data
from rlaifv.profiles.shrink import random_checkpoint, teach_to_divide
from rlaifv.steps.divide import CLAIMS_PROMPT
from rlaifv.steps.models import ROLES, as_record, describe
from rlaifv.store import SCRATCH
from rlaifv.vlm.chat_format import encode, folded_prompt
from rlaifv.vlm.checkpoint import TEXT_FILES, find_checkpoint
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import check_model, load_model

PARTS = ("rlaifv", "notebooks", "params", "metrics", "models/tiny", "dvc.yaml", "experiments/dvc.yaml", ".dvcignore")
"""What of the repository DVC wants to see; models/tiny is not used."""

TOKENS = 8
"""The longest answer, and the longest reply of the divider: a large vocabulary in bfloat16 is slow on most CPUs."""

SAMPLES = 4
"""Answers to an instruction; a coin finds no difference between the four of any of eight once in 16 million times."""

QUESTION = "What is in the image?"

MADE_UP = """\
made up: the weights are random, so answers and numbers mean nothing; the divider replies to everything with one
         bulleted word; a coin decides on each claim after the labeler was asked about it (ablation.coin_share)"""


def rehearse(name: str, machine: Machine | None = None, disk: float = float("inf")) -> None:
    """Run the rehearsal of a profile, which is itself to run on `machine` with `disk` bytes free, where they are given.

    Raises ParamsError, OSError or ValueError, in one line, for what is wrong with the profile or does not fit, and
    RuntimeError when a stage fails.
    """
    started, folder = time.monotonic(), SCRATCH / "rehearsal" / name
    profile, content = load_params(f"params/{name}.yaml"), read_content(ROOT / "params" / f"{name}.yaml")
    sources = {role: fetch(role, model) for role in ROLES if not is_served((model := getattr(profile, role)).path)}
    beside = named_beside(name, content)
    more = {key: fetch(key, model_at(profile, path)) for key, path in beside.models(content).items()}
    if "scored_by" in more:
        check_scorer(beside.models(content)["scored_by"], more["scored_by"])
    if machine or disk < float("inf"):
        require_room(profile, "the profile does not fit", machine or machine_here(None, None), disk, beside.names)
    own_images = ROOT / content["prepare"]["image_root"]
    copy_repository(folder)
    notes = shorten(content)
    for role, source in sources.items():
        random_checkpoint(source, folder / "models" / role, content[role]["dtype"], divides=role == "divider")
        content[role] |= {"path": f"models/{role}", "revision": None}
    shrink_beside(more, content, folder, beside)
    drawn = write_data(content, folder) + write_beside_data(content, folder, beside, own_images)
    YAML().dump(content, folder / "params.yaml")
    small = load_params(folder / "params.yaml")
    small = replace(
        small, **{role: replace(getattr(small, role), path=str(folder / "models" / role)) for role in sources}
    )
    require_room(small, "no room for a rehearsal", machine_here(None, None), shutil.disk_usage(folder).free)
    print(f"rehearsal of {name}: {ROWS} instructions, a few training steps\n{MADE_UP}")
    print("\n".join([*notes, "data: " + (f"drawn or made up: {', '.join(drawn)}" if drawn else "the profile's own")]))
    image = open_image(next((folder / FOLDER / "images").rglob("*.*")))
    image = image.resize(PHOTO) if "train" in drawn else image
    for role in ROLES:
        source = getattr(profile, role)
        print(f"{role}: {source.path}" + (f" at {source.revision}" if source.revision else ""))
        if role in sources:
            print("\n".join(prepared(role, small, image)), flush=True)
    print("\n".join(prompts_beside(small, small.policy.path, beside, image)), flush=True)
    if beside.names:
        run(folder, "feedback@1", "evaluate_base", "test_base")  # what they begin with
    with ThreadPoolExecutor(1) as at_once:  # most of a stage's time here is its start, on one core
        others = at_once.submit(run_beside, folder, beside, surroundings(folder))
        run(folder, "report")
    others.result()
    print("\n".join(times(folder)))
    print(f"{name}: every stage has run, in {(time.monotonic() - started) / 60:.1f} minutes")
    print(f"report: {folder.relative_to(ROOT)}/plots/report.html")


def fetch(role: str, model: ModelParams) -> Path:
    """The folder of a checkpoint's files without its weights, once it is known that it can play that role."""
    check_model(replace(as_record(model), device="cpu", load_in_4bit=False), role)  # here it is small
    return find_checkpoint(model.path, model.revision, files=TEXT_FILES)[0]


def require_room(params: Params, problem: str, machine: Machine, disk: float, also: Collection[str] = ()) -> None:
    """Raise ValueError with the plan's first line about what does not fit."""
    here = machine == machine_here(None, None)
    host = psutil.virtual_memory().total if here else float("inf")
    short, _ = make_plan(params, machine, disk, host, also=also).shortages()
    if short:
        raise ValueError(f"{problem}: {short[0]}")


def copy_repository(folder: Path) -> None:
    """An own repository without models and data, in place of that of an earlier rehearsal."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n    check_update = false\n"
    )
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, folder / part)


def shorten(content: dict[str, Any]) -> list[str]:
    """Make a run of these parameters short, in place; what could not be kept as it is, a line each."""
    content |= {"iterations": {"1": {"prev": "0"}}, "benchmarks": {}}
    content["self_feedback"]["reference"] = "0"
    for section in ("generate", "divide", "evaluate"):
        content[section]["max_new_tokens"] = min(content[section]["max_new_tokens"], TOKENS)
    content["prepare"]["per_iteration"] = ROWS
    content["generate"]["samples"] = min(content["generate"]["samples"], SAMPLES)
    content["pairs"]["max_per_instruction"] = 1
    content["divide"]["max_reject_rate"] = 0.5  # a word drawn at random may be a blank
    content["feedback"]["min_answer_mass"] = 0.0
    content["ablation"]["coin_share"] = 1.0  # a random labeler says the same of all claims, which makes no pairs
    content["report"]["gallery"] = 2
    notes = ["second labeler: not rehearsed, the first judges in its place"] if content["evaluate"]["labeler"] else []
    content["evaluate"]["labeler"] = None
    shorten_beside(content, TOKENS)
    return notes + shorten_training(content["train"]) + without_4_bits(content)


def shorten_training(train: dict[str, Any]) -> list[str]:
    """One epoch of a few steps in as many processes as there are GPUs, or in two on a CPU."""
    gpus = torch.cuda.device_count()
    processes = min(train["processes"], gpus or 2)
    at_once = train["micro_batch_size"] * processes
    batch = 2 * at_once if at_once <= 2 else at_once  # no larger than the pairs that there will be
    fewer = f"training: {processes} of {train['processes']} processes"
    if processes == 1 and train["accelerate_config"]:
        fewer += f"; {train['accelerate_config']} is not rehearsed on one GPU"
    notes = [fewer] if processes < train["processes"] else []
    train |= {"epochs": 1, "checkpoints_per_epoch": 1, "processes": processes, "batch_size": batch}
    return notes


def without_4_bits(content: dict[str, Any]) -> list[str]:
    """Load in full what cannot be loaded in 4 bits here."""
    wanted = [key for key in (*ROLES, "train") if content[key].get("load_in_4bit")]
    if not wanted or (find_spec("bitsandbytes") and torch.cuda.is_available()):
        return []
    for key in wanted:
        content[key]["load_in_4bit"] = False
    return [f"4 bits: not rehearsed without bitsandbytes and a GPU ({', '.join(wanted)})"]


def prepared(role: str, params: Params, image: Image.Image) -> Iterator[str]:
    """Load the role's small model as the stages do, and say how it will be spoken to.

    Raises ValueError for a template or a tokenizer that the role cannot be played with.
    """
    vlm = load_model(describe(model := getattr(params, role), params.server))
    question = {
        "policy": QUESTION,
        "labeler": f"Is there a dog in the image? {params.feedback.suffix}",
        "divider": CLAIMS_PROMPT.format(question=QUESTION, answer="There is a dog."),
    }[role]
    prompt, of_image = folded_prompt(vlm, None if role == "divider" else image, question)
    yield f"  {type(vlm.network).__name__} in {vlm.model.dtype} on {vlm.device}"
    yield f"  {prompt}"
    if of_image:
        yield f"  {of_image} tokens for an image of {image.width} × {image.height}"
    if role == "labeler":
        found = yes_no_ids(vlm)
        for answer in ("yes", "no"):
            tokens = {i: vlm.tokenizer.decode([i]) for i in getattr(found, answer)}
            yield f"  {answer}: {', '.join(f'{i} {token!r}' for i, token in tokens.items())}"
    if role == "divider":
        bullet = vlm.tokenizer("- ", add_special_tokens=False)["input_ids"]
        teach_to_divide(vlm.model, encode(vlm, None, question).prompt_ids, bullet, vlm.eos_token_ids[0])
        vlm.model.save_pretrained(model.path)


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of what runs in the copy."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PYTHONPATH": str(folder), "PATH": path}


def run(folder: Path, *stages: str) -> None:
    """`dvc repro` of the copy up to these stages; its output is shown as it comes."""
    command = [sys.executable, "-m", "dvc", "repro", *stages]
    if subprocess.run(command, cwd=folder, env=surroundings(folder)).returncode:
        raise RuntimeError(f"a stage failed, the reason is above; its notebook is in {folder.relative_to(ROOT)}/runs")


def times(folder: Path) -> Iterator[str]:
    """A line for each stage in the order in which they ended."""
    for path in sorted((folder / "runs" / "timings").glob("*.json"), key=lambda path: path.stat().st_mtime):
        row = json.loads(path.read_text())
        yield f"  {row['stage']:14} {60 * row['minutes']:6.1f} s  {row['peak_memory_gb']:5.2f} GB"
