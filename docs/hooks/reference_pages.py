# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Pages that are made of the code when the site is built: Python names, commands with their flags, settings."""

from __future__ import annotations

import argparse
import dataclasses
import html
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

# Page -> the package whose public names it lists.
PACKAGES = {
    "model": "segcompass_hf",
    "data": "segcompass_hf.data",
    "training": "segcompass_hf.training",
    "metrics": "segcompass_hf.metrics",
    "evaluation": "segcompass_hf.evaluation",
    "bulk": "segcompass_hf.bulk",
    "explain": "segcompass_hf.explain",
    "hub": "segcompass_hf.hub",
}
# Heading -> the classes of its table of settings, and what they are for.
SETTINGS = {
    "Recipe": ("segcompass_hf.training.recipe.settings:RecipeSettings", "Keys of a recipe beside its stages."),
    "Stage of a recipe": (
        "segcompass_hf.training.recipe.settings:StageSettings",
        "Keys of every stage, beside those of its own trainer below.",
    ),
    "warmup": ("segcompass_hf.training:WarmupConfig", "Stage `warmup` of a recipe, and `examples/train_warmup.py`."),
    "sae": ("segcompass_hf.training:SaeTrainingConfig", "Stage `sae` of a recipe, and `examples/train_sae.py`."),
    "segmentation": (
        "segcompass_hf.training:SegmentationConfig",
        "Stage `segmentation` of a recipe, and `examples/train_segmentation.py`.",
    ),
    "grpo": ("segcompass_hf.training:SegCompassGRPOConfig", "Stage `grpo` of a recipe, and `examples/train_grpo.py`."),
    "Model": ("segcompass_hf:SegCompassConfig", "`config.json` of a checkpoint, and `config:` of a recipe."),
    "SAE of a model": ("segcompass_hf:SegCompassSaeConfig", "`sae_config` of a checkpoint."),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    pages = {f"reference/api/{page}.md": package_page(package) for page, package in PACKAGES.items()}
    pages |= {"reference/cli.md": commands_page(), "reference/configs.md": settings_page()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


# Python names


def package_page(package: str) -> str:
    """What a package is for, then each of its public names."""
    module = importlib.import_module(package)
    text = f"# `{package}`\n\n" + re.sub(r"::$", ":", inspect.getdoc(module), flags=re.M) + "\n"
    return text + "".join(f"\n::: {package}.{name}\n" for name in module.__all__)


# Commands


def commands_page() -> str:
    """Every command with its flags, as `--help` shows them."""
    from segcompass_hf.cli import _parser

    text = "# Command line\n\n`segcompass COMMAND --help` prints what stands here.\n"
    for name, summary, parser in commands(_parser()):
        parser.formatter_class = argparse.HelpFormatter
        usage = parser.format_usage().replace("usage: ", "", 1).replace("\n       ", "\n")
        text += f"\n## `{name}`\n\n{_cell(summary[:1].upper() + summary[1:])}.\n\n```text\n{usage.rstrip()}\n```\n"
        text += _table(["argument", "meaning"], _arguments(parser))
        for note in (parser.description, parser.epilog):
            text += f"\n```text\n{inspect.cleandoc(note)}\n```\n" if note else ""
    return text


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, summary and parser of every command that does something, those of groups of commands included."""
    for group in parser._actions:
        if isinstance(group, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in group._choices_actions}
            for name, command in group.choices.items():
                inner = list(commands(command))
                yield from inner or [(command.prog, summaries.get(name, ""), command)]


def _arguments(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = formatter._format_action_invocation(action)
        if action.choices and not action.option_strings:
            name = action.metavar or action.dest
        yield [f"<code>{_cell(name)}</code>", _cell(formatter._expand_help(action) if action.help else "")]


# Settings


def settings_page() -> str:
    """Every field of every configuration: its type, what it is when left out, and what it means."""
    text = "# Settings\n\nFields that our trainers inherit from transformers and TRL stand folded below their own.\n"
    for heading, (path, purpose) in SETTINGS.items():
        module, _, name = path.partition(":")
        described = getattr(importlib.import_module(module), name)
        text += f"\n## {heading}\n\n`{name}`. {purpose}\n"
        own, inherited = settings(described)
        text += _table(["field", "type", "default", "meaning"], own)
        if inherited:
            rows = _table(["field", "type", "default", "meaning"], inherited).replace("\n", "\n    ")
            text += f'\n??? note "{len(inherited)} inherited fields"\n{rows}\n'
    return text


def settings(described: type) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the fields that this package defines or changes, and of those that it inherits.

    Args:
        described (`type`): A dataclass.
    """
    own, inherited = [], []
    annotated = {name: cls for cls in reversed(described.__mro__) for name in inspect.get_annotations(cls)}
    meanings = {}
    for cls in reversed(described.__mro__):
        meanings |= documented_fields(cls) if _is_ours(cls) else {}
    for field in dataclasses.fields(described):
        meaning = meanings.get(field.name) or _first_sentence(field.metadata.get("help", ""))
        kind = inspect.get_annotations(annotated[field.name])[field.name]
        row = [f"`{field.name}`", f"<code>{_cell(_type(kind))}</code>", f"<code>{_cell(_default(field))}</code>"]
        if _is_ours(annotated[field.name]):
            own.append([*row, _cell(meaning)])
        elif meaning:  # what every configuration of transformers has says nothing of itself
            inherited.append([*row, _cell(meaning)])
    return own, inherited


def documented_fields(cls: type) -> dict[str, str]:
    """Field -> what `Args:` of a docstring in Hugging Face's form says of it."""
    _, _, listed = (inspect.getdoc(cls) if cls.__doc__ else "").partition("Args:\n")
    listed = re.split(r"\n(?=\S)", listed)[0]  # up to the next section
    found = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + listed):
        head = re.match(r" {4}(\w+(?:, \w+)*)(?: \(.*?\))?:\s+(?=\S)", entry, re.S)
        if head:
            found |= dict.fromkeys(head[1].split(", "), " ".join(entry[head.end() :].split()))
    return found


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("segcompass_hf")


def _type(kind: Any) -> str:
    return kind if isinstance(kind, str) else inspect.formatannotation(kind).replace("typing.", "")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0]


def _cell(text: str) -> str:
    """Text that stands in a table as it is, but for code between backticks."""
    text = re.sub(r"\[(`~?[\w.]+`)\]", r"\1", " ".join(text.split()))
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else html.escape(p, quote=False) for p in parts).replace("|", "\\|")


def _table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) if len(lines) > 2 else ""
