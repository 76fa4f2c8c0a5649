"""The file of pre-shared keys, on every Python, and what those say that cannot use it."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import psk
from gateway.errors import Refusal, SettingsError, TLSRefused
from tests.support.gateway import ROOT, environment

PATH = Path("/etc/nbd-gateway/keys.psk")
KEY = "00112233445566778899aabbccddeeff"  # of the least length
OTHER = "f" * 64


def parse(text: str | bytes) -> psk.Keys:
    return psk.parse(PATH, text if isinstance(text, bytes) else text.encode())


def test_the_file_of_psktool() -> None:
    keys = parse(f"alice:{KEY}\nbob:{OTHER.upper()}\n")
    assert keys.find("alice") == bytes.fromhex(KEY)
    assert keys.find("bob") == bytes.fromhex(OTHER)
    assert list(keys.fingerprints) == ["alice", "bob"]
    assert keys.fingerprints["bob"] == hashlib.sha256(bytes.fromhex(OTHER)).digest()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("a b", "a b"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("spiffe//vm", "spiffe//vm"),
        ("#613a62", "a:b"),  # as psktool writes names with a colon
        ("#C3A9", "\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("x" * 255, "x" * 255),
    ],
)
def test_names(line: str, name: str) -> None:
    assert list(parse(f"{line}:{KEY}").fingerprints) == [name]


def test_a_last_line_without_its_end_empty_lines_and_comments() -> None:
    keys = parse(f"# keys of the lab\n\nalice:{KEY}\n\n#\nbob:{OTHER}")
    assert list(keys.fingerprints) == ["alice", "bob"]


@pytest.mark.parametrize("digits", [32, 64, 512])
def test_lengths_of_keys(digits: int) -> None:
    assert len(parse(f"alice:{'a' * digits}\n").find("alice")) == digits // 2


ERRORS = {
    "no colon": (f"alice{KEY}", "no colon: a line is NAME:KEY, the key in hexadecimal"),
    "a key alone": (KEY, "no colon"),
    "no name": (f":{KEY}", "no name before the colon"),
    "no key": ("alice:", "no key behind the colon"),
    "not hexadecimal": (f"alice:{KEY}xy", "the key is not hexadecimal"),
    "not ASCII digits": (f"alice:{KEY}\N{ARABIC-INDIC DIGIT ONE}2", "the key is not hexadecimal"),
    "0x": (f"alice:0x{KEY}", "the key is not hexadecimal"),
    "white space behind": (f"alice:{KEY} ", "the key is not hexadecimal"),
    "a third field": (f"alice:{KEY}:x", "the key is not hexadecimal"),
    "halves mixed up": (f"{KEY}:alice", "the key is not hexadecimal"),
    "odd": (f"alice:{KEY}0", "the key has an odd number of hexadecimal digits"),
    "too short": (f"alice:{KEY[:-2]}", "the key has 15 bytes, and less than 16 can be guessed"),
    "too long": (f"alice:{'a' * 514}", "the key has 257 bytes, and OpenSSL takes 256"),
    "NUL": (f"al\0ice:{KEY}", "control characters in the name"),
    "tab": (f"al\tice:{KEY}", "control characters in the name"),
    "C1": (f"al\x85ice:{KEY}", "control characters in the name"),
    "NUL in hexadecimal": (f"#616c00:{KEY}", "control characters in the name"),
    "NUL in the key": (f"alice:{KEY}\0", "the key is not hexadecimal"),
    "carriage return": (f"alice:{KEY}\r", "ends with a carriage return"),
    "name too long": (f"{'x' * 256}:{KEY}", "the name has 256 bytes, and TLS libraries take 255"),
    "name too long in UTF-8": (f"{'é' * 128}:{KEY}", "the name has 256 bytes"),
    "not UTF-8": (b"al\xffice:" + KEY.encode(), "the name is not UTF-8"),
    "not UTF-8 in hexadecimal": (f"#ff:{KEY}", "the name is not UTF-8"),
    "no hexadecimal name": (f"#alice:{KEY}", "behind # comes a name in hexadecimal"),
    "odd hexadecimal name": (f"#616:{KEY}", "behind # comes a name in hexadecimal"),
    "empty hexadecimal name": (f"#:{KEY}", "behind # comes a name in hexadecimal"),
    "white space before": (f" alice:{KEY}", "white space at an end of the name"),
    "white space between": (f"alice :{KEY}", "white space at an end of the name"),
    "the name again": (f"bob:{KEY}", "the name of line 1 again: a name has one key"),
    "the name again in hexadecimal": (f"#626f62:{KEY}", "the name of line 1 again"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said_with_its_line_and_no_key(case: str) -> None:
    line, says = ERRORS[case]
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(SettingsError) as caught:
        parse(f"bob:{OTHER}\n\n".encode() + raw + f"\ncarol:{OTHER}\n".encode())
    assert str(caught.value).startswith(f"--psk-file: {PATH}, line 3: {says}")
    for secret in (KEY[:8], OTHER[:8], "aaaaaaaa", "alice", "bob"):
        assert secret not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", ["", "\n\n", "# nobody yet\n"])
def test_no_key_at_all(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--psk-file: /etc/.* holds no key, so nobody could"):
        parse(text)


def test_nothing_shows_a_key() -> None:
    keys = parse(f"alice:{KEY}\n")
    for shown in (repr(keys), str(keys), f"{keys}"):
        assert "00112233" not in shown.lower()
        assert str(bytes.fromhex(KEY))[2:-1] not in shown
        assert keys.fingerprints["alice"].hex()[:8] not in shown


def test_an_unknown_name_has_a_key_that_nobody_has() -> None:
    keys = parse(f"alice:{KEY}\n")
    assert len({keys.find(name) for name in ("bob", "bob", None, "", "alice ")}) == 5


def test_another_key_has_another_fingerprint() -> None:
    old, new = parse(f"alice:{KEY}\nbob:{OTHER}\n"), parse(f"alice:{OTHER}\nbob:{OTHER}\n")
    assert old.fingerprints["alice"] != new.fingerprints["alice"]
    assert old.fingerprints["bob"] == new.fingerprints["bob"] == new.fingerprints["alice"]


def test_older_pythons_say_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psk, "AVAILABLE", False)
    with pytest.raises(SettingsError, match=r"^--psk-file: .* need Python 3\.13 or newer"):
        psk.context(parse(f"alice:{KEY}\n"), "1.2")


def test_a_tls_library_without_pre_shared_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psk, "AVAILABLE", True)
    monkeypatch.setattr(ssl, "HAS_PSK", False, raising=False)
    with pytest.raises(SettingsError, match="was built without"):
        psk.context(parse(f"alice:{KEY}\n"), "1.2")


def test_a_connection_by_certificate_proves_no_key() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    one, other = socket.socketpair()
    with one, other:
        sock = context.wrap_socket(one, server_side=True, do_handshake_on_connect=False)
        with sock, pytest.raises(TLSRefused) as caught:
            psk.prove(context, sock)
    assert caught.value.reason is Refusal.NO_PSK


def test_other_errors_of_a_handshake_are_not_about_keys() -> None:
    assert psk.refusal(ssl.SSLError(1, "[SSL: UNSUPPORTED_PROTOCOL] unsupported protocol")) is None


@pytest.mark.skipif(psk.AVAILABLE, reason="this Python has pre-shared keys")
def test_the_command_on_an_older_python(tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.touch(0o600)
    keys.write_text(f"alice:{KEY}\n")
    argv = [sys.executable, "-m", "gateway", "--psk-file", keys, "--socket", tmp_path / "s"]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = f"--psk-file: pre-shared keys need Python 3.13 or newer, and this is {version}"
    assert wanted in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_wrong_file_is_wrong_usage(tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.touch(0o600)
    keys.write_text(f"alice:{KEY}\nalice:{OTHER}\n")
    argv = [sys.executable, "-m", "gateway", "--psk-file", keys, "--socket", tmp_path / "s"]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"--psk-file: {keys}, line 2: the name of line 1 again" in done.stderr
    assert KEY not in done.stderr
    assert os.listdir(tmp_path) == ["keys.psk"]
