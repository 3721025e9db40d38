"""Full weights into a server's GPUs without a disk: vLLM's native transfer, as a plug-in.

Nothing imports this module unless it is asked for, and it needs neither torch nor vLLM itself: whoever uses it brings
a :class:`Sender`, a few lines around vLLM's ``WeightTransferTrainerFactory`` in an environment that has vLLM::

    # mine.py, for: agentsdpo publish RUN/policies --to URL --with mine:pusher
    from agentsdpo.publish.nccl import NcclPusher

    def pusher(scorer, bound):
        return NcclPusher(scorer, MySender, bound=bound)

The ordering is what breaks when it is done by hand: the rendezvous and the broadcast each block on both sides, so that
either half must run beside the other; ``/start_weight_update`` must have returned before a byte is sent. NCCL has no
time-out: the sender runs on a daemon thread and the HTTP call carries the time-out. A server left with half the
weights gets those of before from disk, as after a failed reload.

Tested against stand-ins for both sides; never run over NCCL itself.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agentsdpo.errors import PushError
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.push import BOUND, Connect, Scorer
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.types import Json

JOIN_S = 60.0
"""Seconds that the sender may need longer than the server's answer."""


class Sender(Protocol):
    """The learner's side of one transfer; rank 0, the servers take ranks from 1."""

    def init_info(self) -> Json:
        """What the server needs to find this side: address, port, rank offset, world size."""
        ...

    def join(self) -> None:
        """Meet the server; blocks until it is there."""
        ...

    def update_info(self) -> Json:
        """Names, dtypes and shapes, in exactly the order of :meth:`send`."""
        ...

    def send(self) -> None:
        """Broadcast all tensors; blocks until the server has them."""
        ...

    def leave(self) -> None:
        """Tear the group down; also after a failure."""
        ...


class NcclPusher(ReloadPusher):
    """Pushes full weights by ``/update_weights``; everything around it is as in a reload.

    Args:
        scorer: says what the log-probs must be.
        sender: makes this side of a transfer from the weights of a version, by name.
        bound, connect: see :class:`~agentsdpo.publish.push_full.ReloadPusher`.
    """

    def __init__(self, scorer: Scorer, sender: Callable[[Mapping[str, Any]], Sender], *, bound: float = BOUND,
                 connect: Connect = VllmControl) -> None:
        super().__init__(scorer, bound=bound, connect=connect)
        self._sender = sender

    def _transfer(self, registry: PolicyRegistry, version: int, server: VllmControl) -> None:
        """Rendezvous, start, broadcast, finish; the server is paused."""
        sender = self._sender(registry.load(version))
        try:
            info = sender.init_info()
            _beside(sender.join, lambda: server.post("/init_weight_transfer_engine", {"init_info": info}))
            server.post("/start_weight_update", {})
            update = sender.update_info()
            _beside(sender.send, lambda: server.post("/update_weights", {"update_info": update}))
            server.post("/finish_weight_update", {"weight_version": str(version)})
        finally:
            sender.leave()
            server.post("/shutdown_weight_transfer_engine", {})


def _beside(ours: Callable[[], None], theirs: Callable[[], Json]) -> None:
    """Run both halves of something that blocks on both sides.

    Raises:
        PushError: either half failed, or ours did not end after theirs had.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            ours()
        except BaseException as error:  # noqa: BLE001 (told to whoever waits)
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    theirs()
    thread.join(JOIN_S)
    if thread.is_alive():
        raise PushError(f"the server answered but the sender did not end within {JOIN_S:g} s",
                        fix="names, dtypes and shapes must be told in the order in which they are sent")
    if failed:
        raise PushError(f"the sender failed: {failed[0]!r}", fix="see the cause") from failed[0]
