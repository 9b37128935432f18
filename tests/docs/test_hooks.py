# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the site makes of the code: pages of commands and settings, docstrings, links to files of the repository."""

import dataclasses
import importlib.util
import re

import pytest
from documents import ROOT, blocks, command_lines, segcompass_arguments
from transformers import TrainingArguments


def hook(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return hook("reference_pages")


def test_every_command_and_flag_is_on_the_page(reference):
    from segcompass_hf.cli import _parser

    page = reference.commands_page()
    listed = list(reference.commands(_parser()))
    assert {"segcompass predict", "segcompass data build"} <= {name for name, _, _ in listed}
    assert "segcompass data" not in {name for name, _, _ in listed}  # it only holds `build` and `push`
    for name, summary, parser in listed:
        section = page.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
        assert summary and set(re.findall(r"--[a-z][\w-]+", parser.format_usage())) - {"--help"} <= set(
            re.findall(r"--[a-z][\w-]+", section)
        )
    assert "| <code>--dry-run</code> |" in page and "%(default)s" not in page


def test_every_field_has_a_meaning(reference):
    page = reference.settings_page()
    assert "| `concept_threshold` | <code>float" in page and "| <code>2.0</code> |" in page
    for path, _ in reference.SETTINGS.values():
        module, _, name = path.partition(":")
        described = getattr(importlib.import_module(module), name)
        own, inherited = reference.settings(described)
        if issubclass(described, TrainingArguments):
            assert len(own) + len(inherited) == len(dataclasses.fields(described))
        assert not [row[0] for row in own if not row[-1]], f"fields of {name} without a meaning in its docstring"


def test_fields_are_read_off_a_docstring(reference):
    class Settings:
        """Of something.

        Args:
            a, b (`int`, *optional*, defaults to `f(1)`): Two lines
                of text: with a colon.
            c (`str`):
                On the next line.

        Raises:
            ValueError: no.
        """

    assert reference.documented_fields(Settings) == {
        "a": "Two lines of text: with a colon.",
        "b": "Two lines of text: with a colon.",
        "c": "On the next line.",
    }


def test_public_names_have_a_page_each(reference):
    page = reference.package_page("segcompass_hf.data")
    assert page.startswith("# `segcompass_hf.data`\n") and "\n::: segcompass_hf.data.build_folder\n" in page


def test_docstrings_link_to_public_names():
    pytest.importorskip("griffe")
    public = {"Model": "package.Model"}
    text = "See [`Model`], [`~Model.segment`], [`Other`] and [`x`](y).\n\nExample:\n    >>> a['b']\n\nIt is::\n"
    assert hook("docstrings").prepared(text, public) == (
        "See [`Model`][package.Model], [`segment`][package.Model.segment], `Other` and [`x`](y).\n\n"
        "Examples:\n    >>> a['b']\n\nIt is:\n"
    )


def test_links_out_of_the_folder_lead_to_copies(tmp_path):
    links = hook("repository_files")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "table.md").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").touch()
    found = []
    text = "[a](../../benchmarks/table.md#x) [b](../../gone.md) [c](https://a.b/c) [d](#e)"
    assert links.rewritten(text, "how-to/page.md", tmp_path, found.append) == (
        "[a](../repository/benchmarks/table.md#x) [b](../../gone.md) [c](https://a.b/c) [d](#e)"
    )
    assert found == ["repository/benchmarks/table.md"]
    back = links.rewritten("[home](../docs/index.md)", "repository/benchmarks/table.md", tmp_path)
    assert back == "[home](../../index.md)"


def test_blocks_and_commands_are_found():
    text = (
        "<!-- not run: needs a GPU -->\n```python\na = 1\n```\n\n- x\n\n  ```bash\n  A=1 segcompass demo \\\n"
        "      --output x  # why\n  torchrun -m segcompass_hf.cli train R | head\n  ls\n  ```\n"
    )
    python, bash = blocks(ROOT / "x.md", text)
    assert (python.language, python.code, python.line, python.why_not_run) == ("python", "a = 1\n", 3, "needs a GPU")
    assert bash.why_not_run is None
    assert [segcompass_arguments(words) for words in command_lines(bash.code)] == [
        ["demo", "--output", "x"],
        ["train", "R"],
        None,
    ]
