"""The tables of ``docs/configuration.md``: every key of the config, made from the config itself.

Names, defaults and ranges come from the fields of :class:`nnunetv2_cmems.config.CMEMSConfig`, meanings
from the ``Attributes:`` sections of the docstrings, so that nothing is written down twice::

    python -m nnunetv2_cmems.study.config_table           # prints the tables
    python -m nnunetv2_cmems.study.config_table --write   # puts them into docs/configuration.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union

from nnunetv2_cmems.config import CMEMSConfig, ExemplarSpec
from nnunetv2_cmems.errors import CMEMSError, show_errors_as_sentences

DOCUMENT = "docs/configuration.md"
"""Where the tables belong, from the root of the source tree."""

BEGIN = "<!-- written by: python -m nnunetv2_cmems.study.config_table --write -->"
END = "<!-- end of what the command writes -->"

_REQUIRED = {(ExemplarSpec, "case"), (ExemplarSpec, "slice")}  # the file must name them, whatever the field's default


def tables() -> str:
    """All tables as Markdown: the config's own keys, those of its parts, and those of an annotated slice."""
    default = CMEMSConfig()
    parts: dict[type, list[tuple[str, Any]]] = {}  # class -> the keys under which it stands, and its defaults there
    for key, value in _parts(default, ""):
        parts.setdefault(type(value), []).append((key, value))
    sections = ["### Keys of the first level", *_table(CMEMSConfig, [("", default)])]
    for cls, uses in parts.items():
        names = [f"`{key}`" for key, _ in uses]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        sections += ["", f"### Keys in {listed}", "", _summary(cls), *_table(cls, uses)]
    sections += ["", "### Keys of an annotated slice in `exemplar`", "", _summary(ExemplarSpec)]
    sections += _table(ExemplarSpec, [("exemplar[]", ExemplarSpec(case=""))])
    return "\n".join(sections) + "\n"


def write(path: str) -> None:
    """Replace what stands between the two markers of a Markdown file by the tables.

    Args:
        path: the file.

    Raises:
        CMEMSError: it does not exist or lacks the markers.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise CMEMSError(f"{path} cannot be read ({error.strerror}); run this in the root of the source tree, or name the file.") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CMEMSError(f"{path} lacks the lines '{BEGIN}' and '{END}', between which the tables belong; add them.")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}")
    os.replace(f"{path}.tmp", path)


def descriptions(cls: type) -> dict[str, str]:
    """Field -> its description in the ``Attributes:`` section of the dataclass's docstring, in Markdown.

    Raises:
        CMEMSError: a field is not described.
    """
    found: dict[str, list[str]] = {}
    name = ""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+): *(.*)", line)
        if start:
            name = start[1]
            found[name] = [start[2]]
        elif line.strip():
            found[name].append(line.strip())
    for field in dataclasses.fields(cls):
        if field.name not in found:
            raise CMEMSError(f"the docstring of {cls.__name__} does not describe '{field.name}'; add it to its section 'Attributes:'.")
    return {name: _markdown(" ".join(lines)) for name, lines in found.items()}


def _parts(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The dotted keys of all nested configs, with their values."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield f"{prefix}{field.name}", value
            yield from _parts(value, f"{prefix}{field.name}.")


def _table(cls: type, uses: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """A row for each field; where the class stands under several keys, a row has a line for each of them."""
    hints, meanings = typing.get_type_hints(cls), descriptions(cls)
    yield from ("", "| key | default | allowed | meaning |", "|---|---|---|---|")
    for field in dataclasses.fields(cls):
        keys, defaults = [], []
        for prefix, values in uses:
            value = getattr(values, field.name)
            keys.append(f"`{prefix}.{field.name}`" if prefix else f"`{field.name}`")
            defaults.append(_default(cls, field.name, value))
        nested = dataclasses.is_dataclass(hints[field.name])
        allowed = "an object" if nested else _allowed(hints[field.name], field.metadata.get("range"))
        yield f"| {'<br>'.join(keys)} | {'<br>'.join(defaults)} | {allowed} | {meanings[field.name]} |"


def _default(cls: type, name: str, value: Any) -> str:
    if (cls, name) in _REQUIRED:
        return "required"
    return "see below" if dataclasses.is_dataclass(value) else f"`{json.dumps(value)}`"


def _allowed(hint: Any, limits: tuple[float, float] | None) -> str:
    """What the JSON file may hold."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)
    return ", or ".join(_option(option, limits) for option in options)


def _option(option: Any, limits: tuple[float, float] | None) -> str:
    between = f" from {limits[0]} to {limits[1]}" if limits is not None else ""
    if option is NoneType:
        return "`null`"
    if option is bool:
        return "`true` or `false`"
    if option is str:
        return "a text"
    if option is int:
        return f"a whole number{between}"
    if option is float:
        return f"a number{between}"
    if typing.get_origin(option) is Literal:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in typing.get_args(option))
    if typing.get_args(option) == (float, Ellipsis):
        return f"a list of numbers{between}, each above the one before"
    if Ellipsis in typing.get_args(option):
        return "a list of annotated slices"
    return f"a list of {len(typing.get_args(option))} numbers{between}, in ascending order"


def _summary(cls: type) -> str:
    """The docstring's text before its sections, in one line."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[0]
    return _markdown(" ".join(text.split()))


def _markdown(text: str) -> str:
    """The docstrings' literals in Markdown's and JSON's writing, safe within a table."""
    return text.replace("``", "`").replace("`None`", "`null`").replace("|", r"\|")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry, see the module's docstring."""
    show_errors_as_sentences()
    parser = argparse.ArgumentParser(
        prog="python -m nnunetv2_cmems.study.config_table", description="Print the tables of all configuration keys as Markdown."
    )
    parser.add_argument(
        "--write", nargs="?", const=DOCUMENT, metavar="FILE", help=f"put them between the markers of FILE instead (default: {DOCUMENT})"
    )
    args = parser.parse_args(arguments)
    if args.write is None:
        print(tables(), end="")
    else:
        write(args.write)


if __name__ == "__main__":
    main()
