"""Load a vision-language model, format its chat, and tokenize prompt and answer jointly.

Everything that touches a checkpoint goes through this file, so that generation, feedback, training and chat see
the same bytes: the same chat template, the same begin and end tokens, the same image preprocessing.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from rlaifv import ROOT
from rlaifv.processors import load_processor

POINTER = "pointer.json"
"""A folder that holds this file stands for another checkpoint: `{"path": ..., "revision": ...}`."""


@dataclass(frozen=True)
class VLM:
    """A loaded model with everything that is needed to talk to it.

    `processor` is None for a text-only language model. `fingerprint` identifies weights, processor and chat
    template; every stored judgement or log-prob carries it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    name: str
    fingerprint: str
    eos_token_ids: list[int] = field(default_factory=list)

    @property
    def network(self) -> PreTrainedModel:
        """The transformers model itself, also where PEFT has wrapped it (adapters stay in effect)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def sees_images(self) -> bool:
        return self.processor is not None


def resolve_checkpoint(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """Follow `pointer.json` and make a folder path absolute; a hub id is returned as it is.

    Raises FileNotFoundError when `path` looks like a folder (it exists in no form and is no `owner/name`).
    """
    folder = Path(path) if Path(path).is_absolute() else ROOT / path
    if (folder / POINTER).is_file():
        pointer = json.loads((folder / POINTER).read_text())
        return resolve_checkpoint(pointer["path"], pointer.get("revision"))
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{path} is a folder but holds no config.json: it is not a checkpoint")
        return str(folder), None
    if path.count("/") != 1 or path.startswith((".", "/")) or (ROOT / path.split("/")[0]).is_dir():
        raise FileNotFoundError(f"no checkpoint at {path!r}: give a folder or a hub id such as owner/name")
    return path, revision


def write_pointer(folder: Path, path: str, revision: str | None) -> None:
    """Make `folder` stand for a checkpoint elsewhere; the fingerprint ties what depends on it to its bytes."""
    pointer = {"path": path, "revision": revision, "fingerprint": fingerprint_checkpoint(path, revision)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / POINTER).write_text(json.dumps(pointer) + "\n")


def fingerprint_checkpoint(path: str, revision: str | None = None) -> str:
    """16 hex digits that change with any byte of a local checkpoint, or with the commit of a hub one."""
    source, revision = resolve_checkpoint(path, revision)
    digest = hashlib.blake2b(digest_size=8)
    if not Path(source).is_dir():
        commit = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)._commit_hash
        digest.update(f"{source}@{commit}".encode())
        return digest.hexdigest()
    for file in sorted(Path(source).iterdir()):
        if file.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"}:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def load_vlm(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    adapter: str | None = None,
    attn_implementation: str = "sdpa",
    quantization: QuantizationConfigMixin | None = None,
) -> VLM:
    """Load a checkpoint folder or hub id, with an optional LoRA adapter, ready for inference.

    A VLM is loaded with its processor, a plain language model with its tokenizer only. `device` is "auto" (all
    visible accelerators, else CPU), "cpu", "cuda" or "cuda:K". `quantization` is how transformers should shrink the
    weights while it loads them. Only safetensors are read and no remote code runs.
    """
    source, revision = resolve_checkpoint(path, revision)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"cannot load a model from {path!r}: {first_line}") from None
    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    use_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    model = auto.from_pretrained(
        source,
        revision=revision,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        use_safetensors=True,
        trust_remote_code=False,
        device_map={"auto": "auto", "cuda": 0}.get(device, device) if use_cuda else quantization and {"": "cpu"},
        quantization_config=quantization,
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.eval().requires_grad_(False)
    processor = load_processor(source, revision) if multimodal else None
    tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    fingerprint = fingerprint_checkpoint(path, revision)
    if adapter is not None:
        fingerprint += "+" + fingerprint_checkpoint(adapter)
    return VLM(model, tokenizer, processor, path, fingerprint, end_token_ids(model, tokenizer))


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those of the generation config and the tokenizer's end token."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return [i for i in dict.fromkeys([*ids, tokenizer.eos_token_id]) if i is not None]


def prompt_text(
    vlm: VLM, question: str, *, image: bool = True, answer: str | None = None, prompt: str | None = None
) -> str:
    """The chat of one user turn, rendered by the checkpoint's own template; `prompt` is its text without the answer,
    for callers who have it.

    Without `answer` the text ends where the model's answer begins. With `answer` it goes on with the answer as the
    template renders it and ends with exactly one end token: the one of the model's that the template ends a turn with
    (Gemma's `<end_of_turn>`), else the tokenizer's. Some templates (LLaVA-1.5) end a turn without one, and a model
    trained on them never learns to stop.
    """
    content = [{"type": "image"}] if image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if not vlm.sees_images:
        messages = [{"role": "user", "content": question}]
    templated = vlm.processor or vlm.tokenizer
    if prompt is None:
        prompt = templated.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if answer is None:
        return prompt
    reply = [{"type": "text", "text": answer}] if vlm.sees_images else answer
    full = templated.apply_chat_template([*messages, {"role": "assistant", "content": reply}], tokenize=False)
    # the first place behind the prompt: a short answer ("end") may stand in the template's own end of turn as well
    start = full.find(answer, len(prompt)) if full.startswith(prompt) else full.rfind(answer)
    if start < 0:
        raise ValueError(f"the chat template of {vlm.name} changes the answer {answer[:40]!r}: cannot train on it")
    # what the template puts between the generation prompt and the answer (a space for LLaVA, nothing for Qwen)
    separator = full[len(prompt) : start] if full.startswith(prompt) else ""
    behind = full[start + len(answer) :].lstrip()
    ends = vlm.tokenizer.convert_ids_to_tokens(vlm.eos_token_ids)
    return prompt + separator + answer + next((end for end in ends if behind.startswith(end)), vlm.tokenizer.eos_token)


def special_tokens_needed(vlm: VLM, text: str) -> bool:
    """Whether the tokenizer must add its begin token, because the template has not written one."""
    bos = vlm.tokenizer.bos_token
    return not (bos and text.startswith(bos))


@dataclass(frozen=True)
class EncodedPrompt:
    """One image and question with the answers that follow it, tokenized jointly.

    `prompt_ids` is the prompt alone with its image placeholders expanded; `rows[i]` is prompt + answer i + end
    token; `answer_starts[i]` is the index in `rows[i]` of the first token that is not the prompt's. `inputs` holds
    what the processor made of the image (`pixel_values`, ...), with a batch of one.
    """

    prompt_ids: list[int]
    rows: list[list[int]]
    answer_starts: list[int]
    inputs: dict[str, torch.Tensor]


def encode(vlm: VLM, image: Image.Image | None, question: str, answers: list[str] | None = None) -> EncodedPrompt:
    """Tokenize a prompt and the answers to it; the image is preprocessed and its placeholders expanded once.

    The tokens are those of the whole text at once, never of prompt and answer apart. The processor only rewrites
    the image placeholder, so everything behind it is tokenized as plain text and put after the expanded part.
    """
    prompt = prompt_text(vlm, question, image=image is not None)
    special = special_tokens_needed(vlm, prompt)
    plain = vlm.tokenizer(prompt, add_special_tokens=special)["input_ids"]
    expanded, inputs = expand_image(vlm, image, prompt, special)
    expanded = expanded or plain
    head, kept = expanded_head(plain, expanded)
    rows, starts = [], []
    for answer in answers or []:
        text = prompt_text(vlm, question, image=image is not None, answer=answer, prompt=prompt)
        ids = vlm.tokenizer(text, add_special_tokens=special)["input_ids"]
        if ids[:kept] != plain[:kept]:
            raise ValueError(f"{vlm.name}: the answer {answer[:40]!r} changes tokens before the image")
        row = head + ids[kept:]
        rows.append(row)
        starts.append(common_length(row, expanded))
    return EncodedPrompt(expanded, rows, starts, inputs)


def encode_questions(vlm: VLM, image: Image.Image | None, questions: list[str]) -> EncodedPrompt:
    """Tokenize several prompts about one image; the image is preprocessed once.

    `rows` are the complete prompts, up to where the model's answer begins (so `answer_starts` are their lengths), and
    `prompt_ids` is what they have in common.
    """
    prompts = [prompt_text(vlm, question, image=image is not None) for question in questions]
    if not prompts:
        return EncodedPrompt([], [], [], {})
    special = special_tokens_needed(vlm, prompts[0])
    rows = vlm.tokenizer(prompts, add_special_tokens=special)["input_ids"]
    expanded, inputs = expand_image(vlm, image, prompts[0], special)
    head, kept = expanded_head(rows[0], expanded or rows[0])
    for question, row in zip(questions, rows, strict=True):
        if row[:kept] != rows[0][:kept]:
            raise ValueError(f"{vlm.name}: the question {question[:40]!r} changes tokens before the image")
    rows = [head + row[kept:] for row in rows]
    shared = min(common_length(rows[0], row) for row in rows)
    return EncodedPrompt(rows[0][:shared], rows, [len(row) for row in rows], inputs)


def expand_image(
    vlm: VLM, image: Image.Image | None, prompt: str, special: bool
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """A prompt's ids with its image placeholders expanded, and what the processor made of the image."""
    if image is None:
        return [], {}
    batch = vlm.processor(images=[image], text=[prompt], add_special_tokens=special, return_tensors="pt")
    dropped = ("input_ids", "attention_mask")
    return batch["input_ids"][0].tolist(), {
        key: value for key, value in batch.items() if key not in dropped and isinstance(value, torch.Tensor)
    }


def expanded_head(plain: list[int], expanded: list[int]) -> tuple[list[int], int]:
    """The expanded tokens up to where both agree until the end, and how many plain tokens they stand for.

    The tokens behind the image are the same in both: only what stands before them was expanded.
    """
    tail = common_length(plain[::-1], expanded[::-1])
    return expanded[: len(expanded) - tail], len(plain) - tail


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
