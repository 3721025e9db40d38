"""What the collector costs beside a bare load generator, and whether its log-probs are the learner's.

    python -m agentsdpo.benchmarks.perf.serving_collector [--json]

One vLLM server with the seed model, 32 episodes of the built-in world at once. A call of that world has 18 tokens,
which a server of this size samples in no time (``collector_vs_raw_vllm_short``); agents that think say more, so for
``collector_vs_raw_vllm`` the server samples 128 tokens a call, of which the agent's turn is the beginning. In each
round the collector plays episodes while every call is noted; then a client of a few lines sends the very same prompts
again and asks for the same numbers of tokens: one connection per episode slot, bodies made beforehand, answers not even
decoded, no environment between two calls. The order alternates from round to round; each half has a prefix cache of its
own (by salt). Both halves sample the same number of tokens, so that the ratio of throughputs is that of the times.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from agentsdpo.benchmarks.perf.figure import Figure, run_all, tell
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.vllm import VllmEngine
from agentsdpo.collect.vllm.wire import GENERATE, generate_body
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.learn.load import load_chat
from agentsdpo.learn.scoring import ModelScorer
from agentsdpo.publish.push import BOUND, mean_difference
from agentsdpo.serve import ServeOptions, Server
from agentsdpo.types import Completion, Episode, Json, Sampling

CONCURRENCY, SCORED = 32, 24
SHORT, LONG = (8, 96), (6, 96)
"""Rounds, and episodes in each."""
THOUGHT = 128
"""Tokens of a call of an agent that thinks."""
BOUND_S = 500.0
"""Seconds after which no further round begins."""
Calls = list[tuple[list[int], int]]
"""Of one episode, in order: the prompt, and how many tokens were sampled."""


class Noting(VllmEngine):
    """The engine, which also notes what was asked of it, by episode."""

    def __init__(self, url: str, **more: object) -> None:
        super().__init__(url, **more)  # type: ignore[arg-type]
        self.noted: dict[str, Calls] = {}

    async def complete(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str) -> Completion:
        """As the engine does."""
        done = await super().complete(prompt_ids, sampling, session=session)
        self.noted.setdefault(session.split("/")[0], []).append((list(prompt_ids), len(done.token_ids)))
        return done


class Thinking(Noting):
    """The engine before a server that samples :data:`THOUGHT` tokens whatever comes; a turn is what precedes its end.
    """

    def __init__(self, url: str, **more: object) -> None:
        super().__init__(url, **more)
        self._send, self._line.send = self._line.send, self._longer  # type: ignore[method-assign]

    async def _longer(self, method: str, path: str, body: Json | None = None) -> object:
        if body is not None:
            body["sampling_params"] |= {"max_tokens": THOUGHT, "ignore_eos": True, "stop_token_ids": []}
        return await self._send(method, path, body)

    async def complete(self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str) -> Completion:
        """As the engine does, up to the end of the turn."""
        done = await super().complete(prompt_ids, sampling, session=session)
        n = next((i + 1 for i, token in enumerate(done.token_ids) if token in self.eos_ids), len(done.token_ids))
        spans = tuple(span.model_copy(update={"end": min(span.end, n)}) for span in done.versions if span.start < n)
        return done.model_copy(update={"token_ids": done.token_ids[:n], "logprobs": done.logprobs[:n],
                                       "versions": spans, "finish_reason": "stop"})


def bodies(calls: Calls, salt: str) -> list[bytes]:
    """The same calls as requests, with their lengths fixed."""
    made = []
    for prompt, n in calls:
        body = generate_body(prompt, Sampling(max_tokens=n), model="policy", request_id="", salt=salt)
        body["sampling_params"] |= {"ignore_eos": True, "min_tokens": n}
        del body["request_id"]
        data = json.dumps(body).encode()
        made.append(f"POST {GENERATE} HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(data)}\r\n\r\n".encode() + data)
    return made


async def replay(url: str, episodes: list[list[bytes]]) -> None:
    """Send all requests, those of one episode one after the other, :data:`CONCURRENCY` episodes at a time."""
    left = iter(episodes)
    place = urlsplit(url)

    async def slot() -> None:
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=2**24)
        for requests in left:
            for request in requests:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                assert head.startswith(b"http/1.1 200"), head
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*(slot() for _ in range(CONCURRENCY)))


class Bench:
    """One server, one collector.

    Args:
        url: of the server. kind: of engine. episodes: of a round.
    """

    def __init__(self, url: str, kind: type[Noting], episodes: int) -> None:
        self.chat, self.size = load_chat(seed_path()), episodes
        self.engine = kind(url, eos_ids=(self.chat.eos_id,), vocab_size=1024)
        config = CollectConfig(concurrency=CONCURRENCY, window=1536, max_tokens=256)
        self.collector = Collector.of_engine(DeskSuite("desk-mini"), self.engine, self.chat, config)
        self.episodes: list[Episode] = []
        self.cpu_s, self.played = 0.0, 0

    def collect(self, round_: int) -> float:
        """Play new episodes; seconds, and the CPU's in :attr:`cpu_s`."""
        self.engine.noted = {}
        self.engine.use("policy")
        indices = range(round_ * self.size, (round_ + 1) * self.size)
        began, spent = time.perf_counter(), time.process_time()
        self.episodes = self.collector.collect("train", indices)
        self.cpu_s += time.process_time() - spent
        self.played += sum(len(calls) for calls in self.engine.noted.values())
        return time.perf_counter() - began

    def raw(self, noted: list[Calls], salt: str) -> float:
        """Send the same calls bare; seconds."""
        made = [bodies(calls, salt) for calls in noted]
        began = time.perf_counter()
        asyncio.run(replay(self.engine.url, made))
        return time.perf_counter() - began

    def round(self, number: int, salt: str) -> tuple[float, float, int]:
        """Seconds of collector and load generator, and the tokens each sampled; ``salt`` begins that of the latter.

        In odd rounds the load generator goes first, with the calls of the round before.
        """
        before = list(self.engine.noted.values())
        if number % 2 and before:
            raw = self.raw(before, f"{salt}{number}")
            tokens_raw = sum(n for calls in before for _, n in calls)
            mine = self.collect(number)
            tokens = sum(n for calls in self.engine.noted.values() for _, n in calls)
            return mine * tokens_raw / tokens, raw, tokens_raw
        mine = self.collect(number)
        noted = list(self.engine.noted.values())
        return mine, self.raw(noted, f"{salt}{number}"), sum(n for calls in noted for _, n in calls)


def parity_nats(episodes: Sequence[Episode]) -> tuple[float, int]:
    """Mean absolute difference of recorded log-probs and the learner's own, nats, and over how many tokens."""
    scorer = ModelScorer(seed_path())
    told, own = [], []
    for episode in episodes:
        for branch in episode.branches:
            for call in branch.calls:
                told += branch.logprobs[call.start:call.end].tolist()
                own += scorer.logps(branch.token_ids[:call.end].tolist(), call.end - call.start)
    return mean_difference(told, own), len(told)


def ratio(name: str, bench: Bench, rounds: int, salt: str) -> Figure:
    """Median over rounds of the load generator's seconds over the collector's."""
    began = time.monotonic()
    bench.collect(rounds)  # warms up both sides
    bench.cpu_s, bench.played, found = 0.0, 0, list[tuple[float, float, int]]()
    for number in range(rounds):
        if found and time.monotonic() - began > BOUND_S / 2:
            break
        found.append(bench.round(number, salt))
        mine, raw, tokens = found[-1]
        tell(f"{name}, round {number + 1} of {rounds}: {raw / mine:.3f} ({tokens / mine:.0f} and {tokens / raw:.0f} "
             "tokens/s)")
    ratios, tokens = [raw / mine for mine, raw, _ in found], sum(n for _, _, n in found)
    calls = sum(len(calls) for calls in bench.engine.noted.values())
    return Figure(name, round(statistics.median(ratios), 4), "ratio", "bare load generator", {
        "collector_tok_s": round(tokens / sum(mine for mine, _, _ in found)),
        "raw_tok_s": round(tokens / sum(raw for _, raw, _ in found)), "rounds": len(found),
        "collector_cpu_ms_per_call": round(1000 * bench.cpu_s / bench.played, 2),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)], "concurrency": CONCURRENCY,
        "tokens_per_call": round(sum(n for c in bench.engine.noted.values() for _, n in c) / calls, 1)})


def measure() -> Iterator[Figure]:
    """Start a server, run the rounds, stop it."""
    with Server.start(ServeOptions(str(seed_path()), port=0, adapters=0)) as server:
        tell(f"the server answers after {server.started_s:.0f} s")
        yield ratio("collector_vs_raw_vllm", Bench(server.url, Thinking, LONG[1]), LONG[0], "long")
        bench = Bench(server.url, Noting, SHORT[1])
        yield ratio("collector_vs_raw_vllm_short", bench, SHORT[0], "short")
        nats, scored = parity_nats(bench.episodes[:SCORED])
        yield Figure("logprob_parity_nats", nats, "nats", None, {"tokens": scored, "bound": BOUND})


if __name__ == "__main__":
    run_all(__doc__ or "", {"collector": measure})
