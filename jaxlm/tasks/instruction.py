"""Instruction tuning: the assistant's turns of talks, which a chat template writes out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import chat
from jaxlm.chat import ROLES, Message
from jaxlm.config import Config
from jaxlm.data.examples import Example
from jaxlm.data.forms import Encoded, Examples, Origin
from jaxlm.data.records import Column, Record
from jaxlm.data.tokens import token_dtype
from jaxlm.errors import UserError, nearest
from jaxlm.tokenizer import Tokenizer

MESSAGES = Column("messages", "a field named messages", optional=True)
CONTENT = Column("content", "a field named content")
ROLE = Column("role", "a field named role")

Talk = tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Instruction(Examples):
    """Talks: records with `messages`, or with `prompt` and `completion` (a user, an assistant).

    Every assistant's turn and its end are predicted, nothing else. Talks that are too long for a
    row are left out.
    """

    bad = "empty, null, invalid UTF-8 or without an answer"

    @property
    def columns(self) -> tuple[Column, ...]:
        data = self.data
        return (
            Column("prompt", "data.source_column", data.source_column, 1, optional=True),
            Column("completion", "data.target_column", data.target_column, 2, optional=True),
            MESSAGES,
        )

    @property
    def controls(self) -> tuple[str, ...]:
        return chat.TURN_BEGINS, chat.TURN_ENDS

    def read(self, record: Record, origin: Origin) -> Talk:
        prompt, completion, messages = self.columns
        if messages.name in record.values:
            talk = read_messages(record.value(MESSAGES), record.where)
        elif {prompt.name, completion.name} <= record.values.keys():
            talk = (
                Message("user", record.text(prompt)),
                Message("assistant", record.text(completion)),
            )
        else:
            there = ", ".join(map(repr, record.fields[:8])) or "no such field"
            raise UserError(
                f"{record.where} has neither messages nor {prompt.field} and {completion.field} "
                f"but {there}: name them so, or set data.source_column and data.target_column"
            )
        if all(message.role != "assistant" for message in talk):
            raise record.bad("no turn is the assistant's", "add one")
        return talk

    def key(self, item: Talk) -> str:
        answer = next(n for n, message in enumerate(item) if message.role == "assistant")
        return "\n".join(m.content for m in item[:answer] if m.role == "user")

    def texts(self, item: Talk) -> Sequence[str]:
        return [message.content for message in item]

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        return chat.with_template(super().tokenizer(tokenizer))

    def dtypes(self, tokenizer: Tokenizer) -> dict[str, Any]:
        ids = token_dtype(tokenizer.vocab_size)
        return {"tokens": ids, "targets": ids, "weights": np.uint8}

    def encoding_facts(self, tokenizer: Tokenizer) -> dict[str, Any]:
        template = {"chat_template": tokenizer.chat_template}
        return super().encoding_facts(tokenizer) | template

    def encode(self, tokenizer: Tokenizer, items: Sequence[Talk]) -> list[Encoded]:
        return [self._encoded(tokenizer, item) for item in items]

    def _encoded(self, tokenizer: Tokenizer, item: Talk) -> Encoded:
        num_bytes = sum(len(text.encode()) for text in self.texts(item))
        ids, is_answer = chat.encode_talk(tokenizer, item)
        if len(ids) - 1 > self.seq_len:
            return Encoded(None, num_bytes)
        arrays = {"tokens": ids[:-1], "targets": ids[1:], "weights": is_answer[1:]}
        return Encoded(Example(arrays), num_bytes)


def read_messages(turns: Any, where: str) -> Talk:
    """The messages of a talk: objects with `role` and `content`. Raises UserError for others."""
    is_list = isinstance(turns, Sequence) and not isinstance(turns, str)
    if not is_list or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(
            f"{where}: messages holds {str(turns)[:40]!r}: write a list of objects with role and "
            "content"
        )
    return tuple(_message(turn, f"{where}, turn {n}") for n, turn in enumerate(turns, 1))


def _message(turn: Mapping[str, Any], where: str) -> Message:
    for name in ("role", "content"):
        if name not in turn:
            there = ", ".join(map(repr, turn)) or "nothing"
            raise UserError(
                f"{where} has no {name!r} but {there}: a message has a role and content"
            )
    values = {name: turn[name] for name in ("role", "content")}
    record = Record(where, values, list(turn))
    role = record.text(ROLE)
    if role not in ROLES:
        raise UserError(
            f"{where}: the role {role!r} is none of {', '.join(ROLES)}{nearest(role, ROLES)}"
        )
    return Message(role, record.text(CONTENT))


def make_form(config: Config) -> Instruction:
    """The form of a config's data."""
    return Instruction(config.data, seq_len=config.seq_len, names=())
