"""What the commands share: errors that become one line of bad input."""

import argparse
import sys
from pathlib import Path

import pytest

from segcompass_hf.commands.common import UserError, check_question, print_page, show_progress, user_errors


def test_errors_become_bad_input():
    with pytest.raises(UserError, match="^it is wrong$"), user_errors():
        raise ValueError("it is wrong")
    with pytest.raises(UserError, match="^reading x: it is wrong$"), user_errors("reading x"):
        raise OSError("it is wrong")
    with pytest.raises(UserError, match="^x is wrong$"), user_errors("x"):  # said already
        raise ValueError("x is wrong")
    with pytest.raises(UserError, match="^TimeoutError$"), user_errors(kinds=(Exception,)):
        raise TimeoutError
    with pytest.raises(KeyError), user_errors():  # a mistake of ours stays one
        raise KeyError("a")


def test_question_is_checked_before_anything_is_loaded():
    def asked(instruction, output):
        return argparse.Namespace(instruction=instruction, output=output)

    check_question(asked("x", None), (".png",), "not a picture")
    check_question(asked("x", Path("A.PNG")), (".png",), "not a picture")
    with pytest.raises(UserError, match="the instruction is empty"):
        check_question(asked(" \n", None), (".png",), "not a picture")
    with pytest.raises(UserError, match="--output a.txt is not a picture."):
        check_question(asked("x", Path("a.txt")), (".png",), "not a picture")


def test_bars_are_shown_on_a_terminal_alone(monkeypatch):
    import datasets
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    try:
        for is_terminal in (False, True):
            logging.disable_progress_bar()  # as loading a checkpoint does
            datasets.enable_progress_bars()
            monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
            show_progress()
            assert logging.is_progress_bar_enabled() is is_terminal
            assert datasets.are_progress_bars_disabled() is not is_terminal
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
        (datasets.disable_progress_bars if before[1] else datasets.enable_progress_bars)()


def test_a_page_is_told_by_its_whole_address(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    print_page(Path("my out/page.html"))
    assert capsys.readouterr().out == f"page: {tmp_path.as_uri()}/my%20out/page.html\n"
