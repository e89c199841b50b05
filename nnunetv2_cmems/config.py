"""Every hyper-parameter of the method, typed and checked, with where it comes from.

The paper's exact hyper-parameters are not available to us. Unless a comment names another source,
a default is ours: chosen by measuring (``docs/results.md``) or, where we have not measured, by
taking nnU-Net's value or the common one of the semi-supervised literature.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from nnunetv2_cmems.errors import CMEMSError, clipped, shown
from nnunetv2_cmems.files import read_json

CONFIG_VARIABLE = "nnUNet_cmems_config"
"""Environment variable that names a JSON file with overrides."""

CONFIG_FILE = "cmems.json"
"""Name of the override file in the data set's preprocessed folder."""


def _between(low: float, high: float, default: Any) -> Any:
    """A dataclass field whose number (or every number of its tuple) lies in [low, high]."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class ExemplarSpec:
    """One annotated slice, or all that is annotated of a case, named as the user sees it.

    Attributes:
        case: the case identifier, as in nnU-Net's file names without ``_0000`` and file ending.
        slice: zero-based index of the slice in the RAW image along ``axis``. ``None``: all that is annotated of
            the case; in 3D the whole volume, where all of it is.
        axis: the raw image's voxel axis that the slice is an index of: ``"x"``, ``"y"`` or ``"z"``
            (``"z"`` is the last axis of a NIfTI file). ``None``: the axis along which nnU-Net's 2D
            configuration cuts its slices.
    """

    case: str
    slice: int | None = _between(0, 10**9, None)
    axis: Literal["x", "y", "z"] | None = None


@dataclass(frozen=True)
class TermConfig:
    """One term of the loss.

    Attributes:
        enabled: off switch. A disabled term is not computed at all.
        weight: final weight of the term.
        start: fraction of the training before which the weight is 0; of ``image`` and ``feature`` one of its first ``early_steps``, if it
            is longer.
        rampup: likewise, after ``start``, over which the weight grows.
        rampup_shape: how it grows: ``"linear"``, from 0; or ``"gaussian"``, exp(-5 (1 - t)^2) of it at the share t of the
            ramp, as Mean Teacher and its kin do (Laine & Aila, ICLR 2017).
    """

    enabled: bool = True
    weight: float = _between(0.0, 1000.0, 1.0)
    start: float = _between(0.0, 1.0, 0.0)
    rampup: float = _between(0.0, 1.0, 0.0)
    rampup_shape: Literal["linear", "gaussian"] = "linear"

    def weight_at(self, progress: float) -> float:
        """Weight at ``progress`` in [0, 1], the fraction of the training that is done."""
        if not self.enabled or progress < self.start:
            return 0.0
        if self.rampup == 0.0:
            return self.weight
        t = min(1.0, (progress - self.start) / self.rampup)
        return self.weight * (t if self.rampup_shape == "linear" else math.exp(-5.0 * (1.0 - t) ** 2))


@dataclass(frozen=True)
class SpatialConfig:
    """Random spatial deformation, drawn once per image.

    Attributes:
        probability: probability that an image is deformed at all.
        rotation: largest rotation in degrees, either way.
        scale: smallest and largest zoom factor of the content.
        shift: largest shift, as a fraction of the patch's side.
        elastic: largest displacement of the elastic field's control points, as a fraction of the patch's side.
        elastic_nodes: control points of the elastic field along each side.
        mirror: whether the image may be flipped along each axis. Off by default: most anatomy has
            a left and a right, and one exemplar shows it only one way round.
    """

    probability: float = _between(0.0, 1.0, 1.0)
    rotation: float = _between(0.0, 180.0, 30.0)
    scale: tuple[float, float] = _between(0.1, 10.0, (0.7, 1.4))
    shift: float = _between(0.0, 1.0, 0.1)
    elastic: float = _between(0.0, 0.5, 0.04)
    elastic_nodes: int = _between(2, 32, 5)
    mirror: bool = False


@dataclass(frozen=True)
class IntensityConfig:
    """Random change of appearance, drawn once per image and channel (the factor of ``low_resolution``
    once per batch). Images are z-scored, so 1 is about one standard deviation.

    Attributes:
        probability: probability of each of the changes below, drawn for each on its own.
        brightness: largest additive offset.
        contrast: smallest and largest factor of the deviation from the mean.
        gamma: smallest and largest exponent of the range-normalised intensities.
        noise: largest standard deviation of additive Gaussian noise.
        blur: largest sigma, in voxels, of a Gaussian blur.
        bias: largest amplitude of a smooth multiplicative bias field.
        curve: largest strength, in [0, 1], of a random smooth monotone intensity curve.
        low_resolution: largest factor by which the resolution is lowered and restored.
    """

    probability: float = _between(0.0, 1.0, 0.5)
    brightness: float = _between(0.0, 10.0, 0.0)
    contrast: tuple[float, float] = _between(0.05, 20.0, (1.0, 1.0))
    gamma: tuple[float, float] = _between(0.05, 20.0, (1.0, 1.0))
    noise: float = _between(0.0, 10.0, 0.0)
    blur: float = _between(0.0, 20.0, 0.0)
    bias: float = _between(0.0, 1.0, 0.0)
    curve: float = _between(0.0, 1.0, 0.0)
    low_resolution: float = _between(1.0, 16.0, 1.0)


@dataclass(frozen=True)
class SynthesisConfig:
    """The operation Ω: cut the organs out, transform them, overlay them on other backgrounds.

    Attributes:
        joint: transformation of all organs together.
        separate: further transformation of each group of organs that touches no other group; not used
            where there is one group only.
        unlabelled_background: probability that the background is an unlabelled image; otherwise it
            is the exemplar with its organs inpainted. On an unlabelled image the organs are pasted
            about where the exemplar has them, seen from the middle of the image.
        ignore_margin: width, as a fraction of the patch's shorter side, of the band around the
            pasted organs that counts as background on an unlabelled background. What lies beyond
            it may show the organ that the image itself has, and is left out of the loss.
        known_beyond: distance from the pasted organs, as a fraction of the patch's shorter side,
            beyond which an unlabelled background counts as background again: scans of one data set
            show an organ at about the same place, so the image's own lies under or near the pasted
            one. 1 switches this off, for data without such an order.
        complete_only: organs are cut only from exemplars that show every class that any exemplar shows. From the others
            Ω would make images that lack organs, on backgrounds that may have them. Where no exemplar shows every class
            there are no synthetic images.
        blend: sigma, in voxels, of the soft border between organ and background.
        adapt: strength in [0, 1] of the adaptation of the organs' intensities (mean and standard
            deviation of their surroundings) to the background.
    """

    joint: SpatialConfig = SpatialConfig()
    separate: SpatialConfig = SpatialConfig(rotation=15.0, scale=(0.85, 1.15), shift=0.05, elastic=0.02)
    unlabelled_background: float = _between(0.0, 1.0, 0.7)
    ignore_margin: float = _between(0.0, 1.0, 0.05)
    known_beyond: float = _between(0.0, 1.0, 0.2)
    complete_only: bool = True
    blend: float = _between(0.0, 10.0, 1.0)
    adapt: float = _between(0.0, 1.0, 1.0)


@dataclass(frozen=True)
class FeatureConfig:
    """Perturbation of a member's own weak-view features (feature granularity).

    Attributes:
        dropout: probability that a channel is dropped, at every perturbed level. 0.5 at all levels
            is what UniMatch publishes for its feature stream.
        levels: how many encoder levels are perturbed, counted from the deepest. 0: all of them.
    """

    dropout: float = _between(0.0, 0.95, 0.5)
    levels: int = _between(0, 32, 0)


@dataclass(frozen=True)
class ScanLabelsConfig:
    """Labels of whole unlabelled scans, made by the members in the middle of a training; from then on the consistency terms compare with
    these.

    Attributes:
        at: fractions of the training, 0 and 1 excluded, at which labels are made, each time anew, and before that at these fractions of
            its first ``early_steps``, if it is longer, and from there on whenever it is twice as long; ``[]``: never. Nothing is made where
            both consistency terms are switched off; ``consistency`` must be ``"pseudo_label"``.
        propagation: share of a scan's slices, for each class those on which the members agree best, from which what they say is carried to
            the other slices by registration. 0: nothing is carried. Only where slices are more than three times as far apart as their
            pixels (of 2D configurations those of the images, by the plans' median); needs two members.
        turns: degrees by which a scan that is predicted with test-time augmentation is seen turned within its slices, too; a view counts by
            how well the members agree about it. ``[]``: only as it is. Where no case has more than one annotated slice, which does not tell
            how organs lie in other scans; for 2D configurations and thick slices; needs two members.
        turns_in_labels: likewise, by which the members see a scan that they label, such as ``[-60, 60]``. ``[]``: only as it is. Two turns
            nearly double a round's passes; they help where organs lie otherwise in the exemplar than in most scans.
        appearance: weight of the grey values' log-likelihood beside what the members say. 0: their grey values do not count.
        smoothing: sigma, in voxels, of the blur of what the members say; within slices for 2D configurations and thick slices. 0: none.
            Half of it where predictions are refined.
        growth: how far organs may grow over what no edge separates from them, as a fraction of the patch's shorter side. 0: not at all.
            Organs that would grow beyond their border in the annotated images do not.
        largest_piece: keep only the largest connected piece of the foreground where the annotated volume's foreground is one piece, each
            class counting the same in it, and so for each class. Where only slices are annotated, pieces at least half as large as the
            largest one are kept, too: a slice may show one of two organs.
        outlines: what every annotated slice shows as a convex disc gets a smooth outline along the edges of the scan, slice by slice; in
            predictions it may lie far from what is drawn, over what looks like the organ. For 2D configurations and thick slices.
        levels: in predictions, where ``outlines`` is on, what every annotated slice shows as a convex disc within another organ ends at the
            grey value, between the two organs' ones, at which it does there.
        shared_appearance: in predictions classes that never touch and have about the same grey values in the annotated images, as blood in
            two ventricles, have about the same ones in each scan, too.
        contacts: from predictions an organ is removed in slices at the ends of its row in which it touches one that it never touches in the
            annotated images, or background, if it lies within others there; the log says in how many slices of the labels such organs do.
            For 2D configurations and thick slices; to be switched off for what may lie anywhere, such as lesions.
        arranged_only: from the first round of labels on only scans teach whose labels are arranged as in the annotation: that show every
            class which it shows, and in at least half of the slices have within its wall what one other class encloses there. The
            others wait for the next round. Counts where ``contacts`` does, and a class is enclosed so. ``None``: where no case has more
            than one annotated slice. To be switched off where scans need not show every class.
        told_apart_only: where ``arranged_only`` counts, of these scans only those teach in whose labels organs differ in grey values nearly
            as where they are annotated. ``None``: in trainings that are longer than their ``early_steps``.
        waists: likewise, where ``contacts`` is on, one that never touches some other one and has a waist, narrower than in the annotated
            images: there it is two that hang together. Not where a volume is annotated as a whole, which shows where organs end.
        places: organs lie, seen from their common middle, about where the annotated volumes show them. Counts where whole volumes, or
            several slices of one, are annotated, with two classes or more; where a slice beside them no longer shows an organ, not far
            beyond the middle between the two. To be switched off for what may lie anywhere, such as lesions.
        atlases: so many wholly annotated volumes, chosen at random, are registered onto each scan before the first step, and their labels
            count from then on: at first alone, then beside what the members say. 0: none.
        atlases_in_predictions: atlases are registered onto each scan that is predicted, too; needs two members. For this the checkpoints
            hold their grey values and labels: whoever gets one gets these.
        in_space: also where a 3D configuration's voxels are less than three times as thick as wide, and no atlas counts. Off, because it
            cost accuracy on the one such data set that it was tried on.
        most_scans: so many scans get labels by the members at most, chosen at random, the same ones each time; the others are taught as
            before. Atlases are registered onto as many, but not onto fewer than 200 if there are.
    """

    at: tuple[float, ...] = _between(0.0, 1.0, (0.3, 0.5, 0.7, 0.85))
    propagation: float = _between(0.0, 1.0, 0.25)
    turns: tuple[float, ...] = _between(-180.0, 180.0, (-60.0, -30.0, 30.0, 60.0))
    turns_in_labels: tuple[float, ...] = _between(-180.0, 180.0, ())
    appearance: float = _between(0.0, 1.0, 0.5)
    smoothing: float = _between(0.0, 20.0, 1.0)
    growth: float = _between(0.0, 1.0, 0.07)
    largest_piece: bool = True
    outlines: bool = True
    levels: bool = True
    shared_appearance: bool = True
    contacts: bool = True
    arranged_only: bool | None = None
    told_apart_only: bool | None = None
    waists: bool = True
    places: bool = True
    atlases: int = _between(0, 100, 3)
    atlases_in_predictions: bool = True
    in_space: bool = False
    most_scans: int = _between(2, 10**6, 200)


@dataclass(frozen=True)
class CMEMSConfig:
    """All hyper-parameters of one training.

    Attributes:
        exemplar: the annotated slices or volumes; or ``"all"``, everything that is annotated in the fold's training
            cases; or ``"one"``, the slice of them that ``suggest`` would name first (in 3D: the most typical volume), the other labels
            hidden; or ``"auto"``: all where the data set has scans without labels in ``imagesUn``, else one.
        allow_missing_classes: go on when the exemplars together lack a class.
        num_members: number of networks that teach each other. Two is the paper's method; one is
            its own teacher (as in FixMatch).
        architecture: ``"plans"``: all members have the plans' network; ``"mixed"``: every second one its counterpart
            of about the same size, a residual encoder in place of plain convolutions or the other way round; ``"auto"``: mixed
            where a counterpart is known. Networks that differ make different mistakes, and copy fewer of each other's.
        ema_decay: above 0, pseudo-labels are made by running means of the members' weights that keep this share at each
            step (Mean Teacher). The members themselves predict. 0: no running means.
        num_epochs: length of the training in epochs.
        iterations_per_epoch: optimiser steps an epoch (nnU-Net's 250).
        val_iterations_per_epoch: batches of the online validation an epoch (nnU-Net's 50).
        early_steps: a training of more steps than this begins as one of so many steps: the learning rate warms up, the consistency terms
            start and grow, and the first rounds of ``scan_labels`` are made, at these fractions of so many steps. 0: all of it at fractions
            of the whole training, in which an unusual slice may fail by length.
        optimizer: ``"adamw"``, or nnU-Net's ``"sgd"`` (Nesterov momentum 0.99, weight decay 3e-5).
        initial_lr: learning rate at the start of nnU-Net's polynomial decay; ``None``: for SGD nnU-Net's 0.01, for
            AdamW 0.064 by the channels of the network's first stage: 0.008 at 8 channels, where we measured it, and
            0.002 at nnU-Net's 32, where we have not. (Adam's steps do not shrink as layers get wider.)
        lr_warmup: AdamW: fraction of the training, or of its first ``early_steps``, if it is longer, over which the learning rate grows
            from 0.
        weight_decay: AdamW's decoupled weight decay.
        exemplar_batch: exemplar images a step and member; ``None``: a quarter of the plans' batch
            size. The shares of streams that are switched off go to the supervised streams.
        synthetic_batch: synthetic images a step and member; ``None``: a quarter, likewise.
        unlabelled_batch: unlabelled images a step; each makes a weak and a strong view per member;
            ``None``: a quarter.
        supervised: term of the exemplar stream.
        synthetic: term of the synthetic stream.
        image: consistency at image granularity.
        feature: consistency at feature granularity.
        tau: confidence (softmax) from which a prediction is a pseudo-label.
        num_strong: strong views of each unlabelled image and member (two in UniMatch).
        consistency: what a prediction on a strong view or perturbed features is compared with: ``"pseudo_label"``, the
            teacher's decision, by cross-entropy and Dice; or ``"mean_squared_error"``, the teacher's probabilities.
        dice_weight: weight of the soft Dice loss beside cross-entropy, in the supervised terms.
        class_weighting: exponent of the inverse class frequency in the supervised cross-entropy's
            class weights, taken from the exemplars. 0: none; 1: full inverse frequency.
        final_class_weighting: its value at the end of the training; it changes linearly from one to the other. High
            weights find small organs early, low ones draw their borders where they are.
        competence: the two consistency terms are multiplied by how well the members segment the step's own supervised images: the
            Dice of the worst class that these show. Members that have not learned a class yet cannot teach each other that it
            is nowhere.
        pseudo_cross_entropy_weight: weight of the cross-entropy in the two consistency terms.
        pseudo_dice_weight: ``dice_weight`` of the two consistency terms.
        pseudo_dice: over which classes: ``"shown"``, the foreground classes that the pseudo-labels show, or ``"all"``, every
            class with the background, and squares in the denominator, as the public code of UniMatch and its kin has it.
        pseudo_class_weighting: ``class_weighting`` of the two consistency terms.
        exemplar_views: deformation of exemplar images.
        organ_scale: smallest and largest zoom factor of each organ of an exemplar or synthetic image about its own middle, drawn for each
            organ on its own. ``[1, 1]``: organs keep their proportions. ``None``: 0.5 and 2 where ``arranged_only`` of ``scan_labels``
            counts and no case has more than one annotated slice, which does not tell what proportions they have in other scans; else 1
            and 1.
        supervised_intensity: appearance changes of exemplar and synthetic images.
        weak: appearance of weak views.
        strong: appearance of strong views, on top of the weak view's crop.
        cutmix: probability that a strong view gets a rectangle of another image's strong view.
        unlabelled_views: deformation of the unlabelled crop, shared by all of its views.
        synthesis: the operation Ω.
        feature_perturbation: channel dropout of the feature granularity.
        refine_predictions: predictions of whole scans keep organs to their places, follow the most certain slices and the grey values,
            lose small pieces, grow (not where a volume is annotated as a whole), have round organs drawn along their outlines, and lose
            organs where they touch what they never touch, or have a waist, as ``places``, ``propagation``, ``turns``, ``appearance``,
            ``shared_appearance``, ``smoothing``, ``largest_piece``, ``growth``, ``outlines``, ``levels``, ``contacts``, ``waists`` and
            ``atlases_in_predictions`` of ``scan_labels`` say; where a training makes no labels of whole scans, its predictions are not
            refined.
        scan_labels: labels of whole unlabelled scans, in place of the other members' momentary prediction.
        best_checkpoint: what ``checkpoint_best.pth`` follows: ``"agreement"`` of the members on
            unlabelled images, which needs no label, or nnU-Net's own ``"validation_dice"``.
        log_hidden_accuracy: log the accuracy of the pseudo-labels where the hidden labels exist.
        checkpoint_every: epochs between two writings of ``checkpoint_latest.pth``, which are what a kill can lose (nnU-Net: 50).
        seed: seed of everything that is drawn; ``None``: a fresh one for each training. Two runs with
            one seed are equal only without worker processes (``nnUNet_n_proc_DA=0``), whose batches
            arrive in any order.
    """

    exemplar: Literal["auto", "all", "one"] | tuple[ExemplarSpec, ...] = "auto"
    allow_missing_classes: bool = False
    num_members: int = _between(1, 4, 2)
    architecture: Literal["auto", "plans", "mixed"] = "auto"
    ema_decay: float = _between(0.0, 1.0, 0.0)
    num_epochs: int = _between(1, 10**6, 200)
    iterations_per_epoch: int = _between(1, 10**6, 250)
    val_iterations_per_epoch: int = _between(1, 10**6, 50)
    early_steps: int = _between(0, 10**6, 800)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    initial_lr: float | None = _between(1e-8, 10.0, None)
    lr_warmup: float = _between(0.0, 1.0, 0.05)
    weight_decay: float = _between(0.0, 1.0, 1e-2)
    exemplar_batch: int | None = _between(1, 4096, None)
    synthetic_batch: int | None = _between(1, 4096, None)
    unlabelled_batch: int | None = _between(1, 4096, None)
    supervised: TermConfig = TermConfig()
    synthetic: TermConfig = TermConfig()
    image: TermConfig = TermConfig(start=0.2, rampup=0.3)
    feature: TermConfig = TermConfig(start=0.2, rampup=0.3)
    tau: float = _between(0.0, 1.0, 0.95)
    num_strong: int = _between(1, 8, 1)
    consistency: Literal["pseudo_label", "mean_squared_error"] = "pseudo_label"
    dice_weight: float = _between(0.0, 1000.0, 1.0)
    class_weighting: float = _between(0.0, 1.0, 1.0)
    final_class_weighting: float = _between(0.0, 1.0, 0.0)
    competence: bool = True
    pseudo_cross_entropy_weight: float = _between(0.0, 1000.0, 1.0)
    pseudo_dice_weight: float = _between(0.0, 1000.0, 1.0)
    pseudo_dice: Literal["shown", "all"] = "shown"
    pseudo_class_weighting: float = _between(0.0, 1.0, 0.0)
    exemplar_views: SpatialConfig = SpatialConfig(rotation=45.0, scale=(0.6, 1.5), elastic=0.08)
    organ_scale: tuple[float, float] | None = _between(0.35, 3.0, None)
    supervised_intensity: IntensityConfig = IntensityConfig(
        brightness=0.3, contrast=(0.65, 1.5), gamma=(0.6, 1.7), noise=0.1, blur=1.0, bias=0.3, curve=0.3, low_resolution=2.0
    )
    weak: IntensityConfig = IntensityConfig(brightness=0.1, contrast=(0.9, 1.1), noise=0.02)
    strong: IntensityConfig = IntensityConfig(
        probability=0.7, brightness=0.5, contrast=(0.5, 2.0), gamma=(0.5, 2.0), noise=0.2, blur=1.5, bias=0.4, curve=0.5,
        low_resolution=2.0,
    )
    cutmix: float = _between(0.0, 1.0, 0.5)
    unlabelled_views: SpatialConfig = SpatialConfig(rotation=15.0, scale=(0.85, 1.2), shift=0.05, elastic=0.0)
    synthesis: SynthesisConfig = SynthesisConfig()
    feature_perturbation: FeatureConfig = FeatureConfig()
    refine_predictions: bool = True
    scan_labels: ScanLabelsConfig = ScanLabelsConfig()
    best_checkpoint: Literal["agreement", "validation_dice"] = "agreement"
    log_hidden_accuracy: bool = True
    checkpoint_every: int = _between(1, 10**6, 10)
    seed: int | None = _between(0, 2**31 - 1, None)

    @property
    def uses_unlabelled(self) -> bool:
        """Whether any consistency term is switched on."""
        return self.image.enabled or self.feature.enabled

    def learning_rate(self, channels: int) -> float:
        """``initial_lr``, or the optimiser's own for a network whose first stage has so many channels."""
        if self.initial_lr is not None:
            return self.initial_lr
        return 0.064 / channels if self.optimizer == "adamw" else 0.01

    @property
    def scheduled(self) -> CMEMSConfig:
        """This training with fractions of its whole length, where ``early_steps`` makes them fractions of its beginning."""
        steps = self.num_epochs * self.iterations_per_epoch
        if not 0 < self.early_steps < steps:
            return self
        share = self.early_steps / steps
        image, feature = (
            dataclasses.replace(term, start=share * term.start, rampup=share * term.rampup) for term in (self.image, self.feature)
        )
        later = self.scan_labels.at
        early = [share * fraction for fraction in later]
        while early and 2 * early[-1] < later[0]:
            early.append(2 * early[-1])
        labels = dataclasses.replace(self.scan_labels, at=tuple(sorted({*early, *later})))
        return dataclasses.replace(self, image=image, feature=feature, scan_labels=labels, lr_warmup=share * self.lr_warmup, early_steps=0)

    def class_weighting_at(self, progress: float) -> float:
        """The exponent at ``progress`` in [0, 1], the fraction of the training that is done."""
        return self.class_weighting + (self.final_class_weighting - self.class_weighting) * progress

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, from which :func:`with_overrides` makes an equal config."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def with_overrides(base: CMEMSConfig, overrides: dict[str, Any], source: str) -> CMEMSConfig:
    """``base`` with the entries of a (nested, partial) dict replaced.

    Args:
        base: the config of the trainer class.
        overrides: as read from JSON.
        source: the file or place that the overrides come from, for the error's sentence.

    Raises:
        CMEMSError: unknown key, wrong type or value out of range; names the source and the key.
    """
    config = _merge(base, overrides, source, "")
    if not (config.supervised.enabled or config.synthetic.enabled):
        raise CMEMSError(f"{source}: 'supervised' and 'synthetic' are both switched off; switch one of them on, or nothing is learned.")
    return config


def load_config(base: CMEMSConfig, preprocessed_dataset_folder: str | None) -> tuple[CMEMSConfig, str]:
    """The config of a training: the trainer's own, overridden by the user's JSON file.

    The file is the one that the environment variable ``nnUNet_cmems_config`` names, else
    ``cmems.json`` in the data set's preprocessed folder, else none.

    Returns:
        The config and a phrase that says where it comes from.

    Raises:
        CMEMSError: the file is missing, not JSON, or does not fit (see :func:`with_overrides`).
    """
    base = with_overrides(CMEMSConfig(), base.to_dict(), "the trainer's own config")  # a subclass may be anybody's
    path = os.environ.get(CONFIG_VARIABLE)
    if path:
        if not os.path.isfile(path):
            raise CMEMSError(f"{CONFIG_VARIABLE} names '{path}', which is not a file; correct the variable or unset it.")
    elif preprocessed_dataset_folder is not None:
        path = os.path.join(preprocessed_dataset_folder, CONFIG_FILE)
    if not path or not os.path.lexists(path):
        return base, "the trainer's defaults"
    if not os.path.isfile(path):
        raise CMEMSError(f"{path} is a folder, or a link that leads nowhere, where a file with the config is expected; remove it.")
    return with_overrides(base, read_json(path, unique_keys=True, byte_order_mark=True), path), path


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys (dotted) in which two configs, given as plain dicts, differ."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({json.dumps(a)} then, {json.dumps(b)} now)")
    return found


def _merge(base: Any, overrides: Any, source: str, prefix: str) -> Any:
    if not isinstance(overrides, dict):
        what = f"'{prefix[:-1]}'" if prefix else "the file's content"
        raise CMEMSError(f"{source}: {what} must be a JSON object ({{...}}), not {shown(overrides)}.")
    hints = typing.get_type_hints(type(base))
    fields = {f.name: f for f in dataclasses.fields(base)}
    changes = {}
    for key, value in overrides.items():
        if key not in fields:
            raise CMEMSError(f"{source}: unknown key '{prefix}{clipped(key)}'; known keys are {', '.join(sorted(fields))}.")
        old = getattr(base, key)
        if dataclasses.is_dataclass(old):
            changes[key] = _merge(old, value, source, f"{prefix}{key}.")
        else:
            changes[key] = _checked(value, hints[key], fields[key].metadata.get("range"), source, prefix + key)
    return dataclasses.replace(base, **changes)


def _checked(value: Any, hint: Any, limits: tuple[float, float] | None, source: str, key: str) -> Any:
    """``value`` as the type that ``hint`` asks for, or a :class:`CMEMSError`."""
    for option in _options(hint):
        fits, converted = _fit(value, option, source, key)
        if fits:
            break
    else:
        raise CMEMSError(f"{source}: '{key}' must be {_describe(hint)}, not {shown(value)}.")
    if limits is not None and converted is not None:
        numbers = converted if isinstance(converted, tuple) else (converted,)
        if not all(limits[0] <= number <= limits[1] for number in numbers):
            raise CMEMSError(f"{source}: '{key}' is {shown(value)}, which is not between {limits[0]:g} and {limits[1]:g}.")
        if typing.get_args(hint)[1:] == (Ellipsis,):
            if any(number in limits for number in numbers) or list(numbers) != sorted(set(numbers)):
                raise CMEMSError(
                    f"{source}: '{key}' is {shown(value)}; each number must exceed the one before, and lie between {limits[0]:g} and "
                    f"{limits[1]:g}, these two excluded."
                )
        elif len(numbers) == 2 and numbers[0] > numbers[1]:
            raise CMEMSError(f"{source}: '{key}' is {shown(value)}; the first number must not exceed the second.")
    return converted


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(option for part in typing.get_args(hint) for option in _options(part))
    return (hint,)


def _fit(value: Any, option: Any, source: str, key: str) -> tuple[bool, Any]:
    if option is type(None):
        return value is None, None
    if option is bool:
        return isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        return fits, float(max(-1e300, min(1e300, value))) if fits else None
    if option is str:
        return isinstance(value, str), value
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option), value
    items = typing.get_args(option)
    if not isinstance(value, list):
        return False, None
    if items == (float, Ellipsis):
        numbers = [_fit(item, float, source, key) for item in value]
        return all(fits for fits, _ in numbers), tuple(number for _, number in numbers)
    if items[-1] is Ellipsis:  # a list of exemplars
        return len(value) > 0, tuple(_exemplar(item, source, f"{key}[{i}]") for i, item in enumerate(value))
    fitted = [_fit(item, kind, source, key) for item, kind in zip(value, items)]
    return len(value) == len(items) and all(fits for fits, _ in fitted), tuple(item for _, item in fitted)


def _exemplar(value: Any, source: str, key: str) -> ExemplarSpec:
    if not isinstance(value, dict) or "case" not in value:
        example = '{"case": "patient001", "slice": 4}'
        raise CMEMSError(
            f"{source}: '{key}' must name a case, and a slice of it if not all is meant, as {example}, not {shown(value)}."
        )
    if value.get("slice") is None and value.get("axis") is not None:
        raise CMEMSError(f"{source}: '{key}' names an axis but no slice; add \"slice\", or leave out \"axis\".")
    return _merge(ExemplarSpec(case=""), value, source, f"{key}.")


def _describe(hint: Any) -> str:
    names: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    said = []
    for option in _options(hint):
        if option in names:
            said.append(names[option])
        elif typing.get_origin(option) is Literal:
            said.append(" or ".join(json.dumps(choice) for choice in typing.get_args(option)))
        elif typing.get_args(option) == (float, Ellipsis):
            said.append("a list of numbers")
        elif typing.get_args(option)[-1] is Ellipsis:
            said.append("a list of annotated slices")
        else:
            said.append(f"a list of {len(typing.get_args(option))} numbers")
    return " or ".join(said)
