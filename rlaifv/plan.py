"""What a run of a parameter file will take, before it starts: tokens, memory, disk and hours of every stage.

    python -m rlaifv.plan [--params FILE] [--gpu H100 --gpus 8] [--disk GB] [--sft] [--reward-model] [--rloo] [--check]

Everything is computed from the parameters and the models' configurations; of a hub model only its config.json is
fetched. What cannot fit is exit code 1 with the key to change. Where stages have run, the measured minutes stand
beside the estimate, and the rest is scaled by what they say (the median ratio).
"""

import argparse
import math
import shutil
import statistics
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from rlaifv import ROOT
from rlaifv.inference.server import is_served
from rlaifv.params import (
    ModelParams,
    Params,
    ParamsError,
    RewardWeights,
    SplitParams,
    TrainParams,
    as_train_params,
    load_params,
    read_yaml,
)
from rlaifv.results import read_timings
from rlaifv.stage import RUNS, Paths
from rlaifv.vlm.checkpoint import resolve_checkpoint

GB = 1e9

# ---- what is assumed: shares seen on the embedded world and in published runs, in one place

ANSWER = 0.3
"""Mean length of an answer, as a share of `max_new_tokens`."""

LONGEST = 0.7
"""Length of the longest answer of a batch, which all others wait for, likewise."""

CLAIMS = 9
"""Claims of an answer; each is asked in `QUESTION` tokens after what it shares with the others about its image."""

QUESTION = 23

DISTINCT = 0.5
"""Share of an image's questions that no other answer to it has asked already: each is asked once."""

FOUR_BIT = 0.5 + 4 / 64
"""Bytes of a parameter in 4 bits: nf4 with a float32 scale for every 64. Embeddings and output layer stay whole."""

PUBLIC_PAIRS = 83_000
"""Of the public dataset, where its files are not there yet."""

DIVIDED = 1.4
"""Tokens of a list of claims, or of questions, for one token of the answer."""

PROMPT = 40
"""Text tokens of a prompt beside its image."""

CONVERSATION = 150
"""Text tokens of a conversation to fine-tune on (LLaVA-Instruct 300, a yes/no question 20), and of the longest:"""

LONG_CONVERSATION = 1000

JUDGED = 250
"""Text tokens that ask a reward model for a score, with facts in them."""

PEOPLES_PAIRS = 9_400
"""Preferences in LLaVA-Human-Preference-10K."""

PHOTO = (640, 480)
"""Pixels of an image where the model's own size does not say how many tokens it takes."""

INSTRUCTIONS = 300
"""Of an evaluation split whose file is not there yet."""

UTILIZATION = 0.4
"""Share of the peak that large matrix products reach."""

LAUNCH = 0.8e-3
"""Seconds for one layer of one forward pass that is bound by Python and kernel launches."""

WRITE = 0.15 * GB
"""Bytes a second of checkpoints and resumable states, on a shared file system."""

START = 10
"""Seconds of a stage before it works: kernel, imports; its weights are read at `READ`."""

READ = 1.0 * GB

RUNTIME = 2.0 * GB
"""CUDA's context, cuBLAS's workspace and what the allocator cannot give back."""

PROCESS = 0.5 * GB
"""Main memory of a process that has imported PyTorch and transformers."""

BESIDE = {
    "sft": "fine-tuning (`make sft`)",
    "reward_model": "one reward model (`make fact-rlhf`)",
    "rloo": "one run of `make rloo`",
}
"""What a plan can have in it beside the pipeline: sections of the parameters → what they are."""

CLOSE = 0.92
"""From this share of the memory on, it is close."""


@dataclass(frozen=True)
class Machine:
    """GPUs of one node: memory in bytes, dense bfloat16 operations and bytes of memory a second, of each."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    gpus: int = 1
    launch: float = LAUNCH


MACHINES = {
    "H200": Machine("H200", 141 * GB, 989e12, 4.8e12),
    "H100": Machine("H100", 80 * GB, 989e12, 3.35e12),
    "A100": Machine("A100", 80 * GB, 312e12, 2.0e12),
    "A100-40": Machine("A100-40", 40 * GB, 312e12, 1.55e12),
    "L40S": Machine("L40S", 48 * GB, 362e12, 0.86e12),
    "RTX4090": Machine("RTX4090", 24 * GB, 165e12, 1.0e12),
    "RTX3090": Machine("RTX3090", 24 * GB, 71e12, 0.94e12),
    "CPU": Machine("CPU", float("inf"), 60e9, 10e9, launch=1.5e-3),
}


@dataclass(frozen=True)
class Model:
    """What counts of a checkpoint: parameters in all, of the vision tower, and those that one text token meets; layers;
    bytes of keys and values a token; tokens of an image, and of the largest that may come; operations that see one, for
    the tower of some is larger than what reads its tokens; width of the tower's features; vocabulary; bytes of a
    parameter in its files, and of the whole model when it is loaded."""

    path: str
    parameters: int
    vision: int
    active: int
    layers: int
    hidden: int
    cache: int
    image: int
    largest: int
    seeing: float
    feature: int
    vocabulary: int
    width: int
    bytes: float

    @property
    def stored(self) -> float:
        """Bytes that are read from disk."""
        return self.parameters * self.width


def measure(model: ModelParams) -> Model:
    """Build the model without memory (torch's meta device) and count; of a hub model its configuration is fetched.

    Raises FileNotFoundError in one line where that cannot be had.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from rlaifv.vlm.loading import read_config

    folder = resolve_checkpoint(model.path, model.revision, files=["config.json"])
    config = read_config(folder, model.path)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with torch.device("meta"):
        built = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)
    text = config.get_text_config()
    decoder = dict.fromkeys(built.get_decoder().parameters())
    vision = sum(p.numel() for name, p in built.named_parameters() if p not in decoder and "lm_head" not in name)
    experts = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name)
    used = getattr(text, "num_experts_per_tok", 0) or 0
    of = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    total = sum(p.numel() for p in built.parameters())
    embedding = built.get_input_embeddings().weight
    head = built.get_output_embeddings().weight
    table = 0 if head is embedding else embedding.numel()
    idle = vision + table + int(experts * (1 - used / of))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = getattr(torch, model.dtype).itemsize
    whole = table + head.numel()  # what 4 bits leave as it is
    image, largest = image_tokens(config, model.processor) if sees else (0, 0)
    return Model(
        path=model.path,
        parameters=total,
        vision=vision,
        active=total - idle,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        cache=2 * text.num_hidden_layers * heads * size * width,
        image=image,
        largest=largest,
        seeing=2 * vision * patches(config, image) if sees else 0,
        feature=config.vision_config.hidden_size if sees else 0,
        vocabulary=text.vocab_size,
        width=width,
        bytes=FOUR_BIT * (total - whole) + width * whole if model.load_in_4bit else width * total,
    )


def image_tokens(config, processor: Mapping) -> tuple[int, int]:
    """Tokens of one image, and of the largest that may come: what the configuration says. Where the image's own size
    decides, those of a photo of `PHOTO` pixels, and of as many pixels as the setting `processor` lets in."""
    vision = config.vision_config
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    if getattr(vision, "spatial_merge_size", None):
        side = patch * vision.spatial_merge_size
        photo = (PHOTO[0] // side) * (PHOTO[1] // side)
        pixels = processor.get("max_pixels") or processor.get("size", {}).get("longest_edge")
        most = pixels // side**2 if pixels else photo
        return min(photo, most), most
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    tokens = (size // patch) ** 2
    if getattr(config, "image_grid_pinpoints", None):
        tokens *= 5  # the whole picture and four tiles
    else:
        tokens = getattr(config, "mm_tokens_per_image", None) or getattr(config, "image_seq_length", None) or tokens
    return tokens, tokens


def patches(config, image: int) -> int:
    """Patches that the tower makes of an image of so many tokens."""
    vision = config.vision_config
    if getattr(vision, "spatial_merge_size", None):
        return image * vision.spatial_merge_size**2
    size, patch = (v if isinstance(v, int) else v[0] for v in (vision.image_size, vision.patch_size))
    return (size // patch) ** 2 * (5 if getattr(config, "image_grid_pinpoints", None) else 1)


@dataclass(frozen=True)
class Need:
    """What one stage takes. `gpu` and `host` are bytes at once (of each GPU; of the machine), `disk` bytes that stay,
    `fixes` what to change where it does not fit, by what is short."""

    stage: str
    tokens: float = 0
    flops: float = 0
    seconds: float = 0
    gpu: float = 0
    host: float = 0
    disk: float = 0
    fixes: Mapping[str, str] = field(default_factory=dict)


def forward(model: Model, machine: Machine, tokens: float, passes: float, kept: float = 0) -> float:
    """Seconds of `passes` forward passes over `tokens` tokens in all, each with `kept` tokens' keys and values in the
    cache: computing and reading, or launching where that takes longer."""
    computing = 2 * model.active * tokens / (machine.flops * UTILIZATION)
    reading = passes * (model.bytes + kept * model.cache) / machine.bandwidth
    return max(computing + reading, passes * model.layers * machine.launch)


def sight(model: Model, machine: Machine, images: float) -> float:
    """Seconds in which the tower sees images."""
    return images * model.seeing / (machine.flops * UTILIZATION)


def start(model: Model, times: int = 1) -> float:
    return START + times * model.stored / READ


def asked(model: Model, machine: Machine, images: float, rows: int, batch: int, new: int) -> tuple[float, float]:
    """Tokens and seconds of `rows` answers to each of `images` prompts, `batch` of these at a time; `new` tokens at
    most."""
    before, drawn = images * (PROMPT + model.image), images * rows * ANSWER * new
    batches, steps = -(-images // batch), LONGEST * new
    kept = batch * (PROMPT + model.image + rows * steps / 2)
    seconds = sight(model, machine, images) + forward(model, machine, before, batches)
    seconds += forward(model, machine, batches * batch * rows * steps, batches * steps, kept)
    return before + drawn, seconds


def cached(model: Model, rows: float, tokens: float) -> float:
    """Bytes of a loaded model with keys and values of `rows` rows of `tokens` tokens."""
    return model.bytes + rows * tokens * model.cache + RUNTIME


def stages(params: Params, models: Mapping[str, Model | None], machine: Machine) -> Iterator[Need]:
    """What every stage of one iteration takes, in the pipeline's order; None is a served model, which takes nothing."""
    policy, labeler, divider = (models[role] for role in ("policy", "labeler", "divider"))

    def need(
        name: str, model: Model, tokens: float, seconds: float, memory: float, way: str, images: float = 0
    ) -> Need:
        if model.bytes + RUNTIME > machine.memory:  # too large for one card: spread over all
            memory /= machine.gpus
        fixes = {"gpu": way, "host": way}
        flops = 2 * model.active * tokens + images * model.seeing
        return Need(name, tokens, flops, seconds, memory, PROCESS + model.stored, fixes=fixes)

    def smaller(role: str, model: Model) -> str:
        four = "" if model.bytes < model.stored else f"{role}.load_in_4bit: true, or "
        return f"{four}{role}, for a smaller one or a served one"

    if not params.pairs.source:
        tokens, seconds, memory = generating(params, policy, machine)
        images, way = params.prepare.per_iteration, "generate.batch_size, or policy, for a smaller one"
        yield need("generate", policy, tokens, seconds, memory, way, images)
        texts = images * params.generate.samples
        if divider:
            tokens, seconds, memory = dividing(params, divider, machine, texts)
            way = f"divide.batch_size, or {smaller('divider', divider)}"
            yield need("divide", divider, tokens, seconds, memory, way)
        if labeler:
            tokens, seconds, memory = judging(params, labeler, machine, texts)
            way = f"feedback.batch_size, or {smaller('labeler', labeler)}"
            yield need("feedback", labeler, tokens, seconds, memory, way, images)

    yield training(params, policy, machine)

    by_claims = params.prepare.dev.instances is None
    judge = "evaluate.labeler" if params.evaluate.labeler else "labeler"
    judges = [("divider", divider, dividing), (judge, models.get(judge), judging)]

    def measuring(name: str, split: SplitParams, scenes: int, times: int, shown: int) -> Need:
        """`times` models answer a split; the answers, or without `by_claims` `shown` of them, are judged by claims."""
        answers, way = times * rows_of(split.instructions, scenes), "evaluate.batch_size, or policy, for a smaller one"
        tokens, seconds, memory = answering(params, policy, machine, split, scenes)
        largest, seconds = policy, start(policy, times) + times * seconds
        texts = answers if by_claims else shown
        for role, model, work in judges if texts else ():
            if model:
                _, took, needed = work(params, model, machine, texts, times if by_claims else None)
                seconds += took - START
                if needed > memory:
                    largest, memory, way = model, needed, smaller(role, model)
        return need(name, largest, times * tokens, seconds, memory, way, answers)

    kept = params.train.epochs * params.train.checkpoints_per_epoch
    yield measuring("evaluate", params.prepare.dev, params.world.dev, kept, 0)
    yield measuring("test", params.prepare.test, params.world.test, 1, params.report.gallery)


Work = tuple[float, float, float]
"""Tokens, seconds and bytes on a GPU."""


def generating(params: Params, policy: Model, machine: Machine) -> Work:
    """`samples` answers to each of an iteration's instructions."""
    section = params.generate
    tokens, seconds = asked(
        policy, machine, params.prepare.per_iteration, section.samples, section.batch_size, section.max_new_tokens
    )
    longest = policy.largest + PROMPT + section.samples * LONGEST * section.max_new_tokens
    return tokens, start(policy) + seconds, cached(policy, section.batch_size, longest)


def dividing(params: Params, divider: Model, machine: Machine, texts: int, per_image: int | None = None) -> Work:
    """So many answers into claims and these into questions, however many are about an image."""
    answer, batch = ANSWER * params.generate.max_new_tokens, min(params.divide.batch_size, texts)
    listed = DIVIDED * answer
    passes = 2 * -(-texts // batch) * listed
    tokens = texts * (2 * PROMPT + 4 * listed)
    seconds = forward(divider, machine, tokens, passes, batch * (PROMPT + answer + listed))
    return tokens, start(divider) + seconds, cached(divider, batch, PROMPT + answer + listed)


def judging(params: Params, labeler: Model, machine: Machine, texts: int, per_image: int | None = None) -> Work:
    """The claims of so many answers, `per_image` (`samples`) to an image."""
    images = -(-texts // (per_image or params.generate.samples))
    batch = min(params.feedback.batch_size, images)
    tokens = images * (labeler.image + PROMPT) + DISTINCT * texts * CLAIMS * QUESTION
    seconds = start(labeler) + sight(labeler, machine, images)
    seconds += forward(labeler, machine, tokens, 2 * images / batch)
    return tokens, seconds, cached(labeler, batch, labeler.largest + PROMPT + 2048)


def answering(params: Params, policy: Model, machine: Machine, split: SplitParams, scenes: int) -> Work:
    """One answer to each instruction of a split, and its yes/no questions, of which the embedded world has 4 a scene;
    without reading the model."""
    section, count = params.evaluate, rows_of(split.instructions, scenes)
    tokens, seconds = asked(policy, machine, count, 1, section.batch_size, section.max_new_tokens)
    if split.questions:
        questions = rows_of(split.questions, 4 * scenes)
        tokens += count * policy.image + questions * QUESTION
        seconds += sight(policy, machine, count)
        seconds += forward(policy, machine, questions * QUESTION, 2 * count / section.batch_size)
    longest = policy.largest + PROMPT + LONGEST * section.max_new_tokens
    return tokens, seconds, cached(policy, section.batch_size, longest)


def rows_of(path: str, scenes: int) -> int:
    """Rows of a file of instructions; where it is not there yet, `scenes` of the embedded world, or `INSTRUCTIONS`."""
    if (ROOT / path).is_file():
        with (ROOT / path).open("rb") as file:
            return sum(1 for line in file if line.strip())
    return scenes if path.startswith("data/world/") else INSTRUCTIONS


def training(params: Params, model: Model, machine: Machine) -> Need:
    """Preference training: forward and backward, again forward where activations are recomputed, the reference's
    pass, and what is written."""
    train, public = params.train, params.pairs.source
    answers = 2 * ANSWER * (params.evaluate if public else params.generate).max_new_tokens
    pairs = pairs_in(ROOT / public) if public else params.prepare.per_iteration
    row, longest = (image + PROMPT + answers for image in (model.image, model.largest))
    processes = min(train.processes, machine.gpus)
    # in units of a forward pass: the backward of all weights takes two, of what flows through frozen ones one
    passes = 3 + train.gradient_checkpointing - (train.lora_r > 0)
    caching = train.feature_cache_gb and not sharding_of(train.accelerate_config)
    seen = pairs * (1 if caching else train.epochs + 1)
    flops = 2 * model.active * pairs * row * (train.epochs * passes + 1) + seen * model.seeing
    launches = train.epochs * pairs / train.micro_batch_size / processes * passes * model.layers
    checkpoints = train.epochs * train.checkpoints_per_epoch
    size = model.parameters * (2 if train.dtype == "bfloat16" else 4)
    written = checkpoints * size
    trained, _ = learning(model, params)
    states_written = checkpoints // train.resume_every * 12 * trained  # what a killed run goes on from
    saving = (written + states_written) / WRITE
    kept = min(checkpoints, train.keep_checkpoints + 1) if train.keep_checkpoints else checkpoints
    computing = max(flops / (machine.flops * UTILIZATION) / processes, launches * machine.launch)
    way = ways_to_train(params, machine)
    return Need(
        "train",
        tokens=train.epochs * pairs * row,
        flops=flops,
        seconds=start(model) + computing + saving,
        gpu=states(model, params, processes) + activations(model, params, longest, answers) + RUNTIME,
        host=main_memory(model, params, processes),
        disk=kept * size,
        fixes={"gpu": way, "host": way, "disk": "train.keep_checkpoints, train.checkpoints_per_epoch or train.epochs"},
    )


def finetuning(params: Params, model: Model, machine: Machine) -> Need:
    """`make sft`: conversations, each a row of its own."""
    sft = params.sft
    longest = model.largest + (sft.max_length or LONG_CONVERSATION)
    rows = sft.rows, model.image + CONVERSATION, longest, CONVERSATION / 2
    return tuning(
        "sft", params, replace(as_train_params(sft, params.train), feature_cache_gb=0.0), model, machine, *rows
    )


def rewarding(params: Params, model: Model, machine: Machine) -> Need:
    """A reward model of `make fact-rlhf`: both answers of a preference in one row, the image and question shared."""
    reward, answer = params.reward_model, ANSWER * params.generate.max_new_tokens
    asked_about = params.prepare.per_iteration * reward.per_instruction
    learned = (PEOPLES_PAIRS if reward.preferences else asked_about) * (1 - reward.held_out)
    rows = min(learned, reward.pairs or learned)
    row, longest = (image + PROMPT + 2 * (answer + JUDGED) for image in (model.image, model.largest))
    return tuning("reward_model", params, as_train_params(reward, params.train), model, machine, rows, row, longest, 0)


def tuning(
    stage: str,
    params: Params,
    train: TrainParams,
    model: Model,
    machine: Machine,
    rows: float,
    row: float,
    longest: float,
    answers: float,
) -> Need:
    """Training of whole copies of a model by `train` on so many rows of `row` tokens, the longest of `longest`, with
    the logits of `answers` tokens of each."""
    params, processes = replace(params, train=train), min(train.processes, machine.gpus)
    passes = 3 + train.gradient_checkpointing - (train.lora_r > 0)
    flops = train.epochs * rows * (2 * model.active * row * passes + model.seeing)
    launches = train.epochs * rows / train.micro_batch_size / processes * passes * model.layers
    checkpoints = train.epochs * train.checkpoints_per_epoch
    size, (trained, _) = model.parameters * (2 if train.dtype == "bfloat16" else 4), learning(model, params)
    computing = max(flops / (machine.flops * UTILIZATION) / processes, launches * machine.launch)
    ways = [] if train.gradient_checkpointing else ["train.gradient_checkpointing: true"]
    ways += [] if train.lora_r else [f"{stage}.lora_r: 64"]
    ways += ["train.load_in_4bit: true"] if train.lora_r and not train.load_in_4bit else []
    way = ", or ".join([*ways, f"{stage}.base, for a smaller one"])
    return Need(
        stage,
        tokens=train.epochs * rows * row,
        flops=flops,
        seconds=start(model) + computing + checkpoints * (size + 12 * trained) / WRITE,
        gpu=states(model, params, processes) + activations(model, params, longest, answers) + RUNTIME,
        host=main_memory(model, params, processes),
        disk=checkpoints * size,
        fixes={"gpu": way, "host": way, "disk": f"{stage}.checkpoints_per_epoch or {stage}.epochs"},
    )


def reinforcing(
    params: Params,
    run: RewardWeights,
    models: Mapping[str, Model | None],
    machine: Machine,
    scorer: Model | None,
) -> Need:
    """A run of RLOO (`make rloo`): each step samples, judges, and passes over all answers, once for their log-probs,
    once for the reference's, and forward and backward. Policy and the judges that the run counts are in memory
    together, among them the reward model `scorer` where it has one."""
    rloo, train, policy = params.rloo, params.train, models["policy"]
    labeler = models["labeler"] if run.claims else None
    divider = models["divider"] if run.claims or run.recall else None
    steps = run.steps or rloo.steps
    answers, answer = rloo.prompts * rloo.samples, ANSWER * rloo.max_new_tokens
    row, longest = (image + PROMPT + answer for image in (policy.image, policy.largest))
    passes = 5 + train.gradient_checkpointing - (train.lora_r > 0)
    tokens, seconds = asked(policy, machine, rloo.prompts, rloo.samples, rloo.prompts, rloo.max_new_tokens)
    seen = rloo.prompts + 3 * answers  # the tower looks again in each of TRL's forward passes
    flops = 2 * policy.active * (tokens + answers * row * passes) + seen * policy.seeing
    launches = answers / rloo.micro_batch_size * passes * policy.layers
    seconds += max(
        2 * policy.active * answers * row * passes / (machine.flops * UTILIZATION), launches * machine.launch
    )
    pass_of_answers = replace(params, train=replace(train, micro_batch_size=rloo.micro_batch_size))
    gpu = states(policy, params, 1) + activations(policy, pass_of_answers, longest, answer) + RUNTIME
    host = main_memory(policy, params, 1)
    for work, model in ((dividing, divider), (judging, labeler)):
        if model:
            _, took, memory = work(params, model, machine, answers)
            seconds, gpu, host = seconds + took - start(model), gpu + memory - RUNTIME, host + model.stored
    loaded = [model for model in (policy, labeler, divider, scorer) if model]
    if scorer:
        judged = rloo.prompts * (scorer.image + PROMPT) + answers * (answer + JUDGED)
        seconds += sight(scorer, machine, rloo.prompts) + forward(scorer, machine, judged, 2)
        gpu += cached(scorer, 1, scorer.largest + rloo.max_new_tokens + JUDGED) - RUNTIME
        host += scorer.stored
    four = "" if labeler is None or labeler.bytes < labeler.stored else "labeler.load_in_4bit: true, "
    way = f"rloo.micro_batch_size or rloo.prompts, {four}or labeler, for a served one"
    size = policy.parameters * (2 if train.dtype == "bfloat16" else 4)
    return Need(
        "rloo",
        tokens=steps * answers * row,
        flops=steps * flops,
        seconds=sum(map(start, loaded)) + steps * seconds,
        gpu=gpu,
        host=host,
        disk=rloo.checkpoints * size,
        fixes={"gpu": way, "host": way, "disk": "rloo.checkpoints"},
    )


def pairs_in(source: Path) -> int:
    """Pairs in a parquet file or a folder of them; `PUBLIC_PAIRS` where there are none yet."""
    import pyarrow.parquet as pq

    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    return sum(pq.read_metadata(file).num_rows for file in files if file.is_file()) or PUBLIC_PAIRS


def learning(model: Model, params: Params) -> tuple[float, float]:
    """Parameters that learn, and those that do not: the vision tower, or with LoRA everything but the adapters."""
    if params.train.lora_r:
        return adapter_parameters(model, params.train), model.parameters
    return model.parameters - model.vision, model.vision


def states(model: Model, params: Params, processes: int) -> float:
    """Bytes on each GPU of weights, gradients and AdamW's two moments, four each for a parameter that learns, with the
    copies that autocast makes of weights and what the kind of sharding spreads."""
    train = params.train
    learn, rest = learning(model, params)
    frozen = rest * (FOUR_BIT if train.load_in_4bit else 2 if train.dtype == "bfloat16" else 4)
    copies = learn * (2 if train.dtype == "bfloat16" and not train.lora_r else 0)
    match sharding_of(train.accelerate_config):
        case "fsdp2":
            return (16 * learn + frozen) / processes + copies
        case "zero2":
            return frozen + 4 * learn + 12 * learn / processes
        case "zero3":  # its optimizer is in main memory
            return (8 * learn + frozen) / processes + copies / 4
    return 16 * learn + frozen + copies


def activations(model: Model, params: Params, row: float, answers: float) -> float:
    """Bytes that the backward pass needs: of every layer, or of one and the inputs of all; and the answers' logits."""
    pairs, checkpointing = params.train.micro_batch_size, params.train.gradient_checkpointing
    layer, inputs = 34 * row * model.hidden * pairs, 2 * row * model.hidden * pairs
    logits = 12 * min(answers * pairs, 2048) * model.vocabulary
    return (layer + model.layers * inputs if checkpointing else model.layers * layer) + logits


def main_memory(model: Model, params: Params, processes: int) -> float:
    """Bytes of weights while they are loaded, by every process, and of what lies in main memory by a setting."""
    train, (learn, _) = params.train, learning(model, params)
    sharding = sharding_of(train.accelerate_config)
    loading = processes * model.parameters * (2 if train.lora_r or processes > 1 else 6)
    images = pairs_in(ROOT / params.pairs.source) if params.pairs.source else params.prepare.per_iteration
    kept = images * model.image * model.feature * model.width
    features = 0 if sharding else min(train.feature_cache_gb * GB, kept)
    return processes * PROCESS + loading + features + (8 * learn if sharding == "zero3" else 0)


def ways_to_train(params: Params, machine: Machine) -> str:
    """The keys that make training smaller, cheapest first."""
    train = params.train
    ways = [] if train.gradient_checkpointing else ["train.gradient_checkpointing: true"]
    if train.lora_r:
        ways += [] if train.load_in_4bit else ["train.load_in_4bit: true"]
    else:
        where = f"train.processes: {machine.gpus}" if machine.gpus > 1 else "more GPUs"
        ways += [
            "train.lora_r: 64 with train.learning_rate: 1.0e-5",
            f"train.accelerate_config: params/accelerate/fsdp2.yaml with {where}",
        ]
    return ", or ".join(ways or ["policy, for a smaller one"])


def adapter_parameters(model: Model, train) -> float:
    """Of LoRA on all linear layers of the language model, whose matrices are about hidden × hidden to 3 × hidden."""
    shapes = {"gate_proj": 3.7, "up_proj": 3.7, "down_proj": 3.7}
    return model.layers * train.lora_r * model.hidden * sum(1 + shapes.get(name, 1.0) for name in train.lora_targets)


def sharding_of(config: str | None) -> str:
    """fsdp2, zero2, zero3, or "" for whole copies, as an accelerate file says."""
    if config is None:
        return ""
    content = read_yaml(ROOT / config)
    if content.get("distributed_type") == "DEEPSPEED":
        return f"zero{content['deepspeed_config']['zero_stage']}"
    return "fsdp2" if content.get("distributed_type") == "FSDP" else ""


@dataclass(frozen=True)
class Plan:
    """The needs of one iteration beside what there is; `ahead` of its iterations have no checkpoints yet; `measured`
    is what the stages that have run took, as `measured` says it; `managed` are the roles whose engine is vllm."""

    needs: list[Need]
    machine: Machine
    host: float
    disk: float
    iterations: int
    ahead: int
    measured: Mapping[str, Mapping[str, float]]
    managed: Sequence[str] = ()

    @property
    def scale(self) -> float:
        """Measured over estimated time, the median of the finished stages; 1 where nothing has run."""
        ratios = [row["minutes"] / row["estimate"] for row in self.compared()]
        return statistics.median(ratios) if ratios else 1.0

    def compared(self) -> list[dict]:
        """A row for every stage that has run: `stage`, its `estimate` in minutes and what they were (`minutes`),
        `gpu_estimate` in GB and what that was (`peak_gpu_gb`, 0 where it ran on no GPU)."""
        return [
            {"stage": n.stage, "estimate": n.seconds / 60, "gpu_estimate": n.gpu / GB, **self.measured[n.stage]}
            for n in self.needs
            if n.stage in self.measured
        ]

    def shortages(self) -> tuple[list[str], list[str]]:
        """What does not fit, and what is close, one line each with the way out."""
        short, close = [], []
        written = self.ahead * sum(need.disk for need in self.needs)
        rows = [(n, "gpu", n.gpu, self.machine.memory, "GB on a GPU") for n in self.needs]
        rows += [(n, "host", n.host, self.host, "GB of main memory") for n in self.needs]
        rows += [(n, "disk", written, self.disk, "GB of disk for the iterations ahead") for n in self.needs if n.disk]
        for need, kind, used, there, words in rows:
            line = f"{need.stage}: {used / GB:,.0f} of {there / GB:,.0f} {words}; change {need.fixes[kind]}"
            if used > there:
                short.append(line)
            elif used > CLOSE * there:
                close.append(line)
        return short, close


def make_plan(
    params: Params,
    machine: Machine,
    disk: float = math.inf,
    host: float = math.inf,
    timings: Path | None = None,
    also: Collection[str] = (),
) -> Plan:
    """The plan of a run on a machine with `disk` and `host` bytes free; `timings` is where the stages that have run
    here noted what they took (None: it is another machine). `also` names what of `BESIDE` is in it, of each
    one run, of RLOO the one that takes most memory.

    Raises FileNotFoundError, in one line, for a model whose configuration cannot be had.
    """
    roles = {role: getattr(params, role) for role in ("policy", "labeler", "divider")}
    roles |= {"evaluate.labeler": params.evaluate.labeler} if params.evaluate.labeler else {}
    known: dict[ModelParams, Model] = {}

    def size(model: ModelParams) -> Model:
        if model not in known:
            known[model] = measure(model)
        return known[model]

    models = {role: None if is_served(model.path) else size(model) for role, model in roles.items()}
    needs = list(stages(params, models, machine))
    if "sft" in also:
        needs.append(finetuning(params, size(model_at(params, params.sft.base)), machine))
    if "reward_model" in also:
        needs.append(rewarding(params, size(model_at(params, params.reward_model.base)), machine))
    if "rloo" in also:
        trained = "reward_model" in also
        runs = [run for run in params.rloo_runs.values() if trained or run.scored_by is None or "/" in run.scored_by]
        scorers = [(run, scoring_model(params, run)) for run in runs]
        each = [reinforcing(params, run, models, machine, scorer and size(scorer)) for run, scorer in scorers]
        needs.append(max(each, key=lambda need: need.gpu))
    found = measured(timings, params.policy.path) if timings else {}
    ahead = sum(not Paths(name).checkpoints.is_dir() for name in params.iterations)
    managed = [role for role, model in roles.items() if model.engine == "vllm"]
    return Plan(needs, machine, host, disk, len(params.iterations), ahead, found, managed)


def model_at(params: Params, path: str | None) -> ModelParams:
    """The checkpoint in a folder or of a hub id, used as the policy is; null is the policy."""
    return replace(params.policy, path=path, revision=None, processor={}, system=None) if path else params.policy


def scoring_model(params: Params, run: RewardWeights) -> ModelParams | None:
    """The reward model that a run of RLOO asks: a folder's, or what that is made of which is trained here."""
    if run.scored_by is None:
        return None
    return model_at(params, run.scored_by if "/" in run.scored_by else params.reward_model.base)


def measured(timings: Path, policy: str) -> dict[str, dict[str, float]]:
    """Stage → its `minutes` with this policy, the mean over the iterations that were trained, and its largest
    `peak_gpu_gb`, 0 where it ran on no GPU."""
    found: dict[str, list[dict]] = {}
    for row in read_timings(timings):
        name, _, iteration = row["stage"].partition("@")
        if iteration != "0" and row.get("policy") == policy:
            found.setdefault(name, []).append(row)
    return {
        name: {
            "minutes": statistics.mean(row["minutes"] for row in rows),
            "peak_gpu_gb": max(row.get("peak_gpu_gb", 0.0) for row in rows),
        }
        for name, rows in found.items()
    }


def table(plan: Plan) -> str:
    """The plan as text: a row a stage, the sum of an iteration, and what is short."""
    names = ("tokens", "TFLOP", "GPU GB", "host GB", "disk GB", "hours", "measured")
    head = "stage     " + "".join(f"{name:>11}" for name in names)
    lines = [f"{plan.machine.gpus} × {plan.machine.name}, one iteration of {plan.iterations}", head]
    for n in plan.needs:
        hours, took = plan.scale * n.seconds / 3600, plan.measured.get(n.stage)
        row = f"{n.stage:10}{n.tokens / 1e6:10.1f}M{n.flops / 1e12:11,.0f}{n.gpu / GB:11.1f}{n.host / GB:11.1f}"
        lines.append(row + f"{n.disk / GB:11.1f}{hours:11.3f}" + (f"{took['minutes'] / 60:11.3f}" if took else ""))
    hours = plan.scale * sum(n.seconds for n in plan.needs) / 3600
    written = plan.iterations * sum(n.disk for n in plan.needs) / GB
    lines.append(
        f"an iteration {hours:,.1f} hours; all: {plan.iterations * hours:,.1f} hours, {written:,.0f} GB of disk"
    )
    lines.append("not in it: benchmarks and their judges")
    if plan.managed:
        whose = " and ".join(plan.managed)
        lines.append(f"the engine of {whose} is vllm: hours are those of transformers, a bound that it stays far below")
    if plan.measured:
        lines.append(f"hours are the estimate times {plan.scale:.2f}, the median of what the finished stages took")
    return "\n".join(lines)


def small(params: Params) -> bool:
    """Whether all models are folders of this machine with under 1 GB of weights: nothing to plan for."""
    roles = [getattr(params, role).path for role in ("policy", "labeler", "divider")]
    if not all((ROOT / path).is_dir() for path in roles):
        return False
    return sum(file.stat().st_size for path in set(roles) for file in (ROOT / path).glob("*.safetensors")) < GB


def machine_here(name: str | None = None, gpus: int | None = None) -> Machine:
    """The machine that is named, or the one that this is."""
    if name is None:
        import torch

        count = torch.cuda.device_count()
        if not count:
            return MACHINES["CPU"]
        seen = torch.cuda.get_device_properties(0)
        known = next((machine for key, machine in MACHINES.items() if key.replace("RTX", "RTX ") in seen.name), None)
        machine = known or MACHINES["A100"]
        return replace(machine, name=seen.name, memory=seen.total_memory, gpus=gpus or count)
    return replace(MACHINES[name], gpus=gpus or 1)


def main(arguments: list[str] | None = None) -> None:
    """The command; what does not fit ends it with a line each and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", default="params.yaml", help="a parameter file or a profile")
    parser.add_argument("--gpu", choices=MACHINES, help="default: what this machine has")
    parser.add_argument("--gpus", type=int, help="how many of them")
    parser.add_argument("--disk", type=float, metavar="GB", help="default: what is free here")
    for name, what in BESIDE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"{what} as well")
    parser.add_argument("--check", action="store_true", help="be brief: only what does not fit or is close")
    options = parser.parse_args(arguments)
    try:
        params = load_params(options.params)
        if options.check and params.benchmarks:
            from rlaifv.benchmarks.suite import check_inputs  # here, for it takes seconds to import

            if missing := check_inputs(params):
                sys.exit("\n".join([*missing, "`benchmarks: {}` in the parameter file runs without any"]))
        if options.check and small(params):
            return
        machine = machine_here(options.gpu, options.gpus)
        disk = options.disk * GB if options.disk else shutil.disk_usage(ROOT).free
        here = options.gpu is None
        host = psutil.virtual_memory().total if here else float("inf")
        also = [name for name in BESIDE if getattr(options, name)]
        plan = make_plan(params, machine, disk, host, RUNS / "timings" if here else None, also)
    except (ParamsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"plan: {error}")
    if not options.check:
        print(table(plan))
    short, close = plan.shortages()
    for line in close:
        print(f"close: {line}")
    if short:
        sys.exit("\n".join(f"does not fit: {line}" for line in short))
    print("it fits")


if __name__ == "__main__":
    main()
