"""A store in a bucket, against a real server and one that fails on purpose."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from replay_factories import make_episode, same_episode
from replay_s3_server import KEY, SECRET, Moto, Proxy

from agentsdpo.errors import CorruptionError, StoreError
from agentsdpo.replay import (
    Key,
    ReplayConfig,
    ReplayStore,
    Sampler,
    compact,
    evict,
    fold,
    gc,
    pin,
    s3,
    unpin,
    uuid7,
    verify,
)
from agentsdpo.replay.s3 import S3Storage
from agentsdpo.replay.s3_errors import S3Fault
from agentsdpo.replay.storage import storage_for
from agentsdpo.types import Hint

CHILD = Path(__file__).parent / "replay_writer.py"
Fresh = Callable[..., ReplayStore]


@pytest.fixture(scope="module", autouse=True)
def impatient(moto: Moto) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "_PAUSE_S", 0.01)
        yield


@pytest.fixture(scope="module")
def server(moto: Moto) -> Iterator[Proxy]:
    proxy = Proxy(moto)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(server: Proxy) -> Proxy:
    server.clear()
    return server


@pytest.fixture
def address(proxy: Proxy) -> str:
    """Where nothing is yet."""
    return f"s3://bucket/{uuid7()}{proxy.query}"


@pytest.fixture(scope="module")
def fresh(moto: Moto, server: Proxy) -> Fresh:
    """Opens a store that is new, as it was made once: trying what a bucket can do takes more requests than most tests.

    Without obstore where the second argument is true.
    """
    def open_(address: str, plain: bool) -> ReplayStore:
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setitem(sys.modules, "obstore", None)
            return ReplayStore.open(address)

    server.clear()
    made = {plain: open_(f"s3://bucket/{uuid7()}{server.query}", plain).storage for plain in (False, True)}
    files = {plain: {name: storage.read(name) for name in ("STORE.json", "FORMAT.md")}
             for plain, storage in made.items()}

    def open_new(address: str, plain: bool = False) -> ReplayStore:
        for name, data in files[plain].items():
            moto.put(f"{address.partition('?')[0].removeprefix('s3:/')}/{name}", data)
        return open_(address, plain)

    return open_new


@pytest.fixture
def plain(address: str, fresh: Fresh) -> ReplayStore:
    """A store made where obstore is not installed."""
    return fresh(address, True)


def everything(store: ReplayStore) -> list[Key]:
    """Keys of all rows, each of them read and verified."""
    view = store.snapshot()
    return [row.key for row in view.read(view.keys())]


# --------------------------------------------------------------------------------------------------- good days


@pytest.mark.parametrize("without_obstore", [False, True])
def test_append_read_and_reopen(address: str, without_obstore: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        if without_obstore:
            patch.setitem(sys.modules, "obstore", None)
        store = ReplayStore.open(address)
    assert store.about["features"] == ([] if without_obstore else ["conditional-create"])
    assert store.storage.exclusive is not without_obstore
    first, second = make_episode(1), make_episode(2, hint=False)
    store.append([first])
    before = store.snapshot()
    store.append([second])
    store.record_policy(0, {"weights_id": "w"})
    key = Key(second.episode_id, 0, 0)
    late = Hint(text="late", source="user", author="me")
    store.add_hints({key: late})
    again = ReplayStore.open(address, create=False)
    assert (len(before), len(again)) == (1, 2)
    assert same_episode(again.episode(first.episode_id), first)
    assert again.snapshot().read([key])[0].hint == late
    assert again.policy(0) == {"weights_id": "w"}
    assert again.snapshot(at=before.vector).id == before.id
    store.close()
    assert len(again) == 2
    assert "duckdb" in again.storage.read("FORMAT.md").decode().lower()
    with pytest.raises(StoreError, match="is no local folder"):
        _ = store.root


def test_the_sampler_draws_from_a_bucket(address: str, fresh: Fresh) -> None:
    store = fresh(address)
    store.append([make_episode(i, size=40) for i in range(4)])
    sampler = Sampler(store, ReplayConfig(), seed=0, tokenizer_sha256=None, max_staleness=None)
    drawn = sampler.sample(3, 0)
    other = Sampler(ReplayStore.open(address), ReplayConfig(), seed=0, tokenizer_sha256=None, max_staleness=None)
    assert [row.key for row in drawn] == [row.key for row in other.sample(3, 0)]
    assert all(row.branch.token_ids.size for row in drawn)


def test_files_of_a_bucket(address: str) -> None:
    storage = storage_for(address)
    storage.create("a/b/one", b"1")
    storage.create("a/two", memoryview(b"22"))
    storage.replace("a/two", b"222")
    assert [(info.path, info.size) for info in storage.list("a")] == [("a/b/one", 1), ("a/two", 3)]
    assert abs(storage.list("a")[0].mtime_us / 1e6 - time.time()) < 600
    assert [info.path for info in storage.list("")] == ["a/b/one", "a/two"]
    assert (storage.folders(""), storage.folders("a"), storage.folders("none"), storage.list("none")) == (
        ["a"], ["b"], [], [])
    assert (storage.exists("a/two"), storage.exists("a/three")) == (True, False)
    storage.move("a/two", "c/two")
    assert (storage.exists("a/two"), storage.read("c/two")) == (False, b"222")
    with pytest.raises(FileExistsError):
        storage.move("a/b/one", "c/two")
    for missing in (storage.read, storage.open, lambda path: storage.move(path, "d")):
        with pytest.raises(FileNotFoundError):
            missing("a/two")
    storage.remove("c/two")
    storage.remove("c/two")
    assert [info.path for info in storage.list("")] == ["a/b/one"]
    storage.create("empty", b"")
    assert storage.read("empty") == storage.open("empty").read() == b""


def test_large_files_are_read_in_ranges(address: str, proxy: Proxy) -> None:
    data = random.Random(0).randbytes(11 << 20)
    storage = storage_for(address)
    storage.create("data/large", data)  # above pyarrow's size of one part: a multipart upload
    assert any("uploadId" in request for request in proxy.requests)
    proxy.rule("cut", "GET", times=2)
    with storage.open("data/large") as file:
        file.seek(5 << 20)
        assert file.read(1000) == data[5 << 20:][:1000]
        file.seek(-10, 2)
        assert file.read() == data[-10:]
        assert file.size() == len(data)


@pytest.mark.slow
def test_writers_in_many_processes(address: str, fresh: Fresh, tmp_path: Path) -> None:
    """Two processes, one of them forked before it ever spoke S3, and three threads here."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env=env)
    fresh(address)
    lines = "".join(f"{seed} 3 {tmp_path}/{seed} {address}\n" for seed in (1, 2))
    errors: list[BaseException] = []

    def write(seed: int) -> None:
        try:
            store = ReplayStore.open(address)
            for i in range(3):
                store.append([make_episode(1000 * seed + i, size=40)])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (5, 6, 7)]
    for thread in threads:
        thread.start()
    assert child.stdin
    child.stdin.write(lines)
    child.stdin.flush()
    for thread in threads:
        thread.join()
    assert child.stdout
    pids = [int(line) for line in (child.stdout.readline(), child.stdout.readline(), child.stdout.readline())
            if line != "ready\n"]
    child.stdin.write("".join(f"wait {pid}\n" for pid in pids))
    assert child.communicate(timeout=60)[0] == "gone\n" * 2
    assert not errors
    store = ReplayStore.open(address, create=False)
    assert len(everything(store)) == 15
    assert len(store.storage.folders("log")) == 5


def test_a_fork_says_that_it_cannot_create(address: str, fresh: Fresh) -> None:
    store = fresh(address)
    store.append([make_episode(1, size=40)])
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        words = ""
        try:
            words = f"{len(everything(store))} "
            store.append([make_episode(2, size=40)])
        except StoreError as error:
            words += str(error)
        os.write(write, words.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as pipe:
        said = pipe.read()
    assert said.startswith("1 process")
    assert "was forked from" in said
    assert "spawn" in said
    assert len(everything(store)) == 1


# ------------------------------------------------------------------------------------------------------ damage


def test_damaged_and_missing_objects_are_named(address: str, fresh: Fresh) -> None:
    store = fresh(address)
    store.append([make_episode(1, size=40)])
    path = store.storage.list("data")[0].path
    whole = store.storage.read(path)
    group = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0)
    column = next(group.column(i) for i in range(group.num_columns)
                  if group.column(i).path_in_schema == "token_ids.list.element")
    for at in (column.data_page_offset + column.total_compressed_size - 3, len(whole) - 30):
        store.storage.replace(path, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(CorruptionError, match=path.rpartition("/")[2]):
            everything(ReplayStore.open(address))
    store.storage.remove(path)
    with pytest.raises(CorruptionError, match="is missing though the log names it"):
        everything(ReplayStore.open(address))
    entry = store.storage.list("log")[1].path
    store.storage.replace(entry, store.storage.read(entry).replace(b"sealed", b"aborted"))
    with pytest.raises(CorruptionError, match=entry):
        ReplayStore.open(address).snapshot()


def test_a_server_out_of_reach_is_no_corruption(address: str, fresh: Fresh, proxy: Proxy) -> None:
    store = fresh(address)
    store.append([make_episode(1, size=40)])
    view = store.snapshot()
    proxy.rule(503, part="/data/", times=1000)
    with pytest.raises(S3Fault, match="reading s3://bucket/.*parquet failed: SLOW_DOWN|status 503"):
        view.read(view.keys())
    proxy.clear()
    assert len(view.read(view.keys())) == 1


# ------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("without_obstore", [False, True])
@pytest.mark.parametrize("how", [500, 503, "lost", "twice", "slow"])
def test_a_passing_fault_loses_and_doubles_nothing(address: str, fresh: Fresh, proxy: Proxy, how: int | str,
                                                   without_obstore: bool) -> None:
    """Each kind of request of an append, and then of a reader, fails once."""
    store = fresh(address, without_obstore)
    for method, part in (("PUT", "/data/"), ("PUT", "/log/"), ("HEAD", ""), ("GET", "list-type")):
        proxy.rule(how, method, part)
    store.append([make_episode(1, size=40)])
    for method, part in (("HEAD", "/log/"), ("GET", "/log/"), ("GET", "/data/"), ("GET", "list-type")):
        proxy.rule(how, method, part)
    assert len(everything(ReplayStore.open(address))) == 1
    proxy.clear()
    store.append([make_episode(2, size=40)])
    assert len(everything(store)) == 2
    assert len(store.storage.list("data")) == 2
    assert len(store.storage.folders("log")) == 1


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("how", [500, "lost"])
def test_multipart_uploads_survive_faults(address: str, proxy: Proxy, method: str, how: int | str) -> None:
    """A part, or the request that completes the upload."""
    data = bytes(11 << 20)
    proxy.rule(how, method, "uploadId", times=4)  # more than pyarrow tries by itself
    storage = storage_for(address)
    storage.create("data/large", data)
    assert storage.read("data/large") == data


@pytest.mark.slow
def test_a_hanging_server_is_given_up_and_asked_again(plain: ReplayStore, proxy: Proxy) -> None:
    proxy.rule("hang", "PUT", "/data/")
    plain.append([make_episode(1, size=40)])
    assert len(everything(plain)) == 1


def test_lost_answers_to_the_end_leave_the_truth_behind(plain: ReplayStore, proxy: Proxy) -> None:
    """All answers to the log entry's PUT are lost: whether it counts is told by reading."""
    proxy.rule("lost", "PUT", "/log/", times=100)
    plain.append([make_episode(1, size=40)])
    proxy.clear()
    assert len(everything(plain)) == 1


@pytest.mark.parametrize("without_obstore", [False, True])
def test_a_lasting_fault_shows_nothing_and_passes(address: str, fresh: Fresh, proxy: Proxy,
                                                  without_obstore: bool) -> None:
    store = fresh(address, without_obstore)
    proxy.rule(503, "PUT", "/log/", times=1000)
    with pytest.raises(S3Fault, match=r"s3://bucket/.*/log/.*json failed: (SLOW_DOWN|SlowDown).*nothing was ackn"):
        store.append([make_episode(1, size=40)])
    assert len([request for request in proxy.requests if request.startswith("PUT") and "/log/" in request]) >= 4
    proxy.clear()
    assert everything(store) == []
    assert store.storage.list("data") == []
    store.append([make_episode(1, size=40)])
    assert len(everything(store)) == 1


@pytest.mark.parametrize("without_obstore", [False, True])
def test_a_refusal_is_told_at_once_and_without_keys(address: str, fresh: Fresh, proxy: Proxy,
                                                    without_obstore: bool) -> None:
    store = fresh(address, without_obstore)
    store.append([make_episode(1, size=40)])
    proxy.clear()
    proxy.rule(403, "PUT", times=1000)
    with pytest.raises(StoreError, match="s3://bucket/.*403|ACCESS_DENIED.*allow s3:GetObject") as caught:
        store.append([make_episode(2, size=40)])
    assert len([request for request in proxy.requests if request.startswith("PUT")]) == 1
    seen: BaseException | None = caught.value
    while seen is not None and not seen.__suppress_context__:
        assert KEY not in str(seen)
        assert SECRET not in str(seen)
        seen = seen.__cause__ or seen.__context__
    assert KEY not in str(seen)
    assert len(everything(store)) == 1


def test_a_missing_bucket_is_named(proxy: Proxy) -> None:
    with pytest.raises(StoreError, match="nowhere.*make the bucket first"):
        ReplayStore.open(f"s3://nowhere/x{proxy.query}")
    with pytest.raises(StoreError, match="s3://nowhere/x is not a replay store"):
        ReplayStore.open(f"s3://nowhere/x{proxy.query}", create=False)


def test_a_stale_list_hides_nothing_for_good(address: str, fresh: Fresh, proxy: Proxy) -> None:
    """A list without the newest names: known streams go on, new ones come later, nothing is an error."""
    store, reader = fresh(address), ReplayStore.open(address)
    store.append([make_episode(1, size=40)])
    assert len(everything(reader)) == 1
    store.append([make_episode(2, size=40)])
    other = ReplayStore.open(address)
    other.append([make_episode(3, size=40)])
    proxy.rule("old", "GET", "list-type", times=1000)
    assert len(everything(reader)) == 2
    proxy.clear()
    assert len(everything(reader)) == 3


def test_a_file_replaced_while_it_is_read_is_read_again(address: str, proxy: Proxy) -> None:
    storage, other = storage_for(address), storage_for(address)
    storage.replace("pins/a.json", b"short")
    assert other.exists("pins/a.json")
    proxy.rule(lambda: other.replace("pins/a.json", b"much longer"), "GET", "/pins/a.json")
    assert storage.read("pins/a.json") == b"much longer"


@pytest.mark.slow
def test_a_killed_upload_shows_nothing(address: str, proxy: Proxy) -> None:
    code = ("import sys; from agentsdpo.replay.storage import storage_for\n"
            "storage_for(sys.argv[1]).create('data/large', bytes(30 << 20))")
    process = subprocess.Popen([sys.executable, "-c", code, address],
                               env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    proxy.rule(process.kill, "PUT", "partNumber=2")
    assert process.wait(60) == -9
    assert any("partNumber" in request for request in proxy.requests)
    storage = storage_for(address)
    assert not storage.exists("data/large")
    assert storage.list("") == []
    storage.create("data/large", b"whole")
    assert storage.read("data/large") == b"whole"


def test_a_failed_write_leaves_no_empty_object(address: str, proxy: Proxy) -> None:
    """pyarrow closes the stream of a failed upload once more when it is destroyed, now or at exit."""
    code = ("import sys; from agentsdpo.replay import s3; from agentsdpo.replay.storage import storage_for\n"
            "s3._ATTEMPTS = 1\n"
            "try: storage_for(sys.argv[1]).create('data/large', bytes(11 << 20))\n"
            "except s3.S3Fault: print('failed')\n"
            "import gc; gc.collect()")
    proxy.rule(503, "POST", "/data/large")
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.stdout == "failed\n"
    assert storage_for(address).list("") == []


# --------------------------------------------------------------------------------------------- exclusive creates


def race(address: str, demand: bool) -> list[str]:
    """Eight threads want one name at once, each with bytes of its own; who says it got it."""
    won: list[str] = []
    start = threading.Barrier(8)
    storages = [S3Storage(address) for _ in range(8)]
    if demand:
        for storage in storages:
            storage.demand_exclusive()

    def want(i: int) -> None:
        start.wait()
        try:
            storages[i].create("log/maint/000000000000.json", str(i).encode())
            won.append(str(i))
        except FileExistsError:
            pass

    threads = [threading.Thread(target=want, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_one_of_many_creates_wins(address: str, proxy: Proxy) -> None:
    proxy.rule("lost", "PUT", "/maint/", times=2)
    won = race(address, demand=True)
    assert won == [S3Storage(address).read("log/maint/000000000000.json").decode()]


def test_without_conditions_a_storage_says_so(address: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = S3Storage(address)
    proxy.rule("unconditional", "PUT", "probe", times=10)
    with pytest.raises(StoreError, match="lets a conditional PUT overwrite"):
        storage.demand_exclusive()
    proxy.clear()
    proxy.rule(501, "PUT", "probe", times=10)
    with pytest.raises(StoreError, match="lacks the operation"):
        storage.demand_exclusive()
    proxy.clear()
    storage = S3Storage(address)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "obstore", None)
        with pytest.raises(StoreError, match=r"pip install 'agentsdpo\[s3\]'"):
            storage.demand_exclusive()
    assert not storage.exclusive
    storage.create("a", b"1")
    storage.create("a", b"1")  # our own earlier success
    with pytest.raises(FileExistsError):
        storage.create("a", b"2")
    assert storage.read("a") == b"1"
    assert [info.path for info in storage.list("")] == ["a"]


def test_all_writers_of_a_store_create_the_same_way(address: str, fresh: Fresh,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A store made with conditional creates is read, not written, where they cannot be made."""
    fresh(address).append([make_episode(1, size=40)])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "obstore", None)
        store = ReplayStore.open(address)
        assert len(everything(store)) == 1
        with pytest.raises(StoreError, match=r"pip install 'agentsdpo\[s3\]'"):
            store.append([make_episode(2, size=40)])


@pytest.mark.slow
@pytest.mark.parametrize("without_obstore", [False, True])
def test_maintenance_in_a_bucket(address: str, fresh: Fresh, without_obstore: bool) -> None:
    store = fresh(address, without_obstore)
    store.record_policy(0, {"weights_id": "w"})
    for i in range(4):
        store.append([make_episode(i, size=40, group_size=1)])
    store.close()
    if without_obstore:
        with pytest.raises(StoreError, match="was made without conditional creates.*--sole-maintainer"):
            compact(store)
    gone = store.snapshot().keys()[0]
    evict(store, [gone], reason="test", sole_maintainer=without_obstore)
    assert compact(store, sole_maintainer=without_obstore).rows == 3
    fold(store)
    pin(store, "learner", store.snapshot(), ttl_s=60)
    gc(store, grace_s=0, sole_maintainer=without_obstore)
    unpin(store, "learner")
    gc(store, grace_s=0, sole_maintainer=without_obstore)
    gc(store, grace_s=0, sole_maintainer=without_obstore)
    again = ReplayStore.open(address)
    assert gone not in everything(again)
    assert len(everything(again)) == 3
    assert verify(again, "deep").ok
    assert len(store.storage.list("data")) == 1


@pytest.mark.parametrize(("address", "words"), [
    ("s3://", "no bucket"), ("s3:///x", "no bucket"), ("s3://b/x?colour=red", "the option 'colour'"),
    ("s3://AKIA1:secret@b/x", "AWS_ACCESS_KEY_ID"), ("s3://b/x?access_key=AKIA1&secret_key=secret", "AWS_PROFILE"),
    ("gs://b/x", "scheme 'gs'"), ("s3://b/run#1", "lies in s3://b/run$"), ("s3://b/run#", "holds a '#'")])
def test_addresses_that_cannot_be_used(address: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        storage_for(address)
    assert "secret@" not in str(caught.value)
    assert "AKIA1" not in str(caught.value)


def test_keys_of_a_profile_reach_conditional_creates(address: str, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = a%b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage = S3Storage(address)
    storage.demand_exclusive()
    storage.create("a", b"1")
    assert storage.read("a") == b"1"
