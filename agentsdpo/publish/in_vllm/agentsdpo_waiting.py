"""Lives inside all of vLLM's processes, in vLLM's environment: has them sleep where they would spin, on CPUs.

Between two steps engine and worker wait for each other in a loop of ``sched_yield`` (vLLM 0.32). On few cores that
takes time from the one that computes. On a machine of two cores with Linux 6.18.44 it was worse: programs that were
ready to run then waited for up to 5 s, all of that on the run queue, and no longer did once nobody yielded. vLLM finds
this by the ``dist-info`` folder beside it, as a plugin; ``agentsdpo serve`` has the folder on its path.
"""

import time
from functools import partial

NAP_S = 2e-4
"""Between two looks: far less than the step of a model on a CPU takes."""


def wait_asleep() -> None:
    """Have whoever waits for vLLM's shared memory sleep between two looks at it."""
    from vllm.distributed.device_communicators import shm_broadcast  # type: ignore[import-not-found]

    shm_broadcast.sched_yield = partial(time.sleep, NAP_S)
