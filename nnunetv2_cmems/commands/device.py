"""Whether the device of ``-device`` is there, asked before anything else is done."""

from __future__ import annotations

from nnunetv2_cmems.errors import CMEMSError


def check_device(device: str, remedy: str = "choose another with -device") -> None:
    """Refuse a device that this machine lacks.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
        remedy: what to do, for the error's sentence.

    Raises:
        CMEMSError: there is no such device.
    """
    if device == "cpu":
        return
    import torch  # takes seconds, which a CPU need not wait for

    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()):
        raise CMEMSError(f"PyTorch finds no {device} device on this computer; {remedy}.")
