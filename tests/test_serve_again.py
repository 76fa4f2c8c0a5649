"""gateway.serve: what a worker loads that takes another's place."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gateway import serve
from gateway.access import ExportRules, Rule, Rules
from gateway.errors import SettingsError
from gateway.pki import CertificateAuthority
from gateway.serve import _InUse, _load_steadily
from gateway.settings import Settings
from gateway.trust import Guards, load_trust
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
    meanwhile(lambda: files.put("ca-cert.pem", other, authority.cert_pem))
    with pytest.raises(SettingsError, match="being written"):
        _load_steadily(settings, first)
    read = []
    meanwhile(lambda: read.append(1))
    assert _load_steadily(lambda: settings, first).digest != first.digest
    assert read == [1]


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
