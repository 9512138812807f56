"""Chats become text: by the tokenizer's own template where it has one, else as lines of `role: content`."""

from __future__ import annotations

from typing import Any

from llmprune.common.messages import first_line, shown

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT -> those chat templates know


class Templated(str):
    """Text of a chat template, which writes the special tokens itself: the tokenizer must not add its own."""


class Chats:
    """Renders chats for one tokenizer. `layout` is what the chats so far became, `template` or `plain`; None: there were none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.layout: str | None = None

    def __call__(self, messages: list[Any], where: str) -> str:
        """The text of a list of `{role, content}` or `{from, value}`. Raises `ValueError`, naming row and message, for anything else."""
        turns = [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
        if not turns:
            return ""  # skipped, as an empty document is
        if not getattr(self._tokenizer, "chat_template", None):
            self.layout = "plain"
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        self.layout = "template"
        try:
            # transformers renders in jinja's sandbox: a template cannot run code of its own.
            return Templated(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # a template raises what it likes
            line = first_line(error)
            raise ValueError(
                f"{where}: the tokenizer's chat template refuses this chat ({line}); mend or remove the row"
            ) from None


def _turn(message: Any, where: str) -> dict[str, str]:
    for who, what in _KEYS:
        if (
            isinstance(message, dict)
            and isinstance(message.get(who), str)
            and isinstance(message.get(what), str)
        ):
            return {"role": _ROLES.get(message[who], message[who]), "content": message[what]}
    raise ValueError(
        f"{where} is no {{role, content}} or {{from, value}} with texts, got {shown(message)}; mend or remove the row"
    )
