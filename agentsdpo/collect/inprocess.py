"""The in-process engine: any transformers causal LM, continuous batching, prefix reuse, exact behaviour log-probs.

One tick: seat waiting requests, encode pending prompts (ragged, in groups of like length), then one decode forward
for every active row. Requests join and leave between ticks. The engine owns its model; the learner has another.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentsdpo.collect.sampler import draw
from agentsdpo.collect.slots import GROUPED_SDPA, Plan, SlotCache, check_layers
from agentsdpo.collect.table import MIN_SHARED, Request, SlotTable
from agentsdpo.errors import ConfigError, EngineError
from agentsdpo.types import Completion, Sampling

CHUNK = 512
"""Most tokens of one row encoded in one forward."""
GROUP_TOKENS = 768
"""Most tokens, padding included, of one encoding forward: beyond it activations leave a CPU's caches."""
GROUP_WASTE = 64
"""Padding tokens at which a second forward is cheaper than more padding."""


def length_groups(sizes: np.ndarray) -> list[np.ndarray]:
    """Partition rows with ``sizes`` pending tokens into batches of like length; ascending indices
    into ``sizes``.

    >>> [g.tolist() for g in length_groups(np.array([3, 100, 4]))]
    [[1], [0, 2]]
    """
    groups: list[np.ndarray] = []
    order = np.argsort(-sizes, kind="stable")
    begin, waste = 0, 0
    for i, index in enumerate(order):
        head = int(sizes[order[begin]])
        waste += head - int(sizes[index])
        if waste > GROUP_WASTE or head * (i - begin + 1) > max(GROUP_TOKENS, head):
            groups.append(np.sort(order[begin:i]))
            begin, waste = i, 0
    return [*groups, np.sort(order[begin:])]


class InProcessEngine:
    """Continuous batching over a transformers causal LM; implements :class:`agentsdpo.collect.engine.Engine`.

    Args:
        model: a causal LM with full attention in every layer; put into eval mode and owned by the engine.
        eos_id: id or ids that end a completion.
        max_slots: requests in flight at once; further ones wait.
        window: longest prompt plus completion, in tokens; at most the model's ``max_position_embeddings``.
        version: policy version of the model's weights.
        threads: CPU threads while ticking; None leaves torch's setting.

    Raises:
        ConfigError: the window exceeds what the model's positions allow.
        ModelError: some layer does not attend to the whole past.
    """

    name = "inprocess"
    records_kept = True

    def __init__(self, model: Any, eos_id: int | Iterable[int], *, max_slots: int = 64, window: int = 1536,
                 version: int = 0, threads: int | None = None) -> None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and window > limit:
            raise ConfigError(f"window is {window} tokens but the model's positions end at {limit}",
                              fix=f"set the window to {limit} or less")
        self.eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        self.context_window, self.vocab_size = window, int(model.config.get_text_config().vocab_size)
        self._model, self._version, self._threads = model.eval(), version, threads
        self._cache = SlotCache(check_layers(model.config), max_slots, window)
        self._table = SlotTable(max_slots, window)
        self._waiting: deque[Request] = deque()
        self._driver: asyncio.Task[None] | None = None
        self.tokens_encoded = 0
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(GROUPED_SDPA)

    @property
    def version(self) -> int:
        """Policy version of the weights now loaded."""
        return self._version

    # ---------------------------------------------------------------------------------------------- requests

    async def complete(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str) -> Completion:
        """Sample one completion; see :meth:`agentsdpo.collect.engine.Engine.complete`."""
        prompt = np.asarray(prompt_ids, np.int64)
        if not 0 < len(prompt) < self.context_window:
            raise EngineError(f"a prompt of {len(prompt)} tokens leaves no room in a window of {self.context_window}",
                              fix="enlarge the window or compact the context")
        if session in {r.session for r in (*self._waiting, *self._table.requests.values()) if not r.future.done()}:
            raise EngineError(f"session {session!r} already has a call in flight", fix="await one call per branch")
        request = Request(prompt, sampling, session, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not request.future.get_loop():
            self._driver = request.future.get_loop().create_task(self._drive())
        return await request.future

    def release(self, session: str) -> None:
        """The session will send no more calls; its slot is free, its tokens stay reusable."""
        self._table.forget(session)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copy new weights in, between two tokens. Every cached prefix is dropped: keys and values are recomputed.

        Calls in flight go on under the new weights, and their version spans say where.

        Args:
            state: names and tensors of the whole model; a tied head may be left out.
            version: policy version of these weights.

        Raises:
            EngineError: names or shapes differ from the model's; nothing was loaded.
        """
        own = dict(self._model.named_parameters(remove_duplicate=False))
        own.update(self._model.named_buffers(remove_duplicate=False))
        given = {own[name].data_ptr() for name in state if name in own}
        needed = {n for n in self._model.state_dict() if n not in state and own[n].data_ptr() not in given}
        wrong = {n for n, t in state.items() if n not in own or own[n].shape != t.shape}
        if needed or wrong:
            raise EngineError(f"weights of version {version} lack {sorted(needed)[:3]} and do not fit "
                              f"{sorted(wrong)[:3]}", fix="publish the whole model of the same architecture")
        self._model.load_state_dict(state, strict=False)
        self._version = version
        self._table.cached[:] = 0

    # -------------------------------------------------------------------------------------------------- ticks

    async def _drive(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while self._waiting or self._table.requests:
            try:
                with torch.inference_mode():
                    self._tick()
            except Exception as error:
                self._fail(error)
                raise
            await asyncio.sleep(0)

    def _fail(self, error: Exception) -> None:
        """Tell everyone who waits; the slots are empty afterwards."""
        requests = [*self._waiting, *self._table.requests.values()]
        self._waiting.clear()
        for slot in list(self._table.requests):
            self._table.drop(slot)
        self._table.cached[:] = 0
        for request in requests:
            if not request.future.done():
                fault = EngineError(f"the model's forward failed: {error!r}", fix="see the cause")
                fault.__cause__ = error
                request.future.set_exception(fault)

    def _tick(self) -> None:
        self._table.clock += 1
        for slot in [s for s, r in self._table.requests.items() if r.future.done()]:
            self._table.drop(slot)
        self._seat()
        self._encode(np.flatnonzero(self._table.pending > 1))
        self._decode(np.flatnonzero(self._table.pending == 1))

    def _seat(self) -> None:
        """Seat waiting requests; take prefixes from slots that hold them, encoding a shared one once."""
        cold: list[int] = []
        while self._waiting:
            if not self._waiting[0].future.done():
                known = self._waiting[0].session in self._table.slot_of
                slot = self._table.seat(self._waiting[0])
                if slot is None:
                    break
                new = not known or not self._table.cached[slot]
                if new and self._table.known[slot] - self._table.cached[slot] > MIN_SHARED:
                    cold.append(slot)
            self._waiting.popleft()
        cold = self._borrow(cold)
        if len(cold) > 1 and self._table.prompt_overlap(cold[0], cold[1:]):
            self._encode(np.array(cold[:1]))
            self._borrow(cold[1:])

    def _borrow(self, slots: list[int]) -> list[int]:
        """Copy cached prefixes into these slots; returns those for which no slot has one worth copying."""
        table, groups, cold = self._table, {}, []
        for slot in slots:
            source, length = table.best_source(slot)
            if length >= table.cached[slot] + MIN_SHARED:
                groups.setdefault((source, length), []).append(slot)
            elif not table.cached[slot]:
                cold.append(slot)
        for (source, length), targets in groups.items():
            self._cache.copy_prefix(source, torch.tensor(targets, device=self._model.device), length)
            table.cached[targets] = length
        return cold

    def _encode(self, rows: np.ndarray) -> None:
        """Encode pending tokens of rows that have several; sample for those that come to their end."""
        if not rows.size:
            return
        table = self._table
        sizes = np.minimum(table.pending[rows], CHUNK)
        for group in length_groups(sizes):
            slots, count = rows[group], sizes[group]
            offset = np.arange(int(count.max())) - (count.max() - count)[:, None]
            at = table.cached[slots][:, None] + np.maximum(offset, 0)
            logits = self._forward(slots, table.tokens[slots[:, None], at], at, offset < 0)
            table.cached[slots] += count
            ready = np.flatnonzero(table.cached[slots] == table.known[slots])
            if ready.size:
                self._sample(slots[ready], logits[torch.from_numpy(ready)] if ready.size < len(slots) else logits)

    def _decode(self, rows: np.ndarray) -> None:
        """One token for every row with one pending; idle slots between them are carried along if they are few."""
        if not rows.size:
            return
        table, low, high = self._table, int(rows[0]), int(rows[-1]) + 1
        slots = np.arange(low, high) if high - low <= 2 * rows.size else rows
        idle = np.ones(high - low, bool)
        idle[rows - low] = False
        idle = idle[slots - low][:, None]
        at = np.where(idle, 0, table.cached[slots][:, None])
        logits = self._forward(slots, table.tokens[slots[:, None], at], at, idle)
        table.cached[rows] += 1
        self._sample(rows, logits[torch.from_numpy(rows - low)] if len(slots) > len(rows) else logits)

    def _forward(self, slots: np.ndarray, ids: np.ndarray, at: np.ndarray, void: np.ndarray) -> Tensor:
        """Logits after each row's last token, float[R, V].

        Args:
            slots: int64[R] ascending or not; consecutive ones are read without copying.
            ids: int64[R, Q], left-padded. at: their positions; void: bool, True for padding.
        """
        device, window = self._model.device, self.context_window
        length = int(at.max()) + 1
        consecutive = bool((np.diff(slots) == 1).all())
        span = slice(int(slots[0]), int(slots[-1]) + 1) if consecutive else None
        place = torch.from_numpy(np.where(void, window, at)).to(device)
        self._cache.follow(Plan(torch.from_numpy(slots).to(device), span, place, length))
        mask = np.where(np.arange(length) <= at[:, :, None], np.float32(0), np.float32(-np.inf))[:, None]
        self.tokens_encoded += int((~void).sum())
        out = self._model(input_ids=torch.from_numpy(ids).to(device), position_ids=torch.from_numpy(at).to(device),
                          attention_mask=torch.from_numpy(mask).to(device, self._model.dtype),
                          past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def _sample(self, rows: np.ndarray, logits: Tensor) -> None:
        """Draw one token per row; hand back the completions that ended."""
        table = self._table
        drawn = draw(logits, table.sampling.take(rows), table.uniforms[rows, table.known[rows]])
        table.append(rows, drawn, self._version)
        stopped = np.isin(drawn.ids, self.eos_ids)
        for i in np.flatnonzero(stopped | (table.known[rows] >= table.limit[rows])).tolist():
            request, completion = table.finish(int(rows[i]), stopped=bool(stopped[i]))
            if not request.future.done():
                request.future.set_result(completion)
