"""What a secret looks like: rules by name, and rules of one's own from a TOML file.

    [[rule]]
    name = "badge"
    pattern = 'ACME-[0-9]{6}'          # a Python regular expression; a first group, if any, is the secret itself
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from agentsdpo.errors import ConfigError


class Rule(NamedTuple):
    """One kind of secret. What the pattern matches is taken out; its first group, if any, is looked for elsewhere too.

    Attributes:
        name: shown in reports and in the place of the secret.
        pattern: what to look for.
    """

    name: str
    pattern: re.Pattern[str]


_ALONE = r"(?<![A-Za-z0-9])"
"""Before prefixes so short that they end common words; the others are looked for inside words as well."""
_KEYS = {
    "openai_key": _ALONE + r"sk-(?!ant-)[A-Za-z0-9_-]{20,}", "anthropic_key": r"sk-ant-[A-Za-z0-9_-]{16,}",
    "aws_key_id": r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",
    "aws_secret": r"(?i)aws_?secret_?(?:access_?)?key\W{1,6}([A-Za-z0-9/+=]{40})",
    "github_token": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}",
    "gitlab_token": r"gl(?:pat|dt|rt|cbt|ptt)-[A-Za-z0-9_-]{20,}",
    "huggingface_token": _ALONE + r"(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "google_key": r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}",
    "slack_token": r"xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}"
                   r"|hooks\.slack\.com/services/[A-Za-z0-9_/]{20,}",
    "stripe_key": r"[srp]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9]{24,}",
    "sendgrid_key": _ALONE + r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}", "npm_token": r"npm_[A-Za-z0-9]{36}",
    "pypi_token": r"pypi-[A-Za-z0-9_-]{50,}", "twilio_key": _ALONE + r"SK[0-9a-f]{32}",
    "databricks_token": r"dapi[0-9a-f]{32}", "digitalocean_token": r"do[opr]_v1_[0-9a-f]{64}",
    "telegram_token": r"[0-9]{8,10}:AA[A-Za-z0-9_-]{33}",
    "model_service_key": _ALONE + r"(?:gsk_|xai-|nvapi-|r8_|pplx-|tvly-|fw_|csk-|wandb_v1_)[A-Za-z0-9_-]{24,}",
}
_CARRIED = {
    "private_key": r"(?s)-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----.*?"
                   r"(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    "jwt": r"eyJ[A-Za-z0-9_-]{8,2048}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "bearer": r"(?i)\bbearer[ \t]+([A-Za-z0-9._~+/=-]{12,})",
    "basic_auth": r"(?i)\bbasic[ \t]+((?=[A-Za-z+/]*[0-9=])[A-Za-z0-9+/]{12,}={0,2})",
    "cookie": r"(?i)\b(?:set-)?cookie\\?[\"']?[ \t]*[:=][ \t]*\\?[\"']?([^\s\"'\\][^\r\n\"'\\]{3,})",
    "url_password": r"(?i)\b[a-z][a-z0-9+.-]{1,15}://[^\s:/@\"']{1,64}:([^\s/@\"']{3,128})@",
}
EMAIL = Rule("email", re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}"
                                 r"\.[A-Za-z]{2,24}\b"))
"""Addresses of people; not a secret to everybody, so it has to be asked for."""
RULES: tuple[Rule, ...] = tuple(Rule(name, re.compile(pattern)) for name, pattern in {**_CARRIED, **_KEYS}.items())
"""Private keys, cookies, tokens in headers and URLs, and keys of well-known services."""

MIN_VERBATIM = 8
"""Characters of a found secret from which on it is looked for by itself, without what made it look like one."""


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Rules from a TOML file; see the head of this page.

    Raises:
        ConfigError: no such file, no TOML, unknown keys, a pattern that is no regular expression or matches nothing
            at all (the empty text), a name that is taken.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the rules in {path} cannot be read: {error}", fix=_HELP) from error
    rules = tables.get("rule")
    if set(tables) != {"rule"} or not isinstance(rules, list):
        raise ConfigError(f"{path} holds {', '.join(sorted(tables)) or 'nothing'}", fix=_HELP)
    made = tuple(_rule(rule, f"{path}: rule {number}") for number, rule in enumerate(rules, 1))
    names = [rule.name for rule in (*RULES, EMAIL, *made)]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path} names a rule twice, or as a rule of this package", fix="give it a name of its own")
    return made


_HELP = "write tables [[rule]] with a name and a pattern"


def _rule(rule: object, where: str) -> Rule:
    if not isinstance(rule, dict) or set(rule) != {"name", "pattern"} or not all(
            isinstance(value, str) and value for value in rule.values()):
        raise ConfigError(f"{where} is not a name and a pattern", fix=_HELP)
    try:
        pattern = re.compile(rule["pattern"])
    except re.error as error:
        raise ConfigError(f"{where}: {rule['pattern']!r} is no regular expression: {error}", fix=_HELP) from error
    if pattern.search(""):
        raise ConfigError(f"{where}: {rule['pattern']!r} matches the empty text", fix="ask for at least one character")
    return Rule(rule["name"], pattern)


def spans(rules: Sequence[Rule], text: str) -> Iterator[tuple[int, int, str, str]]:
    """``(start, end, rule, secret)`` of everything the rules match, rule by rule; spans of two rules may overlap.

    >>> [found[2:] for found in spans(RULES, "Authorization: Bearer abcdefghijklmnop0")]
    [('bearer', 'abcdefghijklmnop0')]
    """
    for rule in rules:
        for match in rule.pattern.finditer(text):
            if match.end() > match.start():
                secret = match.group(1) if rule.pattern.groups and match.group(1) else match.group()
                yield match.start(), match.end(), rule.name, secret


def parts(secret: str) -> list[str]:
    """What to look for by itself once a secret was found: all of it, and the long values of a cookie.

    >>> parts("sid=0123456789abcdef; Path=/; HttpOnly")
    ['sid=0123456789abcdef; Path=/; HttpOnly', '0123456789abcdef']
    """
    values = [value for value in re.split(r"[;=,\s]+", secret) if len(value) >= 12 and re.search(r"\d", value)]
    return list(dict.fromkeys(part for part in (secret, *values) if len(part) >= MIN_VERBATIM))
