# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What must not be published is found where it stands, and ordinary words are left alone."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from segcompass_hf.private_text import check_file, check_inside, check_publishable, private_places, without_folders

TOKEN = "hf_" + "aB3" * 11  # 33 letters and digits, as the Hub's tokens have about


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (f"login with {TOKEN}", "a Hugging Face token"),
        ("push: ghp_" + "x1" * 18, "a GitHub token"),
        ("x github_pat_" + "x1" * 18, "a GitHub token"),
        ("x sk-proj-" + "x1" * 20, "an API key"),
        ("AKIAIOSFODNN7EXAMPLE", "an AWS key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("git+https://me:s3cret@example.org/x", "a password in an address"),
        ("Authorization: Bearer abcdefghijkl", "an authorization header"),
        ('"wandb_api_key": "0123456789abcdef"', "a key or password"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "a key or password"),
        ("password: hunter2", "a key or password"),
        ("DB_PASS=hunter2222", "a key or password"),
        ("pwd: 'xxhunter2'", "a key or password"),
        ("SECRET_TOKEN=abc123abc123", "a key or password"),
        ('"access_key": "0123456789abcdef"', "a key or password"),
        ("AccountKey=abcdefghijklmnop0123456789==", "a key or password"),
        ('token = "abcdefgh.ijklmnop.token"', "a key or password"),
        ("https://x.example.org/c?sv=1&sig=abc%2Fdefghijklmnopqrs%3D", "a signed address"),
        ("https://b.example.org/x?X-Amz-Signature=0123456789abcdef0123", "a signed address"),
        ("data: /home/me/photos", "a folder of this machine ('/home/me')"),
        ("--dataset coco:/Users/me/a.json:x", "a folder of this machine ('/Users/me')"),
        ("see file:///root/notes", "a folder of this machine ('file:///root/notes')"),
        ("/mnt/disk1/x", "a folder of this machine ('/mnt/disk1')"),
        (r"C:\Users\me\x", r"a folder of this machine ('C:\\Users\\me')"),
    ],
)
def test_private_places_are_found_with_their_line(line, kind):
    found = list(private_places(f"first\n{line}\nlast"))
    assert [number for number, _ in found] == [2] and found[0][1].startswith(kind)


@pytest.mark.parametrize(
    "line",
    [
        "https://huggingface.co/home/me/data/x and http://localhost:8080/data/x",
        "docs/home/me, and/or nothing, 3/4, </think>, ~/x",
        '"image_token": "<image>", "bos_token": "<s>", "use_auth_token": true, "hub_token": null',
        'token = os.environ["HF_TOKEN"]; api_key=self.key; auth_token=read_token(x); password: $PASSWORD',
        "HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxx or hf_... , api_key: YOUR_API_KEY, password: your-password, pwd: ******",
        "push(hub_token=config.hub_token, api_key = settings.key, use_auth_token=use_auth_token, hf_token=hf_token)",
        "sk-learn-based-segmentation-model, task-sk-abcdefghijklmnopqrs, a bypass=complete, ?sig=1",
        "call hf_hub_download; 12 tokens: many; user@example.org: mail",
        "data:image/png;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/data/xyz",
    ],
)
def test_ordinary_words_are_left_alone(line):
    assert list(private_places(line)) == []


def test_the_home_of_who_runs_this_counts_wherever_it_is(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/people/of/ours/me"))
    assert list(private_places("x: /people/of/ours/me/runs")) == [
        (1, "a folder of this machine ('/people/of/ours/me')")
    ]


def test_messages_show_too_little_of_a_secret_to_use_it():
    with pytest.raises(ValueError, match="notes, line 2, holds what looks like a Hugging Face token") as raised:
        check_publishable("notes", f"a\n{TOKEN}")
    assert TOKEN not in str(raised.value) and TOKEN[:6] in str(raised.value)


class TestFiles:
    def refused(self, path, message):
        with pytest.raises(ValueError, match=message):
            check_file(path)

    def test_json_is_also_read_for_what_it_means(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"a": [{"b": "x"}]}))
        check_file(path)
        path.write_text('{"a": {"where": "\\u002fhome\\u002fme"}}')  # no such text in the file itself
        self.refused(path, r"config.json, a, where, line 1, .*'/home/me'")
        path.write_text("{")
        self.refused(path, "config.json is no JSON")
        path.write_bytes(TOKEN.encode("utf-16"))
        self.refused(path, "config.json is no UTF-8 text")

    def test_vocabularies_may_hold_folders_but_no_keys(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_text('{"vocab": {"/home/user": 7}}')
        check_file(path)
        path.write_text(TOKEN)
        self.refused(path, "tokenizer.json, line 1, .*Hugging Face token")

    def test_headers_of_weights(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"a": np.zeros(1, np.float32)}, path, metadata={"made in": "/home/me"})
        self.refused(path, "the header of model.safetensors, made in, line 1, .*/home/me")
        path.write_bytes(b"\x08")
        self.refused(path, "model.safetensors cannot be read")

    def test_tables(self, tmp_path):
        path = tmp_path / "a.parquet"
        words = [f"w{n}" for n in range(4)]
        nested = [{"path": word, "bytes": b"/home/me"} for word in words]  # bytes of a picture are no text
        pq.write_table(pa.table({"instruction": words, "image": nested}), path, row_group_size=2)
        check_file(path)
        told = ["is it in /home/me?", *words[1:]]
        pq.write_table(pa.table({"instruction": told}), path)  # people may speak of folders
        check_file(path)
        nested[3]["path"] = "/home/me/a.png"
        pq.write_table(pa.table({"instruction": words, "image": nested}), path, row_group_size=2)
        self.refused(path, "a.parquet, column image.path, row group 1, line 2, .*/home/me")
        pq.write_table(pa.table({"words": [[{"word": "a"}], [], [{"word": TOKEN}]]}), path)
        self.refused(path, "column words.list.element.word, row group 0, .*Hugging Face token")
        pq.write_table(pa.table({"a": ["x"]}).replace_schema_metadata({"from": "/home/me"}), path)
        self.refused(path, "the header of a.parquet, .*/home/me")
        path.write_bytes(path.read_bytes()[:-20])
        self.refused(path, "a.parquet is no Parquet file that can be read")


def test_links_out_of_a_folder_are_refused(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a")
    (tmp_path / "private").write_text("b")
    (folder / "inside").symlink_to("a")
    (folder / "out").symlink_to("../private")
    (folder / "loop").symlink_to("loop")
    (folder / "away").symlink_to(tmp_path)
    (tmp_path / "named").symlink_to(folder)
    for name in ("a", "inside", "loop"):
        check_inside(folder / name, folder)
    check_inside(tmp_path / "named" / "a", tmp_path / "named")  # the folder itself may be a link
    for name in ("out", "away/private"):
        with pytest.raises(ValueError, match=f"^'{re.escape(name)}' is a link out of"):
            check_inside(folder / name, folder)


def test_snapshots_of_the_hubs_cache_are_links_into_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text("{}")
    (tmp_path / "models--a--b" / "private").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "README.md").symlink_to("../../private")
    check_inside(snapshot / "config.json", snapshot)
    with pytest.raises(ValueError, match="README.md' is a link out of"):
        check_inside(snapshot / "README.md", snapshot)


def test_folders_are_taken_out_of_commands():
    command = "segcompass evaluate --dataset coco:/home/me/a.json:/home/me/images --model '/home/me/my runs/x'"
    assert without_folders(command) == "segcompass evaluate --dataset coco:a.json:images --model 'x'"


def test_folders_are_taken_out_of_reports():
    assert without_folders({"a": ["there is no file '/home/me/my pictures/x.png'."]}) == {
        "a": ["there is no file 'x.png'."]
    }
    assert without_folders("/data/coco/a.jpg: bad") == "a.jpg: bad"
    assert without_folders(r"no 'C:\Users\me\x.png'") == "no 'x.png'"
    kept = "images/x.png is 3/4 of it, https://example.org/a/b, and/or nothing"
    assert without_folders(kept) == kept
    assert without_folders(7) == 7
