"""The grid of a benchmark: data, exemplars, trainers, equal compute, and what a folder may hold."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import CASES, CONFIGURATION, DATASET, DATASET_ID, TRAINING, VALIDATION, Workspace

from nnunetv2_cmems.config import CMEMSConfig, with_overrides
from nnunetv2_cmems.data.exemplar import choose_exemplar
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import grid as grids
from nnunetv2_cmems.study import methods, records, run
from nnunetv2_cmems.study.grid import Fold, Grid
from nnunetv2_cmems.study.methods import OURS, Method, plain_method

PLANS = "nnUNetPlans"
EXEMPLARS: list[methods.Exemplar] = [[{"case": CASES[i], "slice": 2, "axis": "z"}] for i in (1, 3)]


@pytest.fixture
def fold(workspace: Workspace) -> Fold:
    return grids.open_fold(str(DATASET_ID), CONFIGURATION, PLANS, "0")


def make_grid(fold: Fold, **changes: Any) -> Grid:
    return dataclasses.replace(Grid(fold, EXEMPLARS, (1, 2), epochs=100, iterations=10, device="cpu"), **changes)


# ---------------------------------------------------------------------- data


def test_the_fold_is_the_trainers(workspace: Workspace) -> None:
    (workspace.base / "cmems.json").write_text("not JSON")  # concerns trainings, not this
    before = dict(os.environ)
    fold = grids.open_fold(DATASET, CONFIGURATION, PLANS, "0")
    assert (fold.dataset, fold.training, fold.validation) == (DATASET, tuple(TRAINING), tuple(VALIDATION))
    assert fold.batch_size == 4 and fold.images.folder == str(workspace.images)
    assert os.listdir(fold.references) and not workspace.results.exists()
    assert dict(os.environ) == before


def test_fold_is_refused(workspace: Workspace) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(CMEMSError) as error:
            grids.open_fold(*arguments)
        return str(error.value)

    assert "there is no data set 77" in said("77", CONFIGURATION, PLANS, "0")
    assert "no configuration '4d'; it has 2d, 2d_small" in said(DATASET, "4d", PLANS, "0").replace(", 3d_fullres", "")
    assert "nnUNetOther.json cannot be read" in said(DATASET, CONFIGURATION, "nnUNetOther", "0")
    assert "a fold is a number" in said(DATASET, CONFIGURATION, PLANS, "first")
    assert "is not preprocessed for configuration '2d'" in said(DATASET, "2d", PLANS, "0")
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": CASES, "val": []}]))
    assert "no validation case with a label" in said(DATASET, CONFIGURATION, PLANS, "0")


# ---------------------------------------------------------------------- exemplars


def test_the_first_exemplar_is_the_automatic_one(fold: Fold) -> None:
    chosen = grids.choose_exemplars(3, fold)
    assert chosen[0] == [grids.to_dict(choose_exemplar(fold.training, fold.images))]
    assert len({exemplar[0]["case"] for exemplar in chosen}) == 3
    assert grids.choose_exemplars(2, fold) == chosen[:2], "more exemplars include the fewer"
    with pytest.raises(CMEMSError, match="--exemplars is 5, but only 4 patients"):
        grids.choose_exemplars(5, fold)


def test_exemplars_of_a_file(fold: Fold, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    named = grids.choose_exemplars(2, fold)
    without_axis = [[{"case": spec["case"], "slice": spec["slice"]} for spec in exemplar] for exemplar in named]
    path.write_text(json.dumps([*without_axis, [*without_axis[1], *without_axis[0]]]))
    assert grids.read_exemplars(str(path), fold) == [*named, [*named[1], *named[0]]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no", "mine.json cannot be read as JSON"),
        ("[]", "must hold a list of exemplars"),
        ('[{"case": "a", "slice": 1}]', "each a list of slices"),
        ('[[{"slice": 1}]]', r"mine.json, entry 1: 'exemplar\[0\]' must name a case"),
        (json.dumps([[{"case": VALIDATION[0], "slice": 2}]]), VALIDATION[0]),
        (json.dumps([[{"case": TRAINING[0], "slice": 99}]]), "no usable slice 99"),
        (json.dumps([[{"case": TRAINING[0], "slice": 2}]] * 2), "twice"),
    ],
)
def test_exemplars_of_a_file_are_refused(fold: Fold, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(CMEMSError, match=said):
        grids.read_exemplars(str(path), fold)


# ---------------------------------------------------------------------- trainers


def test_trainers_by_their_whole_name_or_its_end() -> None:
    asked = ["nnUNetTrainer", OURS, "CMEMS", "CMEMS_imageOnly", "imageOnly", "nnUNetTrainer_5epochs", "5epochs", "_5epochs"]
    expected = ["nnUNetTrainer", OURS, f"{OURS}_imageOnly", "nnUNetTrainer_5epochs"]
    with pytest.raises(CMEMSError):  # nnUNetTrainer5epochs there is not
        methods.check_trainers(asked)
    asked.remove("5epochs")
    assert methods.check_trainers(asked) == expected
    assert methods.check_trainers(methods.DEFAULT_TRAINERS) == list(methods.DEFAULT_TRAINERS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nnUNetTrainerCMEMS_imageOnyl", "did you mean 'nnUNetTrainerCMEMS_imageOnly'"),
        ("exemplaronly", "did you mean 'nnUNetTrainerCMEMS_exemplarOnly'"),
        ("nnUNetTrainr", "did you mean 'nnUNetTrainer'"),
        ("np", "finds no trainer 'np'"),  # a module that nnU-Net's trainers import
        ("qqqq", "our own are nnUNetTrainerCMEMS,"),
    ],
)
def test_unknown_trainer(name: str, said: str) -> None:
    with pytest.raises(CMEMSError, match=said):
        methods.check_trainers([OURS, name])


def test_a_trainer_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS\n\n\nclass nnUNetTrainerCMEMS_mine(nnUNetTrainerCMEMS):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), os.environ.get("nnUNet_extTrainer", "")]))
    for function in (methods.known_trainers, methods._find):
        function.cache_clear()
    assert methods.check_trainers(["mine"]) == ["nnUNetTrainerCMEMS_mine"]
    assert plain_method("nnUNetTrainerCMEMS_mine").name == "CMEMS, mine"
    for function in (methods.known_trainers, methods._find):
        function.cache_clear()


def test_methods_have_names_of_their_own() -> None:
    names = [plain_method(trainer).name for trainer in (*methods.DEFAULT_TRAINERS, "nnUNetTrainer", "nnUNetTrainer_5epochs")]
    assert len(set(names)) == len(names)
    assert names[-2:] == ["nnU-Net", "nnU-Net, 5epochs"] and "UniMatch" in names


# ---------------------------------------------------------------------- runs


def test_every_method_gets_the_same_exemplars_and_seeds(fold: Fold) -> None:
    grid = make_grid(fold)
    for suffix in ("", "_exemplarOnly", "_uniMatch"):
        specs = grid.runs(plain_method(OURS + suffix))
        assert [(spec.exemplar, spec.seed) for spec in specs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert [spec.overrides["exemplar"] for spec in specs] == [EXEMPLARS[0]] * 2 + [EXEMPLARS[1]] * 2
        assert [spec.overrides["seed"] for spec in specs] == [1, 2, 1, 2]
        assert {spec.overrides["num_epochs"] for spec in specs} == {100}
        assert len({spec.key for spec in specs}) == 4


def test_a_method_that_takes_all_labels_is_run_once_per_seed(fold: Fold) -> None:
    grid = make_grid(fold)
    ceiling = grid.runs(plain_method(f"{OURS}_allLabels"))
    assert [(spec.exemplar, spec.seed) for spec in ceiling] == [(1, 1), (1, 2)]
    assert all("exemplar" not in spec.overrides for spec in ceiling), "that would take the other labels away"
    stock = grid.runs(plain_method("nnUNetTrainer"))
    assert [(spec.exemplar, spec.seed, spec.overrides) for spec in stock] == [(1, 1, {}), (1, 2, {})]


@pytest.mark.parametrize("trainer", methods.DEFAULT_TRAINERS)
def test_same_passes(fold: Fold, trainer: str) -> None:
    grid = make_grid(fold)
    reference, found = grid.passes(plain_method(OURS)), grid.passes(plain_method(trainer))
    assert reference is not None and found is not None
    config = grid.runs(plain_method(trainer))[0].overrides
    assert config["num_epochs"] == 100, "curves have as many points"
    assert abs(found - reference) <= 100 * found / (100 * config["iterations_per_epoch"]) / 2 + 1e-6, "within half a step an epoch"


def test_steps_of_a_single_supervised_network(fold: Fold) -> None:
    """By hand: batches of 4 mean S = 2 and U = 2 for CMEMS, whose consistency starts after a fifth of the first 800 of 10,000 steps."""
    supervised, weak, strong, perturbed = 3 * 2, 2, 0.984 * 3 * 2, 0.984 * 2 * (3 * 0.5 + 2 * 0.5)
    ours = 2 * (supervised + weak + strong + perturbed)
    grid = make_grid(fold, iterations=100)
    assert grid.steps(plain_method(f"{OURS}_exemplarOnly")) == round(100 * ours / (3 * 4))
    assert dataclasses.replace(grid, same="steps").steps(plain_method(f"{OURS}_exemplarOnly")) == 100
    assert make_grid(fold, iterations=1).steps(Method("", OURS, {"num_members": 4})) == 1, "not 0"
    assert grid.steps(plain_method("nnUNetTrainer")) is None


def test_passes_of_a_training_that_does_not_begin_as_a_short_one(fold: Fold) -> None:
    """By hand: the consistency takes part from a fifth of all 10,000 steps on."""
    supervised, weak, strong, perturbed = 3 * 2, 2, 0.8 * 3 * 2, 0.8 * 2 * (3 * 0.5 + 2 * 0.5)
    grid = make_grid(fold, iterations=100, config={"early_steps": 0})
    assert grid.passes(plain_method(OURS)) == pytest.approx(10_000 * 2 * (supervised + weak + strong + perturbed))


def test_config_for_all_methods(fold: Fold) -> None:
    grid = make_grid(fold, config={"tau": 0.7, "image": {"rampup": 0.1}, "checkpoint_every": 3})
    (spec, *_) = grid.runs(Method("", f"{OURS}_imageOnly", {"image": {"start": 0.5}}))
    assert spec.overrides["image"] == {"rampup": 0.1, "start": 0.5} and spec.overrides["tau"] == 0.7
    assert spec.overrides["checkpoint_every"] == 3
    assert make_grid(fold, epochs=40).runs(plain_method(OURS))[0].overrides["checkpoint_every"] == 4, "a killed run loses a tenth"
    with pytest.raises(CMEMSError, match="method 'mine'.*'tau' is 2"):
        make_grid(fold, same="steps").runs(Method("mine", OURS, {"tau": 2}))


@pytest.mark.parametrize("key", ["exemplar", "num_epochs", "iterations_per_epoch", "seed"])
def test_config_must_not_set_what_the_grid_sets(tmp_path: Path, key: str) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps({key: "auto" if key == "exemplar" else 5}))
    with pytest.raises(CMEMSError, match=f"all.json sets '{key}'.*use --"):
        grids.read_config(str(path))
    path.write_text(json.dumps({"tau": 0.5}))
    assert grids.read_config(str(path)) == {"tau": 0.5} and grids.read_config(None) == {}


def test_a_variant_that_is_a_trainer_of_ours_is_that_trainer() -> None:
    assert methods.variant("tau", 0.95, {"tau": 0.95}, {}, "") == plain_method(OURS)
    assert methods.variant("tau", 0.9, {"tau": 0.9}, {"tau": 0.9}, "") == plain_method(OURS)
    assert methods.variant("s", "off", {"synthetic": {"enabled": False}}, {}, "") == plain_method(f"{OURS}_noSynthesis")
    other = methods.variant("tau", 0.9, {"tau": 0.9}, {}, "")
    assert (other.name, other.trainer, other.study, other.value) == ("CMEMS, tau 0.9", OURS, "tau", 0.9)
    with pytest.raises(CMEMSError, match="--study tau: 'tau' is 7"):
        methods.variant("tau", 7, {"tau": 7}, {}, "--study tau")


# ---------------------------------------------------------------------- the folder


def content(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": DATASET, "configuration": "2d", "plans": PLANS, "fold": "0", "device": "cpu", "epochs": 10, "iterations": 5,
        "same": "passes", "config": {}, "exemplars": EXEMPLARS[:1], "seeds": [1], "trainers": [OURS], "studies": [], "versions": {},
        "commands": ["one"], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"dataset": "Dataset027_ACDC"}, {"configuration": "3d_fullres"}, {"plans": "nnUNetResEncUNetMPlans"}, {"fold": "1"}, {"epochs": 20},
     {"iterations": 6}, {"same": "steps"}, {"config": {"tau": 0.5}}],
)  # fmt: skip
def test_what_cannot_be_compared(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(CMEMSError, match=f"benchmark.json is of {key} .*cannot be compared.*-o") as error:
        records.joined(content(), content(**change), "here")
    for value in (content()[key], change[key]):
        assert (value if isinstance(value, str) else json.dumps(value)) in str(error.value)


def test_a_later_call_adds() -> None:
    tau = {"name": "tau", "variants": [{"value": 0.5, "runs": ["a"]}]}
    more = {"name": "tau", "variants": [{"value": 0.5, "runs": ["a", "b"]}, {"value": 0.7, "runs": ["c"]}]}
    first = records.joined({}, content(studies=[tau]), "here")
    second = content(exemplars=EXEMPLARS, seeds=[1, 2], trainers=["nnUNetTrainer"], studies=[more], commands=["two"])
    both = records.joined(first, second, "here")
    assert both["exemplars"] == EXEMPLARS and both["seeds"] == [1, 2] and both["trainers"] == [OURS, "nnUNetTrainer"]
    assert both["studies"] == [more] and both["commands"] == ["one", "two"]
    fewer = records.joined(both, content(commands=["three"]), "here")
    assert fewer["exemplars"] == EXEMPLARS and fewer["seeds"] == [1, 2] and fewer["studies"] == [more], "what is there stays"
    with pytest.raises(CMEMSError, match=f"exemplar 1 of .*{CASES[1]}.*not.*{CASES[3]}"):
        records.joined(both, content(exemplars=EXEMPLARS[::-1]), "here")


def test_folder_of_something_else(tmp_path: Path) -> None:
    assert records.read_benchmark(str(tmp_path / "new")) == {} == records.read_benchmark(str(tmp_path))
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(CMEMSError, match="holds other things than a benchmark"):
        records.read_benchmark(str(tmp_path))
    for broken in ("no", "[]", '{"dataset": "x"}'):
        (tmp_path / records.BENCHMARK).write_text(broken)
        with pytest.raises(CMEMSError, match=r"benchmark.json cannot be read"):
            records.read_benchmark(str(tmp_path))
    (tmp_path / records.BENCHMARK).write_text(json.dumps(content()))
    assert records.read_benchmark(str(tmp_path)) == json.loads(json.dumps(content()))


def test_what_there_is_of_a_run(fold: Fold, tmp_path: Path) -> None:
    grid = make_grid(fold)
    new, killed, finished, _ = grid.runs(plain_method(OURS))
    for spec, state in ((killed, "running"), (finished, "finished")):
        there = Path(run.run_folder(str(tmp_path), spec))
        there.mkdir(parents=True)
        (there / run.RECORD).write_text(json.dumps(dataclasses.asdict(run.RunRecord(spec, state, "now"))))
        summary = Path(run.fold_folder(str(there))) / "validation" / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")
    states = records.check_runs([new, killed, finished], str(tmp_path))
    assert list(states.values()) == ["new", "unfinished", "finished"]
    changed = dataclasses.replace(finished, overrides={**finished.overrides, "num_epochs": 7})
    with pytest.raises(CMEMSError, match=r"other settings \(config.num_epochs \(100 then, 7 now\)\)"):
        records.check_runs([new, changed], str(tmp_path))
    same = dataclasses.replace(finished, threads=3, device="cuda", method="another name")
    assert records.check_runs([same], str(tmp_path)) == {finished.key: "finished"}
    elsewhere = dataclasses.replace(new, dataset="Dataset027_ACDC")
    with pytest.raises(CMEMSError, match=f"is of dataset {DATASET}, not Dataset027_ACDC"):
        records.check_runs([elsewhere], str(tmp_path))


def test_a_run_that_was_written_down_otherwise(fold: Fold, tmp_path: Path) -> None:
    """What counts is the config that it comes to; and its row in the tables has today's name."""
    spec = make_grid(fold).runs(plain_method(f"{OURS}_imageOnly"))[0]
    without_axis = [{"case": spec.overrides["exemplar"][0]["case"], "slice": spec.overrides["exemplar"][0]["slice"]}]
    overrides = {**spec.overrides, "exemplar": without_axis, "tau": CMEMSConfig().tau}
    old = dataclasses.replace(spec, method="of old", overrides=overrides)
    there = tmp_path / "runs" / spec.key
    there.mkdir(parents=True)
    record = run.RunRecord(old, "finished", "then", wall_seconds=5.0)
    (there / run.RECORD).write_text(json.dumps(dataclasses.asdict(record)))
    assert records.read_benchmark(str(tmp_path)) == {}, "its benchmark.json is still to be written"
    assert records.check_runs([spec], str(tmp_path), "z") == {spec.key: "unfinished"}
    with pytest.raises(CMEMSError, match="config.exemplar"):
        records.check_runs([spec], str(tmp_path), "x")
    records.rename_runs([spec], str(tmp_path))
    renamed = run.read_run(str(there))
    assert renamed.spec.method == spec.method and renamed.wall_seconds == 5.0 and renamed.spec.overrides == overrides


def test_overrides_are_a_config_of_the_trainer(fold: Fold) -> None:
    for trainer in methods.DEFAULT_TRAINERS:
        spec = make_grid(fold).runs(plain_method(trainer))[0]
        config = with_overrides(methods.find_trainer(trainer).config, dict(spec.overrides), "test")
        assert isinstance(config, CMEMSConfig) and config.seed == 1
        assert (config.exemplar == "all") == trainer.endswith("_allLabels")
