"""gateway.serve: what a worker loads that takes another's place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import cast

import pytest

from gateway import serve
from gateway.access import ExportRules, Rule, Rules
from gateway.errors import SettingsError
from gateway.pki import CertificateAuthority
from gateway.places import Place
from gateway.serve import _InUse, _load_again, _load_steadily
from gateway.settings import Settings
from gateway.trust import Guards, load_trust
from gateway.workers import RELOAD, Post
from tests import tls_rig
from tests.tls_rig import Files

authority, client, files = tls_rig.authority, tls_rig.client, tls_rig.files  # the fixtures


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """What happens between the two reads."""

    def set_it(happens: Callable[[], object]) -> None:
        monkeypatch.setattr(serve.time, "sleep", lambda _: happens())

    return set_it


def test_files_that_are_being_written(
    files: Files, authority: CertificateAuthority, meanwhile: Callable[..., None]
) -> None:
    settings = Settings("/up", files.settings())
    first = load_trust(settings)
    other = CertificateAuthority.create("another CA").cert_pem
    files.put("ca-cert.pem", other)
    count = iter(range(1, 99))

    def more() -> None:
        files.put("ca-cert.pem", *[other] * next(count), authority.cert_pem)

    meanwhile(more)
    with pytest.raises(SettingsError, match="being written"):
        _load_steadily(settings, first)
    read = []
    meanwhile(lambda: read.append(1))
    assert _load_steadily(lambda: settings, first).digest != first.digest
    assert read == [1]


def test_files_are_waited_for_that_change_once_more(
    files: Files, authority: CertificateAuthority, meanwhile: Callable[..., None]
) -> None:
    """A new worker that comes up just when a certificate is renewed."""
    settings = Settings("/up", files.settings())
    first = load_trust(settings)
    other = CertificateAuthority.create("another CA").cert_pem
    files.put("ca-cert.pem", other)
    steps = iter([lambda: files.put("ca-cert.pem", other, authority.cert_pem), lambda: None])
    meanwhile(lambda: next(steps)())
    loaded = _load_steadily(settings, first)
    assert loaded.digest == load_trust(settings).digest != first.digest
    assert not list(steps)


@pytest.mark.expects_error_log
def test_files_that_are_good_again_are_said_to_be(
    files: Files, meanwhile: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """To whoever asked for a reload while nobody could enter here."""
    settings = Settings("/up", files.settings())
    first = load_trust(settings)
    in_use = _InUse(first)
    files.put("ca-cert.pem", CertificateAuthority.create("another CA").cert_pem)
    in_use.put(load_trust(settings))  # the others have gone on
    meanwhile(lambda: None)
    caplog.set_level("INFO")
    wrongs = [SettingsError("no such file")]

    def reread() -> Settings:
        if wrongs:
            raise wrongs.pop()
        return settings

    orders, supervisor = os.pipe()
    try:
        os.write(supervisor, RELOAD)
        loaded = _load_again(settings, reread, first, in_use, Post(3, cast("Place", None), orders))
    finally:
        os.close(orders)
        os.close(supervisor)
    assert loaded is not None
    assert loaded.digest != first.digest
    said = [record.getMessage() for record in caplog.records]
    assert "nobody enters here until then: no such file" in said[0]
    assert said[1:] == ["worker 3: reload: the files can be used again"]
    caplog.clear()
    assert _load_again(settings, reread, first, in_use, Post(3, cast("Place", None), -1))
    assert not caplog.records


def test_files_of_the_start_are_read_once(files: Files, meanwhile: Callable[..., None]) -> None:
    settings = Settings("/up", files.settings())
    first = load_trust(settings)

    def never() -> None:
        raise AssertionError("waited")

    meanwhile(never)
    assert _load_steadily(settings, first).digest == first.digest
    assert serve.time is time


def test_guards_of_any_set_are_remembered(files: Files) -> None:
    bare = Settings("/up", files.settings())
    table = Rules(exports=(ExportRules("a", (Rule.anybody(),)),))
    trust = load_trust(bare)
    in_use = _InUse(trust)
    assert in_use.guards == Guards(0)
    in_use.put(load_trust(Settings("/up", files.settings(), rules=table)))
    assert not in_use.still_is(trust)
    in_use.put(trust)  # by a worker that is behind
    assert in_use.still_is(trust)
    assert in_use.guards == Guards.EXPORTS
