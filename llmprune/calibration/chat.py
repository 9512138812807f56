"""Turns chats into text: with the tokenizer's chat template, or as lines `role: content`.

`mode` is `auto` (the template where the tokenizer has one), `on` (there must be one) or `off` (lines).
"""

from __future__ import annotations

from typing import Any

from llmprune.common.messages import first_line, shown

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}  # role names of ShareGPT -> those of chat templates


def template_of(tokenizer: Any, mode: str) -> Any:
    """The chat template that is used; None or empty where chats become lines.

    Raises:
        ValueError: the mode is `on`, and the tokenizer has no template.
    """
    template = None if mode == "off" else getattr(tokenizer, "chat_template", None)
    if mode == "on" and not template:
        raise ValueError(
            "calibration.chat_template is on, and the tokenizer has no chat template; leave --chat-template "
            "out, or add a chat_template.jinja to the model's folder"
        )
    return template


class Templated(str):
    """Text made by a chat template. It has its special tokens already, so the tokenizer must not add any."""


class Chats:
    """Renders chats as text for one tokenizer.

    `layout` says how the chats so far were rendered, `template` or `plain`; None: there were none.
    """

    def __init__(self, tokenizer: Any, mode: str = "auto") -> None:
        self._tokenizer = tokenizer
        self._template = template_of(tokenizer, mode)
        self.layout: str | None = None

    def __call__(self, messages: list[Any], where: str) -> str:
        """The text of a chat.

        Args:
            messages: its messages, each `{role, content}` or `{from, value}` with texts.
            where: the row it stands in, for error messages.

        Raises:
            ValueError: a message is anything else, or the tokenizer's template refuses the chat.
        """
        turns = [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
        if not turns:
            return ""  # skipped later, like any empty document
        if not self._template:
            self.layout = "plain"
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        self.layout = "template"
        try:
            # transformers renders in jinja's sandbox, so a template cannot run code of its own.
            return Templated(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # templates may raise errors of any type
            line = first_line(error)
            raise ValueError(
                f"{where}: the tokenizer's chat template refuses this chat ({line}); mend or remove the row"
            ) from None


def _turn(message: Any, where: str) -> dict[str, str]:
    """A message as `{role, content}`. Raises `ValueError` where it has no role or no text."""
    fields = message if isinstance(message, dict) else {}
    for who, what in _KEYS:
        role, content = fields.get(who), fields.get(what)
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise ValueError(
        f"{where} is no {{role, content}} or {{from, value}} with texts, got {shown(message)}; mend or "
        "remove the row"
    )
