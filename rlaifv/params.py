"""Typed parameters: `params.yaml` or a profile in `params/`, read as YAML 1.2 into frozen dataclasses that pydantic
checks.

Unknown or missing keys, wrong types and impossible values stop the run in its first second with the key, the value
and what was expected. This file imports nothing heavy, so that the check really is the first second.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, dataclass_transform

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlaifv import ROOT

DEFAULT = ROOT / "params.yaml"
NAMED = ("iterations", "benchmarks", "sft_parts", "reward_runs", "rloo_runs")
"""The sections whose keys are names."""


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message names the file, the key, the value and the way out."""


# ---- what a value may be


def _expect(expected: str, check: Callable[[Any], bool]) -> AfterValidator:
    def checked(value: Any) -> Any:
        if not check(value):
            raise PydanticCustomError("expected", expected)
        return value

    return AfterValidator(checked)


Text = Annotated[
    str, _expect("text without control characters", re.compile(r"[^\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]*").fullmatch)
]
Name = Annotated[Text, _expect("text that is not empty", str.strip)]
Seed = Annotated[int, _expect("a whole number from 0 to 4294967295", lambda v: 0 <= v < 2**32)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Penalty = Annotated[float, Field(ge=1)]
Share = Annotated[float, _expect("a value from 0 to 1", lambda v: 0 <= v <= 1)]
Fraction = Annotated[float, _expect("a value from 0 to below 1", lambda v: 0 <= v < 1)]
LearningRate = Annotated[float, _expect("a value above 0 and below 1", lambda v: 0 < v < 1)]
TopP = Annotated[float, _expect("a value above 0 and not above 1", lambda v: 0 < v <= 1)]
OneOrMore = BeforeValidator(lambda v: v if isinstance(v, tuple) else tuple(v) if isinstance(v, list) else (v,))
"""A YAML list; a single value is a list of one."""
Texts = Annotated[tuple[Name, ...], OneOrMore]
IterationName = Annotated[str, _expect('names "1", "2", ...', re.compile("[1-9][0-9]{0,3}").fullmatch)]
FileName = Annotated[
    str, _expect("names of letters, digits and _ (files are called so)", re.compile(r"\w+", re.A).fullmatch)
]

LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "robust", "apo_zero", "apo_down", "sft", "hinge", "exo_pair", "nca_pair")
LOSSES += ("bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop")
"""TRL's losses, written down here because TRL itself looks at the name only in the first training step."""

Losses = Annotated[
    tuple[str, ...], OneOrMore, _expect(f"some of {', '.join(LOSSES)}", lambda v: v and set(v) <= set(LOSSES))
]
Layers = Annotated[tuple[Name, ...], OneOrMore, _expect("at least one layer", bool)]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"]
"""Those of transformers' schedules that need no further settings."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """What all sections share: a subclass is a frozen dataclass, of whose values pydantic converts none; in a file,
    every key must be there and no other."""

    def __init_subclass__(cls) -> None:
        dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = [field.name for field in fields(cls)]
            for key in value:
                if key not in known:
                    raise PydanticCustomError("unknown", "; known here: " + ", ".join(sorted(known)), {"key": key})
            for key in known:
                if key not in value:
                    raise PydanticCustomError("missing", "", {"key": key})
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable) -> Mapping:
        # strict is for values: a section is made of a mapping, not only of an instance of its class
        return handler(source) | {"strict": False}


# ---- the sections


class ModelParams(Section):
    """A checkpoint: a folder (relative to the repository) or a hub id with a pinned revision, and how it is used."""

    path: Name
    revision: Name | None
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
    engine: Literal["transformers", "vllm"] = "transformers"  # in this process, or a server that a stage starts for it
    load_in_4bit: bool  # nf4 weights (needs bitsandbytes and a GPU)
    # settings of its image processor and variables of its chat template, in place of its own
    processor: dict[Name, JsonValue] = field(hash=False)
    template: dict[Name, JsonValue] = field(hash=False)
    system: Name | None  # a system turn before every question; null is what the template itself says


SERVER_COMMAND = (
    "vllm serve {path} --host 127.0.0.1 --port {port} --served-model-name {name} --dtype {dtype} "
    "--data-parallel-size {gpus} --generation-config vllm"
)


class ServerParams(Section):
    """How a model behind a server is asked, and started where its engine is vllm; no answer depends on it."""

    concurrency: Count = 16  # requests in flight
    timeout: Positive = 120.0  # seconds for one try
    tries: Count = 6  # of one request, when it times out or the server is busy, broken or not there
    key_variable: Name = "OPENAI_API_KEY"  # the environment variable with the key; local servers need none
    # what starts the server of a model whose engine is vllm: on a port of this machine, under the name it is asked by
    command: Name = SERVER_COMMAND
    start_minutes: Positive = 30.0  # until it must answer


class ClusterParams(Section):
    """How the chunks of sampling, division, feedback, evaluation and self-feedback are spread over GPUs and machines
    (`rlaifv.store.cluster`); no answer depends on it."""

    engine: Literal["none", "ray"] = "none"  # none: this process; ray: the cluster at RAY_ADDRESS, or this machine
    workers: Count | None = None  # models at once; null: one for each GPU, without GPUs one for every two cores
    gpus_per_worker: Count = 1  # a model too large for one is spread over these
    mixed: bool = False  # take nodes with other GPUs or versions too: results then depend on who did what
    # stages that are jobs of a queue, each with the command that submits it and waits
    submit: dict[FileName, Name] = field(default_factory=dict, hash=False)


class WorldParams(Section):
    """The embedded world: how many scenes each split has, and the seed that draws them."""

    seed: Seed
    train: Count
    dev: Count
    test: Count


class SplitParams(Section):
    """An evaluation split: instructions with the COCO annotations of their images, and yes/no questions. Without
    instances nobody knows what is in the images, and answers are judged by claims."""

    instructions: Name
    instances: Name | None
    captions: Name | None
    questions: Name | None


class PrepareParams(Section):
    image_root: Name
    instructions: Name
    per_iteration: Count
    max_reject_rate: Share
    dev: SplitParams
    test: SplitParams


class GenerateParams(Section):
    """Sampling of candidates: identical settings for all samples of an instruction (section 2.1: deconfounded)."""

    samples: Annotated[int, Field(ge=2, le=2**31 - 1)]
    temperature: Positive
    top_p: TopP
    top_k: CountOrZero
    repetition_penalty: Penalty = 1.0
    max_new_tokens: Count
    batch_size: Count
    max_reject_rate: Share


class DivideParams(Section):
    temperature: NotNegative
    top_p: TopP
    max_new_tokens: Count
    batch_size: Count
    max_reject_rate: Share


class FeedbackParams(Section):
    suffix: Text
    batch_size: Count
    min_answer_mass: Share
    max_reject_rate: Share


class PairsParams(Section):
    """Preferences of the policy's own answers, or from a parquet file or folder in the public dataset's columns."""

    min_gap: Count
    max_per_instruction: Count
    source: Name | None = None  # a path: no feedback is run, the only iteration trains on these pairs as they are


class TrainParams(Section):
    """Preference training. The paper's values are those of RLAIF-V (arXiv 2405.17220) and its released scripts."""

    beta: Positive = 0.1  # β of DPO: how strongly the policy is held to the reference (paper 0.1)
    learning_rate: LearningRate = 5e-7  # peak of the schedule (paper: full fine-tuning 5e-7, LoRA 1e-5)
    epochs: Count = 4  # passes over the pairs (paper 4)
    batch_size: Count = 8  # pairs per optimizer step over all processes (paper 8)
    micro_batch_size: Count = 1  # pairs per forward pass of one process; the rest of batch_size is accumulated
    scheduler: Scheduler = "cosine"  # a schedule of transformers (paper cosine)
    warmup_ratio: Fraction = 0.05  # share of the steps in which the learning rate rises (paper 0.05)
    weight_decay: NotNegative = 0.01  # of AdamW (paper 0.01)
    max_grad_norm: NotNegative = 1.0  # gradients are scaled down to this norm; 0 turns it off (paper 1.0)
    # sigmoid is DPO's, sigmoid_norm its length-normalized form; several are added up; sft adds the negative
    # log-likelihood of the chosen answer
    loss_type: Losses = ("sigmoid",)
    loss_weights: Annotated[tuple[Positive, ...], OneOrMore] | None = None  # one per loss_type; null is 1 each
    # share of pairs assumed to be labeled wrongly (robust, exo_pair, aot)
    label_smoothing: Annotated[float, _expect("a value from 0 to below 0.5", lambda v: 0 <= v < 0.5)] = 0.0
    segment_weight: Positive = 1.0  # of the tokens in which the two answers differ; 1 is DPO, RLHF-V's DDPO uses 5
    lora_r: CountOrZero = 0  # rank of LoRA; 0 trains all weights (paper: full; its LoRA script 64)
    lora_alpha: Count = 16  # LoRA's scale times r (paper 16)
    lora_dropout: Fraction = 0.0  # makes log-ratios noisy, the reference has none (paper's script 0.05)
    lora_targets: Layers = LAYERS  # linear layers of the language model that get an adapter
    load_in_4bit: bool = False  # QLoRA: the frozen base in 4 bits (needs bitsandbytes; slow on a CPU)
    freeze_projector: bool = False  # the vision tower is always frozen; this freezes what joins it to the text as well
    # of computation and of written checkpoints; float32 on a CPU (paper bfloat16)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, 30 % more time
    max_length: Count | None = None  # longest row in tokens, longer ones are rejected; null is the model's own limit
    checkpoints_per_epoch: Count = 4  # a checkpoint every 1/n epoch (paper 4)
    # null keeps all; with a number each is scored on dev when it is written, and only so many best keep their weights
    keep_checkpoints: Count | None = None
    # what a killed run goes on from (of a 7B 84 GB) is written with every n-th checkpoint; steps since are done again
    resume_every: Count = 1
    packed: bool = True  # one row per pair; false is two rows as in TRL (an architecture that cannot is found out)
    # main memory for the frozen tower's features; 0 computes them anew each time, as FSDP and DeepSpeed always do
    feature_cache_gb: NotNegative = 8.0
    collapse_nats: Positive = 0.5  # warn when chosen answers lose this much log-prob per token against the reference
    processes: Count = 1  # (GPUs) to train on, over all machines: more than one goes through `accelerate launch`
    machines: Count = 1  # they are spread over: nodes of the Slurm allocation or of the Ray cluster that this runs in
    accelerate_config: Name | None = None  # a file of the repository (params/accelerate/...); null is plain DDP


class EvaluateParams(Section):
    """Answers to be evaluated. `beams` 1 is greedy decoding; Object HalBench was published with 3."""

    beams: Count
    repetition_penalty: Penalty = 1.0
    max_new_tokens: Count
    batch_size: Count
    labeler: ModelParams | None = None  # who judges by claims; null: `labeler`, which made the feedback as well


class SelectParams(Section):
    max_recall_drop: Share


class AblationParams(Section):
    """What the experiments change of the method; whoever uses the method leaves it as it is."""

    whole_answer: bool  # divide: judge the answer as a whole instead of claim by claim; false in the method
    # generate: samples at temperatures of 1 ± this times `temperature`; 0 in the method
    temperature_spread: Annotated[float, _expect("a value from 0 to 0.95", lambda v: 0 <= v <= 0.95)]
    coin_share: Share  # feedback: of the claims that a coin judges instead of the labeler; 0 in the method
    balance_length: bool  # pairs: drop some until chosen and rejected are equally long; true in the method


class JudgeParams(Section):
    """A benchmark's judge: `name` at the OpenAI-compatible server `base_url`, or, with null there, a checkpoint folder
    or hub id, which judges in this process or, with the engine vllm, behind a server that is started for it."""

    name: Name
    base_url: Name | None
    engine: Literal["transformers", "vllm"] = "transformers"
    # the published scorer's .py files, to use its prompts (RefoMB has two); empty: ours
    prompts: Texts
    strict_published: bool  # the published rule for unreadable replies (MMHal: they count as 0)


class BenchmarkParams(Section):
    """A published benchmark, and whose answers to it are scored. Paths start at the repository."""

    kind: Literal["chair", "object_halbench", "amber", "mmhal", "refomb", "pope"]
    questions: Texts  # what is asked: the benchmark's own files
    # what is true: COCO instances and captions (chair, object_halbench), AMBER's folder; else it is in `questions`
    truth: Texts
    vocabulary: Name | None  # a synonym table instead of ours (chair, object_halbench)
    images: Name | None  # the folder below which the images lie; null: they are in `questions`
    suffix: Text  # put after every question, such as "Please answer yes or no."
    beams: Count  # 1: greedy
    answers: Name | None  # null: our models answer; a file: these answers of someone else's model are scored
    judge: JudgeParams | None  # of the benchmarks that ask one


class SelfFeedbackParams(Section):
    """Best-of-N at inference time with the aligned policy's own DPO reward (section 2.4); sampling is `generate`'s."""

    # whose policy is π_ref of the reward, "0" the base model; None: what the last iteration was trained against
    reference: str | None
    instructions: Count  # the first so many test instructions
    candidates: Annotated[int, Field(ge=2, le=2**31 - 1)]  # the largest N; smaller ones are drawn from its answers
    # resamples of the instructions that intervals are taken over
    resamples: Annotated[int, Field(ge=20, le=2**31 - 1)]
    batch_size: Count  # instructions at a time


class TuningParams(Section):
    """A training beside DPO's. What is not here is as in `train`: LoRA's layers, dtype and the like."""

    learning_rate: LearningRate
    epochs: Count
    batch_size: Count  # rows of a step
    micro_batch_size: Count
    scheduler: Scheduler
    warmup_ratio: Fraction
    weight_decay: NotNegative
    max_grad_norm: NotNegative
    lora_r: CountOrZero  # 0 trains all weights
    lora_alpha: Count
    checkpoints_per_epoch: Count  # the last one is used; what a killed run goes on from is written with each
    processes: Count  # (GPUs), each with the whole model


class SftParams(TuningParams):
    """Fine-tuning on conversations before any feedback: SFT+ of Fact-RLHF (arXiv 2309.14525)."""

    base: Name | None  # what is fine-tuned: a folder or hub id; null: the policy before alignment
    rows: Count  # conversations, drawn of all parts by their weights
    max_length: Count | None  # tokens of a conversation with its image; a longer one is rejected, never cut


class SftPart(Section):
    """A data set of the mixture, as `rlaifv.steps.sft_rows` reads it."""

    kind: Literal["llava_instruct", "vqa_yes_no", "a_okvqa", "flickr30k", "instructions", "questions"]
    files: Texts  # the data set's own; of vqa_yes_no questions and annotations
    images: Text  # the folder of its images below prepare.image_root; "": that itself
    weight: Positive  # its share of the rows, against the other parts'


class RewardRun(Section):
    """One reward model: whose preferences it learns, and what it reads beside an answer."""

    taste: NotNegative  # for length, of the embedded world's annotators; 0 where people have preferred
    facts: Literal["none", "captions", "accepted"]  # accepted: what the labeler accepts of other answers to the image


class RewardModelParams(TuningParams):
    """Fact-RLHF's reward models (arXiv 2309.14525)."""

    preferences: Name | None  # LLaVA-Human-Preference-10K's .json, or pairs as parquet; null: embedded annotators
    flipped: Share  # of the annotators' labels
    per_instruction: Count  # pairs of answers that an annotator is asked about, at most
    pairs: Count | None  # to learn from, at most; null: all
    held_out: Annotated[float, _expect("a value above 0 and below 1", lambda v: 0 < v < 1)]  # share of the images
    captions: Name | None  # facts by image: COCO captions, image_to_caption.json, or A-OKVQA's questions
    facts: Count  # that are read of an image, at most
    base: Name | None  # what becomes a reward model: a folder or hub id; null: the policy before alignment
    prompt: Name  # file of the text that asks for a score
    facts_prompt: Name | None  # the same with {factual_prompt} where the facts go
    joint: Text  # between an answer's end token and that text
    facts_intro: Text  # before the facts
    fact_line: Text  # of each, for {}
    head: Literal["yes_no", "random"]  # how the vector begins: the output layer's row of yes less that of no, or noise
    regularizer: NotNegative  # of the rewards' mean
    best_of: Count  # of self-feedback's instructions, among whose answers a reward model chooses as well


OF_A_RUN = ("scored_by", "steps", "learning_rate")
"""What an entry of `rloo_runs` says beside the weights of its rewards."""


class RewardWeights(Section):
    """One run of reinforcement learning: what each reward of `rlaifv.training.rewards` counts; 0 leaves it out."""

    claims: NotNegative  # minus the number of claims that the labeler rejects
    recall: NotNegative  # share of the facts that are stated
    length: NotNegative  # minus the share by which an answer is longer or shorter than the base model's
    stop: NotNegative  # -1 for an answer that is cut at max_new_tokens
    correct: NotNegative  # the right answer to a question that has one
    reward_model: NotNegative  # a learned reward model's score
    scored_by: Name | None  # that model's entry of reward_runs, or a folder (with a /): a released one, converted
    steps: Count | None  # of this run; null: rloo.steps
    learning_rate: LearningRate | None  # of this run; null: rloo.learning_rate

    @property
    def of_rewards(self) -> dict[str, float]:
        """The weights by reward."""
        return {name: value for name, value in vars(self).items() if name not in OF_A_RUN}


class RlooParams(Section):
    """Reinforcement learning (RLOO, arXiv 2402.14740); optimizer, schedule, LoRA and dtype are those of `train`."""

    steps: Count  # of the optimizer
    prompts: Count  # instructions of a step
    samples: Annotated[int, Field(ge=2, le=2**31 - 1)]  # answers to each: what one is compared with
    micro_batch_size: Count  # answers per forward pass; the rest of a step's is accumulated
    learning_rate: LearningRate
    beta: NotNegative  # what a nat of log π/π_ref costs
    # facts by image as in reward_model.captions, for rewards that need them; null: what instructions have as reference
    captions: Name | None
    temperature: Positive
    max_new_tokens: Count
    checkpoints: Count  # written in equal distances; dev chooses one
    compared: Count  # the first so many test instructions, on which methods are also sampled and judged


class ReportParams(Section):
    gallery: Count


class IterationParams(Section):
    """`prev` names the iteration whose policy this one starts from; "0" is the base model."""

    prev: str


class Params(Section):
    seed: Seed
    iterations: Annotated[dict[IterationName, IterationParams], _expect("a section with at least one entry", bool)]
    policy: ModelParams
    labeler: ModelParams
    divider: ModelParams
    server: ServerParams
    cluster: ClusterParams
    world: WorldParams
    prepare: PrepareParams
    generate: GenerateParams
    divide: DivideParams
    feedback: FeedbackParams
    pairs: PairsParams
    train: TrainParams
    evaluate: EvaluateParams
    select: SelectParams
    ablation: AblationParams
    benchmarks: dict[FileName, BenchmarkParams]
    self_feedback: SelfFeedbackParams
    sft: SftParams
    sft_parts: Annotated[dict[FileName, SftPart], _expect("a section with at least one entry", bool)]
    reward_model: RewardModelParams
    reward_runs: dict[FileName, RewardRun]
    rloo: RlooParams
    rloo_runs: dict[FileName, RewardWeights]
    report: ReportParams


# ---- files


def load_params(path: str | Path = DEFAULT) -> Params:
    """Read and check a whole parameter file or a profile; a relative path is taken from the repository."""
    path = ROOT / path
    return check_params(read_content(path), path.name)


def read_content(path: Path) -> Any:
    """The plain content of a parameter file.

    A file with a `default.yaml` beside it, as all in params/ have, is an overlay: it holds what differs from that
    default, and what is returned is the whole.
    """
    content, default = read_yaml(path), path.with_name("default.yaml")
    if path.name == default.name or not default.is_file():
        return content
    base = read_yaml(default)
    check_params(base, default.name)
    return merge(base, {} if content is None else content)


def read_yaml(path: Path) -> Any:
    """The plain content of a YAML 1.2 file; raises ParamsError in one line when it has none."""
    if not path.is_file():
        raise ParamsError(f"no parameter file {path}; there are params.yaml and the profiles params/*.yaml")
    try:
        return YAML(typ="safe", pure=True).load(path)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ParamsError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None


def merge(base: Any, overlay: Any) -> Any:
    """`base` with the values of `overlay`: sections are merged key by key, those of `NAMED` replaced whole."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    return base | {k: v if k in NAMED else merge(base.get(k), v) for k, v in overlay.items()}


def check_params(content: Any, file: str) -> Params:
    """The parameters of a whole content; `file` begins the message of a ParamsError."""
    params = build(Params, content, file)
    for problem in _problems(params):
        raise ParamsError(f"{file}: {problem}")
    return params


def build(kind: Any, content: Any, file: str) -> Any:
    """`content` as an instance of `kind`; raises ParamsError that says in one line what is wrong first."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ParamsError(" ".join(f"{file}: {_explain(**first)}".split())) from None


EXPECTED = {"string_type": "text", "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"}
EXPECTED |= {"finite_number": "a finite number", "dict_type": "a section", "dataclass_type": "a section"}
EXPECTED |= {"greater_than": "a value above {gt:g}", "greater_than_equal": "a value of at least {ge:g}"}
EXPECTED["less_than_equal"] = "a value of at most {le}"
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def _explain(type: str, loc: tuple[str | int, ...], msg: str, input: Any, ctx: Mapping = {}) -> str:
    """What is wrong, from one of pydantic's errors."""
    is_name = loc[-1:] == ("[key]",)  # of an entry, after the entry's name
    steps = loc[:-2] if is_name else loc
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if type in ("unknown", "missing"):
        return f"{type} key {key}{'.' if key else ''}{ctx['key']}{msg}"
    if is_name and type == "string_type":
        return f'{key}: names are text: write "{input}": with quotes (DVC drops others)'
    expected = EXPECTED[type].format(**ctx) if type in EXPECTED else msg
    if type == "literal_error":
        expected = "one of " + ctx["expected"].replace("'", "").replace(" or ", ", ")
    quoted = type in ("int_type", "float_type") and isinstance(input, str) and NUMBER.fullmatch(input)
    hint = " (a number in quotes is text: remove the quotes)" if quoted else ""
    return f"{key or 'the file'}: expected {expected}, got {input!r}{hint}"


# ---- what must fit together


def check_train(params: TrainParams) -> None:
    """Raise ParamsError for training parameters that cannot work together."""
    for problem in _train_problems(params):
        raise ParamsError(f"train.{problem}")


def as_train_params(section: TuningParams, train: TrainParams) -> TrainParams:
    """`train` with what the section of another training says otherwise, which keeps its last checkpoint and spreads no
    weights over GPUs."""
    same = {f.name for f in fields(section)} & {f.name for f in fields(train)}
    changes = {"keep_checkpoints": None, "resume_every": 1, "accelerate_config": None}
    return replace(train, **{name: getattr(section, name) for name in same}, **changes)


def _rloo_problems(params: Params) -> Iterator[str]:
    rloo = params.rloo
    step = rloo.prompts * rloo.samples
    if step % rloo.micro_batch_size:
        yield f"rloo.micro_batch_size {rloo.micro_batch_size} does not divide prompts x samples = {step}"
    if rloo.checkpoints > rloo.steps:
        yield f"rloo.checkpoints {rloo.checkpoints} are more than its {rloo.steps} steps"
    for name, weights in params.rloo_runs.items():
        if weights.steps is not None and rloo.checkpoints > weights.steps:
            yield f"rloo_runs.{name}.steps: rloo.checkpoints {rloo.checkpoints} are more than its {weights.steps} steps"
        if not any(weights.of_rewards.values()):
            yield f"rloo_runs.{name}: all weights are 0, so that there is nothing to learn"
        by = weights.scored_by or ""
        if bool(weights.reward_model) != (by in params.reward_runs or "/" in by):
            known = ", ".join(params.reward_runs)
            yield (
                f"rloo_runs.{name}.scored_by: a weight of reward_model needs one of {known}, or a folder with a /; no "
                "weight needs null"
            )


def _train_problems(params: TrainParams) -> Iterator[str]:
    per_pass = params.micro_batch_size * params.processes
    if params.batch_size % per_pass:
        yield (
            f"batch_size {params.batch_size} is not a multiple of micro_batch_size x processes = "
            f"{params.micro_batch_size} x {params.processes}: the global batch would depend on the machine"
        )
    if params.processes % params.machines:
        yield f"processes {params.processes} cannot be spread evenly over machines {params.machines}"
    weights = params.loss_weights
    if weights is not None and len(weights) != len(params.loss_type):
        yield f"loss_weights {weights} must have one weight per loss_type {params.loss_type}"
    if "exo_pair" in params.loss_type and params.label_smoothing == 0:
        yield "label_smoothing: the loss exo_pair needs more than 0, such as 1.0e-3"
    if "sft" in params.loss_type and params.segment_weight != 1:
        yield (
            f"segment_weight {params.segment_weight:g} would weigh the sft loss too, which is then no likelihood: "
            "use one of the two"
        )
    if params.load_in_4bit and not params.lora_r:
        yield "load_in_4bit keeps the base model frozen: it needs train.lora_r > 0"
    if params.accelerate_config and not (ROOT / params.accelerate_config).is_file():
        yield f"accelerate_config {params.accelerate_config} does not exist"


def has_secret(path: str) -> bool:
    """Whether a server's address holds a user, a password or a query: keys stand there, and a path gets into files."""
    return bool(re.match(r"https?://([^/?#]*@|[^#]*\?)", path, re.IGNORECASE))


def _problems(params: Params) -> Iterator[str]:
    """What is wrong with a parameter file although every value by itself is possible."""
    names, reference = params.iterations, params.self_feedback.reference
    paths = {f"{role}.path": getattr(params, role).path for role in ("policy", "labeler", "divider")}
    if params.evaluate.labeler:
        paths["evaluate.labeler.path"] = params.evaluate.labeler.path
    for name, item in params.benchmarks.items():
        paths |= {f"benchmarks.{name}.judge.base_url": item.judge.base_url or ""} if item.judge else {}
    for key, path in paths.items():  # not shown
        if has_secret(path):
            yield f"{key}: expected no user, password or query in an address: the key belongs into the environment"
        if key == "policy.path" and re.match("https?://", path, re.IGNORECASE):
            yield f"{key}: the policy is trained: give a folder or a hub id (policy.engine: vllm serves its answers)"
    yield from _split_problems(params)
    yield from _engine_problems(params)
    if params.policy.load_in_4bit:
        yield "policy.load_in_4bit: the policy is trained: write false here and, with LoRA, train.load_in_4bit: true"
    if not re.fullmatch(r"[A-Za-z_]\w*", params.server.key_variable, re.A):  # not shown: it may be the key
        yield "server.key_variable: expected the name of an environment variable, never the key itself"
    for name, item in names.items():
        if item.prev not in ("0", *names):
            yield f"iterations.{name}.prev: no iteration {item.prev!r} to start from"
        if int(item.prev) >= int(name):
            yield f"iterations.{name}.prev: {item.prev!r} is not before {name!r}"
    if reference not in (None, "0", *names):
        yield f'self_feedback.reference: no iteration {reference!r}; "0" is the base model'
    if params.pairs.source and len(names) > 1:
        yield f"pairs.source gives the pairs of one iteration: leave one of the {len(names)} under iterations"
    config = params.train.accelerate_config
    if config and not (ROOT / config).resolve().is_relative_to(ROOT.resolve()):
        yield f"train.accelerate_config: expected a file of the repository, got {config!r}"
    yield from (f"train.{problem}" for problem in _train_problems(params.train))
    yield from _sft_problems(params)
    yield from _reward_problems(params)
    yield from _rloo_problems(params)
    for name, item in params.benchmarks.items():
        yield from (f"benchmarks.{name}.{problem}" for problem in _benchmark_problems(item))


def _engine_problems(params: Params) -> Iterator[str]:
    """What a server that a stage starts cannot do."""
    models = {role: getattr(params, role) for role in ("policy", "labeler", "divider")}
    for name, model in (models | {"evaluate.labeler": params.evaluate.labeler}).items():
        if model and model.engine == "vllm" and re.match("https?://", model.path, re.IGNORECASE):
            yield f"{name}.engine: a model at an address is served already: write transformers"
        if model and model.engine == "vllm" and model.load_in_4bit:
            yield f"{name}.load_in_4bit: vllm reads checkpoints that are quantized already: write false"
    if params.policy.engine == "vllm":
        beams = {"evaluate": params.evaluate.beams} | {f"benchmarks.{k}": b.beams for k, b in params.benchmarks.items()}
        for name, count in beams.items():
            if count > 1:
                yield f"{name}.beams: a server samples and has no beams: write 1, or policy.engine: transformers"
        for name in ("generate", "evaluate"):
            if (penalty := getattr(params, name).repetition_penalty) != 1:
                yield (
                    f"{name}.repetition_penalty {penalty:g}: a server counts the prompt's words too, which is another "
                    "penalty: write 1.0, or policy.engine: transformers"
                )
    try:
        shlex.split(params.server.command)
    except ValueError as error:
        yield f"server.command: {error}"
    if missing := [name for name in ("path", "port", "name") if f"{{{name}}}" not in params.server.command]:
        yield f"server.command: has no {{{missing[0]}}}: it must say {{path}}, {{name}} and {{port}}"


def _sft_problems(params: Params) -> Iterator[str]:
    yield from _batch_problems("sft", params.sft)
    for name, part in params.sft_parts.items():
        needed = 2 if part.kind == "vqa_yes_no" else 1
        if len(part.files) != needed:
            yield f"sft_parts.{name}.files: {part.kind} is {needed} file{'s' * (needed - 1)}, got {len(part.files)}"


def _batch_problems(section: str, values: TuningParams) -> Iterator[str]:
    if values.batch_size % (values.micro_batch_size * values.processes):
        yield (
            f"{section}.batch_size {values.batch_size} is not a multiple of micro_batch_size x processes = "
            f"{values.micro_batch_size} x {values.processes}"
        )


def _split_problems(params: Params) -> Iterator[str]:
    """What does not fit how dev and test are judged: by annotations or, with `instances: null`, by claims."""
    dev, test = params.prepare.dev, params.prepare.test
    by_claims = dev.instances is None
    if by_claims != (test.instances is None):
        yield "prepare.dev.instances and prepare.test.instances: give both, or null in both to judge by claims"
    for name, split in (("dev", dev), ("test", test)):
        if split.captions and not split.instances:
            yield f"prepare.{name}.captions: without instances answers are judged by claims: write null"
    if params.evaluate.labeler and not by_claims:
        yield "evaluate.labeler judges claims, but prepare.test.instances says what is in the images: write null in one"
    if by_claims and params.train.keep_checkpoints:
        yield (
            "train.keep_checkpoints scores on dev while the policy trains, where there is no room for the models that "
            "judge by claims (prepare.dev.instances: null): write null, and fewer train.checkpoints_per_epoch"
        )


def _reward_problems(params: Params) -> Iterator[str]:
    reward = params.reward_model
    yield from _batch_problems("reward_model", reward)
    if "{}" not in reward.fact_line:
        yield f"reward_model.fact_line {reward.fact_line!r} has no {{}} for the fact"
    for name, run in params.reward_runs.items():
        if run.facts != "none" and not reward.facts_prompt:
            yield f"reward_runs.{name}.facts: {run.facts} needs reward_model.facts_prompt"
        if run.facts == "captions" and not reward.captions:
            yield f"reward_runs.{name}.facts: captions needs reward_model.captions, the file of them"
        if run.taste and reward.preferences:
            yield f"reward_runs.{name}.taste: {run.taste:g} is of embedded annotators: with preferences write 0.0"


def _benchmark_problems(item: BenchmarkParams) -> Iterator[str]:
    """An entry whose judge, truth, vocabulary or prompts are missing, or are not of its kind of benchmark."""
    kind = item.kind
    judged = kind in ("object_halbench", "mmhal", "refomb")
    looked_up = kind in ("chair", "object_halbench", "amber")
    if judged != (item.judge is not None):
        yield f"judge: {kind} {'needs a judge' if judged else 'has no judge: write null'}"
    if looked_up and not item.truth:
        yield f"truth: {kind} needs the files or the folder of its truth"
    if item.truth and not looked_up:
        yield f"truth: {kind} has its truth in questions: write []"
    if item.vocabulary and kind not in ("chair", "object_halbench"):
        yield f"vocabulary: {kind} has no synonym table: write null"
    if not item.questions and (item.answers is None or not looked_up):
        yield f"questions: expected at least one file of {kind}"
    if len(item.questions) > 1 and not looked_up:
        yield f"questions: {kind} takes one file an entry, got {len(item.questions)}"
    prompts = 2 if kind == "refomb" else 1
    if item.judge and len(item.judge.prompts) not in (0, prompts):
        yield f"judge.prompts: expected [] or {prompts} of the published scorer's files"
