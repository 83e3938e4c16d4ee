"""The one command: `rlaifv COMMAND --help` says what each does; `python -m rlaifv` is the same.

    rlaifv chat --image photo.jpg --question "What is in the picture?"

A command is a module that `python -m` runs as well, with the same errors and exit codes: 0, 1 for what cannot be done
(one line), 2 for words that are not understood, 130 after Ctrl-C. Nothing is imported before a command is known.
"""

import argparse
import difflib
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import rlaifv

COMMANDS = {  # name → (module, what it does, what to do next)
    "own": ("rlaifv.profiles.own", "a folder of your pictures becomes a run", ""),
    "profile": ("rlaifv.profiles.choose", "write params.yaml from a profile of params/", "rlaifv plan"),
    "plan": ("rlaifv.plan", "tokens, memory, disk and hours of every stage", "make repro"),
    "rehearsal": ("rlaifv.profiles.rehearsal", "every stage of a profile in minutes, with small models", "make repro"),
    "run": ("rlaifv.run", "one stage by hand, as dvc runs it: 40_feedback iteration=1 prev=0", "dvc repro"),
    "experiments": ("rlaifv.profiles.experiments", "a group of experiments, with paired tests", "dvc repro report"),
    "chat": ("rlaifv.chat", "talk to a model about a picture", ""),
    "judge": ("", "split an answer into claims and check each against its picture", ""),
    "score": ("", "a published benchmark of anyone's answers: chair, pope, amber, …", ""),
    "train": ("", "preference training on pairs: a file, a folder, a dataset of the hub", ""),
    "convert": ("rlaifv.convert", "a released checkpoint into an ordinary one, and back", "rlaifv chat --model OUT"),
    "export": ("rlaifv.export", "checkpoint and pairs of an iteration, with cards", ""),
    "fetch": ("rlaifv.benchmarks.fetch", "the benchmarks' files, checked by hash", ""),
}
BENCHMARKS = ("chair", "object_halbench", "amber", "mmhal", "refomb", "pope", "lmms")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        return unknown(name, list(COMMANDS), "command")
    module, _, following = COMMANDS[name]
    if name == "score":
        if not rest or rest[0] in ("-h", "--help"):
            print(f"usage: rlaifv score BENCHMARK --answers FILE …\n\nbenchmarks: {', '.join(BENCHMARKS)}")
            print("`rlaifv score BENCHMARK --help` says what each needs; docs/benchmarks.md what each measures")
            return 0
        benchmark, *rest = rest
        if benchmark not in BENCHMARKS:
            return unknown(benchmark, BENCHMARKS, "benchmark")
        module = f"rlaifv.benchmarks.{benchmark}"
    own: dict[str, Callable[[list[str]], None]] = {"judge": judge, "train": train}
    code = end_of(name, lambda: own[name](rest) if name in own else run_module(module, rest))
    if not code and following and not {"-h", "--help"} & set(rest):
        print(f"next: {following}", file=sys.stderr)
    return code


def overview() -> str:
    """The list of commands that are there, and where to begin."""
    known = {name: said for name, (module, said, _) in COMMANDS.items() if not module or find_spec(module)}
    rows = [f"  {name:12} {said}" for name, said in known.items()]
    return "\n".join(
        [
            "usage: rlaifv COMMAND [ARGUMENTS]     `rlaifv COMMAND --help` says more",
            "",
            *rows,
            "",
            "begin: make repro (the embedded world, minutes), rlaifv own --images DIR (your pictures),",
            "       rlaifv profile NAME (a real model); docs/ and README.md in the repository",
        ]
    )


def unknown(name: str, known: list[str] | tuple[str, ...], what: str) -> int:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"rlaifv: no {what} {name!r}{hint} There are: {', '.join(known)}", file=sys.stderr)
    return 2


def run_module(module: str, arguments: list[str]) -> None:
    """What `python -m MODULE ARGUMENTS` does, in this process."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_of(name: str, work: Callable[[], None]) -> int:
    """The exit code of a command; what it cannot do and did not say itself is one line."""
    try:
        work()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError, ImportError, MemoryError, RuntimeError) as error:
        print(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def judge(arguments: list[str]) -> None:
    """Divide an answer and check its claims."""
    parser = argparse.ArgumentParser(
        prog="rlaifv judge", description="Split an answer into claims and check each against its picture"
    )
    parser.add_argument("--image", required=True, help="an image file")
    parser.add_argument("--answer", required=True, help="what somebody says of it")
    parser.add_argument("--question", default="Describe the image in detail.", help="what was asked")
    parser.add_argument("--labeler", default="models/tiny/labeler", help="a vision-language model that checks")
    parser.add_argument("--divider", default="models/tiny/divider", help="an instruct language model that divides")
    options = parser.parse_args(arguments)

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    claims = rlaifv.divide(options.divider, options.question, options.answer)
    judged = rlaifv.judge(options.labeler, options.image, [question for _, question in claims]) if claims else []
    for (claim, _), (p_yes, p_no) in zip(claims, judged, strict=True):
        print(f"{'accepted' if p_yes > p_no else 'REJECTED'}  P(yes) {p_yes:.3f}  P(no) {p_no:.3f}  {claim}")
    rejected = sum(not p_yes > p_no for p_yes, p_no in judged)
    print(f"{len(claims)} claims, {rejected} rejected: the answer's score is {-rejected}")


def train(arguments: list[str]) -> None:
    """Train on pairs."""
    parser = argparse.ArgumentParser(prog="rlaifv train", description="Preference training (DPO) on pairs")
    parser.add_argument("--pairs", required=True, help="parquet file, folder, or a dataset of the hub (owner/name)")
    parser.add_argument("--model", required=True, help="what is trained: a folder or a hub id")
    parser.add_argument("--out", required=True, type=Path, help="folder of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the section `train` of params.yaml, such as lora_r=64 learning_rate=1.0e-5 epochs=2",
    )
    options = parser.parse_args(arguments)
    if wrong := [pair for pair in options.set if "=" not in pair]:
        parser.error(f"--set {wrong[0]}: expected KEY=VALUE")

    from ruamel.yaml import YAML

    settings = {
        key: YAML(typ="safe", pure=True).load(value) for key, _, value in (p.partition("=") for p in options.set)
    }
    result = rlaifv.train(options.model, options.pairs, options.out, options.seed, **settings)
    print(f"{result.pairs} pairs, {result.steps} steps; {len(result.rejects)} rows left out; log: {result.log}")
    print("\n".join(result.checkpoints))
    print(f"next: rlaifv chat --model {result.checkpoints[-1]} --image FILE", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
