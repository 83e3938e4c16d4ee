"""Speed of sampling: python speed/generate.py [--size small] [--device cpu] [--json] [--keep]

Draws 10 samples of 100 tokens to prompts with one image (576 tokens) each, in one run: with
`generate(num_return_sequences=10)`, and with one prefill and one shared row of keys (rlaifv/inference/sampling.py).
The samples are compared with those that `generate` gives when it draws from the same uniform numbers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from rlaifv.inference.sampling import Decoding, Generation, sample_plain, sample_shared
from rlaifv.vlm.chat_format import EncodedPrompt
from rlaifv.vlm.loading import VLM
from speed.model import bench_parser, build_model, parse, peak_memory, pixels, prompt_tokens, report, reset_peak, timed


def compare(vlm: VLM, device: str, samples: int, tokens: int, prompts: int, repeats: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for _ in range(prompts):
        ids = prompt_tokens(generator, 20)
        encoded.append(EncodedPrompt(ids, [ids], [len(ids)], pixels(generator)))
    streams = np.random.default_rng(0).random((prompts, samples, tokens))
    vlm.eos_token_ids[:] = [VOCABULARY_END]  # random weights: no sample may stop early, both do the same work

    def ours(decoding: Decoding) -> list[list[Generation]]:
        return sample_shared(vlm, encoded, streams, decoding)

    def theirs(decoding: Decoding) -> list[list[Generation]]:
        return [sample_plain(vlm, e, u, decoding) for e, u in zip(encoded, streams, strict=True)]

    def native(decoding: Decoding) -> None:
        for e in encoded:
            ids = torch.tensor([e.prompt_ids], device=vlm.device)
            vlm.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                num_return_sequences=samples,
                max_new_tokens=decoding.max_new_tokens,
                min_new_tokens=decoding.max_new_tokens,
                pad_token_id=0,
                **{key: value.to(vlm.device, vlm.model.dtype) for key, value in e.inputs.items()},
            )

    decoding, short = Decoding(0.7, 50, 1.0, tokens), Decoding(0.7, 50, 1.0, 2)
    ours(short), native(short)
    peaks, seconds, results = [], [], []
    for sample in (ours, native):
        reset_peak(device)
        before = peak_memory(device)
        first, result = timed(lambda s=sample: s(decoding), device)
        peaks.append(peak_memory(device) - before)
        seconds.append(min([first, *[timed(lambda s=sample: s(decoding), device)[0] for _ in range(repeats - 1)]]))
        results.append(result)
    same = np.mean(
        [a == b for x, y in zip(results[0], theirs(decoding), strict=True) for a, b in zip(x, y, strict=True)]
    )
    drawn = prompts * samples * tokens
    return {
        "prompts": prompts,
        "samples": samples,
        "new_tokens": tokens,
        "seconds_num_return_sequences": seconds[1],
        "seconds_ours": seconds[0],
        "tokens_per_second": drawn / seconds[0],
        "speedup_vs_num_return_sequences": seconds[1] / seconds[0],
        "share_of_equal_samples": float(same),
        "peak_memory_ratio": max(0, peaks[0]) / max(1, peaks[1]),
    }


VOCABULARY_END = 32063


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="the shortest time counts")
    args = parse(parser)
    vlm = build_model(args.size, args.device, args.dtype)
    result = compare(vlm, args.device, args.samples, args.tokens, args.prompts, args.repeats)
    report("generate", args.size, args.device, result, args.json, args.keep)


if __name__ == "__main__":
    main()
