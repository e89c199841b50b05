"""What the fuzzing tests share: valid objects that are changed in a few places, damaged files, and what a refusal has to look like.

``CMEMS_FUZZ=20`` tries 20 times as many examples, drawn afresh in each run; without it every run tries the same few.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from nnunetv2_cmems.errors import CMEMSError

EFFORT = int(os.environ.get("CMEMS_FUZZ", "1"))


def examples(number: int) -> settings:
    """Settings of a test that tries so many examples, or more where more is asked for."""
    return settings(
        max_examples=number * EFFORT,
        derandomize=EFFORT == 1,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


class Outcomes:
    """What a reader did with all examples: a property that never sees it succeed, or never sees it refuse, shows nothing."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def of(self, act: Callable[[], Any], *named: str) -> Any:
        """What ``act`` returns, or None where it refuses as it should; any other exception is the test's failure.

        Args:
            act: the reader.
            named: texts that the refusal has to name, such as the file.
        """
        try:
            result = act()
        except CMEMSError as error:
            check_sentence(str(error), *named)
            self.counts["refused"] += 1
            return None
        self.counts["taken"] += 1
        return result

    def check(self, share: float = 0.1) -> None:
        """Both outcomes must have had at least this share."""
        total = sum(self.counts.values())
        assert min(self.counts["taken"], self.counts["refused"]) >= share * total > 0, dict(self.counts)


def check_sentence(message: str, *named: str) -> None:
    """A refusal is one short line that ends with a full stop, names what it is about, and can be printed anywhere."""
    assert len(message.splitlines()) == 1, message
    assert message.endswith("."), message
    assert len(message) < 1500 and message.count("\\") < 60, message
    message.encode("utf-8")
    for text in named:
        assert text in message, (text, message)
    assert "Traceback" not in message and "<class" not in message and "object at 0x" not in message, message


# ------------------------------------------------------------------ JSON

_TEXTS = st.one_of(
    st.sampled_from(["", " ", "auto", "ignore", "background", "0", "1", "x", "z", "a\nb", "a\x00b", "../x", "{0}", "\ud800", "é\u2028"]),
    st.text(max_size=6),
)
_NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 0.5, 255, 2**31, 2**63, 10**30, 10**400, -0.0, 1e-30, 1e308, math.inf, math.nan, -math.inf]),
    st.integers(-3, 12),
    st.floats(0, 2),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
JSON = st.recursive(
    _SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXTS, inner, max_size=3)), max_leaves=6
)
"""Anything that JSON can say, and what Python's parser takes in addition."""


def nested(depth: int) -> Any:
    """Lists in lists, so deep."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def changed(draw: st.DrawFn, valid: Any, pool: st.SearchStrategy[Any] = JSON, most: int = 3) -> Any:
    """A JSON value with up to ``most`` changes at places anywhere in it; often with none.

    Args:
        draw: Hypothesis's.
        valid: the value to begin with, which stays as it is.
        pool: what may be put in.
        most: changes.
    """
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, most))):
        parent, key = draw(st.sampled_from(_places(value)))
        if parent is None:
            if draw(st.integers(0, 9)) == 0:
                return draw(pool)
            continue
        how = draw(st.sampled_from(["replace", "replace", "replace", "nudge", "remove", "rename", "double", "wrap"]))
        old = parent[key]
        if how == "remove":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            other = draw(st.one_of(_TEXTS, st.sampled_from(list(parent))))
            parent[other] = parent.pop(key)
        elif how == "double" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(old))
        elif how == "nudge" and isinstance(old, (int, float)):
            parent[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 1.5, float(old), str(old), bool(old)]))
        elif how == "wrap":
            parent[key] = [old]
        else:
            parent[key] = draw(pool)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value; (None, None) for the value itself."""
    found: list[tuple[Any, Any]] = [(None, None)]
    waiting = [value]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            found.append((parent, key))
            waiting.append(parent[key])
    return found


class _Short(bytes):
    """Bytes that do not fill the screen where a test fails."""

    def __repr__(self) -> str:
        return super().__repr__() if len(self) < 2000 else f"{bytes(self[:200])!r} ... ({len(self)} bytes)"


def damaged_file(content: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file, one time in three damaged or oddly written."""
    return _damaged_file(content).map(_Short)


@st.composite
def _damaged_file(draw: st.DrawFn, content: Any) -> bytes:
    text = json.dumps(content)
    how = draw(st.sampled_from([*["whole"] * 16, "cut", "byte", "utf-16", "bom", "twice", "deep", "digits", "latin-1", "empty"]))
    data = text.encode()
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "byte":
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        return data[:place] + draw(st.binary(min_size=1, max_size=1)) + data[place + 1 :]
    if how == "utf-16":
        return text.encode("utf-16")
    if how == "bom":
        return b"\xef\xbb\xbf" + data
    if how == "twice" and isinstance(content, dict) and content:
        key = draw(st.sampled_from(list(content)))
        return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw(JSON))}}}".encode()
    if how == "deep":
        depth = draw(st.sampled_from([50, 2000, 100_000]))
        return ("[" * depth + "]" * depth).encode() if draw(st.booleans()) else b'{"a":' * depth + b"1" + b"}" * depth
    if how == "digits":
        return text.replace("1", "1" * 5000).encode()
    if how == "latin-1":
        return json.dumps({"é": content}, ensure_ascii=False).encode("latin-1", "replace")
    return b"" if how == "empty" else data
