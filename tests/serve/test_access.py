"""Who may ask: keys, the anonymous mode, local names, origins, headers."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffray.serve import keys
from diffray.serve.config import Access, Guardrails, InvalidConfig, Limits, ServeConfig
from diffray.serve.service import Service, check_access

from .ask import ask, connect, heard
from .live import Live, live
from .scripted import Scripted

IMAGES = "/v1/diffray/images"
MODELS = "/v1/diffray/models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def guarded(file: Path) -> Iterator[tuple[Live, str]]:
    token = keys.add(file, "alice", images_at_once=1)
    config = ServeConfig(access=Access(keys=str(file)), log="off", host="0.0.0.0")
    with live(config, Scripted) as running:
        yield running, token


def test_no_key_wrong_key_right_key(guarded: tuple[Live, str]) -> None:
    running, token = guarded
    for path in (MODELS, "/v1/models", "/sdapi/v1/options", "/v1/engines/list"):
        assert ask(running.url + path).status == 401
        assert ask(running.url + path, authorization="Bearer dr-wrong").status == 401
        for name in ("key", "api_key", "access_token", "token", "authorization"):
            assert ask(f"{running.url}{path}?{name}={token}").status == 401  # addresses end up in logs
        assert ask(f"{running.url}{path}?key=any", authorization=f"Bearer {token}").status == 200
    refused = ask(running.url + MODELS)
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert ask(running.url + MODELS, authorization=f"Bearer {token}").status == 200
    basic = base64.b64encode(f"anyone:{token}".encode()).decode()
    assert ask(running.url + MODELS, authorization=f"Basic {basic}").status == 200
    assert ask(running.url + "/healthz").status == 200


def test_a_stranger_s_body_is_not_read(guarded: tuple[Live, str]) -> None:
    running, _ = guarded
    wire = connect(running.url)
    wire.sendall(f"POST {IMAGES} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n".encode())
    assert heard(wire, b"\r\n").startswith(b"HTTP/1.1 401 ")
    wire.close()


def test_keys_are_rotated_without_a_restart(
    guarded: tuple[Live, str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, old = guarded
    monkeypatch.setattr(keys, "CHECK_SECONDS", 0.0)
    new = keys.add(file, "alice")
    assert ask(running.url + MODELS, authorization=f"Bearer {new}").status == 200
    assert ask(running.url + MODELS, authorization=f"Bearer {old}").status == 200
    assert keys.revoke(file, "alice", but_newest=True) == 1
    assert ask(running.url + MODELS, authorization=f"Bearer {old}").status == 401
    assert ask(running.url + MODELS, authorization=f"Bearer {new}").status == 200
    file.write_text("{ broken")
    assert ask(running.url + MODELS, authorization=f"Bearer {new}").status == 200  # what was known stays


def test_the_file_has_hashes_only_and_is_private(file: Path) -> None:
    token = keys.add(file, "alice", requests="5/minute")
    assert token not in file.read_text()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    with pytest.raises(InvalidConfig):
        keys.add(file, "bob", weight=0.0)
    assert [key.id for key in keys.read(file).keys] == ["alice"]


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.VARIABLE, "first-token, second-token")
    service = Service(ServeConfig(host="0.0.0.0"), Scripted())
    found = service.keys.find("second-token")
    assert found is not None
    assert service.keys.find("third") is None
    assert "second" not in found.id


def test_open_to_all_by_mistake_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    with pytest.raises(InvalidConfig, match="diffray keys add"):
        Service(ServeConfig(host="0.0.0.0"), Scripted())
    Service(ServeConfig(host="0.0.0.0", access=Access(anonymous=True)), Scripted())
    Service(ServeConfig(host="127.0.0.1"), Scripted())
    with pytest.raises(InvalidConfig):
        Service(ServeConfig(access=Access(keys="/nowhere/keys.json")), Scripted())


@pytest.mark.parametrize("blank", ["", " ", "\n", " , ,\n"])
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_variable_without_a_key_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, host: str, blank: str
) -> None:
    monkeypatch.setenv(keys.VARIABLE, blank)
    with pytest.raises(InvalidConfig, match="holds no key"):
        Service(ServeConfig(host=host), Scripted())
    with pytest.raises(InvalidConfig, match="holds no key"):
        check_access(ServeConfig(host="0.0.0.0"))


def test_never_anonymous(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    with pytest.raises(InvalidConfig, match="anonymous is false"):
        Service(ServeConfig(access=Access(anonymous=False)), Scripted())
    token = keys.add(file, "alice")
    config = ServeConfig(access=Access(keys=str(file), anonymous=False), log="off")
    with live(config, Scripted) as running:
        assert ask(running.url + MODELS).status == 401
        assert ask(running.url + MODELS, authorization=f"Bearer {token}").status == 200


def test_limits_of_a_key_are_its_own(guarded: tuple[Live, str]) -> None:
    running, token = guarded
    answer = ask(running.url + IMAGES, {"n": 2}, authorization=f"Bearer {token}")
    assert (answer.status, answer.code) == (422, "too_many_images")


def test_anonymous_services_answer_to_local_names_only() -> None:
    with live(ServeConfig(log="off"), Scripted) as running:
        assert ask(running.url + MODELS, host="evil.example").status == 403
        assert ask(running.url + MODELS, host="127.0.0.1.evil.example").status == 403
        assert ask(running.url + MODELS, host="localhost:1234").status == 200
        assert ask(running.url + IMAGES, {"steps": 1}, origin="http://evil.example").status == 403
        own = running.url.removeprefix("http://")
        assert ask(running.url + IMAGES, {"steps": 1}, host=own, origin=running.url).status == 200


def test_cors_is_off_until_it_is_asked_for() -> None:
    asked = {"origin": "https://app.example", "access_control_request_method": "POST"}
    public: dict[str, Any] = {"host": "0.0.0.0", "log": "off"}
    with live(ServeConfig(**public, access=Access(anonymous=True)), Scripted) as running:
        answer = ask(running.url + IMAGES, method="OPTIONS", **asked)
        assert "access-control-allow-origin" not in answer.headers
    access = Access(anonymous=True, origins=("https://app.example",))
    with live(ServeConfig(**public, access=access), Scripted) as running:
        answer = ask(running.url + IMAGES, method="OPTIONS", **asked)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = ask(running.url + MODELS, origin="https://other.example")
        assert "access-control-allow-origin" not in other.headers


def test_every_answer_has_security_headers_and_an_id() -> None:
    with live(ServeConfig(log="off"), Scripted) as running:
        for path in ("/", MODELS, "/nowhere", "/healthz"):
            headers = ask(running.url + path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["x-request-id"]


def no_cats(request: object) -> str | None:
    return "no cats here" if "cat" in request.prompt else None  # type: ignore[attr-defined]


def test_guardrails_refuse_in_words(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("forbidden thing\n")
    guardrails = Guardrails(blocklist=str(words), prompt=("tests.serve.test_access:no_cats",))
    with live(ServeConfig(guardrails=guardrails, log="off"), Scripted) as running:
        for prompt in ("a Forbidden, thing!", "a cat"):
            answer = ask(running.url + IMAGES, {"prompt": prompt})
            assert (answer.status, answer.code) == (400, "content_filtered")
        assert ask(running.url + IMAGES, {"prompt": "a dog", "steps": 1}).status == 200
        openai = ask(running.url + "/v1/images/generations", {"prompt": "a cat"})
        assert (openai.status, openai.json["error"]["code"]) == (400, "content_policy_violation")
    with pytest.raises(InvalidConfig, match="nowhere"):
        Service(ServeConfig(guardrails=Guardrails(prompt=("nowhere:hook",))), Scripted())


def test_admission_is_per_key(file: Path) -> None:
    token, other = keys.add(file, "alice"), keys.add(file, "bob", requests="1/year")
    config = ServeConfig(
        access=Access(keys=str(file)), host="0.0.0.0", log="off", limits=Limits(requests_per_key="2/year")
    )
    with live(config, Scripted) as running:
        statuses = [
            ask(running.url + IMAGES, {"steps": 1}, authorization=f"Bearer {key}").status
            for key in (token, token, token, other, other)
        ]
    assert statuses == [200, 200, 429, 200, 429]
