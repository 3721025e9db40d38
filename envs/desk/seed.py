"""Where the shipped seed model lies. No torch here: whoever wants the weights loads them from the folder."""

import hashlib
from pathlib import Path

from agentsdpo.errors import ModelError

SHA256 = ""
"""Of ``model.safetensors`` as shipped."""


def seed_path(*, verify: bool = True) -> Path:
    """Folder of the seed model; ``AutoModelForCausalLM.from_pretrained`` takes it.

    Args:
        verify: compare the weights with the pinned hash (a few milliseconds).

    Raises:
        ModelError: the weights are missing or are not those that were shipped.
    """
    folder = Path(__file__).parent / "assets" / "seed"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"the seed model is missing: {weights}",
                         fix="reinstall, or build it: python -m agentsdpo.envs.desk.build_seed --out " + str(folder))
    if verify and hashlib.sha256(weights.read_bytes()).hexdigest() != SHA256:
        raise ModelError(f"{weights} is not the file that was shipped", fix="reinstall the package")
    return folder
