"""`python -m jaxlm.sample RUN --prompt=...`: what a trained model makes of texts.

A language model continues them as one reads, or answers in a chat; a translation model translates
them; a classifier names their labels.
"""

import argparse
import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxlm.api import LanguageModel, load
from jaxlm.cli import OneSentenceParser, run_command
from jaxlm.errors import UserError
from jaxlm.tasks.translation import languages_of
from jaxlm.texts import NoRoom, classify, generate, translate

# What a search takes; with any other setting a translation is sampled instead.
SEARCH = {"max_new_tokens", "num_beams", "length_penalty", "target", "say"}

# The tasks whose models go on with a text.
CONTINUES = "language_modelling", "instruction"


def main(argv: list[str]) -> None:
    """Answer the prompt, standard input, every prompt of a file, or each line typed."""
    settings = vars(_parser().parse_args(argv))
    places = [settings.pop(name, None) for name in ("run", "mesh", "dtype", "average_last")]
    step = settings.pop("step", "last")
    asked = {name: settings.pop(name, None) for name in ("prompt", "prompts", "out", "system")}
    chats = settings.pop("chat", False)
    _check_options(asked, chats)
    model = load(*places, step=step)
    _check_model(model, chats, settings)
    settings["say"] = _say
    if asked["prompts"] is not None:
        _answer_file(model, Path(asked["prompts"]), asked["out"], settings)
        return
    continues = not chats and model.config.task in CONTINUES
    if continues and model.tokenizer.chat_template:
        _say("the model has a chat template: this continues the text, --chat answers it")
    say = _Chat(model, asked["system"], settings) if chats else _Answer(model, settings)
    if asked["prompt"] is not None:
        say(_standard_input() if asked["prompt"] == "-" else asked["prompt"])
    else:
        _interact(say)


def _check_options(asked: dict, chats: bool) -> None:
    needs = (
        ("--out", asked["out"] is not None, "--prompts", asked["prompts"] is not None),
        ("--system", asked["system"] is not None, "--chat", chats),
    )
    for option, given, other, there in needs:
        if given and not there:
            raise UserError(f"{option} has no effect without {other}: give both or none")
    if asked["out"] is not None:
        out, prompts = (Path(asked[name]).expanduser().resolve() for name in ("out", "prompts"))
        if out == prompts:
            raise UserError(f"--out={asked['out']} is the file of --prompts: give another")
    if asked["prompts"] is not None and (chats or asked["prompt"] is not None):
        other = "--chat" if chats else "--prompt"
        raise UserError(f"--prompts answers a whole file: leave out {other}, or --prompts")


def _check_model(model: LanguageModel, chats: bool, settings: dict) -> None:
    model.check_says_something()
    task = model.config.task
    if task == "classification" and (settings or chats):
        option = "chat" if chats else min(settings)
        raise UserError(f"--{option} has no effect on a classifier: leave it out")
    if chats and (task == "translation" or not model.tokenizer.chat_template):
        raise UserError(
            "the model has no chat template, so it cannot chat: leave out --chat"
            + ("" if task == "translation" else ", or fine-tune it first by --task=instruction")
        )
    target = settings.get("target")
    if target is not None and task != "translation":
        raise UserError(f"--target={target} is for a translation model: leave it out")
    known = languages_of(model.tokenizer) if task == "translation" else ()
    if target is None and len(known) > 1:
        raise UserError(f"the model translates into {', '.join(known)}: choose one by --target=")


def _interact(say: Callable[[str], None]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    is_typed = sys.stdin.isatty()
    if is_typed:
        print("Type a prompt and press Enter; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if is_typed else "")
        except (EOFError, KeyboardInterrupt):
            if is_typed:
                print(file=sys.stderr)
            return
        if not line and is_typed:
            return
        if not line:
            continue
        try:
            say(line)
        except UserError as error:
            if not is_typed:
                raise
            print(f"error: {error}", file=sys.stderr)


def _standard_input() -> str:
    try:
        return sys.stdin.read().encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8: convert it first") from None


class _Answer:
    """Prints what a model makes of a text."""

    def __init__(self, model: LanguageModel, settings: dict):
        self._model, self._settings = model, settings

    def __call__(self, prompt: str) -> None:
        task = self._model.config.task
        if task in CONTINUES:
            pieces = _pieces(self._model, prompt, self._settings)
            print(prompt, end="", flush=True)
            _print(pieces)
            return
        (answer,) = _answers(self._model, [prompt], self._settings)
        if task == "translation":
            print(answer["text"])
        else:
            chances = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
            print(answer["label"], *(f"{name} {chance:.4f}" for name, chance in chances), sep="  ")


class _Chat:
    """Prints what the assistant answers, and remembers what was said."""

    def __init__(self, model: LanguageModel, system: str | None, settings: dict):
        self._model, self._settings = model, settings
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._said: list[dict] = []  # questions and answers in turn

    def __call__(self, text: str) -> None:
        question = {"role": "user", "content": text}
        # Where there is no room for all that was said, without the oldest.
        for first in range(0, len(self._said) + 1, 2):
            asked = [*self._system, *self._said[first:], question]
            try:
                pieces = _pieces(self._model, asked, self._settings)
                break
            except NoRoom:
                if first == len(self._said):
                    raise
        if first:
            _say("(the oldest messages are left out: the model has no room for all)")
        answer = {"role": "assistant", "content": _print(pieces)}
        self._said = [*self._said[first:], question, answer]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _pieces(model: LanguageModel, prompt, settings: dict) -> Iterator[str]:
    """The continuation as it comes, or at once where it is searched for."""
    if settings.get("num_beams", 1) == 1:
        return generate(model, prompt, stream=True, **settings)
    return iter([generate(model, prompt, **settings)])


def _print(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _answer_file(model: LanguageModel, file: Path, out: str | None, settings: dict) -> None:
    """Answer every prompt of a file, as JSON lines in its order."""
    # What others make of a prompt has the name `text`. Texts and talks are different calls.
    classifies = model.config.task == "classification"
    calls = [("prompt", "text")] if classifies else [("prompt",), ("messages",)]
    requests = list(_requests(file, [key for keys in calls for key in keys]))
    answers: dict[int, dict] = {}
    for keys in calls:
        prompts = {i: r[key] for i, r in enumerate(requests) for key in keys if key in r}
        found = _answers(model, [*prompts.values()], settings)
        answers |= dict(zip(prompts, found, strict=True))
    lines = (json.dumps(r | answers[i], ensure_ascii=False) for i, r in enumerate(requests))
    text = "".join(line + "\n" for line in lines)
    if out is None:
        print(text, end="")
        return
    try:
        Path(out).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror}") from error


def _answers(model: LanguageModel, prompts: list, settings: dict) -> list[dict]:
    """What a model makes of prompts, under the names that a line of results has."""
    if model.config.task == "classification":
        found = classify(model, prompts, say=_say)
        return [{"label": c.label, "probabilities": c.probabilities} for c in found]
    if model.config.task == "translation":
        sampled = {} if settings.keys() <= SEARCH else {"temperature": 1.0}
        found = translate(model, prompts, **sampled | settings)
    else:
        found = generate(model, prompts, **settings)
    return [{"text": text} for text in found]


def _requests(file: Path, keys: Sequence[str]) -> Iterator[dict]:
    """The prompts of a file: objects with one of `keys` where its name ends in .jsonl, else a
    prompt a line."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"cannot read --prompts={file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UserError(f"--prompts={file} is not UTF-8: convert it first") from None
    if lines == [""]:
        raise UserError(f"--prompts={file} has no prompts: write one a line")
    for number, line in enumerate(lines, 1):
        if file.suffix != ".jsonl":
            if not line:
                raise UserError(
                    f"line {number} of {file} is empty: write a prompt a line, or, for the empty "
                    'one, {"prompt": ""} in a .jsonl file'
                )
            yield {"prompt": line}
            continue
        try:
            request = json.loads(line)
        except ValueError:
            request = None
        if not isinstance(request, dict) or sum(key in request for key in keys) != 1:
            raise UserError(
                f"line {number} of {file} is not a JSON object with either {' or '.join(keys)}: "
                "write one a line"
            )
        yield request


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog="python -m jaxlm.sample",
        description="Continue, answer, translate or classify texts with a trained model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    defaults = {
        name: f"[{parameter.default}]"
        for name, parameter in inspect.signature(generate).parameters.items()
        if parameter.default is not None
    }

    def add(name: str, text: str, **options) -> None:
        default = defaults.get(name, "") if "type" in options else ""
        parser.add_argument(f"--{name}", help=f"{text} {default}".strip(), **options)

    where = "run folder, one of its step folders, or Hugging Face folder"
    parser.add_argument("run", metavar="RUN", help=where)
    add("prompt", "the text; - reads standard input; left out: ask for texts")
    add(
        "prompts",
        "file of texts, one a line, or .jsonl with prompt or messages (of a classifier, text); "
        "gives JSON lines",
    )
    add("out", "file for the results of --prompts; left out: standard output")
    add("chat", "answer as the assistant of a conversation", action="store_true")
    add("system", "what the conversation of --chat starts from")
    add("target", "translation: the language, such as de")
    add(
        "max_new_tokens",
        "tokens at most, if they fit the model; translations as many as fit",
        type=int,
    )
    add("temperature", "0 takes the likeliest token", type=float)
    add("top_k", "sample among the k likeliest tokens", type=int)
    add("top_p", "... among the likeliest that sum to p", type=float)
    add("min_p", "... above this share of the likeliest", type=float)
    add("repetition_penalty", "above 1 avoids tokens seen", type=float)
    add("num_beams", "above 1: beam search; translations take 4 where no sampling", type=int)
    add("length_penalty", "above 0 favours long texts; translations 0.6", type=float)
    add("stop", "end before this text; may be repeated", action="append")
    add("seed", "of the random numbers", type=int)
    add("mesh", "devices by axis, such as tp2; left out: one device")
    add("dtype", "float32 or bfloat16; left out: as trained")
    add("step", "of a run: last, best (validation) or a number [last]")
    add("average_last", "take the mean of the run's last N checkpoints", type=int, metavar="N")
    return parser


if __name__ == "__main__":
    run_command(main)
