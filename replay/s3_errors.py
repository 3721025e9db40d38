"""What an S3 request failed of, in our own words: bucket, key, code and status, never the text a server sent.

Servers put access keys and signed strings into their error pages; only codes and numbers are taken from them.
"""

import re

from agentsdpo.errors import StoreError

_STATUS = re.compile(r"HTTP status (\d{3})|status code: (\d{3})")
_CODE = re.compile(r"ExceptionName: (\w+)|AWS Error ([A-Z_]+)|<Code>(\w+)</Code>|curlCode: \d+, ([\w ,()]+)")
_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE, and this machine's clock"
_RIGHTS = ("allow s3:GetObject, s3:PutObject, s3:DeleteObject on the objects and s3:ListBucket on the bucket (without "
           "that, a missing object is forbidden, too), and check which keys are in use")
_REGION = "name the bucket's region: ?region=... in the address, or AWS_REGION"
_REFUSALS = {
    "accessdenied": _RIGHTS, "forbidden": _RIGHTS, "allaccessdisabled": _RIGHTS, "403": _RIGHTS, "401": _KEYS,
    "invalidaccesskeyid": _KEYS, "signaturedoesnotmatch": _KEYS, "expiredtoken": _KEYS, "invalidtoken": _KEYS,
    "requesttimetooskewed": _KEYS, "requestexpired": _KEYS, "invalidclienttokenid": _KEYS, "400": _KEYS,
    "nosuchbucket": "make the bucket first, or correct its name", "404": "make the bucket first, or correct its name",
    "permanentredirect": _REGION, "authorizationheadermalformed": _REGION, "301": _REGION, "307": _REGION,
    "notimplemented": "this server lacks the operation; use another one", "501": "this server lacks the operation",
    "quotaexceeded": "raise the bucket's quota or free space; what was acknowledged before is safe",
    "507": "raise the bucket's quota or free space; what was acknowledged before is safe",
}
"""Answers that another attempt would not change, by code in lower case without underscores, or by status."""


class S3Fault(StoreError):
    """A request failed in a way that may pass: an overloaded server, a lost connection, an answer that never came."""


def explain(doing: str, uri: str, text: str) -> StoreError:
    """The error for a failed request.

    Args:
        doing: what was tried, as in "writing".
        uri: address of the object.
        text: what pyarrow or obstore says; codes alone are taken from it.

    Returns:
        :class:`S3Fault` where the same request may succeed later, another StoreError where it will not.

    >>> print(explain("writing", "s3://b/k", "AWS Error ACCESS_DENIED during PutObject operation: key AKIA1"))
    writing s3://b/k failed: ACCESS_DENIED; allow s3:GetObject, s3:PutObject, ...
    >>> explain("reading", "s3://b/k", "AWS Error UNKNOWN (HTTP status 503) during HeadObject")
    S3Fault('reading s3://b/k failed: status 503; ...')
    """
    status = next(filter(None, _first(_STATUS, text)), "")
    codes = [code for found in _CODE.finditer(text) for code in found.groups() if code and code != "UNKNOWN"]
    said = ", ".join([*dict.fromkeys(code.strip(" ,") for code in codes), *([f"status {status}"] if status else [])])
    what = f"{doing} {uri} failed: {said or 'no answer from the server'}"
    for name in [code.replace("_", "").lower() for code in codes] + [status]:
        if name in _REFUSALS:
            return StoreError(what, fix=_REFUSALS[name])
    return S3Fault(what, fix="check network and endpoint, then try again; nothing was acknowledged by this call")


def _first(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    found = pattern.search(text)
    return found.groups() if found else ()
