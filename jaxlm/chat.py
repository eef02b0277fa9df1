"""Talks as tokens, by a chat template: the Jinja text that transformers keeps beside a tokenizer.

Special pieces that the template spells become their ids. What a message says never does: one that
spells a special piece is encoded as the text it is.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.errors import UserError
from jaxlm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# The pieces of ChatML. A tokenizer that is learnt for talks has them; another's turns begin with
# its begin token and end with its end token.
TURN_BEGINS, TURN_ENDS = "<|im_start|>", "<|im_end|>"
TEMPLATE = """\
{%- for message in messages %}
    {{- BEGIN + message['role'] + '\\n' + message['content'] + END + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- BEGIN + 'assistant\\n' }}
{%- endif %}
"""
# Stand for special pieces that messages spell, while these are in a template's hands.
PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class Message:
    """One turn of a talk."""

    role: str
    """system, user or assistant."""
    content: str


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template: its own, or the default one, ChatML."""
    if tokenizer.chat_template:
        return tokenizer
    names = {i: name for name, i in tokenizer.special_ids.items()}
    begin, lead = f"'{TURN_BEGINS}'", "{{- bos_token }}\n"
    end = f"'{TURN_ENDS}'"
    if not tokenizer.special_ids.keys() >= {TURN_BEGINS, TURN_ENDS}:
        begin, lead = "bos_token", ""
        end = "bos_token" if tokenizer.eos_id is None else "eos_token"
    elif tokenizer.bos_id not in names:
        lead = ""
    return tokenizer.with_chat_template(lead + TEMPLATE.replace("BEGIN", begin).replace("END", end))


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a talk, up to where the assistant's next turn begins.

    Raises UserError for a talk that the template does not take.
    """
    talk = _Talk(tokenizer, messages)
    return talk.encode([talk.render(len(messages), prompt=True)])[0]


def turn_end(tokenizer: Tokenizer) -> int:
    """The id that ends an assistant's turn: where generation stops."""
    messages = [Message("user", "a"), Message("assistant", "b")]
    ids, is_answer = encode_talk(tokenizer, messages)
    return int(ids[is_answer][-1])


def encode_talk(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] of a whole talk, and which of them [n, bool] the assistant says.

    These are what each of its turns holds and the special piece that ends it. Raises UserError for
    a talk that the template does not take, and for a template that does not show where an answer
    begins and ends.
    """
    talk = _Talk(tokenizer, messages)
    text = talk.render(len(messages))
    cuts = [0]
    for number, message in enumerate(messages):
        if message.role == "assistant":
            start = len(talk.render(number, prompt=True, of=text))
            cuts += [start, talk.end_of_turn(text, start)]
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    encoded = talk.encode(parts)
    is_answer = [np.full(len(ids), number % 2 == 1) for number, ids in enumerate(encoded)]
    return np.concatenate([np.array(ids, np.int64) for ids in encoded]), np.concatenate(is_answer)


class _Talk:
    """A talk on its way through a template."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]):
        if not tokenizer.chat_template:
            raise UserError(
                "the model has no chat template, which reads messages: give it texts, or fine-tune "
                "it on messages first (--task=instruction with --init_from)"
            )
        self._tokenizer = tokenizer
        self._special = _pattern(tuple(tokenizer.special_ids))
        contents = "".join(message.content for message in messages)
        spelt = dict.fromkeys(self._special.findall(contents))
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in contents)
        self._hidden = dict(zip(spelt, free, strict=False))
        self._messages = [
            {"role": message.role, "content": self._hide(message.content)} for message in messages
        ]

    def _hide(self, content: str) -> str:
        return self._special.sub(lambda match: self._hidden[match[0]], content)

    def render(self, count: int, prompt: bool = False, of: str | None = None) -> str:
        """The first messages as text; with `of`, which is the whole, as the beginning of that."""
        template = _compiled(self._tokenizer.chat_template)
        try:
            text = template.render(
                **_special_names(self._tokenizer),
                messages=self._messages[:count],
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template can raise whatever Python does
            raise UserError(f"the chat template does not take this talk: {error}") from error
        if of is not None and not of.startswith(text):
            raise UserError(
                "the chat template does not begin an answer as it asks for one "
                f"({text[-40:]!r} with add_generation_prompt): use another template"
            )
        return text

    def end_of_turn(self, text: str, start: int) -> int:
        """Behind the special piece that ends the turn which begins at `start`."""
        if end := self._special.search(text, start):
            return end.end()
        raise UserError(
            "the chat template ends an answer without a special piece, so that nothing could end "
            "generation: use one that ends turns with a special token of the tokenizer"
        )

    def encode(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of each part of a rendered text."""
        shown = {hidden: piece for piece, hidden in self._hidden.items()}
        encoded = []
        for part in parts:
            ids, start = [], 0
            for special in self._special.finditer(part):
                ids += self._encode_text(part[start : special.start()], shown)
                ids.append(self._tokenizer.special_ids[special[0]])
                start = special.end()
            encoded.append(ids + self._encode_text(part[start:], shown))
        return encoded

    def _encode_text(self, text: str, shown: dict[str, str]) -> list[int]:
        return self._tokenizer.encode(text.translate(str.maketrans(shown))) if text else []


@functools.lru_cache(maxsize=8)
def _pattern(special: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """What templates call the special tokens."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    config = getattr(tokenizer, "config", {})
    others = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)}
    return others | {
        "bos_token": names.get(tokenizer.bos_id, ""),
        "eos_token": names.get(tokenizer.eos_id, ""),
    }


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    """As transformers compiles it. In the sandbox a template can neither change nor reach out.

    It cannot ask for the date either: the same talk always gives the same tokens.
    """

    def refuse(message: str):
        raise TemplateError(message)

    def to_json(value, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"the chat template is not Jinja ({error}): mend it") from error
