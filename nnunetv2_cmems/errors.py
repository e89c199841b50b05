"""Errors that a user can act on, shown as one sentence instead of a traceback."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, line breaks, lone surrogates


class CMEMSError(RuntimeError):
    """Bad input or a state that only the user can mend.

    The message is one sentence (or a few) that says what is wrong, in which file, and what to do. It is one line that can be
    printed anywhere, whatever stands in the names and values that it quotes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), message))


def is_printable(text: str) -> bool:
    """Whether a text has neither line breaks nor other characters that cannot be shown, or written into a file."""
    return _UNPRINTABLE.search(text) is None


def show_errors_as_sentences() -> None:
    """Let an uncaught :class:`CMEMSError` end the process with its message alone.

    nnU-Net's commands do not know our errors and would print a traceback. So does a file that nnU-Net misses
    because the data set is not planned, or that is no JSON, when it trains one of our trainers. Every other exception keeps the
    hook that was installed before. Calling this twice changes nothing.
    """
    previous = sys.excepthook
    if getattr(previous, "_shows_cmems_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = str(error) if isinstance(error, CMEMSError) else _not_planned(error) or _no_json(error, trace)
        if sentence:
            print(f"nnunetv2-cmems: {sentence}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._shows_cmems_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _not_planned(error: BaseException) -> str:
    """What to do about a missing file of nnU-Net's planning; "" for any other error or trainer."""
    if not isinstance(error, FileNotFoundError) or not _is_of_planning(path := str(error.filename or "")):
        return ""
    return f"{path} does not exist: the data set is not planned and preprocessed; run nnUNetv2_cmems plan_and_preprocess first."


def _no_json(error: BaseException, trace: TracebackType | None) -> str:
    """What to do about a file of nnU-Net's planning that nnU-Net cannot read; "" for any other error or trainer."""
    while isinstance(error, (ValueError, RecursionError, OSError)) and trace is not None:
        path = str(trace.tb_frame.f_locals.get("file", "")) if trace.tb_frame.f_code.co_name == "load_json" else ""
        if _is_of_planning(path):
            return f"{path} cannot be read as JSON ({first_line(error)}); correct it, or plan the data set again."
        trace = trace.tb_next
    return ""


def _is_of_planning(path: str) -> bool:
    """Whether this is a JSON file in ``nnUNet_preprocessed``, and one of our trainers is being trained."""
    folder = os.environ.get("nnUNet_preprocessed")
    if not (folder and path.endswith(".json") and any("nnUNetTrainerCMEMS" in word for word in sys.argv)):
        return False
    return os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: what fits into one sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return clipped(next((line for line in lines if line), type(error).__name__), 300)


def shown(value: Any, limit: int = 80) -> str:
    """A value as JSON has it, for a sentence: what is long is cut."""
    try:
        return clipped(json.dumps(value), limit)
    except (TypeError, ValueError, RecursionError):  # no JSON, a number of thousands of digits, nested without end
        return f"a {type(value).__name__}"


def clipped(text: str, limit: int = 80) -> str:
    """A text of at most so many characters: of a longer one, the beginning and dots."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def times(numbers: Iterable[float]) -> str:
    """Sizes or spacings for a sentence: ``8 x 1.5 x 1.5``."""
    return " x ".join(f"{n:.6g}" for n in numbers)
