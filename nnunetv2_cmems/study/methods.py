"""What a benchmark can train: trainers by their names, and a study's variants of ours."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import nnunetv2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_cmems import trainers
from nnunetv2_cmems.config import with_overrides
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS

OURS = "nnUNetTrainerCMEMS"

PEERS = ("_meanTeacher", "_cps", "_fixMatch", "_uniMatch", "_crossTeaching")

DEFAULT_TRAINERS = tuple(OURS + suffix for suffix in ("_exemplarOnly", *PEERS, "", "_allLabels"))
"""The floor, the peers, CMEMS, the ceiling."""

METHODS = {
    "": "CMEMS",
    "_paper": "CMEMS, paper",
    "_noSynthesis": "CMEMS, no synthesis",
    "_imageOnly": "CMEMS, image only",
    "_featureOnly": "CMEMS, feature only",
    "_exemplarOnly": "exemplar only",
    "_allLabels": "all labels",
    "_meanTeacher": "Mean Teacher",
    "_cps": "CPS",
    "_fixMatch": "FixMatch",
    "_uniMatch": "UniMatch",
    "_crossTeaching": "cross-teaching",
}
"""What tables call our trainers, by the end of their names."""

Exemplar = list[dict[str, Any]]
"""The config's value ``exemplar``: what one run may see labels of."""


@dataclass(frozen=True)
class Method:
    """A row of the tables: a trainer, or a study's variant of one.

    Attributes:
        name: what tables call it.
        trainer: class name.
        overrides: of the trainer's config.
        study: the study that it is a variant of, if any.
        value: the study's value.
        plans: identifier, where it is not the benchmark's.
        exemplars: number to exemplar, where they are not the benchmark's.
    """

    name: str
    trainer: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    study: str | None = None
    value: str | float | None = None
    plans: str | None = None
    exemplars: Mapping[int, Exemplar] | None = None


def check_trainers(names: Iterable[str]) -> list[str]:
    """The trainers' full names, each once. ``uniMatch`` and ``CMEMS_uniMatch`` stand for ``nnUNetTrainerCMEMS_uniMatch``.

    Raises:
        CMEMSError: nnU-Net finds no trainer of a name; the nearest is suggested.
    """
    return list(dict.fromkeys(_full_name(name) for name in names))


def _full_name(name: str) -> str:
    known = known_trainers()
    for full in (name, f"nnUNetTrainer{name}", f"{OURS}_{name}"):
        if full in known and _find(full) is not None:
            return full
    if _find(name) is not None:  # a trainer that is not called one
        return name
    aliases = {
        full[len(prefix) :].lower(): full for full in known for prefix in ("", "nnUNetTrainer", f"{OURS}_") if full.startswith(prefix)
    }
    nearest = difflib.get_close_matches(name.lower(), aliases, n=1, cutoff=0.5)
    hint = f"did you mean '{aliases[nearest[0]]}'?" if nearest else f"our own are {', '.join(trainers.__all__)}."
    raise CMEMSError(f"nnU-Net finds no trainer '{name}'; {hint}")


def find_trainer(name: str) -> Any:
    """The class of a trainer's full name.

    Raises:
        CMEMSError: nnU-Net does not find it.
    """
    found = _find(name)
    if found is None:
        raise CMEMSError(f"nnU-Net finds no trainer '{name}'.")
    return found


@cache
def _find(name: str) -> Any:
    """nnU-Net's own search, silently; None if there is no such trainer."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RuntimeError, AssertionError, TypeError):
        return recursive_find_trainer_class_by_name(name)
    return None


@cache
def known_trainers() -> tuple[str, ...]:
    """Names of the trainers in the places where nnU-Net searches, told from the source files, and of our own."""
    folders = [os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer"), *os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)]
    names = list(trainers.__all__)
    for folder in filter(None, folders):
        for place, _, files in os.walk(folder):
            for file in sorted(files):
                if file.endswith(".py"):
                    with open(os.path.join(place, file), encoding="utf-8", errors="replace") as text:
                        names += re.findall(r"^class (\w*Trainer\w*)", text.read(), flags=re.MULTILINE)
    return tuple(dict.fromkeys(names))


def is_ours(trainer: str) -> bool:
    """Whether it reads ``cmems.json``."""
    return issubclass(find_trainer(trainer), nnUNetTrainerCMEMS)


def depends_on_exemplar(trainer: str) -> bool:
    """Whether what it learns from is the exemplar, and not every label of the fold."""
    return is_ours(trainer) and find_trainer(trainer).config.exemplar != "all"


def plain_method(trainer: str) -> Method:
    """A trainer as it is."""
    if trainer.startswith(OURS):
        rest = trainer.removeprefix(OURS)
        return Method(METHODS.get(rest, f"CMEMS, {rest.removeprefix('_')}"), trainer)
    rest = trainer.removeprefix("nnUNetTrainer").removeprefix("_")
    return Method(f"nnU-Net, {rest}" if rest else "nnU-Net", trainer)


def variant(study: str, value: str | float, overrides: Mapping[str, Any], config: Mapping[str, Any], source: str) -> Method:
    """A study's variant of CMEMS; where its config is that of a trainer of ours, that trainer, so that nothing is trained twice.

    Args:
        study: its name.
        value: what is varied.
        overrides: what the value means.
        config: the grid's overrides for all methods.
        source: for the sentence of an error.

    Raises:
        CMEMSError: the overrides do not fit.
    """
    wanted = with_overrides(nnUNetTrainerCMEMS.config, merged(config, overrides), source)
    for name in trainers.__all__:
        if with_overrides(getattr(trainers, name).config, dict(config), source) == wanted:
            return plain_method(name)
    return Method(f"CMEMS, {study} {value}", OURS, overrides, study, value)


def merged(*dicts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other, the last on top."""
    result: dict[str, Any] = {}
    for one in dicts:
        for key, value in one.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result
