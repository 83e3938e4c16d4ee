"""Rewrite a checkpoint as the papers released it into an ordinary one, which every command here takes, and back.

    python -m rlaifv.convert openbmb/RLAIF-V-7B models/rlaif-v-7b
    python -m rlaifv.convert zhiqings/LLaVA-RLHF-7b-v1.5-224 models/llava-rlhf-7b      # --part sft | policy | reward
    python -m rlaifv.convert data/iterations/4/policy release --to original --like models/rlaif-v-7b

SOURCE is a folder or a hub id: LLaVA-1.5 (RLAIF-V-7B), OmniLMM (RLAIF-V-12B) and LLaVA-RLHF in their original layouts,
or a LoRA adapter to one of these. The weights pass through memory a file at a time; a command that was stopped goes
on where it was; OUT is there when all of it is. docs/released-models.md says more.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rlaifv.convert.folder import whole_folder
from rlaifv.convert.layouts import PARTS, Layout, fetch, fetch_weights, find_layout
from rlaifv.convert.llava import convert_llava
from rlaifv.convert.original import ORIGINAL, memory_of, to_original
from rlaifv.convert.reward_head import SYSTEM as REWARD_SYSTEM
from rlaifv.convert.reward_head import base_fingerprint, read_format, write_head
from rlaifv.convert.tokens import SYSTEM
from rlaifv.store import InUse
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


def main(arguments: list[str] | None = None) -> None:
    """The command; what cannot be done ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder or a hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--revision", help="of a hub id: the commit (default: main)")
    parser.add_argument("--part", choices=PARTS, default="policy", help="of LLaVA-RLHF's repositories")
    parser.add_argument("--base", help="the model that an adapter was trained on (default: as its configuration says)")
    parser.add_argument("--tower", help="LLaVA's image encoder (default: mm_vision_tower of its configuration)")
    parser.add_argument("--heads", type=int, help="attention heads of OmniLMM's image encoder (default: by its width)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all weights (default: as released; float32 where an adapter was added, so that nothing is rounded)",
    )
    parser.add_argument("--system", help=f"what LLaVA's chats begin with (default: {SYSTEM[:32]}…)")
    parser.add_argument("--prompt", type=Path, help="the published prompt file of LLaVA-RLHF's reward model")
    parser.add_argument("--facts", type=Path, help="a file with the sentence that introduces the facts in that prompt")
    parser.add_argument("--to", choices=("ours", "original"), default="ours", help="original: the way back")
    parser.add_argument("--like", help="on the way back: a converted checkpoint with the layout (default: its own)")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        said = (restore if options.to == "original" else convert)(options.source, options.out, options)
    except (OSError, ValueError, ImportError, InUse) as error:
        sys.exit(f"convert: {' '.join(str(error).split())}")
    print("\n".join([*filter(None, said), f"{options.out} is ready"]))


if __name__ == "__main__":
    main()
