"""README and docs say what the code does: commands, links, configuration keys, places in the source."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_cmems import trainers
from nnunetv2_cmems.commands.main import COMMANDS
from nnunetv2_cmems.config import CMEMSConfig, with_overrides
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import config_table

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in ("method", "configuration", "nnunet", "benchmark", "peers", "distillation"))]
CONFIGURATION = REPOSITORY / config_table.DOCUMENT


def text(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(document), flags=re.MULTILINE | re.DOTALL)


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a config that is not a config itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def documented_defaults() -> dict[str, str]:
    """Key and default of every row of the tables, read back from the document."""
    found = {}
    for row in re.findall(r"^\| (`.*)\|$", CONFIGURATION.read_text(encoding="utf-8"), flags=re.MULTILINE):
        keys, defaults = (cell.strip().split("<br>") for cell in row.split(" | ")[:2])
        assert len(keys) == len(defaults), row
        found.update(zip((key.strip("`") for key in keys), (default.strip("`") for default in defaults)))
    return found


def test_configuration_tables_are_those_of_the_code(tmp_path: Path) -> None:
    copy = tmp_path / "configuration.md"
    copy.write_bytes(CONFIGURATION.read_bytes())
    config_table.main(["--write", str(copy)])
    assert copy.read_text(encoding="utf-8") == CONFIGURATION.read_text(encoding="utf-8"), (
        "run python -m nnunetv2_cmems.study.config_table --write"
    )


def test_every_key_is_documented_with_its_default() -> None:
    documented = documented_defaults()
    for key, value in flat(CMEMSConfig()):
        assert documented[key] == json.dumps(value), key
    for key in ("case", "slice"):
        assert documented[f"exemplar[].{key}"] == "required"


def test_config_table_prints(capsys: pytest.CaptureFixture[str]) -> None:
    config_table.main([])
    assert capsys.readouterr().out == config_table.tables()


@pytest.mark.parametrize("content", [None, "no markers", config_table.BEGIN])
def test_config_table_needs_a_document_with_markers(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "configuration.md"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(CMEMSError, match="configuration.md"):
        config_table.write(str(path))
    assert content is None or path.read_text(encoding="utf-8") == content


def test_config_table_names_a_field_without_a_description() -> None:
    @dataclasses.dataclass
    class Incomplete:
        """A config.

        Attributes:
            one: described
                in two lines.
        """

        one: int = 1
        two: int = 2

    with pytest.raises(CMEMSError, match="Incomplete does not describe 'two'"):
        config_table.descriptions(Incomplete)


def test_readmes_test_command_is_the_one_of_the_checks() -> None:
    checks = text(".ci/run")
    packages = re.search(r'pip install .*?("torch==.*)$', checks, flags=re.MULTILINE)
    command = re.search(r'^exec "\$python" (.*)$', checks, flags=re.MULTILINE)
    assert packages and command
    expected = f"python3 -m venv .venv && .venv/bin/python -m pip install {packages[1]} && .venv/bin/python {command[1]}\n"
    assert blocks("README.md", "bash")[1] == expected


def test_readmes_first_command_is_the_demo() -> None:
    torch = re.search(r'"torch==[^"]+"', text(".ci/run"))
    assert torch
    expected = f"python3 -m venv .venv && .venv/bin/python -m pip install {torch[0]} . && .venv/bin/nnUNetv2_cmems demo\n"
    assert blocks("README.md", "bash")[0] == expected


def test_readme_lists_every_trainer() -> None:
    listed = re.findall(r"^\| `(nnUNetTrainerCMEMS\w*)`", text("README.md"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(trainers.__all__)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    code = "\n".join([*blocks(document, "bash"), *re.findall(r"`([^`\n]+)`", text(document))])
    assert set(re.findall(r"nnUNetv2_cmems ([a-z]\w*)", code)) <= set(COMMANDS)
    for module in re.findall(r"python -m (nnunetv2_cmems[\w.]*)", code):
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text(document))
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_of_the_config_are_accepted(document: str) -> None:
    for example in blocks(document, "json"):
        with_overrides(CMEMSConfig(), json.loads(example), document)


def test_places_that_the_method_names_exist() -> None:
    places = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text("docs/method.md"))
    assert places
    for path, name in places:
        source = text(f"nnunetv2_cmems/{path}")
        assert not name or re.search(rf"^(?:def|class) {name}\b", source, flags=re.MULTILINE), f"{path}::{name}"


def test_keys_that_the_method_names_exist() -> None:
    known = {key for key, _ in flat(CMEMSConfig())}
    known |= {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    rows = re.findall(r"^\| .* \|$", text("docs/method.md").split("## One training step")[0], flags=re.MULTILINE)[2:]
    named = {key for row in rows for key in re.findall(r"`([\w.]+)`", row.rsplit(" | ", 1)[1])}
    named |= set(re.findall(r"`((?:synthesis|feature_perturbation|exemplar_views)\.\w+)`", "".join(map(text, DOCUMENTS))))
    assert named and named <= known, named - known


@pytest.mark.parametrize("document", DOCUMENTS)
def test_plain_text(document: str) -> None:
    """No tabs, no trailing blanks, one line break at the end."""
    lines = text(document).split("\n")
    assert lines[-1] == "" and lines[-2] != ""
    assert not [line for line in lines if line != line.rstrip() or "\t" in line]
