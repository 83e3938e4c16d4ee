"""What a rehearsal runs beside the pipeline, where a profile names it: fine-tuning (`sft`), a reward model
(`reward_model`) and reinforcement learning (`rloo`), one run and a step or two of each.

The data are the first rows of the profile's own, or drawn; the reward model's prompt files are made up where they are
not there yet. A released reward model is asked with its own `reward.json`, and small random weights.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rlaifv import ROOT
from rlaifv.params import Params, read_yaml
from rlaifv.plan import BESIDE
from rlaifv.profiles.rehearsal_data import FOLDER, ROWS
from rlaifv.profiles.shrink import random_checkpoint
from rlaifv.records import Reject, read_jsonl
from rlaifv.steps.facts import read_facts
from rlaifv.steps.preferences import Preference, read_preferences
from rlaifv.steps.prepare import inside, parse_instruction
from rlaifv.steps.sft_rows import READERS, SftRow
from rlaifv.training.reward_model import read_prompt
from rlaifv.training.sft import encode_conversation
from rlaifv.vlm.chat_format import Reader, folded_tokens
from rlaifv.vlm.loading import load_reader, read_config
from rlaifv.vlm.reward_format import (
    PLACE,
    RewardFormat,
    RewardHead,
    check_example,
    encode_answers,
    read_format,
    write_reward_files,
)

ENTRIES = {"sft": "sft_parts", "reward_model": "reward_runs", "rloo": "rloo_runs"}
NOTEBOOKS = {"sft": "83_sft", "reward_model": "88_reward_model", "rloo": "87_rloo"}
PROMPT = "USER: How good is the last answer? {}ASSISTANT: It is"
"""In place of a prompt file that is not there yet."""

ASKED, SAID, FALSE = "What is in the image?", "There is a dog.", "There is a kite at the top of the picture."


@dataclass(frozen=True)
class Beside:
    """What of `plan.BESIDE` a profile names, and the one run of each that is rehearsed (None: not named)."""

    names: tuple[str, ...]
    reward_run: str | None
    rloo_run: str | None

    def models(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Key of the parameters → the checkpoint beside policy, labeler and divider that it names."""
        paths = {f"{name}.base": content[name]["base"] for name in self.names if name != "rloo"}
        if self.rloo_run:
            scored_by = content["rloo_runs"][self.rloo_run]["scored_by"] or ""
            paths["scored_by"] = scored_by if "/" in scored_by else None
        return {key: path for key, path in paths.items() if path}


def named_beside(profile: str, content: Mapping[str, Any]) -> Beside:
    """The sections that a profile sets (the default sets all, and is run rather than rehearsed), and the first of the
    runs; of the reward models that which RLOO asks, where one that is trained here is asked."""
    overlay = {} if profile == "default" else read_yaml(ROOT / "params" / f"{profile}.yaml") or {}
    names = {name for name in BESIDE if overlay.keys() & {name, ENTRIES[name]}}
    first = {name: next(iter(content[ENTRIES[name]])) for name in names}
    scored_by = content["rloo_runs"][first["rloo"]]["scored_by"] if "rloo" in names else None
    if scored_by in content["reward_runs"]:
        first["reward_model"] = scored_by
    in_order = tuple(name for name in BESIDE if name in first)
    return Beside(in_order, first.get("reward_model"), first.get("rloo"))


def shorten_beside(content: dict[str, Any], tokens: int) -> None:
    """A step or two of each training, in one process, in place."""
    for section in (content["sft"], content["reward_model"]):
        micro = min(section["micro_batch_size"], 2)
        section |= {"epochs": 1, "batch_size": micro, "micro_batch_size": micro, "processes": 1}
        section["checkpoints_per_epoch"] = 1
    content["sft"]["rows"] = ROWS // 2
    content["reward_model"]["held_out"] = 0.5
    rloo = {"steps": 1, "prompts": 2, "samples": 2, "micro_batch_size": 2, "checkpoints": 1, "compared": 2}
    content["rloo"] |= rloo | {"max_new_tokens": min(content["rloo"]["max_new_tokens"], tokens)}


# ---- data


def write_beside_data(content: dict[str, Any], root: Path, beside: Beside, own_images: Path) -> list[str]:
    """Write what `beside` reads below `root`/data/rehearsal, after `write_data`, and make the parameters name it;
    returns what is drawn or made up."""
    folder, drawn = root / FOLDER, []
    shown = [parse_instruction(row) for row in read_jsonl(folder / "instructions_train.jsonl")]
    facts = read_facts(folder / "captions_train.json")
    if "sft" in beside.names:
        for name, part in content["sft_parts"].items():
            rows = own_conversations(part, own_images, folder / "images")
            if not rows:
                drawn.append(f"sft_parts.{name}")
                talks = [[ASKED, i.reference or SAID, "Is it a picture?", "Yes."] for i in shown[: ROWS // 2]]
                rows = [SftRow(f"{k}", i.image_path, t, "") for k, (i, t) in enumerate(zip(shown, talks, strict=False))]
            file = f"{FOLDER}/sft_{name}.json"
            (root / file).write_text(json.dumps([as_llava_instruct(row) for row in rows]))
            part |= {"kind": "llava_instruct", "files": [file], "images": ""}
    reward = content["reward_model"]
    if "reward_model" in beside.names:
        preferences = own_preferences(reward["preferences"], own_images, folder / "images")
        if not preferences:
            drawn.append("preferences")
            preferences = [Preference(i.id, i.image_path, [ASKED], i.reference or SAID, FALSE) for i in shown]
        (folder / "preferences.json").write_text(json.dumps([as_human(p) for p in preferences]))
        reward["preferences"] = f"{FOLDER}/preferences.json"
        for key, place in (("prompt", ""), ("facts_prompt", PLACE)):
            if reward[key]:
                file = ROOT / reward[key]
                if not file.is_file():
                    drawn.append(f"reward_model.{key}")
                    file = folder / f"{key}.txt"
                    file.write_text(PROMPT.format(place))
                reward[key] = str(file)  # wherever it is read from
    for section in (reward, content["rloo"]):
        if section["captions"]:
            own = ROOT / section["captions"]
            known = facts | (read_facts(own) if own.is_file() else {})
            section["captions"] = f"{FOLDER}/facts.json"
            (root / section["captions"]).write_text(json.dumps(known))
    return drawn


def own_conversations(part: Mapping[str, Any], images: Path, target: Path) -> list[SftRow]:
    """The first rows of a part of the mixture whose files are there, with their images in `target`."""
    files = [part["files"]] if isinstance(part["files"], str) else part["files"]
    if not all((ROOT / file).is_file() for file in files):
        return []
    rows, rejects = READERS[part["kind"]](*(ROOT / file for file in files))
    require(rows, rejects, files[0])
    taken = rows[: ROWS // 2]
    bring([row.image_path for row in taken], images / part["images"], target)
    return taken


def own_preferences(path: str | None, images: Path, target: Path) -> list[Preference]:
    """The first preferences of a file that is there, with their images in `target`."""
    if not path or not (ROOT / path).exists():
        return []
    taken = read_preferences(ROOT / path, images)[0][:ROWS]
    bring([preference.image_path for preference in taken], images, target)
    return taken


def require(rows: Sequence[SftRow], rejects: Sequence[Reject], file: str) -> None:
    if not rows:
        raise ValueError(f"{file} holds no usable conversation" + "".join(f": {r.reason}" for r in rejects[:1]))


def bring(names: Sequence[str], images: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(images, name), inside(target, name))


def as_llava_instruct(row: SftRow) -> dict[str, Any]:
    return {"id": row.id, "image": row.image_path, "conversations": turns(row.conversation)}


def as_human(row: Preference) -> dict[str, Any]:
    """A preference as a row of LLaVA-Human-Preference-10K."""
    outputs = {f"output_{k}": {"from": "gpt", "value": text} for k, text in enumerate((row.chosen, row.rejected), 1)}
    about = {"id": row.id, "image": row.image_path, "conversations": turns(row.conversation)}
    return about | outputs | {"preference": 1, "hallucination": True}


def turns(conversation: Sequence[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(conversation)]


# ---- models


def check_scorer(path: str, folder: Path) -> None:
    """ValueError for a reward model whose prompt is not the one that it was trained with."""
    check_example(load_reader(str(folder)), read_format(folder, path))


def shrink_beside(sources: Mapping[str, Path], content: dict[str, Any], folder: Path, beside: Beside) -> None:
    """Write small random checkpoints in place of those in `sources` (key → folder), and make the parameters name them;
    a reward model keeps its format."""
    for key, source in sources.items():
        out = folder / "models" / key.replace(".", "_")
        random_checkpoint(source, out, content["policy"]["dtype"])
        if key == "scored_by":
            torch.manual_seed(0)
            head = RewardHead(read_config(out, str(out)).get_text_config().hidden_size)
            write_reward_files(out, head, read_format(source, str(source)), load_reader(str(out)))
            content["rloo_runs"][beside.rloo_run]["scored_by"] = str(out)
        else:
            content[key.partition(".")[0]]["base"] = str(out)


def prompts_beside(params: Params, policy: str, beside: Beside, image: Image.Image) -> Iterator[str]:
    """What the models that are trained or asked beside the pipeline read, image folded."""
    if "sft" in beside.names:
        reader = load_reader(params.sft.base or policy)
        ids, labels, _ = encode_conversation(reader, image, [ASKED, SAID, "Is it a cat?", "No."])
        learned = [token for token in labels if token >= 0]
        yield from said("sft", reader, ids)
        yield f"  learned of it: {reader.tokenizer.decode(learned)}"
    if "reward_model" in beside.names:
        run, settings = params.reward_runs[beside.reward_run], params.reward_model
        reader = load_reader(settings.base or policy)
        prompt = read_prompt(settings, run)
        form = RewardFormat(prompt, settings.facts_intro, settings.fact_line, "", settings.head)
        yield from said("reward_model", reader, rated(reader, form, image))
    if beside.rloo_run and (scored_by := params.rloo_runs[beside.rloo_run].scored_by) and "/" in scored_by:
        reader = load_reader(scored_by)
        yield from said("rloo is scored by", reader, rated(reader, read_format(Path(scored_by), scored_by), image))


def rated(reader: Reader, form: RewardFormat, image: Image.Image) -> list[int]:
    """The tokens at whose end an answer's reward is read."""
    return encode_answers(reader, form, image, ASKED, [SAID], [SAID] if form.facts else None).rows[0]


def said(what: str, reader: Reader, ids: Sequence[int]) -> Iterator[str]:
    text, of_image = folded_tokens(reader, ids)
    yield f"{what}: {of_image} tokens an image\n  {text}"


# ---- stages


def run_beside(folder: Path, beside: Beside, environment: Mapping[str, str]) -> None:
    """The notebooks, one after the other; their output is shown as it comes."""
    arguments = {
        "sft": [],
        "reward_model": [f"iteration=reward-{beside.reward_run}", f"run={beside.reward_run}"],
        "rloo": [f"iteration=rloo-{beside.rloo_run}", f"run={beside.rloo_run}"],
    }
    for name in beside.names:
        command = [sys.executable, "-m", "rlaifv.run", NOTEBOOKS[name], *arguments[name]]
        print(f"Running stage '{name}':\n> python {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, cwd=folder, env=environment).returncode:
            raise RuntimeError(
                f"{name} failed, the reason is above; its notebook is in {folder.relative_to(ROOT)}/runs"
            )
