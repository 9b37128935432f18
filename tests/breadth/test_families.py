# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Every VLM family does what docs/reference/backbones.md says of it; one that works today never breaks unseen."""

import pytest
import transformers
from breadth.families import FAMILIES
from breadth.record import DOCS, differences, load, missing_packages, outcomes_in, page
from breadth.steps import outcomes_of
from breadth.trial import Outcome

QUICK = ("idefics3", "internvl", "paligemma")  # tiles, a processor with a video part, bidirectional prompts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_family(name):
    record, family = load(), FAMILIES[name]
    if transformers.__version__.split(".")[:2] != record["transformers"].split(".")[:2]:
        pytest.skip(f"recorded with transformers {record['transformers']}, this is {transformers.__version__}")
    if missing := missing_packages(family):
        pytest.skip(f"{name} needs {', '.join(missing)}; `make test-breadth` has it")
    worse, other = differences(outcomes_in(record, name), outcomes_of(name, family))
    told = "\n  ".join([*worse, *other])
    assert not worse, f"{name} went worse:\n  {told}"
    assert not other, (
        f"{name} changed; look, then `python tests/breadth/report.py {name}` renews the record:\n  {told}"
    )


def test_the_page_is_made_of_the_record():
    renew = "renew docs/reference/backbones.md: python tests/breadth/report.py llava"
    assert DOCS.read_text("utf-8") == page(load()), renew


def test_the_record_knows_every_family():
    assert list(load()["families"]) == list(FAMILIES)


def test_differences():
    passed, failed = Outcome("passed"), Outcome("failed", "why")
    known = {"a": passed, "b": failed, "c": Outcome("noise"), "d": passed, "e": passed}
    found = {"a": failed, "b": passed, "c": passed, "d": Outcome("noise"), "e": passed}
    worse, other = differences(known, found)
    assert worse == ["a: passed -> failed (why)", "d: passed -> noise"]
    assert other == ["b: failed -> passed"]
