# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What is known of every family: `record.json` for the test, and docs/reference/backbones.md for readers."""

import importlib.util
import json
from pathlib import Path

import transformers

from .building import Family
from .families import FAMILIES
from .steps import STEPS
from .trial import Outcome

ROOT = Path(__file__).resolve().parents[3]
RECORD = ROOT / "tests" / "breadth" / "record.json"
DOCS = ROOT / "docs" / "reference" / "backbones.md"
SYMBOLS = {"passed": "+", "noise": "~", "failed": "-", "not reached": ".", "not comparable": "n"}
GOOD = ("passed", "noise", "not comparable")
INTRODUCTION = """# Which VLMs work

SegCompass takes any VLM of transformers whose language model writes its answer after the picture. This page says
which architectures were tried and what came of them. Each was built tiny, with random weights, and taken on a CPU
through every step from its processor to a training step. No real checkpoint was run: that a family passes says that
shapes, positions, padding, caches and gradients are right, not how well it segments.

"""
LEGEND = """
## Every family and step

`+` passed, `~` passed but for rounding between 1e-4 and 5e-4, `n` there is nothing to compare with, `-` failed, `.`
not reached because a step before it failed. Environment: `plain` is the package's own, without torchvision;
`torchvision` and `timm` name what the family's image processor or vision tower needs besides.

"""


def missing_packages(family: Family) -> list[str]:
    """Packages without which the family cannot be built here."""
    return [package for package in family.needs if importlib.util.find_spec(package) is None]


def load() -> dict:
    """The record: `{"transformers": version, "families": {name: {step: [kind, reason]}}}`."""
    return json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {"families": {}}


def outcomes_in(record: dict, name: str) -> dict[str, Outcome]:
    return {step: Outcome(*fields) for step, fields in record["families"].get(name, {}).items()}


def save(found: dict[str, dict[str, Outcome]]) -> None:
    """Renew the families of `found` in the record, and the page."""
    record = load()
    record["transformers"] = transformers.__version__
    families = record["families"] | {
        name: {step: list(o) for step, o in steps.items()} for name, steps in found.items()
    }
    record["families"] = {name: families[name] for name in FAMILIES if name in families}
    lines = ['{\n "transformers": ' + json.dumps(record["transformers"]) + ',\n "families": {']
    for name, steps in record["families"].items():
        fields = ",\n".join(f"   {json.dumps(step)}: {json.dumps(outcome)}" for step, outcome in steps.items())
        lines.append(f'  "{name}": {{\n{fields}\n  }}' + ("," if name != list(record["families"])[-1] else ""))
    RECORD.write_text("\n".join(lines) + "\n }\n}\n", "utf-8")
    DOCS.write_text(page(record), "utf-8")


def differences(known: dict[str, Outcome], found: dict[str, Outcome]) -> tuple[list[str], list[str]]:
    """Steps that went worse than the record says, and steps that went otherwise.

    Rounding may come and go with the machine: what is recorded as noise may pass.
    """
    worse, other = [], []
    for step, outcome in found.items():
        before = known.get(step, Outcome("not reached", "not in the record"))
        if outcome.kind == before.kind or (before.kind, outcome.kind) == ("noise", "passed"):
            continue
        told = f"{step}: {before.kind} -> {outcome.kind}" + (f" ({outcome.reason})" if outcome.reason else "")
        (worse if before.kind in GOOD and outcome.kind not in GOOD or outcome.kind == "noise" else other).append(told)
    return worse, other


def page(record: dict) -> str:
    """docs/reference/backbones.md."""
    tried = {name: outcomes_in(record, name) for name in FAMILIES if name in record["families"]}
    failed = {name: [step for step in STEPS if steps[step].kind == "failed"] for name, steps in tried.items()}
    whole = [name for name in tried if not failed[name]]
    unexplained = [name for name in tried if failed[name] == ["explain"]]
    rest = [name for name in tried if name not in (*whole, *unexplained)]
    text = INTRODUCTION
    text += f"Of {len(tried)} architectures {len(whole)} pass every step"
    text += f", {len(unexplained)} every step but `explain`" if unexplained else ""
    text += f" and {len(rest)} do not work, or only in part (transformers {record['transformers']}).\n"
    text += "\n## They work\n\n" + _names(whole) + "\n"
    if unexplained:
        text += "\n## They work, but their answers cannot be explained\n\n" + _names(unexplained) + "\n"
    text += "\n## They do not work, or only in part\n\n"
    for name in rest:
        note = FAMILIES[name].note
        steps = ", ".join(f"`{step}`" for step in failed[name])
        text += f"- **{name}** ({steps}): {note or _reason(tried[name][failed[name][0]])}\n"
    text += LEGEND + "| family | environment | " + " | ".join(STEPS) + " |\n"
    text += "|" + "---|" * (len(STEPS) + 2) + "\n"
    for name, steps in tried.items():
        cells = [SYMBOLS[steps[step].kind] for step in STEPS]
        text += f"| {name} | {', '.join(FAMILIES[name].needs) or 'plain'} | " + " | ".join(cells) + " |\n"
    text += "\nThe steps:\n\n" + "".join(f"- `{name}`: {step.meaning}\n" for name, step in STEPS.items())
    text += "\n## What failed, as it was said\n\n"
    for name, steps in tried.items():
        for step, outcome in steps.items():
            if outcome.reason:
                text += f"- {name}, `{step}` ({outcome.kind}): {_reason(outcome)}\n"
    text += "\n## How this page is made\n\n"
    text += (
        "`make backbones` builds an environment with torchvision, timm and num2words, tries every family and writes\n"
    )
    text += (
        "this page; `make test-breadth` checks there that nothing changed. `make slow` checks the families that need\n"
    )
    text += (
        "no torchvision, in the package's own environment. One family alone: `python tests/breadth/report.py llava`.\n"
    )
    return text


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + "."


def _reason(outcome: Outcome) -> str:
    return outcome.reason.replace("<", "\\<").replace("|", "\\|").replace("*", "\\*")
