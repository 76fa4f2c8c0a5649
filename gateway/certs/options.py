"""The options that several of the `certs` commands share, and what their values mean."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from gateway.pki import MAX_DAYS, KeyType

F = TypeVar("F", bound=Callable[..., None])

PATH: Final = click.Path(path_type=Path)


class _Days(click.IntRange):
    """Its name is what click says that a wrong value is not."""

    name = "number of days"


DAYS: Final = _Days(1, MAX_DAYS)


def span(text: str) -> timedelta:
    """`30d`, `12h` or `4w`; a number alone is in days."""
    found = re.fullmatch(r"([0-9]{1,5})([hdw]?)", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a time like 30d, 12h or 4w")
    return timedelta(hours=int(found[1]) * {"h": 1, "w": 168}.get(found[2], 24))


def serial_number(text: str) -> int:
    """As `show` and openssl print it in hexadecimal, with `0x` or colons; or in decimal."""
    lower = text.lower()
    if re.fullmatch(r"0x[0-9a-f]{1,40}|[0-9a-f]{2}(:[0-9a-f]{2}){1,19}", lower):
        return int(lower.replace(":", ""), 16)
    if re.fullmatch(r"[1-9][0-9]{0,48}", lower):
        return int(lower)
    raise click.BadParameter(f"{text!r} is no serial number; in hexadecimal it begins with 0x")


def options_in_order(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several at once, in the order in which --help shows them."""

    def decorate(command: F) -> F:
        return functools.reduce(lambda inner, option: option(inner), reversed(options), command)

    return decorate


def days_option(flag: str, what: str, default: object) -> Callable[[Any], Any]:
    """A lifetime; the `default` is only for the help, and for the command to know."""
    text = f"How many days {what}.  [default: {default}]"
    return click.option(flag, type=DAYS, metavar="N", help=text)


dir_option = click.option(
    "--dir",
    "directory",
    type=PATH,
    default=".",
    show_default=True,
    metavar="DIR",
    help="The folder that `certs init` made, with ca/ca-key.pem in it.",
)
force_option = click.option("--force", is_flag=True, help="Replace what is there.")
key_type_option = click.option(
    "--key-type",
    type=click.Choice([str(kind) for kind in KeyType]),
    default=str(KeyType.EC_P256),
    show_default=True,
    help="Type of the keys to make.",
)
ca_password_option = click.option(
    "--ca-password-file",
    type=PATH,
    metavar="FILE",
    help="Passphrase of the CA's key: the one line of this file.",
)


def key_password_option(which: str) -> Callable[[Any], Any]:
    """For keys that are issued; `which` says which."""
    return click.option(
        "--key-password-file",
        type=PATH,
        metavar="FILE",
        help=f"Encrypt {which} with the passphrase in this file.",
    )


san_option = click.option(
    "--san",
    "sans",
    multiple=True,
    metavar="[KIND=]NAME",
    help="Further subject alternative name; may be repeated. Kinds: dns, ip, uri, email.",
)
out_option = click.option(
    "--out",
    type=PATH,
    metavar="FOLDER",
    help="Write into this folder, ca-cert.pem too, and not below DIR.",
)
