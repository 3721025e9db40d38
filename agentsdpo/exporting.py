"""A policy version as a model folder, to be taken elsewhere.

    agentsdpo export RUN my-model

A version in a registry is weights and no more. With the model it was trained from it becomes a folder that
transformers, vLLM and every ``--model`` here can load.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from agentsdpo.chat import ChatFormat
from agentsdpo.errors import ConfigError, TokenizerMismatch
from agentsdpo.learn.load import load_chat, load_model, take_weights
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.tensors import unwritten
from agentsdpo.publishing import trained_from


def export(registry: PolicyRegistry, version: int, out: Path, *, model: str | None = None) -> Path:
    """Write one version as a model folder: configuration, weights as one dtype, tokenizer and chat template.

    Args:
        registry: where the version is. version: which.
        out: the folder; it appears when it is whole.
        model: folder or hub name of the model it was trained from; the manifest's own when not given.

    Raises:
        ConfigError: ``out`` is there already, or nobody says which model it was.
        RegistryError, CorruptionError: no such version, or it is damaged; or ``out`` cannot be written.
        ModelError, TokenizerMismatch: the model cannot be loaded, or is another one.
    """
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is there already", fix="name a folder that is not, or delete it first")
    manifest = registry.manifest(version)
    base = trained_from(registry, version, model)
    chat = load_chat(base)
    if manifest.tokenizer_sha256 not in ("", chat.tokenizer_sha256):
        raise TokenizerMismatch(f"version {version} is of tokenizer {manifest.tokenizer_sha256[:12]!r}, that of {base} "
                                f"is {chat.tokenizer_sha256[:12]!r}", fix="name the model it was trained from: --model")
    found = load_model(base, chat, dtype="bfloat16" if manifest.dtype == "bfloat16" else "float32")
    take_weights(found, registry.load(version))
    try:
        _write(found, chat, out)
    except (SafetensorError, OSError) as error:
        raise unwritten(error, out) from error
    return out


def _write(model: Any, chat: ChatFormat, out: Path) -> None:
    """The folder, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        model.save_pretrained(part)
        chat.tokenizer.save_pretrained(part)
        part.chmod(0o755)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
