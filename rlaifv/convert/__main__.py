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


def main(arguments: list[str] | None = None) -> None:
    """The command; what cannot be done ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder or a hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--revision", help="of a hub id: the commit (default: main)")
    parser.add_argument(
        "--part", choices=("policy", "sft", "reward"), default="policy", help="of LLaVA-RLHF's repositories"
    )
    parser.add_argument("--base", help="the model that an adapter was trained on (default: as its configuration says)")
    parser.add_argument("--tower", help="LLaVA's image encoder (default: mm_vision_tower of its configuration)")
    parser.add_argument("--heads", type=int, help="attention heads of OmniLMM's image encoder (default: by its width)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all weights (default: as released; float32 where an adapter was added, so that nothing is rounded)",
    )
    parser.add_argument("--system", help="what LLaVA's chats begin with (default: as the release was trained)")
    parser.add_argument("--prompt", type=Path, help="the published prompt file of LLaVA-RLHF's reward model")
    parser.add_argument("--facts", type=Path, help="a file with the sentence that introduces the facts in that prompt")
    parser.add_argument("--to", choices=("ours", "original"), default="ours", help="original: the way back")
    parser.add_argument("--like", help="on the way back: a converted checkpoint with the layout (default: its own)")
    options = parser.parse_args(arguments)

    # here, for they take seconds to import, and --help should not
    from transformers.utils.logging import disable_progress_bar

    from rlaifv.convert.releases import convert, restore
    from rlaifv.store import InUse

    disable_progress_bar()
    try:
        said = (restore if options.to == "original" else convert)(options.source, options.out, options)
    except (OSError, ValueError, ImportError, InUse) as error:
        sys.exit(f"convert: {' '.join(str(error).split())}")
    print("\n".join([*filter(None, said), f"{options.out} is ready"]))


if __name__ == "__main__":
    main()
