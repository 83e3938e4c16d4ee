"""The engines of `params.yaml`'s models beside one another: python speed/engines.py [--engines transformers,vllm,ray:2]

Reads what `make repro` left in data/ and does the first instructions' sampling, division and feedback again with each
engine: `transformers` in this process, `vllm` behind a server that is started with `server.command` (or
`--command`), `ray:N` with N workers. All of them divide the same candidates and judge the same claims. A server's start
is a column of its own; Ray's is part of its times, for it starts workers in every stage. Judgements are compared with
those of `transformers`: flips, and the largest difference of P(yes); with Ray, the bytes.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlaifv import ROOT
from rlaifv.inference import roles
from rlaifv.inference.roles import Model, load_role
from rlaifv.params import ClusterParams, Params, load_params
from rlaifv.records import Candidate, Claim, Instruction, Judgement, read_records
from rlaifv.stage import PREPARED, Paths, start_logging
from rlaifv.steps.divide import divide
from rlaifv.steps.feedback import feedback
from rlaifv.steps.generate import generate
from rlaifv.steps.models import describe
from rlaifv.store import Store
from speed.model import bench_parser, parse, report

STAGES = {"generate": "policy", "divide": "divider", "feedback": "labeler"}


class Round:
    """The first instructions of iteration 1 with what a run has made of them."""

    def __init__(self, params: Params, instructions: int) -> None:
        paths = Paths("1")
        self.params, self.root = params, ROOT / params.prepare.image_root
        known = {i.id: i for i in read_records(PREPARED / "train.jsonl", Instruction)}
        candidates = read_records(paths.candidates, Candidate)
        chosen = list(dict.fromkeys(c.instruction_id for c in candidates))[:instructions]
        self.instructions = [known[name] for name in chosen]
        self.candidates = [c for c in candidates if c.instruction_id in set(chosen)]
        ids = {c.id for c in self.candidates}
        self.claims = [claim for claim in read_records(paths.claims, Claim) if claim.candidate_id in ids]
        self.questions = {i.id: i.question for i in self.instructions}
        self.images = {c.id: known[c.instruction_id].image_path for c in self.candidates}

    def do(self, stage: str, load: Callable[[], Model], store: Store, out: Path) -> None:
        params = self.params
        if stage == "generate":
            generate(load, self.instructions, self.root, params.generate, params.seed, store, out)
        elif stage == "divide":
            divide(load, self.candidates, self.questions, params.divide, params.seed, store, out)
        else:
            feedback(load, self.claims, self.images, self.root, params.feedback, store, out)


def measure(work: Round, engine: str, stage: str, folder: Path) -> dict[str, float]:
    """Seconds to start the model and to do a stage; what it wrote lies in `folder`/STAGE.jsonl."""
    params, (kind, _, workers) = work.params, engine.partition(":")
    record = describe(getattr(params, STAGES[stage]), params.server)
    record = dataclasses.replace(record, engine="vllm" if kind == "vllm" else "transformers")
    load = partial(load_role, record, params.server)
    cluster = ClusterParams(engine="ray", workers=int(workers)) if kind == "ray" else ClusterParams()
    began = time.perf_counter()
    model = None if kind == "ray" else load()
    started = time.perf_counter()
    # a stage ends a server that it was given: its end is no part of the time
    kept = dataclasses.replace(model, close=lambda: None) if kind == "vllm" else model
    work.do(
        stage,
        load if model is None else lambda: kept,
        Store(stage, {}, folder / "scratch", cluster),
        folder / f"{stage}.jsonl",
    )
    done = time.perf_counter()
    if kind == "vllm":
        model.close()
    return {"start": started - began, "seconds": done - started}


def compare(folder: Path, exact: Path) -> dict[str, object]:
    """How an engine's files differ from those of `transformers`."""
    ours, theirs = (
        {j.claim_id: j for j in read_records(place / "feedback.jsonl", Judgement)} for place in (folder, exact)
    )
    same = {
        stage: (folder / f"{stage}.jsonl").read_bytes() == (exact / f"{stage}.jsonl").read_bytes() for stage in STAGES
    }
    return {
        "same_bytes": ", ".join(stage for stage, equal in same.items() if equal) or "none",
        "flips": sum(ours[name].accepted != theirs[name].accepted for name in ours.keys() & theirs.keys()),
        "not_in_both": len(ours.keys() ^ theirs.keys()),
        "largest_p_difference": max(abs(ours[name].p_yes - theirs[name].p_yes) for name in ours.keys() & theirs.keys()),
    }


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--engines", default="transformers,vllm,ray:1,ray:2")
    parser.add_argument("--instructions", type=int, default=40)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--command", help="in place of server.command")
    args = parse(parser)
    start_logging()
    params = load_params(args.params)
    if args.command:
        params = dataclasses.replace(params, server=dataclasses.replace(params.server, command=args.command))
    work, result = Round(params, args.instructions), {}
    result |= {"instructions": len(work.instructions), "candidates": len(work.candidates), "claims": len(work.claims)}
    with tempfile.TemporaryDirectory() as temporary:
        roles.SCRATCH = Path(temporary)  # where a server's answers are kept: those of an earlier run would be no work
        engines = ["transformers", *(e for e in args.engines.split(",") if e != "transformers")]
        for engine in engines:
            name, folder = engine.replace(":", "_"), Path(temporary) / engine.replace(":", "_")
            for stage in STAGES:
                taken = measure(work, engine, stage, folder)
                result |= {f"{name}_{stage}_{key}": value for key, value in taken.items()}
            if engine != "transformers":
                differences = compare(folder, Path(temporary) / engines[0])
                result |= {f"{name}_{key}": value for key, value in differences.items()}
                for stage in STAGES:
                    ratio = result[f"transformers_{stage}_seconds"] / result[f"{name}_{stage}_seconds"]
                    result[f"{name}_{stage}_speedup"] = ratio
    report("engines", Path(params.policy.path).name, args.device, result, args.json, args.keep)


if __name__ == "__main__":
    main()
