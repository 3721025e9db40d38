"""Lives inside all of vLLM's processes, in vLLM's environment: has them sleep where they would spin, on CPUs.

Between two steps engine and worker wait for each other in a loop of ``sched_yield`` (vLLM 0.32). On few cores that
takes time from the one that computes. On Linux 6.18 it is worse: two tasks that do nothing but yield carry the
scheduler's clock away from everybody else's (mended in April 2026: "sched/fair: Fix zero_vruntime tracking fix"), and
any other program of the machine then waits for seconds. vLLM finds this by the ``dist-info`` folder beside it, as a
plugin; ``agentsdpo serve`` has the folder on its path.
"""

import time
from functools import partial

NAP_S = 2e-4
"""Between two looks: far less than the step of a model on a CPU takes."""


def wait_asleep() -> None:
    """Have whoever waits for vLLM's shared memory sleep between two looks at it."""
    from vllm.distributed.device_communicators import shm_broadcast  # type: ignore[import-not-found]

    shm_broadcast.sched_yield = partial(time.sleep, NAP_S)
