"""Starting a vLLM server with the flags that recording needs, waiting until it answers, and stopping it.

vLLM lives in an environment of its own (``make vllm``), since each of its releases pins one torch and a narrow range
of transformers. Its control endpoints are not guarded by a key: the server listens on loopback unless told otherwise.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from agentsdpo.errors import ConfigError, EngineError
from agentsdpo.files import named

LOOPBACK = "127.0.0.1"
VENV = ".venv-vllm/bin/python"
_MODULE = "vllm.entrypoints.openai.api_server"  # the distribution for CPUs has no working `vllm` command
_CONTROL = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
_IN_VLLM = Path(__file__).resolve().parent / "publish" / "in_vllm"
# Clients keep a connection for 5 s, as vLLM does: a request on one that is closed in that moment is lost.
_UNLESS_SET = {"HF_HUB_OFFLINE": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "65"}
# On few cores nobody may spin: publish/in_vllm/agentsdpo_waiting.py.
_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}

_OURS = ("VIRTUAL_ENV", "PYTHONPATH", "GOMP_SPINCOUNT")
"""What must not leak into vLLM: its environment is another, and the last, set by our own command line, would outdo
``OMP_WAIT_POLICY``."""


@dataclass(frozen=True)
class ServeOptions:
    """How a server is started.

    Attributes:
        model: folder or hub name. name: what requests call it. host, port: where it listens; port 0 takes a free one.
        gpu: leave device, data type and graphs to vLLM; else float32 on the CPU, without compilation.
        window: longest prompt plus completion, tokens; None is the model's own.
        adapters: adapters that may be loaded at once, 0 serves none; max_rank: of the largest of them.
        kept_sets: return the set each token was drawn from when top-k is on (GPUs only).
        version: policy version of the weights it starts with.
        extra: further arguments for vLLM.
    """

    model: str
    name: str = "policy"
    host: str = LOOPBACK
    port: int = 8000
    gpu: bool = False
    window: int | None = 4096
    adapters: int = 8
    max_rank: int = 32
    kept_sets: bool = False
    version: int = 0
    extra: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if self.kept_sets and not self.gpu:
            raise ConfigError("--kept-sets needs --gpu: vLLM has no sampling mask on CPUs",
                              fix="collect with top_p 1 and top_k 0")


def find_vllm() -> list[str]:
    """The start of the command: the interpreter that has vLLM and its server module, or the ``vllm`` on the PATH.

    Looked for in ``AGENTSDPO_VLLM_PYTHON``, then ``.venv-vllm`` beside the package and in the current folder.

    Raises:
        ConfigError: there is none.
    """
    named = os.environ.get("AGENTSDPO_VLLM_PYTHON")
    if named:
        if not os.access(named, os.X_OK):
            raise ConfigError(f"AGENTSDPO_VLLM_PYTHON is {named}, which cannot be run",
                              fix="set it to the python of an environment that has vLLM")
        return [named, "-m", _MODULE]
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if os.access(root / VENV, os.X_OK):
            return [str(root / VENV), "-m", _MODULE]
    command = shutil.which("vllm")
    if command is None:
        raise ConfigError("there is no vLLM here: no .venv-vllm, no vllm on the PATH",
                          fix="make one with: make vllm (CPU), or install vllm and set AGENTSDPO_VLLM_PYTHON")
    return [command, "serve"]


def command(options: ServeOptions, vllm: Sequence[str], port: int) -> list[str]:
    """The whole command line; see ``docs/serving.md`` for why each flag is there.

    >>> " ".join(command(ServeOptions("m", gpu=True, adapters=0), ["vllm", "serve"], 8000))
    'vllm serve --model m --served-model-name policy --host 127.0.0.1 --port 8000 --logprobs-mode processed_logprobs
    --generation-config vllm --enable-scale-out --max-model-len 4096'
    """
    words = [*vllm, "--model", options.model, "--served-model-name", options.name, "--host", options.host,
             "--port", str(port), "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
             "--enable-scale-out"]
    words += ["--max-model-len", str(options.window)] if options.window else []
    if options.adapters:
        words += ["--enable-lora", "--max-loras", str(options.adapters), "--max-lora-rank", str(options.max_rank)]
    if options.kept_sets:
        words.append("--return-sampling-mask")
    if not options.gpu:
        # A reload of weights forgets a tied output layer: publish/in_vllm/agentsdpo_worker.py.
        words += ["--worker-extension-cls", "agentsdpo_worker.TiedHead"]
        # In chunks, a prompt of a request with a seed ends the server: generators of CPUs cannot be wound back.
        words += ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill",
                  "--max-num-batched-tokens", str(max(8192, options.window or 0))]
    return [*words, *options.extra]


def environment(options: ServeOptions) -> dict[str, str]:
    """The server's environment: the caller's (with ``VLLM_API_KEY``, which so shows in no list of processes)."""
    chosen = _UNLESS_SET if options.gpu else _UNLESS_SET | _CPU
    own = _CONTROL | {key: os.environ.get(key, value) for key, value in chosen.items()}
    own |= {} if options.gpu else {"PYTHONPATH": str(_IN_VLLM)}
    return {key: value for key, value in os.environ.items() if key not in _OURS} | own


def free_port(host: str = LOOPBACK, port: int = 0) -> int:
    """A port nobody listens on at this moment: the given one, or any.

    Raises:
        ConfigError: somebody listens there, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be listened on ({error.strerror})",
                              fix="stop what listens there, or take another --port; 0 takes a free one") from error
        return probe.getsockname()[1]


class Server:
    """A running server; a context manager that stops it.

    Attributes:
        url: its address. log: file that holds what vLLM prints, readable by its owner alone. started_s: seconds it
        took to answer.
    """

    def __init__(self, options: ServeOptions, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.options, self.url, self.log, self.started_s = options, url, log, 0.0
        self._process = process

    @classmethod
    def start(cls, options: ServeOptions, *, log: Path | None = None, timeout_s: float = 900.0,
              tell: Callable[[float], None] = lambda waited_s: None) -> Self:
        """Start a server and wait until it answers.

        Args:
            options: see the class.
            log: where its output goes; a temporary file when not given.
            timeout_s: seconds after which it is given up.
            tell: called about every second with the seconds waited.

        Raises:
            ConfigError: there is no vLLM here, or the port is taken.
            OutputError: the log cannot be written.
            EngineError: it ended or did not answer in time; the message holds the end of its log.
        """
        port = free_port(options.host, options.port)  # taken, its owner would be mistaken for the new server
        words = command(options, find_vllm(), port)
        path = log or Path(tempfile.mkstemp(prefix="agentsdpo-vllm-", suffix=".log")[1])
        with named(path):
            own = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(own, "wb") as out:
            process = subprocess.Popen(words, env=environment(options), stdout=out, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
        reach = LOOPBACK if options.host in ("0.0.0.0", "::") else options.host
        server = cls(options, process, f"http://{f'[{reach}]' if ':' in reach else reach}:{port}", path)
        try:
            server._await(timeout_s, tell)
            server._label()
        except BaseException:
            server.stop()
            raise
        return server

    def _await(self, timeout_s: float, tell: Callable[[float], None]) -> None:
        import httpx

        began = time.monotonic()
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as client:
            while True:
                self.started_s = time.monotonic() - began
                try:
                    if client.get("/health").status_code == 200:
                        return
                except httpx.TransportError:  # not listening yet; that it ended is seen below
                    pass
                if self._process.poll() is not None:
                    raise EngineError(f"vLLM ended with code {self._process.returncode} while starting; the end of "
                                      f"{self.log}:\n{self.tail()}", fix="mend what it says")
                if self.started_s > timeout_s:
                    raise EngineError(f"vLLM did not answer within {timeout_s:.0f} s; the end of {self.log}:\n"
                                      f"{self.tail()}", fix="wait longer, or mend what it says")
                tell(self.started_s)
                time.sleep(0.5)

    def _label(self) -> None:
        """Say which policy version the weights are: an unset label would make every token untrainable."""
        from agentsdpo.collect.vllm.retry import Asker
        from agentsdpo.collect.vllm.server import headers

        with Asker(self.url, headers(None)) as ask:
            ask.send("POST", "/update_weight_version", {"new_version": str(self.options.version)})

    def tail(self, lines: int = 15) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def pid(self) -> int:
        """Process id of the server, which leads a process group of its own."""
        return self._process.pid

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit code."""
        return self._process.wait()

    def running(self) -> bool:
        """Whether the server's process is there."""
        return self._process.poll() is None

    def stop(self, patience_s: float = 15.0) -> None:
        """Stop the server and all its workers: as Ctrl-C would, then for good."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if self._signal(number):
                try:
                    self._process.wait(patience_s)
                    break
                except subprocess.TimeoutExpired:
                    continue
        self._signal(signal.SIGKILL)
        self._process.wait()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> bool:
        """Send to the whole group; False when nobody is left in it."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
