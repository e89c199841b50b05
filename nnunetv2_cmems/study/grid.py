"""The grid of a benchmark: which trainings there are, and what they have in common.

A grid is methods x exemplars x seeds. Everything else is the same for all of them: data set, configuration, fold, compute.
``benchmark.json`` in the benchmark's folder says what that is; a later call may add to the grid, but not change it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cmems.config import CONFIG_VARIABLE, CMEMSConfig, ExemplarSpec, with_overrides
from nnunetv2_cmems.data.exemplar import PreprocessedDataset, load_exemplars, rank_exemplars
from nnunetv2_cmems.data.looks import patients_of
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import environment, find_dataset, read_plans, write_json
from nnunetv2_cmems.method.objective import batch_sizes, passes_per_step
from nnunetv2_cmems.study.methods import OURS, Exemplar, Method, depends_on_exemplar, find_trainer, is_ours, merged, plain_method
from nnunetv2_cmems.study.run import RunSpec
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS

_SET_BY_THE_GRID = {"exemplar": "--exemplars", "num_epochs": "--epochs", "iterations_per_epoch": "--iterations", "seed": "--seeds"}


@dataclass(frozen=True)
class Fold:
    """What all runs of a benchmark train and validate on.

    Attributes:
        dataset: ``DatasetXXX_Name``.
        configuration: nnU-Net's.
        plans: the plans' identifier.
        fold: ``"0"`` to ``"4"``, or ``"all"``.
        folder: the data set's preprocessed folder.
        training: cases.
        validation: cases, which have labels.
        images: the configuration's preprocessed folder.
        batch_size: of the plans.
    """

    dataset: str
    configuration: str
    plans: str
    fold: str
    folder: str
    training: tuple[str, ...]
    validation: tuple[str, ...]
    images: PreprocessedDataset
    batch_size: int

    @property
    def references(self) -> str:
        """Folder of the masks that the validation is judged by."""
        return os.path.join(self.folder, "gt_segmentations")

    def plans_file(self, plans: str | None = None) -> str:
        return os.path.join(self.folder, f"{plans or self.plans}.json")


@dataclass(frozen=True)
class Grid:
    """What the runs of a benchmark have in common.

    Attributes:
        fold: the data.
        exemplars: number 1 first.
        seeds: of the trainings.
        epochs: of all methods.
        iterations: steps an epoch, of ``nnUNetTrainerCMEMS``.
        same: ``"passes"``: all methods get as many network passes as ``nnUNetTrainerCMEMS``; ``"steps"``: as many steps.
        config: overrides for all of our trainers.
        device: ``cpu``, ``cuda`` or ``mps``.
        num_gpus: for each run.
        threads: for each run on a CPU.
    """

    fold: Fold
    exemplars: Sequence[Exemplar]
    seeds: Sequence[int]
    epochs: int
    iterations: int
    same: str = "passes"
    config: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cuda"
    num_gpus: int = 1
    threads: int | None = None

    def runs(self, method: Method) -> list[RunSpec]:
        """The runs of a method. One that does not depend on the exemplar has one run per seed.

        Raises:
            CMEMSError: the overrides do not fit.
        """
        exemplars = dict(enumerate(self.exemplars, start=1)) if method.exemplars is None else method.exemplars
        chosen = sorted(exemplars) if depends_on_exemplar(method.trainer) else [1]
        steps = self.steps(method)
        return [
            RunSpec(
                dataset=self.fold.dataset,
                configuration=self.fold.configuration,
                plans=method.plans or self.fold.plans,
                fold=self.fold.fold,
                trainer=method.trainer,
                method=method.name,
                exemplar=number,
                seed=seed,
                study=method.study,
                value=method.value,
                overrides=self._overrides(method, steps, exemplars.get(number), seed),
                device=self.device,
                num_gpus=self.num_gpus,
                threads=self.threads,
            )
            for number in chosen
            for seed in self.seeds
        ]

    def steps(self, method: Method) -> int | None:
        """Steps an epoch of a method; None where its trainer decides itself.

        Raises:
            CMEMSError: the overrides do not fit.
        """
        if not is_ours(method.trainer):
            return None
        if self.same == "steps":
            return self.iterations
        ours = self._step_passes(plain_method(OURS), self.iterations)
        return max(1, round(self.iterations * ours / self._step_passes(method, self.iterations)))

    def passes(self, method: Method) -> float | None:
        """Network passes of one run; None where the trainer is not ours."""
        steps = self.steps(method)
        return None if steps is None else self.epochs * steps * self._step_passes(method, steps)

    def _step_passes(self, method: Method, steps: int) -> float:
        """The mean over a training of so many steps an epoch."""
        source = f"the config of {method.name}"
        config = with_overrides(find_trainer(method.trainer).config, merged(self.config, method.overrides), source)
        config = replace(config, num_epochs=self.epochs, iterations_per_epoch=steps)
        batch = self.fold.batch_size if method.plans is None else batch_size(self.fold, method.plans)
        return passes_per_step(config, batch_sizes(config, batch))

    def _overrides(self, method: Method, steps: int | None, exemplar: Exemplar | None, seed: int) -> dict[str, Any]:
        if steps is None:
            return {}
        own: dict[str, Any] = {"num_epochs": self.epochs, "iterations_per_epoch": steps, "seed": seed}
        if depends_on_exemplar(method.trainer):
            own["exemplar"] = exemplar
        often = {"checkpoint_every": max(1, min(CMEMSConfig().checkpoint_every, self.epochs // 10))}  # what a killed run loses at most
        overrides = merged(often, self.config, method.overrides, own)
        with_overrides(find_trainer(method.trainer).config, overrides, f"method '{method.name}'")
        return overrides

    def to_json(self) -> dict[str, Any]:
        """As ``benchmark.json`` has it."""
        fold = self.fold
        return {
            "dataset": fold.dataset,
            "configuration": fold.configuration,
            "plans": fold.plans,
            "fold": fold.fold,
            "device": self.device,
            "epochs": self.epochs,
            "iterations": self.iterations,
            "same": self.same,
            "config": dict(self.config),
            "exemplars": list(self.exemplars),
            "seeds": list(self.seeds),
        }


def open_fold(dataset: str, configuration: str, plans: str, fold: str) -> Fold:
    """The fold as the trainer sees it.

    Raises:
        CMEMSError: there is no such data set, plans, configuration or fold; it is not preprocessed; it has no validation case.
    """
    remedy = "run nnUNetv2_cmems plan_and_preprocess first, or correct -d"
    folder = find_dataset(dataset, "nnUNet_preprocessed", "preprocessed data sets", remedy)
    name = os.path.basename(folder)
    if fold != "all" and not fold.isdecimal():
        raise CMEMSError(f"-f is '{fold}'; a fold is a number or 'all'.")
    content = read_plans(os.path.join(folder, f"{plans}.json"))
    if configuration not in content["configurations"]:
        there = ", ".join(content["configurations"])
        raise CMEMSError(f"{os.path.join(folder, plans)}.json has no configuration '{configuration}'; it has {there}.")
    trainer = _make_trainer(folder, content, configuration, fold)
    with contextlib.redirect_stdout(io.StringIO()):
        training, validation = trainer.do_split()
        images = trainer.preprocessed_dataset()
    if not len(validation):
        raise CMEMSError(
            f"fold {fold} of {name} has no validation case with a label, so nothing can be compared; choose a fold of a labelled data "
            "set."
        )
    batch = int(trainer.configuration_manager.batch_size)
    return Fold(name, configuration, plans, fold, folder, tuple(training), tuple(validation), images, batch)


def batch_size(fold: Fold, plans: str) -> int:
    """Of the fold's configuration in other plans."""
    return int(PlansManager(read_plans(fold.plans_file(plans))).get_configuration(fold.configuration).batch_size)


def _make_trainer(folder: str, plans: dict[str, Any], configuration: str, fold: str) -> Any:
    """A trainer that will not train, asked for the fold. What it writes on being made goes to a folder that is thrown away."""
    path = os.path.join(folder, "dataset.json")
    try:
        with open(path, encoding="utf-8") as file:
            dataset_json = json.load(file)
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); plan and preprocess the data set again.") from error
    with tempfile.TemporaryDirectory() as aside, environment(nnUNet_results=aside, **{CONFIG_VARIABLE: os.path.join(aside, "c.json")}):
        write_json(os.environ[CONFIG_VARIABLE], {})
        with contextlib.redirect_stdout(io.StringIO()):
            made: Any = nnUNetTrainerCMEMS(
                {**plans, "continue_training": False},
                configuration,
                int(fold) if fold != "all" else fold,  # type: ignore[arg-type]
                dataset_json,
                torch.device("cpu"),
            )
        made.print_to_log_file = lambda *_, **__: None  # its folder is gone
        return made



def choose_exemplars(number: int, fold: Fold, allow_missing_classes: bool = False) -> list[Exemplar]:
    """Exemplars of different patients, as typical ones first: number 1 is what ``"exemplar": "auto"`` chooses.

    Raises:
        CMEMSError: there are fewer patients; see also :func:`~nnunetv2_cmems.data.exemplar.rank_exemplars`.
    """
    ranked = rank_exemplars(fold.training, fold.images, allow_missing_classes)
    patients = len(set(patients_of(spec.case for spec in ranked).values()))
    if number > patients:
        raise CMEMSError(
            f"--exemplars is {number}, but only {patients} patients of fold {fold.fold} have a slice that shows all classes (cases of one "
            "patient have names that agree up to and including the first number); ask for fewer, or name slices in a file."
        )
    return [[to_dict(spec)] for spec in ranked[:number]]


def read_exemplars(path: str, fold: Fold, allow_missing_classes: bool = False) -> list[Exemplar]:
    """Exemplars from a JSON file: a list, each entry of which is what ``exemplar`` in ``cmems.json`` may be: a list of slices.

    Raises:
        CMEMSError: the file cannot be read, or names what is not there.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read as JSON ({first_line(error)}); correct --exemplars.") from error
    if not isinstance(content, list) or not content or not all(isinstance(entry, list) for entry in content):
        raise CMEMSError(f'{path} must hold a list of exemplars, each a list of slices, such as [[{{"case": "patient001", "slice": 4}}]].')
    exemplars: list[Exemplar] = []
    for i, entry in enumerate(content):
        specs = with_overrides(CMEMSConfig(), {"exemplar": entry}, f"{path}, entry {i + 1}").exemplar
        assert not isinstance(specs, str)
        load_exemplars(specs, fold.training, fold.images, allow_missing_classes)
        exemplars.append([to_dict(_with_axis(spec, fold)) for spec in specs])
        if exemplars[-1] in exemplars[:-1]:
            raise CMEMSError(f"{path} names {json.dumps(entry)} twice; name it once.")
    return exemplars


def to_dict(spec: ExemplarSpec) -> dict[str, Any]:
    """As a config file has it."""
    return {key: value for key, value in asdict(spec).items() if value is not None}


def _with_axis(spec: ExemplarSpec, fold: Fold) -> ExemplarSpec:
    return spec if spec.slice is None or spec.axis else replace(spec, axis=fold.images.slice_axis)  # type: ignore[arg-type]


def read_config(path: str | None) -> dict[str, Any]:
    """Overrides for all of our trainers, from a JSON file.

    Raises:
        CMEMSError: the file cannot be read, does not fit, or sets what the grid sets.
    """
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read as JSON ({first_line(error)}); correct --config.") from error
    with_overrides(CMEMSConfig(), content, path)
    for key, option in _SET_BY_THE_GRID.items():
        if key in content:
            raise CMEMSError(f"{path} sets '{key}', which the benchmark sets itself; remove it there and use {option}.")
    return dict(content)
