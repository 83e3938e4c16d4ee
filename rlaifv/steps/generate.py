"""Generate: sample n answers per instruction from the current policy (RLAIF-V, section 2.1, "deconfounded").

All answers of an instruction are drawn with identical decoding settings; only the random numbers differ, so that the
preference pairs made of them differ in trustworthiness and not in style. A sample's random numbers come from
(seed, instruction id, sample number) alone: results depend neither on batch size nor on order nor on a resume.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rlaifv.inference.roles import Model, OpenQuestion, draw_answers
from rlaifv.inference.sampling import Decoding
from rlaifv.inference.served import Sampled, Served
from rlaifv.params import GenerateParams
from rlaifv.records import Candidate, Instruction, Reject, batched
from rlaifv.store import Store
from rlaifv.vlm.chat_format import UnfitText, check_text
from rlaifv.vlm.loading import loaded


def generate(
    load: Callable[[], Model],
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
        asked = [OpenQuestion(i.id, i.question, image_root / i.image_path) for i in chunk]
        answers: list[list[Sampled] | OSError | ValueError] = [[] for _ in chunk]
        temperatures = [temperature_of(params, s, temperature_spread) for s in range(params.samples)]
        for temperature, samples in itertools.groupby(range(params.samples), temperatures.__getitem__):
            decoding = Decoding(
                temperature, params.top_k, params.top_p, params.max_new_tokens, params.repetition_penalty
            )
            drawn = draw_answers(policy(), asked, list(samples), seed, decoding)
            answers = [
                more if isinstance(more, Exception) else [*kept, *more]
                for kept, more in zip(answers, drawn, strict=True)
            ]
        reader = policy().reader if isinstance(policy(), Served) else policy()
        for instruction, samples in zip(chunk, answers, strict=True):
            if isinstance(samples, Exception):
                rejects += [Reject(f"{instruction.id}#{s}", "generate", str(samples)) for s in range(params.samples)]
                continue
            for s, sampled in enumerate(samples):
                name, answer = f"{instruction.id}#{s}", sampled.text.strip()
                try:
                    if not answer:
                        raise UnfitText("the answer is empty")
                    check_text(reader, answer)
                except UnfitText as error:
                    rejects.append(Reject(name, "generate", str(error)))
                    continue
                end, model = sampled.finish_reason, policy().fingerprint
                candidates.append(Candidate(name, instruction.id, s, answer, sampled.tokens, end, seed, model))
        return candidates, rejects

    with loaded(load) as policy:
        store.run(batched(instructions, params.batch_size), sample_chunk)
    return store.publish(out, len(instructions) * params.samples, params.max_reject_rate)


def temperature_of(params: GenerateParams, sample: int, spread: float) -> float:
    """The same for every sample, unless the ablation `spread` confounds truth with style."""
    return params.temperature * (1 + spread * (2 * sample / max(params.samples - 1, 1) - 1))
