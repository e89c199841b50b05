"""A device that is only pretended. Its tensors are CPU tensors in a wrapper that mix with others as little as a GPU's do.

What no training on a CPU can show, and no GPU is needed for: tensors that were made on the wrong device, or fetched from none. Run as a
program it trains, interrupts, continues and predicts there, as ``test_device.py`` asks it to. In a process of its own, as what is
registered with PyTorch stays.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGURATION, _pools_are_threads, interrupted
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS, prediction

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE, CPU = torch.device(NAME, 0), torch.device("cpu")

ATEN = torch.ops.aten
MOVES = (ATEN.copy_.default, ATEN._to_copy.default)
INDEXES = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default)
"""On a GPU, too, these take indices from the CPU."""


class Pretended(torch.Tensor):
    """A tensor on the pretended device; ``inner`` is what it wraps."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return restored, (self.inner, self.requires_grad, isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), restored(self.inner.clone(), self.requires_grad, isinstance(self, torch.nn.Parameter)))

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):  # as in inference mode
            return function.decompose(*args, **(kwargs or {}))
        return run(function, *args, **(kwargs or {}))


def restored(inner: torch.Tensor, requires_grad: bool, parameter: bool) -> torch.Tensor:
    made = Pretended(inner)
    return torch.nn.Parameter(made, requires_grad) if parameter else made.requires_grad_(requires_grad)


def run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """``function`` of the wrapped tensors, its results wrapped in turn; an error, where a GPU would make one."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    here = [value for value in tensors if isinstance(value, Pretended)]
    held = [args[0], *args[2:]] if function in INDEXES else tensors  # what must be on one device, besides single values
    elsewhere = [value for value in held if isinstance(value, torch.Tensor) and not isinstance(value, Pretended) and value.dim()]
    if here and elsewhere and function not in MOVES:
        raise RuntimeError(f"{function}: tensors on {DEVICE} and on the CPU, of shapes {[tuple(value.shape) for value in tensors]}")
    if function is ATEN.copy_.default:
        stays_here = isinstance(args[0], Pretended)
    else:
        asked = kwargs.get("device")
        stays_here = bool(here) if asked is None else torch.device(asked).type == NAME
    inner = [value.inner if isinstance(value, Pretended) else CPU if isinstance(value, torch.device) else value for value in flat]
    args, kwargs = pytree.tree_unflatten(inner, spec)
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    known = {id(value.inner) if isinstance(value, Pretended) else id(value): value for value in tensors}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Pretended(value) if stays_here else value

    return pytree.tree_map(wrapped, function(*args, **kwargs))


KERNELS = torch.library.Library("_", "IMPL")
KERNELS.fallback(run, "PrivateUse1")
torch.serialization.add_safe_globals([restored])


def _made_there(make: Any) -> Any:
    """``torch.tensor`` and ``torch.as_tensor`` do not ask the device."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **kwargs)
        return make(*args, **kwargs).to(DEVICE)

    return made


def _load(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """``torch.load``: storages cannot go to this device, so what they make does."""
    if not isinstance(map_location, (str, torch.device)) or torch.device(map_location).type != NAME:
        return _loaded(*args, map_location=map_location, **kwargs)
    found = _loaded(*args, map_location="cpu", **kwargs)
    return pytree.tree_map(lambda value: value.to(DEVICE) if type(value) is torch.Tensor else value, found)


_loaded = torch.load


class _Predictor(nnUNetPredictor):
    """Keeps everything on the device, as nnU-Net's does on a GPU only."""

    def __init__(self, *args: Any, perform_everything_on_device: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, perform_everything_on_device=False, **kwargs)
        self.perform_everything_on_device = True


def main(base: str, scans: str, output: str) -> None:
    """Train for an epoch, continue to the end, validate, and predict as ``nnUNetv2_predict`` does."""
    planned, described = (json.loads((Path(base) / name).read_text(encoding="utf-8")) for name in ("nnUNetPlans.json", "dataset.json"))

    def make(continues: bool) -> Any:
        return nnUNetTrainerCMEMS({**planned, "continue_training": continues}, CONFIGURATION, 0, described, DEVICE)

    interrupted(make(continues=False), 1)
    trainer = make(continues=True)
    maybe_load_checkpoint(trainer, True, False)
    trainer.run_training()
    trainer.perform_actual_validation(False)
    assert {parameter.device for parameter in trainer.network.parameters()} == {DEVICE}

    predictor = _Predictor(device=DEVICE, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(os.path.dirname(trainer.output_folder), (0,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential(scans, output)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        _pools_are_threads(patch)
        patch.setattr(prediction, "nnUNetPredictor", _Predictor)
        patch.setattr(torch, "load", _load)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _made_there(getattr(torch, name)))
        main(*sys.argv[1:])
