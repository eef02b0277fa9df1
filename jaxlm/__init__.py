"""jaxlm: train, run and export language models in JAX, sharded over a device mesh.

import jaxlm

model = jaxlm.load("runs/default")
print(jaxlm.generate(model, "def main(", max_new_tokens=64, temperature=0.8))
print(jaxlm.score(model, "import numpy as np").logprob)
"""

import importlib
import itertools
import os
import signal
import sys
from typing import TYPE_CHECKING

from jaxlm.huge_pages import ask_for_huge_pages

if TYPE_CHECKING:
    from jaxlm.api import (
        LanguageModel,
        Verification,
        export_checkpoint,
        load,
    )
    from jaxlm.errors import UserError
    from jaxlm.texts import Classification, Score, classify, generate, score, translate

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "LanguageModel",
    "Score",
    "UserError",
    "Verification",
    "classify",
    "export_checkpoint",
    "generate",
    "load",
    "score",
    "translate",
]

# A command imports for a second or two; Ctrl-C then ends it without a traceback, as it does later.
_is_command = any(
    option == "-m" and module.startswith(f"{__name__}.")
    for option, module in itertools.pairwise(sys.orig_argv)
)
if _is_command:
    ask_for_huge_pages()
    # XLA's C++ warns, in the middle of a run's lines, of what a user cannot change. 0 shows all.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Names are looked up on first use, so that importing jaxlm is quick and starts no device.
_HOMES = dict.fromkeys(__all__, "jaxlm.texts")
_HOMES |= dict.fromkeys(("LanguageModel", "Verification", "export_checkpoint", "load"), "jaxlm.api")
_HOMES["UserError"] = "jaxlm.errors"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
