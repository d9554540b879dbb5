"""Sphinx configuration: `sphinx-build -EW --keep-going docs build/docs`; warnings are errors.

A line `<!-- generated: NAME -->` in a page is replaced by Markdown that a function here makes from
the code, so that the reference of commands, settings and errors cannot differ from it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

import click
import msgspec

import starburst_executor
from starburst_executor import errors
from starburst_executor.cli.exits import MEANINGS
from starburst_executor.cli.main import SECTIONS, main
from starburst_executor.config import Settings

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "starburst_executor"
author = "The starburst_executor developers"
version = release = metadata.version("starburst-executor")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False

# As on a code host: the pages link to headings by their text.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

# Docstrings put code between single backticks; names that are known become links.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True


# --- the generated parts ---------------------------------------------------------


def commands() -> Iterator[str]:
    """Each command under the heading that the help puts it under."""
    with click.Context(main, info_name="starburst-executor") as parent:
        for title, verbs in SECTIONS.items():
            yield f"## {title}\n"
            for verb in verbs:
                command = main.get_command(parent, verb)
                assert command is not None
                yield from _command(click.Context(command, parent, verb))


def _command(context: click.Context) -> Iterator[str]:
    command = context.command
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield f"### {command.name}\n"
    yield f"```text\n{' '.join(usage.split())}\n```\n"
    yield _quote_options(f"{inspect.cleandoc(command.help or '')}\n")
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and record[1]:
            yield f"`{record[0]}`\n: {_quote_options(record[1])}\n"


def _quote_options(text: str) -> str:
    """Put options between backticks, or their dashes would become one."""
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", r"`\g<0>`", text)


def exit_codes() -> Iterator[str]:
    """What each exit code means."""
    yield "| code | meaning |\n|---|---|"
    for code, text in MEANINGS.items():
        yield f"| {int(code)} | {text} |"


def settings() -> Iterator[str]:
    """Each setting: its variable, what is built in, and what the docstring says of it."""
    meanings = _attributes(Settings)
    for field in msgspec.structs.fields(Settings):
        shown = f"`{str(field.default).lower()}`" if field.default else "unset"
        yield f"### {field.name}\n"
        yield f"{meanings[field.name]}\n"
        yield f"Variable: `STARBURST_{field.name.upper()}`. Default: {shown}.\n"


def error_tree() -> Iterator[str]:
    """The drawing in the docstring of `errors`."""
    drawing = re.findall(r"^ {4}.*$", errors.__doc__ or "", re.MULTILINE)
    yield "```text"
    yield from (line[4:] for line in drawing)
    yield "```"


def error_classes() -> Iterator[str]:
    """The public exceptions, bases before those derived from them."""
    public = {
        name: found for name, found in vars(errors).items() if name in starburst_executor.__all__
    }
    yield "```{eval-rst}"
    for name in public:
        yield f".. autoexception:: starburst_executor.{name}\n   :show-inheritance:\n"
    yield "```"


def _attributes(documented: type) -> dict[str, str]:
    """Name -> description, from the `Attributes:` of a docstring."""
    _, _, listed = (inspect.getdoc(documented) or "").partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


_GENERATED = {
    "commands": commands,
    "exit codes": exit_codes,
    "settings": settings,
    "error tree": error_tree,
    "error classes": error_classes,
}


def _fill_in(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = re.sub(
        r"<!-- generated: (.+?) -->",
        lambda found: "\n".join(_GENERATED[found[1]]()),
        content[0],
    )


def _shorten(
    app: Sphinx, what: str, name: str, obj: object, options: object,
    signature: str | None, returns: str | None,
) -> tuple[str | None, str | None]:  # fmt: skip
    """Type variables come with their module and a tilde: `~typing.~P`."""
    return signature and re.sub(r"~([a-z_]\w*\.)*~?", "", signature), returns


def setup(app: Sphinx) -> None:
    """Have the generated parts filled in as pages are read."""
    app.connect("source-read", _fill_in)
    app.connect("autodoc-process-signature", _shorten)
