"""YAML files that hold what a config can hold, and nothing twice."""

import json
import re
from pathlib import Path

import yaml

from jaxlm.errors import UserError, nearest_path

# What PyYAML says of a mistake, and what would be right.
HINTS = {
    r"'\t'": "; indent by spaces",
    "mapping values": "; keys of one section have the same indentation, and text with ': ' quotes",
    "another document": "; leave out the line ---",
}


def read_yaml(path: Path) -> dict:
    """A YAML mapping; empty for an empty file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_path(path, "*.yaml")
        raise UserError(f"config file {path} does not exist{near}") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"config file {path} is not UTF-8 (byte {error.start}): convert it first"
        ) from None
    try:
        content = yaml.load(text, Loader=Loader)
        json.dumps(content, default=str)  # refuses what a config cannot hold: dates as keys, cycles
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = next((hint for words, hint in HINTS.items() if words in error.problem), "")
        raise UserError(
            f"config file {path} is not valid YAML{line}: {error.problem}{hint}"
        ) from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config file {path} holds what a config cannot: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config file {path} holds {content!r}: write sections and keys")
    return content


class Loader(yaml.SafeLoader):
    """YAML with `3e-4` a number and a key given twice an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
        for key_node, _ in own:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `Loader` would take for a number."""


for _kind in (Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def dump_yaml(content: dict) -> str:
    """A mapping as YAML that `read_yaml` reads back to an equal one, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
