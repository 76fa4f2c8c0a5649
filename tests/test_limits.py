"""gateway.limits: the bounds, what may be set, and what is said of what may not."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest

from gateway import session
from gateway.config import Config, read_config
from gateway.errors import SettingsError
from gateway.limits import Limits, checked, names, option_name
from gateway.nbd.negotiation import BEFORE_TLS, INSIDE_TLS, MAX_OPTION_SKIP, Allowance


def complaint(*texts: str) -> str:
    with pytest.raises(SettingsError) as refused:
        Limits.of(texts)
    message = str(refused.value)
    assert message.isprintable()
    return message


def test_defaults_are_those_of_the_machines() -> None:
    """Which are without settings, and so have them once more."""
    limits = Limits()
    assert Allowance(limits.plain_options, limits.plain_option_bytes) == BEFORE_TLS
    assert Allowance(limits.options, limits.option_bytes) == INSIDE_TLS
    assert limits.option_bytes > MAX_OPTION_SKIP  # else that one would mean nothing


def test_every_bound_has_what_is_to_be_known_of_it() -> None:
    for one in dataclasses.fields(Limits):
        facts = one.metadata
        assert facts["unit"]
        assert facts["meaning"]
        assert (facts["off"] and one.default == 0) or facts["least"] <= one.default <= facts["most"]
        assert option_name(one.name) in names()
        assert type(one.default).__name__ == str(one.type)  # whole numbers stay whole


def test_names_are_those_of_the_fields() -> None:
    limits = Limits.of(["clients-per-identity=7", "stall-timeout=2.5", "user-timeout=3"])
    assert limits == Limits(clients_per_identity=7, stall_timeout=2.5, user_timeout=3)
    assert Limits.of([]) == Limits()


def test_the_last_one_counts_and_flags_win() -> None:
    file = {"clients_per_identity": 5, "handshakes": 6}
    limits = Limits.of(["handshakes=8", "handshakes=9"], file)
    assert limits == Limits(clients_per_identity=5, handshakes=9)


@pytest.mark.parametrize(
    "one", [one for one in dataclasses.fields(Limits) if one.metadata["off"]], ids=lambda o: o.name
)
def test_none_at_all(one: dataclasses.Field[float]) -> None:
    assert getattr(Limits.of([f"{option_name(one.name)}=0"]), one.name) == 0


@pytest.mark.parametrize(
    "one",
    [one for one in dataclasses.fields(Limits) if not one.metadata["off"]],
    ids=lambda o: o.name,
)
def test_there_has_to_be_one(one: dataclasses.Field[float]) -> None:
    assert f"--limit {option_name(one.name)}: 0 " in complaint(f"{option_name(one.name)}=0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("handshakes", "--limit handshakes: it is NAME=VALUE"),
        ("", "--limit : it is NAME=VALUE"),
        ("handshake=5", "--limit handshake: unknown name; did you mean handshakes?"),
        ("clients_per_identity=5", "unknown name; did you mean clients-per-identity?"),
        ("Handshakes=5", "unknown name; did you mean handshakes?"),
        ("x=5", "--limit x: unknown name; names are clients-per-address, "),
        ("\x1b[31m=5", "unknown name"),
        ("handshakes=many", "--limit handshakes=many: 'many' is no number"),
        ("handshakes=", "'' is no number"),
        ("handshakes=\x1b[31m", "is no number"),
        ("handshakes=5.5", "--limit handshakes: 5.5 is no whole number"),
        ("handshakes=1e3", "1000 is no whole number"),
        ("handshakes=-1", "-1 clients is not between 1 and 1e+09 (or 0 for no bound)"),
        ("handshakes=" + 5000 * "9", "is no number"),
        ("handshakes=9999999999", "is not between 1 and 1e+09"),
        ("stall-timeout=nan", "nan s is not between 0.1 and 1e+09 (or 0 for no bound)"),
        ("stall-timeout=inf", "inf s is not between"),
        ("stall-timeout=0.05", "0.05 s is not between 0.1"),
        ("plain-options=0", "--limit plain-options: 0 options is not between 1 and 1e+09"),
        ("plain-option-bytes=63", "63 bytes is not between 64"),
        ("keepalive-count=128", "128 looks is not between 1 and 127"),
        ("keepalive-idle=32768", "32768 s is not between 1 and 32767"),
        ("user-timeout=3e6", "3e+06 s is not between 1 and 2e+06"),
    ],
)
def test_what_may_not_be_set(text: str, said: str) -> None:
    assert said in complaint(text)


def test_not_past_the_flag_either() -> None:
    with pytest.raises(SettingsError, match="--limit handshakes: -1 clients"):
        Limits(handshakes=-1)


# ---------------------------------------------------------------- in a file


def test_a_table_of_them(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text("[limits]\nclients-per-identity = 8\nstall-timeout = 30.5\nuser-timeout=0\n")
    config = read_config(file)
    assert config == Config(
        limits={"clients_per_identity": 8, "stall_timeout": 30.5, "user_timeout": 0}
    )
    assert Limits.of([], config.limits).stall_timeout == 30.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limits]\nhandshake = 5", "$.limits.handshake: unknown name; did you mean handshakes?"),
        ("[limits]\nclients_per_identity = 5", "did you mean clients-per-identity?"),
        ('[limits]\n"a\\nb" = 5', "$.limits.a?b: unknown name"),
        ('[limits]\nhandshakes = "5"', "$.limits.handshakes: '5' is no number"),
        ("[limits]\nhandshakes = true", "$.limits.handshakes: True is no number"),
        ("[limits]\nhandshakes = 5.0", "$.limits.handshakes: 5 is no whole number"),
        ("[limits]\nhandshakes = -5", "$.limits.handshakes: -5 clients is not between 1"),
        ("[limits]\nstall-timeout = nan", "$.limits.stall-timeout: nan s is not between"),
        ("[limits]\nhandshakes = []", "$.limits.handshakes: [] is no number"),
        ("limits = 5", "Expected `object`, got `int` - at `$.limits`"),
        ("[[limits]]\nhandshakes = 5", "Expected `object`, got `array` - at `$.limits`"),
        ("[limit]\nhandshakes = 5", "$.limit: unknown key; did you mean limits?"),
    ],
)
def test_what_is_wrong_with_it(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        read_config(file)
    assert str(refused.value).startswith(f"--config {file}: ")
    assert said in str(refused.value)
    assert str(refused.value).isprintable()


def test_nothing_is_taken_from_a_table_with_one_mistake() -> None:
    with pytest.raises(SettingsError, match="handshake: unknown"):
        checked({"handshakes": 5, "handshake": 6}, lambda name: f"{name}:")


# ---------------------------------------------------------------- on a socket


@pytest.mark.parametrize("user_timeout", [0.0, 1.5, 120.0, 2e6])
def test_what_tcp_is_told(user_timeout: float) -> None:
    limits = Limits(
        keepalive_idle=32767, keepalive_interval=7, keepalive_count=3, user_timeout=user_timeout
    )
    with socket.socket() as sock:
        session._tune(sock, limits)
        found = [
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (
                *(socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT),
                *(socket.TCP_USER_TIMEOUT, socket.TCP_NODELAY),
            )
        ]
        assert found == [32767, 7, 3, round(1000 * user_timeout), 1]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    with socket.socket(socket.AF_UNIX) as sock:
        session._tune(sock, limits)
