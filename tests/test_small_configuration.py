"""A configuration that a CPU can train, added to existing plans."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from conftest import DATASET, DATASET_ID, Workspace
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study.small_configuration import main, small_configuration

SIZES: dict[str, Any] = {"patch_size": (48, 32), "spacing": (2.5, 2.0), "features": (4, 8, 12), "batch_size": 6}


def with_configuration(plans: dict[str, Any], **changes: Any) -> PlansManager:
    entry = small_configuration(plans, "2d", "tiny", **{**SIZES, **changes})
    return PlansManager({**plans, "configurations": {**plans["configurations"], "tiny": entry}})


def test_nnunet_reads_the_new_configuration(workspace: Workspace) -> None:
    manager = with_configuration(workspace.plans())
    tiny, base = manager.get_configuration("tiny"), manager.get_configuration("2d")
    assert (tiny.patch_size, tiny.spacing, tiny.batch_size) == ([48, 32], [2.5, 2.0], 6)
    assert tiny.data_identifier == "nnUNetPlans_tiny"
    assert tiny.normalization_schemes == base.normalization_schemes  # inherited
    assert base.patch_size == [48, 48] and base.network_arch_init_kwargs["n_stages"] == 4  # as it was


def test_its_network_takes_the_patch(workspace: Workspace) -> None:
    tiny = with_configuration(workspace.plans()).get_configuration("tiny")
    network = get_network_from_plans(
        tiny.network_arch_class_name, tiny.network_arch_init_kwargs, tiny.network_arch_init_kwargs_req_import, 1, 4, deep_supervision=True
    )
    outputs = network(torch.zeros(2, 1, 48, 32))
    assert [tuple(output.shape) for output in outputs] == [(2, 4, 48, 32), (2, 4, 24, 16)]
    assert [stage[0].convs[0].conv.out_channels for stage in network.encoder.stages] == [4, 8, 12]


def test_plans_are_left_alone(workspace: Workspace) -> None:
    plans = workspace.plans()
    before = copy.deepcopy(plans)
    small_configuration(plans, "2d", "tiny", **SIZES)
    assert plans == before


def test_residual_encoder_plans(workspace: Workspace) -> None:
    """nnU-Net's recommended plans have another architecture, with other arguments."""
    plans = workspace.plans()
    architecture = plans["configurations"]["2d"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    tiny = with_configuration(plans).get_configuration("tiny")
    network = get_network_from_plans(
        tiny.network_arch_class_name, tiny.network_arch_init_kwargs, tiny.network_arch_init_kwargs_req_import, 1, 4, deep_supervision=False
    )
    assert network(torch.zeros(1, 1, 48, 32)).shape == (1, 4, 48, 32)


def test_unknown_base(workspace: Workspace) -> None:
    with pytest.raises(CMEMSError, match="no configuration '2d_tiny'; they have 2d, 3d_fullres"):
        small_configuration(workspace.plans(), "2d_tiny", "tiny", **SIZES)


def test_patch_that_does_not_fit_the_stages(workspace: Workspace) -> None:
    with pytest.raises(CMEMSError, match=r"\[48, 30\] must be divisible by 4 for 3 stages"):
        small_configuration(workspace.plans(), "2d", "tiny", **{**SIZES, "patch_size": (48, 30)})


def test_three_dimensional_base(workspace: Workspace) -> None:
    with pytest.raises(CMEMSError, match="3d_fullres"):
        small_configuration(workspace.plans(), "3d_fullres", "tiny", **SIZES)


def test_command(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    before = workspace.plans()
    sizes = ["--patch", "48", "32", "--spacing", "2.5", "2", "--features", "4", "8", "12", "--batch", "6"]
    main(["-d", str(DATASET_ID), "--name", "tiny", *sizes])
    after = workspace.plans()
    assert after["configurations"].pop("tiny") == small_configuration(before, "2d", "tiny", **SIZES)
    assert after == before
    said = capsys.readouterr().out
    assert "added configuration tiny" in said and "2.5 x 2 mm and patches of 48 x 32 voxels, where 2d has 1.5 x 1.5 mm and 48 x 48" in said
    assert not list(workspace.base.glob("*.tmp"))
    main(["-d", DATASET, "--name", "tiny", *sizes])  # by name, and again


def test_command_without_plans(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = workspace.base / "nnUNetPlans.json"
    for content in ("{", "[]", "{}"):
        plans.write_text(content)
        with pytest.raises(CMEMSError, match=r"nnUNetPlans\.json .*; run nnUNetv2_plan_and_preprocess"):
            main(["-d", str(DATASET_ID)])
    plans.unlink()
    with pytest.raises(CMEMSError, match=r"nnUNetPlans\.json does not exist; run nnUNetv2_plan_and_preprocess"):
        main(["-d", str(DATASET_ID)])
    with pytest.raises(CMEMSError, match="no data set 99"):
        main(["-d", "99"])
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(CMEMSError, match="nnUNet_preprocessed is not set"):
        main(["-d", str(DATASET_ID)])


def test_command_keeps_the_configuration_that_it_inherits_from(workspace: Workspace) -> None:
    before = workspace.plans()
    with pytest.raises(CMEMSError, match="2d"):
        main(["-d", str(DATASET_ID), "--name", "2d", "--patch", "32", "32", "--features", "4", "8"])
    assert json.loads((workspace.base / "nnUNetPlans.json").read_text()) == before
