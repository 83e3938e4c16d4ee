"""Make a model's settings part of its chat template, so that all who render it show the same prompt.

The text of the loaded template is changed, and is saved with every checkpoint that is written: our prompts, a
trainer's and a server's are then the same.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

SYSTEM_TURN = (
    "{{%- if messages[0]['role'] != 'system' %}}"
    # a list where the chat has lists: the templates of models that see images read nothing else
    "{{%- set said = {text} if messages[0]['content'] is string else [{{'type': 'text', 'text': {text}}}] %}}"
    "{{%- set messages = [{{'role': 'system', 'content': said}}] + messages %}}"
    "{{%- endif %}}\n"
)


def set_template(
    templated: ProcessorMixin | PreTrainedTokenizerBase, variables: Mapping[str, Any], system: str | None
) -> None:
    """Give variables of a chat template these values, and begin a chat that has no system turn with this one.

    Setting the same twice changes nothing. Raises ValueError for a variable that the template does not read.
    """
    template, opening = templated.chat_template, ""
    for name, value in variables.items():
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"its chat template reads no {name!r}")
        opening += f"{{%- set {name} = {literal(value)} %}}\n"
    if system:
        opening += SYSTEM_TURN.format(text=literal(system))
    if not template.startswith(opening):
        templated.chat_template = opening + template


def literal(value: Any) -> str:
    """A JSON-able value as it is written in a template."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
