"""Child process of the crash tests: imports once, then forks a writer per line of standard input."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from replay_factories import make_episode  # noqa: E402

from agentsdpo.replay import ReplayStore  # noqa: E402


def write(seed: int, rounds: int, acks: str, root: str) -> None:
    """Append one episode at a time; its id goes to ``acks`` once the append has returned."""
    store = ReplayStore.open(root)
    log = os.open(acks, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    for i in range(rounds):
        episode = make_episode(seed * 10_000 + i, size=40)
        store.append([episode])
        os.write(log, f"{episode.episode_id}\n".encode())


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "wait":
            os.waitpid(int(words[1]), 0)
            print("gone", flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            write(int(words[0]), int(words[1]), words[2], words[3])
            os._exit(0)
        print(pid, flush=True)


main() if __name__ == "__main__" else None
