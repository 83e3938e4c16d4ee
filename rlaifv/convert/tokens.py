"""LLaVA's words: the SentencePiece model of its Llama as a tokenizer that transformers reads, with a place for images.

The original has no token for an image: it cuts the prompt apart at `<image>`, tokenizes the pieces, and puts the
image's features between their embeddings. Here `<image>` takes id 0, that of `<unk>`, which no text becomes (what is
no piece is spelled in bytes). No weight is added for it, so that every probability is the original's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from rlaifv.vlm.templates import literal

IMAGE = "<image>"

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
"""With this RLAIF-V is trained and evaluated, and LLaVA-RLHF evaluated."""

TEMPLATE = """\
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image> \\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}{{ SYSTEM + ' ' }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ said(message['content']) + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + said(message['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + said(message['content']) + '</s>' }}
{%- if not loop.last -%}{{ BETWEEN }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
"""The turns of the original's `llava_v1`. The space behind `<image>` becomes the `▁` that the original's text begins
with there."""


def chat_template(folder: Path, system: str) -> str:
    """The chat template of a model whose tokenizer has the settings in `folder`.

    A `legacy` tokenizer (so is one that does not say) begins the text behind every `</s>` with a `▁` as well.
    """
    between = " " if settings_of(folder).get("legacy", True) else ""
    return TEMPLATE.replace("SYSTEM", literal(system)).replace("BETWEEN", literal(between))


def settings_of(folder: Path) -> Mapping[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def read_tokenizer(folder: Path) -> LlamaTokenizer:
    """The tokenizer of `folder`'s tokenizer.model, which is read without the package sentencepiece.

    Padding is `</s>`, because `<image>` has the id of `<unk>`, the original's; it is masked in either case. Raises
    FileNotFoundError without the file, ValueError for one that is none of Llama's kind or has tokens of its own.
    """
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.model: fetch it again")
    model = import_protobuf().ModelProto()  # its error names protobuf, which comes with tensorboard
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class, which is no ValueError
        raise ValueError(f"{file} is no SentencePiece model: {error}") from None
    pieces = [piece.piece for piece in model.pieces]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if (
        pieces[:3] != ["<unk>", "<s>", "</s>"]
        or trainer.model_type != trainer.BPE
        or not trainer.byte_fallback
        or normalizer.precompiled_charsmap
        or not normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise ValueError(f"{file} is not of Llama's kind: byte-pair pieces with bytes, texts as they are")
    settings, added = settings_of(folder), folder / "added_tokens.json"
    own = {id: token["content"] for id, token in settings.get("added_tokens_decoder", {}).items()}
    own |= {id: token for token, id in json.loads(added.read_text()).items()} if added.is_file() else {}
    if strange := [token for id, token in own.items() if int(id) >= len(pieces)]:
        raise ValueError(f"{folder} has tokens that LLaVA-1.5 does not know: {', '.join(strange)}")
    vocabulary = {piece: id for id, piece in enumerate([IMAGE, *pieces[1:]])}
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, skip_tokens=[IMAGE, "<s>", "</s>"]),
        unk_token=None,
        pad_token="</s>",
        extra_special_tokens={"image_token": IMAGE},
        legacy=False,
        add_bos_token=True,
        padding_side="right",
        model_max_length=settings.get("model_max_length", 2048),
    )
