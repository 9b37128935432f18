# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's private methods: the installed version has what joint training overrides, and another is refused by name."""

import inspect

import pytest
from places import ROOT

pytest.importorskip("trl")

import trl  # noqa: E402
from transformers import Trainer  # noqa: E402

from segcompass_hf.training import SegCompassGRPOTrainer  # noqa: E402
from segcompass_hf.training.grpo.private_methods import METHODS, TRL_VERSIONS, check_trl  # noqa: E402


def test_the_installed_version_fits():
    check_trl()


def test_versions_are_those_of_the_package():
    assert f'"{TRL_VERSIONS}"' in (ROOT / "setup.py").read_text()


def test_a_changed_method_is_named_with_the_versions_to_install(monkeypatch):
    def _calculate_rewards(self, rows, prompts, completions):
        """As another version might have it."""

    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", _calculate_rewards)
    with pytest.raises(
        ImportError, match=r"GRPOTrainer._calculate_rewards\(self, inputs, .*takes \(self, rows, .*"
    ) as error:
        check_trl()
    assert str(error.value).endswith(f"install {TRL_VERSIONS}.")


def test_a_missing_function_is_named(monkeypatch):
    monkeypatch.delattr(trl.trainer.utils, "split_tensor_dict")
    with pytest.raises(ImportError, match="split_tensor_dict.*is missing; install"):
        check_trl()


def test_every_private_method_that_is_overridden_is_compared():
    """What the trainer and its mixins define under a name that is TRL's alone takes what the table says."""
    of_trl = {name for name in vars(trl.GRPOTrainer) if name.startswith("_") and not hasattr(Trainer, name)}
    for cls in SegCompassGRPOTrainer.__mro__:
        if cls.__module__.startswith("segcompass_hf."):
            for name in of_trl & set(vars(cls)) - {"_name", "_tag_names"}:
                assert name in METHODS, f"{cls.__name__}.{name}"
                assert tuple(inspect.signature(vars(cls)[name]).parameters)[: len(METHODS[name])] == METHODS[name]
