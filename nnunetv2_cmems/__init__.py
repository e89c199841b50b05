"""nnU-Net v2 from one annotated slice: consistency-guided mutual learning with exemplar synthesis.

Importing this package is cheap: neither torch nor nnU-Net is loaded before one of its modules asks for it.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__: str


def __getattr__(name: str) -> str:
    """Look the version up in the installed package's metadata when somebody asks for it."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nnunetv2-cmems")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
