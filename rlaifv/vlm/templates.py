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

    Setting the same twice changes nothing. Raises ValueError where there is no template, and for a variable that it
    does not read.
    """
    template = templated.chat_template
    if template is None:
        raise ValueError("it has no chat template: give the version of it that is made for chats (Instruct, Chat, it)")
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"the chat template reads no variable {name!r}")
    opening = with_variables(SYSTEM_TURN.format(text=literal(system)) if system else "", variables)
    if not template.startswith(opening):
        templated.chat_template = opening + template


def with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """A template whose variables have these values, whatever a caller gives them."""
    return "".join(f"{{%- set {name} = {literal(value)} %}}\n" for name, value in variables.items()) + template


def literal(value: Any) -> str:
    """A JSON-able value as it is written in a template."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
