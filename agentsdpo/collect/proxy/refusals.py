"""What a client is told when it gets no answer, in the shape of OpenAI's API. Nothing of a request is repeated."""

from agentsdpo.errors import AgentSdpoError
from agentsdpo.types import Json


class Refused(AgentSdpoError, ValueError):
    """A request that gets an error instead of an answer.

    Args:
        status: HTTP status.
        what: what happened. fix: what the client can do about it.
        code: short name of the fault, for programs. param: the field of the request that is at fault.
        retry_after_s: when to come again.

    >>> Refused(400, "messages is empty", fix="send one", param="messages").body()["error"]["type"]
    'invalid_request_error'
    """

    def __init__(self, status: int, what: str, *, fix: str = "", code: str | None = None, param: str | None = None,
                 retry_after_s: float | None = None) -> None:
        super().__init__(what, fix=fix)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    def body(self) -> Json:
        """The error as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


class UpstreamError(Refused):
    """The engine gave no answer that can be passed on; nothing of this call is in the record."""
