"""The config: what may be overridden, by which file, and what is said when it does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_cmems import trainers
from nnunetv2_cmems.config import (
    CONFIG_FILE,
    CONFIG_VARIABLE,
    CMEMSConfig,
    ExemplarSpec,
    ScanLabelsConfig,
    TermConfig,
    differences,
    load_config,
    with_overrides,
)
from nnunetv2_cmems.errors import CMEMSError

DEFAULT = CMEMSConfig()
PRESETS = {name: getattr(trainers, name).config for name in trainers.__all__}


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)


def change_everything(values: dict[str, Any]) -> dict[str, Any]:
    """Another valid value for every entry of a config's plain dict."""
    others: dict[str, Any] = {
        "exemplar": [{"case": "b", "slice": 2, "axis": None}],
        "best_checkpoint": "validation_dice",
        "optimizer": "sgd",
        "initial_lr": 0.25,
        "low_resolution": 3.5,
        "architecture": "mixed",
        "consistency": "mean_squared_error",
        "pseudo_dice": "all",
        "rampup_shape": "gaussian",
        "at": [0.25, 0.75, 0.875],
        "organ_scale": [0.5, 1.75],
        "arranged_only": True,
        "told_apart_only": True,
    }
    changed = {}
    for key, value in values.items():
        if key in others:
            changed[key] = others[key]
        elif isinstance(value, dict):
            changed[key] = change_everything(value)
        elif isinstance(value, bool):
            changed[key] = key == "enabled" or not value  # a config that learns nothing is refused
        elif isinstance(value, list):
            changed[key] = [0.5, 1.75]
        elif isinstance(value, float):
            changed[key] = value / 2 or 0.25
        else:
            changed[key] = 3 if value is None else value + 1
    return changed


# what is replaced, what is kept


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_of_every_preset(preset: str) -> None:
    plain = PRESETS[preset].to_dict()
    assert plain == json.loads(json.dumps(plain))
    assert with_overrides(DEFAULT, plain, "f") == PRESETS[preset]


def test_round_trip_of_a_config_that_differs_everywhere() -> None:
    plain = change_everything(DEFAULT.to_dict())
    config = with_overrides(DEFAULT, plain, "f")
    assert config.to_dict() == plain
    assert config.exemplar == (ExemplarSpec("b", 2, None),)
    assert config.strong.gamma == (0.5, 1.75)
    hash(config)  # no list has slipped into the frozen dataclass


def test_nested_partial_overrides_keep_the_rest() -> None:
    config = with_overrides(DEFAULT, {"tau": 0.8, "synthesis": {"joint": {"rotation": 5}, "blend": 0}}, "f")
    synthesis = dataclasses.replace(DEFAULT.synthesis, joint=dataclasses.replace(DEFAULT.synthesis.joint, rotation=5.0), blend=0.0)
    assert config == dataclasses.replace(DEFAULT, tau=0.8, synthesis=synthesis)
    assert isinstance(config.synthesis.joint.rotation, float)


def test_overrides_change_neither_base_nor_dict() -> None:
    overrides = {"synthesis": {"adapt": 0.0}, "exemplar": [{"case": "a", "slice": 0}]}
    before = json.dumps(overrides)
    with_overrides(DEFAULT, overrides, "f")
    assert json.dumps(overrides) == before and DEFAULT == CMEMSConfig()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", "auto"),
        ([{"case": "a", "slice": 4}], (ExemplarSpec("a", 4, None),)),
        (
            [{"case": "a", "slice": 0, "axis": "z"}, {"case": "b", "slice": 1, "axis": None}],
            (ExemplarSpec("a", 0, "z"), ExemplarSpec("b", 1)),
        ),
    ],
)
def test_exemplars(value: Any, expected: Any) -> None:
    assert with_overrides(DEFAULT, {"exemplar": value}, "f").exemplar == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("tau", 0), ("tau", 1), ("num_members", 1), ("num_members", 4), ("seed", None), ("seed", 2**31 - 1)],
)
def test_limits_themselves_are_allowed(key: str, value: Any) -> None:
    assert getattr(with_overrides(DEFAULT, {key: value}, "f"), key) == value


# what is refused


@pytest.mark.parametrize(
    ("overrides", "key", "phrase"),
    [
        ({"taw": 0.9}, "'taw'", "unknown key"),
        ({"synthesis": {"joint": {"rotate": 3}}}, "'synthesis.joint.rotate'", "unknown key"),
        ({"exemplar": [{"case": "a", "slice": 1, "side": "z"}]}, "'exemplar[0].side'", "unknown key"),
        ({"tau": "high"}, "'tau'", "a number"),
        ({"tau": True}, "'tau'", "a number"),
        ({"tau": None}, "'tau'", "a number"),
        ({"tau": [0.5]}, "'tau'", "a number"),
        ({"num_members": 2.0}, "'num_members'", "a whole number"),
        ({"num_members": True}, "'num_members'", "a whole number"),
        ({"exemplar_batch": "4"}, "'exemplar_batch'", "a whole number or null"),
        ({"allow_missing_classes": 1}, "'allow_missing_classes'", "true or false"),
        ({"image": {"enabled": "no"}}, "'image.enabled'", "true or false"),
        ({"best_checkpoint": "loss"}, "'best_checkpoint'", '"agreement" or "validation_dice"'),
        ({"exemplar": "manual"}, "'exemplar'", '"auto"'),
        ({"exemplar": []}, "'exemplar'", "a list of annotated slices"),
        ({"exemplar": {"case": "a", "slice": 1}}, "'exemplar'", "a list of annotated slices"),
        ({"exemplar": ["a"]}, "'exemplar[0]'", "must name a case"),
        ({"exemplar": [{"case": "a", "slice": 1}, {"slice": 2}]}, "'exemplar[1]'", "must name a case"),
        ({"exemplar": [{"case": "a", "axis": "z"}]}, "'exemplar[0]'", "an axis but no slice"),
        ({"exemplar": [{"case": 7, "slice": 1}]}, "'exemplar[0].case'", "a text"),
        ({"exemplar": [{"case": "a", "slice": 1, "axis": "w"}]}, "'exemplar[0].axis'", '"x" or "y" or "z"'),
        ({"exemplar": [{"case": "a", "slice": -1}]}, "'exemplar[0].slice'", "not between"),
        ({"strong": {"gamma": 2.0}}, "'strong.gamma'", "a list of 2 numbers"),
        ({"strong": {"gamma": [2.0]}}, "'strong.gamma'", "a list of 2 numbers"),
        ({"strong": {"gamma": [0.5, 1, 2]}}, "'strong.gamma'", "a list of 2 numbers"),
        ({"strong": {"gamma": [0.5, "2"]}}, "'strong.gamma'", "a list of 2 numbers"),
        ({"strong": {"gamma": [2.0, 0.5]}}, "'strong.gamma'", "must not exceed"),
        ({"strong": {"gamma": [0.5, 99]}}, "'strong.gamma'", "not between 0.05 and 20"),
        ({"strong": 3}, "'strong'", "a JSON object"),
        ({"synthesis": {"joint": [1]}}, "'synthesis.joint'", "a JSON object"),
        ({"tau": 1.01}, "'tau'", "not between 0 and 1"),
        ({"num_members": 0}, "'num_members'", "not between 1 and 4"),
        ({"initial_lr": -0.1}, "'initial_lr'", "not between"),
        ({"image": {"rampup": 1.5}}, "'image.rampup'", "not between"),
        ({"synthesis": {"separate": {"scale": [0.0, 1.0]}}}, "'synthesis.separate.scale'", "not between"),
        ({"tau": float("nan")}, "'tau'", "a number"),
        ({"strong": {"gamma": [0.5, float("nan")]}}, "'strong.gamma'", "numbers"),
        ({"initial_lr": float("inf")}, "'initial_lr'", "not between"),
        ([{"tau": 1}], "the file's content", "a JSON object"),
        (None, "the file's content", "a JSON object"),
        ({"supervised": {"enabled": False}, "synthetic": {"enabled": False}}, "'supervised'", "'synthetic'"),
    ],
)
def test_error_names_source_and_key(overrides: Any, key: str, phrase: str) -> None:
    with pytest.raises(CMEMSError) as error:
        with_overrides(DEFAULT, overrides, "my.json")
    message = str(error.value)
    assert message.startswith("my.json: ") and "\n" not in message
    assert key in message and phrase in message


def test_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(CMEMSError, match="known keys are .*levels"):
        with_overrides(DEFAULT, {"feature_perturbation": {"level": 1}}, "f")


def test_number_too_large_for_a_float_is_out_of_range() -> None:
    with pytest.raises(CMEMSError, match="'tau'"):
        with_overrides(DEFAULT, {"tau": 10**400}, "f")


# which file counts


def test_precedence_variable_then_folder_then_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dataclasses.replace(DEFAULT, tau=0.7, num_epochs=3)
    assert load_config(base, None) == (base, "the trainer's defaults")
    assert load_config(base, str(tmp_path)) == (base, "the trainer's defaults")

    in_folder = tmp_path / CONFIG_FILE
    in_folder.write_text('{"tau": 0.8}')
    config, source = load_config(base, str(tmp_path))
    assert (config.tau, config.num_epochs) == (0.8, 3) and source == str(in_folder)

    named = tmp_path / "mine.json"
    named.write_text('{"cutmix": 0.25}')
    monkeypatch.setenv(CONFIG_VARIABLE, str(named))
    for folder in (str(tmp_path), None):
        config, source = load_config(base, folder)
        assert (config.tau, config.cutmix, config.num_epochs) == (0.7, 0.25, 3), "the two files must not be mixed"
        assert source == str(named)


@pytest.mark.parametrize("content", ["{", "", "{'tau': 1}", b"\xff\xfe{}"])
@pytest.mark.parametrize("by_variable", [True, False])
def test_broken_file_is_named(content: str | bytes, by_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if by_variable:
        monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    with pytest.raises(CMEMSError) as error:
        load_config(DEFAULT, None if by_variable else str(tmp_path))
    assert str(path) in str(error.value) and "JSON" in str(error.value)


def test_content_that_does_not_fit_names_the_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"tau": NaN}')
    with pytest.raises(CMEMSError) as error:
        load_config(DEFAULT, str(tmp_path))
    assert str(tmp_path / CONFIG_FILE) in str(error.value) and "'tau'" in str(error.value)


def test_missing_file_names_variable_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"tau": 0.8}')
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "gone.json"))
    with pytest.raises(CMEMSError) as error:
        load_config(DEFAULT, str(tmp_path))
    assert CONFIG_VARIABLE in str(error.value) and "gone.json" in str(error.value)


def test_trainer_that_learns_nothing_is_refused_without_a_file() -> None:
    off = TermConfig(enabled=False)
    with pytest.raises(CMEMSError, match="'supervised' and 'synthetic'"):
        load_config(dataclasses.replace(DEFAULT, supervised=off, synthetic=off), None)


# what the config says


@pytest.mark.parametrize(
    ("term", "weights"),
    [
        (TermConfig(), {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
        (TermConfig(enabled=False, weight=2.0), {0.0: 0.0, 1.0: 0.0}),
        (TermConfig(weight=2.0, rampup=0.5), {0.0: 0.0, 0.125: 0.5, 0.25: 1.0, 0.5: 2.0, 1.0: 2.0}),
        (TermConfig(weight=2.0, start=0.25), {0.0: 0.0, 0.24: 0.0, 0.25: 2.0, 1.0: 2.0}),
        (TermConfig(weight=4.0, start=0.5, rampup=0.25), {0.4: 0.0, 0.5: 0.0, 0.625: 2.0, 0.75: 4.0, 1.0: 4.0}),
    ],
)
def test_weight_of_a_term_over_the_training(term: TermConfig, weights: dict[float, float]) -> None:
    assert {progress: term.weight_at(progress) for progress in weights} == pytest.approx(weights)


def test_a_long_training_begins_as_a_short_one() -> None:
    term, at = TermConfig(weight=2.0, start=0.2, rampup=0.3), ScanLabelsConfig(at=(0.25, 0.5))
    asked = dataclasses.replace(DEFAULT, image=term, feature=term, scan_labels=at, early_steps=400, iterations_per_epoch=100, lr_warmup=0.1)
    long = dataclasses.replace(asked, num_epochs=8).scheduled
    assert long.image == long.feature == TermConfig(weight=2.0, start=0.1, rampup=0.15)
    assert long.scan_labels == ScanLabelsConfig(at=(0.125, 0.25, 0.5)), "what both schedules ask for is made once"
    assert long.lr_warmup == 0.05
    assert long.supervised == asked.supervised and long.scheduled is long
    for unchanged in (dataclasses.replace(asked, num_epochs=4), dataclasses.replace(asked, num_epochs=8, early_steps=0)):
        assert unchanged.scheduled is unchanged
    assert dataclasses.replace(asked, num_epochs=8, scan_labels=ScanLabelsConfig(at=())).scheduled.scan_labels.at == ()
    longer = dataclasses.replace(asked, num_epochs=64).scheduled.scan_labels
    assert longer.at == (1 / 64, 1 / 32, 1 / 16, 1 / 8, 0.25, 0.5), "between them whenever it is twice as long"
    assert dataclasses.replace(asked, num_epochs=40).scheduled.scan_labels.at == pytest.approx((0.025, 0.05, 0.1, 0.2, 0.25, 0.5))


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("feature", [True, False])
def test_unlabelled_images_are_used_by_the_consistency_terms(image: bool, feature: bool) -> None:
    config = dataclasses.replace(DEFAULT, image=TermConfig(enabled=image), feature=TermConfig(enabled=feature))
    assert config.uses_unlabelled is (image or feature)


def test_differences_are_dotted_keys_with_both_values() -> None:
    old = DEFAULT.to_dict()
    new = with_overrides(DEFAULT, {"tau": 0.5, "synthesis": {"joint": {"scale": [1, 1]}}}, "f").to_dict()
    assert differences(old, old) == []
    assert differences(old, new) == ["synthesis.joint.scale ([0.7, 1.4] then, [1.0, 1.0] now)", "tau (0.95 then, 0.5 now)"]


def test_differences_see_keys_that_only_one_has() -> None:
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a (1 then, null now)", 'b (null then, {"c": 2} now)']


def test_a_trainers_own_config_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    with pytest.raises(CMEMSError, match="trainer's own config.*'tau' is 2"):
        load_config(CMEMSConfig(tau=2.0), None)
