# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the endpoint reads: base64 in every spelling, and no way inside by URL."""

import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from endpoint import FAST, as_png, directly

from segcompass_hf.hub.endpoint import handler_inputs
from segcompass_hf.hub.endpoint.handler_inputs import Limits, RequestError, fetch, is_public


@pytest.mark.parametrize("way", ["lines", "a newline", "for urls", "unpadded", "data url in lines"])
def test_base64_as_tools_write_it(way):
    limits = Limits(image_bytes=3001)
    data = bytes(range(256)) * 11 + bytes(185)  # 3001 bytes: the last two groups of base64 are padding
    text = base64.b64encode(data).decode()
    sent = {
        "lines": base64.encodebytes(data).decode().replace("\n", "\r\n"),
        "a newline": text + "\n",
        "for urls": base64.urlsafe_b64encode(data).decode(),
        "unpadded": text.rstrip("="),
        "data url in lines": "data:image/png;base64," + base64.encodebytes(data).decode(),
    }[way]
    assert sent != text and len(text) - len(text.rstrip("=")) == 2
    assert handler_inputs._decode_base64(sent, limits) == data
    with pytest.raises(RequestError, match="at most 1000 are read") as caught:
        handler_inputs._decode_base64(sent, Limits(image_bytes=1000))
    assert caught.value.status == 413


class TestAddresses:
    @pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
    def test_public(self, address):
        assert is_public(address)

    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
        + ["224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "168.63.129.16", "::1", "::", "fe80::1%eth0"]
        + ["fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1"]
        + ["64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1"],
    )
    def test_inside(self, address):
        assert not is_public(address)

    @pytest.mark.parametrize(
        "url,message",
        [
            ("http://127.0.0.1/a.png", "not on the public internet"),
            ("http://localhost/a.png", "not on the public internet"),
            ("http://2130706433/", "not on the public internet"),  # 127.0.0.1 as one number
            ("http://0x7f.1/", "not on the public internet"),
            ("http://0177.0.0.1/", "not on the public internet"),
            ("http://[::1]/", "not on the public internet"),
            ("http://[::ffff:169.254.169.254]/", "not on the public internet"),
            ("http://user:pw@example.com/", "without user name"),
            ("http://example.com:22/", "names port 22"),
            ("http://example.com:99999/", "cannot be read"),
            ("http:///a.png", "a URL is http"),
            ("http://[::1/", "cannot be read"),
            ("http://a..b/", "cannot be"),
        ],
    )
    def test_urls_that_lead_inside(self, url, message):
        with pytest.raises(RequestError, match=message) as caught:
            fetch(url, Limits())
        assert caught.value.status == 400

    def test_all_addresses_of_a_name_count(self, monkeypatch):
        two = [(2, 1, 6, "", ("93.184.215.14", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: two)
        with pytest.raises(RequestError, match="not on the public internet"):
            fetch("http://example.com/", Limits())

    def test_connects_to_the_address_that_was_checked(self, monkeypatch):
        """A name that stands for another address at its second look-up is looked up once."""
        answers = iter(["93.184.215.14", "127.0.0.1"])
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", (next(answers), 80))])
        connected = []

        def connect(address, timeout):
            connected.append(address)
            raise OSError

        monkeypatch.setattr(socket, "create_connection", connect)
        with pytest.raises(RequestError, match="cannot be read"):
            fetch("http://example.com/", Limits())
        assert connected == [("93.184.215.14", 80)]


class _Site(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path[4:])
            self.end_headers()
        elif path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        elif path in ("/a.png", "/large"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.image if path == "/a.png" else b"x" * 3_000_000)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(rows, monkeypatch):
    """A web site on loopback, under the public-looking name `site.example`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.image, server.daemon_threads, server.handle_error = as_png(rows[0]["image"]), True, lambda *a: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = handler_inputs.resolve
    monkeypatch.setattr(
        handler_inputs, "resolve", lambda host, port: "127.0.0.1" if host == "site.example" else real(host, port)
    )
    yield f"http://site.example:{server.server_port}", Limits(ports=(80, server.server_port), image_bytes=2_000_000)
    server.shutdown()


class TestFetching:
    def test_an_image_and_a_redirect_to_it(self, site, handler, rows, monkeypatch):
        url, limits = site
        monkeypatch.setattr(handler, "limits", limits)
        for path in ("/a.png", "/to//a.png"):
            sample = {"image": url + path, "instruction": rows[0]["instruction"]}
            assert handler({"inputs": sample, "parameters": FAST}) == directly(handler, rows[0])

    @pytest.mark.parametrize(
        "path,status,message",
        [
            ("/to/http://127.0.0.1/", 400, "not on the public internet"),
            ("/to/http://[::1]:80/", 400, "not on the public internet"),
            ("/to/file:///etc/passwd", 400, "a URL is http"),
            ("/to//to//to//to//a.png", 400, "redirects more than 3 times"),
            *((f"/to/http://{host}/a.png", 400, "cannot be read") for host in ("[::1", "[x]", "a:b", "a:99999")),
            ("/to///[/a.png", 400, "cannot be read"),
            ("/nothing", 400, "status 404"),
            ("/large", 413, "more than 2000000 bytes"),
        ],
    )
    def test_refused(self, site, path, status, message):
        with pytest.raises(RequestError, match=message) as caught:
            fetch(site[0] + path, site[1])
        assert caught.value.status == status

    def test_one_byte_at_a_time(self, site):
        url, limits = site
        limits.fetch_seconds, start = 0.5, time.monotonic()
        with pytest.raises(RequestError, match="took more than 0.5 seconds"):
            fetch(url + "/drip", limits)
        assert time.monotonic() - start < 5
