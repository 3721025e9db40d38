"""What a published policy version says of itself."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from agentsdpo.errors import CorruptionError
from agentsdpo.types import Frozen

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of an adapter, named and shaped as peft writes them and engines read them."""


class Manifest(Frozen):
    """Identity and provenance of one policy version; ``manifest.json`` in its folder."""

    version: int = Field(ge=0, description="grows by one with each publish")
    parent: int | None = Field(default=None, ge=0, description="version it was trained from; None for the first")
    weights_id: str = Field(description="equal ids are equal weights: sha256 of the weights file; of an adapter, of "
                                        "base and files together")
    kind: Literal["full", "adapter"] = Field(default="full", description="full weights, or an adapter on a base")
    base: int | None = Field(default=None, ge=0, description="version of full weights the adapter stands on")
    base_weights_id: str | None = Field(default=None, description="weights_id of that version")
    dtype: str = Field(description="data type of the tensors, 'mixed' when there are several")
    base_model: str = Field(description="name or path of the model the first version came from")
    tokenizer_sha256: str
    chat_template_sha256: str
    learner_step: int = Field(ge=0, description="optimiser steps behind these weights")
    files: dict[str, str] = Field(description="file name -> sha256 of its bytes")
    tied: dict[str, str] = Field(default={}, description="tensor left out -> stored tensor that it shares memory with")
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"),
                         description="UTC; for people, never for order")

    @model_validator(mode="after")
    def _adapter_names_its_base(self) -> Self:
        if (self.kind == "adapter") != (self.base is not None and self.base_weights_id is not None):
            raise ValueError(f"kind is {self.kind!r} but base is {self.base} with weights {self.base_weights_id}")
        return self


def adapter_weights_id(base_weights_id: str, files: dict[str, str]) -> str:
    """The ``weights_id`` of an adapter: equal bases with equal files are equal weights.

    >>> adapter_weights_id("a", {"x": "1"}) == adapter_weights_id("b", {"x": "1"})
    False
    """
    text = "\n".join([base_weights_id, *(f"{name} {digest}" for name, digest in sorted(files.items()))])
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one version's folder.

    Raises:
        CorruptionError: it is missing, unreadable, or of another version than the folder's name says.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptionError(f"{path} cannot be read: {str(error).splitlines()[0]}",
                              fix="restore the folder from a copy, or publish this version again") from error
    if manifest.version != int(folder.name):
        raise CorruptionError(f"{path} is of version {manifest.version} but stands in folder {folder.name}",
                              fix="give each version the folder it was published in")
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the hash it was published with.

    Raises:
        CorruptionError: a file is missing or its bytes changed; names the file and both hashes.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            found = file_sha256(path)
        except FileNotFoundError:
            found = "missing"
        if found != expected:
            raise CorruptionError(f"{path} of policy version {manifest.version} has sha256 {found[:16]}, published was "
                                  f"{expected[:16]}", fix="restore it from a copy; do not train or sample from it")
