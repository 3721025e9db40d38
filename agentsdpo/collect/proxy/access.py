"""Who may ask, in whose name, and how often. Keys are compared in constant time and are never part of a message."""

import hashlib
import hmac
import ipaddress
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from agentsdpo.collect.proxy.refusals import Refused
from agentsdpo.errors import ConfigError

KEYS_VARIABLE = "AGENTSDPO_PROXY_KEYS"
"""Environment variable with keys: ``KEY`` or ``TENANT=KEY``, separated by commas."""
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")
_COMMENT = re.compile(r"(^|\s)#.*")
_LEAST = 16


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        name: of the key for rates and logs, a short hash; never the key.
        tenant: whose conversations these are; "" where there are no tenants.
    """

    name: str
    tenant: str


def check_tenant(name: str) -> str:
    """A tenant's name, which becomes part of a folder and of an adapter's name.

    Raises:
        ConfigError: other than 1 to 63 of ``a-z 0-9 _ -``, beginning with a letter or digit.

    >>> check_tenant("acme-2")
    'acme-2'
    """
    if not _TENANT.match(name):
        raise ConfigError(f"a tenant is called {name[:80]!r}",
                          fix="use 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit")
    return name


class Keys:
    """The bearer keys a proxy accepts, and whose they are.

    Args:
        keys: key to tenant; "" for a key that belongs to none. Empty: no key is asked for.
        tenant_header: header by which a key without a tenant names one.

    >>> keys = Keys({"k" * 16: "acme"})
    >>> keys.caller({"Authorization": "Bearer " + "k" * 16}).tenant
    'acme'
    """

    def __init__(self, keys: Mapping[str, str], *, tenant_header: str = "") -> None:
        for key, tenant in keys.items():
            if len(key) < _LEAST:
                raise ConfigError(f"a key has {len(key)} characters", fix=f"use {_LEAST} or more random ones")
            if tenant:
                check_tenant(tenant)
        self._keys = [(hashlib.sha256(key.encode()).digest(), tenant) for key, tenant in keys.items()]
        self.tenant_header = tenant_header
        self.tenants = bool(tenant_header) or any(keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who sent these headers.

        Raises:
            Refused: 401 for a missing or wrong key, 403 for the name of another tenant, 400 for none or an odd one.
        """
        name, tenant = self._known(headers) if self._keys else ("open", "")
        asked = headers.get(self.tenant_header, "") if self.tenant_header else ""
        if tenant and asked not in ("", tenant):
            raise Refused(403, "this key belongs to another tenant than the one that was named", code="wrong_tenant")
        tenant = tenant or asked
        if self.tenants and not _TENANT.match(tenant):
            where = f"the header {self.tenant_header}" if self.tenant_header else "the key"
            raise Refused(400, f"no tenant, or an odd name for one, in {where}", code="no_tenant",
                          fix="name it by 1 to 63 of a-z, 0-9, _ and -")
        return Caller(name, tenant)

    def _known(self, headers: Mapping[str, str]) -> tuple[str, str]:
        """Short name and tenant of the key in the headers; every key is compared, whichever fits."""
        scheme, _, given = headers.get("Authorization", "").partition(" ")
        sent = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest, found = hashlib.sha256(sent.encode("utf-8", "surrogateescape")).digest(), None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = (known.hex()[:8], tenant)
        if found is None:
            raise Refused(401, "the key is missing or wrong", code="invalid_api_key",
                          fix="send the header 'Authorization: Bearer KEY' with a key of this proxy")
        return found


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Keys and their tenants, from a file (one ``KEY`` or ``TENANT=KEY`` a line, ``#`` begins a comment) and from
    :data:`KEYS_VARIABLE`. What does not begin with a tenant's name is a key as a whole: base64 ends with ``=``.

    Raises:
        ConfigError: the file cannot be read, has no keys, or gives one key to two tenants.

    >>> read_keys(None, {"AGENTSDPO_PROXY_KEYS": "acme=0123456789abcdef,ZmFyIHRvbyBzaG9ydA=="})
    {'0123456789abcdef': 'acme', 'ZmFyIHRvbyBzaG9ydA==': ''}
    """
    lines = environment.get(KEYS_VARIABLE, "").split(",")
    if path is not None:
        try:
            lines += path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {path} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}",
                              fix="write one KEY or TENANT=KEY a line") from None
    keys: dict[str, str] = {}
    for line in lines:
        whole = _COMMENT.sub("", line).strip()
        tenant, _, key = (part.strip() for part in whole.partition("="))
        if not key.strip("=") or not _TENANT.match(tenant):
            tenant, key = "", whole
        if key and keys.setdefault(key, tenant) != tenant:
            raise ConfigError(f"one key is given to the tenants {keys[key]!r} and {tenant!r}",
                              fix="give each tenant keys of its own")
    if path is not None and not keys:
        raise ConfigError(f"there are no keys in {path}, so that anybody could ask",
                          fix="write one KEY or TENANT=KEY a line, or leave --keys out to ask for none")
    return keys


def check_binding(host: str, keys: int) -> None:
    """Refuse to listen beyond this machine without a key.

    Raises:
        ConfigError: ``host`` is no loopback address and there are no keys.

    >>> check_binding("127.0.0.1", keys=0)
    """
    if not keys and not _loopback(host):
        raise ConfigError(f"--host {host} can be reached from other machines, and no key is asked for",
                          fix=f"give keys (--keys FILE or {KEYS_VARIABLE}), or bind to 127.0.0.1")


def check_origin(origin: str | None, keys: int) -> None:
    """Refuse the web pages of others without a key: a browser on this machine sends what they say, and says of whom.

    Args:
        origin: the request's header of that name. keys: how many there are.

    Raises:
        Refused: 403, it is not of this machine.

    >>> check_origin(None, keys=0), check_origin("http://localhost:3000", keys=0)
    (None, None)
    """
    try:
        host = urlsplit(origin or "http://localhost").hostname
    except ValueError:
        host = None
    if not keys and not _loopback(host or ""):
        raise Refused(403, "a web page from elsewhere asks, and no key is asked for", code="wrong_origin",
                      fix="have the operator of this proxy give keys")


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Rates:
    """A bucket of requests per caller: it holds ``burst`` and is refilled by ``per_minute``.

    >>> rates = Rates(per_minute=60, burst=1, clock=lambda: 0.0)
    >>> rates.take("a"), rates.take("a")
    (0.0, 1.0)
    """

    def __init__(self, *, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_minute / 60.0, float(burst), clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> float:
        """Take one request from a caller's bucket: 0.0, or the seconds to wait when it is empty."""
        now = self._clock()
        left, since = self._left.get(caller, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_s)
        took = left >= 1.0
        self._left[caller] = (left - took, now)
        return 0.0 if took else (1.0 - left) / self._per_s
