"""The studies: which variants there are, what they change, and that nothing is trained twice."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from conftest import CONFIGURATION, DATASET, DATASET_ID, TRAINING, Workspace

from nnunetv2_cmems.config import CMEMSConfig, IntensityConfig, with_overrides
from nnunetv2_cmems.data.exemplar import list_candidates, rank_exemplars
from nnunetv2_cmems.data.raw import open_raw
from nnunetv2_cmems.data.suggestion import rank_slices, summarise_dataset
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import grid as grids
from nnunetv2_cmems.study import methods
from nnunetv2_cmems.study.grid import Grid
from nnunetv2_cmems.study.methods import OURS, plain_method
from nnunetv2_cmems.study.studies import STUDIES, Study, make_study, scaled, scaled_dropout, suggestion_order

PLAIN = plain_method(OURS)


@pytest.fixture
def grid(workspace: Workspace) -> Grid:
    fold = grids.open_fold(str(DATASET_ID), CONFIGURATION, "nnUNetPlans", "0")
    return Grid(fold, grids.choose_exemplars(2, fold), (1, 2), epochs=10, iterations=5, device="cpu")


def configs(study: Study) -> dict[Any, CMEMSConfig]:
    return {
        value: with_overrides(methods.find_trainer(method.trainer).config, dict(method.overrides), "test")
        for value, method in study.variants.items()
    }


@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"exemplar", "backbone", "shots"}))
def test_studies_of_the_config(grid: Grid, name: str) -> None:
    study = make_study(name, grid)
    found = configs(study)
    assert PLAIN in study.variants.values(), "the default is the trainer as it is"
    different = [config for value, config in found.items() if study.variants[value] != PLAIN]
    assert all(config != CMEMSConfig() for config in different)
    fewest = 1 if name in ("competence", "architecture") else 3
    assert len({json.dumps(config.to_dict()) for config in different}) == len(different) >= fewest
    written = study.to_json(grid)
    assert [entry["value"] for entry in written["variants"]] == list(study.variants)
    assert all(len(entry["runs"]) == 4 for entry in written["variants"]), "every exemplar and seed"
    plain = [spec.key for spec in grid.runs(PLAIN)]
    assert all((entry["runs"] == plain) == (entry["method"] == "CMEMS") for entry in written["variants"])
    json.dumps(written)


def test_values_of_the_studies(grid: Grid) -> None:
    assert {value: config.tau for value, config in configs(make_study("tau", grid)).items()} == {
        value: value for value in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    }
    assert [config.num_members for config in configs(make_study("members", grid)).values()] == [1, 2, 3, 4]
    synthesis = configs(make_study("synthesis", grid))
    assert not synthesis["without"].synthetic.enabled
    backgrounds = [
        synthesis[kind].synthesis.unlabelled_background for kind in ("exemplar background", "both backgrounds", "unlabelled background")
    ]
    assert backgrounds == [0.0, CMEMSConfig().synthesis.unlabelled_background, 1.0]
    assert make_study("synthesis", grid).variants["without"] == plain_method(f"{OURS}_noSynthesis"), "which is an ablation already"
    assert list(make_study("tau", grid, ["0.6", "0.3"]).variants) == [0.3, 0.6]
    labelled = {value: config.scan_labels for value, config in configs(make_study("scan_labels", grid)).items()}
    assert [bool(config.at) for config in labelled.values()] == [False, *[True] * 11]
    assert [config.growth > 0 for config in labelled.values()] == [True, False, False, *[True] * 9]
    assert [config.appearance > 0 for config in labelled.values()] == [True, False, *[True] * 10]
    assert [config.propagation > 0 for config in labelled.values()] == [True, *[False] * 3, *[True] * 8]
    assert [config.outlines for config in labelled.values()] == [True, *[False] * 4, *[True] * 7]
    assert [config.outlines and config.levels for config in labelled.values()] == [True, *[False] * 5, *[True] * 6]
    assert [config.contacts for config in labelled.values()] == [True, *[False] * 6, *[True] * 5]
    assert [config.shared_appearance for config in labelled.values()] == [True, *[False] * 6, *[True] * 5]
    assert [config.contacts and config.waists for config in labelled.values()] == [True, *[False] * 7, *[True] * 4]
    assert [bool(config.turns) for config in labelled.values()] == [True, *[False] * 8, *[True] * 3]
    assert [config.places for config in labelled.values()] == [True, *[False] * 9, *[True] * 2]
    assert [config.atlases > 0 for config in labelled.values()] == [True, *[False] * 10, True]
    assert {value: config.competence for value, config in configs(make_study("competence", grid)).items()} == {"off": False, "on": True}


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("tau", ["high"], "--values of --study tau must be numbers, not high"),
        ("tau", ["1.5"], "'tau' is 1.5"),
        ("members", ["2.5"], "must be whole numbers"),
        ("members", ["9"], "'num_members' is 9"),
        ("shots", ["0"], "whole numbers from 1 on"),
        ("shots", ["5"], "5 slices are asked for, but only 4 training cases"),
        ("synthesis", ["wihtout"], "has 'wihtout'; there are without"),
        ("perturbation", ["-1"], "factors"),
        ("exemplar", ["1"], "takes no --values"),
    ],
)
def test_values_that_do_not_fit(grid: Grid, name: str, values: list[str], said: str) -> None:
    with pytest.raises(CMEMSError, match=said):
        make_study(name, grid, values)


# ---------------------------------------------------------------------- perturbations


def test_scaled_perturbations() -> None:
    strong = IntensityConfig(probability=0.7, brightness=0.4, contrast=(0.5, 2.0), gamma=(0.25, 4.0), bias=0.6, low_resolution=4.0)
    twice = with_overrides(CMEMSConfig(strong=strong), {"strong": scaled(strong, 2)}, "test").strong
    assert twice == IntensityConfig(
        probability=0.7, brightness=0.8, contrast=(0.25, 4.0), gamma=(0.0625, 16.0), bias=1.0, low_resolution=16.0
    )
    half = with_overrides(CMEMSConfig(strong=strong), {"strong": scaled(strong, 0.5)}, "test").strong
    assert half.brightness == 0.2 and half.contrast == (0.7071, 1.4142) and half.gamma == (0.5, 2.0) and half.low_resolution == 2.0
    nothing = with_overrides(CMEMSConfig(strong=strong), {"strong": scaled(strong, 0)}, "test").strong
    assert nothing == IntensityConfig(probability=0.7), "the identity"
    much = scaled(strong, 50)
    for entry in dataclasses.fields(IntensityConfig):
        low, high = entry.metadata["range"]
        assert np.all(np.asarray(much.get(entry.name, low)) >= low) and np.all(np.asarray(much.get(entry.name, low)) <= high), entry.name


def test_scaled_dropout() -> None:
    assert [scaled_dropout(0.5, factor) for factor in (0, 0.5, 1, 2)] == [0.0, 0.25, 0.5, 0.75]
    assert scaled_dropout(0.5, 100) == 0.95, "the config's limit"


def test_perturbation_scales_what_all_methods_have(grid: Grid) -> None:
    changed = dataclasses.replace(grid, config={"weak": {"brightness": 0.3}})
    study = make_study("perturbation", changed, ["2", "1"])
    assert list(study.variants) == ["weak 1x", "weak 2x", "strong 1x", "strong 2x", "feature 1x", "feature 2x"]
    assert [method == PLAIN for method in study.variants.values()] == [True, False] * 3
    assert study.variants["weak 2x"].overrides["weak"]["brightness"] == 0.6


# ---------------------------------------------------------------------- exemplars


def test_every_candidate_once(grid: Grid) -> None:
    study = make_study("exemplar", grid)
    candidates = list_candidates(grid.fold.training, grid.fold.images)
    specs = [spec for method in study.variants.values() for spec in grid.runs(method)]
    trained = [json.dumps(spec.overrides["exemplar"]) for spec in specs]
    assert sorted(trained) == sorted(json.dumps([grids.to_dict(c)]) for c in candidates for _ in grid.seeds)
    assert len({spec.key for spec in specs}) == len(specs)
    for number, exemplar in enumerate(grid.exemplars, start=1):
        plain = {spec.key for spec in grid.runs(PLAIN) if spec.exemplar == number}
        assert {spec.key for spec in specs if spec.overrides["exemplar"] == exemplar} == plain, "not trained twice"
    assert study.to_json(grid)["variants"][0]["suggest_of"] > 0


def test_a_larger_sample_includes_the_smaller(grid: Grid) -> None:
    few, more = (list(make_study("exemplar", grid, None, n).variants.items()) for n in (2, 4))
    assert len(few) == 2 and more[:2] == few
    with pytest.raises(CMEMSError, match="--sample is 0"):
        make_study("exemplar", grid, None, 0)
    with pytest.raises(CMEMSError, match="--sample belongs to"):
        make_study("tau", grid, None, 2)


def test_the_rank_is_that_of_suggest(grid: Grid, workspace: Workspace) -> None:
    raw = open_raw(DATASET)
    scans = dataclasses.replace(raw, labelled={case: raw.labelled[case] for case in TRAINING})
    axis, summaries = summarise_dataset(scans)
    order = suggestion_order(summaries, axis)
    assert sorted(order) == sorted((scan.case, int(i)) for scan in summaries for i in scan.slices)
    suggested = rank_slices(summaries, axis)
    assert order[0] == (suggested[0].case, suggested[0].slice)
    for one in suggested:
        assert next(place for place in order if place[0] == one.case) == (one.case, one.slice), "the best of its scan"
    study = make_study("exemplar", grid)
    for note in study.notes.values():
        (spec,) = note["exemplar"]
        place = (spec["case"], spec["slice"])
        assert note["suggest_rank"] == (order.index(place) + 1 if place in order else None)
    assert any(note["suggest_rank"] for note in study.notes.values())


# ---------------------------------------------------------------------- shots


def test_more_shots_include_the_fewer(grid: Grid) -> None:
    study = make_study("shots", grid, ["1", "2", "4"])
    assert study.variants[1] == PLAIN
    sets = {count: study.variants[count].exemplars for count in (2, 4)}
    for number, exemplar in enumerate(grid.exemplars, start=1):
        two, four = sets[2][number], sets[4][number]  # type: ignore[index]
        assert two[:1] == exemplar and four[:2] == two and len(four) == 4
        assert len({spec["case"] for spec in four}) == 4
    first, second = ({spec["case"] for spec in sets[2][number]} for number in (1, 2))  # type: ignore[index]
    assert first != second, "two exemplars are not the same slices in another order"
    ranked = rank_exemplars(grid.fold.training, grid.fold.images)
    assert sets[4][1] == [grids.to_dict(spec) for spec in ranked]  # type: ignore[index]
    overrides = [spec.overrides["exemplar"] for spec in grid.runs(study.variants[4])]
    assert overrides == [sets[4][1]] * 2 + [sets[4][2]] * 2  # type: ignore[index]


def test_shots_of_exemplars_with_several_slices(grid: Grid) -> None:
    pair = [*grid.exemplars[0], *grid.exemplars[1]]
    several = dataclasses.replace(grid, exemplars=[pair])
    study = make_study("shots", several, ["2", "3"])
    assert study.variants[2] == PLAIN
    assert study.variants[3].exemplars[1][:2] == pair  # type: ignore[index]
    with pytest.raises(CMEMSError, match="exemplar 1 has 2 slices already"):
        make_study("shots", several, ["1"])


# ---------------------------------------------------------------------- backbone


def test_backbones_are_the_preprocessed_plans(grid: Grid, workspace: Workspace) -> None:
    with pytest.raises(CMEMSError, match="no plans but nnUNetPlans.*nnUNetv2_plan_experiment -d 902 -pl nnUNetPlannerResEncM"):
        make_study("backbone", grid)
    plans = workspace.plans()
    small = plans["configurations"][CONFIGURATION]
    for name, changes in {
        "nnUNetResEncUNetMPlans": {"batch_size": 2 * small["batch_size"]},
        "nnUNetElsewherePlans": {"data_identifier": "nnUNetElsewherePlans_2d_small"},  # not preprocessed
    }.items():
        configurations = {**plans["configurations"], CONFIGURATION: {**small, **changes}}
        (workspace.base / f"{name}.json").write_text(json.dumps({**plans, "plans_name": name, "configurations": configurations}))
    study = make_study("backbone", grid)
    assert list(study.variants) == ["nnUNetPlans", "nnUNetResEncUNetMPlans"]
    assert study.variants["nnUNetPlans"] == PLAIN
    other = study.variants["nnUNetResEncUNetMPlans"]
    spec = grid.runs(other)[0]
    assert spec.plans == "nnUNetResEncUNetMPlans" and "nnUNetResEncUNetMPlans" in spec.key
    assert dataclasses.replace(grid, iterations=10).steps(other) == 7, "its steps cost more: 10 * (3 * 2 + 10.8) / (3 * 4 + 10.8)"
    assert study.to_json(grid)["variants"][1]["plans"] == "nnUNetResEncUNetMPlans"
    with pytest.raises(CMEMSError, match="has 'nnUNetElsewherePlans'; there are nnUNetPlans, nnUNetResEncUNetMPlans"):
        make_study("backbone", grid, ["nnUNetElsewherePlans"])


def test_studies_leave_other_methods_alone(grid: Grid) -> None:
    keys = [
        spec.key for name in ("tau", "members", "perturbation") for m in make_study(name, grid).variants.values() for spec in grid.runs(m)
    ]
    studied = {key for key in keys if not key.startswith(f"{OURS}__exemplar_")}
    assert len(studied) == 4 * (5 + 3 + 6), "no two variants share a run"
