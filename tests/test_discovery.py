"""nnU-Net finds the trainers straight after ``pip install``; the console command; what uninstalling leaves.

The package is installed, normally and editable, into fresh environments that borrow every other
package from the environment that runs the tests, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import types
import venv
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import nnunetv2_cmems
from nnunetv2_cmems.commands import main as command
from nnunetv2_cmems.errors import CMEMSError

REPOSITORY = Path(__file__).resolve().parents[1]
STARTUP = "nnunetv2_cmems_startup.pth"
VARIABLE = "nnUNet_extTrainer"
MODES = ("normal", "editable")

FIND = """
import json, os
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
cls = find("nnUNetTrainerCMEMS")
result = {"module": cls.__module__}
from nnunetv2_cmems.trainers.cmems import nnUNetTrainerCMEMS
result["identical"] = cls is nnUNetTrainerCMEMS
"""
"""Begins a script: find the trainer as nnU-Net's commands do."""

PRINT = "\nprint(json.dumps(result))"

OWN_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerOwn(nnUNetTrainer):
    pass
"""
"""A module in a user's own folder."""

def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would lead Python or nnU-Net elsewhere, plus ``variables``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "nnUNet_")) and k != "VIRTUAL_ENV"}
    return {**kept, "PYTHONUTF8": "1", **variables}


class Installation:
    """A fresh environment with the package in it."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root, self.mode = root, mode
        self.environment = root / "environment"
        venv.create(self.environment, with_pip=True, symlinks=os.name != "nt")
        self.scripts = self.environment / ("Scripts" if os.name == "nt" else "bin")
        self.python_program = self.scripts / ("python.exe" if os.name == "nt" else "python")
        self.site_packages = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        # Plain lines of a .pth file: the folders join sys.path after this environment's own, and .pth
        # files that lie in them, such as the start-up line of an installed copy of ours, do not run.
        borrowed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        (self.site_packages / "zz_borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
        self.pip("--version")  # writes whatever pip writes into an environment when it first runs
        self.files_before = self.files()
        source = ["-e", str(REPOSITORY)] if mode == "editable" else [str(REPOSITORY)]
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", *source)
        package_parent = REPOSITORY if mode == "editable" else self.site_packages
        self.trainer_folder = package_parent / "nnunetv2_cmems" / "ext_trainer"

    def run(self, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside of the repository; a failure fails the test with the command's output."""
        done = subprocess.run(arguments, env=clean_environment(**variables), cwd=self.root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run([str(self.python_program), "-c", script], **variables)

    def pip(self, *arguments: str) -> None:
        self.run([str(self.python_program), "-m", "pip", "--disable-pip-version-check", *arguments])

    def answer(self, script: str, **variables: str) -> dict[str, Any]:
        """The JSON object in the last line of what a script prints, with only nnU-Net's own variables set."""
        paths = {f"nnUNet_{name}": str(self.root / name) for name in ("raw", "preprocessed", "results")}
        answer = json.loads(self.python(script, **{**paths, **variables}).stdout.splitlines()[-1])
        assert isinstance(answer, dict)
        return answer

    def variable(self, **variables: str) -> list[str]:
        """The folders that ``nnUNet_extTrainer`` holds once Python has started."""
        script = f"import os; print(os.environ.get({VARIABLE!r}, ''))"
        return [p for p in self.python(script, **variables).stdout.strip().split(os.pathsep) if p]

    def files(self) -> set[str]:
        """All files and folders of site-packages and of the scripts' folder, but for pip's and its helpers' byte code."""
        found = set()
        for top in (self.site_packages, self.scripts):
            for folder, subfolders, names in os.walk(top):
                subfolders[:] = [s for s in subfolders if Path(folder, s) not in (top / "pip", top / "setuptools", top / "pkg_resources")]
                found |= {str(Path(folder, name).relative_to(self.environment)) for name in [*subfolders, *names]}
        return found


@pytest.fixture(scope="module", params=MODES)
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The package in a fresh environment, until ``test_uninstalling_leaves_nothing`` takes it out."""
    installed = Installation(tmp_path_factory.mktemp(request.param), request.param)
    assert (installed.site_packages / STARTUP).is_file()
    return installed


def test_nnunet_finds_the_trainer_with_nothing_exported(installation: Installation) -> None:
    own = installation.root / "own trainers"
    own.mkdir()
    (own / "my_trainer.py").write_text(OWN_TRAINER)
    script = f"""{FIND}
import multiprocessing, operator
with multiprocessing.get_context("spawn").Pool(1) as pool:  # the class travels by reference
    result["in_child"] = pool.apply(operator.attrgetter("__module__"), (cls,))
    result["variable_in_child"] = pool.apply(os.getenv, ({VARIABLE!r},))

# Beside a user's own folder, in the order of the next test; nnU-Net reads the variable at each search.
os.environ[{VARIABLE!r}] = os.pathsep.join([{str(own)!r}, os.environ[{VARIABLE!r}]])
result["identical_beside_own"] = find("nnUNetTrainerCMEMS") is nnUNetTrainerCMEMS
result["own"] = find("nnUNetTrainerOwn").__module__
{PRINT}"""
    assert installation.answer(script) == {
        "module": "nnunetv2_cmems.trainers.cmems",
        "identical": True,
        "in_child": "nnunetv2_cmems.trainers.cmems",
        "variable_in_child": str(installation.trainer_folder),
        "identical_beside_own": True,
        "own": "my_trainer",
    }


def test_a_users_own_folder_stays_and_comes_first(installation: Installation) -> None:
    assert installation.variable(**{VARIABLE: "/my/trainers"}) == ["/my/trainers", str(installation.trainer_folder)]


def test_the_variable_is_not_extended_twice(installation: Installation) -> None:
    inherited = os.pathsep.join(["elsewhere", str(installation.trainer_folder), "more"])
    assert installation.variable(**{VARIABLE: inherited}) == inherited.split(os.pathsep)


def test_explicit_export_works_without_the_start_up_line(installation: Installation) -> None:
    startup = installation.site_packages / STARTUP
    content = startup.read_bytes()
    startup.write_text(startup_lines()[1])  # the other line, for a torchvision that does not fit, stays
    try:
        assert installation.variable() == []
        folder = installation.run([str(installation.scripts / command.PROG), "trainer_path"]).stdout.strip()
        assert folder == str(installation.trainer_folder)
        if installation.mode == "normal":  # from here on both modes are the same
            assert installation.answer(FIND + PRINT, **{VARIABLE: folder})["identical"]
    finally:
        startup.write_bytes(content)


def test_python_starts_silently_when_the_package_is_gone(installation: Installation) -> None:
    if installation.mode == "editable":
        pytest.skip("the folder is the repository's own")
    moved = installation.trainer_folder.rename(installation.root / "moved")
    try:
        done = installation.python("print('started')")
        assert (done.stdout.strip(), done.stderr) == ("started", "")
        assert str(installation.trainer_folder) not in installation.variable()
    finally:
        moved.rename(installation.trainer_folder)


def test_starting_python_imports_nothing_of_ours(installation: Installation) -> None:
    done = installation.python("import sys; print([m for m in sys.modules if 'cmems' in m or m in ('torch', 'numpy')])")
    assert done.stdout.strip() == "[]"


def test_uninstalling_leaves_nothing(installation: Installation) -> None:
    """The last test of an environment: it takes the package out."""
    installation.pip("uninstall", "--yes", "nnunetv2-cmems")
    assert sorted(installation.files() ^ installation.files_before) == []


# The start-up line and the re-exporting module by themselves.


def startup_lines() -> list[str]:
    """What Python runs of the file: the line that sets the variable, and the one that looks after torchvision."""
    lines = [line for line in (REPOSITORY / STARTUP).read_text(encoding="ascii").splitlines() if not line.startswith("#")]
    assert len(lines) == 2 and all(line.startswith("import ") for line in lines)
    return lines


def start_up() -> None:
    for line in startup_lines():
        exec(line, {})


def test_start_up_costs_less_than_a_millisecond() -> None:
    lines, seconds = startup_lines(), []
    with mock.patch.dict(os.environ), mock.patch.object(sys, "meta_path", list(sys.meta_path)):
        for _ in range(51):
            os.environ.pop(VARIABLE, None)
            begin = time.perf_counter()
            for line in lines:
                exec(line, {})
            seconds.append(time.perf_counter() - begin)
    assert statistics.median(seconds) < 1e-3


@pytest.mark.parametrize("path", [[], ["/nowhere", ""], [None, 3], None], ids=str)
def test_start_up_line_survives_an_odd_path(path: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        os.environ.pop(VARIABLE, None)
        with mock.patch.object(sys, "path", path), mock.patch.object(sys, "meta_path", list(sys.meta_path)):
            start_up()
        assert VARIABLE not in os.environ


@pytest.mark.parametrize("with_nnunet", [True, False])
def test_nnunet_can_import_a_torchvision_that_does_not_fit(with_nnunet: bool, tmp_path: Path) -> None:
    """And only nnU-Net can: another program gets torchvision's own error."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\ntorch.library.register_fake('torchvision::nms')(lambda *a: None)\n")
    (package / "_C.so").write_text("built for another torch")
    script = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(REPOSITORY)]!r}
for line in {startup_lines()!r}:
    exec(line, {{}})
{"import nnunetv2" if with_nnunet else ""}
try:
    import torchvision
    print("imported")
except RuntimeError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", script]
    done = subprocess.run(arguments, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    said = done.stdout.strip()
    assert said == "imported" if with_nnunet else "torchvision::nms does not exist" in said, done.stderr


def test_folder_is_harmless_in_a_python_without_the_package(tmp_path: Path) -> None:
    """A child process of another environment inherits the variable; nnU-Net imports our module there."""
    folder = REPOSITORY / "nnunetv2_cmems" / "ext_trainer"
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import nnunetv2_cmems_trainers
print([name for name in dir(nnunetv2_cmems_trainers) if "nnUNet" in name])
"""
    arguments = [sys.executable, "-S", "-B", "-c", script]  # -S: no site-packages
    done = subprocess.run(arguments, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_folder_offers_every_trainer_and_defines_none() -> None:
    from nnunetv2_cmems import trainers
    from nnunetv2_cmems.ext_trainer import nnunetv2_cmems_trainers as offered

    assert "nnUNetTrainerCMEMS" in trainers.__all__
    for name in trainers.__all__:
        assert getattr(offered, name) is getattr(trainers, name)
        assert getattr(offered, name).__module__.startswith("nnunetv2_cmems.trainers.")


# The console command.


def test_help_lists_subcommands_and_needs_no_torch(tmp_path: Path) -> None:
    for arguments in (["--help"], ["trainer_path"]):
        script = f"""
import sys
from nnunetv2_cmems.commands.main import main
try:
    main({arguments!r})
finally:
    print([m for m in ("torch", "numpy", "nnunetv2") if m in sys.modules], file=sys.stderr)
"""
        variables = clean_environment(PYTHONPATH=str(REPOSITORY))
        done = subprocess.run([sys.executable, "-c", script], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.strip()) == (0, "[]")
        if arguments == ["--help"]:
            assert all(name in done.stdout and line in " ".join(done.stdout.split()) for name, (_, line) in command.COMMANDS.items())


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_subcommand_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: nnUNetv2_cmems {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"nnUNetv2_cmems {nnunetv2_cmems.__version__}"


def test_no_subcommand_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "trainer_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [("trainer-path", "did you mean 'trainer_path'?"), ("exprot", "did you mean 'export'?"), ("xyzzy", "there are demo, ")],
)
def test_unknown_subcommand_names_the_nearest(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([typed])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(CMEMSError("no such case."), 1, "nnUNetv2_cmems: no such case.\n"), (KeyboardInterrupt(), 130, "")],
)
def test_errors_end_without_a_traceback(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> None:
        raise error

    module = types.ModuleType("failing_subcommand")
    vars(module).update(HELP="Fails.", add_arguments=lambda parser: None, run=fail)
    monkeypatch.setitem(sys.modules, "failing_subcommand", module)
    monkeypatch.setitem(command.COMMANDS, "fail", ("failing_subcommand", "fails"))
    assert command.main(["fail"]) == code
    assert capsys.readouterr().err == said
