"""The trainer that nnU-Net sees: its life cycle on one side, :mod:`nnunetv2_cmems.method` on the other."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
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
from torch import distributed as dist
from torch._dynamo import OptimizedModule

from nnunetv2_cmems.config import CMEMSConfig, ExemplarSpec, differences, load_config, with_overrides
from nnunetv2_cmems.data.exemplar import Exemplar, PreprocessedDataset, choose_exemplar, load_exemplars
from nnunetv2_cmems.data.unlabelled import UnlabelledLoader, check_images
from nnunetv2_cmems.data.validation import ValidationLoader
from nnunetv2_cmems.errors import CMEMSError, first_line, show_errors_as_sentences
from nnunetv2_cmems.method.exemplars import ExemplarBank
from nnunetv2_cmems.method.losses import class_weights
from nnunetv2_cmems.method.networks import MutualNetworks, count_members, splits
from nnunetv2_cmems.method.objective import Objective, batch_sizes
from nnunetv2_cmems.method.synthesis import reach
from nnunetv2_cmems.trainers.hidden_labels import HiddenLabels
from nnunetv2_cmems.trainers.history import History
from nnunetv2_cmems.trainers.snapshot import draw_snapshot

_predict_with_one_network = nnUNetPredictor.predict_sliding_window_return_logits

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
        self.history = History(self.logger)
        self._objective: Any = None  # an Objective once the data is known
        self.hidden_labels: HiddenLabels | None = None
        self.exemplars: list[Exemplar] = []

    def _use(self, config: CMEMSConfig) -> None:
        self.config = config
        self.initial_lr = config.initial_lr
        self.num_epochs = config.num_epochs
        self.num_iterations_per_epoch = config.iterations_per_epoch
        self.num_val_iterations_per_epoch = config.val_iterations_per_epoch
        self.save_every = config.checkpoint_every
        if config.best_checkpoint == "agreement":
            self._best_ema = np.inf  # switches nnU-Net's own choice off, which follows validation labels
        # nnU-Net calls this with the network's arguments; the number of members comes from the config
        build = functools.partial(type(self).build_network_architecture, num_members=config.num_members)
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
    ) -> nn.Module:
        """The members, each of the plans' architecture and drawn afresh.

        At inference the number of members follows the weights that are loaded.
        """

        def make_member() -> nn.Module:
            return get_network_from_plans(
                configuration_manager.network_arch_class_name,
                configuration_manager.network_arch_init_kwargs,
                configuration_manager.network_arch_init_kwargs_req_import,
                num_input_channels,
                num_output_channels,
                allow_init=True,
                deep_supervision=enable_deep_supervision,
            )

        return MutualNetworks(make_member, num_members)

    @property
    def mutual_networks(self) -> Any:
        """The :class:`MutualNetworks` without torch.compile's wrapper; None before ``initialize``."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.mutual_networks.deep_supervision = enabled

    def initialize(self) -> None:
        if self.config.seed is not None:
            _seed_everything(self.config.seed)
        super().initialize()
        if self.config.feature.enabled and not splits(self.mutual_networks.members[0]):
            raise CMEMSError(
                f"{self.configuration_manager.network_arch_class_name} does not split into an encoder and a decoder, so its features "
                'cannot be perturbed; choose plans of another architecture, or switch the term off: {"feature": {"enabled": false}}.'
            )
        # nnU-Net's -pretrained_weights expects one plain network
        run_training.load_pretrained_weights = _load_pretrained_into_every_member

    # ------------------------------------------------------------------ data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's hook; ours decides by it the size of unlabelled crops and which axes inference may mirror."""
        patch = self.configuration_manager.patch_size
        axes = tuple(range(len(patch))) if self.config.exemplar_views.mirror else None
        self.inference_allowed_mirroring_axes = axes
        views = self.config.unlabelled_views
        angle = np.deg2rad(views.rotation)
        largest = [n * (1 + 2 * (views.shift + views.elastic)) for n in get_patch_size(patch, (-angle, angle), 0, 0, views.scale)]
        return (-angle, angle), False, [int(np.ceil(n)) for n in largest], axes

    def get_dataloaders(self) -> tuple[Iterator, Iterator]:
        """The unlabelled crops, and nnU-Net's own validation loader. The exemplars need no loader."""
        training, validation = self.do_split()
        if not len(validation):
            raise CMEMSError(f"fold {self.fold} has no validation case; add one to splits_final.json, or train fold 'all'.")
        dataset = self.preprocessed_dataset()
        self.exemplars = self._find_exemplars(training, dataset)
        annotated = {exemplar.case for exemplar in self.exemplars}
        unlabelled = [case for case in sorted(training) if case not in annotated]
        if self._needs_unlabelled and not unlabelled:
            raise CMEMSError(
                f"fold {self.fold} has no unlabelled training case beside the exemplar ({', '.join(sorted(annotated))}); add scans to "
                "the data set, or train nnUNetTrainerCMEMS_exemplarOnly, which needs none."
            )
        check_images([*sorted(annotated), *unlabelled, *sorted(validation)], dataset, self.configuration_manager, self.num_input_channels)
        self._record(unlabelled)
        self._prepare_objective()
        if self.config.log_hidden_accuracy and self.config.uses_unlabelled:
            self.hidden_labels = HiddenLabels.of(unlabelled, dataset, self.configuration_manager.patch_size)
        *_, crop, _ = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        train: Iterator
        if self._needs_unlabelled:
            size = self._objective.batches.unlabelled or 2  # where only the synthetic stream needs them
            train = self._with_workers(UnlabelledLoader(unlabelled, dataset, size, crop, self.configuration_manager.patch_size), 1)
        else:
            train = iter(dict, None)  # an endless stream of empty batches
        val = self._with_workers(self._validation_loader(validation), 2)
        _raise_error(next(val))
        return train, val

    def preprocessed_dataset(self) -> PreprocessedDataset:
        """What the data layer has to know about the preprocessed folder."""
        self.dataset_class: Any = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        return PreprocessedDataset.from_plans(self.preprocessed_dataset_folder, self.dataset_class, self.plans_manager, self.dataset_json)

    @property
    def _needs_unlabelled(self) -> bool:
        return self.config.uses_unlabelled or (self.config.synthetic.enabled and self.config.synthesis.unlabelled_background > 0)

    def _find_exemplars(self, training: Sequence[str], dataset: PreprocessedDataset) -> list[Exemplar]:
        specs: Sequence[ExemplarSpec]
        if self.config.exemplar != "auto":
            specs = self.config.exemplar
        elif RECORD in self.my_init_kwargs:  # a resumed run goes on with what it chose
            specs = [ExemplarSpec(**exemplar) for exemplar in self.my_init_kwargs[RECORD]["exemplars"]]
        else:
            specs = [choose_exemplar(training, dataset, self.config.allow_missing_classes)]
        return load_exemplars(specs, training, dataset, self.config.allow_missing_classes)

    def _record(self, unlabelled: Sequence[str]) -> None:
        """Write down what is trained: into the log, the fold's folder and every checkpoint."""
        exemplars = [dataclasses.asdict(exemplar.spec) for exemplar in self.exemplars]
        self.my_init_kwargs[RECORD] = {"config": self.config.to_dict(), "exemplars": exemplars}
        save_json({**self.my_init_kwargs[RECORD], "unlabelled": list(unlabelled)}, os.path.join(self.output_folder, "cmems_config.json"))
        how = "chosen automatically" if self.config.exemplar == "auto" else "as configured"
        for exemplar in self.exemplars:
            self.print_to_log_file(f"Exemplar ({how}): case {exemplar.case}, slice {exemplar.slice} along {exemplar.axis} (counted from 0)")
        self.print_to_log_file(f"Unlabelled training cases: {len(unlabelled)}. CMEMS config: {self._config_source}")

    def _validation_loader(self, cases: Sequence[str]) -> ValidationLoader:
        patch = self.configuration_manager.patch_size
        transforms = self.get_validation_transforms(self._get_deep_supervision_scales())
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
        first = (self.config.seed or 0) + 10_000 * self.current_epoch + 1000 * share
        seeds = None if self.config.seed is None else [first + i for i in range(processes)]
        return NonDetMultiThreadedAugmenter(
            loader, None, processes, max(3, processes // 2), seeds, pin_memory=self.device.type == "cuda", wait_time=0.002
        )

    # ------------------------------------------------------------------ training

    def _prepare_objective(self) -> None:
        images = [torch.from_numpy(exemplar.image) for exemplar in self.exemplars]
        labels = [torch.from_numpy(exemplar.label) for exemplar in self.exemplars]
        patch = self.configuration_manager.patch_size
        bank = ExemplarBank(images, labels, patch, self.device, reach(self.config.synthesis, patch))
        classes = self.label_manager.num_segmentation_heads
        weights = class_weights(bank.labels, classes, self.config.class_weighting)
        pseudo_weights = class_weights(bank.labels, classes, self.config.pseudo_class_weighting)
        batches = batch_sizes(self.config, self.batch_size)
        self._objective = Objective(
            self.config, bank, batches, weights.to(self.device), pseudo_weights.to(self.device), self._autocast
        )
        self.print_to_log_file(
            f"Images a step: {batches.exemplar} exemplar and {batches.synthetic} synthetic views per member, {batches.unlabelled} "
            f"unlabelled images; class weights {[round(float(weight), 2) for weight in weights]}"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda") if self.device.type == "cuda" else dummy_context()

    def on_train_start(self) -> None:
        super().on_train_start()
        state = random.getstate()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            unlabelled, offsets = self._unlabelled(next(self.dataloader_train))
            path = os.path.join(self.output_folder, "exemplar.png")
            draw_snapshot(path, self._objective, self.exemplars, unlabelled, offsets, self._class_names())
        random.setstate(state)

    def _class_names(self) -> dict[int, str]:
        return {int(value): name for name, value in self.dataset_json["labels"].items()}

    def train_step(self, batch: dict) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        unlabelled, offsets = self._unlabelled(batch)
        step = self._objective(self.network, unlabelled, self._progress(), offsets)
        scaler = self.grad_scaler
        (step.total if scaler is None else scaler.scale(step.total)).backward()
        values = _to_host({"loss": step.total.detach(), **{f"loss/{name}": term for name, term in step.terms.items()}, **step.statistics})
        self._stop_at_nan(values)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(member.parameters(), 12) for member in self.mutual_networks.members]  # nnU-Net's value
        if scaler is None:  # a scaler skips the step by itself where a gradient overflows
            self._stop_at_nan({f"loss/gradient of member {i}": float(norm) for i, norm in enumerate(norms)})
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self._step_in_epoch += 1
        return values

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

    def _stop_at_nan(self, values: dict[str, Any]) -> None:
        broken = [name for name in values if name.startswith("loss/") and not np.isfinite(values[name])]
        if broken or not np.isfinite(values.get("loss", 0.0)):
            raise CMEMSError(
                f"the loss is not a finite number any more (term {', '.join(name[5:] for name in broken) or 'total'}, "
                f"epoch {self.current_epoch}, step {self._step_in_epoch}); the last checkpoint in {self.output_folder} is untouched: "
                "lower 'initial_lr' in cmems.json and start again."
            )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._step_in_epoch = 0

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        self.history.add_epoch(train_outputs, self.current_epoch, self._class_names())

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        if self.hidden_labels is not None:
            found = self.hidden_labels.accuracy(self.mutual_networks, self.config.tau, self.device, self._class_names())
            self.history.add(found, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.history.complete(self.current_epoch)
        self.history.print_epoch(self.print_to_log_file)
        super().on_epoch_end()
        if self.config.best_checkpoint == "agreement" and self.history.last_is_best():
            self.current_epoch -= 1  # nnU-Net has counted on already; it does the same in on_train_end
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_best.pth"))
            self.current_epoch += 1
        self.history.plot(os.path.join(self.output_folder, "cmems_progress.png"))

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, written beside the old one and then put in its place.

        Raises:
            CMEMSError: it cannot be written; the old one is untouched.
        """
        if self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        temporary = f"{filename}.tmp"
        try:
            super().save_checkpoint(temporary)
            if os.path.isfile(temporary):
                os.replace(temporary, filename)
        except (OSError, RuntimeError) as error:
            if os.path.isfile(temporary):
                os.remove(temporary)
            raise CMEMSError(
                f"{filename} cannot be written ({first_line(error)}); the last whole checkpoint is untouched: make room on the disk and "
                "continue with --c."
            ) from error

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's, after a check that the checkpoint is of this trainer and, to continue, of this config.

        Validation alone (``--val``) uses the config that the checkpoint was trained with.

        Raises:
            CMEMSError: unreadable file, another trainer, another number of members or another config.
        """
        path = str(filename_or_checkpoint)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
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
            changed = differences(record["config"], self.config.to_dict())
            if changed:
                raise CMEMSError(
                    f"the training in {self.output_folder} was started with another config: {', '.join(changed)}; restore it "
                    f"({self._config_source}) or start a new training without --c."
                )
        elif not self.was_initialized:
            self._use(config)
        super().load_checkpoint(path)
        if self.config.seed is not None:  # or the epochs to come would repeat the draws of the first ones
            _seed_everything(self.config.seed + self.current_epoch)


def _refuse_unsupported(plans: dict, configuration: str, dataset_json: dict) -> None:
    """Raise a :class:`CMEMSError` for what works in nnU-Net but not here yet."""
    manager = PlansManager(plans)
    wanted = manager.get_configuration(configuration)
    labels = manager.get_label_manager(dataset_json)
    if len(wanted.patch_size) != 2:
        raise CMEMSError(f"configuration '{configuration}' is 3D, which nnUNetTrainerCMEMS cannot train yet; use a 2D one (such as 2d).")
    if labels.has_regions:
        raise CMEMSError("dataset.json defines regions, which nnUNetTrainerCMEMS cannot train yet; define plain labels instead.")
    if labels.has_ignore_label:
        raise CMEMSError("dataset.json defines an ignore label, which nnUNetTrainerCMEMS cannot train with yet; remove it.")
    if wanted.previous_stage_name is not None:
        raise CMEMSError(f"configuration '{configuration}' is a cascade's second stage, which nnUNetTrainerCMEMS cannot train; use 2d.")
    if dist.is_available() and dist.is_initialized():
        raise CMEMSError("nnUNetTrainerCMEMS cannot train on several GPUs yet; leave out -num_gpus.")


@torch.inference_mode()
def _predict_like_folds(predictor: nnUNetPredictor, input_image: Tensor) -> Tensor:
    """Sliding-window logits, the members' mean taken as nnU-Net takes the mean of folds.

    nnU-Net sums the tiles in half precision. The mean of the members must be taken after that, as it is
    for folds, so that an export with the members as folds predicts the same masks to the last voxel.

    Shape:
        (C, *spatial) to (K, *spatial), half precision.
    """
    network = predictor.network._orig_mod if isinstance(predictor.network, OptimizedModule) else predictor.network
    if not isinstance(network, MutualNetworks) or len(network.members) == 1:
        return _predict_with_one_network(predictor, input_image)
    predictions = []
    try:
        for member in range(len(network.members)):
            network.only = member
            predictions.append(_predict_with_one_network(predictor, input_image).to("cpu"))
    finally:
        network.only = None
    total = predictions[0]
    for prediction in predictions[1:]:
        total = total + prediction
    return total / len(predictions)


nnUNetPredictor.predict_sliding_window_return_logits = _predict_like_folds


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _load_pretrained_into_every_member(network: nn.Module, fname: str, verbose: bool = False) -> None:
    """nnU-Net's loading of pretrained weights; a plain network's weights go to every member."""
    module = network._orig_mod if isinstance(network, OptimizedModule) else network
    weights = torch.load(fname, map_location="cpu", weights_only=False)["network_weights"]
    if not isinstance(module, MutualNetworks) or count_members(weights):
        _load_pretrained_into_one(network, fname, verbose)
        return
    for member in module.members:
        _load_pretrained_into_one(member, fname, verbose)


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
