"""gateway.config: the rules in a file, and what it says of a file that is wrong."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import pytest

from gateway.access import ExportRules, Rule, Rules, parse_network
from gateway.config import read_config
from gateway.errors import SettingsError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gate.toml"


def rule(text: str) -> Rule:
    return Rule.parse("", text)


def complaint(path: Path) -> str:
    """What is said of this file: one line that begins with the flag and names it."""
    with pytest.raises(SettingsError) as refused:
        read_config(path)
    message = str(refused.value)
    assert message.isprintable()
    assert re.match(rf"--config(: cannot read|:)? {re.escape(str(path))}", message)
    return message


ALL = (Rule.anybody(),)


# ---------------------------------------------------------------- what it may say


def test_everything(file: Path) -> None:
    file.write_text(
        textwrap.dedent("""\
            allow = ["cn=vm1", "dns=*.example.com"]
            deny = ["cn=vm2"]
            allow-from = ["192.0.2.0/24", "2001:db8::1"]
            deny-from = ["192.0.2.66"]

            [[export]]
            name = "disk"
            read-write = ["cn=vm1"]
            read-only = ["uid=0", "cn=backup"]
            deny = ["cn=vm3"]

            [[export]]
            name = "d\\u00efsk & more"
            read-only = ["*"]
        """)
    )
    assert read_config(file).rules == Rules(
        allow=(rule("cn=vm1"), rule("dns=*.example.com")),
        deny=(rule("cn=vm2"),),
        allow_from=(parse_network("", "192.0.2.0/24"), parse_network("", "2001:db8::1/128")),
        deny_from=(parse_network("", "192.0.2.66/32"),),
        exports=(
            ExportRules(
                "disk",
                read_write=(rule("cn=vm1"),),
                read_only=(rule("uid=0"), rule("cn=backup")),
                deny=(rule("cn=vm3"),),
            ),
            ExportRules("d\u00efsk & more", read_only=(Rule.anybody(),)),
        ),
    )


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ('allow = ["cn=a"]', Rules(allow=(rule("cn=a"),))),
        ("deny = []", Rules()),
        ("deny-from = []", Rules()),
        ('[[export]]\nname = ""\nread-write = ["*"]', Rules(exports=(ExportRules("", ALL),))),
        (
            '[[export]]\nname = "a"\nread-only = ["*"]\ndeny = []',
            Rules(exports=(ExportRules("a", (), ALL),)),
        ),
        (
            'export = [{name = "a", read-only = ["*"]}, {name = "b", read-write = ["uid=0"]}]',
            Rules(exports=(ExportRules("a", (), ALL), ExportRules("b", (rule("uid=0"),)))),
        ),
    ],
)
def test_parts(text: str, rules: Rules, file: Path) -> None:
    file.write_text(text)
    assert read_config(file).rules == rules


def test_what_readme_shows(file: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", readme, flags=re.DOTALL)
    assert examples
    for example in examples:
        file.write_text(example)
        assert read_config(file).rules.exports


# ---------------------------------------------------------------- what it may not

OPEN = "read-only = ['*']\n"
LAST = f"[[export]]\nname = 'a'\n{OPEN}[[export]]\nname = 'b'\n"
NUL = "\\u0000"  # as TOML writes it

WRONG = {
    "unknown key": ('alow = ["cn=a"]', "$.alow: unknown key; did you mean allow?"),
    "key of a flag": ('tls-dir = "d"', "$.tls-dir: unknown key; keys here are allow, deny, "),
    "underscore": ('allow_from = ["::1"]', "$.allow_from: unknown key; did you mean allow-from?"),
    "capitals": ('Deny = ["cn=a"]', "$.Deny: unknown key; did you mean deny?"),
    "plural": (LAST.replace("export", "exports"), "$.exports: unknown key; did you mean export?"),
    "unknown key in a table": (LAST + "sockt = 's'", "$.export[1].sockt: unknown key; keys here"),
    "near key in a table": (LAST + "readonly = ['cn=a']", "$.export[1].readonly: unknown key; did"),
    "underscore in a table": (LAST + "read_write = ['cn=a']", "did you mean read-write?"),
    "key behind the tables": (LAST + "allow = ['cn=a']", "$.export[1].allow: unknown key; keys"),
    "a key with a line break": ('"a\\nb" = 1', "$.'a\\nb': unknown key"),
    "one bracket": ('[export]\nname = "a"', "$.export: a table goes in double brackets: [[export"),
    "a string for a list": ('allow = "cn=a"', 'also for one: allow = ["cn=a"]'),
    "a string in a table": (
        '[[export]]\nname = "a"\nread-only = "cn=a"',
        '$.export[0].read-only: a list is needed, also for one: read-only = ["cn=a"]',
    ),
    "a number in a list": ('allow = ["cn=a", 1]', "Expected `str`, got `int` - at `$.allow[1]`"),
    "a date in a list": ("deny-from = [1979-05-27]", "Expected `str`, got `date`"),
    "a string for tables": ('export = "a"', "Expected `array`, got `str` - at `$.export`"),
    "strings for tables": ('export = ["a"]', "Expected `object`, got `str` - at `$.export[0]`"),
    "no name": ("[[export]]\ndeny = ['cn=a']", "missing required field `name` - at `$.export[0]`"),
    "name is a number": ("[[export]]\nname = 1", "Expected `str`, got `int` - at `$.export[0].na"),
    "name twice": (
        LAST + OPEN + "[[export]]\nname = 'a'",
        "$.export[2].name: 'a' is there already",
    ),
    "name too long": (f"[[export]]\nname = '{4097 * 'x'}'", "$.export[0].name: an export's name"),
    "name with NUL": (f'[[export]]\nname = "a{NUL}b"', "$.export[0].name: an export's name"),
    "rule of no kind": ('allow = ["cn=a", "cm=b"]', "$.allow[1]: cm=b: a rule is KIND=VALUE; did "),
    "rule in deny": ('deny = ["vm1"]', "$.deny[0]: vm1: "),
    "rule in read-write": (LAST + "read-write = ['cn=a', '']", "$.export[1].read-write[1]: "),
    "rule in read-only": (LAST + "read-only = ['uid=nobody?']", "$.export[1].read-only[0]: uid="),
    "rule in an export's deny": (
        LAST + OPEN + "deny = ['dns=a*']",
        "$.export[1].deny[0]: dns=a*: ",
    ),
    # What is left of a file that was cut off must not be open to everybody.
    "nobody in a table": (LAST, "$.export[1]: who may open it? read-write = [RULE, ...] and "),
    "only who may not": (LAST + "deny = ['cn=a']", "$.export[1]: who may open it?"),
    "everybody and somebody": (LAST + "read-only = ['*', 'cn=a']", "$.export[1].read-only[0]: *: "),
    "everybody to enter": ("allow = ['*']", "$.allow[0]: *: a rule is KIND=VALUE"),
    "nobody to enter": ("deny = ['*']", "$.deny[0]: *: a rule is KIND=VALUE"),
    "network": ('allow-from = ["::1", "192.0.2.1/24"]', "$.allow-from[1]: 192.0.2.1/24: "),
    "denied network": ('deny-from = ["everywhere"]', "$.deny-from[0]: everywhere: "),
    "nothing": ("", "it is empty"),
    "nothing but comments": ("# allow = ['cn=a']\n\n", "it is empty"),
    # Left out, each of these keys means everybody.
    "allow nobody": ("allow = []", "$.allow: an empty list: does it mean nobody, or everybody?"),
    "allow from nowhere": ("allow-from = []", "$.allow-from: an empty list"),
    "no exports": ("export = []", "$.export: an empty list"),
    "nobody may write": (LAST + "read-write = []", "$.export[1].read-write: an empty list"),
    "nobody may read": (LAST + "read-only = []", "$.export[1].read-only: an empty list"),
    "no TOML": ("allow: [cn=a]", "not TOML: "),
    "cut short": ('deny = ["cn=a"]\nallow = ["cn=b"', "not TOML: "),
    "twice the same": ("deny = ['cn=a']\ndeny = ['cn=b']", "not TOML: "),
    "a number of many digits": (f"deny = {5000 * '1'}", "not TOML: "),
    "a deep nest": (f"deny = {50_000 * '['}", "not TOML: "),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files(text: str, words: str, file: Path) -> None:
    file.write_text(text)
    assert words in complaint(file)


def test_not_utf_8(file: Path) -> None:
    file.write_bytes(b'allow = ["cn=\xff"]')
    assert "not TOML: 'utf-8'" in complaint(file)


def test_too_large(file: Path) -> None:
    file.write_text("deny = [" + (1 << 17) * "'cn=a'," + "]")
    assert read_config(file).rules.deny[1 << 16] == rule("cn=a")
    file.write_text("deny = [" + (1 << 20) * " " + "]")
    assert "more than 1048576 bytes" in complaint(file)


def test_no_file(file: Path, tmp_path: Path) -> None:
    assert complaint(file) == f"--config: cannot read {file}: No such file or directory"
    assert complaint(tmp_path) == f"--config: cannot read {tmp_path}: Is a directory"


def test_a_pipe_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    assert "no regular file" in complaint(file)


def test_a_list_that_was_cut_is_no_list(file: Path) -> None:
    """While the file is being written: `allow` is whole, or nothing is taken."""
    text = 'allow = ["cn=a",\n "cn=b"]\ndeny = ["cn=c"]\n[[export]]\nname = "d"\n'
    taken = 0
    for end in range(len(text)):
        file.write_text(text[:end])
        try:
            rules = read_config(file).rules
        except SettingsError:
            continue
        assert rules.allow == (rule("cn=a"), rule("cn=b"))
        taken += 1
    assert taken > 3
