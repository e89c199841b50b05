"""The trainer that nnU-Net sees: its life cycle on one side, :mod:`nnunetv2_cmems.method` on the other."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run import run_training
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunetv2_cmems.config import CMEMSConfig, ExemplarSpec, TermConfig, differences, load_config, with_overrides
from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.data.exemplar import Exemplar, PreprocessedDataset, choose_exemplar, list_annotated, load_exemplars
from nnunetv2_cmems.data.preprocessing import configuration_signature
from nnunetv2_cmems.data.raw import check_description
from nnunetv2_cmems.data.sources import FEWEST_CASES_TO_SPLIT, check_split, find_unlabelled, takes_all_annotations, unlabelled_folder
from nnunetv2_cmems.data.unlabelled import UnlabelledLoader, check_images
from nnunetv2_cmems.data.validation import ValidationLoader
from nnunetv2_cmems.errors import CMEMSError, first_line, show_errors_as_sentences
from nnunetv2_cmems.files import write_json
from nnunetv2_cmems.method.exemplars import ANY_SIZE, AS_ANNOTATED, ExemplarBank, shows_every_class
from nnunetv2_cmems.method.losses import weights_from
from nnunetv2_cmems.method.networks import MutualNetworks, count_members, splits
from nnunetv2_cmems.method.objective import Objective, batch_sizes
from nnunetv2_cmems.method.perturbations import rotation_planes
from nnunetv2_cmems.method.planes import AnnotatedPlane
from nnunetv2_cmems.method.synthesis import reach
from nnunetv2_cmems.trainers import distributed, resume, scan_labels
from nnunetv2_cmems.trainers.architectures import counterpart
from nnunetv2_cmems.trainers.compilation import rehearse
from nnunetv2_cmems.trainers.faults import (
    SideFiles,
    SkippedSteps,
    broken_terms,
    broken_weights,
    check_masks,
    not_finite,
    one_sentence,
    while_training,
    while_validating,
    workers_stopped,
)
from nnunetv2_cmems.trainers.first_look import draw_looks, look_at, sample
from nnunetv2_cmems.trainers.heads import label_space
from nnunetv2_cmems.trainers.hidden_labels import CONFIDENCES, HiddenLabels
from nnunetv2_cmems.trainers.history import History
from nnunetv2_cmems.trainers.host_memory import keep_freed_memory
from nnunetv2_cmems.trainers.optimizer import WarmedUpPoly
from nnunetv2_cmems.trainers.prediction import predict_with_one_network, predicting
from nnunetv2_cmems.trainers.snapshot import draw_snapshot

RECORD = "cmems"
"""Key of a checkpoint's ``init_args`` that holds config and exemplars, as plain types."""

_load_pretrained_into_one = run_training.load_pretrained_weights


class nnUNetTrainerCMEMS(nnUNetTrainer):
    """Trains from one annotated slice and unlabelled scans (En & Guo, AISTATS 2024).

    On a labelled data set every label of the training fold but the exemplar's is hidden. A subclass
    sets ``config``; a user overrides it by a JSON file, see :func:`nnunetv2_cmems.config.load_config`.

    Raises:
        CMEMSError: the configuration or the data set is of a kind that is not supported yet.
    """

    config = CMEMSConfig()

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device("cuda")  # noqa: B008
    ) -> None:
        show_errors_as_sentences()
        _refuse_unsupported(plans, configuration, dataset_json)
        continues = bool(plans["continue_training"])
        folder = os.path.join(nnUNet_preprocessed.get(), plans["dataset_name"]) if nnUNet_preprocessed.is_set() else None
        config, self._config_source = load_config(type(self).config, folder)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._continues = continues
        self._use(config)
        self.label_space = label_space(self.label_manager)
        self.history = History(self.logger)
        self._objective: Any = None  # an Objective once the data is known
        self.hidden_labels: HiddenLabels | None = None
        self.exemplars: list[Exemplar] = []
        self._named_as_a_whole: set[str] = set()
        self._random_numbers = resume.RandomNumbers()
        self._skipped = SkippedSteps()
        self._scan_labels: scan_labels.ScanLabels | None = None
        self._side_files = distributed.NoSideFiles() if self.local_rank else SideFiles(self.print_to_log_file)

    def _use(self, config: CMEMSConfig) -> None:
        self.config = config
        channels = self.configuration_manager.network_arch_init_kwargs.get("features_per_stage", [32])
        self.initial_lr = config.learning_rate(channels[0] if isinstance(channels, (list, tuple)) else int(channels))
        self.num_epochs = config.num_epochs
        self.num_iterations_per_epoch = config.iterations_per_epoch
        self.num_val_iterations_per_epoch = config.val_iterations_per_epoch
        self.save_every = config.checkpoint_every
        if config.best_checkpoint == "agreement":
            self._best_ema = np.inf  # switches nnU-Net's own choice off, which follows validation labels
        # nnU-Net calls this with the network's arguments; the number of members comes from the config
        build = functools.partial(
            type(self).build_network_architecture,
            num_members=config.num_members,
            mixed=config.architecture == "mixed" or (config.architecture == "auto" and self._counterpart() is not None),
            averaged=config.ema_decay > 0,
        )
        self.build_network_architecture = build  # type: ignore[method-assign]

    # ------------------------------------------------------------------ networks

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
        num_members: int = 2,
        mixed: bool = False,
        averaged: bool = False,
    ) -> nn.Module:
        """The members, each of the plans' architecture (or its counterpart, where they are ``mixed``) and drawn afresh.

        At inference the number of members and their architectures follow the weights that are loaded.
        """
        plans = configuration_manager.network_arch_class_name, configuration_manager.network_arch_init_kwargs
        other = counterpart(*plans)

        def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
            return get_network_from_plans(
                name,
                arguments,
                configuration_manager.network_arch_init_kwargs_req_import,
                num_input_channels,
                num_output_channels,
                allow_init=True,
                deep_supervision=enable_deep_supervision,
            )

        return MutualNetworks(
            functools.partial(make, *plans),
            num_members,
            make_other=None if other is None else functools.partial(make, *other),
            mixed=mixed,
            averaged=averaged,
        )

    def _counterpart(self) -> tuple[str, dict[str, Any]] | None:
        manager = self.configuration_manager
        return counterpart(manager.network_arch_class_name, manager.network_arch_init_kwargs)

    @property
    def mutual_networks(self) -> Any:
        """The :class:`MutualNetworks` without the wrappers around it; None before ``initialize``."""
        return distributed.unwrapped(self.network)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.mutual_networks.deep_supervision = enabled

    def initialize(self) -> None:
        self._check_preprocessed()
        if self.config.seed is not None:
            _seed_everything(self.config.seed)
        plans_file = os.path.join(self.preprocessed_dataset_folder_base, f"{self.plans_manager.plans_name}.json")
        manager = self.configuration_manager
        distributed.check_planned(manager.batch_size, distributed.count_processes(), self.configuration_name, plans_file)
        if self.config.architecture == "mixed" and self._counterpart() is None:
            raise CMEMSError(
                f"'architecture' is \"mixed\" ({self._config_source}), but no counterpart of {manager.network_arch_class_name} is known; "
                'choose plans with a PlainConvUNet or a ResidualEncoderUNet, or set it to "plans".'
            )
        super().initialize()
        if self.config.seed is not None and self.local_rank:  # the networks are those of the first process, the draws are not
            _seed_everything(resume.seeds(self.config.seed, 0, 0, self.local_rank + 1)[-1])
        if self.config.feature.enabled and not splits(self.mutual_networks.members[0]):
            raise CMEMSError(
                f"{self.configuration_manager.network_arch_class_name} does not split into an encoder and a decoder, so its features "
                'cannot be perturbed; choose plans of another architecture, or switch the term off: {"feature": {"enabled": false}}.'
            )
        self._random_numbers.begin()
        # nnU-Net's -pretrained_weights expects one plain network
        run_training.load_pretrained_weights = _load_pretrained_into_every_member

    def configure_optimizers(self) -> tuple[Any, Any]:
        """AdamW, whose rate is set per step; or nnU-Net's own."""
        if self.is_ddp:
            image = torch.zeros(1, self.num_input_channels, *self.configuration_manager.patch_size, device=self.device)
            distributed.leave_out_unreached(self.mutual_networks.members, image)
        if self.config.optimizer == "sgd":
            return super().configure_optimizers()
        config = self.config
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=config.weight_decay)
        return optimizer, WarmedUpPoly(optimizer, self.initial_lr, config.scheduled.lr_warmup)

    # ------------------------------------------------------------------ data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's hook; ours decides by it the size of unlabelled crops and which axes inference may mirror."""
        patch = self.configuration_manager.patch_size
        axes = tuple(range(len(patch))) if self.config.exemplar_views.mirror else None
        self.inference_allowed_mirroring_axes = axes
        views = self.config.unlabelled_views
        angle = np.deg2rad(views.rotation)
        turned = _turned(patch, self.configuration_manager.spacing, angle, views.scale)
        return (-angle, angle), False, [int(np.ceil(n * (1 + 2 * (views.shift + views.elastic)))) for n in turned], axes

    def get_dataloaders(self) -> tuple[Iterator, Iterator]:
        """The unlabelled crops, and nnU-Net's own validation loader. The exemplars need no loader."""
        with distributed.first_process_first():
            training, validation = self.do_split()
        dataset = self.preprocessed_dataset()
        self.exemplars = self._find_exemplars(training, dataset)
        annotated = {exemplar.case for exemplar in self.exemplars}
        if self._spares_exemplars(dataset):  # one that is chosen only now, too
            validation = [case for case in validation if case not in annotated]
        unlabelled = self._find_unlabelled(dataset, training, annotated, validation)
        if self._needs_unlabelled and not unlabelled:
            raise CMEMSError(
                f"fold {self.fold} has no unlabelled training case beside the exemplar ({', '.join(sorted(annotated))}); put scans into "
                "imagesUn and run nnUNetv2_cmems plan_and_preprocess, or train nnUNetTrainerCMEMS_exemplarOnly, which needs none."
            )
        if not len(validation) and self.config.best_checkpoint == "validation_dice":
            raise CMEMSError(
                f"'best_checkpoint' is \"validation_dice\" ({self._config_source}), but fold {self.fold} has no validation case to follow; "
                'set it to "agreement".'
            )
        hidden = [case for case, source in unlabelled.items() if source is dataset]
        others = [case for case, source in unlabelled.items() if source is not dataset]
        fits = functools.partial(check_images, configuration=self.configuration_manager, num_channels=self.num_input_channels)
        fits([*sorted(annotated), *hidden, *sorted(validation)], dataset)
        if others:
            fits(others, unlabelled[others[0]])
        self._record(list(unlabelled))
        self._scan_labels = scan_labels.begin(self, unlabelled)
        self._prepare_objective()
        if self.config.log_hidden_accuracy and self.config.uses_unlabelled:
            self.hidden_labels = HiddenLabels.of(hidden, dataset, self.configuration_manager.patch_size, self.label_space)
        *_, crop, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        train: Iterator
        if self._needs_unlabelled:
            size = self._objective.batches.unlabelled or 2  # where only the synthetic stream needs them
            if self._scan_labels and self.config.refine_predictions:
                self.mutual_networks.refinement = self._scan_labels.prediction_refinement.to_tensor().to(self.device)
            files = self._scan_labels.files if self._scan_labels else None
            train = self._with_workers(UnlabelledLoader(unlabelled, size, crop, self.configuration_manager.patch_size, files), 1)
        else:
            train = _nothing()
        if not len(validation):
            self.num_val_iterations_per_epoch = 0
            self.print_to_log_file("No validation case has labels; the best checkpoint follows the members' agreement on unlabelled scans.")
            return train, _nothing()
        val = self._with_workers(self._validation_loader(validation), 2)
        _raise_error(next(val))
        return train, val

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, except where there are too few labelled cases for one: all of them are then training cases.

        In fold ``all`` of a data set with scans in ``imagesUn`` the exemplars are no validation cases, as far as they are known already.
        """
        dataset = self.preprocessed_dataset()
        cases = sorted(dataset.dataset_class.get_identifiers(dataset.folder))
        if self.fold == "all":
            if takes_all_annotations(self.config.exemplar, dataset.folder):
                return cases, []
            chosen = self._chosen_exemplars() if self._spares_exemplars(dataset) else []
            return cases, [case for case in cases if case not in {spec.case for spec in chosen}]
        splits_file = os.path.join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if os.path.lexists(splits_file):
            check_split(splits_file, self.fold, dataset)
        elif len(cases) < FEWEST_CASES_TO_SPLIT:
            self.print_to_log_file(f"{len(cases)} labelled case{'s' if len(cases) > 1 else ''}, too few to split: training on all of them.")
            return cases, []
        return super().do_split()

    def _spares_exemplars(self, dataset: PreprocessedDataset) -> bool:
        """Whether all labelled cases are training and validation cases at once, but for the exemplars."""
        return self.fold == "all" and os.path.isdir(unlabelled_folder(dataset.folder))

    def preprocessed_dataset(self) -> PreprocessedDataset:
        """What the data layer has to know about the preprocessed folder."""
        folder = self.preprocessed_dataset_folder
        self._check_preprocessed()
        self.dataset_class: Any = self.dataset_class or infer_dataset_class(folder)
        dimensions = len(self.configuration_manager.patch_size)
        return PreprocessedDataset.from_plans(folder, self.dataset_class, self.plans_manager, self.dataset_json, dimensions)

    def _check_preprocessed(self) -> None:
        folder = self.preprocessed_dataset_folder
        if not os.path.isdir(folder):
            raise CMEMSError(
                f"{folder} does not exist: the data set is not preprocessed for configuration '{self.configuration_name}'; run "
                f"nnUNetv2_cmems plan_and_preprocess with -c {self.configuration_name}."
            )
        if not any(name.endswith((".b2nd", ".npz")) for name in os.listdir(folder)):
            raise CMEMSError(
                f"{folder} has no labelled case; put a mask into labelsTr and its scan into imagesTr, and run nnUNetv2_cmems "
                "plan_and_preprocess again."
            )

    @property
    def _synthesises(self) -> bool:
        """Whether the synthetic stream is on and an exemplar shows whole organs (and all of them), which Ω could cut out."""
        if not self.config.synthetic.enabled:
            return False
        fits = [True] * len(self.exemplars)
        if self.config.synthesis.complete_only:
            fits = shows_every_class([np.unique(exemplar.label[exemplar.label > 0]).tolist() for exemplar in self.exemplars])
        return any(fit and exemplar.plane is None for fit, exemplar in zip(fits, self.exemplars))

    @property
    def _needs_unlabelled(self) -> bool:
        return self.config.uses_unlabelled or (self._synthesises and self.config.synthesis.unlabelled_background > 0)

    def _chosen_exemplars(self) -> Sequence[ExemplarSpec]:
        """The exemplars as far as they are known before the data are read: named by the user, or chosen by the run that goes on."""
        if not isinstance(self.config.exemplar, str):
            return self.config.exemplar
        if RECORD in self.my_init_kwargs:
            return [ExemplarSpec(**exemplar) for exemplar in self.my_init_kwargs[RECORD]["exemplars"]]
        return []

    def _find_exemplars(self, training: Sequence[str], dataset: PreprocessedDataset) -> list[Exemplar]:
        specs = self._chosen_exemplars()
        if not specs and takes_all_annotations(self.config.exemplar, dataset.folder):
            specs = list_annotated(training, dataset)
        elif not specs:
            specs = [choose_exemplar(training, dataset, self.config.allow_missing_classes)]
        self._named_as_a_whole = {spec.case for spec in specs if spec.slice is None}
        return load_exemplars(specs, training, dataset, self.config.allow_missing_classes)

    def _find_unlabelled(
        self, dataset: PreprocessedDataset, training: Sequence[str], annotated: Collection[str], validation: Collection[str]
    ) -> dict[str, PreprocessedDataset]:
        signature = configuration_signature(self.plans_manager.plans, self.configuration_name)
        return find_unlabelled(dataset, training, annotated, validation, self.fold, signature)

    def _record(self, unlabelled: Sequence[str]) -> None:
        """Write down what is trained: into the log, the fold's folder and every checkpoint."""
        named = [ExemplarSpec(e.case) if e.case in self._named_as_a_whole else e.spec for e in self.exemplars]
        exemplars = [dataclasses.asdict(spec) for spec in dict.fromkeys(named)]
        self.my_init_kwargs[RECORD] = {"config": self.config.to_dict(), "exemplars": exemplars}
        if self.local_rank == 0:
            record = {**self.my_init_kwargs[RECORD], "unlabelled": list(unlabelled)}
            save_json(record, os.path.join(self.output_folder, "cmems_config.json"))
        how = "chosen automatically" if isinstance(self.config.exemplar, str) else "as configured"
        if takes_all_annotations(self.config.exemplar, self.preprocessed_dataset_folder):
            how = "all that is annotated"
        for spec in dict.fromkeys(named):
            parts = [exemplar for exemplar in self.exemplars if exemplar.case == spec.case]
            place = f"slice {spec.slice} along {spec.axis} (counted from 0)"
            if spec.slice is None:
                empty = sum(not (part.label > 0).any() for part in parts)
                place = "the whole volume" if parts[0].slice is None else f"{len(parts)} slices, {empty} of them without organs"
            unknown = np.mean(np.concatenate([part.label.ravel() < 0 for part in parts if spec in (part.spec, ExemplarSpec(part.case))]))
            place += f", of which {unknown:.2%} are not annotated and left out" if unknown else ""
            self.print_to_log_file(f"Exemplar ({how}): case {spec.case}, {place}")
        self.print_to_log_file(f"Unlabelled training cases: {len(unlabelled)}. CMEMS config: {self._config_source}")

    def _validation_loader(self, cases: Sequence[str]) -> ValidationLoader:
        patch = self.configuration_manager.patch_size
        labels = self.label_manager
        transforms = self.get_validation_transforms(
            self._get_deep_supervision_scales(),
            regions=labels.foreground_regions if labels.has_regions else None,
            ignore_label=labels.ignore_label,
        )
        return ValidationLoader(
            self.dataset_class(self.preprocessed_dataset_folder, cases),
            self.batch_size,
            patch,
            patch,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            transforms=transforms,
        )

    def _with_workers(self, loader: Any, share: int) -> Iterator:
        """``loader`` in nnU-Net's number of worker processes, or in this one where that number is 0."""
        processes = get_allowed_n_proc_DA()
        if processes == 0:
            return SingleThreadedAugmenter(loader, None)
        processes = max(1, processes // share)
        seeds = None
        if self.config.seed is not None:  # no two of them equal, nor equal to those of another GPU's loader
            seeds = resume.seeds(self.config.seed, self.current_epoch, share, processes * (self.local_rank + 1))[-processes:]
        pinned = self.device.type == "cuda"
        loader = resume.EndsWithTraining(loader)
        return NonDetMultiThreadedAugmenter(loader, None, processes, max(3, processes // 2), seeds, pin_memory=pinned, wait_time=0.002)

    # ------------------------------------------------------------------ training

    def _prepare_objective(self) -> None:
        config = self.config.scheduled
        if config.synthetic.enabled and not self._synthesises:
            config = dataclasses.replace(config, synthetic=TermConfig(enabled=False))
            why = "no annotated slice shows every class, so that they would lack organs ('complete_only' of 'synthesis')"
            if all(exemplar.plane is not None for exemplar in self.exemplars):
                why = "only slices of volumes are annotated, which no organ can be cut out of"
            self.print_to_log_file(f"No synthetic images: {why}.")
            if not config.supervised.enabled:
                raise CMEMSError(
                    f"'supervised' is switched off ({self._config_source}) and there can be no synthetic images: {why}; switch it on."
                )
        told_apart = self._scan_labels is not None and self._scan_labels.arranged_only  # scans that are misunderstood, from the others
        sizes = config.organ_scale or (ANY_SIZE if told_apart and scan_labels.one_slice_a_case(self.exemplars) else AS_ANNOTATED)
        config = dataclasses.replace(config, organ_scale=sizes)
        if sizes != AS_ANNOTATED:
            self.print_to_log_file(
                f"In exemplar and synthetic images each organ is zoomed on its own, by {sizes[0]:g} to {sizes[1]:g} ('organ_scale')."
            )
        images, labels = _sources(self.exemplars)
        patch, spacing = self.configuration_manager.patch_size, self.configuration_manager.spacing
        complete_only = config.synthesis.complete_only
        bank = ExemplarBank(images, labels, patch, self.device, reach(config.synthesis, patch), spacing, complete_only, sizes)
        counts = self.label_space.counts(bank.labels).to(self.device)

        def weights(progress: float) -> Tensor:
            return weights_from(counts, config.class_weighting_at(progress))

        pseudo_weights = self.label_space.weights(bank.labels, self.config.pseudo_class_weighting)
        batches = batch_sizes(config, self.configuration_manager.batch_size)
        part = distributed.share(batches, self.local_rank, distributed.count_processes())
        self._objective = Objective(
            config, bank, part, self.label_space, weights, pseudo_weights.to(self.device), self._autocast
        )
        first, last = (np.round(weights(progress).tolist(), 2).tolist() for progress in (0.0, 1.0))
        self.print_to_log_file(
            f"Images a step: {batches.exemplar} exemplar and {batches.synthetic} synthetic views per member, {batches.unlabelled} "
            f"unlabelled images{distributed.shared_out(batches, part)}; class weights {first} at the start, {last} at the end"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda") if self.device.type == "cuda" else dummy_context()

    def on_train_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        super().on_train_start()
        state = random.getstate()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            unlabelled, offsets = self._unlabelled(next(self.dataloader_train))
            path = os.path.join(self.output_folder, "exemplar.png")
            label = functools.partial(self._scan_labels.rehearse, self) if self._scan_labels else None
            rehearse(self.network, self._objective, unlabelled, offsets, label)
            drawn = self._objective, self.exemplars, unlabelled, offsets, self._class_names()
            self._side_files.write(path, lambda path: draw_snapshot(path, *drawn))
        random.setstate(state)

    def _class_names(self) -> dict[int, str]:
        """The name of each value that a label map may have, for pictures."""
        return dict(LabelValues.of(self.dataset_json).names)

    @one_sentence(while_training)
    def run_training(self) -> None:
        draw = self.logger.plot_progress_png
        self.logger.plot_progress_png = lambda folder: self._side_files.write(os.path.join(folder, "progress.png"), lambda _: draw(folder))
        with workers_stopped(self):
            super().run_training()

    def train_step(self, batch: dict) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.lr_scheduler, WarmedUpPoly):
            self.lr_scheduler.set(self._progress(), self.num_epochs * self.num_iterations_per_epoch)
        unlabelled, offsets = self._unlabelled(batch)
        labels = (batch["label"].to(self.device, non_blocking=True),) if "label" in batch else ()
        step = self._objective(self.network, unlabelled, self._progress(), offsets, *labels)
        scaler = self.grad_scaler
        (step.total if scaler is None else scaler.scale(step.total)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(member.parameters(), 12) for member in self.mutual_networks.members]  # nnU-Net's value
        losses = {"loss": step.total.detach(), **{f"loss/{name}": term for name, term in step.terms.items()}}
        values = _to_host({**losses, **step.statistics, "norms": torch.stack(norms)})
        broken = broken_terms(values, values.pop("norms"), scaler, self.device)
        self._stop_at_nan(broken)
        if not broken:
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        if scaler is not None:
            scaler.update()
        if self.config.ema_decay and not broken:
            done = self.current_epoch * self.num_iterations_per_epoch + self._step_in_epoch
            self.mutual_networks.update_teachers(min(1 - 1 / (done + 1), self.config.ema_decay))  # a true mean at first
        self._step_in_epoch += 1
        return {} if broken else values

    def validation_step(self, batch: dict) -> dict:
        _raise_error(batch)
        return super().validation_step(batch)

    def _unlabelled(self, batch: dict) -> tuple[Tensor | None, Tensor | None]:
        _raise_error(batch)
        if "data" not in batch:
            return None, None
        return batch["data"].to(self.device, non_blocking=True), batch["offset"].to(self.device, non_blocking=True)

    def _progress(self) -> float:
        return (self.current_epoch + self._step_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def _stop_at_nan(self, broken: Sequence[str]) -> None:
        """Count a step, which is skipped where anything is ``broken``; stop where that happens too often, or cannot help."""
        why = self._skipped.count(broken, self.num_iterations_per_epoch)
        if self._skipped.in_a_row == 1:  # skipping steps mends no weights
            why = broken_weights(self.mutual_networks) or why
        if why:
            raise not_finite(self, f"term {', '.join(broken)}", why)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._step_in_epoch = 0
        if self._scan_labels is not None:
            self._scan_labels.before_epoch(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self._scan_labels is not None:
            scan_labels.remove(self)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        skipped = self._skipped.in_epoch
        if skipped:
            self.print_to_log_file(self._skipped.end_epoch(len(train_outputs)))
            self.history.add({"steps/skipped": skipped}, self.current_epoch)
        losses = [{"loss": output["loss"]} for output in train_outputs if output]  # a skipped step returns nothing
        super().on_train_epoch_end(losses or [{"loss": float("nan")}])
        self.history.add_epoch(distributed.gathered(train_outputs), self.current_epoch, self.label_space.names)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        if val_outputs:
            super().on_validation_epoch_end(val_outputs)
        else:  # no validation labels
            unknown = [float("nan")] * len(self.label_space.names)
            for key, value in {"mean_fg_dice": float("nan"), "dice_per_class_or_region": unknown, "val_losses": float("nan")}.items():
                self.logger.log(key, value, self.current_epoch)
        if self.hidden_labels is not None:
            found = self.hidden_labels.accuracy(self.mutual_networks, self.config.tau, self.device)
            self.history.add(found, self.current_epoch)
            self._write_reliability(self.hidden_labels)

    def _write_reliability(self, labels: HiddenLabels) -> None:
        """Add the epoch to ``cmems_reliability.json``."""
        path = os.path.join(self.output_folder, "cmems_reliability.json")
        epochs = []
        if self.current_epoch:
            with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
                epochs = json.load(file)["epochs"][: self.current_epoch]
        epochs += [None] * (self.current_epoch - len(epochs))
        every, foreground = (reliability.to_json() for reliability in labels.reliability)
        content = {"edges": CONFIDENCES, "epochs": [*epochs, {**every, "foreground": foreground}]}
        self._side_files.write(path, lambda path: write_json(path, content))

    @one_sentence(while_validating)
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, where the fold has validation cases; then ``unlabelled.png``, a look at scans without labels."""
        training, validation = self.do_split()
        if len(validation):
            super().perform_actual_validation(save_probabilities)
            if self.local_rank == 0:
                check_masks(os.path.join(self.output_folder, "validation"), validation, self.dataset_json["file_ending"])
        if self.local_rank == 0:
            look = functools.partial(self._look_at_unlabelled, training, validation)
            self._side_files.write(os.path.join(self.output_folder, "unlabelled.png"), look)
        self.set_deep_supervision_enabled(self.enable_deep_supervision)

    def _look_at_unlabelled(self, training: Sequence[str], validation: Sequence[str], path: str) -> None:
        annotated = {spec["case"] for spec in self.my_init_kwargs[RECORD]["exemplars"]}
        cases = self._find_unlabelled(self.preprocessed_dataset(), training, annotated, validation)
        if not cases:
            return
        chosen = {case: cases[case] for case in sample(list(cases))}
        with predicting(self, mirroring=True) as predictor:
            looks = look_at(chosen, self.mutual_networks, predictor, predict_with_one_network, self.label_space, self.label_manager)
        draw_looks(path, looks, self._class_names())
        self.print_to_log_file(f"A look at {len(looks)} unlabelled scans: {path}")

    def on_epoch_end(self) -> None:
        why = broken_weights(self.mutual_networks)
        if why:  # of the epoch's last step; no checkpoint may get them
            raise not_finite(self, "at the epoch's end", why)
        self.history.complete(self.current_epoch)
        self.history.print_epoch(self.print_to_log_file)
        super().on_epoch_end()
        if self.config.best_checkpoint == "agreement" and self.history.last_is_best():
            self.current_epoch -= 1  # nnU-Net has counted on already; it does the same in on_train_end
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_best.pth"))
            self.current_epoch += 1
        self._side_files.write(os.path.join(self.output_folder, "cmems_progress.png"), self.history.plot)
        self._side_files.write(os.path.join(self.output_folder, "cmems_history.json"), self.history.write)
        distributed.wait_for_all()  # the others may be about to read a checkpoint (--val_best)

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint and the states of all random numbers; written beside the old one and then put in its place.

        It holds tensors and plain types only: ``torch.load(..., weights_only=True)`` reads it.

        Raises:
            CMEMSError: it cannot be written; the old one is untouched.
        """
        if self.disable_checkpointing or self.local_rank:  # the first process writes, the others have nothing to rename
            super().save_checkpoint(filename)
            return
        with resume.written_whole(filename) as temporary, resume.loadable(self, self._random_numbers):
            super().save_checkpoint(temporary)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's, after a check that the checkpoint is of this trainer and, to continue, of this config.

        Validation alone (``--val``) uses the config that the checkpoint was trained with.

        Raises:
            CMEMSError: unreadable file, another trainer, another number of members or another config.
        """
        path = str(filename_or_checkpoint)
        try:
            checkpoint = resume.read_checkpoint(path)
            trainer, weights, record = checkpoint["trainer_name"], checkpoint["network_weights"], checkpoint["init_args"].get(RECORD)
        except Exception as error:  # unpickling a damaged file raises nearly anything
            raise CMEMSError(f"{path} cannot be read as a checkpoint ({first_line(error)}); delete it and continue with --c.") from error
        if trainer != type(self).__name__ or record is None:
            raise CMEMSError(f"{path} was written by {trainer}, not by {type(self).__name__}; name its trainer with -tr.")
        config = with_overrides(CMEMSConfig(), record["config"], path)
        if count_members(weights) != config.num_members or (self._continues and config.num_members != self.config.num_members):
            raise CMEMSError(
                f"{path} holds {count_members(weights)} members, the config asks for {self.config.num_members}; set 'num_members' to "
                f"{count_members(weights)} or start a new training without --c."
            )
        if self._continues:
            changed = differences(config.to_dict(), self.config.to_dict())  # a key that is newer than the checkpoint has its default
            if changed:
                raise CMEMSError(
                    f"the training in {self.output_folder} was started with another config: {', '.join(changed)}; restore it "
                    f"({self._config_source}) or start a new training without --c."
                )
        elif not self.was_initialized:
            self._use(config)
        super().load_checkpoint(path)
        self.my_init_kwargs.pop(resume.RANDOM, None)
        if self._continues:
            if resume.RANDOM in checkpoint["init_args"] and self.local_rank == 0:  # they are the first process's
                self._random_numbers.load(checkpoint["init_args"][resume.RANDOM])
            elif self.config.seed is not None:  # or the draws of the first epochs would be repeated
                _seed_everything(resume.seeds(self.config.seed, self.current_epoch, 0, self.local_rank + 1)[-1])
            if self.local_rank == 0:
                resume.remove_leftovers(self.output_folder)
                resume.write_missed_best(self, path)

    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        if self.current_epoch == 0 and self.local_rank == 0:
            resume.remove_leftovers(self.output_folder)
        if self._random_numbers.go_on():
            self.print_to_log_file(resume.how_it_goes_on(self.device, get_allowed_n_proc_DA()))


def _refuse_unsupported(plans: dict, configuration: str, dataset_json: dict) -> None:
    """Raise a :class:`CMEMSError` for what works in nnU-Net but not here yet."""
    check_description(dataset_json, os.path.join(nnUNet_preprocessed.get() or "", plans["dataset_name"], "dataset.json"))
    wanted = PlansManager(plans).get_configuration(configuration)
    if wanted.previous_stage_name is not None:
        raise CMEMSError(
            f"configuration '{configuration}' is a cascade's second stage, which nnUNetTrainerCMEMS cannot train; use 2d or 3d_fullres."
        )


def _turned(patch: Sequence[int], spacing: Sequence[float], angle: float, scale: tuple[float, float]) -> list[float]:
    """Voxels that a patch needs so that it can be turned by ``angle`` (radians) and zoomed within ``scale``."""
    spacing = [1000 * s for s in spacing]  # get_patch_size rounds to whole numbers
    sides = [n * s for n, s in zip(patch, spacing, strict=True)]
    planes = rotation_planes(spacing)
    if len(planes) == 1:
        turned = [side / min(scale) for side in sides]  # thick slices are not tilted
        for axis, side in zip(planes[0], get_patch_size([sides[a] for a in planes[0]], (-angle, angle), 0, 0, scale), strict=True):
            turned[axis] = side
    else:
        turned = list(get_patch_size(sides, *[(-angle, angle)] * 3, scale))
    return [max(side / s, n) for side, s, n in zip(turned, spacing, patch, strict=True)]


def _sources(exemplars: Sequence[Exemplar]) -> tuple[list[Tensor], list[Tensor | list[AnnotatedPlane]]]:
    """The exemplars as the bank takes them: the annotated slices of one volume together."""
    images: list[Tensor] = []
    labels: list[Tensor | list[AnnotatedPlane]] = []
    planes: dict[str, list[AnnotatedPlane]] = {}
    for exemplar in exemplars:
        if exemplar.plane is not None and exemplar.case in planes:
            planes[exemplar.case].append(exemplar.plane)
            continue
        images.append(torch.from_numpy(exemplar.image))
        if exemplar.plane is None:
            labels.append(torch.from_numpy(exemplar.label))
        else:
            planes[exemplar.case] = [exemplar.plane]
            labels.append(planes[exemplar.case])
    return images, labels


def _nothing() -> Iterator[dict]:
    """An endless stream of empty batches."""
    return iter(dict, None)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _load_pretrained_into_every_member(network: nn.Module, fname: str, verbose: bool = False) -> None:
    """nnU-Net's loading of pretrained weights; a plain network's weights go to every member of its architecture."""
    module = distributed.unwrapped(network)
    weights = resume.read_checkpoint(fname)["network_weights"]
    if not isinstance(module, MutualNetworks) or count_members(weights):
        _load_pretrained_into_one(network, fname, verbose)
        return
    fitting = [member for member in module.members if set(weights) == set(member.state_dict())]
    for member in fitting or module.members:  # where none fits, nnU-Net says why
        _load_pretrained_into_one(member, fname, verbose)
    if 0 < len(fitting) < len(module.members):
        print(f"{len(module.members) - len(fitting)} of the members have another architecture than {fname} and begin afresh.")


def _to_host(values: dict[str, Tensor]) -> dict[str, Any]:
    """All tensors at once as numpy scalars and arrays: the device is waited for once."""
    flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()]).cpu().numpy()
    found, first = {}, 0
    for name, value in values.items():
        part = flat[first : first + value.numel()]
        found[name] = part.reshape(value.shape) if value.ndim else part[0]
        first += value.numel()
    return found


def _raise_error(batch: dict) -> None:
    """Raise what a loader, perhaps in a worker process, could only report."""
    if "error" in batch:
        raise CMEMSError(batch["error"])
