"""Typed parameters: `params.yaml` (or any profile in `params/`) read as YAML 1.2 into frozen dataclasses.

Unknown or missing keys, wrong types and impossible values stop the run in its first second with the key, the value
and what was expected. This file imports nothing heavy, so that the check really is the first second.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlaifv import ROOT

DEFAULT = ROOT / "params.yaml"


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message names the file, the key, the value and the way out."""


def _checked(check: Callable[[Any], bool], expected: str, default: Any) -> Any:
    return field(default=default, metadata={"check": check, "expected": expected})


def _at_least(low: float, default: Any = MISSING) -> Any:
    return _checked(lambda v: v >= low, f"a value of at least {low:g}", default)


def _more_than(low: float, default: Any = MISSING, *, upto: float = math.inf) -> Any:
    bound = "" if upto == math.inf else f" and not above {upto:g}"
    return _checked(lambda v: low < v <= upto, f"a value above {low:g}{bound}", default)


def _between(low: float, high: float) -> Any:
    return _checked(lambda v: low <= v <= high, f"a value from {low:g} to {high:g}", MISSING)


def _below(high: float, default: Any = MISSING) -> Any:
    return _checked(lambda v: 0 <= v < high, f"a value from 0 to below {high:g}", default)


def _one_of(*choices: str, default: Any = MISSING) -> Any:
    return _checked(lambda v: v in choices, "one of " + ", ".join(choices), default)


def _some_of(choices: Collection[str], default: Any = MISSING) -> Any:
    return _checked(lambda v: v and set(v) <= set(choices), "some of " + ", ".join(choices), default)


LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "robust", "apo_zero", "apo_down", "sft", "hinge", "exo_pair", "nca_pair")
LOSSES += ("bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop")
"""TRL's losses, written down here because TRL itself looks at the name only in the first training step."""

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial")
"""Those of transformers' schedules that need no further settings."""


@dataclass(frozen=True)
class ModelParams:
    """A checkpoint: a folder (relative to the repository) or a hub id with a pinned revision."""

    path: str
    revision: str | None
    dtype: str = _one_of("float32", "bfloat16", "float16")
    device: str = _one_of("auto", "cpu", "cuda")


@dataclass(frozen=True)
class WorldParams:
    """The embedded world: how many scenes each split has, and the seed that draws them."""

    seed: int
    train: int = _at_least(1)
    dev: int = _at_least(1)
    test: int = _at_least(1)


@dataclass(frozen=True)
class SplitParams:
    """An evaluation split: instructions with the COCO annotations of their images, and yes/no questions."""

    instructions: str
    instances: str
    captions: str | None
    questions: str | None


@dataclass(frozen=True)
class PrepareParams:
    instructions: str
    image_root: str
    dev: SplitParams
    test: SplitParams
    per_iteration: int = _at_least(1)
    max_reject_rate: float = _between(0, 1)


@dataclass(frozen=True)
class GenerateParams:
    """Sampling of candidates: identical settings for all samples of an instruction (section 2.1: deconfounded)."""

    samples: int = _at_least(2)
    temperature: float = _more_than(0)
    # ablation: samples at temperatures of 1 ± this times `temperature`; 0 in the method
    temperature_spread: float = _between(0, 0.95)
    top_p: float = _more_than(0, upto=1)
    top_k: int = _at_least(0)
    max_new_tokens: int = _at_least(1)
    batch_size: int = _at_least(1)
    max_reject_rate: float = _between(0, 1)


@dataclass(frozen=True)
class DivideParams:
    # ablation: judge the answer as a whole instead of claim by claim; false in the method
    whole_answer: bool
    temperature: float = _at_least(0)
    top_p: float = _more_than(0, upto=1)
    max_new_tokens: int = _at_least(1)
    batch_size: int = _at_least(1)
    max_reject_rate: float = _between(0, 1)


@dataclass(frozen=True)
class FeedbackParams:
    suffix: str
    # ablation: share of the claims that a coin judges instead of the labeler; 0 in the method
    coin_share: float = _between(0, 1)
    batch_size: int = _at_least(1)
    min_answer_mass: float = _between(0, 1)
    max_reject_rate: float = _between(0, 1)


@dataclass(frozen=True)
class PairsParams:
    balance_length: bool
    min_gap: int = _at_least(1)
    max_per_instruction: int = _at_least(1)


@dataclass(frozen=True)
class TrainParams:
    """Preference training. The paper's values are those of RLAIF-V (arXiv 2405.17220) and its released scripts."""

    # β of DPO: how strongly the policy is held to the reference (paper 0.1)
    beta: float = _more_than(0, 0.1)
    # peak of the schedule (paper: full fine-tuning 5e-7, LoRA 1e-5)
    learning_rate: float = _checked(lambda v: 0 < v < 1, "a value above 0 and below 1", 5e-7)
    # passes over the pairs (paper 4)
    epochs: int = _at_least(1, 4)
    # pairs per optimizer step over all processes (paper 8)
    batch_size: int = _at_least(1, 8)
    # pairs per forward pass of one process; the rest of batch_size is accumulated
    micro_batch_size: int = _at_least(1, 1)
    # a schedule of transformers (paper cosine)
    scheduler: str = _one_of(*SCHEDULERS, default="cosine")
    # share of the steps in which the learning rate rises (paper 0.05)
    warmup_ratio: float = _below(1, 0.05)
    # of AdamW (paper 0.01)
    weight_decay: float = _at_least(0, 0.01)
    # gradients are scaled down to this norm; 0 turns it off (paper 1.0)
    max_grad_norm: float = _at_least(0, 1.0)
    # sigmoid is DPO's, sigmoid_norm its length-normalized form; several are added up; sft adds the negative
    # log-likelihood of the chosen answer
    loss_type: tuple[str, ...] = _some_of(LOSSES, ("sigmoid",))
    # one weight per loss_type; null is 1 each
    loss_weights: tuple[float, ...] | None = None
    # share of pairs assumed to be labeled wrongly (robust, exo_pair, aot)
    label_smoothing: float = _below(0.5, 0.0)
    # weight of the tokens in which the two answers differ; 1 is DPO, RLHF-V's DDPO uses 5
    segment_weight: float = _more_than(0, 1.0)
    # rank of LoRA; 0 trains all weights (paper: full; its LoRA script 64)
    lora_r: int = _at_least(0, 0)
    # LoRA's scale times r (paper 16)
    lora_alpha: int = _at_least(1, 16)
    # makes log-ratios noisy, the reference has none (paper's script 0.05)
    lora_dropout: float = _below(1, 0.0)
    # linear layers of the language model that get an adapter
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # QLoRA: the frozen base in 4 bits (needs bitsandbytes; slow on a CPU)
    load_in_4bit: bool = False
    # the vision tower is always frozen; this freezes what joins it to the text as well
    freeze_projector: bool = False
    # of computation and of written checkpoints; float32 on a CPU (paper bfloat16)
    dtype: str = _one_of("float32", "bfloat16", default="bfloat16")
    # recompute activations in the backward pass: less memory, 30 % more time
    gradient_checkpointing: bool = False
    # longest row in tokens, longer ones are rejected; null is the model's own limit
    max_length: int | None = None
    # a checkpoint every 1/n epoch (paper 4)
    checkpoints_per_epoch: int = _at_least(1, 4)
    # one row per pair; false is two rows as in TRL (an architecture that cannot is found out)
    packed: bool = True
    # main memory for the frozen tower's features; 0 computes them anew each time, as FSDP and DeepSpeed always do
    feature_cache_gb: float = _at_least(0, 8.0)
    # warn when chosen answers lose this much log-prob per token against the reference
    collapse_nats: float = _more_than(0, 0.5)
    # processes (GPUs) to train on; more than one goes through `accelerate launch`
    processes: int = _at_least(1, 1)
    # an accelerate configuration file (params/accelerate/...), else plain DDP
    accelerate_config: str | None = None


@dataclass(frozen=True)
class EvaluateParams:
    """Answers to be evaluated. `beams` 1 is greedy decoding; Object HalBench was published with 3."""

    beams: int = _at_least(1)
    max_new_tokens: int = _at_least(1)
    batch_size: int = _at_least(1)


@dataclass(frozen=True)
class SelectParams:
    max_recall_drop: float = _between(0, 1)


@dataclass(frozen=True)
class JudgeParams:
    """A benchmark's judge: `name` at the OpenAI-compatible server `base_url`, or, with null there, a checkpoint folder
    or hub id that judges in this process."""

    name: str
    base_url: str | None
    # the published scorer's .py files, to use its prompts (RefoMB has two); empty: ours
    prompts: tuple[str, ...]
    # the published rule for unreadable replies (MMHal: they count as 0)
    strict_published: bool


@dataclass(frozen=True)
class BenchmarkParams:
    """A published benchmark, and whose answers to it are scored. Paths start at the repository."""

    # what is asked: the benchmark's own files
    questions: tuple[str, ...]
    # what is true: COCO instances and captions (chair, object_halbench), AMBER's folder; else it is in `questions`
    truth: tuple[str, ...]
    # a synonym table instead of ours (chair, object_halbench)
    vocabulary: str | None
    # the folder below which the images lie; null: they are in `questions`
    images: str | None
    # put after every question, such as "Please answer yes or no."
    suffix: str
    # null: our models answer; a file: these answers of someone else's model are scored
    answers: str | None
    # of the benchmarks that ask one
    judge: JudgeParams | None
    kind: str = _one_of("chair", "object_halbench", "amber", "mmhal", "refomb", "pope")
    # 1: greedy
    beams: int = _at_least(1)


@dataclass(frozen=True)
class SelfFeedbackParams:
    """Best-of-N at inference time with the aligned policy's own DPO reward (section 2.4); sampling is `generate`'s."""

    # the round whose policy is π_ref of the reward, "0" the base model; None: what the last round was trained against
    reference: str | None
    # the first so many test instructions
    instructions: int = _at_least(1)
    # the largest N; smaller ones are drawn from its answers
    candidates: int = _at_least(2)
    # resamples of the instructions that intervals are taken over
    resamples: int = _at_least(20)
    # instructions at a time
    batch_size: int = _at_least(1)


@dataclass(frozen=True)
class ReportParams:
    gallery: int = _at_least(1)


@dataclass(frozen=True)
class IterationParams:
    """`prev` names the iteration whose policy this one starts from; "0" is the base model."""

    prev: str


@dataclass(frozen=True)
class Params:
    seed: int
    policy: ModelParams
    labeler: ModelParams
    divider: ModelParams
    world: WorldParams
    prepare: PrepareParams
    generate: GenerateParams
    divide: DivideParams
    feedback: FeedbackParams
    pairs: PairsParams
    train: TrainParams
    evaluate: EvaluateParams
    select: SelectParams
    benchmarks: dict[str, BenchmarkParams]
    self_feedback: SelfFeedbackParams
    report: ReportParams
    iterations: dict[str, IterationParams]


def load_params(path: str | Path = DEFAULT) -> Params:
    """Read and check a whole parameter file; a relative path is taken from the repository."""
    path = Path(path) if Path(path).is_absolute() else ROOT / path
    if not path.is_file():
        raise ParamsError(f"no parameter file {path}; the complete profiles are params.yaml and params/*.yaml")
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except YAMLError as error:
        raise ParamsError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    params = _build(Params, content, "", path.name)
    _check_iterations(params.iterations, path.name)
    check_train(params.train, f"{path.name}: ")
    _check_benchmarks(params.benchmarks, path.name)
    reference = params.self_feedback.reference
    if reference not in (None, "0", *params.iterations):
        raise ParamsError(f'{path.name}: self_feedback.reference: no iteration {reference!r}; "0" is the base model')
    return params


def _check_iterations(iterations: dict[str, IterationParams], file: str) -> None:
    if not iterations:
        raise ParamsError(f"{file}: iterations: expected a section with at least one entry, got {{}}")
    for name, item in iterations.items():
        if not name.isdecimal() or int(name) < 1:
            raise ParamsError(f'{file}: iterations: expected names "1", "2", ..., got {name!r}')
        if item.prev != "0" and item.prev not in iterations:
            raise ParamsError(f"{file}: iterations.{name}.prev: no iteration {item.prev!r} to start from")
        if int(item.prev) >= int(name):
            raise ParamsError(f"{file}: iterations.{name}.prev: {item.prev!r} is not before {name!r}")


def check_train(params: TrainParams, where: str = "") -> None:
    """Raise ParamsError for training parameters that cannot work together; `where` begins the message."""
    per_pass = params.micro_batch_size * params.processes
    if params.batch_size % per_pass:
        raise ParamsError(
            f"{where}train.batch_size {params.batch_size} is not a multiple of micro_batch_size x processes = "
            f"{params.micro_batch_size} x {params.processes}: the global batch would depend on the machine"
        )
    if params.loss_weights is not None and len(params.loss_weights) != len(params.loss_type):
        raise ParamsError(
            f"{where}train.loss_weights {params.loss_weights} must have one weight per loss_type {params.loss_type}"
        )
    if "exo_pair" in params.loss_type and params.label_smoothing == 0:
        raise ParamsError(f"{where}train.label_smoothing: the loss exo_pair needs more than 0, such as 1.0e-3")
    if "sft" in params.loss_type and params.segment_weight != 1:
        raise ParamsError(
            f"{where}train.segment_weight {params.segment_weight:g} would weigh the sft loss too, which is then no "
            "likelihood: use one of the two"
        )
    if params.load_in_4bit and not params.lora_r:
        raise ParamsError(f"{where}train.load_in_4bit keeps the base model frozen: it needs train.lora_r > 0")
    if params.accelerate_config and not (ROOT / params.accelerate_config).is_file():
        raise ParamsError(f"{where}train.accelerate_config {params.accelerate_config} does not exist")


def _check_benchmarks(benchmarks: dict[str, BenchmarkParams], file: str) -> None:
    """Refuse an entry whose judge, truth, vocabulary or prompts are missing, or are not of its kind of benchmark."""
    for name, item in benchmarks.items():
        key = f"{file}: benchmarks.{name}"
        if not name.replace("_", "").isalnum() or not name.isascii():
            raise ParamsError(f"{key}: a name is letters, digits and _ (files are called after it)")
        judged = item.kind in ("object_halbench", "mmhal", "refomb")
        looked_up = item.kind in ("chair", "object_halbench", "amber")
        if judged != (item.judge is not None):
            raise ParamsError(f"{key}.judge: {item.kind} {'needs a judge' if judged else 'has no judge: write null'}")
        if looked_up != bool(item.truth):
            wanted = (
                "needs the files or the folder of its truth" if looked_up else "has its truth in questions: write []"
            )
            raise ParamsError(f"{key}.truth: {item.kind} {wanted}")
        if item.vocabulary and item.kind not in ("chair", "object_halbench"):
            raise ParamsError(f"{key}.vocabulary: {item.kind} has no synonym table: write null")
        if not item.questions and (item.answers is None or not looked_up):
            raise ParamsError(f"{key}.questions: expected at least one file of {item.kind}")
        if len(item.questions) > 1 and not looked_up:
            raise ParamsError(f"{key}.questions: {item.kind} takes one file an entry, got {len(item.questions)}")
        prompts = 2 if item.kind == "refomb" else 1
        if item.judge and len(item.judge.prompts) not in (0, prompts):
            raise ParamsError(f"{key}.judge.prompts: expected [] or {prompts} of the published scorer's files")


def _build(kind: Any, value: Any, key: str, file: str) -> Any:
    """Turn plain YAML into `kind`, checking names, types and values on the way."""
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, key, file)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, key, file)
    if origin is dict:
        if not isinstance(value, dict):
            raise ParamsError(f"{file}: {key}: expected a section, got {value!r}")
        for name in value:
            if not isinstance(name, str):
                raise ParamsError(f'{file}: {key}: names are text: write "{name}": with quotes (DVC drops others)')
        return {name: _build(arguments[1], item, f"{key}.{name}", file) for name, item in value.items()}
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_build(arguments[0], item, f"{key}[{i}]", file) for i, item in enumerate(items))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        expected = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[kind]
        hint = " (a number in quotes is text: remove the quotes)" if _is_number(value) and kind is not str else ""
        raise ParamsError(f"{file}: {key}: expected {expected}, got {value!r}{hint}")
    return value


def _build_section(kind: Any, value: Any, key: str, file: str) -> Any:
    if not isinstance(value, dict):
        raise ParamsError(f"{file}: {key or 'the file'}: expected a section, got {value!r}")
    prefix = f"{key}." if key else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := [name for name in value if name not in fields]:
        raise ParamsError(f"{file}: unknown key {prefix}{unknown[0]}; known here: {', '.join(sorted(fields))}")
    if missing := [name for name in fields if name not in value]:
        raise ParamsError(f"{file}: missing key {prefix}{missing[0]}")
    built = {}
    for name, item in value.items():
        built[name] = _build(hints[name], item, prefix + name, file)
        check = fields[name].metadata.get("check")
        if check and built[name] is not None and not check(built[name]):
            raise ParamsError(f"{file}: {prefix}{name}: expected {fields[name].metadata['expected']}, got {item!r}")
    return kind(**built)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
