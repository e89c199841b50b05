"""Whatever stands in the config file: a config that is within its limits, or one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from fuzzing import JSON, Outcomes, changed, check_sentence, damaged_file, examples
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_cmems import trainers
from nnunetv2_cmems.config import CONFIG_FILE, CONFIG_VARIABLE, CMEMSConfig, differences, load_config, with_overrides
from nnunetv2_cmems.errors import CMEMSError

DEFAULT = CMEMSConfig()
EXEMPLARS = [{"case": "a", "slice": 4}, {"case": "b", "slice": 0, "axis": "z"}, {"case": "c"}]
VALID: list[dict[str, Any]] = [
    {},
    DEFAULT.to_dict(),
    {**DEFAULT.to_dict(), "exemplar": EXEMPLARS},
    {"tau": 0.9, "synthesis": {"joint": {"rotation": 5}, "blend": 0}, "exemplar": EXEMPLARS[:1], "seed": 3},
    {"supervised": {"enabled": False}, "strong": {"gamma": [0.5, 2]}, "initial_lr": None, "image": {"weight": 2}},
    trainers.nnUNetTrainerCMEMS_paper.config.to_dict(),
]
FEW_KEYS = st.dictionaries(st.sampled_from(sorted(DEFAULT.to_dict())), JSON, max_size=3)
"""Real keys with arbitrary values."""


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)


def within_limits(config: Any) -> None:
    """Every number of a config lies where its field says, and is finite and of its type."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            within_limits(value)
        elif field.name == "exemplar":
            for spec in () if isinstance(value, str) else value:
                within_limits(spec)
        elif (limits := field.metadata.get("range")) is not None and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                assert limits[0] <= number <= limits[1] and math.isfinite(number) and not isinstance(number, bool)
        else:
            assert value is None or isinstance(value, (bool, str)), field.name


def overrides(config: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Partial overrides of a config that keep every limit."""
    hints = typing.get_type_hints(type(config))

    def values(field: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
        value, limits = getattr(config, field.name), field.metadata.get("range")
        options = typing.get_args(hints[field.name])
        if dataclasses.is_dataclass(value):
            return overrides(value)
        if field.name == "exemplar":
            return st.one_of(st.sampled_from(["auto", "all", "one"]), st.lists(st.sampled_from(EXEMPLARS), min_size=1, max_size=3))
        nothing = st.none() if type(None) in options else st.nothing()
        if limits is None:
            flag = isinstance(value, bool) or bool in options
            return st.booleans() | nothing if flag else st.sampled_from(options)
        whole = hints[field.name] is int or int in options
        number = st.integers(*limits) if whole else st.floats(*limits)
        if isinstance(value, tuple) or any(typing.get_origin(option) is tuple for option in options):
            return st.lists(number, min_size=2, max_size=2).map(sorted) | nothing
        return number | nothing

    return st.fixed_dictionaries({}, optional={field.name: values(field) for field in dataclasses.fields(config)})


CONTENTS = st.one_of(overrides(DEFAULT), st.sampled_from(VALID).flatmap(changed), FEW_KEYS)


def test_any_content(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    outcomes = Outcomes()

    @examples(150)
    @given(CONTENTS.flatmap(damaged_file))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        loaded = outcomes.of(lambda: load_config(DEFAULT, str(tmp_path)), str(path))
        if loaded is None:
            return
        config, source = loaded
        assert source == str(path)
        within_limits(config)
        hash(config)
        plain = config.to_dict()
        assert with_overrides(DEFAULT, json.loads(json.dumps(plain)), "f") == config
        assert differences(plain, config.to_dict()) == []

    check()
    outcomes.check()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "5000 digits"),
        (b'{"tau": 0.9, "tau": 0.5}', "the key 'tau' stands twice"),
        (b'{"image": {"weight": 1, "start": 0, "weight": 2}}', "the key 'weight' stands twice"),
        (b'{"exemplar": [{"case": "a", "a\\nb": 1}]}', "'exemplar[0].a\\nb'"),
        (b'{"' + b"x" * 5000 + b'": 1}', "unknown key 'xxx"),
        (b'{"tau": [' + b"1, " * 5000 + b"2]}", "'tau' must be a number, not [1, 1,"),
    ],
)
def test_content_that_was_found_by_fuzzing(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(content)
    with pytest.raises(CMEMSError) as caught:
        load_config(DEFAULT, str(tmp_path))
    check_sentence(str(caught.value), str(path), said)


def test_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b'\xef\xbb\xbf{"tau": 0.8}')
    assert load_config(DEFAULT, str(tmp_path))[0].tau == 0.8


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_file_is_not_passed_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / CONFIG_FILE
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "gone")
    with pytest.raises(CMEMSError) as caught:
        load_config(DEFAULT, str(tmp_path))
    check_sentence(str(caught.value), str(path))
