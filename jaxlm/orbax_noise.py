"""What Orbax and TensorStore print of a save that fails, kept from the user.

Every stage is logged, a failure's traceback several times over; and the arrays that are still
being written when the first one fails report to an event loop that is gone, each with a traceback
of its own. What a user has to know is in the UserError that `checkpoint` raises.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _not_about_orbax(record: logging.LogRecord) -> bool:
    # "Task exception was never retrieved" names its source, "Future exception ..." the folder:
    # both have Orbax's name in them.
    return "orbax" not in record.getMessage()


logging.getLogger("absl").addFilter(_not_from_orbax)
logging.getLogger("asyncio").addFilter(_not_about_orbax)


@contextlib.contextmanager
def late_reports_dropped() -> Iterator[None]:
    """While this is open, a callback that finds its event loop closed says nothing.

    Only callbacks of compiled code, which Python prints without an object; all else is printed
    as it was.
    """
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and (
            str(unraisable.exc_value) == "Event loop is closed"
        )
        if not (late and unraisable.object is None):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
