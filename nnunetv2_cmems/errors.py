"""Errors that a user can act on, shown as one sentence instead of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType


class CMEMSError(RuntimeError):
    """Bad input or a state that only the user can mend.

    The message is one sentence (or a few) that says what is wrong, in which file, and what to do.
    """


def show_errors_as_sentences() -> None:
    """Let an uncaught :class:`CMEMSError` end the process with its message alone.

    nnU-Net's commands do not know our errors and would print a traceback. Every other exception
    keeps the hook that was installed before. Calling this twice changes nothing.
    """
    previous = sys.excepthook
    if getattr(previous, "_shows_cmems_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, CMEMSError):
            print(f"nnunetv2-cmems: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._shows_cmems_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: what fits into one sentence."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
