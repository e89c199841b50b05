"""Another architecture of about the same size as the plans', for members that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN, _RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
_CONVOLUTIONS_PER_BLOCK = 2


def counterpart(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """A residual encoder for a U-Net of plain convolutions, and the other way round, with as many convolutions a stage.

    Args:
        name: the architecture's class, as plans name it.
        arguments: its arguments in the plans.

    Returns:
        Class and arguments of the other architecture; None where there is none.
    """
    module, _, kind = name.rpartition(".")
    rest = dict(arguments)
    if kind == _PLAIN:
        convolutions = _per_stage(rest.pop("n_conv_per_stage"), rest["n_stages"])
        rest["n_blocks_per_stage"] = [max(1, n // _CONVOLUTIONS_PER_BLOCK) for n in convolutions]
        return f"{module}.{_RESIDUAL}", rest
    if kind == _RESIDUAL:
        blocks = _per_stage(rest.pop("n_blocks_per_stage"), rest["n_stages"])
        rest["n_conv_per_stage"] = [n * _CONVOLUTIONS_PER_BLOCK for n in blocks]
        return f"{module}.{_PLAIN}", rest
    return None


def _per_stage(values: int | list[int], stages: int) -> list[int]:
    return [values] * stages if isinstance(values, int) else list(values)
