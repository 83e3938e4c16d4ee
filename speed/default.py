"""The embedded default's two slow stages, plain and ours: python speed/default.py [--seeds 5] [--json] [--keep]

Reads what `make repro` left in data/ and does a round's feedback and training again, on the same claims and pairs:
`single` asks every claim alone and `plain` in padded batches, image and all (transformers' own forward, nothing asked
once for several claims); `trl` is `trl.DPOTrainer` as it comes. Compared are the judgements, and what the trained
policies do on dev. Stage times include what a stage does beside (images, self-checks, checkpoints, logs).
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.parquet as pq
import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import DPOTrainer

from rlaifv import ROOT
from rlaifv.evaluation.hallucination import load_split, measure
from rlaifv.inference.yes_no import yes_no_ids
from rlaifv.params import Params, load_params
from rlaifv.records import RATES, Candidate, Claim, Instruction, Judgement, batched, read_records
from rlaifv.stage import PREPARED, Paths, start_logging
from rlaifv.steps.feedback import feedback
from rlaifv.store import Store
from rlaifv.training.job import train
from rlaifv.training.library_quirks import be_quiet
from rlaifv.training.policy import freeze, load_policy
from rlaifv.vlm.chat_format import prompt_text
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, load_vlm
from speed.model import report
from speed.train import for_trl, trl_arguments


@torch.no_grad()
def ask_plainly(vlm: VLM, claims: list[Claim], images: dict[str, str], params: Params, batch: int) -> list[bool]:
    """Whether each claim is accepted: one padded row a claim, each with its own image."""
    ids, root = yes_no_ids(vlm), ROOT / params.prepare.image_root
    accepted = []
    for chunk in batched(claims, batch):
        texts = [prompt_text(vlm, f"{claim.question} {params.feedback.suffix}") for claim in chunk]
        pictures = [open_image(root / images[claim.candidate_id]) for claim in chunk]
        inputs = vlm.processor(
            images=pictures,
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        p = vlm.model(**inputs, logits_to_keep=1).logits[:, -1].double().softmax(-1)
        accepted += (p[:, ids.yes].sum(-1) > p[:, ids.no].sum(-1)).tolist()
    return accepted


def compare_feedback(params: Params, paths: Paths, batch: int, share: float) -> dict:
    """Seconds of the three ways over the first `share` of a round's images, and whether their judgements agree."""
    vlm = load_vlm(params.labeler.path, revision=params.labeler.revision, dtype=params.labeler.dtype)
    image_of = {i.id: i.image_path for i in read_records(PREPARED / "train.jsonl", Instruction)}
    images = {c.id: image_of[c.instruction_id] for c in read_records(paths.candidates, Candidate)}
    claims = read_records(paths.claims, Claim)
    shown = sorted({images[claim.candidate_id] for claim in claims})
    shown = set(shown[: max(1, round(share * len(shown)))])
    claims = [claim for claim in claims if images[claim.candidate_id] in shown]
    ask_plainly(vlm, claims[:batch], images, params, batch)  # warm
    seconds, judged = {}, {}
    for name, rows in (("single", 1), ("plain", batch)):
        start = time.perf_counter()
        judged[name] = ask_plainly(vlm, claims, images, params, rows)
        seconds[name] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "judgements.jsonl"
        root, store = ROOT / params.prepare.image_root, Store("bench", {}, Path(folder))
        start = time.perf_counter()
        counts = feedback(lambda: vlm, claims, images, root, params.feedback, store, out)
        seconds["ours"] = time.perf_counter() - start
        ours = {judgement.claim_id: judgement.accepted for judgement in read_records(out, Judgement)}
    return {
        "claims": len(claims),
        "questions_asked": counts.asked,
        "plain_batch": batch,
        **{f"feedback_seconds_{name}": value for name, value in seconds.items()},
        "feedback_speedup_vs_single": seconds["single"] / seconds["ours"],
        "feedback_speedup_vs_plain": seconds["plain"] / seconds["ours"],
        "judgements_that_differ": sum(
            ours[claim.id] != accepted for claim, accepted in zip(claims, judged["plain"], strict=True)
        ),
    }


def train_trl(policy: str, params: Params, rows: list[dict], folder: Path) -> VLM:
    """The round's training by `trl.DPOTrainer` with the same hyperparameters; it reads its reference every step."""
    vlm, reference = load_policy(policy, params.train), load_policy(policy, params.train)
    freeze(vlm.model, params.train)
    args = trl_arguments(params.train, folder, params.seed)
    # a checkpoint to resume from as often as ours are written
    args.save_strategy, args.save_steps = "steps", 1 / (params.train.epochs * params.train.checkpoints_per_epoch)
    trainer = DPOTrainer(
        model=vlm.model,
        ref_model=reference.model,
        args=args,
        train_dataset=for_trl(rows),
        processing_class=vlm.processor,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    vlm.model.eval()
    return vlm


def compare_training(params: Params, paths: Paths, prev: Paths, seeds: int) -> dict:
    """Seconds of a round's training by TRL and by us, and what the last weights of each do on dev; medians of seconds
    and means of rates over `seeds` seeds."""
    be_quiet()
    dev = load_split("dev", PREPARED, ROOT / params.prepare.image_root)
    rows = pq.read_table(paths.pairs).to_pylist()
    seconds, rates, steps = {"trl": [], "ours": []}, {"trl": [], "ours": []}, 0
    for seed in range(params.seed, params.seed + seeds):
        seeded, trained = dataclasses.replace(params, seed=seed), {}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            start = time.perf_counter()
            trained["trl"] = train_trl(str(prev.policy), seeded, rows, out / "trl")
            seconds["trl"].append(time.perf_counter() - start)
            start = time.perf_counter()
            result = train(str(prev.policy), paths.pairs, params.train, out / "ours", out, seed)
            seconds["ours"].append(time.perf_counter() - start)
            trained["ours"], steps = load_vlm(result.checkpoints[-1], dtype=params.policy.dtype), result.steps
        for name, vlm in trained.items():
            rates[name].append(measure(vlm, dev, params.evaluate, params.feedback.suffix)[0])
    speedups = [trl / ours for trl, ours in zip(seconds["trl"], seconds["ours"], strict=True)]
    return {
        "pairs": len(rows),
        "steps": steps,
        "seeds": seeds,
        **{f"train_seconds_{name}": statistics.median(values) for name, values in seconds.items()},
        "train_speedup_vs_trl": statistics.median(speedups),
        "train_speedup_vs_trl_least": min(speedups),
        **{f"dev_{rate}_{name}": statistics.mean(r[rate] for r in rates[name]) for name in rates for rate in RATES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iteration", default="1")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--batch", type=int, default=32, help="claims in a padded batch of the plain way")
    parser.add_argument("--share", type=float, default=1.0, help="of the round's images, for feedback")
    parser.add_argument("--seeds", type=int, default=1, help="trainings each by TRL and by us")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--keep", action="store_true", help="write speed/results/")
    options = parser.parse_args()
    start_logging()
    params, paths = load_params(options.params), Paths(options.iteration)
    if not paths.pairs.is_file():
        sys.exit(f"{paths.pairs} is absent: run `make repro` first")
    prev = Paths(params.iterations[options.iteration].prev)
    result = compare_feedback(params, paths, options.batch, options.share)
    result |= compare_training(params, paths, prev, options.seeds)
    report("default", "tiny", "cpu", result, options.json, options.keep)


if __name__ == "__main__":
    main()
