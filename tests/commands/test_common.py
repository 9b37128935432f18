"""What the commands share: errors that become one line of bad input."""

import argparse
from pathlib import Path

import pytest

from segcompass_hf.commands.common import UserError, check_question, user_errors


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
