"""Reads a store by FORMAT.md alone, without this package: the rows that count, with late rewards, hashes checked."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

RANK = {"sealed": 3, "truncated": 2, "aborted": 1, "salvaged": 0}


def streams(root: Path) -> dict[str, list[Any]]:
    """Entries of every stream, those in archives too; the chain of hashes is checked."""
    found = {folder.name: [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
             for folder in (root / "log").iterdir() if folder.name != "archive"}
    for op in [op for entry in found.get("maint", []) for op in entry["ops"] if op["op"] == "archive"]:
        lines = [json.loads(line) for line in (root / op["path"]).read_text().splitlines()]
        found |= {name: [line for line in lines if line["writer"] == name] for name in op["streams"]}
    for entries in found.values():
        prev = ""
        for number, entry in enumerate(entries):
            body = json.dumps({k: v for k, v in entry.items() if k != "sha"}, sort_keys=True, separators=(",", ":"))
            assert (entry["seq"], entry["prev"]) == (number, prev)
            prev = hashlib.sha256(body.encode()).hexdigest()
            assert entry["sha"] == prev
    return found


def read(root: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows by key."""
    log = streams(root)
    ops = [op for name in sorted(log, key="maint".__eq__, reverse=True) for entry in log[name] for op in entry["ops"]]
    hidden, moved, added = set[Any](), dict[Any, Any](), dict[Any, list[Any]]()
    for op in ops:
        keys = [tuple(key) for key in op.get("keys", [])]
        hidden = hidden | set(keys) if op["op"] == "evict" else hidden - set(keys) if op["op"] == "unevict" else hidden
        for item in [op] if op["op"] == "add" else op["out"] if op["op"] == "replace" else []:
            for i, row in enumerate(item["rows"]):
                at, key = row | {"path": item["path"], "i": i}, tuple(row["key"])
                moved |= {key: at} if op["op"] == "replace" else {}
                added.setdefault(key, []).extend([at] if op["op"] == "add" else [])
    rows = {}
    for key in added.keys() - hidden:
        if len({row["content_sha256"] for row in added[key] if row["status"] == "sealed"}) > 1:
            continue
        best = max(added[key], key=lambda r: (RANK[r["status"]], r["n_tokens"], -int(r["content_sha256"], 16)))
        if best["status"] == "salvaged" and any(other[::2] == key[::2] and row["status"] != "salvaged"
                                                for other in added for row in added[other]):
            continue
        same = key in moved and moved[key]["content_sha256"] == best["content_sha256"]
        rows[key] = load(root, moved[key] if same else best)
    latest: dict[Any, Any] = {}
    for op in ops:
        if op["op"] == "overlay" and op["kind"] == "reward":
            for late in pq.read_table(root / op["path"]).to_pylist():
                key = (late["episode_id"], late["branch_id"], late["attempt"])
                latest[key] = max(latest.get(key, (-1,)), (late["revision"], op["path"], late["value"]))
    for key in latest.keys() & rows.keys():
        rows[key]["reward"] = json.loads(latest[key][2])["reward"]
    return rows


def load(root: Path, at: dict[str, Any]) -> dict[str, Any]:
    """One row of a segment, its tokens hashed."""
    table = pq.read_table(root / at["path"], page_checksum_verification=True)
    row, digest = table.slice(at["i"], 1).to_pylist()[0], hashlib.sha256()
    for name, kind in dict(token_ids="<i4", token_kind="u1", logprobs="<f4", kept_ids="<i4", kept_counts="<i4").items():
        array = None if row[name] is None else np.array(row[name], kind)
        digest.update(b"\0" if array is None else struct.pack("<BI", 1, len(array)) + array.tobytes())
    assert digest.hexdigest() == at["tokens_sha256"] == row["tokens_sha256"].hex()
    return row
