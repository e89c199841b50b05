"""Lets nnU-Net import a torchvision that was built for another torch, such as its CUDA build beside a CPU torch.

nnU-Net imports all of its own trainers, and with them timm and torchvision, before it looks for ours. A
torchvision whose compiled library does not fit stops that with "operator torchvision::nms does not
exist", although nothing in nnU-Net uses an operator of torchvision. Importing this module declares the
operators that torchvision's Python code names; they still cannot be called.

The package's start-up line imports it when torchvision is about to be imported by nnU-Net, and never
otherwise. With a torchvision that fits, it does nothing.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # the declarations live as long as the library object


def declare_missing_operators() -> bool:
    """Declare torchvision's operators if its own library cannot be loaded; whether that was needed."""
    spec = importlib.util.find_spec("torchvision")
    library = os.path.join(os.path.dirname(spec.origin), "_C.so") if spec is not None and spec.origin else ""
    if not os.path.isfile(library):
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in _OPERATORS:
            _declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return True
    return False


declare_missing_operators()
