"""An office without containers: the files and the mail of an APEX world, held in memory, and the tools to work on them.

It stands in for the world's apps where those cannot run: lists, reads and writes files, reads and sends mail, takes the
final answer. The world itself is shared by all episodes and never changes; each keeps what it wrote on top of it, so
that no path reaches the machine it runs on. Documents are read as text; what is written is text.
"""

import base64
import email.policy
import hashlib
import json
from collections.abc import Callable
from email.message import EmailMessage
from fnmatch import fnmatchcase
from typing import Any

from agentsdpo.envs.archives import Entry, Files, UnsafePath, safe_path, zip_bytes
from agentsdpo.envs.documents import body, headers, parsed_mail, readable
from agentsdpo.types import ErrorKind, Json, Outcome, Task, ToolCall, ToolResult, ToolSpec, printable

SYSTEM = """\
You work in an office with a file system and a mailbox. Do what the request asks, with the tools you have.
When you are done, call final_answer with your answer; files that are asked for must exist by then."""
ROOT, MAIL = "filesystem/", ".apps_data/mail/"
MOST_WRITTEN, MOST_CHANGED = 10 << 20, 2_000
"""Bytes an episode may write in one go, and files it may change."""
_PAGE = 500
"""Names or lines in one answer."""


class _Fault(Exception):
    """What a tool refuses; its text is the answer."""


def _spec(name: str, description: str, required: tuple[str, ...], *, mutates: bool = False, **fields: Json) -> ToolSpec:
    schema = {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}
    return ToolSpec(name=name, description=description, parameters=schema, mutates=mutates)


_TEXT, _PATH = {"type": "string"}, {"type": "string", "description": "path below the root, as in reports/q3.docx"}
_FROM = {"type": "integer", "minimum": 1, "description": "first line or entry to show, from 1"}
_STATUS = {"type": "string", "enum": ["completed", "blocked", "failed"]}
FINAL = _spec("final_answer", "Hand in the final answer. Ends the task.", ("answer",), mutates=True, answer=_TEXT,
              status=_STATUS)
TOOLS: tuple[ToolSpec, ...] = (
    _spec("filesystem_server_list_files", "List files below a folder, with their size in bytes.", (), path=_PATH,
          pattern={"type": "string", "description": "as in *.xlsx"}, start=_FROM),
    _spec("filesystem_server_read_file", "Read a file as text; sheets as cells, documents as paragraphs.", ("path",),
          path=_PATH, start=_FROM),
    _spec("filesystem_server_search_files", "Find files whose text holds a phrase; case does not matter.", ("text",),
          text=_TEXT, path=_PATH),
    _spec("filesystem_server_write_file", "Create or replace a text file.", ("path", "content"), mutates=True,
          path=_PATH, content=_TEXT),
    _spec("filesystem_server_delete_file", "Delete a file.", ("path",), mutates=True, path=_PATH),
    _spec("mail_server_list_mails", "List mails, newest last.", (), start=_FROM),
    _spec("mail_server_read_mail", "Read a mail.", ("mail_id",), mail_id=_TEXT),
    _spec("mail_server_send_mail", "Send a mail.", ("to", "subject", "body"), mutates=True, to=_TEXT, subject=_TEXT,
          body=_TEXT),
    FINAL,
)


class OfficeEnv:
    """One office, one episode.

    Args:
        world: files under ``filesystem/`` and ``.apps_data/``, shared and never changed.
        packed: the world as a zip archive, where that is at hand already.
        system: the system message.

    >>> import asyncio
    >>> env = OfficeEnv({"filesystem/a.txt": Entry.of(b"revenue 5")})
    >>> _ = asyncio.run(env.reset(Task(task_id="t", prompt="?"), seed=0, episode_id="e"))
    >>> env.apply(ToolCall(id="c", name="filesystem_server_read_file", arguments={"path": "/a.txt"})).content
    'revenue 5'
    """

    env_id = "office"
    tools = TOOLS

    def __init__(self, world: Files, *, packed: Callable[[], bytes] | None = None, system: str = SYSTEM) -> None:
        self._world, self._packed, self._system = world, packed or (lambda: zip_bytes(world)), system
        self._changed: dict[str, bytes | None] = {}
        self._answer: str | None = None
        self._log: list[tuple[ToolCall, ToolResult]] = []
        self._hash = ""

    async def reset(self, task: Task, *, seed: int, episode_id: str) -> list[Json]:
        """Open the office as the world has it; system and user message."""
        self._changed, self._answer, self._log, self._hash = {}, None, [], ""
        return [{"role": "system", "content": self._system}, {"role": "user", "content": task.prompt}]

    async def call(self, calls: tuple[ToolCall, ...]) -> list[ToolResult]:
        """Run the calls in order; one result per id."""
        return [self.apply(call) for call in calls]

    def apply(self, call: ToolCall) -> ToolResult:
        """Run one call. Faults are observations."""
        content, kind = self._run(call)
        result = ToolResult(call_id=call.id, content=content, is_error=kind != "none", error_kind=kind,
                            state_hash=self.state_hash())
        self._log.append((call, result.model_copy(update={"content": ""})))
        return result

    def _run(self, call: ToolCall) -> tuple[str, ErrorKind]:
        if call.name not in _HANDLERS:
            return f"Error: no tool {call.name}", "unknown_tool"
        if self._answer is not None:
            return "Error: the final answer was given", "tool"
        try:
            assert isinstance(call.arguments, dict)
            return _HANDLERS[call.name](self, **call.arguments), "none"
        except (_Fault, UnsafePath) as fault:
            return f"Error: {fault}", "tool"
        except (TypeError, AssertionError) as fault:
            return f"Error: the arguments do not fit: {fault}", "bad_arguments"

    def done(self) -> bool:
        """Whether the final answer was given."""
        return self._answer is not None

    def state_hash(self) -> str:
        """Hash of what the episode has changed and of its answer."""
        if not self._hash:
            state = [[path, None if data is None else hashlib.sha256(data).hexdigest()]
                     for path, data in sorted(self._changed.items())]
            self._hash = hashlib.sha256(json.dumps([state, self._answer]).encode()).hexdigest()
        return self._hash

    def snapshot(self) -> bytes:
        """What the episode changed, its answer and its calls, as JSON; the world is not repeated."""
        changed = {path: None if data is None else base64.b64encode(data).decode()
                   for path, data in sorted(self._changed.items())}
        log = [[call.model_dump(mode="json"), result.model_dump(mode="json")] for call, result in self._log]
        return json.dumps({"changed": changed, "answer": self._answer, "log": log}, sort_keys=True).encode()

    def restore(self, data: bytes) -> None:
        """Continue from :meth:`snapshot`, in an office of the same world."""
        saved = json.loads(data)
        self._changed = {path: None if text is None else base64.b64decode(text)
                         for path, text in saved["changed"].items()}
        self._log = [(ToolCall(**call), ToolResult(**result)) for call, result in saved["log"]]
        self._answer, self._hash = saved["answer"], ""

    def outcome(self, answer: str | None) -> Outcome:
        """The answer and the office before and after, as zip archives of APEX's layout."""
        initial = self._packed()
        final = initial if not self._changed else zip_bytes(self._files())
        return Outcome(answer=answer if self._answer is None else self._answer, initial=initial, final=final,
                       calls=tuple(self._log))

    # ----------------------------------------------------------------------------------------------------- the tools

    def _files(self) -> Files:
        kept = {path: entry for path, entry in self._world.items() if path not in self._changed}
        return kept | {path: Entry.of(data) for path, data in self._changed.items() if data is not None}

    def _below(self, path: str) -> dict[str, Entry]:
        """Files of the file system in a folder, by path below the root."""
        folder = _inside(path) + "/" if path.strip("/.") else ""
        named = {name.removeprefix(ROOT): entry for name, entry in self._files().items() if name.startswith(ROOT)}
        return {name: named[name] for name in sorted(named) if name.startswith(folder)}

    def _put(self, path: str, data: bytes | None) -> None:
        if data is not None and len(data) > MOST_WRITTEN:
            raise _Fault(f"{len(data)} bytes are more than the {MOST_WRITTEN} that fit into one file")
        if path not in self._changed and len(self._changed) >= MOST_CHANGED:
            raise _Fault(f"{MOST_CHANGED} files were changed already")
        self._changed[path], self._hash = data, ""

    def _list(self, path: str = "", pattern: str = "*", start: int = 1) -> str:
        found = [f"{name}  {entry.size}" for name, entry in self._below(path).items()
                 if fnmatchcase(name.rpartition("/")[2].lower(), pattern.lower())]
        return _page(found, start, "no files")

    def _read(self, path: str, start: int = 1) -> str:
        entry = self._files().get(ROOT + _inside(path))
        if entry is None:
            raise _Fault(f"there is no file {_inside(path)!r}; list the files")
        return _page(readable(path, entry.load()).split("\n"), start, "")

    def _search(self, text: str, path: str = "") -> str:
        if not text.strip():
            raise _Fault("give a text to look for")
        found = [name for name, entry in self._below(path).items() if text.casefold() in readable(
            name, entry.load()).casefold()]
        return _page(found, 1, "found in no file")

    def _write(self, path: str, content: str) -> str:
        inside = _inside(path)
        above = [ROOT + inside[:i] for i, c in enumerate(inside) if c == "/"]
        files = self._files()
        if any(folder in files for folder in above) or any(name.startswith(f"{ROOT}{inside}/") for name in files):
            raise _Fault(f"{inside!r} names a folder where a file is, or a file where a folder is")
        self._put(ROOT + inside, content.encode("utf-8", "replace"))
        return f"wrote {inside}, {len(content)} characters"

    def _delete(self, path: str) -> str:
        inside = _inside(path)
        if ROOT + inside not in self._files():
            raise _Fault(f"there is no file {inside!r}; list the files")
        self._put(ROOT + inside, None)
        return f"deleted {inside}"

    def _mails(self) -> dict[str, EmailMessage]:
        """Mails by id, which is their path: those of the world first, then those sent."""
        files = {path: entry for path, entry in self._files().items()
                 if path.startswith(MAIL) and path.endswith(".eml")}
        names = sorted(files, key=lambda path: (path.startswith(f"{MAIL}sent/"), path))
        return {path.removeprefix(MAIL): parsed_mail(files[path].load()) for path in names}

    def _list_mails(self, start: int = 1) -> str:
        heads = {name: headers(mail) for name, mail in self._mails().items()}
        return _page([f"{name}  from {head.get('from')} to {head.get('to')}: {head.get('subject')}"
                      for name, head in heads.items()], start, "no mails")

    def _read_mail(self, mail_id: str) -> str:
        mail = self._mails().get(mail_id)
        if mail is None:
            raise _Fault(f"there is no mail {mail_id!r}; list the mails")
        said = headers(mail)
        head = "\n".join(f"{name}: {said[name]}" for name in ("from", "to", "date", "subject") if said.get(name))
        return f"{head}\n\n{body(mail)}".strip()

    def _send_mail(self, to: str, subject: str, body: str) -> str:
        number = 1 + sum(name.startswith("sent/") for name in self._mails())
        mail = EmailMessage(policy=email.policy.SMTP)
        to, subject, body = map(printable, (to, subject, body))
        try:
            mail["From"], mail["To"], mail["Subject"] = "me", " ".join(to.split()), " ".join(subject.split())
            mail.set_content(body, cte="base64")
            data = mail.as_bytes()
        except Exception as fault:  # noqa: BLE001 - the library's parser of addresses raises anything
            raise _Fault(f"a mail to {to!r} with subject {subject!r} cannot be written: {fault}; use plain addresses "
                         "and words") from fault
        self._put(f"{MAIL}sent/{number:04}.eml", data)
        return f"sent as sent/{number:04}.eml"

    def _final(self, answer: str, status: str = "completed") -> str:
        self._answer, self._hash = answer, ""
        return f"final answer taken ({status})"


def _inside(path: str) -> str:
    """A path of an agent below the root of its office; a leading slash is that root, there being no other."""
    return safe_path(path.removeprefix("/"))


def _page(lines: list[str], start: int, empty: str) -> str:
    """Some lines of an answer, and how to get at the rest."""
    shown = lines[max(0, start - 1):][:_PAGE]
    if not shown:
        return empty if not lines else f"there are {len(lines)} lines"
    rest = len(lines) - max(0, start - 1) - len(shown)
    return "\n".join([*shown, f"[{rest} more, from {start + _PAGE}]"] if rest > 0 else shown)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "filesystem_server_list_files": OfficeEnv._list, "filesystem_server_read_file": OfficeEnv._read,
    "filesystem_server_search_files": OfficeEnv._search, "filesystem_server_write_file": OfficeEnv._write,
    "filesystem_server_delete_file": OfficeEnv._delete, "mail_server_list_mails": OfficeEnv._list_mails,
    "mail_server_read_mail": OfficeEnv._read_mail, "mail_server_send_mail": OfficeEnv._send_mail,
    "final_answer": OfficeEnv._final,
}
