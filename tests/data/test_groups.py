"""Rows with one rated completion and with lists of completions: from the file to the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.config.data import DataConfig
from dsdpo.data.batch import PreferenceBatch
from dsdpo.data.binning import MicroBatchBudget, packed_cost, padded_cost
from dsdpo.data.pairs import Pairs, open_pairs, with_mismatched, write_index, write_tokens
from dsdpo.data.plan import plan_pass
from dsdpo.data.steps import BatchSource
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.errors import DataError
from dsdpo.reference.store import pair_keys
from tests.data.helpers import assistant, letter_tokenizer, text_rows, user, words, write_jsonl

RATED: list[Any] = [
    {"prompt": "p:", "completion": " good", "label": True},
    {"prompt": "p:", "completion": " bad", "label": 0},
    {"prompt": [user("q")], "completion": [assistant("yes")], "label": "desirable"},
    {"prompt": [user("q")], "completion": assistant("no"), "label": -1.0},
]
LISTS: list[Any] = [
    {"prompt": "p:", "completions": [" a", " bb", " ccc"], "scores": [2, 3, 1]},
    {"prompt": "p:", "completions": [" a", " bb", " a", " ccc"], "ranks": [3, 1, 2, 4]},
    {"prompt": [user("q")], "completions": [{"content": "yes", "score": 5}, {"content": "no", "score": 4}]},
]


def prepared(folder: Path, rows: list[Any], **settings: Any) -> Pairs:
    path = write_jsonl(folder / "rows.jsonl", rows)
    data = DataConfig.model_validate(
        {"train": str(path), "cache_dir": str(folder), "max_length": 50, "max_dropped_share": 0.6, **settings}
    )
    return open_pairs(prepare_pairs(data.train, letter_tokenizer(), data=data, seed=3, default_split="train"))


def texts(pairs: Pairs, row: int) -> list[str]:
    group = pairs[[row]][0]
    return [words(letter_tokenizer(), ids) for ids in (group.prompt, *group.responses)]


def batch_of(pairs: Pairs, layout: Any, rows: tuple[int, ...]) -> PreferenceBatch:
    budget = MicroBatchBudget(tokens=1000)
    return BatchSource(pairs, budget, layout, pad_token_id=0, rank=0, world_size=1).batch(rows)


def test_one_rated_completion_a_row(tmp_path: Path) -> None:
    rows = [*RATED, {"prompt": "p:", "completion": " x", "label": "so so"}, {"prompt": "p:", "completion": " y"}]
    pairs = prepared(tmp_path, rows)
    assert pairs.group_size == 1
    assert pairs.scores is not None
    assert pairs.scores[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert [texts(pairs, row) for row in range(4)] == [
        ["p:", " good</s>"], ["p:", " bad</s>"], ["uq;a", "yes;</s>"], ["uq;a", "no;</s>"],
    ]  # fmt: skip
    assert {problem.kind for problem in pairs.report.problems} == {"unknown_preference", "missing_field"}
    for layout in ("packed", "padded"):
        batch = batch_of(pairs, layout, (0, 3))
        assert (batch.group_size, batch.num_responses) == (1, 2)
        assert batch.scores is not None
        assert batch.scores.tolist() == [[1.0], [0.0]]
        assert batch.response.tolist() == [0] * 6 + [1] * 4
    assert batch_of(pairs, "packed", (0, 3)).num_tokens == 2 + 5 + 4 + 3, "neither has its last token"


def test_a_rated_completion_beside_one_of_another_prompt(tmp_path: Path) -> None:
    """The mismatched pairs of KTO's estimate: the next row's completion, unless that has the same prompt."""
    rows = [*RATED[:3], {"prompt": "a longer prompt:", "completion": " a longer one", "label": 1}]
    plain = prepared(tmp_path, rows)
    pairs = with_mismatched(plain, 50)
    assert pairs.group_size == 2
    assert [texts(pairs, row) for row in range(4)] == [
        ["p:", " good</s>", "yes;</s>"],
        ["p:", " bad</s>", "yes;</s>"],
        ["uq;a", "yes;</s>", " a longer one</s>"],
        ["a longer prompt:", " a longer one</s>", " good</s>"],
    ]
    assert texts(with_mismatched(plain, 12), 2) == ["uq;a", "yes;</s>", " a longe"], "cut, without an end"
    keys = pair_keys(pairs)
    assert len(set(keys.tolist())) == 4
    same = [(tuple(group.prompt), *map(tuple, group.responses)) for group in pairs[range(4)]]
    folder = tmp_path / "written"
    folder.mkdir()
    write_tokens(folder, [np.array([*group[0], *group[1], *group[2]]) for group in same])
    starts = np.cumsum([0, *pairs.lengths.sum(axis=1).tolist()[:-1]])
    write_index(folder, starts=starts, lengths=pairs.lengths, origins=pairs.origins, report=pairs.report)
    assert pair_keys(open_pairs(folder)).tolist() == keys.tolist(), "keys are of tokens, wherever they stand"
    assert texts(pairs.subset(np.array([3, 0])), 1) == texts(pairs, 0)
    for layout in ("packed", "padded"):
        batch = batch_of(pairs, layout, (0, 2))
        assert batch.group_size == 2
        assert batch.scores is not None
        assert batch.scores.tolist() == [[1.0], [1.0]]
    with pytest.raises(DataError, match="all rows have the same prompt"):
        with_mismatched(plain.subset(np.array([0, 1])), 50)


def test_lists_best_first(tmp_path: Path) -> None:
    tied = {"prompt": "p:", "completions": [" a", " b"], "scores": [1, 1]}
    pairs = prepared(tmp_path, [*LISTS, tied], pairing="list")
    assert pairs.group_size == 3
    assert texts(pairs, 0) == ["p:", " bb</s>", " a</s>", " ccc</s>"]
    assert texts(pairs, 1) == ["p:", " bb</s>", " a</s>", " ccc</s>"], "the same completion twice counts by its best"
    assert texts(pairs, 2) == ["uq;a", "yes;</s>", "no;</s>", ""]
    assert pairs.scores is not None
    assert pairs.scores.tolist()[:2] == [[3.0, 2.0, 1.0], [-1.0, -2.0, -4.0]]
    assert pairs.scores[2, :2].tolist() == [5.0, 4.0]
    assert np.isnan(pairs.scores[2, 2])
    assert pairs.lengths.tolist() == [[2, 4, 3, 5], [2, 4, 3, 5], [4, 5, 4, 0]]
    assert [problem.kind for problem in pairs.report.problems] == ["tie"]
    packed, padded = (batch_of(pairs, layout, (0, 2)) for layout in ("packed", "padded"))
    # " bb", " a" and " ccc" share their space; the last token of each predicts nothing.
    assert packed.num_tokens == (3 + 2 + 1 + 3) + (4 + 4 + 3)
    assert padded.input_ids.shape == (6, 9)
    for batch in (packed, padded):
        listed = sorted(zip(batch.response.tolist(), batch.targets.tolist(), strict=True))
        assert [number for number, _ in listed].count(5) == 0, "there is no third response of the second group"
        assert len(listed) == 4 + 5 + 3 + 4 + 5
    assert packed_cost(np.asarray(pairs.lengths)[[0, 2]]).tolist() == [2 + 3 + 2 + 4, 11 + 4 + 4 + 3]
    assert padded_cost(np.asarray(pairs.lengths)[[0, 2]]).tolist() == [21, 54]


def test_lists_are_planned_by_all_their_responses(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (300, 5)).astype(np.int32)
    lengths[::7, 4] = 0
    for layout in ("packed", "padded"):
        plan = plan_pass(lengths, world_size=3, budget=MicroBatchBudget(tokens=2000), layout=layout)  # type: ignore[arg-type]
        assert sorted(row for rank in plan for rows in rank for row in rows) == list(range(300))
        cost = packed_cost if layout == "packed" else padded_cost
        assert all(cost(lengths[list(rows)])[-1] <= 2000 for rank in plan for rows in rank if rows)


@pytest.mark.parametrize("rows", [[*RATED, *text_rows(2)], [*LISTS, *text_rows(2)], [*RATED, *LISTS]])
def test_kinds_of_rows_are_not_mixed(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match=r"data\.train: .* and .* cannot be trained on together"):
        prepared(tmp_path, rows, pairing="list")
