"""Numbers by group of tokens: they add up to those of the step, and each token stands in the group it belongs to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.diagnostics import component_norms
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.presets import resolve
from agentsdpo.learn.records import TokenStats
from agentsdpo.learn.rows import TrainRow, admit
from agentsdpo.learn.splits import partitions, split_metrics
from agentsdpo.metrics import check_keys


def rows_of(make_row: Callable[..., TrainRow], record: Callable[..., TrainRow], model: Any) -> list[TrainRow]:
    rows = [record(model, make_row(seed=i, episode=f"e{i}", prompt=6, hint=(30, 31))) for i in range(4)]
    tool = [np.arange(len(row.branch.token_ids)) % 2 == 0 for row in rows]
    return [replace(row, tool=flags, source="criteria" if i else "gold")
            for i, (row, flags) in enumerate(zip(rows, tool, strict=True))]


def stats_of(n: int, **given: torch.Tensor) -> TokenStats:
    zero, yes = torch.zeros(n), torch.ones(n, dtype=torch.bool)
    plain = {name: yes if name in ("mask", "gate", "top1_agree") else zero for name in TokenStats.__dataclass_fields__}
    return TokenStats(**{**plain, **given})


def test_each_token_stands_in_its_own_groups(make_row: Callable[..., TrainRow], record: Callable[..., TrainRow],
                                             tiny_model: Any) -> None:
    rows = admit(rows_of(make_row, record, tiny_model), 3, resolve("robust"), window=512, vocab_size=4096).rows
    ages, kinds, sources = partitions(rows)
    assert {ages.names[i] for i in ages.own} == {"S2-3"}
    assert kinds.names == ("text", "tool")
    assert kinds.own.tolist() == [int(at % 2 == 0) for row in rows for at in row.position]
    assert [sources.names[i] for i in sources.own] == [row.row.source for row in rows for _ in row.position]
    untold = [replace(rows[0], row=replace(rows[0].row, tool=None)), *rows[1:]]
    assert len(partitions(untold)) == 2, "one row that cannot tell its tool calls, and nobody pretends"


def test_hand_made_groups_give_hand_made_numbers(make_row: Callable[..., TrainRow], record: Callable[..., TrainRow],
                                                 tiny_model: Any) -> None:
    rows = admit(rows_of(make_row, record, tiny_model)[:1], 0, resolve("sdpopp"), window=512, vocab_size=4096).rows
    n = len(rows[0].position)
    tool = torch.tensor([at % 2 == 0 for at in rows[0].position])
    m = split_metrics(stats_of(n, gap=torch.where(tool, -2.0, 1.0), log_ratio=torch.where(tool, 1.0, 0.0).double(),
                               push=torch.where(tool, 3.0, -1.0), mask=~tool), rows, resolve("sdpopp"))
    assert (m["learn/gap/mean/tool"], m["learn/gap/abs/tool"], m["learn/gap/negative_share/tool"]) == (-2.0, 2.0, 1.0)
    assert (m["learn/gap/mean/text"], m["learn/gap/negative_share/text"]) == (1.0, 0.0)
    assert m["learn/ratio/mean/tool"] == pytest.approx(np.e)
    assert m["learn/ratio/max/S0"] == pytest.approx(np.e)
    assert m["learn/kl_k3/tool"] == pytest.approx(np.e - 2)
    assert (m["learn/ess_frac/tool"], m["learn/ess_frac/text"]) == pytest.approx((1.0, 1.0))
    assert m["learn/ess_frac/gold"] < 1.0
    assert (m["learn/masked_frac/tool"], m["learn/masked_frac/text"]) == (1.0, 0.0)
    share = float(tool.double().mean())
    assert m["learn/share/tool"] == pytest.approx(share)
    assert m["learn/push/tool"] == pytest.approx(3 * share / (3 * share + 1 - share))
    assert not any(key.endswith(("S1", "criteria")) for key in m), "an empty group has no keys"


@pytest.mark.parametrize("preset", ["robust", "sdpopp"])
def test_groups_of_a_real_step_add_up_to_the_step(preset: str, make_row: Callable[..., TrainRow],
                                                  record: Callable[..., TrainRow], tiny_model: Any) -> None:
    config: LearnConfig = resolve(preset, {"teacher": "frozen", "lr": 1e-3})
    learner = Learner(tiny_model, config)
    rows = rows_of(make_row, record, tiny_model)
    learner.step(rows, 0)
    m = learner.step(rows, 1).metrics
    check_keys(m, "step")
    for groups in (["S1"], ["text", "tool"], ["criteria", "gold"]):
        share = [m[f"learn/share/{group}"] for group in groups]
        assert sum(share) == pytest.approx(1.0)
        for key in ("gap/mean", "gap/abs", "ratio/mean", "kl_k3", "entropy/student", "entropy/teacher", "top1_agree",
                    "gated_frac", *(["divergence/mean"] if preset == "robust" else [])):
            whole = sum(part * m[f"learn/{key}/{group}"] for part, group in zip(share, groups, strict=True))
            assert whole == pytest.approx(m[f"learn/{key}"], rel=1e-4, abs=1e-6), key
        assert max(m[f"learn/ratio/max/{group}"] for group in groups) == pytest.approx(m["learn/ratio/max"], rel=1e-5)


def test_components_of_the_gradient_make_the_whole(make_row: Callable[..., TrainRow], record: Callable[..., TrainRow],
                                                   tiny_model: Any) -> None:
    m = Learner(tiny_model, resolve("robust", {"lr": 1e-3})).step(rows_of(make_row, record, tiny_model), 0).metrics
    parts = {key: value for key, value in m.items() if key.startswith("learn/grad_norm/")}
    assert {"attention", "mlp", "norm", "embedding"} >= {key.rsplit("/", 1)[1] for key in parts} >= {"attention", "mlp"}
    assert sum(value ** 2 for value in parts.values()) ** 0.5 == pytest.approx(m["learn/grad_norm"], rel=1e-5)
    assert component_norms(tiny_model) == {}, "no gradient outlives its step"
