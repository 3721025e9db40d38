"""Answers that a publisher cuts off: gone on with, with a version for each token, or no answer at all."""

from collections.abc import Callable

import pytest
from proxy_stack import Json, Stack


def aborted(n: int) -> Callable[[Json], Json]:
    """A publisher cuts the answer off after ``n`` tokens."""
    def cut(answer: Json) -> Json:
        (choice,) = answer["choices"]
        choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:n], "abort"
        choice["logprobs"]["content"] = choice["logprobs"]["content"][:n]
        choice["weight_versions"] = [{**choice["weight_versions"][0], "end": n}] if n else []
        return answer
    return cut


def test_an_answer_cut_off_by_a_publisher_is_gone_on_with(stack: Stack) -> None:
    def abort(answer: Json) -> Json:
        stack.engine.version = "1"
        return aborted(2)(answer)
    stack.engine.say = lambda prompt: "reply 1"[len(prompt.rpartition("assistant\n")[2]):]
    stack.engine.faults = [abort]
    stack.start()
    assert stack.ask("Hi.", conversation="c")["choices"][0]["message"]["content"] == "reply 1"
    stack.close("c")
    (branch,) = stack.episodes()[0].branches
    assert [span.version for span in branch.calls[0].versions] == [0, 1]
    assert branch.n_trainable == branch.n_sampled


@pytest.mark.parametrize(("n", "limits", "status"), [
    (0, {"retry_s": 0.3}, 502), (1, {"timeout_s": 0.3}, 504)])
def test_an_answer_that_is_cut_off_again_and_again_is_none(stack: Stack, n: int, limits: Json, status: int) -> None:
    stack.engine.faults = [aborted(n)] * 10_000
    stack.start(**limits)
    answer = stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi."}]})
    assert answer.status_code == status, answer.text
    assert n or len(stack.engine.requests) < 10, "it is asked again with pauses"


def test_an_answer_cut_off_at_its_limit_is_as_long_as_it_may_be(stack: Stack) -> None:
    stack.engine.faults = [aborted(1)] * 2
    stack.start()
    answer = stack.ask("Hi.", conversation="c", max_tokens=2)
    assert answer["choices"][0]["finish_reason"] == "length"
    stack.close("c")
    assert stack.episodes()[0].branches[0].calls[0].finish_reason == "length"
