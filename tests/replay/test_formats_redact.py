"""Planted secrets never leave: not in a text, not in the name of a field, not as token ids."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_factories import make_episode, same_episode

from agentsdpo.errors import ConfigError
from agentsdpo.replay import ReplayStore
from agentsdpo.replay.formats import EXPORTS, export, import_
from agentsdpo.replay.formats.redact import Redactor, demand_redaction, masked
from agentsdpo.replay.formats.secret_rules import RULES, load_rules, spans
from agentsdpo.replay.rules import check_episode
from agentsdpo.types import Branch, Call, CriterionResult, Episode, Grade, Hint, Sampling, VersionSpan

RNG = np.random.default_rng(0)
HEX = "0123456789abcdef"


def letters(n: int) -> str:
    """Letters and digits as keys have them, the same every time."""
    return base64.b32encode(np.random.default_rng(n).bytes(n)).decode()[:n]


SECRETS = {
    "openai_key": f"sk-proj-{letters(40)}", "anthropic_key": f"sk-ant-api03-{letters(40)}",
    "aws_key_id": "AKIA" + "Q7" * 8, "github_token": "ghp_" + letters(36), "gitlab_token": "glpat-" + letters(20),
    "huggingface_token": "hf_" + letters(34), "google_key": "AIza" + letters(35), "slack_token": "xoxb-" + letters(24),
    "stripe_key": "sk_" + "live_" + letters(24), "sendgrid_key": f"SG.{letters(22)}.{letters(43)}",
    "npm_token": "npm_" + letters(36), "pypi_token": "pypi-" + letters(60), "twilio_key": "SK" + 2 * HEX,
    "databricks_token": "dapi" + 2 * HEX, "digitalocean_token": "dop_v1_" + 4 * HEX,
    "telegram_token": "123456789:AA" + letters(33), "model_service_key": "gsk_" + letters(40),
    "jwt": f"eyJ{letters(20)}.eyJ{letters(30)}.{letters(20)}",
}
CARRIED = {
    "bearer": ("Authorization: Bearer {}", letters(31)), "cookie": ("Set-Cookie: sid={}; Path=/", letters(25)),
    "url_password": ("https://me:{}@example.org/x", letters(13)), "basic_auth": ("Basic {}", letters(26) + "9="),
    "aws_secret": ('aws_secret_access_key = "{}"', letters(40)),
    "private_key": ("-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----", letters(64)),
}
PLANTED = {name: (secret, secret) for name, secret in SECRETS.items()} | {
    name: (form.format(secret), secret) for name, (form, secret) in CARRIED.items()}
"""By rule: a text with a secret in it, and the secret."""


class Bytes:
    """A tokenizer with a token per byte; ids from 256 on are special tokens."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        plain = b"".join(bytes([i]) if i < 256 else b"" if skip_special_tokens else b"<s>" for i in ids)
        return plain.decode("utf-8", "replace")


def spell(*parts: tuple[int, str | list[int]], **fields: Any) -> Branch:
    """A branch that spells its parts, given as (kind, text or ids); each sampled part is a call."""
    ids, kinds, logps, calls, counts = [], [], [], [], []
    for kind, text in parts:
        new = list(text.encode()) if isinstance(text, str) else text
        if kind in (1, 4, 5):
            calls.append(Call(call_id=f"c{len(calls)}", turn=len(calls), start=len(ids), end=len(ids) + len(new),
                              prompt_sha256="", finish_reason="stop", sampling=Sampling(top_k=9), versions=(
                                  VersionSpan(version=1, start=0, end=2),
                                  VersionSpan(version=2, start=2, end=len(new)))))
            counts += [2] * len(new)
        ids, kinds = ids + new, kinds + [kind] * len(new)
        logps += [-0.5 if kind in (1, 4) else np.nan] * len(new)
    sampled = [i for i, kind in zip(ids, kinds, strict=True) if kind in (1, 4, 5)]
    return Branch(token_ids=np.array(ids, np.int32), token_kind=np.array(kinds, np.uint8),
                  logprobs=np.array(logps, np.float32), calls=tuple(calls),
                  kept_ids=np.array([i for token in sampled for i in (token, 999)], np.int32),
                  kept_counts=np.array(counts, np.int32), **fields)


def redactor(tokens: Literal["drop", "mask"] = "drop", **options: Any) -> Redactor:
    return Redactor(tokens=tokens, decoder=lambda sha: Bytes(), **options)


def leaky(text: str, secret: str) -> Episode:
    """An episode with the text in every place that holds text, and the bare secret in a few more."""
    branch = spell((0, f"Say {text} now. "), (1, f"ok {text}. "), (2, f"got {secret}. "), (1, "done."))
    results = [CriterionResult(id="a", score=1.0, rationale=text, feedback=f"never write {secret}")]
    made = make_episode(
        branches=(branch,), task_id=f"task {secret}", run_id=text, model_id=secret,
        messages=({"role": "user", "content": text, secret: 1}, {"role": "assistant", "content": [
            {"type": "text", "text": f"x{secret}y"}], "tool_calls": [{"id": secret, "function": {
                "name": "f", "arguments": {"key": text}}}]}),
        tools=({"type": "function", "function": {"name": "f", "description": text}},),
        metadata={"deep": [{"er": text}], text: secret}, grade=Grade.of(results, feedback=text))
    return made.model_copy(update={"hint": Hint(text=text, source="user", author=secret)})


def text_of_ids(path: Path, fmt: str) -> str:
    """Everything that token ids in an exported file spell, kept sets included."""
    if fmt == "parquet":
        table = pq.read_table(path)
        runs = [row for name in ("token_ids", "kept_ids") for row in table[name].to_pylist() if row]
    else:
        runs = [run for line in path.read_text().splitlines() for run in numbers(json.loads(line))]
    spelled = [Bytes().decode([i for i in run if i < 256]) for run in runs]
    return "\n".join(spelled)


def numbers(value: Any) -> list[list[int]]:
    """All lists of integers in a JSON value."""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [run for item in inner for run in numbers(item)]


@pytest.mark.parametrize("fmt", EXPORTS)
def test_planted_secrets_never_leave(fmt: str, tmp_path: Path, store: ReplayStore) -> None:
    episodes = [leaky(*planted) for planted in PLANTED.values()]
    worse = [e.model_copy(update={"episode_id": f"{i}", "task_id": e.task_id, "grade": Grade(
        results=(), mean=0.0, passed=None), "messages": (e.messages[0], {"role": "assistant", "content": "no"})})
        for i, e in enumerate(episodes if fmt == "pairs" else [])]
    store.append(episodes + worse)
    for tokens in ("drop", "mask"):
        out = tmp_path / tokens
        report = export(store, fmt, out, redact=redactor(tokens))
        assert report.records > 0
        said = json.dumps(report.as_json())
        spelled, raw = text_of_ids(out, fmt), out.read_bytes().decode("utf-8", "replace")
        if fmt == "parquet":
            raw += json.dumps(pq.read_table(out).drop_columns(["tokens_sha256", "content_sha256"]).to_pylist(),
                              default=str)
        for name, (_, secret) in PLANTED.items():
            assert secret not in raw, (tokens, name)
            assert secret not in spelled, (tokens, name)
            assert secret not in said, (tokens, name)
            assert (report.redacted or {}).get(name, 0) > 0, name


@pytest.mark.parametrize("name", PLANTED)
def test_each_rule_finds_its_own(name: str) -> None:
    text, secret = PLANTED[name]
    found = [(rule, what) for _, _, rule, what in spans(RULES, f"({text})")]
    assert name in dict(found)
    assert any(secret in what for rule, what in found if rule == name)


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_rules_end_and_leave_plain_text_alone(text: str) -> None:
    list(spans(RULES, text))
    plain = "The task-skeleton asks for risk-adjusted basic understanding; see https://example.org/a:b and mail bob."
    assert list(spans(RULES, plain)) == []


@pytest.mark.parametrize("text", ["-----BEGIN PRIVATE KEY-----" * 2000, "a@" * 20_000, "eyJ" * 20_000, "cookie=" * 9000,
                                  "bearer " * 9000, "http://a:" * 9000, "sk-" * 20_000, "aws_secret_key=" * 5000])
def test_no_text_takes_a_rule_long(text: str) -> None:
    import time

    begin = time.process_time()
    list(spans(redactor(emails=True).rules, text))
    assert time.process_time() - begin < 3


def test_a_hit_drops_the_tokens_of_its_branch_alone() -> None:
    secret = SECRETS["github_token"]
    clean, dirty = spell((0, "hello "), (1, "world")), spell((0, f"hello {secret}"), (1, "world"), branch_id=1)
    episode, hits = redactor().episode(make_episode(branches=(clean, dirty)))
    assert hits["branches dropped"] == 1
    assert same_episode(episode, make_episode(branches=(clean, episode.branches[1]), episode_id=episode.episode_id))
    gone = episode.branches[1]
    assert (len(gone.token_ids), gone.kept_ids, gone.calls[0].untrainable_reason) == (0, None, "redacted")
    check_episode(episode)


def test_children_of_a_dropped_branch_stand_by_themselves() -> None:
    secret = SECRETS["github_token"]
    parent = spell((0, "hello "), (1, "world"), (2, secret))
    child = spell((0, "hello "), (1, "moon"), branch_id=1, parent_branch_id=0, fork_at=6, fork_reason="compaction")
    grand = spell((0, "hello moon"), (1, "!!!"), branch_id=2, parent_branch_id=1, fork_at=10, fork_reason="retry")
    episode, _ = redactor().episode(make_episode(branches=(parent, child, grand)))
    assert [branch.fork_at for branch in episode.branches] == [None, 0, 10]
    assert [len(branch.token_ids) for branch in episode.branches] == [0, 10, 13]
    check_episode(episode)


def test_mask_replaces_the_span_and_trains_nothing_behind_it() -> None:
    secret = SECRETS["aws_key_id"]
    branch = spell((0, "hello "), (1, "fine. "), (1, f"ab {secret} cd"), (2, "ok "), (1, "bye"))
    before = branch.model_copy()
    episode, hits = redactor("mask").episode(make_episode(branches=(branch,)))
    check_episode(episode)
    after, = episode.branches
    at = 12 + 3
    span = slice(at, at + len(secret))
    assert hits == {"aws_key_id": 1, "branches masked": 1}
    assert (after.token_ids[span] == 0).all()
    assert (after.token_kind[span] == 0).all()
    assert np.isnan(after.logprobs[span]).all()
    rest = np.ones(len(before.token_ids), bool)
    rest[span] = False
    assert np.array_equal(after.token_ids[rest], before.token_ids[rest])
    assert np.array_equal(after.logprobs[rest], before.logprobs[rest], equal_nan=True)
    assert set(after.token_kind[:at].tolist()) == {0, 1}
    assert set(after.token_kind[at:].tolist()) == {0, 2, 4}
    names = [(c.call_id, c.start, c.end, c.untrainable_reason) for c in after.calls]
    end = at + len(secret)
    assert names == [("c0", 6, 12, None), ("c1", 12, 15, None), ("c1#1", end, end + 3, "redacted"),
                     ("c2", end + 6, end + 9, "redacted")]
    assert [(v.version, v.start, v.end) for v in after.calls[1].versions] == [(1, 0, 2), (2, 2, 3)]
    assert after.kept_counts is not None
    assert len(after.kept_counts) == after.n_sampled


def test_mask_keeps_forks_true() -> None:
    """The secret begins in the parent's part and ends in the child's: only the child spells it."""
    secret = SECRETS["aws_key_id"]
    parent = spell((0, f"key {secret[:10]}"), (1, "what?"))
    child = spell((0, f"key {secret}"), (1, "hm, ok"), branch_id=1, parent_branch_id=0, fork_at=14,
                  fork_reason="compaction")
    episode, _ = redactor("mask").episode(make_episode(branches=(parent, child)))
    assert [branch.fork_at for branch in episode.branches] == [None, 4]
    check_episode(episode)


@settings(max_examples=60)
@given(st.data())
def test_any_mask_leaves_a_row_that_the_store_takes(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 5]), min_size=1, max_size=5))
    branch = spell(*((kind, "abcd") for kind in kinds))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(branch.token_ids), max_size=len(branch.token_ids))))
    after = masked(branch, mask)
    check_episode(make_episode(branches=(after,)))
    assert (after.token_kind[mask] == 0).all()
    first = int(np.argmax(mask)) if mask.any() else len(mask)
    assert (after.token_kind[first:] != 1).all()
    assert np.array_equal(after.token_kind[:first], branch.token_kind[:first])
    if mask.all():
        assert not len(after.kept_ids if after.kept_ids is not None else ())


@pytest.mark.parametrize("tokens", ["drop", "mask"])
def test_a_special_token_or_spaces_do_not_hide_a_secret(tokens: Literal["drop", "mask"]) -> None:
    secret = SECRETS["github_token"]
    split = spell((0, [*secret[:10].encode(), 300, *secret[10:].encode()]), (1, "ok ok"))
    spaced = spell((0, " ".join(secret)), (1, "ok ok"))
    for branch in (split, spaced):
        told = make_episode(branches=(branch,), messages=({"role": "user", "content": secret},))
        episode, hits = redactor(tokens).episode(told)
        assert len(episode.branches[0].token_ids) == 0
        assert hits["branches dropped"] == 1


def test_without_a_tokenizer_no_token_leaves(tmp_path: Path, store: ReplayStore) -> None:
    store.append([make_episode(seed) for seed in range(2)])
    report = export(store, "parquet", tmp_path / "out", redact=Redactor())
    assert report.redacted == {"branches without a tokenizer": 2}
    table = pq.read_table(tmp_path / "out")
    assert table["n_tokens"].to_pylist() == [0, 0]
    assert table["untrainable_reason"].to_pylist() == ["redacted", "redacted"]
    other = ReplayStore.open(tmp_path / "other")
    assert import_(other, "parquet", tmp_path / "out").untrainable == {"redacted": 4}


def test_a_clean_episode_is_left_as_it_is() -> None:
    episode = make_episode(branches=(spell((0, "hello "), (1, "world")),))
    clean, hits = redactor("mask", emails=True).episode(episode)
    assert same_episode(clean, episode)
    assert not hits


def test_a_real_tokenizer(tiny_tokenizer: Any) -> None:
    """Secrets fall apart into tokens at odd places; the text around them is not whole characters everywhere."""
    secret = SECRETS["openai_key"]
    backend = tiny_tokenizer.backend_tokenizer
    ids = backend.encode(f"<|im_start|>user\nnaïve \U0001f600 {secret} \U0001f600<|im_end|>\n").ids
    tail = backend.encode("The total was wrong. 1 + 2").ids
    branch = spell((0, ids), (1, tail))
    for tokens in ("drop", "mask"):
        redact = Redactor(tokens=tokens, decoder=lambda sha: backend)
        episode, hits = redact.episode(make_episode(branches=(branch,)))
        check_episode(episode)
        text = backend.decode(episode.branches[0].token_ids.tolist(), skip_special_tokens=False)
        assert secret[:20] not in text
        assert hits["openai_key"] == 1
        if tokens == "mask":
            assert text.endswith(backend.decode(tail))
            assert "naïve \U0001f600" in text


def test_addresses_are_secrets_when_asked_for() -> None:
    told = make_episode(messages=({"role": "user", "content": "write to ann.lee@example.org"},))
    assert Redactor().episode(told)[0].messages == told.messages
    clean, hits = Redactor(emails=True).episode(told)
    assert (clean.messages[0]["content"], hits["email"]) == ("write to [redacted:email]", 1)


def test_rules_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text("[[rule]]\nname = 'badge'\npattern = 'ACME-([0-9]{8})'\n")
    redact = Redactor(load_rules(tmp_path / "rules.toml"))
    told = make_episode(messages=({"role": "user", "content": "I am ACME-12345678, 12345678 for short"},))
    clean, hits = redact.episode(told)
    assert (clean.messages[0]["content"], hits["badge"]) == ("I am [redacted:badge], [redacted:badge] for short", 2)


@pytest.mark.parametrize(("text", "problem"), [
    ("rule = 3", "holds rule"), ("[[rule]]\nname='a'", "is not a name and a pattern"), ("[[rules]]\nname='a'", "holds"),
    ("[[rule]]\nname='a'\npattern='('", "no regular expression"), ("[[rule]]\nname='a'\npattern='x*'", "empty text"),
    ("[[rule]]\nname='jwt'\npattern='x'", "names a rule twice"), ("= 3", "cannot be read"), ("", "holds nothing")])
def test_bad_rules_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_rules(tmp_path / "rules.toml")


def test_a_rule_that_destroys_the_record_says_so(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text("[[rule]]\nname = 'all'\npattern = 'completed'\n")
    with pytest.raises(ConfigError, match="stop_reason"):
        Redactor(load_rules(tmp_path / "rules.toml")).episode(make_episode())


def test_what_is_made_public_was_redacted_or_checked() -> None:
    with pytest.raises(ConfigError, match="nothing took secrets out of it"):
        demand_redaction("publish", None, False)
    demand_redaction("publish", None, True)
    demand_redaction("publish", Redactor(), False)
