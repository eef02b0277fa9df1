"""How a competitor answers requests; of the standard library, for those that run without jaxlm."""

import json
import os
import sys

MARK = "@reply "
"""What a line of a competitor's output starts with that is an answer; others are its log."""


def answer(side) -> None:
    """Answer requests from standard input, one JSON object a line, by methods of `side`."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(side, request.pop("do"))(**request)
        except Exception as error:  # the one who asks says it
            reply = {"error": f"{type(error).__name__}: {error}"}
        try:
            print(MARK + json.dumps(reply), flush=True)
        except BrokenPipeError:
            os._exit(1)  # who asked has gone
