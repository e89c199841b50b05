"""``nnUNetv2_cmems suggest``: which slice to annotate first, told from the scans alone, and an empty mask to paint it into."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_cmems.data.annotation import AXES
from nnunetv2_cmems.data.planning import read_raw_scan
from nnunetv2_cmems.data.raw import (
    IMAGES,
    LABELS,
    UNLABELLED,
    RawCase,
    RawDataset,
    find_raw_folder,
    open_raw,
    quiet_itk,
    same_files,
    spacing_file,
    tell_of_left_out,
)
from nnunetv2_cmems.data.suggestion import (
    Suggestion,
    ViewerPlace,
    display_plane,
    rank_slices,
    summarise_dataset,
    viewer_place,
)
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import write_json, write_text
from nnunetv2_cmems.study.pictures import class_colours, plot_suggestion

HELP = """\
Say which slice to annotate first, and write an empty mask to paint it into.

The slices of all scans are compared; no label is read. For each suggestion the command writes a picture and a mask
of the scan's geometry that says "not annotated" everywhere, and it prints what to paint where.

Scans without a mask are suggested. Where every scan has one, all are, to see what would have been chosen."""

FOLDER = "suggestions"
"""Default output, in the raw data set's folder."""

TEXT = "suggestions.txt"
"""File in the output that holds what was printed."""

ITK_SNAP, SLICER = "labels_itksnap.txt", "labels_slicer.ctbl"
"""Files in the output that tell the viewers the names, colours and numbers of the labels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="data set, ID or name")
    parser.add_argument("-n", type=int, default=5, metavar="N", help="number of suggestions, each in another scan (default: %(default)s)")
    parser.add_argument("-o", metavar="FOLDER", help=f"folder to write to (default: '{FOLDER}' in the raw data set's folder)")
    parser.add_argument("--axis", choices=tuple(AXES), help="cut slices along this axis (default: the axis along which nnU-Net would)")
    parser.add_argument(
        "-np", type=int, default=min(default_num_processes, os.cpu_count() or 1), metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--skip_unreadable", action="store_true", help="name scans that cannot be read and go on without them")
    bring = parser.add_mutually_exclusive_group()
    for option, what in (("--move", f"move from {UNLABELLED} to {IMAGES}"), ("--link", f"link from {UNLABELLED} into {IMAGES}")):
        bring.add_argument(
            option,
            nargs="*",
            metavar="CASE",
            help=f"{what}: the first suggestion's scan, or, without suggesting anything, the scans of the cases that are named",
        )


def run(args: argparse.Namespace) -> None:
    """Suggest slices, or move the scans that were named.

    Raises:
        CMEMSError: an argument does not fit, the data set is not in order, a scan cannot be read, or a file cannot be written.
    """
    if args.n < 1:
        raise CMEMSError(f"-n must be 1 or more, not {args.n}.")
    if args.np < 1:
        raise CMEMSError(f"-np must be 1 or more, not {args.np}.")
    with quiet_itk():
        _suggest(args)


def _suggest(args: argparse.Namespace) -> None:
    link = args.link is not None
    named = args.link if link else args.move
    if named:
        folder = find_raw_folder(args.d)
        for path in bring_to_training(folder, named, link=link):
            print(f"{'Linked' if link else 'Moved'}: {path}")
        print(f"Every scan in {IMAGES} needs a mask in {os.path.join(folder, LABELS)} before nnUNetv2_cmems plan_and_preprocess can run.")
        return
    dataset = open_raw(args.d, require_labels=False)
    tell_of_left_out(dataset)
    output = args.o or os.path.join(dataset.folder, FOLDER)
    if args.o is None and _is_read_only(dataset.folder):
        raise CMEMSError(f"{dataset.folder} is read-only; choose a folder for the suggestions with -o.")
    _make_folder(output)
    axis = None if args.axis is None else AXES.index(args.axis)
    suggestions = suggest(dataset, args.n, axis=axis, num_processes=args.np, skip_unreadable=args.skip_unreadable)
    note = _name_not_annotated(dataset) if dataset.unlabelled else ""
    brought = bring_to_training(dataset.folder, [suggestions[0].case], link=link) if named is not None else []
    if brought:
        dataset = open_raw(args.d, require_labels=False)
    entries = [write_suggestion(rank, suggestion, dataset, output) for rank, suggestion in enumerate(suggestions, start=1)]
    _write_label_tables(dataset, output)
    text = _explain(dataset, entries, note, brought, output)
    print(text, end="")
    write_text(os.path.join(output, TEXT), text)


def suggest(
    dataset: RawDataset, number: int, *, axis: int | None = None, num_processes: int = 1, skip_unreadable: bool = False
) -> list[Suggestion]:
    """The slices most worth annotating, the best first, each in another scan.

    Scans without a mask are the candidates; where every scan has one, all of them are.

    Args:
        dataset: the raw data set.
        number: of suggestions; fewer where there are fewer scans.
        axis: of the (Z, Y, X) arrays, along which slices are cut; ``None``: as nnU-Net's planner would.
        num_processes: 1 works in this process.
        skip_unreadable: leave unreadable scans out instead of stopping at the first.

    Raises:
        CMEMSError: see :func:`~nnunetv2_cmems.data.suggestion.summarise_dataset`; or no scan shows anything.
    """
    axis, summaries = summarise_dataset(dataset, axis=axis, num_processes=num_processes, skip_unreadable=skip_unreadable)
    candidates = dataset.unlabelled or dataset.labelled
    annotated = list(dataset.labelled) if dataset.unlabelled else []
    suggestions = rank_slices(summaries, axis, candidates, annotated)[:number]
    if not suggestions:
        raise CMEMSError(f"no scan without a mask in {dataset.folder} shows anything but one grey value; look at the files.")
    return suggestions


def write_suggestion(rank: int, suggestion: Suggestion, dataset: RawDataset, output: str) -> dict[str, Any]:
    """Write the picture and the empty mask of a suggestion.

    Args:
        rank: 1 for the best.
        suggestion: the slice.
        dataset: the raw data set.
        output: an existing folder.

    Returns:
        What is to be said of it: ``case``, ``place``, ``picture``, ``mask``, ``kept`` (another file has been in the mask's
        place, and still is).

    Raises:
        CMEMSError: the scan cannot be read, or a file cannot be written.
    """
    raw, reader = dataset.cases[suggestion.case], dataset.reader()
    image, properties = read_raw_scan(reader, raw, dataset.num_channels)
    shape, spacing = image.shape[1:], [float(s) for s in properties["spacing"]]
    place = viewer_place(raw, reader, properties, suggestion.axis, suggestion.slice, shape[suggestion.axis])
    mask = os.path.join(output, raw.case + dataset.file_ending)
    kept = not write_template(mask, dataset.not_annotated, shape, properties, reader)
    picture = os.path.join(output, f"suggestion_{rank}.png")
    title = f"Suggestion {rank}: {raw.case}"
    if place.total > 1:
        title += f"\n{_say_slice(suggestion, place)}\n{_say_viewers(place)}"
    try:
        _draw(picture, image[0], suggestion, spacing, properties, title)
    except OSError as error:
        raise _not_written(picture, error) from error
    return {"suggestion": suggestion, "place": place, "picture": picture, "mask": mask, "kept": kept}


def write_template(path: str, value: int, shape: Sequence[int], properties: Mapping[str, Any], reader: BaseReaderWriter) -> bool:
    """Write a mask of a scan's geometry that says "not annotated" everywhere. It appears whole, and replaces nothing.

    Args:
        path: the mask's file.
        value: what means "not annotated".
        shape: (z, y, x) of the scan as the reader delivers it.
        properties: what the reader returned for the scan.
        reader: a reader/writer of the data set.

    Returns:
        Whether the file now is such a mask. If not, another file has been there before, and is left as it is.

    Raises:
        CMEMSError: the file cannot be written.
    """
    if os.path.lexists(path):
        try:
            there = reader.read_seg(path)[0][0]
        except Exception:  # whatever it is, it is not ours to overwrite
            return False
        return there.shape == tuple(shape) and bool((there == value).all())
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished_", dir=folder) as work:
            reader.write_seg(np.full(tuple(shape), value, dtype=np.uint16), os.path.join(work, os.path.basename(path)), dict(properties))
            for name in sorted(os.listdir(work)):  # nnU-Net's TIFF writer puts the spacing into a second file
                if not os.path.lexists(os.path.join(folder, name)):
                    os.replace(os.path.join(work, name), os.path.join(folder, name))
    except Exception as error:  # writers raise anything
        raise _not_written(path, error) from error
    return True


def add_ignore_label(dataset: RawDataset) -> str | None:
    """Name the value that means "not annotated" in ``dataset.json``, keeping the old file beside it.

    Returns:
        The path of the old file's copy; ``None`` where the value has a name already.

    Raises:
        CMEMSError: the file cannot be written.
    """
    if dataset.values.ignore is not None:
        return None
    path = dataset.dataset_json_path
    if _is_read_only(path) or _is_read_only(dataset.folder):
        raise CMEMSError(f"{path} is read-only; add {_ignore_entry(dataset)} to its labels.")
    content = {**dataset.dataset_json, "labels": {**dataset.dataset_json["labels"], "ignore": dataset.not_annotated}}
    copy = next(name for n in range(1000) if not os.path.lexists(name := f"{path}.bak{n or ''}"))
    try:
        shutil.copy2(path, copy)
        write_json(path, content)
    except (OSError, CMEMSError) as error:
        raise CMEMSError(f"{path} cannot be changed ({first_line(error)}); add {_ignore_entry(dataset)} to its labels.") from error
    return copy


def bring_to_training(folder: str, cases: Sequence[str], *, link: bool = False) -> list[str]:
    """Move scans from ``imagesUn`` to ``imagesTr``, or link them there. All of them, or none; nothing is overwritten.

    ``labelsTr`` is made as well, so that the masks can be saved there.

    A link in ``imagesTr`` leads to the file in ``imagesUn``; both are then one scan, which counts as one of ``imagesTr``.

    Args:
        folder: the raw data set's folder.
        cases: the case identifiers. Those that lie in ``imagesTr`` already are passed over.
        link: link instead of moving.

    Returns:
        The new files.

    Raises:
        CMEMSError: there is no such scan, a file of that name lies in ``imagesTr``, or the files cannot be moved or linked.
    """
    source, target = os.path.join(folder, UNLABELLED), os.path.join(folder, IMAGES)
    pairs: list[tuple[str, str]] = []
    for case in dict.fromkeys(cases):
        there, here = _files_of(case, source), _files_of(case, target)
        if here and (not there or same_files(here, there)):
            continue
        if not there:
            raise CMEMSError(f"{source} has no scan of a case '{case}'; correct the name.")
        pairs += [(path, os.path.join(target, os.path.basename(path))) for path in there]
    written = [target if os.path.isdir(target) else folder] + ([] if link else [source])
    for path in written if pairs else []:
        if _is_read_only(path):
            raise CMEMSError(f"{path} is read-only, so no scan can be brought to {IMAGES}; make it writable, or do it yourself.")
    for _, new in pairs:
        if os.path.lexists(new):
            raise CMEMSError(f"{new} exists already and is not overwritten; remove one of the two scans of that name.")
    done: list[tuple[str, str]] = []
    try:
        for needed in (target, os.path.join(folder, LABELS)):
            os.makedirs(needed, exist_ok=True)
        for old, new in pairs:
            if link:
                os.symlink(os.path.relpath(os.path.join(os.path.realpath(source), os.path.basename(old)), os.path.realpath(target)), new)
            else:
                _move(old, new)
            done.append((old, new))
    except OSError as error:
        for old, new in reversed(done):
            os.remove(new) if link else _move(new, old)
        what, remedy = ("linked", "use --move instead") if link else ("moved", "move it yourself, or use --link")
        raise CMEMSError(f"{pairs[len(done)][0]} cannot be {what} to {target} ({first_line(error)}); {remedy}.") from error
    return [new for _, new in pairs]


def _files_of(case: str, folder: str) -> list[str]:
    """A scan's files: all channels, and the file with the spacing that goes with TIFF images."""
    if not os.path.isdir(folder):
        return []
    channel = re.compile(re.escape(case) + r"_\d{4}\..+")
    names = sorted(name for name in os.listdir(folder) if channel.fullmatch(name))
    beside = [f"{case}.json"] if names and os.path.isfile(os.path.join(folder, f"{case}.json")) else []
    return [os.path.join(folder, name) for name in names + beside]


def _move(old: str, new: str) -> None:
    """Rename; from one file system to another, copy under another name first, so that ``new`` appears whole."""
    if os.path.islink(old) and not os.path.isabs(os.readlink(old)):  # from another folder it would lead elsewhere
        leads_to = os.path.join(os.path.realpath(os.path.dirname(old)), os.readlink(old))
        os.symlink(os.path.relpath(leads_to, os.path.realpath(os.path.dirname(new))), new)
        os.remove(old)
        return
    try:
        os.rename(old, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        unfinished = os.path.join(os.path.dirname(new), f".{os.path.basename(new)}.{os.getpid()}.tmp")
        try:
            shutil.copy2(old, unfinished)
            os.rename(unfinished, new)
        finally:
            if os.path.exists(unfinished):
                os.remove(unfinished)
        os.remove(old)


def _is_read_only(path: str) -> bool:
    """Whether a file or folder is protected, also from those whom the system would let write: containers run as root."""
    return not os.access(path, os.W_OK) or not os.stat(path).st_mode & 0o222


def _make_folder(output: str) -> None:
    try:
        os.makedirs(output, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise CMEMSError(f"{output} cannot be written to ({first_line(error)}); choose another folder with -o.") from error


def _not_written(path: str, error: Exception) -> CMEMSError:
    return CMEMSError(f"{path} cannot be written ({first_line(error)}); free some space, or choose another folder with -o.")


def _draw(
    path: str, volume: np.ndarray, suggestion: Suggestion, spacing: Sequence[float], properties: Mapping[str, Any], title: str
) -> None:
    """The slice, its neighbours, and a cut through the middle of the scan that shows where it lies."""
    axis, index, total = suggestion.axis, suggestion.slice, volume.shape[suggestion.axis]
    image, (rows, columns), _ = display_plane(volume, axis, index, properties)
    aspect = spacing[rows] / spacing[columns]
    if total == 1:
        plot_suggestion(path, image, {}, aspect=aspect, title=title)
        return
    neighbours = {f"slice {i}": display_plane(volume, axis, i, properties)[0] for i in (index - 1, index + 1) if 0 <= i < total}
    across = rows  # cut along the slice's rows, so that the cut's other side is as wide as the slice
    cut, (cut_rows, cut_columns), flips = display_plane(volume, across, volume.shape[across] // 2, properties)
    along = 0 if cut_rows == axis else 1
    line = total - 1 - index if flips[along] else index
    side = (cut, spacing[cut_rows] / spacing[cut_columns], ("row", "column")[along], line)
    plot_suggestion(path, image, neighbours, aspect=aspect, side=side, title=title)


def _say_slice(suggestion: Suggestion, place: ViewerPlace) -> str:
    return f"slice {suggestion.slice} along {AXES[suggestion.axis]} (counted from 0; there are {place.total})"


def _say_viewers(place: ViewerPlace) -> str:
    view = f" of the {place.plane} view" if place.plane else ""
    return f"ITK-SNAP: slice {place.index + 1} of {place.total}{view}; 3D Slicer: {'ijk'[place.axis]} = {place.index}"


def _ignore_entry(dataset: RawDataset) -> str:
    return f'"ignore": {dataset.not_annotated}'


def _name_not_annotated(dataset: RawDataset) -> str:
    """See to it that ``dataset.json`` names the value that the masks are filled with; what is to be said of it."""
    try:
        copy = add_ignore_label(dataset)
    except CMEMSError:
        return f"Before training, add {_ignore_entry(dataset)} to \"labels\" in {dataset.dataset_json_path}, which cannot be written to."
    if copy is None:
        return ""
    return f"{_ignore_entry(dataset)} was added to \"labels\" in {dataset.dataset_json_path}; {os.path.basename(copy)} is the old file."


def _label_names(dataset: RawDataset) -> dict[int, str]:
    """The name of every foreground value, sorted; with regions, all names that hold for it."""
    names: dict[int, list[str]] = {}
    for name, values in dataset.dataset_json["labels"].items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if int(value) > 0 and name != "ignore":
                names.setdefault(int(value), []).append(name)
    return {value: " and ".join(names[value]) for value in sorted(names)}


def _write_label_tables(dataset: RawDataset, output: str) -> None:
    """Label descriptions for ITK-SNAP, which hide "not annotated" so that the scan can be seen, and a colour table for 3D Slicer,
    which else gives labels numbers of its own."""
    names = _label_names(dataset)
    colours = {value: tuple(round(255 * part) for part in to_rgb(colour)) for value, colour in class_colours(names).items()}
    snap = ["# ITK-SnAP Label Description File", "# index, red, green, blue, opacity, visible, visible in 3D, name"]
    snap += ['0 0 0 0 0 0 0 "background"']
    snap += [f'{value} {red} {green} {blue} 1 1 1 "{names[value]}"' for value, (red, green, blue) in colours.items()]
    snap += [f'{dataset.not_annotated} 128 128 128 0.2 0 0 "not annotated"']
    slicer = ["# Color table for 3D Slicer: label value, name, red, green, blue, opacity", "0 background 0 0 0 0"]
    slicer += [f"{value} {names[value].replace(' ', '_')} {red} {green} {blue} 255" for value, (red, green, blue) in colours.items()]
    slicer += [f"{dataset.not_annotated} not_annotated 128 128 128 60"]
    write_text(os.path.join(output, ITK_SNAP), "\n".join(snap) + "\n")
    write_text(os.path.join(output, SLICER), "\n".join(slicer) + "\n")


def _explain(dataset: RawDataset, entries: Sequence[Mapping[str, Any]], note: str, brought: Sequence[str], output: str) -> str:
    """What is printed at the end."""
    everything = not dataset.unlabelled
    number = len(dataset.cases)
    lines = [f"{dataset.name}: {number} scan{'s' if number != 1 else ''} compared; no label was read. The best first:"]
    if everything:
        lines.append(f"(Every scan has a mask in {LABELS}; this is what would have been suggested without them.)")
    for rank, entry in enumerate(entries, start=1):
        suggestion, place = entry["suggestion"], entry["place"]
        raw = dataset.cases[suggestion.case]
        one_image = place.total == 1
        lines += ["", f"{rank}. {raw.case}" + ("" if one_image else f", {_say_slice(suggestion, place)}")]
        if not one_image:
            lines.append(f"   {_say_viewers(place)}")
        lines += [f"   picture: {entry['picture']}", f"   scan:    {raw.images[0]}", f"   mask:    {entry['mask']}"]
        if entry["kept"]:
            lines.append("            This file has been there before and is no empty mask (painted on already?); it was left as it is.")
    first = dataset.cases[entries[0]["suggestion"].case]
    lines += ["", *_instructions(dataset, first, note, brought, output)]
    return "\n".join(lines) + "\n"


def _instructions(dataset: RawDataset, first: RawCase, note: str, brought: Sequence[str], output: str) -> list[str]:
    """What to do with the suggestions."""
    if not dataset.unlabelled:
        return []
    value, names = dataset.not_annotated, _label_names(dataset)
    target = os.path.join(dataset.folder, LABELS)
    lines = [
        "What to do:",
        "1. Look at the pictures and take the first one that shows what you want to label.",
        "2. Open its scan in ITK-SNAP or 3D Slicer, its mask as the segmentation, and the names and colours of the labels:",
        f"   {os.path.join(output, ITK_SNAP)} or {SLICER} beside it.",
        "3. On the slice that is named, paint all that you see of: " + ", ".join(f"{v} = {name}" for v, name in names.items()) + ".",
        f"   What you leave unpainted on that slice counts as background (0). The value {value} fills the mask and means \"not",
        "   annotated\": leave it on all other slices.",
        f"4. Save the mask as {os.path.join(target, '<case>' + dataset.file_ending)}, for the first suggestion",
        f"   {os.path.join(target, first.case + dataset.file_ending)}.",
    ]
    if os.path.isfile(spacing_file(os.path.join(output, first.case + dataset.file_ending))):
        lines.append("   Copy the .json that lies beside the empty mask to the same place: it holds the spacing, as TIFF does not.")
    identifier = dataset.name[len("Dataset") :].split("_")[0].lstrip("0")
    command = f"nnUNetv2_cmems suggest -d {identifier} --move"
    if brought:
        lines.append(f"5. The first suggestion's scan lies in {IMAGES} now. To paint another one, put it back into {UNLABELLED} and run")
        lines.append(f"   {command} CASE")
    else:
        lines += [f"5. Its scan has to lie in {IMAGES}. From {UNLABELLED} it is moved there by", f"   {command} {first.case}"]
    lines += ["6. Then run", f"   nnUNetv2_cmems plan_and_preprocess -d {identifier} -c 2d"]
    return lines + ([note] if note else [])
