"""One's own pictures, without a single annotation: instructions, splits, a profile and its plan, in one command.

    python -m rlaifv.profiles.own --images DIR [--questions FILE] [--base PROFILE]     # or: make own IMAGES=DIR

Nothing of the folder is changed or copied. The pictures go to train, dev and test by what they show, byte for byte of
the decoded picture, so that a copy under another name is in no other split. Dev and test are judged by claims
(docs/own-data.md). Written are data/own/{train,dev,test}.jsonl, params/own.yaml and, from it, params.yaml; after that
`make repro` runs it all.
"""

import argparse
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ruamel.yaml import YAML

from rlaifv import ROOT, plan
from rlaifv.params import Params, ParamsError, load_params
from rlaifv.profiles.choose import Representer, is_unedited, write_profile
from rlaifv.records import Instruction, parse_json, read_lines, to_json, write_atomic
from rlaifv.stage import DATA, start_logging
from rlaifv.steps.prepare import inside, parse_instruction
from rlaifv.store import progress
from rlaifv.vlm.images import open_image

PROMPTS = (
    "Describe this picture in detail.",
    "What can be seen here? Go through the whole picture, from what is nearest to the background.",
    "Tell somebody who cannot see this picture everything that it shows.",
    "Which things are in this picture, how many of each, and where are they?",
    "Describe who or what is in this picture, and what is happening.",
    "Write a thorough caption: objects, their colors, and how they are placed to each other.",
    "Look closely and report all details that you are sure of.",
    "Describe the place in this picture and everything that stands, lies or moves in it.",
)
"""What is asked of the pictures where nobody brings questions."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

ENOUGH = 1000
"""Instructions to train on: with fewer pictures than this, each is asked in several wordings."""

SHARES = {"dev": (0.15, 200), "test": (0.25, 500)}
"""Split → its share of the pictures, and how many it has at most."""

FEWEST = 5
"""Pictures without which there is nothing to split."""


@dataclass(frozen=True)
class Pictures:
    """What a folder holds: usable pictures, by path below it, with a digest of what they show; files that are pictures
    and cannot be read, with the reason; and the endings of all other files, counted."""

    digests: Mapping[str, str]
    broken: Mapping[str, str]
    others: Counter


def find_pictures(folder: Path) -> Pictures:
    """Decode every picture below a folder once; hidden files and folders are passed over."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    wanted = [str(name) for name in names if name.suffix.lower() in ENDINGS]
    digests, broken = {}, {}
    with ThreadPoolExecutor() as pool:
        seen = [pool.submit(picture_digest, folder, name) for name in wanted]
        for name, found in zip(wanted, progress(seen, "pictures"), strict=True):
            try:
                digests[name] = found.result()
            except (OSError, ValueError) as error:
                broken[name] = str(error)
    return Pictures(digests, broken, Counter(n.suffix or n.name for n in names if n.suffix.lower() not in ENDINGS))


def picture_digest(folder: Path, name: str) -> str:
    """16 hex digits of a picture's size and pixels; OSError or ValueError say why it cannot be used."""
    image = open_image(inside(folder, name))
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=8).hexdigest()


def split_pictures(digests: Sequence[str], seed: int, sizes: Mapping[str, int]) -> dict[str, str]:
    """Digest → train, dev or test: a fixed order of the seed, of which test and dev take the first `sizes`."""
    order = sorted(set(digests), key=lambda d: hashlib.blake2b(f"{seed}/{d}".encode(), digest_size=8).digest())
    dev = sizes["test"] + sizes["dev"]
    return {d: "test" if k < sizes["test"] else "dev" if k < dev else "train" for k, d in enumerate(order)}


def split_sizes(pictures: int, given: Mapping[str, int | None]) -> dict[str, int]:
    """How many pictures dev and test take; ValueError where nothing is left to train on."""
    sizes = {n: given.get(n) or max(1, min(int(share * pictures), most)) for n, (share, most) in SHARES.items()}
    if pictures < FEWEST or sum(sizes.values()) >= pictures:
        wanted = f"{sizes['dev']} for dev, {sizes['test']} for test and some to train on"
        raise ValueError(f"{pictures} different pictures are too few: there must be {FEWEST}, {wanted}")
    return sizes


def ask_prompts(digests: Mapping[str, str], split_of: Mapping[str, str], prompts: Sequence[str]) -> list[Instruction]:
    """Instructions out of prompts: one for each picture of dev and test, as many of train as make `ENOUGH`; of equal
    pictures the first is asked. Which prompts a picture gets depends on the picture alone."""
    train = sum(split == "train" for split in split_of.values())
    times = min(len(prompts), max(1, round(ENOUGH / max(train, 1))))
    rows, seen = [], set()
    for name, digest in digests.items():
        if digest not in seen:
            seen.add(digest)
            start = int(digest, 16) % len(prompts)
            for k in range(times if split_of[digest] == "train" else 1):
                number = (start + k) % len(prompts)
                rows.append(Instruction(f"{digest}-{number}", name, prompts[number], source="own"))
    return rows


def read_questions(path: Path) -> list[str] | list[Instruction]:
    """A user's questions: from .jsonl an instruction a line, about a picture each; from any other file a prompt a line,
    for all pictures. ValueError names the line that is neither."""
    lines = list(read_lines(path))
    if not lines:
        raise ValueError(f"{path} holds no question")
    if path.suffix.lower() != ".jsonl":
        return list(dict.fromkeys(line.strip() for _, line in lines))
    rows = []
    for number, line in lines:
        try:
            row = parse_instruction(parse_json(line))
            rows.append(replace(row, image_path=str(Path(row.image_path))))  # ./a.jpg is a.jpg
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if len({row.id for row in rows}) < len(rows):
        twice, _ = Counter(row.id for row in rows).most_common(1)[0]
        raise ValueError(f"{path}: the id {twice!r} is there twice")
    return rows


def make_instructions(
    pictures: Pictures, questions: Sequence[str] | Sequence[Instruction], seed: int, sizes: Mapping[str, int | None]
) -> tuple[dict[str, list[Instruction]], list[str]]:
    """Split → its instructions; and the questions' pictures that are not among the usable ones."""
    known, lost = dict(pictures.digests), []
    own = [row for row in questions if isinstance(row, Instruction)]
    if own:
        lost = sorted({row.image_path for row in own} - known.keys())
        known = {row.image_path: known[row.image_path] for row in own if row.image_path in known}
    split_of = split_pictures(list(known.values()), seed, split_sizes(len(set(known.values())), sizes))
    rows = [row for row in own if row.image_path in known] or ask_prompts(known, split_of, questions)
    return {s: [r for r in rows if split_of[known[r.image_path]] == s] for s in ("train", "dev", "test")}, lost


def overlay(base: str, params: Params, images: Path, train: int, second: str | None, root: Path = ROOT) -> str:
    """The text of params/own.yaml: the profile `base` with these pictures, judged by claims; `second` is the path of an
    independent labeler, with @REVISION where it comes from the hub."""
    yaml = YAML()
    yaml.Representer, yaml.width = Representer, 118
    text = (root / "params" / f"{base}.yaml").read_text() if base != "default" else ""
    content = yaml.load(text) or {}
    files = {split: f"data/own/{split}.jsonl" for split in ("train", "dev", "test")}
    unknown = dict.fromkeys(("instances", "captions", "questions"))
    sections: dict[str, dict] = {
        "world": {"train": 1, "dev": 1, "test": 1},  # the embedded one is not used
        "prepare": {
            "image_root": str(images.relative_to(root) if images.is_relative_to(root) else images),
            "instructions": files["train"],
            "per_iteration": min(params.prepare.per_iteration, train // len(params.iterations)),
            "dev": {"instructions": files["dev"], **unknown},
            "test": {"instructions": files["test"], **unknown},
        },
    }
    if base == "default":  # drawings are all that the tiny models know: many of their answers claim nothing
        sections["divide"] = {"max_reject_rate": 0.5}
    if params.train.keep_checkpoints:  # needs annotations
        sections["train"] = {"keep_checkpoints": None, "checkpoints_per_epoch": 1}
    if second:
        path, _, revision = second.partition("@") if "://" not in second else (second, "", "")
        settings = {"processor": {}, "template": {}, "system": None}
        as_first = {key: getattr(params.labeler, key) for key in ("dtype", "device", "engine", "load_in_4bit")}
        as_first |= {"engine": "transformers"} if "://" in path else {}  # what is at an address is served already
        sections["evaluate"] = {"labeler": {"path": path, "revision": revision or None, **as_first, **settings}}
    content.pop("benchmarks", None)
    content["benchmarks"] = {}
    for name, values in sections.items():
        if name in content and name != "prepare":
            content[name].update(values)
        else:
            content.pop(name, None)
            content[name] = values
    stream = io.StringIO()
    yaml.dump(content, stream)
    body = stream.getvalue()
    while body.startswith("#"):  # the base's own first comments
        body = body.partition("\n")[2]
    return f"""\
# One's own pictures, without annotations: the profile {base} with what `make own` found in a folder.
#
#     make repro
#
# Dev and test are judged by claims (docs/own-data.md). `make own` writes this file anew, over edits with FORCE=1.

{body.lstrip()}"""


def write_own(files: Mapping[str, Sequence[Instruction]], profile: str, force: bool, root: Path = ROOT) -> None:
    """Write the instructions, params/own.yaml and params.yaml; ParamsError, before any is written, where one of the
    last two was edited."""
    target, ours = root / "params.yaml", root / "params" / "own.yaml"
    if not force and target.is_file() and not is_unedited(target.read_text(), root / "params"):
        raise ParamsError("params.yaml was edited: keep the edits as a profile of your own, or overwrite with FORCE=1")
    if not force and ours.is_file() and ours.read_text() != profile:
        raise ParamsError("params/own.yaml is of other pictures, or was edited: FORCE=1 overwrites it and params.yaml")
    for split, rows in files.items():
        write_atomic(root / "data" / "own" / f"{split}.jsonl", "".join(to_json(row) + "\n" for row in rows))
    write_atomic(ours, profile)
    write_profile("own", target, force=True)


def describe(pictures: Pictures, files: Mapping[str, Sequence[Instruction]], lost: Sequence[str]) -> str:
    """What became of the folder, in lines that add up."""
    copies = len(pictures.digests) - len(set(pictures.digests.values()))
    lines = [f"{len(pictures.digests)} pictures, {copies} of them copies of another"]
    if pictures.broken:
        name, reason = next(iter(pictures.broken.items()))
        lines.append(f"{len(pictures.broken)} pictures cannot be used; the first, {name}: {reason}")
    if pictures.others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in pictures.others.most_common(5))
        lines.append(f"{pictures.others.total()} other files are no pictures of a known kind ({kinds})")
    if lost:
        lines.append(f"{len(lost)} pictures of the questions are not among them and are left out; the first: {lost[0]}")
    for split, rows in files.items():
        images = len({row.image_path for row in rows})
        lines.append(f"{split}: {len(rows)} instructions about {images} pictures")
    wide = 100 / len({row.image_path for row in files["test"]}) ** 0.5
    if wide > 10:
        lines.append(f"test is small: a share of its answers is known to about ±{wide:.0f} points (400 pictures: ±5)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command; what is wrong with folder, questions or profile ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.profiles.own", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--questions", type=Path, help="text: a prompt a line, for all; .jsonl: an instruction a line")
    parser.add_argument("--base", default="default", help="the profile whose models and settings are used")
    parser.add_argument("--second-labeler", metavar="PATH[@REVISION]", help="who judges dev and test instead")
    parser.add_argument("--dev", type=int, help="pictures of dev (default: 15 %%, 200 at most)")
    parser.add_argument("--test", type=int, help="pictures of test (default: 25 %%, 500 at most)")
    parser.add_argument("--force", action="store_true", help="overwrite params.yaml and params/own.yaml")
    options = parser.parse_args(arguments)
    start_logging()
    try:
        images = options.images.resolve()
        if not images.is_dir():
            raise ValueError(f"no folder {options.images}")
        if options.base == "own":
            raise ParamsError("--base is the profile that own.yaml is made from: default, or another of params/")
        params = load_params(f"params/{options.base}.yaml")
        if params.pairs.source:
            raise ParamsError(f"the profile {options.base} trains on pairs that are there already (pairs.source)")
        questions = read_questions(options.questions) if options.questions else PROMPTS
        pictures = find_pictures(images)
        files, lost = make_instructions(pictures, questions, params.seed, {"dev": options.dev, "test": options.test})
        if len(files["train"]) < len(params.iterations):
            raise ValueError(f"{len(files['train'])} instructions are too few for {len(params.iterations)} iterations")
        profile = overlay(options.base, params, images, len(files["train"]), options.second_labeler)
        write_own(files, profile, options.force)
    except (OSError, ValueError) as error:
        sys.exit(f"own: {error}")
    print(describe(pictures, files, lost))
    if options.base == "default":
        print("the tiny models know drawings only and make nonsense of these: BASE=qwen3vl-4b, or another of params/")
    print(f"written: {(DATA / 'own').relative_to(ROOT)}/*.jsonl, params/own.yaml, params.yaml")
    plan.main([])
    print("next: make repro (`make rehearsal PROFILE=own` tries every stage first)")


if __name__ == "__main__":
    main()
