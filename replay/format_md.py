"""``FORMAT.md``: how to read a store without this package. Its recipes are run, word for word, by the tests."""

TEXT = """\
# Replay store, format agentsdpo-replay/1

Agent episodes with exact token ids and the log-prob of every sampled token, as plain Parquet files.
One row is one branch (a token sequence that only ever grew) of one episode; the key is
`(episode_id, branch_id, attempt)`.

| path | what |
|---|---|
| `STORE.json` | format, store id, oldest reader and writer that may touch it, features (`conditional-create`: in this \
bucket, files are made with `If-None-Match: *` only) |
| `data/<yyyymmdd>/<writer>-<uuid7>.parquet`, `data/compact/<uuid7>.parquet` | segments of whole rows, never changed |
| `log/<writer>/<seq>.json` | commit entries: a row counts once an `add` operation names it |
| `log/maint/<seq>.json` | the one stream of maintenance: what was moved, hidden, packed, deleted |
| `log/archive/<uuid7>.jsonl` | entries of ended streams, one per line, once an `archive` operation names them |
| `snap/<uuid7>.parquet`, `snap/LATEST.json` | what the log said at some time, row by row; disposable |
| `snap/<uuid7>-late.parquet` | the late values that counted then, and the overlays they are from; disposable |
| `overlay/<kind>/<uuid7>.parquet` | hints, rewards, labels and trainers' log-probs that came later |
| `policies/<version>.json` | what a policy version is: weights, tokenizer, template, vocabulary |
| `pins/<reader>.json` | what a reader still needs, and what it wants others to know |
| `quarantine/<path>` | damaged files, put aside under their old path; their whole rows were written anew |
| `lost+found/` | data files whose commit a crash cut off |
| `spool/<store id>/<writer>/<episode>.arrows` | journals of episodes under way, until they are committed (Arrow IPC); \
elsewhere where a setting says so; `spool/<store id>/lost+found/`: what of them could not be used |
| `clock/`, `reserve.bin` | a file for a moment, to see the storage's time; room held back for a full disk |

## Read it without this package

A glob over `data/` reads whole files only, and is all it takes for a store that was never maintained. It also shows
rows that were hidden, rows whose commit was cut off by a crash, and rows twice while a compaction is being cleaned up.
`agentsdpo replay snapshot STORE` writes down which rows count; the recipes below that read `snap/` show exactly those.
None of these readers checks page checksums unless told to; `agentsdpo.replay` always does.

DuckDB:

    SELECT episode_id, reward, n_trainable, token_ids, logprobs FROM read_parquet('STORE/data/*/*.parquet');
    -- committed files alone
    SET VARIABLE f = (SELECT list('STORE/' || o.path) FROM (SELECT unnest(ops) AS o FROM
        read_json('STORE/log/*/*.json', columns = {ops: 'STRUCT(op VARCHAR, path VARCHAR)[]'})) WHERE o.op = 'add');
    SELECT count(*) FROM read_parquet(getvariable('f'));

    -- the rows that count, as of the latest snapshot
    SET VARIABLE s = (SELECT 'STORE/' || file FROM read_json('STORE/snap/LATEST.json'));
    SET VARIABLE f = (SELECT list(DISTINCT 'STORE/' || path) FROM read_parquet(getvariable('s')) WHERE state = 'live');
    SELECT r.* FROM read_parquet(getvariable('f'), filename = 'at') r JOIN read_parquet(getvariable('s')) s
        ON r.at = 'STORE/' || s.path AND (r.episode_id, r.branch_id, r.attempt) = (s.episode_id, s.branch_id, s.attempt)
        WHERE s.state = 'live';

    -- the latest late rewards
    SELECT episode_id, branch_id, attempt, CAST(arg_max(value, (revision, file)) ->> '$.reward' AS DOUBLE) AS reward
        FROM read_parquet('STORE/overlay/reward/*.parquet', filename = 'file') GROUP BY ALL;

Polars:

    import json, pathlib, polars
    polars.read_parquet("STORE/data/*/*.parquet")
    # the rows that count, as of the latest snapshot
    latest = json.loads(pathlib.Path("STORE/snap/LATEST.json").read_text())
    snap = polars.read_parquet("STORE/" + latest["file"])
    live = snap.filter(state="live").select("episode_id", "branch_id", "attempt", at="STORE/" + polars.col("path"))
    rows = polars.read_parquet(live["at"].unique().to_list(), include_file_paths="at").join(
        live, on=["at", "episode_id", "branch_id", "attempt"], how="semi")

pandas:

    import json, pathlib, pandas
    pandas.read_parquet("STORE/data")
    # the rows that count, as of the latest snapshot
    latest = json.loads(pathlib.Path("STORE/snap/LATEST.json").read_text())
    snap = pandas.read_parquet("STORE/" + latest["file"])
    live = snap[snap.state == "live"][["path", "episode_id", "branch_id", "attempt"]]
    rows = pandas.concat([pandas.read_parquet(f"STORE/{path}").assign(path=path) for path in live.path.unique()])
    rows = rows.merge(live)

Hugging Face datasets (streaming works too):

    import datasets
    datasets.load_dataset("parquet", data_files="STORE/data/*/*.parquet", split="train")

## Which rows count

Every folder below `log/` but `archive` is a stream: its entries are numbered from 0 without a gap. An entry is an
object with `writer`, `seq`, `prev`, `ts_us`, `sha` and a list `ops`. Streams may be read in any order, `maint` first.

- `add` names a file (`path`, `bytes`, `sha256`) and its `rows`, in file order; `key` is
  [episode_id, branch_id, attempt], `rg` the row group.
- `evict` and `unevict` (in `maint`) hide the `keys` they name and show them again: the last one in the stream holds.
- `replace` (in `maint`) says that rows were moved: each item of `out` is like an `add`. A row is read from the latest
  item that has its key if the `content_sha256` is the same, else from where it was added.
- `archive` (in `maint`) says that the streams in `streams` (by name: last number and its `sha`) stand in the file
  `path` from now on, one entry per line.
- `overlay` names a file of late values (`kind`, `path`); `group_close` names the `episode_ids` of a `group_id`; `open`,
  `close`, `takeover` and `gc` do not matter to a reader of rows.

A key counts if an `add` names it and nothing hides it. Of several rows of one key the best status counts (`sealed`,
then `truncated`, `aborted`, `salvaged`), then the one with more tokens, then the lower `content_sha256`; a key with two
`sealed` rows of unequal `content_sha256` is withheld. A `salvaged` row, which a crash left, does not count where
another branch of the same attempt came with a better status.

## Late values

`overlay/<kind>/` has the columns episode_id, branch_id, attempt, call_id (null: the whole branch), target_sha256
(`content_sha256` of the row it is about), revision, value (JSON), author, t_created. The highest revision counts,
between equal ones the later file name; a file counts once an `overlay` operation names it. A value for a row that lost
to a better one of its key does not count. Values: `hint` an object with `text`; `reward` an object with `reward`,
`status` (`final`, `provisional`, `none`) and `grade`; `label` a text; `relogprob` has null and three more columns,
policy_version, trainer_id and logprobs (float32, NaN: not scored). A `grade` without `results` leaves the criteria of
the row as they are, and its feedback where it has none.

## Columns that need a word

- `token_ids` int32, `token_kind` uint8, `logprobs` float32: three lists of length `n_tokens`.
- `token_kind`: 0 context, 1 sampled and trained, 2 answer of the environment, 3 put in by the framework, 4 sampled but
  kept out of the loss, 5 sampled without a usable log-prob.
- `logprobs` holds the behaviour policy's log-prob where the kind is 1 or 4 and NaN elsewhere (0.0 would mean
  probability one). `logprob_kind`: `processed` (of the distribution drawn from), `tempered` (before filters), `raw`
  (before temperature), `unknown`, `none`.
- `calls`: one struct per request to the engine; `start`, `end` are positions in the branch, `versions` say which policy
  version sampled which part of the completion. `prompt_sha256` hashes the ids before `start` (int32, little-endian).
- `t_request`, `t_done` of a call, and the first and last of them as `t_start`, `t_end`, are by the clock of whoever
  collected: for people, never for order. `t_stored`, which tables add, is when a row was committed.
- `kept_ids`, `kept_counts`: the ids each sampled token was drawn from, one count per sampled token, 0: nothing was cut.
- `policy_version_min` is the oldest version in the row (-1 unknown); staleness is counted from it. A call with an
  `untrainable_reason` counts where its version is known.
- `reward` and `rewards_json` (the grade with every criterion) are as of the append, and so is the hint in `extra`,
  which also has the vocabulary size and the metadata: see late values.

## Row rules

(a) the three lists have length `n_tokens`; (b) a finite log-prob exactly at kinds 1 and 4; (c) it is in
(-1000, 1e-4]; (d) 0 <= id < vocabulary size; (e) call spans are ordered, disjoint and cover exactly kinds 1, 4, 5;
(f) version spans tile each completion; (g) `policy_version_min`/`_max` follow from them; (h) `n_sampled` counts kinds
1, 4, 5 and `n_trainable` kind 1; (i) kept sets hold the sampled id, ascend, and a single id has log-prob 0; (j) a child
branch equals its parent before `fork_at` and samples nothing there; (k) `prompt_sha256` fits; (l) `trainable` is
`n_trainable > 0`, otherwise `untrainable_reason` says why.

## Hashes

`tokens_sha256`: token_ids, token_kind, logprobs, kept_ids, kept_counts in this order; each as one byte (0 null,
1 present), then the number of elements (u32), then the elements; all little-endian, NaN as 0x7fc00000.
`content_sha256`: `tokens_sha256`, then the calls: their number (u32); for every field in schema order that is not null
in all of them, its name (u32 length, bytes), one byte per call (0 null, 1 present), then the present values: numbers;
all lengths (u32) and then all bytes of strings and hashes; all lengths (u32) and then the fields of the structs in the
same way for lists of structs. t_request, t_first_token, t_done and mono_ns are left out. A branch without calls has
one field, `versions`.
A log entry's `sha` hashes its other fields as JSON with sorted keys and no spaces; `prev` is the `sha` before it.
`footer_sha256` hashes the last `footer_len + 8` bytes of a segment, `sha256` all of it.
"""
