"""Errors that a user can act on, shown as one sentence instead of a traceback."""

from __future__ import annotations

import os
import sys
from types import TracebackType


class CMEMSError(RuntimeError):
    """Bad input or a state that only the user can mend.

    The message is one sentence (or a few) that says what is wrong, in which file, and what to do.
    """


def show_errors_as_sentences() -> None:
    """Let an uncaught :class:`CMEMSError` end the process with its message alone.

    nnU-Net's commands do not know our errors and would print a traceback. So does a file that nnU-Net misses
    because the data set is not planned, when it trains one of our trainers. Every other exception keeps the
    hook that was installed before. Calling this twice changes nothing.
    """
    previous = sys.excepthook
    if getattr(previous, "_shows_cmems_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = str(error) if isinstance(error, CMEMSError) else _not_planned(error)
        if sentence:
            print(f"nnunetv2-cmems: {sentence}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._shows_cmems_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _not_planned(error: BaseException) -> str:
    """What to do about a missing file of nnU-Net's planning; "" for any other error or trainer."""
    folder = os.environ.get("nnUNet_preprocessed")
    if not (folder and isinstance(error, FileNotFoundError) and any("nnUNetTrainerCMEMS" in word for word in sys.argv)):
        return ""
    path = str(error.filename or "")
    if not path.endswith(".json") or not os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep):
        return ""
    return f"{path} does not exist: the data set is not planned and preprocessed; run nnUNetv2_cmems plan_and_preprocess first."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: what fits into one sentence."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
