"""Make the three embedded checkpoints from nothing: python -m rlaifv.tinyworld.make_checkpoints [--folder models/tiny]

The vision tower is aligned with the words; the labeler is taught to answer about clean scenes; the policy goes on from
the labeler with descriptions in which co-occurring objects are imagined; the divider learns its two prompts. All three
are saved as ordinary Hugging Face checkpoints (float16) and measured as saved, on scenes that they have not seen.

This takes about 65 minutes on one core of an x86 machine (OMP_NUM_THREADS=1): labeler 17, policy 13, divider 35. More
threads, or another processor, sum in another order and give other bytes of the same quality. The shipped files were
made with the defaults below, each by a run of its part alone; the labeler's and the divider's first lessons used an
earlier wording of the descriptions.
"""

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from rlaifv import ROOT
from rlaifv.tinyworld.backbone import align, build_vlm, cached_features, patch_labels, patch_scores, pixel_values
from rlaifv.tinyworld.divider import build_divider, train_divider
from rlaifv.tinyworld.exams import answer_accuracy, describe, division_accuracy, hallucination
from rlaifv.tinyworld.language import INSTRUCTIONS
from rlaifv.tinyworld.lessons import labeler_row, policy_row, teach
from rlaifv.tinyworld.scenes import Scene, make_scene
from rlaifv.tinyworld.tokenizer import build_processor, build_tokenizer
from rlaifv.vlm.loading import load_weights


@dataclasses.dataclass(frozen=True)
class CheckpointParams:
    """How the checkpoints are trained. Steps and learning rates are per phase."""

    seed: int = 0
    """Weights, order of the lessons, and the scenes: training scenes never come from the world's own seeds."""
    align_scenes: int = 6000
    """Scenes with up to six objects on which the vision tower is aligned."""
    align_steps: int = 900
    align_lr: float = 2e-3
    scenes: int = 12000
    """Scenes of the lessons. Half of them show two colors at most, so that colors alone do not tell things apart."""
    rows: int = 6
    """Scenes a step: small steps learn faster than large ones here."""
    labeler_steps: int = 18000
    labeler_lr: float = 1.2e-3
    policy_steps: int = 12000
    policy_lr: float = 1.4e-3
    phantom: float = 0.65
    """How often the policy's teacher imagines the partner of a present object: more likely than not, so that greedy
    decoding repeats it, and not always, so that sampling sometimes leaves it out."""
    divider_steps: int = 4500
    divider_lr: float = 1.5e-3
    divider_again_steps: int = 3200
    divider_again_lr: float = 1e-3
    """A second, shorter cycle on answers of full length: positions and colors come right last."""
    divider_layers: int = 4
    exam_scenes: int = 300
    """Unseen scenes on which the saved checkpoints are measured."""


def make_checkpoints(folder: Path, params: CheckpointParams = CheckpointParams()) -> dict:
    """Train and save policy, labeler and divider into `folder`.

    Returns {"curves": learning curves as rows, "scores": what the saved checkpoints reach, "minutes", "megabytes"}.
    """
    folder, started = Path(folder), time.time()
    curves = make_divider(folder, params) + make_labeler_and_policy(folder, params)
    return {
        "curves": curves,
        "scores": examine(folder, exam_scenes(params)),
        "minutes": (time.time() - started) / 60,
        "megabytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6,
    }


def make_labeler_and_policy(folder: Path, params: CheckpointParams) -> list[dict]:
    """Align, teach and save the labeler, then the policy that goes on from it. Returns the learning curves."""
    torch.manual_seed(params.seed)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    vlm = build_vlm(tokenizer)

    seeds = {name: 1_000_000 + 10 * params.seed + number for number, name in enumerate(("align", "lessons"))}
    shown = [make_scene(seeds["align"], number, (2, 6)) for number in range(params.align_scenes)]
    pixels = pixel_values(shown, seeds["align"], processor)
    curves = align(vlm, pixels, shown, params.align_steps, params.align_lr)

    scenes = [make_scene(seeds["lessons"], number, n_colors=2 * (number % 2)) for number in range(params.scenes)]
    features = cached_features(vlm, pixel_values(scenes, seeds["lessons"], processor))

    def lesson(name: str, row, steps: int, lr: float) -> list[dict]:
        return teach(name, vlm, tokenizer, scenes, features, row, steps, lr, params.seed, params.rows)

    curves += lesson("labeler", labeler_row, params.labeler_steps, params.labeler_lr)
    save(copy.deepcopy(vlm), processor, folder / "labeler")
    curves += lesson(
        "policy",
        lambda scene, rng: policy_row(scene, rng, params.phantom),
        params.policy_steps,
        params.policy_lr,
    )
    save(vlm, processor, folder / "policy")
    return curves


def make_divider(folder: Path, params: CheckpointParams) -> list[dict]:
    """Train and save the divider. Returns its learning curve."""
    tokenizer = build_tokenizer()
    divider = build_divider(tokenizer, params.divider_layers, params.seed)
    curve = train_divider(
        divider, tokenizer, "divider", params.divider_steps, params.divider_lr, params.seed, growing=0.4
    )
    save(divider, tokenizer, folder / "divider")  # the shipped one went on from float16's rounding: so does this
    curve += train_divider(
        divider, tokenizer, "divider again", params.divider_again_steps, params.divider_again_lr, params.seed, growing=0
    )
    save(divider, tokenizer, folder / "divider")
    return curve


def save(model, processor, folder: Path) -> None:
    """Save a model in float16 with its processor or tokenizer, as `from_pretrained` reads it, under the hub's names.

    The model itself is left in float32 with float16's rounding, so that what is trained on is what was saved.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=256
    )
    model.half().save_pretrained(folder, state_dict={hub_name(name): w for name, w in model.state_dict().items()})
    processor.save_pretrained(folder)
    model.float()


def hub_name(weight: str) -> str:
    """What checkpoints on the hub call a weight: vLLM knows LLaVA's image encoder by no other name. What is loaded
    from such a checkpoint is saved under these names again."""
    return weight.replace("vision_tower.", "vision_tower.vision_model.", 1)


def exam_scenes(params: CheckpointParams) -> list[Scene]:
    """Scenes that no phase trains on."""
    return [make_scene(2_000_000 + params.seed, number) for number in range(params.exam_scenes)]


def examine(folder: Path, scenes: list[Scene], samples: int = 200) -> dict:
    """What the checkpoints in `folder`, loaded as a user loads them, reach on unseen scenes.

    policy: hallucination rates and recall, greedy and sampled, and yes/no accuracy; labeler: accuracy per claim type;
    divider: exactly divided shares of `samples` of the policy's own answers at temperature 0.7; patches: right share.
    """
    folder = Path(folder)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    pixels = pixel_values(scenes, 2_000_000, processor)
    questions = [INSTRUCTIONS[number % len(INSTRUCTIONS)] for number in range(len(scenes))]

    def load(name: str) -> torch.nn.Module:
        kind = AutoModelForCausalLM if name == "divider" else AutoModelForImageTextToText
        return load_weights(kind, folder / name, name, dtype=torch.float32).eval()

    labeler, policy, divider = load("labeler"), load("policy"), load("divider")
    features = cached_features(labeler, pixels)
    labels, found = patch_labels(scenes), patch_scores(features)
    right = torch.stack([found[kind].argmax(-1) == labels[kind] for kind in found])
    torch.manual_seed(0)
    greedy = describe(policy, processor, pixels, questions)
    sampled = describe(policy, processor, pixels, questions, temperature=0.7)
    return {
        "patches": right.float().mean().item(),
        "labeler": answer_accuracy(labeler, tokenizer, scenes, features),
        "policy": {
            "greedy": hallucination(greedy, scenes),
            "sampled": hallucination(sampled, scenes),
            "answers": answer_accuracy(policy, tokenizer, scenes, cached_features(policy, pixels)),
        },
        "divider": division_accuracy(divider, tokenizer, sampled[:samples]),
        "example": greedy[0],
    }


def main() -> None:
    """Command line: every field of CheckpointParams is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "models" / "tiny")
    for field in dataclasses.fields(CheckpointParams):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, dest=field.name, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    result = make_checkpoints(options.pop("folder"), CheckpointParams(**options))
    print(json.dumps({key: result[key] for key in ("scores", "minutes", "megabytes")}, indent=2))


if __name__ == "__main__":
    main()
