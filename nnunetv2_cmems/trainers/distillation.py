"""Distillation: one student of the plans' architecture learns what trained members predict together, on scans without their labels."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from torch import Tensor
from tqdm import tqdm

from nnunetv2_cmems.config import CMEMSConfig, TermConfig, with_overrides
from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.data.preprocessing import configuration_signature
from nnunetv2_cmems.data.sources import unlabelled_dataset
from nnunetv2_cmems.data.unlabelled import UnlabelledLoader, check_images
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import environment, nnunet_folder
from nnunetv2_cmems.method.distillation import Distillation
from nnunetv2_cmems.method.networks import MutualNetworks, count_members
from nnunetv2_cmems.trainers.cmems import RECORD, nnUNetTrainerCMEMS
from nnunetv2_cmems.trainers.faults import end_workers, one_sentence, out_of_memory

NO_FOLDER = "a student is trained on the preprocessed scans that its teachers were trained on"


def distil(
    weights: Sequence[Mapping[str, Tensor]],
    init_args: Mapping[str, Any],
    cases: Collection[str],
    *,
    steps: int,
    device: str = "cuda",
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Train one network to predict what several members predict together.

    It starts from the first member. Nothing is written, and no label is read.

    Args:
        weights: ``network_weights`` of one checkpoint, or of several trained folds; all their members teach.
        init_args: the first checkpoint's.
        cases: the scans to learn on, of ``nnUNet_preprocessed``.
        steps: of the optimiser.
        device: ``cpu``, ``cuda`` or ``mps``.
        seed: of all that is drawn. Batches are then read in this process, so that two calls on a CPU give one student.

    Returns:
        The state dict of a :class:`~nnunetv2_cmems.method.networks.MutualNetworks` of one member, the student, on the CPU.

    Raises:
        CMEMSError: a scan is not there any more, or does not fit the plans; or what ends a training.
    """
    nnunet_folder("nnUNet_preprocessed", "the preprocessed data sets")
    with tempfile.TemporaryDirectory() as scratch, environment(nnUNet_results=scratch, nnUNet_wandb_enabled="0"):
        plans = {**init_args["plans"], "continue_training": False}
        student = Student(plans, init_args["configuration"], init_args["fold"], init_args["dataset_json"], torch.device(device))
        trained = with_overrides(CMEMSConfig(), init_args[RECORD]["config"], "the checkpoint")
        student.learn_from(_together(weights), student_config(trained, steps, seed))
        student.learn(student.batches_of(cases))
        trained_student: MutualNetworks = student.mutual_networks.cpu()
        return trained_student.state_dict()


def student_config(trained: CMEMSConfig, steps: int, seed: int | None) -> CMEMSConfig:
    """How a student learns whose teachers were trained with ``trained``: their views, one network, one epoch."""
    off = TermConfig(enabled=False)
    mirrored = trained.unlabelled_views.mirror or trained.exemplar_views.mirror  # as its predictions will be
    return dataclasses.replace(
        trained,
        num_members=1,
        architecture="plans",
        ema_decay=0.0,
        supervised=off,
        synthetic=off,
        feature=off,
        num_epochs=1,
        iterations_per_epoch=steps,
        optimizer="adamw",
        initial_lr=trained.initial_lr if trained.optimizer == "adamw" else None,
        unlabelled_views=dataclasses.replace(trained.unlabelled_views, mirror=mirrored),
        seed=seed,
    )


def _while_distilling(_: Any, error: BaseException) -> str:
    """What to do about an error of :meth:`Student.learn`; "" where only a traceback helps."""
    if out_of_memory(error):
        return "memory ran out while the student was trained: end other programs that use it, or give -device cpu."
    if isinstance(error, (EOFError, ConnectionError)) or "no longer alive" in str(error):  # what batchgenerators and its pipes say
        return (
            "a process that reads images died while the student was trained, most often because this machine's memory ran out: lower the "
            "environment variable nnUNet_n_proc_DA, or set it to 0."
        )
    return ""


class Student(nnUNetTrainerCMEMS):
    """The trainer with one member and another loss; it keeps no log."""

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        pass

    def learn_from(self, weights: Mapping[str, Tensor], config: CMEMSConfig) -> None:
        """Build the student and its teachers.

        Args:
            weights: the teachers' state dict.
            config: the student's.
        """
        self._use(config)
        self.initialize()
        manager = self.configuration_manager
        heads = self.label_manager.num_segmentation_heads
        teachers: Any = type(self).build_network_architecture(self.plans_manager, manager, self.num_input_channels, heads, False)
        try:
            teachers.load_state_dict(weights)
            self.mutual_networks.members[0].load_state_dict(teachers.members[0].state_dict())
        except RuntimeError as error:
            raise CMEMSError(f"the trained networks are not of their plans' architecture ({first_line(error)}).") from error
        teachers.to(self.device).eval().requires_grad_(False)
        self._objective = Distillation(config, teachers, manager.patch_size, manager.spacing, self.label_space, self._autocast)

    @one_sentence(_while_distilling)
    def learn(self, batches: Iterator[dict]) -> None:
        """Take all steps, with a progress bar; the loader of the ``batches`` is ended."""
        try:
            self.on_train_epoch_start()
            for _ in tqdm(range(self.num_iterations_per_epoch), desc="Distilling"):
                self.train_step(next(batches))
        finally:
            end_workers(batches)

    def _stop_at_nan(self, broken: Sequence[str]) -> None:
        try:
            super()._stop_at_nan(broken)
        except CMEMSError as error:
            where = f"step {self._step_in_epoch} of {self.num_iterations_per_epoch}"
            raise CMEMSError(f"the student's loss is not a finite number any more ({where}); give another --seed.") from error

    def batches_of(self, names: Collection[str]) -> Iterator[dict]:
        """Batches of crops of these cases, whether they have labels or not.

        Raises:
            CMEMSError: a case is missing, cannot be read, or was preprocessed for other plans.
        """
        cases = self._find(names)
        for source in {source.folder: source for source in cases.values()}.values():
            there = [case for case in cases if cases[case] is source]
            check_images(there, source, self.configuration_manager, self.num_input_channels)
        *_, crop, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        loader = UnlabelledLoader(cases, self.batch_size, crop, self.configuration_manager.patch_size)
        return self._with_workers(loader, 1) if self.config.seed is None else SingleThreadedAugmenter(loader, None)

    def _find(self, names: Collection[str]) -> dict[str, PreprocessedDataset]:
        labelled = self.preprocessed_dataset()
        others = unlabelled_dataset(labelled, configuration_signature(self.plans_manager.plans, self.configuration_name))
        sources: dict[str, PreprocessedDataset] = {}
        for source in (others, labelled):
            if source is not None:
                sources.update(dict.fromkeys(source.dataset_class.get_identifiers(source.folder), source))
        missing = sorted(set(names) - set(sources))
        if missing:
            raise CMEMSError(
                f"'{missing[0]}' is not in {labelled.folder} any more, and {NO_FOLDER}; run nnUNetv2_cmems plan_and_preprocess again, or "
                "export without --distil."
            )
        return {case: sources[case] for case in sorted(names)}

    def _check_preprocessed(self) -> None:
        try:
            super()._check_preprocessed()
        except CMEMSError as error:
            raise CMEMSError(f"{str(error).rstrip('.')}, or export without --distil: {NO_FOLDER}.") from error


def _together(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The members of several trainings as those of one; running means, and how predictions are refined, are left out."""
    together: dict[str, Tensor] = {}
    first = 0
    for part in weights:
        for key, value in part.items():
            if key.startswith("members."):
                head, number, rest = key.split(".", 2)
                together[f"{head}.{first + int(number)}.{rest}"] = value
        first += count_members(part)
    return together
