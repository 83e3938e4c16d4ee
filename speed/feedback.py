"""Speed of claim feedback: python speed/feedback.py [--size small] [--device cpu] [--json] [--keep]

Asks a LLaVA-shaped random model many questions about one image (576 tokens) three ways, in one run:
one at a time with `generate` as the original does, in padded batches of 8, and after one shared prefix
(rlaifv/inference/logprobs.py).
`--growth` measures how cost grows with questions and images instead.
"""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from rlaifv.inference import plain_rows as rows
from rlaifv.inference.logprobs import next_token_logprobs
from rlaifv.vlm.chat_format import EncodedPrompt
from rlaifv.vlm.loading import VLM
from speed.model import (
    bench_parser,
    build_model,
    forward_flops,
    parse,
    peak_memory,
    pixels,
    prompt_tokens,
    report,
    reset_peak,
    timed,
)

HEAD = 13
"""Text tokens before the image's end that all questions share, as in LLaVA's template."""


def make_questions(count: int, seed: int, shortest: int = 15, longest: int = 31) -> EncodedPrompt:
    """`count` questions of 15 to 31 tokens about one random image."""
    generator = torch.Generator().manual_seed(seed)
    shared = prompt_tokens(generator, HEAD)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    rows = [shared + torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]
    return EncodedPrompt(shared, rows, [len(row) for row in rows], pixels(generator))


def ask(vlm: VLM, encoded: list[EncodedPrompt], batch: int | None) -> torch.Tensor:
    """Log-probs of four ids after every question; `batch` is None (shared prefix) or the rows of a plain forward."""
    if batch is not None:
        rows.ROWS = batch
    return torch.cat(next_token_logprobs(vlm, encoded, [3, 4, 5, 6], shared=batch is None))


def ask_original(vlm: VLM, encoded: EncodedPrompt) -> torch.Tensor:
    """The original's way: `generate` one token for one question after another, and read its scores."""
    rows = []
    for row in encoded.rows:
        ids = torch.tensor([row], device=vlm.device)
        inputs = {key: value.to(vlm.device, vlm.model.dtype) for key, value in encoded.inputs.items()}
        output = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **inputs,
        )
        rows.append(output.logits[0][0].float().log_softmax(-1)[[3, 4, 5, 6]].cpu())
    return torch.stack(rows)


def flops(vlm: VLM, encoded: EncodedPrompt, shared: bool) -> float:
    lengths, head = [len(row) for row in encoded.rows], len(encoded.prompt_ids)
    if not shared:
        return sum(forward_flops(vlm, n, n * (n + 1) // 2, 1, 1) for n in lengths)
    tails = [n - head for n in lengths]
    attended = head * (head + 1) // 2 + sum(t * head + t * (t + 1) // 2 for t in tails)
    return forward_flops(vlm, head + sum(tails), attended, len(tails), 1)


def measure_peak(vlm: VLM, encoded: list[EncodedPrompt], batch: int | None, device: str) -> int:
    gc.collect()
    reset_peak(device)
    before = peak_memory(device)
    ask(vlm, encoded, batch)
    return peak_memory(device) - before


def compare(vlm: VLM, count: int, device: str, repeats: int) -> dict:
    encoded = [make_questions(count, seed=0)]
    warm = [make_questions(2, seed=1)]
    ask(vlm, warm, None), ask(vlm, warm, 8), ask_original(vlm, warm[0])
    peaks = {name: measure_peak(vlm, encoded, batch, device) for name, batch in (("shared", None), ("batched", 8))}
    ours, shared = timed(lambda: ask(vlm, encoded, None), device, repeats + 1)
    batched, in_batches = timed(lambda: ask(vlm, encoded, 8), device, repeats)
    single, plain = timed(lambda: ask_original(vlm, encoded[0]), device)
    ideal = flops(vlm, encoded[0], shared=False) / flops(vlm, encoded[0], shared=True)
    return {
        "questions": count,
        "seconds_single": single,
        "seconds_batched": batched,
        "seconds_ours": ours,
        "claims_per_second": count / ours,
        "speedup_vs_single": single / ours,
        "speedup_vs_batched": batched / ours,
        "ideal_speedup": ideal,
        "share_of_ideal": batched / ours / ideal,
        "max_abs_logprob_diff": float((shared - plain).abs().max()),
        "noise_floor": float((in_batches - plain).abs().max()),  # plain rows against plain rows
        "peak_memory_ratio": peaks["shared"] / max(1, peaks["batched"]),
        "peak_bytes_shared": peaks["shared"],
        "peak_bytes_batched": peaks["batched"],
    }


def growth(vlm: VLM, device: str) -> dict:
    """Seconds for 1 … 320 questions about one image, and for 10 questions about each of 1 … 100 images."""
    result = {}
    ask(vlm, [make_questions(2, seed=1)], None)
    for count in (1, 10, 80, 320):
        encoded = [make_questions(count, seed=0)]
        result[f"seconds_{count}_questions"], _ = timed(lambda e=encoded: ask(vlm, e, None), device, 2)
    for count in (1, 10, 100):
        encoded = [make_questions(10, seed=i) for i in range(count)]
        result[f"seconds_{count}_images"], _ = timed(lambda e=encoded: ask(vlm, e, None), device, 1)
    return result


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=2, help="the shortest time counts")
    parser.add_argument("--growth", action="store_true", help="cost growth instead of the comparison")
    args = parse(parser)
    vlm = build_model(args.size, args.device, args.dtype)
    if args.growth:
        report("feedback-growth", args.size, args.device, growth(vlm, args.device), args.json, args.keep)
    else:
        result = compare(vlm, args.questions, args.device, args.repeats)
        report("feedback", args.size, args.device, result, args.json, args.keep)


if __name__ == "__main__":
    main()
