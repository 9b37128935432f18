"""Templates filled in, pages that hold everything they show, tables."""

import base64
import hashlib
import io
import json
import re

import pytest
from PIL import Image

from segcompass_hf.pages import data_address, fill_page, fill_template, markdown_table, picture_address


def test_values_are_put_in_once():
    assert fill_template("{{A}}-{{B}}-{{A}} {C}", {"A": "{{B}}", "B": "2"}) == "{{B}}-2-{{B}} {C}"
    with pytest.raises(KeyError, match="GONE"):
        fill_template("{{GONE}}", {"A": "1"})


def test_page_allows_what_is_in_it_and_its_data_end_nothing():
    data = {"text": "</script><b> {{TITLE}}"}
    values = {"TITLE": "a title", "SUMMARY": "words"}
    page = fill_page("segcompass_hf.explain", "dictionary.html", "dictionary.css", ["dictionary.js"], data, values)
    assert "<h1>Concepts of a title</h1>" in page and "<b>" not in page
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1]) == data
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#x27;", "'")
    for name in ("style", "script"):
        inline = re.search(rf"<{name}>(.*?)</{name}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    with pytest.raises(ValueError, match="not JSON compliant"):
        fill_page("segcompass_hf.explain", "dictionary.html", "dictionary.css", [], float("nan"), values)


def test_pictures_stand_in_their_address():
    picture = Image.new("RGB", (3, 2), (10, 20, 30))
    start, _, encoded = picture_address(picture, "PNG").partition(",")
    read = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert start == "data:image/png;base64" and read.size == (3, 2) and read.getpixel((2, 1)) == (10, 20, 30)
    assert data_address(b"\xff", "JPEG") == "data:image/jpeg;base64,/w=="


def test_table():
    assert markdown_table(["a", "n"], [["x|y", 1500], ["", None]]) == (
        "| a | n |\n| --- | --- |\n| x\\|y | 1500 |\n|  | None |"
    )
