"""What nnU-Net's label manager means in our terms."""

from __future__ import annotations

from collections.abc import Sequence

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions


def label_space(labels: LabelManager) -> LabelSpace:
    """What the networks' heads mean, in nnU-Net's order."""

    def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
        return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)  # type: ignore[arg-type]

    values = {name: as_tuple(value) for name, value in labels.label_dict.items() if name != "ignore"}
    foreground = {name: value for name, value in values.items() if set(value) != {0}}
    if labels.has_regions:
        return Regions(tuple(foreground), labels.ignore_label, tuple(foreground.values()))
    return Classes(tuple(sorted(foreground, key=lambda name: foreground[name])), labels.ignore_label)
