"""Generate: sample n answers per instruction from the current policy (RLAIF-V, section 2.1, "deconfounded").

All answers of an instruction are drawn with identical decoding settings; only the random numbers differ, so that the
preference pairs made of them differ in trustworthiness and not in style. A sample's random numbers come from
(seed, instruction id, sample number) alone: results depend neither on batch size nor on order nor on a resume.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rlaifv.inference.sampling import Decoding, Generation, sample_encoded, uniforms
from rlaifv.params import GenerateParams
from rlaifv.records import Candidate, Instruction, Reject, batched
from rlaifv.store import Store
from rlaifv.vlm.chat_format import EncodedPrompt, UnfitText, check_text, encode_questions
from rlaifv.vlm.images import open_image
from rlaifv.vlm.loading import VLM, loaded


def generate(
    load: Callable[[], VLM],
    instructions: Sequence[Instruction],
    image_root: Path,
    params: GenerateParams,
    seed: int,
    store: Store,
    out: Path,
    temperature_spread: float = 0.0,
) -> tuple[int, int]:
    """Write `params.samples` candidates per instruction to `out`; return the counts of candidates and rejects.

    `load` gives the policy; it is called when something is left to do.
    Rejected are an image that cannot be read, a question that the policy cannot be asked (one of its special tokens is
    in it, or the context has no room for `max_new_tokens` after it), an empty answer, and one that spells a special
    token. An answer cut at `max_new_tokens` is kept and marked (`finish_reason` "length"). `temperature_spread` is an
    ablation, see `temperature_of`.
    """

    def sample_chunk(chunk: Sequence[Instruction]) -> tuple[list[Candidate], list[Reject]]:
        candidates: list[Candidate] = []
        rejects: list[Reject] = []
        readable: list[Instruction] = []
        prompts: list[EncodedPrompt] = []
        for instruction in chunk:
            try:
                image = open_image(image_root / instruction.image_path)
                prompts.append(encode_questions(policy(), image, [instruction.question], room=params.max_new_tokens))
                readable.append(instruction)
            except (OSError, ValueError) as error:
                rejects += [Reject(f"{instruction.id}#{s}", "generate", str(error)) for s in range(params.samples)]
        streams = [
            np.stack([uniforms(seed, i.id, s, params.max_new_tokens) for s in range(params.samples)]) for i in readable
        ]
        generations: list[list[Generation]] = [[] for _ in readable]
        temperatures = [temperature_of(params, s, temperature_spread) for s in range(params.samples)]
        for temperature, samples in itertools.groupby(range(params.samples), temperatures.__getitem__):
            numbers = list(samples)
            decoding = Decoding(
                temperature, params.top_k, params.top_p, params.max_new_tokens, params.repetition_penalty
            )
            drawn = sample_encoded(policy(), prompts, [stream[numbers] for stream in streams], decoding)
            for kept, more in zip(generations, drawn, strict=True):
                kept += more
        for instruction, samples in zip(readable, generations, strict=True):
            for s, generation in enumerate(samples):
                name, answer = f"{instruction.id}#{s}", generation.text.strip()
                try:
                    if not answer:
                        raise UnfitText("the answer is empty")
                    check_text(policy(), answer)
                except UnfitText as error:
                    rejects.append(Reject(name, "generate", str(error)))
                    continue
                tokens, end = len(generation.token_ids), generation.finish_reason
                candidates.append(Candidate(name, instruction.id, s, answer, tokens, end, seed, policy().fingerprint))
        return candidates, rejects

    with loaded(load) as policy:
        store.run(batched(instructions, params.batch_size), sample_chunk)
    return store.publish(out, len(instructions) * params.samples, params.max_reject_rate)


def temperature_of(params: GenerateParams, sample: int, spread: float) -> float:
    """The same for every sample, unless the ablation `spread` confounds truth with style."""
    return params.temperature * (1 + spread * (2 * sample / max(params.samples - 1, 1) - 1))
