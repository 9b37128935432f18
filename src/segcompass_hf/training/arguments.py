# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Settings from a yaml file and the command line: each value of its field's type, each error with its field."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

SHOWN_NAMES = 12  # known settings that a message lists
# What numbers of transformers' settings are from and to; it checks them late or never.
_RANGES = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "seed": (0, 2**32 - 1),  # NumPy's
    "data_seed": (0, 2**32 - 1),
}


class SettingsError(ValueError):
    """Settings that cannot be used, and what to change in them."""


def read_arguments(
    *classes: type, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> Any:
    """What a training script is started with: `--config FILE.yaml`, and flags over it.

    Args:
        classes (`type`): Dataclasses of settings, such as the script's own and its trainer's.
        argv (`Sequence[str]`, *optional*): The command line's words; those of this process when left out.
        defaults (`Mapping[str, Any]`, *optional*): In place of the fields' own.

    Returns:
        `tuple`: one object of each class.

    Raises:
        SystemExit: Something in them is unknown or of another type; one line names the field and what it takes.
    """
    parser = _Parser(classes)
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings in a file, which flags override.")
    try:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        path = first.parse_known_args(argv)[0].config
        given = _of_file(Path(path), classes) if path is not None else {}
        _set_defaults(parser, {**(defaults or {}), **given})
        values = vars(parser.parse_args(argv))
        return tuple(build_settings(one, {name: values[name] for name in field_names(one)}) for one in classes)
    except SettingsError as error:
        raise SystemExit(f"error: {error}") from error


def _of_file(path: Path, classes: Sequence[type]) -> dict[str, Any]:
    content = read_yaml(path, "settings")
    check_names(content, [name for one in classes for name in field_names(one)], str(path))
    values = {}
    for one in classes:
        values |= parse_words(one, {name: content[name] for name in field_names(one) if name in content}, f"{path}:")
    return values


def _set_defaults(parser: HfArgumentParser, values: dict[str, Any]) -> None:
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Keys and values of a file; `what` it holds is said where it does not.

    Raises:
        SettingsError: There is no such file, or it is no yaml of keys and values.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the {what} {path}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date like 2026-02-31
        raise SettingsError(f"{path} is no yaml file: {error}") from error
    if not isinstance(content, dict):
        form = "a recipe is" if what == "recipe" else f"{what} are"
        raise SettingsError(f"{path} holds {type(content).__name__}; {form} keys and values, see examples/configs.")
    return content


def field_names(settings_class: type) -> tuple[str, ...]:
    """Names of a dataclass's fields that can be given."""
    return tuple(one.name for one in fields(settings_class) if one.init)


def check_names(words: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    """Refuse, with a `SettingsError`, names that are not known; says the nearest that is."""
    for name in words:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(known[:SHOWN_NAMES])}, ..."
            raise SettingsError(f"{where} has no setting {name!r}; {hint}")


def parse_words(settings_class: type, words: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by field, each of the field's type, from what yaml gave.

    Args:
        settings_class (`type`): A dataclass.
        words (`Mapping[str, Any]`): Values by name; `None` leaves a field at its default.
        where (`str`): Stands before the field's name in messages: `"warmup."`, `"FILE.yaml: "`, or nothing.

    Raises:
        SettingsError: A value is of another type; names the field and says what it takes.
    """
    parser, hints = _Parser(settings_class, allow_abbrev=False), get_type_hints(settings_class)
    actions = {action.dest: action for action in reversed(parser._actions)}
    for action in parser._actions:
        action.required = False  # values are parsed one by one
    parsed = {}
    for name, value in words.items():
        action = actions[name]
        if value is None:
            if action.default is None:
                parsed[name] = None
            continue
        try:
            parsed[name] = _parsed(parser, action, value, _kinds(hints[name]))
        except SettingsError as error:
            raise SettingsError(f"{where}{name} is {value!r:.200}; it takes {_taken(action, hints[name])}") from error
    return parsed


def _parsed(parser: HfArgumentParser, action: argparse.Action, value: Any, kinds: set[type]) -> Any:
    """One value, by the words of a command line where it is plain."""
    if value is False and "no" in (action.choices or ()):
        value = "no"  # as yaml reads the word
    if isinstance(value, dict):
        if dict not in kinds:
            raise SettingsError("keys and values")
        return {key: float(one) if _is_power(one) else one for key, one in value.items()}
    if isinstance(value, list):
        if list not in kinds or any(isinstance(one, (dict, list)) or one is None for one in value):
            raise SettingsError("a list")
        if action.nargs != "+" or not value:
            return [str(one) for one in value]
    if isinstance(value, bool) and bool not in kinds:
        raise SettingsError("true or false")
    flag = f"--{action.dest}"
    line = [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return getattr(parser.parse_args(line), action.dest)


def _is_power(value: Any) -> bool:
    """Whether it is a number like 1e-4, which yaml reads as a word."""
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) is not None


def _kinds(hint: Any) -> set[type]:
    """The plain types that an annotation admits: those of a union, lists and dicts without what they hold."""
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    return {get_origin(hint) or hint}


def _taken(action: argparse.Action, hint: Any) -> str:
    if action.choices:
        kind = "one of " + ", ".join(map(str, action.choices))
    else:
        kind = {"string_to_bool": "true or false"}.get(name := getattr(action.type, "__name__", "text"), name)
        kind = "keys and values" if dict in (kinds := _kinds(hint)) else kind
        kind = f"a list of {kind}" if action.nargs == "+" else f"{kind} or a list of them" if list in kinds else kind
    return kind if action.help is None else f"{kind}: {action.help}"


def build_settings(settings_class: type, values: Mapping[str, Any], where: str = "") -> Any:
    """An object of a settings class; what contradicts its own checks is an error that names the field.

    Args:
        settings_class (`type`): A dataclass.
        values (`Mapping[str, Any]`): By field.
        where (`str`): Stands before messages, such as `"warmup: "`.

    Raises:
        SettingsError: It cannot be made of these values.
    """
    own = {one.name: one.default for one in fields(settings_class)}
    for name, value in values.items():
        if value != own.get(name):  # not a number is no default either
            _check_number(name, value, where)
    try:
        return settings_class(**values)
    except Exception as error:  # transformers' and TRL's checks raise about anything
        message = " ".join(str(error).split())
        given = {name: value for name, value in values.items() if value != own[name]}
        if not any(re.search(rf"\b{re.escape(name)}\b", message) for name in given):
            name = next((name for name in given if _is_accepted(settings_class, values, without=name)), None)
            message = message if name is None else f"{name} is {values[name]!r:.200}: {message}"
        raise SettingsError(f"{where}{message}") from error


def _check_number(name: str, value: Any, where: str) -> None:
    """Refuse a number that transformers takes and no training can use: it would end in NaN, or never."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least, most = _RANGES.get(name, (-math.inf, math.inf))
    if not math.isfinite(value) or not least <= value <= most:
        expected = "a finite number" + (f" of {least} or more" if least == 0 else "")
        expected += f" and at most {most}" if math.isfinite(most) else ""
        raise SettingsError(f"{where}{name} is {value!r}; expected {expected}.")


def _is_accepted(settings_class: type, values: Mapping[str, Any], without: str) -> bool:
    try:
        settings_class(**{name: value for name, value in values.items() if name != without})
    except Exception:
        return False
    return True


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise SettingsError(message)


__all__ = [
    "SettingsError",
    "build_settings",
    "check_names",
    "field_names",
    "parse_words",
    "read_arguments",
    "read_yaml",
]
