"""Speed of division against an older state: python speed/divide.py OTHER_CHECKOUT [--texts 128] [--repeats 3] [--json]

Reads the candidates that `make repro` left in data/ (or in `--data`) and divides a chunk of the default's answers, in
turn with the code of OTHER_CHECKOUT (`git worktree add OTHER_CHECKOUT COMMIT`) and with this one's, in a process each.
What counts is their CPU time, which a busy machine changes less than the clock; both must give the same claims.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def serve(root: str, data: str, texts: int) -> None:
    """Divide with the code below `root`, once a line that is read: the CPU seconds and a digest of the claims."""
    sys.path.insert(0, root)
    from rlaifv.params import load_params
    from rlaifv.records import Candidate, Instruction, read_records
    from rlaifv.steps.divide import divide_answers
    from rlaifv.vlm.loading import load_vlm

    params = load_params(f"{root}/params.yaml")
    questions = {i.id: i.question for i in read_records(Path(data, "prepared/train.jsonl"), Instruction)}
    candidates = read_records(Path(data, "iterations/1/candidates/candidates.jsonl"), Candidate)
    candidates.sort(key=lambda candidate: candidate.instruction_id)
    asked = list(dict.fromkeys((questions[c.instruction_id], c.answer) for c in candidates))[:texts]
    vlm = load_vlm(f"{root}/{params.divider.path}", dtype=params.divider.dtype)
    for _ in sys.stdin:
        start = time.process_time()
        divisions = divide_answers(vlm, asked, params.divide, params.seed)
        seconds = time.process_time() - start
        print(json.dumps([seconds, hashlib.sha256(repr(divisions).encode()).hexdigest()]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other")
    parser.add_argument("--data", default=str(HERE / "data"))
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.other, args.data, args.texts)
    roots = {"other": str(Path(args.other).resolve()), "ours": str(HERE)}
    command = [sys.executable, __file__, "--serve", "--data", args.data, "--texts", str(args.texts)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {name: subprocess.Popen([*command, root], **pipes) for name, root in roots.items()}
    seconds, digests = {name: [] for name in roots}, set()
    for turn in range(args.repeats + 1):
        for name, process in processes.items():
            print("divide", file=process.stdin, flush=True)
            took, digest = json.loads(process.stdout.readline())
            digests.add(digest)
            if turn:  # the first is for warming up
                seconds[name].append(took)
    for process in processes.values():
        process.stdin.close()
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    ratios = [other / ours for other, ours in zip(seconds["other"], seconds["ours"], strict=True)]
    result = {"texts": args.texts, "cpu_seconds": medians, "speedup": statistics.median(ratios), "speedups": ratios}
    result["same_claims"] = len(digests) == 1
    for key, value in result.items():
        print(f"{key:>14}  {value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
