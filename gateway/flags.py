"""The flags of `nbd-gateway`, `serve` and `check`: Settings from what was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gateway.access import Rule, Rules, parse_network
from gateway.config import Config, read_config
from gateway.errors import SettingsError
from gateway.limits import Limits
from gateway.nbd.upgrades import ALL_UPGRADES, Upgrade
from gateway.settings import (
    OLDSTYLE_NEEDS,
    Settings,
    TLSSettings,
    parse_listen,
    tls_files,
)


def settings_of(
    *,
    cert: Path | None,
    key: Path | None,
    key_password_file: Path | None,
    client_ca: Path | None,
    crl: Path | None,
    allow_anonymous: bool,
    psk_file: Path | None,
    tls_dir: Path | None,
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    allow_from: tuple[str, ...],
    deny_from: tuple[str, ...],
    config: Path | None,
    on_revoke: Literal["close", "keep"],
    reload_interval: float,
    socket: str | None,
    export: str | None,
    any_export: bool,
    listen: tuple[str, ...],
    tls: str,
    tls_min: Literal["1.2", "1.3"],
    read_only: bool,
    no_upgrade: tuple[str, ...],
    oldstyle: bool,
    max_connections: int,
    workers: int,
    handshake_timeout: float,
    drain_timeout: float,
    limit: tuple[str, ...],
    reconnect: float,
    user: str | None,
) -> Settings:
    """Flags, and the file that `--config` names, to Settings. Raises SettingsError."""
    if socket is None:
        raise SettingsError("--socket PATH is missing: the Unix socket of the NBD server behind")
    if any_export and export is not None:
        raise SettingsError("--export and --any-export exclude each other")
    if oldstyle and tls != "off":  # said before the certificates that it has no use for are missed
        raise SettingsError(OLDSTYLE_NEEDS)
    file = Config() if config is None else read_config(config)
    rules = _rules(allow, deny, allow_from, deny_from, file.rules)
    if rules.exports and export is not None:
        raise SettingsError(
            f"--export and [[export]] in --config {config} exclude each other: the tables say "
            "what is offered"
        )
    default = rules.exports[0].name if rules.exports else ""
    more: dict[str, Any] = {}
    if listen:
        more["listen"] = tuple(parse_listen(one) for one in listen)
    files = _Files(
        cert=cert,
        key=key,
        key_password=key_password_file,
        client_ca=client_ca,
        crl=crl,
        anonymous=allow_anonymous,
        psk=psk_file,
        directory=tls_dir,
    )
    return Settings(
        socket=socket,
        tls=files.settings(tls, tls_min),
        export=None if any_export else export or default,
        read_only=read_only,
        oldstyle=oldstyle,
        upgrades=ALL_UPGRADES - {Upgrade(name) for name in no_upgrade},
        max_connections=max_connections,
        workers=workers,
        handshake_timeout_s=handshake_timeout,
        drain_timeout_s=drain_timeout,
        rules=rules,
        on_revoke=on_revoke,
        reload_interval_s=reload_interval,
        config=config,
        limits=Limits.of(limit, file.limits),
        reconnect_s=reconnect,
        user=user,
        **more,
    )


def rereader(first: Settings, flags: dict[str, Any]) -> Callable[[], Settings]:
    """What to call for a reload: the same flags, and the files that they name as they are then.

    `first` is what the gateway has started with. What is called raises SettingsError.
    """

    def reread() -> Settings:
        now = settings_of(**flags)
        if first.rules.exports and not now.rules.exports:
            # All who may enter would get an export that was offered to some.
            raise SettingsError(
                f"--config {now.config}: the last [[export]] is gone; the gateway goes on "
                "without any only after a restart"
            )
        return now

    return reread


def _rules(
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    allow_from: tuple[str, ...],
    deny_from: tuple[str, ...],
    file: Rules,
) -> Rules:
    """Those of the flags, and then those of the file."""
    return Rules(
        allow=(*(Rule.parse("--allow", text) for text in allow), *file.allow),
        deny=(*(Rule.parse("--deny", text) for text in deny), *file.deny),
        allow_from=(*(parse_network("--allow-from", t) for t in allow_from), *file.allow_from),
        deny_from=(*(parse_network("--deny-from", t) for t in deny_from), *file.deny_from),
        exports=file.exports,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The flags about TLS that name files, and what was decided about clients without any."""

    cert: Path | None
    key: Path | None
    key_password: Path | None
    client_ca: Path | None
    crl: Path | None
    anonymous: bool
    psk: Path | None
    directory: Path | None

    def settings(self, tls: str, minimum: Literal["1.2", "1.3"]) -> TLSSettings | None:
        """Raises SettingsError."""
        if tls == "off":
            if given := self._given():
                raise SettingsError(
                    f"--tls off has no use for {given[0]}: leave one or the other out"
                )
            return None
        self._check()
        if self.psk is not None:
            return TLSSettings(None, None, None, minimum=minimum, psk=self.psk)
        cert, key, client_ca, crl = self.cert, self.key, self.client_ca, self.crl
        if self.directory is not None:
            found = tls_files(self.directory, anonymous=self.anonymous, minimum=minimum)
            cert, key = cert or found.cert, key or found.key
            client_ca, crl = client_ca or found.client_ca, crl or found.crl
        if cert is not None and key is not None and client_ca is None and not self.anonymous:
            raise SettingsError(
                "who may enter? Say --client-ca FILE (clients with a certificate of that CA), "
                "--psk-file FILE (clients with a pre-shared key) or --allow-anonymous (everybody)"
            )
        return TLSSettings(cert, key, client_ca, crl, minimum, self.key_password)

    def _check(self) -> None:
        """What excludes each other."""
        if self.anonymous and self.client_ca:
            raise SettingsError("--client-ca and --allow-anonymous exclude each other")
        others = [flag for flag in self._given() if flag != "--psk-file"]
        if self.psk is not None and others:
            raise SettingsError(
                f"--psk-file and {others[0]} exclude each other: clients have a pre-shared key, "
                "and nobody has a certificate; run two gateways for both"
            )

    def _given(self) -> list[str]:
        """The flags that were."""
        flags = {
            "--cert": self.cert,
            "--key": self.key,
            "--key-password-file": self.key_password,
            "--client-ca": self.client_ca,
            "--crl": self.crl,
            "--allow-anonymous": self.anonymous,
            "--psk-file": self.psk,
            "--tls-dir": self.directory,
        }
        return [flag for flag, value in flags.items() if value]
