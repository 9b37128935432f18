# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass serve`: what it refuses before a model is loaded."""

import socket
import sys

import pytest

from segcompass_hf import cli


def fails(capsys, *argv: str) -> str:
    """The line on stderr of a command that ends with exit code 2."""
    try:
        code = cli.main(["serve", *argv])
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api", "--share"], "--share is of the page"),
        (["--api", "--space", "folder"], "--space is of the page"),
        (["--batch-size", "4"], "--batch-size belongs to --api"),
        (["--batch-wait", "0"], "--batch-wait belongs to --api"),
        (["--forbid", "red"], "--forbid belongs to --api"),
        (["--package", "x"], "--package belongs to --space"),
        (["--api", "--package", "x"], "--package belongs to --space"),
        (["--api", "--batch-size", "0"], "'0' is not a positive number"),
        (["--api", "--batch-wait", "-1"], "'-1' is no number of milliseconds"),
        (["--api", "--batch-wait", "10001"], "they go from 0 to 10000"),
        (["--api", "--port", "0"], "'0' is not a port"),
    ],
)
def test_arguments_that_do_not_go_together(argv, message, capsys):
    assert message in fails(capsys, *argv)


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_the_api_needs_is_said_before_a_model_is_loaded(missing, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("segcompass_hf.hub.endpoint.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in {"fastapi", "uvicorn", "prometheus_client"} - {missing}:
        pytest.importorskip(name, reason=f"whether {missing} is asked for shows only where {name} is there")
    monkeypatch.setitem(sys.modules, missing, None)  # an import of it fails
    said = fails(capsys, "--api", "--model", "/nowhere/at/all")
    assert f"this needs {missing}" in said and "pip install 'segcompass_hf[serve]'" in said


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(capsys):
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason="the server needs the extra `serve`")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = fails(capsys, "--api", "--model", "/nowhere/at/all", "--port", str(taken.getsockname()[1]))
    assert "in use" in said
    assert "no checkpoint folder" in fails(capsys, "--api", "--model", "/nowhere/at/all")
