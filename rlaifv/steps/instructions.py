"""Instruction files out of what others published: the public dataset's prompts to train on, COCO to evaluate on.

    python -m rlaifv.steps.instructions public data/rlaif-v/*.parquet --limit 16000
    python -m rlaifv.steps.instructions coco data/coco --prompts obj_halbench_300_with_image.jsonl --dev 300 --test 300

Both put images below data/images (`--image-root`) and write JSON lines that `prepare` reads. Nothing is downloaded:
the public dataset is github.com/RLHF-V/RLAIF-V's parquet files, COCO's annotations and the prompts are what
`python -m rlaifv.benchmarks.fetch` gets.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlaifv.records import Instruction, read_jsonl, write_jsonl
from rlaifv.steps.public_pairs import public_rows
from rlaifv.store import link_or_copy

KINDS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}
"""What a picture's file begins with → the ending of its name."""


def digest(content: bytes, size: int = 8) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def from_public(files: Sequence[Path], image_root: Path, out: Path, limit: int | None = None) -> dict[str, int]:
    """Write the distinct (image, question) of the public dataset to `out`, and their images, each once, below
    `image_root`/public.

    Returns the counts `read` = `written` + `repeated` + `unusable` (no image bytes of a known kind, or no question);
    reading ends at `limit` instructions.
    """
    seen: set[str] = set()
    rows: list[Instruction] = []
    counts = dict.fromkeys(("read", "written", "repeated", "unusable"), 0)
    for row in public_rows(files, ("image", "question", "origin_dataset")):
        counts["read"] += 1
        content, question = (row["image"] or {}).get("bytes") or b"", str(row["question"] or "").strip()
        ending = next((ending for magic, ending in KINDS.items() if content.startswith(magic)), None)
        if ending is None or not question:
            counts["unusable"] += 1
            continue
        name = digest(content)
        key = f"{name}-{digest(question.encode(), 4)}"
        if key in seen:
            counts["repeated"] += 1
            continue
        seen.add(key)
        path = Path("public") / name[:2] / f"{name}{ending}"
        if not (image_root / path).is_file():
            (image_root / path).parent.mkdir(parents=True, exist_ok=True)
            partial = image_root / path.with_suffix(".partial")
            partial.write_bytes(content)
            os.replace(partial, image_root / path)
        rows.append(Instruction(key, str(path), question, source=str(row["origin_dataset"] or "")))
        counts["written"] += 1
        if counts["written"] == limit:
            break
    if not rows:
        raise ValueError(f"no usable row among the {counts['read']} of {', '.join(map(str, files))}")
    write_jsonl(out, rows)
    return counts


def read_prompts(path: Path) -> tuple[list[str], set[str]]:
    """The distinct prompts of Object HalBench's file, and the COCO images that it uses itself."""
    rows = read_jsonl(path)
    prompts = list(dict.fromkeys(str(row["question"]).strip() for row in rows if row.get("question")))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: no row has a `question`")
    return prompts, {str(int(row["image_id"])) for row in rows if str(row.get("image_id", "")).isdigit()}


def from_coco(
    coco: Path, prompts_file: Path, image_root: Path, sizes: dict[str, int], split: str = "val2014"
) -> dict[str, Path]:
    """Write an instruction file for each of `sizes` (dev, test): so many images of COCO's `split`, none in two files
    and none of Object HalBench's own, each with one of its prompts. The images are linked below `image_root`/coco.

    Which images and which prompt depends on the image's id alone. Raises ValueError where COCO has too few images,
    FileNotFoundError where one is not there.
    """
    prompts, taken = read_prompts(prompts_file)
    instances = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
    objects = {annotation["image_id"] for annotation in instances["annotations"]}
    usable = [image for image in instances["images"] if image["id"] in objects and str(image["id"]) not in taken]
    usable.sort(key=lambda image: digest(str(image["id"]).encode()))
    if len(usable) < sum(sizes.values()):
        raise ValueError(f"{coco} has {len(usable)} images with objects that are free, not {sum(sizes.values())}")
    written, start = {}, 0
    for name, size in sizes.items():
        rows = []
        for image in usable[start : start + size]:
            file = coco / split / image["file_name"]
            if not file.is_file():
                raise FileNotFoundError(f"no {file}: unpack COCO's {split}.zip into {coco}")
            path = Path("coco") / image["file_name"]
            if not (image_root / path).exists():
                (image_root / path).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(file, image_root / path)
            prompt = prompts[int(digest(f"prompt/{image['id']}".encode()), 16) % len(prompts)]
            rows.append(Instruction(str(image["id"]), str(path), prompt, source=split))
        written[name] = coco / f"instructions_{name}.jsonl"
        write_jsonl(written[name], rows)
        start += size
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.steps.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    public = commands.add_parser("public", help="the public RLAIF-V dataset's prompts and images")
    public.add_argument("files", nargs="+", type=Path, help="its parquet files")
    public.add_argument("--out", type=Path, default=Path("data/instructions_train.jsonl"))
    public.add_argument("--limit", type=int, help="so many instructions at most (the paper: 4 × 4,000)")
    coco = commands.add_parser("coco", help="COCO images with Object HalBench's prompts, for dev and test")
    coco.add_argument("folder", type=Path, help="holds annotations/ and the images of the split")
    coco.add_argument("--prompts", type=Path, required=True, help="obj_halbench_300_with_image.jsonl")
    coco.add_argument("--split", default="val2014")
    coco.add_argument("--dev", type=int, default=300)
    coco.add_argument("--test", type=int, default=300)
    for command in (public, coco):
        command.add_argument("--image-root", type=Path, default=Path("data/images"), help="prepare.image_root")
    options = parser.parse_args(arguments)
    try:
        if options.command == "public":
            counts = from_public(options.files, options.image_root, options.out, options.limit)
            print(
                f"{options.out}: {counts['read']} rows = {counts['written']} instructions + {counts['repeated']} "
                f"repeated + {counts['unusable']} unusable"
            )
        else:
            sizes = {"dev": options.dev, "test": options.test}
            files = from_coco(options.folder, options.prompts, options.image_root, sizes, options.split)
            for name, file in files.items():
                print(f"{file}: {sizes[name]} instructions")
    except (OSError, ValueError) as error:
        sys.exit(f"instructions: {error}")


if __name__ == "__main__":
    main()
