"""`luthier serve` as typed: what it tells, how it ends, and what it does not open."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from luthier.cli.main import run
from tests.architecture.source import SOURCE

MAIN = "import sys; from luthier.cli.main import main; sys.argv[0] = 'luthier'; main()"


class Served:
    """The command in a process of its own."""

    def __init__(self, folder: Path, *more: str, token: str = "") -> None:
        path = os.pathsep.join([str(SOURCE), *(each for each in sys.path if each)])
        environment = {**os.environ, "PYTHONPATH": path, "LUTHIER_TOKEN": token, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MAIN, "serve", "seedling", "--port", "0", *more]
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment, cwd=folder)
        latest = time.monotonic() + 60
        while "curl" not in self.text:
            assert self.process.poll() is None and time.monotonic() < latest, self.text
            time.sleep(0.05)
        self.url = re.search(r"at (http\S+)", self.text)[1]  # type: ignore[index]

    @property
    def text(self) -> str:
        return self.log.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def test_threads_sleep_while_they_wait_and_torch_is_told_in_time() -> None:
    """Breaks when torch is loaded before: its threads would spin on the cores that HTTP needs."""
    script = (
        "import os, sys; from luthier.cli.main import run; code = run(['serve', 'seedling', '--precision', 'high'])\n"
        "print(code, os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    path = os.pathsep.join([str(SOURCE), *(each for each in sys.path if each)])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["2", "passive", "False"], done.stderr


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def test_it_tells_a_token_once_serves_and_drains(served: Served) -> None:
    assert served.text.count("token (told once") == 1
    token = re.search(r"choose it\): (\S+)", served.text)[1]  # type: ignore[index]
    assert len(token) >= 40
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx2.get(f"{served.url}/v1/models").status_code == 401
    body: dict[str, Any] = {"model": "seedling", "prompt": "The ship", "max_tokens": 400, "ignore_eos": True}
    with httpx2.Client(base_url=served.url, headers=headers, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "seedling"
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            first = [next(lines) for _ in range(3)]
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            with httpx2.Client(base_url=served.url, headers=headers) as other:
                answer = other.post("/v1/completions", json=body)
                assert answer.status_code == 503 and answer.headers["retry-after"]
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert first and served.process.wait(60) == 0
    assert "POST" not in served.text, "no access log that nobody asked for"


def test_what_takes_too_long_is_ended_and_ctrl_c_drains_too(tmp_path: Path) -> None:
    served = Served(tmp_path, "--drain", "0.2", "--max-new-tokens", "100000", "--access-log", token="chosen-token")
    assert "told once" not in served.text
    headers = {"Authorization": "Bearer chosen-token"}
    body = {"model": "seedling", "prompt": "The ship", "max_tokens": 450, "n": 16, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{served.url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert served.end(signal.SIGINT) == 0
    assert "POST /v1/completions" in served.text


# Valid for a hundred years, for localhost and 127.0.0.1 alone.
CERTIFICATE, KEY = (Path(__file__).parent / name for name in ("certificate.pem", "key.pem"))


def test_it_serves_over_tls_and_no_other_way(tmp_path: Path) -> None:
    """Breaks when the certificate is not used, a stream does not come through it, or plain HTTP is answered too."""
    served = Served(tmp_path, "--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY), token="chosen-token")
    try:
        assert served.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
        headers = {"Authorization": "Bearer chosen-token"}
        body = {"model": "seedling", "prompt": "The ship", "max_tokens": 4, "stream": True}
        with httpx2.Client(base_url=served.url, verify=trusted, timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "seedling"
            with client.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
                assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{served.url}/v1/models", headers=headers)  # a client that does not know the certificate
        with pytest.raises(httpx2.TransportError):
            httpx2.get(served.url.replace("https", "http") + "/v1/models", headers=headers)
        assert served.end() == 0
    finally:
        served.process.kill()
        served.process.wait()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["seedling", "--tls-cert", str(CERTIFICATE), "--tls-key", str(CERTIFICATE)], 2, "no certificate and its key"),
        (["seedling", "--listen", "0.0.0.0"], 77, "--insecure-http"),
        (["seedling", "--listen", "192.0.2.1"], 77, "TLS"),
        (["seedling", "--tls-cert", "a.pem"], 2, "both or none"),
        (["seedling", "--tls-cert", "a.pem", "--tls-key", "b.pem"], 2, "no file"),
        (["seedling", "--adapters", "nowhere"], 2, "no folder"),
        (["seedling", "--precision", "int2"], 2, "float32"),
        (["seedling", "--drafts", "65"], 2, "0 (off) to 64"),
        (["seedling", "--draft-model", "no/such/model"], 69, "no/such/model"),
        (["no/such/model"], 69, "no/such/model"),
    ],
)
def test_what_it_does_not_open(
    words: list[str], code: int, told: str, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["serve", *words, "--port", "0"]) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("token", ["short", "with a space", "ümläute-token"])
def test_a_token_that_is_none(token: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LUTHIER_TOKEN", token)
    assert run(["serve", "seedling", "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert "LUTHIER_TOKEN" in err and token not in err


def test_a_port_that_is_taken(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert run(["serve", "seedling", "--port", str(other.getsockname()[1])]) == 74
    assert "--port" in capsys.readouterr().err


def test_without_the_extra_it_says_how_to_install_it(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve", "seedling"]) == 69
    assert "luthier[serve]" in capsys.readouterr().err
