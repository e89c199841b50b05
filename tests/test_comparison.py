"""Tables and tests of a benchmark, on made-up runs whose scores are known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study.comparison import MEAN, collect, find_baseline, method_order, paired_tests, summarise, write_tables
from nnunetv2_cmems.study.metrics import COLUMNS, SCORES
from nnunetv2_cmems.study.run import RunRecord, RunSpec, fold_folder

OURS, FLOOR = "nnUNetTrainerCMEMS", "nnUNetTrainerCMEMS_exemplarOnly"
GRID = {"dataset": "Dataset001_Made", "configuration": "2d", "plans": "nnUNetPlans", "fold": "0"}

Scores = Mapping[str, Any]
"""Of a case: class to Dice, or to all scores that are not 1. ``"case"`` may name the case."""


class Benchmark:
    """A benchmark folder to fill."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        content = {**GRID, "trainers": [FLOOR, OURS], "studies": [], **changes}
        (folder / "benchmark.json").write_text(json.dumps(content))

    def add(
        self, trainer: str, exemplar: int, seed: int, cases: Sequence[Scores] | None, *, state: str = "finished", **changes: Any
    ) -> Path:
        """A run with such scores of its cases c0, c1, ...; without ``cases`` it has not been measured."""
        record = {name: changes.pop(name) for name in ("wall_seconds", "peak_rss_bytes", "gpu_hours", "passes", "error") if name in changes}
        what = {"trainer": trainer, "method": trainer[len("nnUNetTrainer") :], "exemplar": exemplar, "seed": seed}
        spec = RunSpec(**{**GRID, **what, **changes})
        folder = self.folder / "runs" / spec.key
        folder.mkdir(parents=True)
        written = RunRecord(spec, state, "2026-01-01T00:00:00", **record)
        (folder / "run.json").write_text(json.dumps(dataclasses.asdict(written)))
        validation = Path(fold_folder(str(folder))) / "validation"
        validation.mkdir(parents=True)
        (validation / "summary.json").write_text("{}")
        if cases is not None:
            names = [name if isinstance(name, str) else f"c{i}" for i, name in enumerate(case.get("case") for case in cases)]
            rows = [row(name, label, found) for name, case in zip(names, cases) for label, found in case.items() if label != "case"]
            pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(folder / "metrics.csv", index=False)
        return folder

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])


def row(case: str, label: str, found: Any) -> dict[str, Any]:
    if isinstance(found, Mapping):
        return {"case": case, "label": label, **dict.fromkeys(SCORES, 1.0), **found}
    return {"case": case, "label": label, **dict.fromkeys(SCORES, 1.0), "dice": found}


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    return Benchmark(tmp_path / "benchmark")


def cases(dice: Sequence[float]) -> list[Scores]:
    return [{"wall": value} for value in dice]


def the(table: pd.DataFrame, **which: Any) -> pd.Series:
    """The only row that is so."""
    for column, value in which.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


# ---------------------------------------------------------------------- means and spread


def test_mean_over_cases_then_mean_and_spread_over_runs(benchmark: Benchmark) -> None:
    """Exemplar 1: runs of 0.5 and 0.7; exemplar 2: 0.8 and 0.8."""
    benchmark.add(OURS, 1, 1, cases([0.4, 0.6]))
    benchmark.add(OURS, 1, 2, cases([0.6, 0.8]))
    benchmark.add(OURS, 2, 1, cases([0.7, 0.9]))
    benchmark.add(OURS, 2, 2, cases([0.8, 0.8]))
    write_tables(str(benchmark.folder))
    found = the(benchmark.table("methods"), method="CMEMS", label="wall")
    assert (found["runs"], found["exemplars"], found["seeds"], found["cases"]) == (4, 2, 2, 2)
    assert found["dice_mean"] == pytest.approx(0.7)
    assert found["dice_std"] == pytest.approx(np.std([0.5, 0.7, 0.8, 0.8], ddof=1))
    assert found["dice_std_exemplars"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert found["dice_std_seeds"] == pytest.approx(math.sqrt((0.1**2 + 0.1**2) / 2))


def test_one_run_has_no_spread(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, cases([0.5, 0.6]))
    markdown = write_tables(str(benchmark.folder))
    found = the(benchmark.table("methods"), label="wall")
    assert math.isnan(found["dice_std"]) and math.isnan(found["dice_std_seeds"])
    assert "| 55.0 |" in markdown.replace("  ", "").replace("|  ", "| ")


def test_the_mean_over_classes_is_that_of_each_case(benchmark: Benchmark) -> None:
    """Case 0 has 0.2 and 0.4, case 1 has the wall alone: (0.3 + 0.9) / 2, not (0.55 + 0.4) / 2."""
    benchmark.add(OURS, 1, 1, [{"wall": 0.2, "cavity": 0.4}, {"wall": 0.9, "cavity": math.nan}])
    write_tables(str(benchmark.folder))
    methods = benchmark.table("methods")
    assert list(methods["label"]) == [MEAN, "wall", "cavity"]
    assert the(methods, label=MEAN)["dice_mean"] == pytest.approx(0.6)
    assert the(methods, label="cavity")["dice_mean"] == pytest.approx(0.4)


def test_missed_and_hallucinated_classes_are_counted_and_leave_distances_alone(benchmark: Benchmark) -> None:
    missed = {"dice": 0, "hd95_mm": math.nan, "assd_mm": math.nan, "volume_ml": 0.0}
    invented = {"dice": 0, "hd95_mm": math.nan, "assd_mm": math.nan, "reference_volume_ml": 0.0}
    neither = dict.fromkeys(SCORES, math.nan) | {"volume_ml": 0.0, "reference_volume_ml": 0.0}
    last = {"wall": 1, "cavity": neither}
    benchmark.add(OURS, 1, 1, [{"wall": missed, "cavity": missed}, {"wall": {"hd95_mm": 4.0}, "cavity": invented}, last])
    benchmark.add(OURS, 1, 2, [{"wall": 1, "cavity": 1}, {"wall": 1, "cavity": invented}, last])
    write_tables(str(benchmark.folder))
    methods = benchmark.table("methods")
    wall, cavity, every = (the(methods, label=label) for label in ("wall", "cavity", MEAN))
    assert (wall["missed_mean"], wall["hallucinated_mean"]) == (0.5, 0)
    assert (cavity["missed_mean"], cavity["hallucinated_mean"]) == (0.5, 1)
    assert (every["missed_mean"], every["hallucinated_mean"]) == (1, 1)
    assert wall["hd95_mm_mean"] == pytest.approx(((4 + 1) / 2 + 1) / 2)
    assert wall["dice_mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert (cavity["hd95_mm_mean"], cavity["hd95_mm_runs"]) == (1, 1)


def test_volume_errors_lose_their_sign_in_the_means_only(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, [{"wall": {"volume_error_ml": -2.0}}, {"wall": {"volume_error_ml": 4.0}}])
    write_tables(str(benchmark.folder))
    assert the(benchmark.table("methods"), label="wall")["volume_error_ml_mean"] == 3
    assert list(benchmark.table("cases")["volume_error_ml"]) == [-2, 4]


def test_cases_say_what_their_run_is(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 2, 3, cases([0.5]), study="tau", value=0.8, method="CMEMS, tau 0.8")
    benchmark.add(FLOOR, 1, 1, cases([0.5]))
    write_tables(str(benchmark.folder))
    table = benchmark.table("cases")
    assert list(table.columns) == ["method", "trainer", "study", "value", "exemplar", "seed", *COLUMNS]
    found = the(table, method="CMEMS, tau 0.8")
    assert [found[name] for name in ("trainer", "study", "value", "exemplar", "seed", "case")] == [OURS, "tau", 0.8, 2, 3, "c0"]


def test_cost(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, cases([0.5]), wall_seconds=100.0, gpu_hours=0.5, peak_rss_bytes=2_000_000_000, passes=1000.0)
    benchmark.add(OURS, 1, 2, cases([0.5]), wall_seconds=3740.0, gpu_hours=1.5, peak_rss_bytes=3_000_000_000, passes=1000.0)
    markdown = write_tables(str(benchmark.folder))
    found = the(benchmark.table("methods"), label="wall")
    assert (found["wall_seconds_mean"], found["gpu_hours_mean"], found["peak_rss_bytes_max"], found["passes_mean"]) == (1920, 1, 3e9, 1000)
    assert math.isnan(found["peak_gpu_bytes_max"])
    cost = markdown.split("### Cost")[1].splitlines()[4]
    assert [cell.strip() for cell in cost.split("|")[1:-1]] == ["CMEMS", "0:32:00", "1.00", "3.0", "-", "1,000"]


def test_order_of_methods() -> None:
    def spec(trainer: str, method: str, study: str | None = None, value: Any = None) -> RunSpec:
        return RunSpec(**GRID, trainer=trainer, method=method, study=study, value=value, exemplar=1, seed=1)

    specs = [
        spec(OURS, "tau 0.95", "tau", 0.95), spec(OURS, "tau 0.8", "tau", "0.8"), spec("nnUNetTrainer", "other"), spec(OURS, "ours"),
        spec(OURS, "four", "members", 4), spec(OURS, "ten", "members", 10), spec(OURS, "L", "backbone", "L"), spec(FLOOR, "floor"),
        spec(OURS, "M", "backbone", "M"),
    ]  # fmt: skip
    listed = {"name": "backbone", "variants": [{"method": "M"}, {"method": "L"}]}
    grid = {"trainers": [FLOOR, OURS], "studies": ["members", "tau", listed]}
    assert method_order(grid, specs) == ["floor", "ours", "other", "four", "ten", "tau 0.8", "tau 0.95", "M", "L"]


# ---------------------------------------------------------------------- the test


def paired(benchmark: Benchmark, baseline: str | None = None, **how: Any) -> pd.DataFrame:
    comparison = collect(str(benchmark.folder))
    return paired_tests(comparison, find_baseline(comparison, baseline), **how)


def test_the_effect_is_the_median_difference_and_p_is_exact(benchmark: Benchmark) -> None:
    """All of 6 differences are positive: the two-sided p is 2 / 2**6."""
    ours = [0.61, 0.72, 0.83, 0.54, 0.65, 0.86]
    benchmark.add(OURS, 1, 1, cases(ours))
    benchmark.add(FLOOR, 1, 1, cases([value - step for value, step in zip(ours, (0.01, 0.02, 0.03, 0.05, 0.08, 0.13))]))
    against_ours = the(paired(benchmark))
    assert (against_ours["method"], against_ours["baseline"]) == ("CMEMS_exemplarOnly", "CMEMS")
    assert against_ours["median_difference"] == pytest.approx(-0.04)
    assert against_ours["p"] == pytest.approx(2 / 2**6)
    assert (against_ours["pairs"], against_ours["better"], against_ours["worse"]) == (6, 0, 6)
    turned = the(paired(benchmark, FLOOR))
    assert (turned["method"], turned["median_difference"]) == ("CMEMS", pytest.approx(0.04))


def test_runs_do_not_multiply_the_cases(benchmark: Benchmark) -> None:
    """Five runs of the same six cases are six pairs, of the means over the runs that both methods have."""
    dice = np.linspace(0.5, 0.7, 6)
    for seed in range(1, 6):
        benchmark.add(OURS, 1, seed, cases(list(dice)))
        benchmark.add(FLOOR, 1, seed, cases(list(dice - 0.01 * np.arange(1, 7) * seed)))
    benchmark.add(FLOOR, 2, 1, cases([0.99] * 6))  # the other method has no such run
    found = the(paired(benchmark))
    assert (found["pairs"], found["common_runs"]) == (6, 5)
    assert found["p"] == pytest.approx(2 / 2**6)
    assert found["median_difference"] == pytest.approx(-0.01 * 3.5 * 3)


def test_holm(benchmark: Benchmark) -> None:
    """Of 8 differences none, the smallest or the third smallest is positive: 1, 2 and 5 of 2**8 sums of ranks are as small, on either side.

    The smallest p counts 3 times, the next one twice, the last one once.
    """
    base = np.linspace(0.5, 0.7, 8)
    benchmark.add(OURS, 1, 1, cases(list(base)))
    for name, positive in (("_cps", 2), ("_fixMatch", None), ("_uniMatch", 0)):
        steps = -0.01 * np.arange(1, 9)
        if positive is not None:
            steps[positive] *= -1
        benchmark.add(OURS + name, 1, 1, cases(list(base + steps)))
    found = paired(benchmark).set_index("method")
    order = ["CMEMS_fixMatch", "CMEMS_uniMatch", "CMEMS_cps"]
    assert list(found.loc[order, "p"]) == pytest.approx([2 / 256, 4 / 256, 10 / 256])
    assert list(found.loc[order, "p_holm"]) == pytest.approx([3 * 2 / 256, 2 * 4 / 256, 10 / 256])


def test_too_few_or_no_differences_give_no_p_but_a_reason(benchmark: Benchmark) -> None:
    dice = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    benchmark.add(OURS, 1, 1, cases(dice))
    benchmark.add(FLOOR, 1, 1, cases(dice))
    benchmark.add(OURS + "_cps", 1, 1, cases([0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.7]))
    benchmark.add(OURS + "_uniMatch", 2, 1, cases(dice))
    benchmark.add(OURS, 1, 1, cases(dice), study="exemplar", value="other", method="CMEMS, exemplar other")
    markdown = write_tables(str(benchmark.folder))
    table = benchmark.table("tests").set_index("method")
    assert table["p"].isna().all() and table["p_holm"].isna().all()
    assert table.loc["CMEMS_exemplarOnly", "note"] == "no pair differs, and the test needs 6"
    assert table.loc["CMEMS_cps", "note"] == "only 5 of 7 pairs differ, and the test needs 6"
    assert table.loc["CMEMS_cps", "median_difference"] == pytest.approx(0.1)
    assert table.loc["CMEMS_uniMatch", "pairs"] == 0
    nothing = "CMEMS_uniMatch, CMEMS, exemplar other against CMEMS: no run of the same exemplar and seed, so there is nothing to test."
    assert nothing in markdown


def test_differences_that_are_rounding_are_none(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, cases([0.1 + 0.2] * 7))
    benchmark.add(FLOOR, 1, 1, cases([0.3] * 7))
    assert the(paired(benchmark))["note"] == "no pair differs, and the test needs 6"


def test_scans_of_a_patient_can_be_one_pair(benchmark: Benchmark) -> None:
    names = [f"patient{i:03d}_frame{j:02d}" for i in range(6) for j in (1, 12)]
    for trainer, shift in ((OURS, 0.0), (FLOOR, 0.1)):
        benchmark.add(trainer, 1, 1, [{"case": name, "wall": 0.5 + shift + 0.01 * i * shift} for i, name in enumerate(names)])
    markdown = write_tables(str(benchmark.folder))
    assert the(benchmark.table("tests"))["pairs"] == 12
    assert "the 12 cases are of 6 patients" in markdown
    markdown = write_tables(str(benchmark.folder), by_patient=True)
    found = the(benchmark.table("tests"))
    assert (found["pairs"], found["paired_by"], found["p"]) == (6, "patient", pytest.approx(2 / 2**6))
    assert "are of 6 patients" not in markdown
    path = benchmark.folder / "benchmark.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "by_patient": True}))  # as the benchmark was called
    write_tables(str(benchmark.folder))
    assert the(benchmark.table("tests"))["paired_by"] == "patient"


def test_baseline(benchmark: Benchmark) -> None:
    benchmark.add(FLOOR, 1, 1, cases([0.5]))
    assert find_baseline(collect(str(benchmark.folder))) == "CMEMS_exemplarOnly"
    benchmark.add(OURS, 1, 1, cases([0.5]), study="tau", value=0.5, method="CMEMS, tau 0.5")
    assert find_baseline(collect(str(benchmark.folder))) == "CMEMS_exemplarOnly"
    benchmark.add(OURS, 1, 1, cases([0.5]))
    comparison = collect(str(benchmark.folder))
    assert find_baseline(comparison) == "CMEMS"
    assert find_baseline(comparison, FLOOR) == find_baseline(comparison, "CMEMS_exemplarOnly") == "CMEMS_exemplarOnly"
    assert find_baseline(comparison, "CMEMS, tau 0.5") == "CMEMS, tau 0.5"
    path = benchmark.folder / "benchmark.json"
    for recorded, expected in (("CMEMS, tau 0.5", "CMEMS, tau 0.5"), ("not trained yet", "CMEMS")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "baseline": recorded}))
        write_tables(str(benchmark.folder))
        assert set(benchmark.table("tests")["baseline"]) == {expected}
    with pytest.raises(CMEMSError, match=r"baseline 'CMEMS_exemplaronly' has no finished run.*did you mean 'CMEMS_exemplarOnly'\?"):
        find_baseline(comparison, "CMEMS_exemplaronly")
    with pytest.raises(CMEMSError, match="choose one of CMEMS_exemplarOnly, CMEMS, CMEMS, tau 0.5"):
        find_baseline(comparison, "zzz")


# ---------------------------------------------------------------------- what does not count


def test_only_finished_runs_count_and_the_others_are_named(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, cases([0.5]))
    benchmark.add(OURS, 1, 2, cases([0.9]), state="running")
    benchmark.add(OURS, 1, 3, cases([0.9]), state="failed", error="exit code 1: out of memory")
    (Path(fold_folder(str(benchmark.add(OURS, 1, 4, cases([0.9]))))) / "validation" / "summary.json").unlink()
    benchmark.add(OURS, 1, 5, None)
    (benchmark.add(OURS, 1, 6, cases([0.9])) / "run.json").write_text("{")
    (benchmark.add(FLOOR, 1, 7, cases([0.9])) / "run.json").unlink()
    markdown = write_tables(str(benchmark.folder))
    found = json.loads((benchmark.folder / "tables" / "methods.json").read_text())
    states = {run["run"].rsplit("_", 1)[1]: (run["state"], run["reason"]) for run in found["not_counted"]}
    assert {seed: state for seed, (state, _) in states.items()} == {
        "2": "unfinished", "3": "failed", "4": "unfinished", "5": "not measured", "6": "unreadable", "7": "unfinished",
    }  # fmt: skip
    assert states["3"][1] == "exit code 1: out of memory"
    assert found["without_runs"] == [FLOOR]
    assert "exemplar_1__seed_2 (unfinished: it is still running, or was killed half-way)" in markdown
    assert f"Without a finished run: {FLOOR}." in markdown
    assert the(benchmark.table("methods"), label="wall")["dice_mean"] == 0.5
    assert len(benchmark.table("cases")) == 1


@pytest.mark.parametrize(
    "change, named",
    [({"dataset": "Dataset002_Other"}, "Dataset002_Other"), ({"configuration": "3d_fullres"}, "3d_fullres"), ({"fold": "1"}, "fold 1")],
)
def test_two_benchmarks_in_one_folder(benchmark: Benchmark, change: dict[str, str], named: str) -> None:
    benchmark.add(OURS, 1, 1, cases([0.5]))
    benchmark.add(OURS, 1, 2, None, state="running", **change)
    with pytest.raises(CMEMSError, match=f"seed_2 is a training of .*{named}.*; two benchmarks are mixed here"):
        write_tables(str(benchmark.folder))
    assert not (benchmark.folder / "tables").exists()


def test_other_plans_are_another_method(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, cases([0.5]))
    benchmark.add(OURS, 1, 1, cases([0.6]), plans="nnUNetResEncUNetMPlans", study="backbone", value="M", method="CMEMS, backbone M")
    assert collect(str(benchmark.folder)).methods == ("CMEMS", "CMEMS, backbone M")
    benchmark.add(OURS, 1, 2, cases([0.6]), plans="nnUNetResEncUNetMPlans")
    with pytest.raises(CMEMSError, match="are different trainings, but both are called 'CMEMS'"):
        collect(str(benchmark.folder))


def test_a_run_twice(benchmark: Benchmark) -> None:
    folder = benchmark.add(OURS, 1, 1, cases([0.5]))
    folder.rename(folder.with_name("copy"))
    benchmark.add(OURS, 1, 1, cases([0.5]))
    with pytest.raises(CMEMSError, match="are both 'CMEMS' with exemplar 1 and seed 1"):
        collect(str(benchmark.folder))


def test_runs_that_were_measured_on_different_cases_or_classes(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, cases([0.5, 0.6]))
    folder = benchmark.add(OURS, 1, 2, cases([0.5]))
    with pytest.raises(CMEMSError, match=r"different cases or classes \(only one of them has 'wall' of c1\)"):
        collect(str(benchmark.folder))
    (folder / "metrics.csv").write_text("case,label\n")
    with pytest.raises(CMEMSError, match=r"seed_2.metrics\.csv cannot be read as a run's metrics"):
        collect(str(benchmark.folder))


def test_a_folder_without_a_benchmark_and_one_without_a_finished_run(tmp_path: Path, benchmark: Benchmark) -> None:
    with pytest.raises(CMEMSError, match=r"benchmark\.json cannot be read"):
        write_tables(str(tmp_path))
    with pytest.raises(CMEMSError, match="nothing to compare .there are no runs"):
        write_tables(str(benchmark.folder))
    benchmark.add(OURS, 1, 1, None, state="failed", error="exit code 1: out of memory")
    with pytest.raises(CMEMSError, match="nothing to compare .*seed_1: exit code 1: out of memory"):
        write_tables(str(benchmark.folder))
    (benchmark.folder / "benchmark.json").write_text('{"dataset": "Dataset001_Made"}')
    with pytest.raises(CMEMSError, match=r"benchmark\.json cannot be read \(it lacks 'configuration'\)"):
        write_tables(str(benchmark.folder))


def test_a_class_called_mean(benchmark: Benchmark) -> None:
    benchmark.add(OURS, 1, 1, [{"mean": 0.5}])
    with pytest.raises(CMEMSError, match="a class of Dataset001_Made is called 'mean'"):
        collect(str(benchmark.folder))


# ---------------------------------------------------------------------- what is written


@pytest.fixture
def filled(benchmark: Benchmark) -> Benchmark:
    """Two methods and an awkward name, two classes, seven cases."""
    rng = np.random.default_rng(1)
    for trainer, shift in ((OURS, 0.0), (FLOOR, -0.3)):
        for seed in (1, 2):
            dice = 0.7 + shift + 0.1 * rng.random((7, 2))
            benchmark.add(trainer, 1, seed, [{"left_wall": a, "cavity|50%": b} for a, b in dice])
    return benchmark


def test_markdown(filled: Benchmark) -> None:
    markdown = write_tables(str(filled.folder))
    assert (filled.folder / "tables" / "methods.md").read_text(encoding="utf-8") == markdown
    sections = {part.split("\n", 1)[0]: part.splitlines() for part in markdown.split("### ")[1:]}
    assert {"All classes", "Dice (%), per class", "HD95 (mm), per class", "ASSD (mm), per class", "Cost"} <= set(sections)
    for lines in sections.values():
        rows = [line.replace(r"\|", "/") for line in lines if line.startswith("|")]
        assert len(rows) == 4
        assert len({row.count("|") for row in rows}) == 1
    floor, ours = (
        dict(zip(cells(sections["All classes"][2]), cells(sections["All classes"][row]))) for row in (4, 5)
    )  # the benchmark names the floor first
    assert (floor["method"], ours["method"]) == ("CMEMS_exemplarOnly", "CMEMS")
    assert (ours["runs"], ours["exemplars"], ours["seeds"]) == ("2", "1", "2")
    assert 70 < float(ours["Dice (%)"].split(" ± ")[0]) < 80
    assert (ours["difference (points)"], ours["p"]) == ("baseline", "")
    assert floor["difference (points)"].startswith("-") and floor["p"] == "0.016"
    assert "standard deviation over the runs" in markdown and "Wilcoxon" in markdown and "Holm" in markdown


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_latex(filled: Benchmark) -> None:
    write_tables(str(filled.folder))
    latex = (filled.folder / "tables" / "methods.tex").read_text(encoding="utf-8")
    for line in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{All classes. Mean over 7 cases"):
        assert line in latex
    assert r"CMEMS\_exemplarOnly" in latex and r"left\_wall" in latex and r"cavity$|$50\%" in latex and r"Dice (\%)" in latex
    assert r" $\pm$ " in latex and "±" not in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 7  # nothing was missed or hallucinated
    assert not [line for line in latex.splitlines() if "_" in line.replace(r"\_", "") and not line.startswith("%")]


def test_json_is_the_same_and_strict(filled: Benchmark) -> None:
    write_tables(str(filled.folder))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((filled.folder / "tables" / "methods.json").read_text(), parse_constant=refuse)
    methods = filled.table("methods")
    assert [found[key] for key in ("dataset", "configuration", "fold", "baseline", "unit")] == ["Dataset001_Made", "2d", "0", "CMEMS", "mm"]
    assert [entry["method"] for entry in found["methods"]] == ["CMEMS_exemplarOnly", "CMEMS"]
    entry = found["methods"][0]
    expected = the(methods, method="CMEMS_exemplarOnly", label="cavity|50%")
    assert entry["classes"]["cavity|50%"]["dice"]["std"] == pytest.approx(expected["dice_std"])
    assert entry["test"]["p_holm"] == pytest.approx(filled.table("tests")["p_holm"][0])
    assert entry["cost"]["peak_gpu_bytes_max"] is None
    assert found["methods"][1]["test"] is None


def test_natural_images_say_pixels(benchmark: Benchmark) -> None:
    folder = benchmark.add(OURS, 1, 1, cases([0.5]))
    (Path(fold_folder(str(folder))).parent / "dataset.json").write_text(json.dumps({"file_ending": ".png"}))
    markdown = write_tables(str(benchmark.folder))
    assert "HD95 (pixels)" in markdown and "distances are in pixels" in markdown


def test_summary_rows_are_methods_by_classes(filled: Benchmark) -> None:
    methods = summarise(collect(str(filled.folder)))
    assert list(zip(methods["method"], methods["label"])) == [
        (method, label) for method in ("CMEMS_exemplarOnly", "CMEMS") for label in (MEAN, "left_wall", "cavity|50%")
    ]
