"""A released checkpoint into an ordinary one, and back: what the command does with its options."""

import argparse
from pathlib import Path
from typing import Any

from rlaifv.convert.folder import whole_folder
from rlaifv.convert.layouts import Layout, fetch, fetch_weights, find_layout
from rlaifv.convert.llava import convert_llava
from rlaifv.convert.original import ORIGINAL, memory_of, to_original
from rlaifv.convert.reward_head import SYSTEM as REWARD_SYSTEM
from rlaifv.convert.reward_head import base_fingerprint, read_format, write_head
from rlaifv.convert.tokens import SYSTEM
from rlaifv.vlm.checkpoint import FILES, TEXT_FILES, file_states
from rlaifv.vlm.loading import auto_class, load_weights, read_config


def convert(source: str, out: Path, options: argparse.Namespace) -> list[str]:
    """Write the ordinary checkpoint of a release; returns what a user should know of it.

    No weight of it is missing, none is left over, and all have the shape that transformers expects. Raises, in one
    line, FileNotFoundError or ValueError for what cannot be converted and FileExistsError where `out` is there.
    """
    layout = find_layout(source, options.revision, options.part, options.base)
    reward = None
    if layout.is_reward:
        if options.prompt is None:
            raise ValueError(
                f"{source} is a reward model, which is asked in its own words: give the published prompt file with "
                "--prompt (fact_rlhf_reward_prompt.txt or reward_prompt.txt of LLaVA-RLHF)"
            )
        reward = read_format(options.prompt, options.facts, base_fingerprint(layout))
    with whole_folder(out, job(layout, options)) as partial:
        if layout.kind == "omnilmm":
            from rlaifv.convert.omnilmm import convert_omnilmm

            said = convert_omnilmm(layout, partial, heads=options.heads)
        else:
            system = options.system or (REWARD_SYSTEM if reward else SYSTEM)
            said = convert_llava(layout, partial, tower=options.tower, dtype=options.dtype, system=system)
        config = read_config(partial, str(out))
        load_weights(auto_class(config), partial, str(out), device_map="meta")
        if reward:
            write_head(layout, reward, partial)
    return said


def restore(source: str, out: Path, options: argparse.Namespace) -> list[str]:
    """Write a checkpoint of ours in the layout that its release came in; returns and raises as `convert` does."""
    folder = fetch(source, options.revision, FILES)
    fetch_weights(folder)
    kind = read_config(folder, source).model_type
    if kind not in ("llava", "rlaifv_omnilmm") or (folder / "reward.json").is_file():
        raise ValueError(f"{source} has no original layout: it is a {'reward model' if kind == 'llava' else kind}")
    like = fetch(options.like, None, [*TEXT_FILES, f"{ORIGINAL}/*"]) if options.like else None
    memory = memory_of(folder, like, source) if kind == "llava" else None
    with whole_folder(out, {"back": source, "files": file_states(sorted(folder.glob("*.*")))}) as partial:
        if memory:
            return to_original(folder, memory, partial, source)
        from rlaifv.convert.omnilmm import restore_omnilmm

        restore_omnilmm(folder, partial)
        return []


def job(layout: Layout, options: argparse.Namespace) -> dict[str, Any]:
    """What determines the files of a conversion, but for this code."""
    files = [file for folder in layout.folders for file in sorted(folder.iterdir()) if file.is_file()]
    return {**vars(options), "kind": layout.kind, "files": file_states(files)}
