"""The model that reads demonstrations: what it was taught, and that it does as it is shown."""

from itertools import islice

import pytest

from agentsdpo.benchmarks.methods import episodes
from agentsdpo.benchmarks.methods.sdft.build import STAGES
from agentsdpo.calls import HERMES
from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.hint.sources import DEMO
from agentsdpo.lift import Player
from agentsdpo.types import Hint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_its_text_shows_the_very_task_under_rules_that_do_not_last(chat: ChatFormat) -> None:
    told = set()
    for (stage, stream), share in zip(STAGES, (0.5, 0.7), strict=True):
        found = list(islice(stream(chat, 3), 60))
        shown = [trace for trace in found if DEMO in trace.text]
        assert abs(len(shown) / len(found) - share) < 0.2, stage
        for trace in shown:
            before, text = trace.text.split(DEMO)[1].split("<|im_end|>", 1)
            said = "".join(trace.text[start:end] for start, end in trace.spans)
            done = [call for call in HERMES.parse(said, 0)[0] if call.name in ("cell_set", "mail_send", "submit")]
            assert DEMO not in text
            assert done
            assert all(f"{call.name} " in before for call in done)
            told |= {call.arguments["to"] for call in done
                     if call.name == "mail_send" and isinstance(call.arguments, dict)}
        again = [trace.text for trace in islice(stream(chat, 3), 60)]
        assert again == [trace.text for trace in found]
    assert len(told) >= 4, "whom an expert tells differs from one to the next"


def test_it_does_as_it_is_shown_and_knows_no_rule_without() -> None:
    player = Player.of(episodes.SHOWN.config(episodes.COMMON, 0))
    tasks = {f"desk-mini-train-{index}": ("train", index) for index in range(900, 916)}
    suite = DeskSuite("desk-mini")
    hints = {name: Hint(text=f"{DEMO}\n{suite.demo(suite.task(*place))}", source="demo", author="expert")
             for name, place in tasks.items()}
    bare, shown = player.scores(tasks, {}, seed=1), player.scores(tasks, hints, seed=1)
    assert list(shown.values()) == [1.0] * len(tasks)
    assert len(bare) == len(tasks)
    assert max(bare.values()) < 1.0
