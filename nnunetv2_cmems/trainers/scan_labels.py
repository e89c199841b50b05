"""Labels of whole unlabelled scans, made before a training by registration of annotated volumes, and by the members in its midst.

A round of the members is: predict each scan, keep organs to their places, carry the prediction from slices that members agree on to the
others, take the mean with what annotated volumes say, refine it by the scan's own grey values, keep the largest pieces, draw round organs
along their outlines, write the labels down. From the next batch on the loader hands them out. No random numbers are drawn, and what was
made for later epochs than those that a checkpoint has behind it is made again, so that a training that goes on ends as one without a break.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor
from tqdm import tqdm

from nnunetv2_cmems.config import CMEMSConfig, ScanLabelsConfig
from nnunetv2_cmems.data.exemplar import Exemplar, PreprocessedDataset, load_volume, read_properties
from nnunetv2_cmems.data.planes import FEWEST_OF_A_VOLUME
from nnunetv2_cmems.data.scan_labels import UNKNOWN, ScanLabelFiles
from nnunetv2_cmems.data.unlabelled import open_image, read_image
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.atlas import Atlas, refined_on, to_tensor
from nnunetv2_cmems.method.contacts import Contacts
from nnunetv2_cmems.method.exemplars import AS_ANNOTATED
from nnunetv2_cmems.method.greys import tell_apart, told_apart
from nnunetv2_cmems.method.growth import borders_on_background, ends_at_edges
from nnunetv2_cmems.method.label_space import LabelSpace, Regions
from nnunetv2_cmems.method.objective import LEFT_OUT, Objective, batch_sizes, overlap, passes_per_step
from nnunetv2_cmems.method.outlines import Outlines
from nnunetv2_cmems.method.places import Places
from nnunetv2_cmems.method.planes import AnnotatedPlane, look_up
from nnunetv2_cmems.method.refinement import Refinement, alike_apart, in_one_piece
from nnunetv2_cmems.trainers import distributed, resume
from nnunetv2_cmems.trainers.prediction import Prediction, is_planar, predict_for, predict_like_folds, predicting

FOLDER = "scan_labels"
"""In the fold's folder."""

SHARE_OF_A_SLICE = 0.5
"""What an exemplar slice shows in one piece may have two in a scan, of which the slice crosses one: pieces that are at least half as large
as the largest are kept. A whole annotated volume says how many there are."""

MOST_REGISTERED = 200
"""Scans that annotated volumes are registered onto, where the members label fewer."""

FEWEST_REGISTERED = 0.25
"""Share of the scans to which this must succeed. Else the organs do not keep their arrangement, or the scans show too different parts."""

MOST_SHOWN = 5
"""Annotated scans, chosen at random, that say which organs are round and which end at edges."""

MOST_SLICES = 50
"""Of these, where slices are looked at: a large one takes seconds."""

MOST_THREADS = 4
"""That refine scans while the next one is predicted; as many as nnU-Net's loader may have processes, if these are fewer."""

FEW_SLICES = 0.7
"""Share of the slices in which what lies within another organ where it is annotated does so, below which the log warns in the last round.
On ACDC it is 0.999 in the annotators' own labels, 0.8 or more in trainings that worked, and 0.62 or less in those that failed."""

FEW_SCANS = 0.6
"""Share of the scans in which organs are told apart by grey values as where they are annotated, below which the log warns in the last
round. On ACDC it is 0.8 to 1 in the annotators' own labels, 0.85 or more in predictions of trainings that worked, and 0.4 in the labels
of one that failed, though walls were where they should be in 0.9 of the slices."""

EARLY = CMEMSConfig().early_steps
"""Steps: longer trainings that fail may gain if they begin as one of so many, where they have not."""

SHARE_OF_ATLASES = 0.65
"""Weight of the labels that annotated volumes give by registration, beside what the members say. So these only move a border where the
grey values are on their side, too."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Chosen = TypeVar("Chosen", str, int)


class ScanLabels:
    """The rounds of one training.

    Args:
        trainer: a trainer of ours that has found its exemplars.
        cases: the unlabelled cases, and the preprocessed folder of each.
        atlases: the annotated cases that are registered onto these, from :func:`atlas_cases`.
    """

    def __init__(self, trainer: Any, cases: Mapping[str, PreprocessedDataset], atlases: list[str]) -> None:
        scheduled: CMEMSConfig = trainer.config.scheduled
        self._config: ScanLabelsConfig = scheduled.scan_labels
        if not has_thick_slices(trainer):
            self._config = dataclasses.replace(self._config, propagation=0.0)
        single_slices = one_slice_a_case(trainer.exemplars)
        if self._config.arranged_only is None:
            self._config = dataclasses.replace(self._config, arranged_only=single_slices)
        if self._config.told_apart_only is None:
            self._config = dataclasses.replace(self._config, told_apart_only=scheduled is not trainer.config)
        self._space: LabelSpace = trainer.label_space
        self._cases = {case: cases[case] for case in chosen(cases, self._config.most_scans)}
        self._registered = {case: cases[case] for case in chosen(cases, max(self._config.most_scans, MOST_REGISTERED))}
        dataset = trainer.preprocessed_dataset()
        volumes, some = whole_volumes(trainer.exemplars, dataset), painted_slices(trainer.exemplars, dataset)
        single = in_one_piece(volumes or [exemplar.label for exemplar in trainer.exemplars], self._space)
        resampled = len(trainer.configuration_manager.patch_size) == 3
        self._planar = is_planar(trainer.configuration_manager.spacing)
        self.atlases = atlases
        self._dataset = dataset
        # windows in space show where they are
        placed = self._config.places and (self._planar or self._config.in_space)
        distances = factors_of_distances(trainer.exemplars, dataset, self._cases) if placed and some else None
        places = Places.of(volumes, some, self._space, not resampled, distances) if placed else None
        shown = annotated_slices(trainer.exemplars, MOST_SHOWN) if self._planar else annotated_volumes(trainer.exemplars, MOST_SHOWN)
        outlined = self._config.outlines and self._planar
        greys = [image.mean(0)[0].numpy() for image, _ in shown] if outlined and self._config.levels else []
        outlines = Outlines.of([label[0].numpy() for _, label in shown], self._space, greys) if outlined else None
        reach = self._config.growth * min(trainer.configuration_manager.patch_size[-2:])
        open_ = borders_on_background([exemplar.label for exemplar in trainer.exemplars], self._space)
        grows = ends_at_edges(shown, reach, open_, self._space, self._planar) if reach else open_
        share = 1.0 if volumes else SHARE_OF_A_SLICE
        waists = self._config.waists and not volumes  # a whole volume shows where organs end
        drawn = [label[0].numpy() if self._planar else label.numpy() for _, label in shown]
        contacts = Contacts.of(drawn, self._space, waists=waists)
        alike = alike_apart(shown, contacts, self._space) if contacts and self._config.shared_appearance else ()
        turned = self._planar and trainer.config.num_members > 1 and single_slices
        turns, turns_in_labels = (self._config.turns, self._config.turns_in_labels) if turned else ((), ())
        rule = dataclasses.replace(self._config, turns=turns_in_labels)
        self.refinement = Refinement(rule, single, share, places, outlines, grows, reach)
        # what networks say at the end of a training is more exact than what they say in its midst; and those that have learned from a whole
        # volume know more than one slice's shape
        finer = dataclasses.replace(self._config, smoothing=self._config.smoothing / 2, turns=turns)
        # what labels lack, or have too much of, networks would learn, and round by round it would become more
        self.prediction_refinement = dataclasses.replace(
            self.refinement,
            config=finer,
            reach=0.0 if volumes else reach,
            contacts=contacts if self._config.contacts and self._planar else None,
            alike=alike,
        )
        self._told_apart = told_apart(shown, self._space) if self._planar and self._config.contacts and single_slices else ()
        self._drawn_classes = sorted({int(value) for label in drawn for value in np.unique(label) if value > 0})
        regions = len(self._space.names) if isinstance(self._space, Regions) else 0
        self.files = ScanLabelFiles(os.path.join(trainer.output_folder, FOLDER), regions)
        self._config_without: CMEMSConfig | None = None  # the objective's, where no scan has a label before the members make it
        self.begins = [*([0] if self.atlases else []), *starts(self._config, trainer.num_epochs)]

    def before_epoch(self, trainer: Any) -> None:
        """Make a round where one begins with this epoch, or where the one that counts now is lost.

        Raises:
            CMEMSError: a scan cannot be read, or its labels cannot be written.
        """
        epoch = trainer.current_epoch
        begun = [begin for begin in self.begins if begin <= epoch]
        there = self.files.rounds()
        distributed.wait_for_all()  # every process has looked
        if self.atlases and 0 not in there:
            self._register(trainer)
        if not self.files.cases(0) and not (any(self.begins) and self._members_label()):  # registration has failed, and nothing else labels
            trainer.mutual_networks.refinement = None
        if begun and begun[-1] and self._members_label() and (begun[-1] == epoch or begun[-1] not in there):
            self._make(trainer, begun[-1])
        elif len(there) > 1 and not trainer.local_rank:
            # a training that is killed goes on from a checkpoint that may be older than a round, and then needs the one before
            if resume.epochs_done(os.path.join(trainer.output_folder, "checkpoint_latest.pth")) >= there[-1]:
                self.files.keep({0, there[-1]} if self.atlases else there[-1:])  # what atlases say counts in each round
        if self.atlases:
            self._teach(trainer)

    def _members_label(self) -> bool:
        """Whether the members label scans: in space they do so only beside annotated volumes, unless they are told to."""
        return self._planar or self._config.in_space or bool(self.files.cases(0))

    def _teach(self, trainer: Any) -> None:
        """Let the consistency terms begin with the training, and predictions be registered, if there are labels."""
        objective: Objective = trainer._objective
        self._config_without = self._config_without or objective.config
        config = self._config_without
        begins = bool(self.files.cases(0))
        terms = [term for term in (config.image, config.feature) if term.enabled]
        objective.joining = max(term.start + term.rampup for term in terms) if begins else 0.0
        objective.config = from_the_start(config) if begins else config
        kept = begins and config.refine_predictions and self._config.atlases_in_predictions
        trainer.mutual_networks.atlases = self._kept.to(trainer.device) if kept else None

    def rehearse(self, trainer: Any) -> None:
        """Predict a window of nothing, for which a compiled network is compiled then."""
        patch = trainer.configuration_manager.patch_size
        image = torch.zeros(trainer.num_input_channels, *[1] * (3 - len(patch)), *patch)
        with predicting(trainer, mirroring=False) as predictor:
            predict_like_folds(predictor, image)

    def _register(self, trainer: Any) -> None:
        """What the atlases say about the scans; nothing where this fails for most of them."""
        atlases = self._volumes()

        def carry(case: str) -> tuple[str, np.ndarray | None]:
            image = torch.from_numpy(read_image(case, self._registered[case]))
            found = refined_on(atlases, image, self.refinement, self._space, self._planar)
            return case, None if found is None else self._decided(*found)

        mine = _of_this_process(trainer, self._registered)
        fewest = math.ceil(FEWEST_REGISTERED * len(self._registered))
        made = self._write(trainer, 0, len(mine), mine, carry, "Registering annotated volumes onto unlabelled scans", fewest)
        enough = made >= fewest
        told = "their labels teach from the first step on" if enough else "too few, these labels do not count"
        trainer.print_to_log_file(f"Annotated volumes could be registered onto {made} of {len(self._registered)} unlabelled scans: {told}.")
        if enough and trainer.config.refine_predictions and self._config.atlases_in_predictions:
            trainer.print_to_log_file(
                f"They are registered onto scans that are predicted, too. So the checkpoints hold the grey values and labels of "
                f"{', '.join(self.atlases)}, and whoever gets one gets these; to keep them out, switch off "
                "'scan_labels.atlases_in_predictions'."
            )
        if enough:
            steps = trainer.num_epochs * trainer.num_iterations_per_epoch
            trainer.history.add({"scan_label_passes": steps * earlier_passes(trainer)}, trainer.current_epoch)

    @torch.inference_mode()
    def _decided(self, probabilities: Tensor, known: Tensor) -> np.ndarray:
        """Labels in head space, int8, of what annotated volumes say; -1 where they know nothing."""
        return self.refinement.decided(probabilities, self._space).masked_fill(~known, UNKNOWN).numpy()

    def _volumes(self) -> list[Atlas]:
        return [Atlas(*load_volume(case, self._dataset)) for case in self.atlases]

    @functools.cached_property
    def _kept(self) -> Tensor:
        """What is kept of the annotated volumes for predictions."""
        return to_tensor(self._volumes())

    def _make(self, trainer: Any, begin: int) -> None:
        """A round of the members."""
        patch, members = trainer.configuration_manager.patch_size, trainer.config.num_members
        registered = self.files.cases(0) if self.atlases else set()

        contacts = self._walls
        waiting: list[str] = []
        windows: list[int] = []
        slices: list[tuple[int, int]] = []
        apart: list[bool] = []

        def label(predicted: tuple[str, Prediction, Tensor]) -> tuple[str, np.ndarray]:
            case, prediction, image = predicted
            windows.extend(count_windows(shape, patch) for shape in prediction.shown)
            known = self.files.whole(case, 0) if case in registered else None
            labels = self._labels_of(prediction.logits, image, prediction.in_slices, known)
            differ = tell_apart(self._told_apart, image.numpy(), labels)
            apart.append(differ)
            if contacts is not None:
                slices.append(contacts.within(labels))
                waits = self.told_apart_only and not differ
                if self.arranged_only and known is None and (waits or not contacts.arranged(labels, self._drawn_classes)):
                    labels = np.full_like(labels, LEFT_OUT)
                    waiting.append(case)
            return case, labels

        mine = _of_this_process(trainer, self._cases)
        with predicting(trainer, mirroring=False) as predictor:
            predicted = (self._predict(case, predictor) for case in mine)
            self._write(trainer, begin, len(mine), predicted, label, "Labelling whole unlabelled scans")
        trainer.history.add({"scan_label_passes": members * sum(distributed.gathered(windows))}, trainer.current_epoch)
        if self._told_apart:
            self._tell_of_greys(trainer, distributed.gathered(apart), begin == self.begins[-1])
        if contacts is not None:
            self._tell_of_walls(trainer, contacts.walled, distributed.gathered(slices), begin == self.begins[-1])
            if self.arranged_only:
                left_out = len(distributed.gathered(waiting))
                trainer.history.add({"scan_labels_left_out": left_out}, trainer.current_epoch)
                greys = " and told apart by grey values" if self.told_apart_only else ""
                keys = "'scan_labels.arranged_only'" + (" and 'told_apart_only'" if greys else "")
                trainer.print_to_log_file(
                    f"Arranged{greys} as in the annotation, so that they teach ({keys}): {len(self._cases) - left_out} of "
                    f"{len(self._cases)} scans; where scans need not show every class, switch {'them' if greys else 'it'} off."
                )

    @property
    def _walls(self) -> Contacts | None:
        """What annotated images say of a class within one other; None where there is none, or it does not count."""
        contacts = self.prediction_refinement.contacts
        return contacts if contacts is not None and any(contacts.walled) else None

    @property
    def arranged_only(self) -> bool:
        """Whether only scans teach whose labels are arranged as in the annotation."""
        return bool(self._config.arranged_only) and self._walls is not None

    @property
    def told_apart_only(self) -> bool:
        """Whether, of these, only scans teach in whose labels organs differ in grey values as in the annotation."""
        return self.arranged_only and bool(self._config.told_apart_only) and bool(self._told_apart)

    def _write(
        self,
        trainer: Any,
        begin: int,
        count: int,
        items: Iterable[Item],
        labelled: Callable[[Item], tuple[str, np.ndarray | None]],
        what: str,
        fewest: int = 0,
    ) -> int:
        """Make and write the labels of a round, and log how good they are where that is known.

        Args:
            trainer: the training.
            begin: the epoch from which on they count.
            count: how many items there are.
            items: one for each scan of this process.
            labelled: makes the case and its labels, None where it has none, of an item; in threads, while the next items are made.
            what: is done, for the bar and the log.
            fewest: with fewer scans than this none gets a label.

        Returns:
            How many scans have got labels, of all processes.
        """
        start = time.monotonic()
        target = self.files.round_folder(begin)
        temporary = f"{target}.tmp"
        if not trainer.local_rank:
            shutil.rmtree(temporary, ignore_errors=True)
        distributed.wait_for_all()
        scores: list[np.ndarray] = []
        made: list[str] = []

        def finish(item: Item) -> list[np.ndarray]:
            case, labels = labelled(item)
            if labels is None:
                return []
            _save(temporary, case, labels)
            made.append(case)
            dataset = self._registered[case]
            if (labels == LEFT_OUT).all():
                return []
            if trainer.config.log_hidden_accuracy and dataset.folder == trainer.preprocessed_dataset_folder:
                return _hidden_dice(case, dataset, labels, self._space)
            return []

        with tqdm(total=count, desc=what, disable=trainer.local_rank > 0) as bar:
            for found in in_threads(finish, items, min(MOST_THREADS, get_allowed_n_proc_DA())):
                scores += found
                bar.update()
        everywhere = len(distributed.gathered(made))
        scores = distributed.gathered(scores)  # and with that every process has written its part
        if not trainer.local_rank:
            if everywhere < fewest or not everywhere:
                shutil.rmtree(temporary, ignore_errors=True)
                os.makedirs(temporary)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        distributed.wait_for_all()
        if scores:
            means = [column[~np.isnan(column)].sum() / max(1, (~np.isnan(column)).sum()) for column in np.stack(scores, 1)]
            names = [f"scan_label_dice/{name}" for name in (*self._space.names, "mean")]
            trainer.history.add(dict(zip(names, [*means, np.mean(means)])), trainer.current_epoch)
        trainer.print_to_log_file(f"{what}: {everywhere} in {time.monotonic() - start:.0f} s")
        return everywhere

    def _tell_of_greys(self, trainer: Any, apart: Sequence[bool], last: bool) -> None:
        """Log in how many scans organs are ``apart`` by their grey values."""
        share = sum(apart) / max(1, len(apart))
        trainer.history.add({"scan_label_greys": share}, trainer.current_epoch)
        pairs = ", ".join(f"{self._space.names[pair.one - 1]} from {self._space.names[pair.other - 1]}" for pair in self._told_apart)
        told = f"Told apart by grey values, nearly as where they are annotated: {pairs}, in {sum(apart)} of {len(apart)} scans."
        trainer.print_to_log_file(told + (_hardly(trainer.config) if last and share < FEW_SCANS else ""))

    def _tell_of_walls(self, trainer: Any, walled: Sequence[bool], slices: Sequence[tuple[int, int]], last: bool) -> None:
        """Log how many of these slices, (all, right ones) for each scan, show what is ``walled`` within its wall."""
        shown, right = (sum(column) for column in zip((0, 0), *slices))
        share = right / max(1, shown)
        trainer.history.add({"scan_label_contacts": share}, trainer.current_epoch)
        names = ", ".join(name for name, one in zip(self._space.names, walled) if one)
        told = f"Within another organ, as where it is annotated: {names}, in {100 * share:.0f} % of the labelled slices that show it."
        if last and share < FEW_SLICES:
            told += _hardly(trainer.config)
            if trainer._objective.config.organ_scale == AS_ANNOTATED:
                told += (
                    "If the annotated organs have unusual sizes beside each other, 'organ_scale' of [0.5, 2] and "
                    "'scan_labels.arranged_only' may help, too. "
                )
            told += "Where there need not be a wall, switch off 'scan_labels.contacts'."
        trainer.print_to_log_file(told)

    @torch.inference_mode()
    def _predict(self, case: str, predictor: nnUNetPredictor) -> tuple[str, Prediction, Tensor]:
        """The case, what the members say about it, and the image (C, Z, Y, X)."""
        image = torch.from_numpy(read_image(case, self._cases[case]))
        return case, predict_for(self.refinement, predictor, image, self._space, self._planar, turned=True), image

    @torch.inference_mode()
    def _labels_of(self, logits: Tensor, image: Tensor, agreement: Tensor | None = None, known: np.ndarray | None = None) -> np.ndarray:
        """int8 in head space, (Z, Y, X) or (R, Z, Y, X). Only the surroundings of what may be foreground are worked on.

        ``known``, of the same shape, is what annotated volumes say, -1 where they know nothing.
        """
        rule, space = self.refinement, self._space
        whole = torch.zeros(image.shape[1:] if self.files.regions == 0 else logits.shape, dtype=torch.int8)
        said = None if known is None else torch.from_numpy(known)
        organs = None if said is None else said.reshape(-1, *said.shape[-3:]).amax(0) > 0
        box = rule.box(logits, space, self._planar, agreement, organs)
        if box is None:
            return whole.numpy()
        part, place = (*[slice(None)] * (whole.ndim - 3), *box), (slice(None), *box)
        image = image[place]
        probabilities = rule.settled(space.probabilities(logits[place][None])[0], image, agreement, box[0], space)
        if said is None:
            whole[part] = rule.drawn(probabilities, image, space, self._planar)
        else:  # registration tells how large an organ is
            heads = space.certain(said[part].clamp_min(0)[None])[0]
            probabilities = torch.where(said[part] != UNKNOWN, torch.lerp(probabilities, heads, SHARE_OF_ATLASES), probabilities)
            whole[part] = rule.labels(probabilities, image, space, self._planar)
        return whole.numpy()


def _hardly(config: CMEMSConfig) -> str:
    """What is said where networks have failed."""
    told = (
        " The networks have hardly understood the organs: unlabelled.png shows in the end what they take for them, and another annotated "
        "slice, or a second one, helps. "
    )
    if config.num_epochs * config.iterations_per_epoch > EARLY and config.scheduled is config:  # no rounds were early
        told += f"In a training as long as this one 'early_steps' of {EARLY} may help, too. "
    return told


def _of_this_process(trainer: Any, cases: Iterable[str]) -> list[str]:
    return list(cases)[trainer.local_rank :: distributed.count_processes()]


def chosen(cases: Iterable[Chosen], most: int) -> list[Chosen]:
    """``most`` cases (or numbers) at random, the same ones each time; sorted. Every second of sorted names may be of one kind, as are
    ACDC's frames."""
    ordered = sorted(cases)
    return ordered if len(ordered) <= most else sorted(random.Random(0).sample(ordered, most))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """``map``, whose function runs in threads while this one makes the next items; with 0 threads it is ``map``.

    No more items than threads wait to be worked on, as they may be large.
    """
    if threads < 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def whole_volumes(exemplars: Sequence[Exemplar], dataset: PreprocessedDataset) -> list[np.ndarray]:
    """The label maps (Z, Y, X) of the cases that are annotated as a whole.

    A 2D training takes these slice by slice, and not all of them: the map is then of the slices with organs, if these are an unbroken
    row that is long enough, and if slices without organs are there, too, or all of the image's (see
    :func:`~nnunetv2_cmems.data.planes.annotated_slices`).
    """
    found = [exemplar.label for exemplar in exemplars if exemplar.index is None and exemplar.plane is None]
    for case, slices in _slices_of_cases(exemplars).items():
        if _is_whole(slices, case, dataset):
            found.append(np.stack([slices[index] for index in sorted(slices) if (slices[index] > 0).any()]))
    return found


def annotated_slices(exemplars: Sequence[Exemplar], most: int) -> list[tuple[Tensor, Tensor]]:
    """Images (C, 1, Y, X) and label maps (1, Y, X), -1 where nothing is annotated, of slices that show anything, of so many scans; of
    more than :data:`MOST_SLICES` so many at random, the same ones each time."""
    found = []
    cases = chosen({exemplar.case for exemplar in exemplars}, most)
    for exemplar in (exemplar for exemplar in exemplars if exemplar.case in cases):
        image, label = torch.from_numpy(exemplar.image), exemplar.label
        if exemplar.index is not None:
            slices = {0: label}
            image = image[:, None]
        elif exemplar.plane is None:
            slices = dict(enumerate(label))
        else:
            slices = _slices_of_plane(exemplar.plane, image.shape[1:])
        found += [(image[:, z : z + 1], torch.from_numpy(label)[None]) for z, label in slices.items() if (label > 0).any()]
    return [found[index] for index in chosen(range(len(found)), MOST_SLICES)]


def annotated_volumes(exemplars: Sequence[Exemplar], most: int) -> list[tuple[Tensor, Tensor]]:
    """Images (C, Z, Y, X) and label maps (Z, Y, X) of at most so many volumes that are annotated as a whole."""
    whole = {exemplar.case: exemplar for exemplar in exemplars if exemplar.index is None and exemplar.plane is None}
    return [(torch.from_numpy(whole[case].image), torch.from_numpy(whole[case].label)) for case in chosen(whole, most)]


def _slices_of_plane(plane: AnnotatedPlane, shape: Sequence[int]) -> dict[int, np.ndarray]:
    """The label maps (Y, X), -1 where it does not pass, of those slices of a volume (Z, Y, X) that an annotated slice may be."""
    if plane.axis != 0:
        return {}
    around = np.arange(shape[0])[max(0, math.floor(plane.position) - 1) :][:4]
    voxels = np.stack(np.meshgrid(around, *map(np.arange, shape[1:]), indexing="ij"), -1)
    return dict(zip(around.tolist(), look_up([plane], torch.from_numpy(voxels)[None].float())[0].numpy()))


def atlas_cases(exemplars: Sequence[Exemplar], dataset: PreprocessedDataset, config: ScanLabelsConfig) -> list[str]:
    """The wholly annotated cases that are registered onto the scans; none where no scan is to have labels."""
    if not config.at or not config.atlases:
        return []
    whole = [exemplar.case for exemplar in exemplars if exemplar.index is None and exemplar.plane is None]
    whole += [case for case, slices in _slices_of_cases(exemplars).items() if _is_whole(slices, case, dataset)]
    return chosen(whole, config.atlases)


def from_the_start(config: CMEMSConfig) -> CMEMSConfig:
    """The config of a training whose scans have labels before the first step: the consistency terms need not wait for the members."""
    image, feature = (dataclasses.replace(term, start=0.0, rampup=0.0) for term in (config.image, config.feature))
    return dataclasses.replace(config, image=image, feature=feature, competence=False)


def earlier_passes(trainer: Any) -> float:
    """Passes of the networks that a step takes more for it, the mean over the training."""
    batches = batch_sizes(trainer.config, trainer.configuration_manager.batch_size)
    return passes_per_step(from_the_start(trainer.config), batches) - passes_per_step(trainer.config, batches)


def has_thick_slices(trainer: Any) -> bool:
    """Whether slices are more than three times as far apart as their pixels; of a 2D configuration those of the data set's images."""
    spacing = trainer.configuration_manager.spacing
    return is_planar(trainer.plans_manager.original_median_spacing_after_transp if len(spacing) == 2 else spacing)


def one_slice_a_case(exemplars: Sequence[Exemplar]) -> bool:
    """Whether no case has more than one annotated slice, so that nothing tells how organs lie in other scans."""
    cases = [exemplar.case for exemplar in exemplars]
    return len(set(cases)) == len(cases) and all(exemplar.slice is not None for exemplar in exemplars)


def painted_slices(exemplars: Sequence[Exemplar], dataset: PreprocessedDataset) -> list[dict[int, np.ndarray]]:
    """The label maps (Y, X) of the cases of which several slices are annotated, but not the whole, by their index along the slice axis."""
    cases = _slices_of_cases(exemplars)
    return [slices for case, slices in cases.items() if len(slices) > 1 and not _is_whole(slices, case, dataset)]


def factors_of_distances(
    exemplars: Sequence[Exemplar], dataset: PreprocessedDataset, cases: Mapping[str, PreprocessedDataset]
) -> tuple[float, float]:
    """Smallest and largest factor between how far apart slices are in an annotated case and in an unlabelled one."""
    annotated = [_distance_of_slices(case, dataset) for case in {exemplar.case for exemplar in exemplars}]
    others = [_distance_of_slices(case, folder) for case, folder in cases.items()]
    return min(annotated) / max(others), max(annotated) / min(others)


def _distance_of_slices(case: str, dataset: PreprocessedDataset) -> float:
    """In mm, of the raw image along the axis that 2D configurations cut it."""
    return float(read_properties(case, dataset)["spacing"][dataset.transpose_forward[0]])


def _slices_of_cases(exemplars: Sequence[Exemplar]) -> dict[str, dict[int, np.ndarray]]:
    cases: dict[str, dict[int, np.ndarray]] = {}
    for exemplar in exemplars:
        if exemplar.index is not None:
            cases.setdefault(exemplar.case, {})[exemplar.index] = exemplar.label
    return cases


def _is_whole(slices: Mapping[int, np.ndarray], case: str, dataset: PreprocessedDataset) -> bool:
    organs = [index for index in sorted(slices) if (slices[index] > 0).any()]
    unbroken = len(organs) >= FEWEST_OF_A_VOLUME and organs[-1] - organs[0] + 1 == len(organs)
    return unbroken and (len(slices) > len(organs) or len(slices) == open_image(case, dataset).shape[1])


def begin(trainer: Any, cases: Mapping[str, PreprocessedDataset]) -> ScanLabels | None:
    """What makes the rounds of a training that begins or goes on; None where it has none. What is of no use any more is removed.

    To be called before the loader is made, arguments as for :class:`ScanLabels`.

    Raises:
        CMEMSError: the consistency terms cannot be compared with labels.
    """
    config = trainer.config.scheduled
    if config.scan_labels.at and config.uses_unlabelled and config.consistency != "pseudo_label":
        raise CMEMSError(
            f"labels of whole scans ('scan_labels.at') need 'consistency' to be \"pseudo_label\", but it is \"{config.consistency}\" "
            f"({trainer._config_source}); change it, or set 'scan_labels.at' to []."
        )
    wanted = bool(config.scan_labels.at) and config.uses_unlabelled and bool(cases)
    atlases = atlas_cases(trainer.exemplars, trainer.preprocessed_dataset(), config.scan_labels) if wanted else []
    wanted = wanted and bool(atlases or starts(config.scan_labels, trainer.num_epochs))
    if wanted and not (atlases or config.scan_labels.in_space or is_planar(trainer.configuration_manager.spacing)):
        trainer.print_to_log_file(
            "No labels of whole scans: no volume is annotated as a whole, voxels are not much thicker than wide, and "
            "'scan_labels.in_space' is off."
        )
        wanted = False
    made = ScanLabels(trainer, cases, atlases) if wanted else None
    if made is not None and made.atlases:
        trainer.print_to_log_file(
            f"Labels of {', '.join(made.atlases)} are carried onto unlabelled scans by registration, before the first step; for what may "
            "lie anywhere, such as lesions, switch 'scan_labels.atlases' to 0."
        )
    if made is not None and made.refinement.config.propagation != config.scan_labels.propagation:
        trainer.print_to_log_file("Slices lie close together: nothing is carried from one to others ('scan_labels.propagation').")
    if made is not None and made.refinement.places is not None:
        beyond = "" if made.refinement.places.ends is None else ", and not far beyond where slices without them say that they end"
        trainer.print_to_log_file(
            "In unlabelled scans and in predictions organs are looked for where the annotated volumes show them, seen from their common "
            f"middle{beyond}; for what may lie anywhere, such as lesions, switch off 'scan_labels.places'."
        )
    if made is not None and made.refinement.outlines is not None:
        names = [name for name, radius in zip(trainer.label_space.names, made.refinement.outlines.radius) if radius]
        trainer.print_to_log_file(
            f"Round in every annotated slice, and so drawn along their outlines in other scans: {', '.join(names)}; for what may have any "
            "shape, such as lesions, switch off 'scan_labels.outlines'."
        )
    if made is not None and config.scan_labels.arranged_only and not made.arranged_only:
        trainer.print_to_log_file(
            "No annotated class is enclosed by one other alone, or 'scan_labels.contacts' does not count: all scans teach, and "
            "'scan_labels.arranged_only' changes nothing."
        )
    if made is not None and config.scan_labels.told_apart_only and not made.told_apart_only:
        trainer.print_to_log_file(
            "No organs that touch are told apart by grey values where they are annotated, a case has more than one annotated slice, or "
            "'scan_labels.arranged_only' does not count: 'scan_labels.told_apart_only' changes nothing."
        )
    if made is not None and made.refinement.config.turns:
        trainer.print_to_log_file(
            f"Members that label scans see them turned, too, by {', '.join(f'{degrees:g}' for degrees in made.refinement.config.turns)} "
            "degrees: one slice does not tell how they lie; where all scans lie alike, and organs differ by their side only, switch off "
            "'scan_labels.turns_in_labels'."
        )
    if made is not None and config.refine_predictions:
        _tell_of_predictions(trainer, made.prediction_refinement)
    if not trainer.local_rank:
        if made is None or trainer.current_epoch == 0:
            remove(trainer)
        else:
            made.files.keep([epoch for epoch in made.begins if epoch < trainer.current_epoch])
    distributed.wait_for_all()
    return made


def _tell_of_predictions(trainer: Any, rule: Refinement) -> None:
    names = trainer.label_space.names
    if rule.config.turns:
        trainer.print_to_log_file(
            f"Scans that are predicted are seen turned, too, by {', '.join(f'{degrees:g}' for degrees in rule.config.turns)} degrees: one "
            "slice does not tell how they lie; --disable_tta leaves this out; where all scans lie alike, and organs differ by their side "
            "only, switch off 'scan_labels.turns'."
        )
    levels = rule.outlines.level if rule.outlines is not None else ()
    if any(levels):
        ends = ", ".join(f"{name} ({level:.2f})" for name, level in zip(names, levels) if level)
        trainer.print_to_log_file(
            f"Ends in predictions at the grey value, between those of what is around it (0) and its own (1), at which it does in the "
            f"annotated images ('scan_labels.levels'): {ends}."
        )
    if rule.alike:
        pairs = ", ".join(_pairs(names, rule.alike))
        trainer.print_to_log_file(f"Alike in the annotated images, and so in predictions ('scan_labels.shared_appearance'): {pairs}.")
    if rule.contacts is not None:
        inner = [f"{name} and background" for name, within in zip(names, rule.contacts.enclosed) if within]
        never = ", ".join([*_pairs(names, rule.contacts.apart), *inner])
        trainer.print_to_log_file(
            f"Never touching in the annotated images, and so not in predictions: {never}; organs that do at the ends of their row of "
            "slices are removed there; for what may lie anywhere, such as lesions, switch off 'scan_labels.contacts'."
        )
        bodies = [name for name, narrowest in zip(names, rule.contacts.waists) if narrowest]
        if bodies:
            trainer.print_to_log_file(
                f"Removed there likewise where they have a waist, narrower than in the annotated images ('scan_labels.waists'): "
                f"{', '.join(bodies)}."
            )


def _pairs(names: Sequence[str], related: Sequence[Sequence[bool]]) -> list[str]:
    pairs = itertools.combinations(range(len(names)), 2)
    return [f"{names[one]} and {names[other]}" for one, other in pairs if related[one][other]]


def remove(trainer: Any) -> None:
    """Remove all rounds, which are no result of a training."""
    if not trainer.local_rank:
        shutil.rmtree(os.path.join(trainer.output_folder, FOLDER), ignore_errors=True)


def starts(config: ScanLabelsConfig, num_epochs: int) -> list[int]:
    """The epochs that begin with a round: the first ones whose index reaches a fraction of all."""
    epochs = {math.ceil(fraction * num_epochs - 1e-6) for fraction in config.at}
    return sorted(epoch for epoch in epochs if 0 < epoch < num_epochs)


def count_windows(shape: Sequence[int], patch: Sequence[int]) -> int:
    """Windows of nnU-Net's prediction of an image of (Z, Y, X) voxels, with nnU-Net's overlap of a half."""
    sides = tuple(max(side, window) for side, window in zip(shape[-len(patch) :], patch))  # smaller ones are padded
    steps = compute_steps_for_sliding_window(sides, tuple(patch), 0.5)
    return math.prod(len(places) for places in steps) * (shape[0] if len(patch) == 2 else 1)


def _save(folder: str, case: str, labels: np.ndarray) -> None:
    path = os.path.join(folder, f"{case}.npy")
    try:
        os.makedirs(folder, exist_ok=True)
        np.save(path, labels)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # room for what else is to be written
        raise CMEMSError(
            f"{path} cannot be written ({error.strerror or error}); the last whole checkpoint is untouched: make room on the disk, a byte "
            "for each voxel of each scan, and continue with --c."
        ) from error


def _hidden_dice(case: str, dataset: PreprocessedDataset, labels: np.ndarray, space: LabelSpace) -> list[np.ndarray]:
    """One (F,): Dice with the hidden label for each class or region, NaN where neither shows it; none where there is no label."""
    try:
        hidden = np.asarray(dataset.dataset_class(dataset.folder, [case]).load_case(case)[1][:])[0]
    except Exception:  # labels are a luxury here: whatever is wrong with them, the training goes on
        return []
    known = torch.from_numpy((hidden >= 0) & (hidden != (-1 if space.ignore is None else space.ignore)))
    truth = space.target(torch.from_numpy(hidden.astype(np.int64))[None])
    shared, sizes = overlap(torch.from_numpy(labels)[None].long() * known, truth * known, space)
    return [(shared / sizes).numpy()]
