"""Load a checkpoint with its processor and chat template, the same for generation, feedback, training and chat."""

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME

import rlaifv.vlm.omnilmm  # noqa: F401  transformers' Auto classes know it from here on
from rlaifv import ROOT
from rlaifv.records import ModelRecord, json_object
from rlaifv.vlm.chat_format import Reader, prompt_text, shows_images, thinks_first
from rlaifv.vlm.checkpoint import TEXT_FILES, find_checkpoint, fingerprint_checkpoint
from rlaifv.vlm.processors import load_processor
from rlaifv.vlm.templates import set_template

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VLM(Reader):
    """A loaded model with everything that is needed to talk to it.

    `fingerprint` identifies weights, processor and chat template; every stored judgement or log-prob carries it.
    """

    model: PreTrainedModel
    fingerprint: str

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, also where PEFT has wrapped it (adapters stay in effect)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_vlm(
    path: str,
    *,
    revision: str | None = None,
    dtype: str | None = "float32",
    device: str = "auto",
    adapter: str | None = None,
    load_in_4bit: bool = False,
    settings: Mapping[str, Any] = {},
    must_see: bool = False,
) -> VLM:
    """Load a checkpoint folder or hub id, with an optional LoRA adapter, ready for inference.

    A VLM is loaded with its processor, a plain language model with its tokenizer only. `device` is "auto" (all
    visible accelerators, else CPU), "cpu", "cuda" or "cuda:K"; `dtype` None is bfloat16 on an accelerator and float32
    on a CPU. `settings` are those of `ModelRecord.settings`. Only safetensors are read and no remote code runs. With
    `must_see`, a model without images is a ValueError before its weights are read.

    Raises, all in one line: FileNotFoundError for what is no checkpoint, ValueError for settings that it does not have,
    for weights that are not all there (`load_weights`) and for a large model that "auto" would run on the CPU,
    ModuleNotFoundError for 4 bits without bitsandbytes.
    """
    folder, settings = find_checkpoint(path, revision, settings)
    config = read_config(folder, path)
    if must_see:
        refuse_blind(config, path)
    refuse_cpu(config, path, device, load_in_4bit)
    reader = read(folder, config, path, settings)
    dtype = getattr(torch, dtype or ("bfloat16" if on_gpu(device) else "float32"))
    model = load_weights(
        auto_class(config),
        folder,
        path,
        dtype=dtype,
        device_map=placement(config, device, dtype, load_in_4bit),
        quantization_config=four_bits(dtype) if load_in_4bit else None,
    )
    if adapter is not None:
        model = add_adapter(model, adapter)
    # cuDNN plans for 1.5 to 2.7 s for every new shape of a batch (H200), and is no faster than the other kernels then
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "image_grid_pinpoints" in settings.get("processor", {}):  # LLaVA-NeXT's model cuts its tiles apart by them
        model.config.image_grid_pinpoints = reader.processor.image_processor.image_grid_pinpoints
    model.eval().requires_grad_(False)
    devices = ", ".join(dict.fromkeys(str(weight.device) for weight in model.parameters()))
    kept = f"{'4 bits and ' if load_in_4bit else ''}{str(dtype).removeprefix('torch.')}"
    log.info(f"{path} on {devices} in {kept}, {rounded(model.num_parameters())} parameters")
    fingerprint = fingerprint_checkpoint(str(folder), settings=settings)
    if adapter is not None:
        fingerprint += "+" + fingerprint_checkpoint(adapter)
    ends = end_token_ids(model.generation_config, reader.tokenizer)
    return VLM(model=model, fingerprint=fingerprint, **vars(reader) | {"eos_token_ids": ends})


def load_weights(kind: type, folder: Path, path: str, **options: Any) -> PreTrainedModel:
    """`from_pretrained` of one of transformers' classes, which alone would give weights that the files lack random
    values and go on; `path` is how messages name the checkpoint.

    Raises ValueError, in one line, for weights that are missing, renamed or of another shape, and for a broken file.
    What is tied to a weight that is there, and what no checkpoint holds, counts as there.
    """
    options |= {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "sdpa"}
    said = logging.getLogger("transformers.modeling_utils")
    said.addFilter(is_no_table)
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise ValueError(f"{path}: its weights cannot be read ({error}): fetch or write them again") from None
    finally:
        said.removeFilter(is_no_table)
    shapes = [f"{name} {tuple(there)} instead of {tuple(ours)}" for name, there, ours in found["mismatched_keys"]]
    check_weights(path, found["missing_keys"], found["unexpected_keys"], shapes)
    return model


def add_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with a LoRA adapter merged into its weights; ValueError for one that does not fit all of them."""
    from peft import PeftConfig, PeftModel

    with_adapter = PeftModel(model, PeftConfig.from_pretrained(adapter))
    try:
        found = with_adapter.load_adapter(adapter, "default")
    except RuntimeError as error:  # another shape
        raise ValueError(f"the adapter {adapter} is another model's: {' '.join(str(error).split())[:300]}") from None
    check_weights(f"the adapter {adapter}", found.missing_keys, found.unexpected_keys)
    return with_adapter.merge_and_unload()


def check_weights(who: str, missing: Collection[str], unknown: Collection[str], shapes: Collection[str] = ()) -> None:
    """ValueError unless every weight of a model came from its files; one that is in the files alone gets a warning."""
    problems = [f"lacks {named(missing)}"] if missing else []
    problems += [f"has {named(shapes)}"] if shapes else []
    if problems:
        problems += [f"holds {named(unknown)} under names that the model does not know"] if unknown else []
        raise ValueError(
            f"{who} {' and '.join(problems)}: these weights would be random; fetch it again, or convert it into the "
            "layout that transformers reads"
        )
    if unknown:
        log.warning(f"{who} holds {named(unknown)} that the model has no use for")


def named(weights: Collection[str]) -> str:
    """How many weights, and the first three of them."""
    first = ", ".join(sorted(weights)[:3]) + (", …" if len(weights) > 3 else "")
    return f"{len(weights)} weight{'s' * (len(weights) > 1)} ({first})"


def is_no_table(record: logging.LogRecord) -> bool:
    """Whether a log record is not transformers' table of the weights that `check_weights` names."""
    return "LOAD REPORT" not in (text := record.getMessage()) or "CONVERSION" in text


def load_reader(path: str, revision: str | None = None, settings: Mapping[str, Any] = {}) -> Reader:
    """What a checkpoint reads with: its tokenizer, processor and chat template with these settings.

    Weights are neither fetched nor read. Raises FileNotFoundError for what is no checkpoint and ValueError for one
    without chat template and for settings that it does not have; in one line.
    """
    folder, settings = find_checkpoint(path, revision, settings, files=TEXT_FILES)
    return read(folder, read_config(folder, path), path, settings)


def check_model(model: ModelRecord, role: str) -> None:
    """Refuse in seconds, before weights are fetched or read, a model that cannot play its role in a run.

    Raises FileNotFoundError or ValueError, one line with the way out: policy and labeler must see images, all must
    answer without thinking aloud, and "auto" must find a GPU for a large one.
    """
    folder, settings = find_checkpoint(model.path, model.revision, model.settings, files=TEXT_FILES)
    config, who = read_config(folder, model.path), f"{role} {model.path}"
    if role != "divider":
        refuse_blind(config, who)
    refuse_cpu(config, who, model.device, model.load_in_4bit)
    if model.load_in_4bit:
        four_bits(torch.bfloat16)
    reader = read(folder, config, who, settings)
    if role != "divider" and not shows_images(reader):
        raise ValueError(f"{who}: its chat template gives an image no place: it is not made for chats about images")
    if settings.get("template", {}).get("enable_thinking") or thinks_first(reader):
        switch = "enable_thinking" in (reader.processor or reader.tokenizer).chat_template
        way_out = f"write {role}.template: {{enable_thinking: false}}" if switch else "use its version that does not"
        raise ValueError(f"{who} thinks aloud before it answers: {way_out}")


def read_config(folder: Path, path: str) -> PreTrainedConfig:
    """The configuration in a checkpoint's folder.

    Raises, in one line, FileNotFoundError where there is none that is known and ValueError for what transformers would
    load as something else: the original layout of LLaVA and OmniLMM, and a folder with a LoRA adapter.
    """
    refuse_other_layouts(folder, path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"cannot load a model from {path!r}: {first_line}") from None


def refuse_other_layouts(folder: Path, path: str) -> None:
    """ValueError for a checkpoint that has to be rewritten first, naming the command that does it."""
    own = json_object((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    original = "mm_vision_tower" in own or own.get("model_type") == "omnilmm"
    if original and "text_config" not in own:
        raise ValueError(
            f"{path} is in the layout of the original LLaVA code, which transformers does not load: "
            f"`python -m rlaifv.convert {path} OUT` writes it anew, then give OUT"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds a LoRA adapter: `python -m rlaifv.training.checkpoints MODEL {path} OUT` adds it to the "
            "model that it was trained on, then give OUT (or take adapter_config.json away if it is in the weights)"
        )


def read(folder: Path, config: PreTrainedConfig, path: str, settings: Mapping[str, Any]) -> Reader:
    """`load_reader` of a folder that is there; `path` is how messages name it."""
    multimodal = auto_class(config) is AutoModelForImageTextToText
    try:
        if "processor" in settings and not multimodal:
            raise ValueError("it sees no images, so it has no settings for them: write processor: {}")
        processor = load_processor(folder, settings.get("processor", {})) if multimodal else None
        tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(folder)
        set_template(processor or tokenizer, settings.get("template", {}), settings.get("system"))
    except (OSError, TypeError, ValueError) as error:
        files = sorted(folder.glob("*.json"))
        broken = [file.name for file in files if not json_object(file.read_text("utf-8", "replace"))]
        which = f"{', '.join(broken)} cannot be read: fetch or write it again; " if broken else ""
        raise ValueError(f"{path}: {which}{str(error).strip().splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    own = folder / GENERATION_CONFIG_NAME
    generation = GenerationConfig.from_pretrained(folder) if own.is_file() else None
    ends = end_token_ids(generation, tokenizer)
    context = context_length(config)
    reader = Reader(tokenizer=tokenizer, processor=processor, name=path, eos_token_ids=ends, context=context)
    if settings.get("system") and settings["system"] not in prompt_text(reader, "Is it?", image=False):
        raise ValueError(f"{path}: its chat template leaves system turns out: write system: null")
    return reader


def auto_class(config: PreTrainedConfig) -> type:
    """Which of transformers' classes loads a model: one that sees images, or a plain language model."""
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that a language model was made for; None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def refuse_blind(config: PreTrainedConfig, who: str) -> None:
    """ValueError for a model that sees no images."""
    if auto_class(config) is AutoModelForCausalLM:
        raise ValueError(f"{who} is a {config.model_type} model that sees no images: give a vision-language model")


LARGE = 1e9
"""Parameters above which a model runs on a CPU only when that is asked for."""


def on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def refuse_cpu(config: PreTrainedConfig, who: str, device: str, load_in_4bit: bool) -> None:
    """ValueError where `auto` would run a large model, or one in 4 bits, on the CPU without a word."""
    if device != "auto" or on_gpu(device):
        return
    count = count_parameters(config)
    if load_in_4bit or count > LARGE:
        raise ValueError(
            f"{who} has {rounded(count)} parameters and torch {torch.__version__} finds no GPU for it (nvidia-smi: is "
            "there one, is its driver too old?): mend that, or write device: cpu to wait for a CPU"
        )


def placement(config: PreTrainedConfig, device: str, dtype: torch.dtype, load_in_4bit: bool) -> Any:
    """transformers' `device_map`. `auto` spreads a model over several GPUs only where the first has no room for it."""
    if not on_gpu(device):
        return {"": "cpu"} if load_in_4bit else None
    if device == "auto" and torch.cuda.device_count() > 1:
        need = count_parameters(config) * (0.6 if load_in_4bit else dtype.itemsize)
        return "auto" if need > 0.7 * torch.cuda.mem_get_info(0)[0] else 0
    return 0 if device in ("auto", "cuda") else device


def count_parameters(config: PreTrainedConfig) -> int:
    """The parameters of a model, counted without memory for them."""
    with torch.device("meta"):
        return auto_class(config).from_config(config).num_parameters()


def rounded(parameters: int) -> str:
    """7.1 B, 1.5 M."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"


def load_model(model: ModelRecord, folder: Path | None = None) -> VLM:
    """Load the model that plays a role in this run; `folder` is read in its place (a policy of an earlier iteration).

    Raises FileNotFoundError for a folder that is not there yet, ValueError when the checkpoint is not the one that the
    stage `models` found: what was computed with it before would be mixed with another model's.
    """
    path, revision, settings = source(model, folder)
    in_4_bits = model.load_in_4bit and not folder
    vlm = load_vlm(
        path, revision=revision, dtype=model.dtype, device=model.device, load_in_4bit=in_4_bits, settings=settings
    )
    check_unchanged(model, folder, vlm.fingerprint)
    return vlm


def source(model: ModelRecord, folder: Path | None) -> tuple[str, str | None, dict[str, Any]]:
    """Path, revision and settings of `load_model`'s checkpoint; a policy that was trained has its settings in its
    files."""
    if folder is None:
        return model.path, model.revision, model.settings
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint {folder.relative_to(ROOT)} yet: run the stages before (dvc repro)")
    return str(folder), None, {}


def check_unchanged(model: ModelRecord, folder: Path | None, fingerprint: str) -> None:
    """ValueError unless a checkpoint is the one that the stage `models` found."""
    if folder is None and fingerprint != model.fingerprint:
        raise ValueError(f"{model.path} has changed since the stage models looked at it: run `dvc repro -f models`")


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers shrinks weights to 4 bits while it loads them: QLoRA's nf4, computed in `dtype`."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


class Held(Generic[T]):
    """A model that is loaded when it is first asked for; a copy in another process loads one for itself."""

    def __init__(self, load: Callable[[], T]) -> None:
        self._load, self._model = load, None

    def __call__(self) -> T:
        if self._model is None:
            self._model = self._load()
        return self._model

    def __reduce__(self) -> tuple:
        return Held, (self._load,)

    def drop(self) -> None:
        if hasattr(self._model, "close"):  # a server of our own
            self._model.close()
        self._model = None
        free_memory()


@contextmanager
def loaded(load: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """A model for the time of a `with`: `load` is called when it is first asked for, and afterwards its memory is free
    for the next one.

        with loaded(partial(load_model, record)) as policy:
            answer(policy(), ...)    # give no name to what policy() returns: a name would keep it
    """
    model = Held(load)
    try:
        yield model
    finally:
        model.drop()


def free_memory() -> None:
    """Give back what models that nobody uses any more still hold: they are parts of cycles, and PyTorch keeps their
    GPU memory for itself."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def end_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the generation config and the tokenizer's end token."""
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]
