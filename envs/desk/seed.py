"""Where the shipped seed model lies. No torch here: whoever wants the weights loads them from the folder."""

import hashlib
from pathlib import Path

from agentsdpo.errors import ModelError

SHA256 = "7a68d25a724efec2f9fb0ae087990713373ce7c6eed51e986e10d387e84d374d"
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
                         fix="reinstall, or build one with python -m agentsdpo.envs.desk.build_seed --out DIR and use "
                             "--set model=DIR")
    if verify and hashlib.sha256(weights.read_bytes()).hexdigest() != SHA256:
        raise ModelError(f"{weights} is not the file that was shipped",
                         fix="reinstall the package, or name a model of your own: --set model=FOLDER")
    return folder
