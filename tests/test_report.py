"""The page of a benchmark: what it shows, what it leaves out, that it needs nothing else, and how it behaves in a browser."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from markupsafe import Markup
from matplotlib.image import imsave

from nnunetv2_cmems.commands import main as command_line
from nnunetv2_cmems.commands import report
from nnunetv2_cmems.data.phantom import write_dataset
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import report_figures as draw
from nnunetv2_cmems.study.report import render, write_report
from nnunetv2_cmems.study.report_runs import by_threshold, calibration_error, pooled, read_benchmark
from nnunetv2_cmems.study.run import RunRecord, RunSpec

DATASET = "Dataset905_Report"
CONFIGURATION = "2d_small"
VALIDATION = ["phantom_tr000", "phantom_tr001", "phantom_tr002", "phantom_tr003"]
LABELS = {"background": 0, "right cavity": 1, "wall": 2, "left cavity": 3}
METHODS = {"nnUNetTrainerCMEMS": "CMEMS", "nnUNetTrainerCMEMS_exemplarOnly": "exemplar only", "nnUNetTrainer": "nnUNetTrainer"}
EDGES = [*np.linspace(0, 0.9, 10).round(1).tolist(), 0.95, 0.98, 0.99, 0.995, 0.999, 1.0]
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on the PATH")


# ---------------------------------------------------------------------- a made-up benchmark


def spec(trainer: str = "nnUNetTrainerCMEMS", exemplar: int = 1, **changes: Any) -> RunSpec:
    made = RunSpec(
        DATASET, CONFIGURATION, "nnUNetPlans", "0", trainer, METHODS.get(trainer, trainer), exemplar, 1, device="cpu", overrides={"seed": 1}
    )
    return dataclasses.replace(made, **changes)


def fold_of(benchmark: Path, run: RunSpec) -> Path:
    return benchmark / "runs" / run.key / "results" / run.dataset / f"{run.trainer}__{run.plans}__{run.configuration}" / f"fold_{run.fold}"


def write_run(benchmark: Path, run: RunSpec, *, state: str = "finished", skill: float = 0.6, masks: Path | None = None) -> Path:
    """A run as :mod:`nnunetv2_cmems.study.run` leaves it; the more skill, the higher its Dice."""
    folder, fold = benchmark / "runs" / run.key, fold_of(benchmark, run)
    (fold / "validation").mkdir(parents=True)
    record = RunRecord(run, state, "2026-01-02T03:04:05", 90.0, 2 * 10**9, command="nnUNetv2_train 905", versions={"torch": "2.0"})
    record.error = "exit code 1: out of memory" if state == "failed" else None
    (folder / "run.json").write_text(json.dumps(dataclasses.asdict(record)))
    (folder / "cmems.json").write_text("{}")
    if state != "finished":
        return fold
    (fold.parent / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}))
    (fold / "validation" / "summary.json").write_text("{}")
    lines = ["case,label,dice,hd95_mm,assd_mm,volume_ml,reference_volume_ml,volume_error_ml,volume_error_percent"]
    for i, case in enumerate(VALIDATION):
        for label in list(LABELS)[1:]:
            lines.append(f"{case},{label},{min(1.0, skill + 0.05 * i):.3f},3.0,1.0,10,11,-1,-9.1")
        if masks is not None:
            shutil.copy(masks / f"{case}.nii.gz", fold / "validation")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if run.trainer == "nnUNetTrainer":
        return fold
    (fold / "cmems_config.json").write_text(
        json.dumps({"config": {"tau": 0.95}, "exemplars": [{"case": f"case<{run.exemplar}>", "slice": 3}], "unlabelled": ["a", "b"]})
    )
    (fold / "cmems_history.json").write_text(json.dumps(history(6, skill)))
    imsave(fold / "exemplar.png", np.random.default_rng(run.exemplar).random((30, 60, 3)))
    if "exemplarOnly" not in run.trainer:
        (fold / "cmems_reliability.json").write_text(json.dumps({"edges": EDGES, "epochs": [histogram(e) for e in range(6)]}))
    return fold


def history(epochs: int, skill: float) -> dict[str, list[float | None]]:
    rising = [skill * (e + 1) / epochs for e in range(epochs)]
    keys = ["mean_fg_dice", "agreement/mean", "agreement/wall", "coverage/member_0", "coverage/member_1", "coverage_foreground/member_0"]
    keys += ["pseudo_label_accuracy", "pseudo_label_dice/mean", "pseudo_label_dice/wall"]
    losses = {key: [1 - value for value in rising] for key in ("loss/supervised", "loss/image", "train_losses", "val_losses")}
    return {**{key: [None, *rising[1:]] for key in keys}, **losses}


def histogram(epoch: int) -> dict[str, Any]:
    middle = (np.array(EDGES[:-1]) + np.array(EDGES[1:])) / 2
    count = np.round(1000 * middle ** (2 + 4 * epoch))
    part = {"count": count.tolist(), "confidence": (count * middle).tolist(), "right": np.floor(count * middle * 0.9).tolist()}
    return {**part, "foreground": {key: (np.array(values) * 0.1).tolist() for key, values in part.items()}}


def write_benchmark(folder: Path, masks: Path | None = None) -> Path:
    """Three methods, two exemplars, a study, a failed run and a killed one."""
    named = {value: f"CMEMS, tau {value}" for value in (0.8, 0.9)}
    variants: list[dict[str, Any]] = [
        {"value": value, "method": method, "runs": [spec(study="tau", value=value).key]} for value, method in named.items()
    ]
    variants.append({"value": 0.95, "method": "CMEMS", "runs": [spec(exemplar=i).key for i in (1, 2)]})
    grid = {
        "dataset": DATASET,
        "configuration": CONFIGURATION,
        "plans": "nnUNetPlans",
        "fold": "0",
        "device": "cpu",
        "epochs": 6,
        "iterations": 10,
        "exemplars": [[{"case": "a"}], [{"case": "b"}]],
        "seeds": [1],
        "trainers": list(METHODS),
        "studies": [{"name": "tau", "question": "How confident <must> it be?", "variants": variants}],
        "versions": {},
        "commands": ["nnUNetv2_cmems benchmark -d 905 --epochs 6 && echo <done>"],
    }
    folder.mkdir(parents=True)
    (folder / "benchmark.json").write_text(json.dumps(grid))
    for number, trainer in enumerate(METHODS):
        for exemplar in (1, 2):
            write_run(folder, spec(trainer, exemplar), skill=0.7 - 0.2 * number + 0.02 * exemplar, masks=masks)
    for value, method in named.items():
        write_run(folder, spec(method=method, study="tau", value=value), skill=0.5 * value)
    write_run(folder, spec("nnUNetTrainerCMEMS", 3), state="failed")
    write_run(folder, spec("nnUNetTrainerCMEMS", 4), state="running")
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    return write_dataset(root, 905, "Report", len(VALIDATION), 0, shape=(5, 48, 40))


@pytest.fixture(scope="module")
def masks(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions: the truth, moved a little."""
    folder = tmp_path_factory.mktemp("masks")
    for case in VALIDATION:
        image = sitk.ReadImage(str(raw / "labelsTr" / f"{case}.nii.gz"))
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), 3, axis=2))
        moved.CopyInformation(image)
        sitk.WriteImage(moved, str(folder / f"{case}.nii.gz"))
    return folder


@pytest.fixture(scope="module")
def made(raw: Path, masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark and its page; tests must not change it."""
    folder = write_benchmark(tmp_path_factory.mktemp("results") / "bench", masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(raw.parent))
        patch.delenv("nnUNet_preprocessed", raising=False)
        write_report(str(folder))
    return folder


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark of one's own, without scans; its page has no drawings, which take most of the time."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setattr(draw, "_svg", lambda figure, alt: Markup("<svg></svg>"))
    return write_benchmark(tmp_path / "bench")


class Page(HTMLParser):
    """The elements of a page, and its text by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self._silent = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._silent = tag in ("script", "style")
        if tag == "section":
            self._section = str(dict(attrs).get("id"))

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------------- what the page holds


def test_every_section_is_there(made: Path) -> None:
    page = Page(made / "report.html")
    wanted = ["summary", "cases", "training", "pseudo-labels", "reliability", "study-1", "gallery", "exemplars", "repeat", "not-counted"]
    assert [element["id"] for element in page.all("section")] == wanted
    linked = {element["href"] for element in page.all("a")}
    assert {f"#{name}" for name in wanted} <= linked


def test_the_tables_are_those_of_the_comparison(made: Path) -> None:
    summary = Page(made / "report.html").sections["summary"]
    assert all(method in summary for method in METHODS.values())
    # CMEMS: exemplars 1 and 2 with 0.72 and 0.74, plus 0.075 on average over the cases
    assert "80.5 ± 1.4" in summary
    assert (made / "tables" / "cases.csv").is_file()


def test_failed_and_killed_runs_are_listed_and_not_counted(made: Path) -> None:
    page = Page(made / "report.html")
    listed = page.sections["not-counted"]
    assert "nnUNetTrainerCMEMS__exemplar_3__seed_1" in listed and "out of memory" in listed
    assert "nnUNetTrainerCMEMS__exemplar_4__seed_1" in listed
    assert "exemplar_3" not in page.sections["summary"] + page.sections["repeat"]
    assert "8 counted, 2 not" in page.sections[""]


def test_tables_are_fresh(bench: Path) -> None:
    (bench / "tables").mkdir()
    (bench / "tables" / "methods.json").write_text("old")
    write_report(str(bench))
    assert "CMEMS" in (bench / "tables" / "methods.json").read_text()


def test_the_page_tests_as_the_benchmark_was_called(bench: Path) -> None:
    """Against its baseline, and by patients, in the page as in the tables."""
    floor = METHODS["nnUNetTrainerCMEMS_exemplarOnly"]
    path = bench / "benchmark.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "baseline": floor, "by_patient": True}))
    write_report(str(bench))
    wanted = f"median over the patients of the Dice minus that of {floor}"
    assert wanted in Page(bench / "report.html").sections["summary"]
    assert wanted in (bench / "tables" / "methods.md").read_text()


def test_nothing_is_fetched_from_anywhere(made: Path) -> None:
    page = Page(made / "report.html")
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            value = attributes.get(name)
            if value is None or value.startswith(("data:", "#")):
                continue
            assert (tag, name) == ("a", "href") and value.startswith(("https://arxiv.org/", "https://doi.org/")), (tag, value)
    drawn = re.sub(r"<script.*?</script>", "", page.source, flags=re.DOTALL)
    assert all(target.startswith(("data:", "#")) for target in re.findall(r"url\((?:['\"]|&#39;)?(.{,8})", drawn))
    assert "@import" not in page.source and "fetch(" not in page.source and not [s for s in page.all("script") if "src" in s]


def test_user_texts_are_escaped(made: Path) -> None:
    source = (made / "report.html").read_text()
    assert "<done>" not in source and "&lt;done&gt;" in source
    assert "case<1>" not in re.sub(r"<pre.*?</pre>", "", source, flags=re.DOTALL) and "case&lt;1&gt;" in source


def test_pictures_and_figures_have_descriptions(made: Path) -> None:
    page = Page(made / "report.html")
    assert page.all("img") and all(element.get("alt") for element in page.all("img"))
    figures = page.all("svg")
    assert len(figures) > 15
    assert all(element.get("aria-hidden") == "true" or (element["role"] == "img" and element["aria-label"]) for element in figures)
    assert any("CMEMS: median 80.5, mean 80.5" in str(element.get("aria-label")) for element in figures)
    assert all(element.get("scope") in ("col", "row") for element in page.all("th"))
    assert all(element.get("aria-label") for element in page.all("input") if element.get("type") == "range")


def test_ids_are_unique_and_references_lead_somewhere(made: Path) -> None:
    page = Page(made / "report.html")
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    repeated = {name for name in ids if ids.count(name) > 1}
    # The same drawing may stand in a page twice, as a piece of a legend does; what it refers to is then the same.
    assert all(re.fullmatch(r"f[0-9a-f]{8}\w+", name) for name in repeated)
    assert set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", page.source)) <= set(ids)


def test_figures_take_their_colours_from_the_style_sheet(made: Path) -> None:
    source = (made / "report.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    used = set(re.findall(r"var\((--[\w-]+)\)", drawings))
    assert "--series-0" in used and not re.findall(r"#[0-9a-fA-F]{6}\b", drawings)
    dark = source[source.index("prefers-color-scheme: dark") :]
    assert all(f"{name}:" in dark[: dark.index("</style>")] for name in used)


def test_the_study_shows_every_value_and_the_main_method(made: Path) -> None:
    page = Page(made / "report.html")
    labels = [str(element.get("aria-label")) for element in page.all("svg")]
    (found,) = [label for label in labels if label.startswith("Mean Dice against tau")]
    assert "0.8: 47.5 %" in found and "0.9: 52.5 %" in found and "0.95: 80.5 %" in found  # the last is CMEMS itself
    text = page.sections["study-1"]
    assert "0.95: CMEMS itself" in text and "trained with τ 0.8" in text and "How confident <must> it be?" in text


def test_every_annotated_slice_and_the_order_of_suggest(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench / "benchmark.json"
    grid = json.loads(path.read_text())
    variants = []
    for number in range(1, 6):
        own = spec(exemplar=number, method=f"CMEMS, exemplar c{number}", study="exemplar", value=f"c{number}")
        write_run(bench, own, skill=0.1 * number)
        variants.append({"value": own.value, "method": own.method, "runs": [own.key], "suggest_rank": 60 - number})
        variants[-1]["suggest_of"] = 90
    grid["studies"] = [{"name": "exemplar", "question": "Which slice?", "variants": variants}]
    path.write_text(json.dumps(grid))
    told: list[str] = []
    monkeypatch.setattr(draw, "_svg", lambda figure, alt: told.append(alt) or Markup("<svg></svg>"))
    write_report(str(bench))
    text = Page(bench / "report.html").sections["study-1"]
    assert "ρ = −1.00" in text
    assert text.index("c5") < text.index("c4") < text.index("c1")
    assert any("of 90: from 17.5 % to 57.5 %, 5 runs" in alt for alt in told)


def test_variants_of_a_study_do_not_crowd_the_summary(made: Path) -> None:
    source = (made / "report.html").read_text()
    first = re.findall(r"<tbody>(.*?)</tbody>", source, flags=re.DOTALL)[0]
    assert "CMEMS, tau" not in first and "CMEMS, tau 0.8" in Page(made / "report.html").sections["summary"]


def test_without_hidden_labels_or_curves_the_sections_are_left_out(bench: Path) -> None:
    for name in ("cmems_history.json", "cmems_reliability.json", "exemplar.png"):
        for path in bench.rglob(name):
            path.unlink()
    write_report(str(bench))
    shown = [element["id"] for element in Page(bench / "report.html").all("section")]
    assert not {"training", "pseudo-labels", "reliability", "exemplars"} & set(shown) and "summary" in shown


def test_without_raw_data_the_page_says_so(bench: Path) -> None:
    write_report(str(bench))
    gallery = Page(bench / "report.html").sections["gallery"]
    assert "No scans are shown" in gallery and DATASET in gallery


def test_only_a_study_was_run(bench: Path) -> None:
    for path in (bench / "runs").iterdir():
        if "tau" not in path.name:
            shutil.rmtree(path)
    benchmark = read_benchmark(str(bench))
    assert list(benchmark.methods) == ["CMEMS, tau 0.8", "CMEMS, tau 0.9"]
    assert "CMEMS, tau 0.8" in render(benchmark)


def test_other_versions_are_told(bench: Path) -> None:
    path = bench / "runs" / spec().key / "run.json"
    path.write_text(path.read_text().replace('"torch": "2.0"', '"torch": "2.1"'))
    write_report(str(bench))
    assert "2.1; 2.0" in Page(bench / "report.html").sections["repeat"]


def test_histograms_of_runs_are_put_together(made: Path) -> None:
    runs = read_benchmark(str(made)).methods["CMEMS"]
    one, two = pooled(runs[:1]), pooled(runs)
    assert one is not None and two is not None
    assert np.allclose(two["count"], 2 * one["count"])
    assert calibration_error(one) == pytest.approx(calibration_error(two))


def test_calibration_error_and_thresholds() -> None:
    bins = {key: np.array(v, float) for key, v in {"count": [50, 50], "confidence": [30, 45], "right": [20, 45]}.items()}
    assert calibration_error(bins) == pytest.approx(0.1)
    thresholds, coverage, accuracy = by_threshold({**bins, "edges": np.array([0.0, 0.8, 1.0])})
    assert thresholds.tolist() == [0.0, 0.8]
    assert coverage.tolist() == [1.0, 0.5] and accuracy.tolist() == pytest.approx([0.65, 0.9])


def test_neighbouring_lines_differ_in_more_than_their_colour() -> None:
    styles = [draw.line_style(i) for i in range(20)]
    assert len({(str(s["linestyle"]), s["marker"]) for s in styles}) == 20
    assert all(a["linestyle"] != b["linestyle"] and a["marker"] != b["marker"] for a, b in zip(styles, styles[1:]))


# ---------------------------------------------------------------------- the command, and what goes wrong


def call(*words: str) -> int:
    return command_line.main(["report", *words])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setitem(command_line.COMMANDS, "report", ("nnunetv2_cmems.commands.report", "write one HTML file about a benchmark"))
    return call


def test_the_command_finds_the_default_folder(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setattr(draw, "_svg", lambda figure, alt: Markup("<svg></svg>"))
    folder = write_benchmark(tmp_path / DATASET / f"cmems_benchmark__nnUNetPlans__{CONFIGURATION}__fold_0")
    output = tmp_path / "elsewhere" / "page.html"
    assert command("-d", "905", "-c", CONFIGURATION, "-o", str(output)) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_text().startswith("<!DOCTYPE html>") and not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "is no benchmark's folder"),
        ([], "no benchmark is named"),
        (["bench", "-d", "905"], "are given at once"),
        (["-d", "906", "-c", "2d"], "there is no data set 906"),
        (["-d", "905", "-c", "3d"], f"there are: cmems_benchmark__nnUNetPlans__{CONFIGURATION}__fold_0"),
        (["bench", "-o", "bench"], "is a folder"),
        (["bench", "--baseline", "CMEM"], "did you mean 'CMEMS'"),
    ],
)
def test_bad_command_lines(
    command: Callable[..., int],
    words: list[str],
    sentence: str,
    bench: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bench.parent)
    monkeypatch.setenv("nnUNet_results", str(bench.parent))
    (bench.parent / DATASET / f"cmems_benchmark__nnUNetPlans__{CONFIGURATION}__fold_0").mkdir(parents=True)
    assert command(*words) == 1
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_a_folder_of_another_benchmark_is_suggested(tmp_path: Path) -> None:
    write_benchmark(tmp_path / "bench")
    with pytest.raises(CMEMSError, match="such as .*bench"):
        read_benchmark(str(tmp_path))


def test_no_run_has_finished(bench: Path) -> None:
    for path in bench.rglob("summary.json"):
        path.unlink()
    with pytest.raises(CMEMSError, match="no run .* finished"):
        write_report(str(bench))
    assert not (bench / "report.html").exists()


def test_a_run_of_another_data_set(bench: Path) -> None:
    write_run(bench, spec(dataset="Dataset906_Other", exemplar=5))
    with pytest.raises(CMEMSError, match="Dataset906_Other"):
        write_report(str(bench))


def test_a_damaged_file_of_a_run_is_named(bench: Path) -> None:
    path = fold_of(bench, spec()) / "cmems_history.json"
    path.write_text("{")
    with pytest.raises(CMEMSError, match=re.escape(str(path))):
        write_report(str(bench))


def test_the_help_names_what_it_writes() -> None:
    parser = argparse.ArgumentParser(description=report.HELP)
    report.add_arguments(parser)
    assert "report.html" in parser.format_help()


# ---------------------------------------------------------------------- in a browser


def browse(page: Path, tmp_path: Path, script: str, *, width: int = 390, dark: bool = False) -> str:
    """What ``script`` (an expression) is in a page, told by Chromium. The page stands in a frame of the wanted width."""
    inner = tmp_path / "inner.html"
    probe = f"<script>addEventListener('load', () => parent.postMessage(String({script}), '*'))</script></body>"
    inner.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="told">nothing</pre>'
        "<script>addEventListener('message', (event) => { document.querySelector('#told').textContent = event.data; });</script></body>"
    )
    dom = chromium(tmp_path, "--dump-dom", outer, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    found = re.search(r'<pre id="told">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found is not None, dom[:500]
    return found[1]


def chromium(tmp_path: Path, action: str, page: Path, *options: str) -> str:
    assert CHROMIUM is not None
    quiet = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-gpu", "no-sandbox"]
    quiet += [f"user-data-dir={tmp_path / 'profile'}", "virtual-time-budget=5000"]
    line = [CHROMIUM, "--headless", *(f"--{name}" for name in quiet), *options, action, page.as_uri()]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=120).stdout


@needs_chromium
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_never_scrolls_sideways(made: Path, tmp_path: Path, width: int) -> None:
    script = (
        "(document.querySelectorAll('details').forEach((d) => { d.open = true; }),"
        " document.documentElement.scrollWidth + ' of ' + document.documentElement.clientWidth)"
    )
    told = browse(made / "report.html", tmp_path, script, width=width)
    assert re.fullmatch(rf"(\d+) of {width}|(\d+) of {width - 15}", told), told
    wide, room = (int(number) for number in told.split(" of "))
    assert wide <= room


@needs_chromium
def test_the_slider_changes_the_slice(made: Path, tmp_path: Path) -> None:
    script = """(() => {
      const box = document.querySelector('.case'), slider = box.querySelector('input[type=range]');
      const state = () => [box.dataset.slice, box.querySelector('output').textContent, box.querySelector('.view img').src.length > 100,
        getComputedStyle(box.querySelector('.view > div')).backgroundImage.length > 100].join('|');
      const masks = new Set(), scans = new Set(), found = [];
      slider.value = 0; slider.dispatchEvent(new Event('input')); found.push(state());
      for (let i = 0; i < 5; i++) {
        masks.add(box.querySelector('.view.mask img').src); scans.add(box.style.getPropertyValue('--scan'));
        box.querySelector('button[value="1"]').click();
      }
      found.push(state()); found.push(masks.size + scans.size); found.push(box.querySelector('.slider').hidden);
      return found.join(' ; ');
    })()"""
    told = browse(made / "report.html", tmp_path, script)
    assert told == "0|slice 0 of 5|true|true ; 4|slice 4 of 5|true|true ; 10 ; false"


@needs_chromium
def test_masks_can_be_hidden(made: Path, tmp_path: Path) -> None:
    script = """(() => {
      const seen = () => getComputedStyle(document.querySelector('.view.mask img')).visibility;
      const before = seen(); document.querySelector('[data-turns=bare]').click(); return before + ' ' + seen();
    })()"""
    assert browse(made / "report.html", tmp_path, script) == "visible hidden"


@needs_chromium
def test_text_is_legible_in_light_and_dark(made: Path, tmp_path: Path) -> None:
    script = """(() => {
      const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const least = Math.min(...[...document.querySelectorAll('p, td, th, dd, .plot text')].map(
        (e) => Math.abs(paper - light(e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color))));
      return (paper > 128 ? 'light' : 'dark') + ' ' + (least > 90);
    })()"""
    assert browse(made / "report.html", tmp_path, script) == "light true"
    assert browse(made / "report.html", tmp_path, script, dark=True) == "dark true"
