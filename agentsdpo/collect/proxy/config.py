"""Settings of the recording proxy. Nothing heavy is imported here."""

from typing import Literal

from pydantic import Field

from agentsdpo.settings import Settings


class ProxyConfig(Settings):
    """What is recorded, for how long a conversation stays open, and how much a client may ask for.

    >>> ProxyConfig(upstream="http://127.0.0.1:8000", store="runs/live").train_allowed
    False
    """

    upstream: str = Field(min_length=1, description="address of the engine, as in http://127.0.0.1:8000")
    store: str = Field(min_length=1, description=(
        "folder or s3://bucket/prefix of the replay store; with tenants, each has its own below it"))
    name: str = Field(default="", description="model name told to clients; empty: the engine's own")
    adapters: str = Field(default="", description=(
        "stem of adapter names: a tenant is served by the newest STEM-TENANT@vN that the engine has loaded, traffic "
        "without tenants by STEM@vN; empty: no adapters, the engine's own model for all"))
    train_allowed: bool = Field(default=False, description=(
        "whether what is recorded may be trained on; without it conversations are kept beside the store, not in it"))
    redact: Literal["off", "drop", "mask"] = Field(default="off", description=(
        "secrets in what is stored: off leaves them; drop leaves out the tokens of a branch that spells one; mask "
        "puts another token in their place and trains on nothing behind it"))
    auto_feedback: bool = Field(default=True, description=(
        "take the user's next message, edits of an answer and tool errors as feedback on the answer before"))
    max_tokens: int = Field(default=1024, ge=1, le=1_000_000, description=(
        "tokens of an answer when the client names no limit, 1 or more"))
    window: int = Field(default=0, ge=0, le=100_000_000, description=(
        "longest prompt plus answer in tokens; 0 takes the engine's"))
    idle_s: float = Field(default=900.0, gt=0.0, le=1_000_000.0, description=(
        "seconds without a request after which a conversation has ended, above 0"))
    live: int = Field(default=10_000, ge=1, le=10_000_000, description=(
        "open conversations of one tenant; beyond it the one that rested longest is ended; 1 or more"))
    timeout_s: float = Field(default=600.0, gt=0.0, le=100_000.0, description=(
        "seconds the engine may take for one answer, above 0; then the client gets 504"))
    retry_s: float = Field(default=30.0, ge=0.0, le=10_000.0, description=(
        "seconds during which an engine that is away, busy or broken is asked again, 0 or more"))
    body_s: float = Field(default=30.0, gt=0.0, le=10_000.0, description=(
        "seconds a client may take to send its request, above 0; then it gets 408"))
    body_bytes: int = Field(default=8 << 20, ge=1024, le=1 << 31, description=(
        "bytes of a request, 1024 or more; a longer one gets 413"))
    rate_per_minute: float = Field(default=6000.0, gt=0.0, le=1e9, description=(
        "requests of one key per minute, above 0; more get 429"))
    burst: int = Field(default=200, ge=1, le=1_000_000, description=(
        "requests of one key at once before the rate counts, 1 or more"))
    in_flight: int = Field(default=512, ge=1, le=1_000_000, description=(
        "requests under way over all keys, 1 or more; more get 429"))
    tenant_header: str = Field(default="", description=(
        "header that names the tenant where its key does not; empty: only keys do"))
    durability: Literal["step", "episode"] = Field(default="step", description=(
        "an answer goes out when its record has survived a power cut (step) or a killed proxy (episode)"))
    spool: str = Field(default="", description=(
        "folder on a local disk for the journals of open conversations; empty: in the store, or below "
        "~/.local/state/agentsdpo for one in a bucket"))
    poll_s: float = Field(default=0.5, gt=0.0, le=1000.0, description=(
        "seconds between two looks at which adapters and which weights the engine has, above 0"))
    run_id: str = Field(default="proxy", description="name in every episode")
