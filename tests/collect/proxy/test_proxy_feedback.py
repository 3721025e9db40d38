"""Feedback at any time: while a conversation goes on, after it has ended, after a restart; nothing about others."""

import json
from typing import Any

import pyarrow.parquet as pq
import pytest
from proxy_stack import Stack, said

from agentsdpo.collect.proxy.shelf import StoreShelf
from agentsdpo.replay.store import ReplayStore


def tell(stack: Stack, **body: Any) -> Any:
    return stack.post("/v1/feedback", body)


def test_while_it_goes_on(stack: Stack) -> None:
    stack.start()
    answer = stack.ask("Sum?", conversation="c")
    told = tell(stack, conversation=answer["id"], text="Always in thousands.", author="ann")
    assert told.json() == {"conversation": "c", "state": "open", "items": 1}
    tell(stack, conversation="c", thumb="down")
    stack.close("c")
    (episode,) = stack.episodes()
    assert episode.hint is not None
    assert (episode.hint.turns, episode.hint.author) == (((0, "Always in thousands."),), "ann")
    assert episode.reward == 0.0
    assert episode.metadata["feedback"][0]["turn"] == 0


def test_after_it_ended_and_after_a_restart(stack: Stack) -> None:
    stack.start()
    first = stack.ask("Sum?", conversation="c")
    stack.ask("Sum?", said(first), "Shorter.", conversation="c")
    stack.close("c")
    stack.stop_proxy()
    stack.start()
    assert tell(stack, conversation="c", text="Wrong year.").json()["state"] == "stored"
    assert tell(stack, conversation="c", outcome={"reward": 0.25, "text": "Two of eight."}).status_code == 200
    assert tell(stack, conversation="c", edit="It is 7.", turn=1, thumb="up").status_code == 200
    (episode,) = stack.episodes()
    assert episode.hint is not None
    assert episode.hint.text.split("\n") == ["Wrong year.", "Outcome: Two of eight."]
    late = "Wrong year.\nOutcome: Two of eight."
    assert episode.hint.turns == ((0, f"Shorter.\n{late}"), (1, f"{late}\nThe answer should have been:\nIt is 7."))
    assert episode.reward == 1.0  # the thumb came last
    store = ReplayStore.open(stack.store, create=False)
    assert [row.label for row in store.branches("label == 'thumb_up'")] == ["thumb_up"]
    (row,) = store.branches("reward == 1.0")
    assert row.hint == episode.hint


def test_the_id_of_an_answer_names_its_attempt(stack: Stack) -> None:
    """Turns begin anew with each attempt at a conversation."""
    stack.start()
    first = stack.ask("Sum?", conversation="a.b")
    stack.close("a.b")
    second = stack.ask("Mean?", conversation="a.b")
    assert (first["id"], second["id"]) == ("chatcmpl-a.b.0-0", "chatcmpl-a.b.1-0")
    assert tell(stack, conversation=first["id"], text="Of the first.", thumb="up").json() == {
        "conversation": "a.b", "state": "stored", "items": 2}
    assert tell(stack, conversation=second["id"], text="Of the second.").json()["state"] == "open"
    assert tell(stack, conversation="chatcmpl-a.b.7-0", text="x").status_code == 404
    stack.close("a.b")
    tell(stack, conversation=second["id"], text="Late.")
    tell(stack, conversation=first["id"], text="Later.", thumb="down")
    tell(stack, conversation="chatcmpl-a.b.0", text="As ids were.")
    hints = [episode.hint.turns if episode.hint else () for episode in stack.episodes()]
    assert hints == [((0, "Of the first.\nLater."),), ((0, "Of the second.\nLate.\nAs ids were."),)]
    assert [episode.reward for episode in stack.episodes()] == [0.0, None]
    store = ReplayStore.open(stack.store, create=False)
    assert [row.key.attempt for row in store.branches("label == 'thumb_down'")] == [0]


def test_below_an_address_the_id_of_an_answer_counts(stack: Stack) -> None:
    """A client that has the address of its conversation as base sends its feedback there too."""
    stack.start()
    first = stack.ask("Sum?", conversation="c")
    stack.ask("Sum?", said(first), "Thanks!", conversation="c")
    told = stack.post("/c/c/v1/feedback", {"conversation": first["id"], "text": "In thousands."})
    assert told.json() == {"conversation": "c", "state": "open", "items": 1}
    assert stack.post("/c/c/v1/feedback", {"conversation": "d", "text": "x"}).status_code == 404
    assert stack.post("/c/c/v1/close", {"conversation": "d"}).json() == {"conversation": "d", "ended": 0}
    assert stack.post("/c/c/v1/close", {}).json() == {"conversation": "c", "ended": 1}
    hint = stack.episodes()[0].hint
    assert hint is not None
    assert (hint.text, hint.turns) == ("", ((0, "In thousands."),))


def test_of_an_attempt_that_nobody_may_train_on(stack: Stack) -> None:
    stack.start(train_allowed=False)
    answers = []
    for _ in range(2):
        answers.append(stack.ask("Sum?", conversation="c"))
        stack.close("c")
    for name in (answers[0]["id"], "c", "chatcmpl-c.9-0"):
        tell(stack, conversation=name, text=name)
    late = [json.loads(path.read_text()) for path in sorted((stack.store / "recordings" / "feedback").glob("*.json"))]
    assert [(one["attempt"], one["items"][0]["text"]) for one in late] == [(0, answers[0]["id"]), (1, "c")]


def test_it_is_for_what_led_to_it_since_the_user_last_spoke(stack: Stack) -> None:
    stack.start()
    talk = ["Sum?"]
    for news in ({"role": "tool", "content": "12"}, {"role": "tool", "content": "Error: no such file"},
                 "In thousands, please.", {"role": "tool", "content": "0.012"}, "Thanks, that's great!",
                 "Now the mean."):
        talk += [said(stack.ask(*talk, conversation="c")), news]
    stack.ask(*talk, conversation="c")
    stack.close("c")
    tell(stack, conversation="c", turn=4, text="Two digits.")
    (episode,) = stack.episodes()
    assert episode.hint is not None
    assert episode.hint.turns == ((0, "In thousands, please."),
                                  (1, "A tool failed after this: Error: no such file\nIn thousands, please."),
                                  (2, "In thousands, please."), (3, "Two digits."), (4, "Two digits."),
                                  (5, "Now the mean."))
    assert episode.hint.text == ""
    assert [one["text"] for one in episode.metadata["feedback"]].count("Thanks, that's great!") == 1, "it is recorded"


def test_thanks_alone_is_no_hint(stack: Stack) -> None:
    stack.start()
    stack.ask("Sum?", said(stack.ask("Sum?", conversation="c")), "Perfect, thank you!", conversation="c")
    stack.close("c")
    assert stack.episodes()[0].hint is None


def test_of_traffic_that_nobody_may_train_on(stack: Stack) -> None:
    stack.start(train_allowed=False)
    stack.ask("Sum?", conversation="c")
    stack.close("c")
    assert tell(stack, conversation="c", text="No.").json()["state"] == "stored"
    assert not (stack.store / "STORE.json").exists()
    (recording,) = (stack.store / "recordings").glob("*.parquet")
    row = pq.read_table(recording).to_pylist()[0]
    assert (row["train_allowed"], row["n_trainable"] > 0, row["task_id"]) == (False, True, "c")
    assert not list(stack.store.rglob("*.arrows"))
    assert len(list((stack.store / "recordings" / "feedback").glob("*.json"))) == 1


@pytest.mark.parametrize("body", [
    {}, {"text": ""}, {"thumb": "sideways"}, {"thumb": 2}, {"text": "x", "turn": -1}, {"outcome": "good"},
    {"outcome": float("1e300")}, {"edit": {"role": "assistant"}}, {"text": 3}, {"text": "x" * 9000},
    {"text": "x", "author": 1}])
def test_feedback_that_says_nothing(stack: Stack, body: dict[str, Any]) -> None:
    stack.start()
    stack.ask("Sum?", conversation="c")
    assert tell(stack, conversation="c", **body).status_code == 400
    stack.close("c")
    assert stack.episodes()[0].hint is None


@pytest.mark.parametrize("train_allowed", [True, False])
@pytest.mark.parametrize("open_", [True, False])
def test_of_a_turn_that_there_is_not(stack: Stack, train_allowed: bool, open_: bool) -> None:
    """Who counts from 1 must be told: the words would be read by nobody."""
    stack.start(train_allowed=train_allowed)
    answer = stack.ask("Sum?", conversation="c")
    if not open_:
        stack.close("c")
    for name, turn in {"c": {"turn": 1}, answer["id"].replace("-0", "-7"): {}}.items():
        told = tell(stack, conversation=name, text="No.", **turn)
        assert told.status_code == 400
        assert "the last one is 0" in told.json()["error"]["message"]
    assert tell(stack, conversation=answer["id"], text="No.").status_code == 200


@pytest.mark.parametrize("name", ["c", ""])
@pytest.mark.parametrize("train_allowed", [True, False])
def test_what_a_user_says_who_comes_back_when_the_conversation_has_ended(stack: Stack, name: str, train_allowed: bool
                                                                         ) -> None:
    """After lunch, say: the answer that was wrong is not the one that is open now."""
    stack.start(train_allowed=train_allowed)
    first = stack.ask("Sum?", conversation=name)
    second = stack.ask("Sum?", said(first), "Of both.", conversation=name)
    known = second["id"].removeprefix("chatcmpl-").rpartition(".")[0]
    stack.close(known)
    history = ["Sum?", said(first), "Of both.", said(second), "In thousands, always!"]
    for _ in range(2):  # a client that repeats itself
        stack.ask(*history, conversation=name)
    assert stack.proxy is not None
    stack.stop_proxy()
    if not train_allowed:
        (late,) = (stack.store / "recordings" / "feedback").glob("*.json")
        heard = json.loads(late.read_text())
        assert (heard["attempt"], [(one["turn"], one["text"]) for one in heard["items"]]) == (
            0, [(1, "In thousands, always!")])
        return
    old, *new = stack.episodes()
    assert old.hint is not None
    assert old.hint.turns == ((0, "Of both."), (1, "In thousands, always!"))
    assert [episode.hint for episode in new] == [None] * len(new)
    assert [(old.task_id == episode.task_id, episode.attempt) for episode in new] == (
        [(True, 1)] if name else [(False, 0)] * 2)


def test_of_an_ended_conversation_only_what_goes_on_from_it_counts(stack: Stack) -> None:
    stack.start()
    first = stack.ask("Sum?", conversation="c")
    stack.close("c")
    stack.ask("Sum?", said(first), "Again.", {"role": "assistant", "content": "of another model"}, "No!")
    stack.ask("Sum?", {"role": "assistant", "content": "other words"}, "No!")
    stack.ask("Other.", conversation="c")
    stack.stop_proxy()
    assert [episode.hint for episode in stack.episodes()] == [None] * 4


def test_what_is_said_in_a_conversation_with_a_name_is_of_no_other_that_began_alike(stack: Stack) -> None:
    stack.start()
    first = stack.ask("Sum?", conversation="a")
    stack.close("a")
    stack.ask("Sum?", said(first), "In thousands, always!", conversation="b")
    stack.stop_proxy()
    assert [episode.hint for episode in stack.episodes()] == [None] * 2


def test_what_cannot_be_attached_to_an_ended_conversation_costs_nobody_an_answer(
        stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A fault that nobody has thought of, here."""
    stack.start()
    first = stack.ask("Sum?", conversation="a")
    stack.close("a")
    monkeypatch.setattr(StoreShelf, "say", lambda *_: 1 / 0)
    again = stack.ask("Sum?", said(first), "In thousands, always!", conversation="a")
    assert again["choices"]
    assert "about conversation a is lost" in caplog.text


def test_of_no_conversation(stack: Stack) -> None:
    stack.start()
    assert tell(stack, conversation="nobody", text="x").status_code == 404
    assert tell(stack, text="x").status_code == 400


def test_switched_off(stack: Stack) -> None:
    stack.start(auto_feedback=False)
    first = stack.ask("Sum?", conversation="c")
    stack.ask("Sum?", said(first), "No!", conversation="c")
    stack.close("c")
    stack.ask("Sum?", said(first), "No!", conversation="c")
    assert stack.episodes()[0].hint is None


SECRET = "sk-" + 40 * "a"


@pytest.mark.parametrize("how", ["drop", "mask"])
def test_secrets_are_taken_out_of_text_and_tokens(stack: Stack, how: str) -> None:
    stack.start(redact=how)
    first = stack.ask(f"Use {SECRET} please.", conversation="c")
    stack.ask(f"Use {SECRET} please.", said(first), f"Not {SECRET}!", conversation="c")
    stack.ask("Nothing here.", conversation="clean")
    for name in ("c", "clean"):
        stack.close(name)
    tell(stack, conversation="c", text=f"And never {SECRET}.")
    clean, leaky = sorted(stack.episodes(), key=lambda e: e.task_id != "clean")
    assert clean.branches[0].n_trainable > 0
    (branch,) = leaky.branches
    assert branch.n_trainable == 0
    assert {call.untrainable_reason for call in branch.calls} == {"redacted"}
    assert SECRET not in stack.chat.decode(branch.token_ids.tolist())
    assert len(branch.token_ids) == 0 if how == "drop" else branch.n_sampled > 0
    assert leaky.hint is not None
    assert SECRET not in leaky.model_dump_json(exclude={"branches"})
    assert "redacted" in leaky.hint.text
    assert "redacted" in leaky.hint.turns[0][1]
    assert not list(stack.store.rglob("*.arrows"))


def test_secrets_are_taken_out_of_what_is_said_late_of_recordings(stack: Stack) -> None:
    stack.start(redact="mask", train_allowed=False)
    stack.ask("Sum?", conversation="c")
    stack.close("c")
    assert tell(stack, conversation="c", text=f"Never {SECRET}.").json()["state"] == "stored"
    (late,) = (stack.store / "recordings" / "feedback").glob("*.json")
    assert SECRET not in late.read_text()
    assert "redacted" in late.read_text()
