"""``nnUNetv2_cmems trainer_path``: where nnU-Net finds the trainers."""

from __future__ import annotations

import argparse
import os

import nnunetv2_cmems

HELP = """Print the folder that nnU-Net's variable nnUNet_extTrainer must name, and nothing else.

An installed package sets the variable by itself. Where start-up files of Python packages are
switched off, set it by hand:

    export nnUNet_extTrainer=$(nnUNetv2_cmems trainer_path)"""


def trainer_folder() -> str:
    """The absolute path of the folder whose modules re-export the trainers."""
    return os.path.join(os.path.dirname(os.path.abspath(nnunetv2_cmems.__file__)), "ext_trainer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This subcommand takes no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the folder."""
    print(trainer_folder())
