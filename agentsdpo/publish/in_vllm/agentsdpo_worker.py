"""Lives inside vLLM's workers, in vLLM's environment: what a reload of weights forgets on CPUs.

On a CPU vLLM packs the weight of each linear layer into a copy, and a reload packs the layers anew that the checkpoint
names. An output layer tied to the embedding is not named: without this it goes on with the old weights (vLLM 0.32; the
model served is then neither the old nor the new one). ``agentsdpo serve`` starts vLLM with
``--worker-extension-cls agentsdpo_worker.TiedHead`` and this folder on its path. Imports nothing.
"""

from collections import Counter
from typing import Any


class TiedHead:
    """Mixed into vLLM's worker; its methods can be called by ``/collective_rpc``."""

    def repack_tied_layers(self) -> int:
        """Pack anew every layer whose weight is another layer's too; returns how many."""
        model: Any = self.get_model()  # type: ignore[attr-defined]  # of the worker
        packed = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
        owners = Counter(layer.weight.data_ptr() for layer in packed if layer.weight.numel())
        tied = [layer for layer in packed if owners[layer.weight.data_ptr()] > 1]
        for layer in tied:
            layer.quant_method.process_weights_after_loading(layer)
        return len(tied)
