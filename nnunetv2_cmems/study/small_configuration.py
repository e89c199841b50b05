"""Add a configuration that a CPU can train to existing nnU-Net plans.

The new configuration inherits from another and replaces spacing, patch size, batch size and network
size. Preprocess for it afterwards, with nnU-Net's command or, where there are scans in ``imagesUn``, with ours::

    python -m nnunetv2_cmems.study.small_configuration -d 27
    nnUNetv2_preprocess -d 27 -c 2d_small
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cmems.errors import CMEMSError, show_errors_as_sentences, times
from nnunetv2_cmems.files import find_dataset, read_plans, write_json


def small_configuration(
    plans: dict[str, Any],
    base: str,
    name: str,
    *,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    features: Sequence[int],
    batch_size: int,
) -> dict[str, Any]:
    """The configuration's entry for ``plans["configurations"]``.

    Args:
        plans: nnU-Net's plans.
        base: the configuration to inherit from, 2D or 3D.
        name: the new configuration's name, part of its preprocessed folder's name.
        patch_size: voxels ((z,) y, x); each side must be divisible by ``2 ** (len(features) - 1)``.
        spacing: millimetres ((z,) y, x).
        features: channels of each encoder stage.
        batch_size: images a batch.

    Raises:
        CMEMSError: ``base`` is not in the plans or has another number of axes, ``name`` is another
            configuration's, or the patch does not fit the number of stages.
    """
    if base not in plans["configurations"]:
        raise CMEMSError(f"the plans have no configuration '{base}'; they have {', '.join(plans['configurations'])}.")
    axes = len(plans["configurations"][base].get("patch_size", patch_size))
    if not len(patch_size) == len(spacing) == axes:
        raise CMEMSError(f"configuration '{base}' has {axes} axes; name as many numbers for --patch and --spacing.")
    existing = plans["configurations"].get(name)
    if existing is not None and existing.get("inherits_from") != base:
        raise CMEMSError(f"the plans have a configuration '{name}' already, which is not a small one of '{base}'; choose another --name.")
    factor = 2 ** (len(features) - 1)
    if any(side % factor for side in patch_size):
        raise CMEMSError(f"each side of the patch {list(patch_size)} must be divisible by {factor} for {len(features)} stages.")
    architecture = json.loads(json.dumps(plans["configurations"][base]["architecture"]))
    stages = len(features)
    architecture["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=list(features),
        kernel_sizes=[[3] * axes] * stages,
        strides=[[1] * axes] + [[2] * axes] * (stages - 1),
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    blocks = "n_blocks_per_stage" if "n_blocks_per_stage" in architecture["arch_kwargs"] else "n_conv_per_stage"
    architecture["arch_kwargs"][blocks] = [2] * stages
    return {
        "inherits_from": base,
        "data_identifier": f"{plans['plans_name']}_{name}",
        "patch_size": list(patch_size),
        "spacing": list(spacing),
        "batch_size": batch_size,
        "architecture": architecture,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry, see the module's docstring."""
    show_errors_as_sentences()
    parser = argparse.ArgumentParser(prog="python -m nnunetv2_cmems.study.small_configuration", description=__doc__)
    parser.add_argument("-d", required=True, help="data set, name or id")
    parser.add_argument("-c", default="2d", help="configuration to inherit from")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("--name", default="2d_small", help="name of the new configuration")
    parser.add_argument("--patch", type=int, nargs="+", default=[128, 112], help="voxels")
    parser.add_argument("--spacing", type=float, nargs="+", default=[2.75, 2.75], help="mm")
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16, 32, 64, 96], help="channels of each stage")
    parser.add_argument("--batch", type=int, default=12, help="images a batch")
    args = parser.parse_args(arguments)

    again = f"run nnUNetv2_plan_and_preprocess -d {args.d}"
    folder = find_dataset(args.d, "nnUNet_preprocessed", "the preprocessed data sets", f"{again} first, or correct -d")
    path = os.path.join(folder, f"{args.p}.json")
    if not os.path.isfile(path):
        raise CMEMSError(f"{path} does not exist; {again} first.")
    plans = read_plans(path, f"{again} again")
    plans["configurations"][args.name] = small_configuration(
        plans, args.c, args.name, patch_size=args.patch, spacing=args.spacing, features=args.features, batch_size=args.batch
    )
    write_json(path, plans)
    base = PlansManager(plans).get_configuration(args.c)
    small = f"{times(args.spacing)} mm and patches of {times(args.patch)} voxels"
    large = f"{times(base.spacing)} mm and {times(base.patch_size)} voxels"
    print(f"added configuration {args.name} to {path}: {small}, where {args.c} has {large}; --spacing and --patch set others.")


if __name__ == "__main__":
    main()
