"""``nnUNetv2_cmems report``: a benchmark as one HTML file."""

from __future__ import annotations

import argparse
import os

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import find_dataset

HELP = """Write one HTML file about a benchmark: tables, figures, a gallery, configuration, versions and commands.

It opens in any browser, without a server and without a network. Runs that have failed or are not finished are listed in it,
and not counted. The gallery needs nnUNet_raw for the scans, and nnUNet_preprocessed to predict where the networks disagree."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnUNetv2_cmems report``."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the benchmark's folder; or give -d, -c and -f")
    parser.add_argument("-d", metavar="DATASET", help="data set, ID or name")
    parser.add_argument("-c", metavar="CONFIGURATION", help="nnU-Net configuration, such as 2d")
    parser.add_argument("-f", default="0", metavar="FOLD", help="fold. Default: 0")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans. Default: nnUNetPlans")
    parser.add_argument("-o", metavar="FILE", help="the file to write. Default: report.html in the benchmark's folder")
    parser.add_argument("--baseline", metavar="METHOD", help="method that the others are tested against. Default: CMEMS")


def run(args: argparse.Namespace) -> None:
    """Write the report and say where it is.

    Raises:
        CMEMSError: see :func:`find_benchmark` and :func:`nnunetv2_cmems.study.report.write_report`.
    """
    folder = find_benchmark(args.folder, args.d, args.c, args.p, args.f)
    from nnunetv2_cmems.study.report import write_report  # with torch, which the help need not wait for

    path = write_report(folder, args.o, args.baseline)
    print(f"Wrote {path} ({os.path.getsize(path) / 1e6:.1f} MB).")


def find_benchmark(folder: str | None, dataset: str | None, configuration: str | None, plans: str, fold: str) -> str:
    """The benchmark's folder: the named one, or where ``nnUNetv2_cmems benchmark`` puts it by default.

    Raises:
        CMEMSError: neither or both are named, ``nnUNet_results`` is not set, or there is no such data set or benchmark.
    """
    if folder is not None:
        if dataset is not None or configuration is not None:
            raise CMEMSError(f"a folder ({folder}) and -d or -c are given at once; give the folder alone, or -d, -c and -f.")
        return folder
    if dataset is None or configuration is None:
        raise CMEMSError("no benchmark is named; give its folder, or -d and -c, as in 'nnUNetv2_cmems report -d 27 -c 2d -f 0'.")
    parent = find_dataset(dataset, "nnUNet_results", "your trained models", "correct -d, or run nnUNetv2_cmems benchmark first")
    path = os.path.join(parent, f"cmems_benchmark__{plans}__{configuration}__fold_{fold}")
    if not os.path.isdir(path):
        others = sorted(entry for entry in os.listdir(parent) if entry.startswith("cmems_benchmark__"))
        there = f" (there are: {', '.join(others)})" if others else ""
        raise CMEMSError(f"there is no benchmark {path}{there}; run nnUNetv2_cmems benchmark first, or name its folder.")
    return path
