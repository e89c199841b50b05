"""The console command ``nnUNetv2_cmems``.

Each subcommand is a module of this package with ``HELP: str``, ``add_arguments(parser)`` and
``run(args)``. Only the module of the chosen subcommand is imported, so that the help and
``trainer_path`` do not wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

import nnunetv2_cmems
from nnunetv2_cmems.errors import CMEMSError

PROG = "nnUNetv2_cmems"

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("nnunetv2_cmems.commands.demo", "train from one annotated slice of made-up scans and show what comes out"),
    "export": ("nnunetv2_cmems.commands.export", "write a model folder that nnU-Net predicts with, also without this package"),
    "suggest": ("nnunetv2_cmems.commands.suggest", "say which slice to annotate first, and write an empty mask for it"),
    "plan_and_preprocess": ("nnunetv2_cmems.commands.plan_and_preprocess", "nnU-Net's planning and preprocessing, with unlabelled scans"),
    "benchmark": ("nnunetv2_cmems.commands.benchmark", "train methods on the same exemplars and compare them; studies of one setting"),
    "report": ("nnunetv2_cmems.commands.report", "write one HTML file about a benchmark: tables, figures, gallery"),
    "trainer_path": ("nnunetv2_cmems.commands.trainer_path", "print the folder for the variable nnUNet_extTrainer"),
}
"""Subcommand -> (module, one line for the help)."""


def _chosen_command(argv: Sequence[str]) -> str | None:
    """The subcommand on the command line: its first word that is not an option."""
    return next((word for word in argv if not word.startswith("-")), None)


def _build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """A parser that lists all subcommands and knows the arguments of the ``chosen`` one."""
    parser = argparse.ArgumentParser(prog=PROG, description="nnU-Net v2 from one annotated slice.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", dest="command")
    for name, (module_name, line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = importlib.import_module(module_name)
            subparser.description = module.HELP
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _run(argv: Sequence[str]) -> int:
    chosen = _chosen_command(argv)
    parser = _build_parser(chosen)
    if chosen is not None and chosen not in COMMANDS:
        nearest = difflib.get_close_matches(chosen, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(COMMANDS)}."
        parser.error(f"no subcommand '{chosen}'; {hint}")
    args = parser.parse_args(argv)
    if args.version:
        print(f"{PROG} {nnunetv2_cmems.__version__}")
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    args.run(args)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process).

    Returns:
        The exit code: 0, 1 after a :class:`CMEMSError`, 130 after Ctrl-C, 2 without a subcommand.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except CMEMSError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
