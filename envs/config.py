"""Settings of environments that live outside this process. Nothing heavy is imported here."""

from pydantic import Field, model_validator

from agentsdpo.settings import Settings
from agentsdpo.types import Json


class McpServer(Settings):
    """Where the tools are: a command to start, or an address."""

    command: str = Field(default="", description="program of a local server, started anew for every episode")
    args: tuple[str, ...] = Field(default=(), description="its arguments")
    env: dict[str, str] = Field(default={}, description="variables it gets besides PATH, HOME and the like")
    cwd: str | None = Field(default=None, description="folder it runs in")
    url: str = Field(default="", description="address of a server that speaks streamable HTTP")
    token_env: str | None = Field(default=None, description="variable that holds a bearer token for the address")
    timeout_s: float = Field(default=60.0, gt=0, description="seconds for one call")

    @model_validator(mode="after")
    def _one_of(self) -> "McpServer":
        if bool(self.command) == bool(self.url):
            raise ValueError("give a command or a url")
        return self


class ContainerConfig(Settings):
    """How to come by containers. Both commands are run as they are, without a shell."""

    start: tuple[str, ...] = Field(min_length=1, description=(
        "command that starts a fresh container and ends, having printed its address as its last line"))
    stop: tuple[str, ...] = Field(default=(), description="command that removes it; {url} stands for the address")
    apps: Json = Field(default={}, description="mcpServers of POST /apps; empty leaves those that the image starts")
    hooks: tuple[Json, ...] = Field(default=(), description="pre_snapshot_hooks of POST /data/snapshot")
    startup_s: float = Field(default=180.0, gt=0, description="seconds until it must be healthy")
    timeout_s: float = Field(default=600.0, gt=0, description=(
        "seconds for one request, for one tool call, and for each of both commands"))
