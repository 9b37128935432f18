# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings of training scripts from yaml and flags: types arrive, and what is wrong is said by its field."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from segcompass_hf.training.arguments import SettingsError, build_settings, parse_words, read_arguments


@dataclass
class Own:
    folder: str = field(metadata={"help": "Of pictures."})
    count: int = field(default=3, metadata={"help": "Of rows."})
    share: float = 0.5
    choice: Literal["one", "two"] = "one"
    names: list[str] | None = field(default=None, metadata={"help": "Of columns."})
    factors: dict[str, Any] | str | None = None
    keep: bool = False
    strategy: SaveStrategy = SaveStrategy.STEPS

    def __post_init__(self):
        if self.share > 1:
            raise ValueError("expected at most 1.")
        if self.count < 0:
            raise ValueError("count cannot be negative.")


def read(tmp_path, text, *flags):
    (tmp_path / "settings.yaml").write_text(text)
    return read_arguments(Own, argv=["--config", str(tmp_path / "settings.yaml"), *flags])[0]


def test_values_have_the_type_of_their_field_and_flags_override_the_file(tmp_path):
    own = read(
        tmp_path,
        "folder: a\ncount: 5\nshare: 1e-3\nnames: [x, y]\nfactors: {a: 1e-4, b: c}\nkeep: true\nstrategy: no\n",
        "--count=7",
        "--choice",
        "two",
    )
    assert (own.folder, own.count, own.share, own.choice, own.keep) == ("a", 7, 1e-3, "two", True)
    assert (own.names, own.factors, own.strategy) == (
        ["x", "y"],
        {"a": 1e-4, "b": "c"},
        "no",
    )  # yaml reads no as false
    assert read(tmp_path, "folder: a\ncount: null\nnames: []\n") == Own("a", names=[])
    assert read_arguments(Own, argv=["--folder", "b"], defaults={"count": 9})[0] == Own("b", count=9)
    first, second = read_arguments(Own, TrainingArguments, argv=["--folder=b", "--output_dir=o", "--use_cpu"])
    assert (first.folder, second.output_dir, second.use_cpu) == ("b", "o", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: ten", "count is 'ten'; it takes int: Of rows."),
        ("count: 1.5", "count is 1.5; it takes int"),
        ("count: [1, 2]", r"count is \[1, 2\]; it takes int"),
        ("count: {a: 1}", "count is {'a': 1}; it takes int"),
        ("count: true", "count is True; it takes int"),
        ("share: x", "share is 'x'; it takes float"),
        ("folder: [a, b]", r"folder is \['a', 'b'\]; it takes str: Of pictures."),
        ("folder: {a: 1}", "folder is {'a': 1}; it takes str"),
        ("folder: yes", "folder is True; it takes str"),
        ("choice: three", "choice is 'three'; it takes one of one, two"),
        ("names: {a: 1}", "names is {'a': 1}; it takes a list of str: Of columns."),
        ("names: [[a]]", r"names is \[\['a'\]\]; it takes a list of str"),
        ("factors: [a]", r"factors is \['a'\]; it takes keys and values"),
        ("keep: perhaps", "keep is 'perhaps'; it takes true or false"),
        ("strategy: often", "strategy is 'often'; it takes one of no, steps, epoch, best"),
        ("share: 2", "share is 2.0: expected at most 1."),  # its own check does not name the field
        ("count: -1", "^error: count cannot be negative"),
        ("cont: 1", "settings.yaml has no setting 'cont'; did you mean count"),
        ("- a", "settings.yaml holds list; settings are keys and values"),
        ("a: [", "settings.yaml is no yaml file"),
        ("count: 2026-02-31", "settings.yaml is no yaml file"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(SystemExit, match=message) as error:
        read(tmp_path, text, *(() if "folder" in text else ("--folder", "a")))
    assert str(error.value).startswith("error: ")


def test_flags_and_files_that_are_missing(tmp_path):
    for flags, message in (
        (["--config", str(tmp_path / "nowhere.yaml")], "cannot read the settings .*nowhere.yaml"),
        (["--folder", "a", "--count", "ten"], "argument --count: invalid int value: 'ten'"),
        ([], "required: --folder"),
        (["--folder", "a", "--cout", "1"], "unrecognized arguments: --cout"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            read_arguments(Own, argv=flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", "many"),
        ("learning_rate", True),
        ("logging_steps", [1]),
        ("eval_strategy", "sometimes"),
        ("save_strategy", 5),
        ("optim", {"a": 1}),
        ("report_to", {"a": 1}),
        ("report_to", [["none"]]),
        ("accelerator_config", {"unknown": 1}),
        ("lr_scheduler_kwargs", [1]),
        ("lr_scheduler_type", "bent"),
        ("warmup_steps", "soon"),
        ("deepspeed", 3),
    ],
)
def test_fields_of_transformers_are_named_too(name, value):
    with pytest.raises(SettingsError, match=name):
        build_settings(
            TrainingArguments, parse_words(TrainingArguments, {"output_dir": "o", "use_cpu": True, name: value}, "")
        )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", float("nan"), "a finite number of 0 or more"),
        ("learning_rate", -1.0, "a finite number of 0 or more"),
        ("num_train_epochs", float("inf"), "a finite number of 0 or more"),
        ("num_train_epochs", -1.0, "a finite number of 0 or more"),
        ("weight_decay", -0.1, "a finite number of 0 or more"),
        ("seed", -1, "a finite number of 0 or more and at most 4294967295"),
        ("seed", 2**32, "a finite number of 0 or more and at most 4294967295"),
        ("adam_epsilon", float("nan"), "a finite number"),
    ],
)
def test_numbers_with_which_no_training_can_be_are_named(tmp_path, name, value, expected):
    with pytest.raises(SettingsError, match=rf"^warmup: {name} is .*; expected {expected}\.$"):
        build_settings(TrainingArguments, {"output_dir": str(tmp_path), name: value}, "warmup: ")


def test_usual_numbers_pass(tmp_path):
    usual = {"learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 0.5, "seed": 2**32 - 1, "max_grad_norm": 0.0}
    settings = build_settings(TrainingArguments, {"output_dir": str(tmp_path), "use_cpu": True, **usual})
    assert {name: getattr(settings, name) for name in usual} == usual
