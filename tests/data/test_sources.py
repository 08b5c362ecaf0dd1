"""Where rows come from, and how each becomes an example."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsdpo.config.data import SourceConfig
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.examples import to_example
from dsdpo.data.sources import find_sources, read_rows, uses_of_rows
from dsdpo.errors import DataError
from tests.data.helpers import assistant, text_rows, user, write_jsonl


def rows_of(path: Path | str, **fields: Any) -> list[Any]:
    return [row for _, row in read_rows(find_sources([SourceConfig(path=str(path), **fields)], "train")[0])]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file's name states."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.arrow"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [
        {"prompt": [user("hé")], "chosen": [assistant(f"yes {i}")], "rejected": [assistant("no")]} for i in range(7)
    ]
    assert rows_of(write(tmp_path / name, rows)) == rows


def test_array_longer_than_the_read_buffer(tmp_path: Path) -> None:
    rows = [{"chosen": "x" * 700_000, "rejected": str(i)} for i in range(4)]
    assert rows_of(write(tmp_path / "a.json", rows)) == rows


def test_arrow_file_format(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(text_rows(3))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert rows_of(tmp_path / "a.arrow") == text_rows(3)


def test_folder_without_split_names_is_read_whole_in_name_order(tmp_path: Path) -> None:
    rows = text_rows(5)
    write(tmp_path / "b.parquet", rows[3:])
    write(tmp_path / "a.jsonl", rows[:3])
    (tmp_path / "README.md").write_text("not data")
    assert rows_of(tmp_path) == rows


def test_folder_with_split_names_gives_the_split_asked_for(tmp_path: Path) -> None:
    rows = text_rows(4)
    write(tmp_path / "train-00000-of-00002.jsonl", rows[:1])
    write(tmp_path / "train-00001-of-00002.jsonl", rows[1:2])
    write(tmp_path / "test.jsonl", rows[2:])
    source = SourceConfig(path=str(tmp_path))
    assert rows_of(tmp_path) == rows[:2]
    assert [row for _, row in read_rows(find_sources([source], "test")[0])] == rows[2:]
    with pytest.raises(DataError, match="'validation', only of: test, train"):
        rows_of(tmp_path, split="validation")


def files_of(folder: Path, split: str | None = None, default: str = "train") -> tuple[list[str], list[str]]:
    """Names of the files that are read, and of those that are not."""
    source = find_sources([SourceConfig(path=str(folder), split=split)], default)[0]  # type: ignore[arg-type]
    return [path.name for path in source.files], [path.name for path in source.unread]


def test_splits_that_are_alike_are_never_merged(tmp_path: Path) -> None:
    names = [f"{split}-00000-of-00001.parquet" for split in ("test_prefs", "train_gen", "train_prefs", "train_sft")]
    for name in names:
        write(tmp_path / name, text_rows(2))
    with pytest.raises(DataError, match="may be any of: train_gen, train_prefs, train_sft"):
        files_of(tmp_path)
    assert files_of(tmp_path, "train_prefs") == (names[2:3], names[:2] + names[3:])
    assert files_of(tmp_path, default="test")[0] == names[:1]  # the only one that is a test split


def test_parts_of_a_split_are_read_in_order_and_other_files_named(tmp_path: Path) -> None:
    parts = [f"train-{part:05d}-of-00002-{'ab' * 8}.parquet" for part in range(2)]
    for name in (*parts, "speed_test_results.jsonl", "extra.jsonl", "validation.jsonl"):
        write(tmp_path / name, text_rows(1))
    assert files_of(tmp_path) == (parts, ["extra.jsonl", "speed_test_results.jsonl", "validation.jsonl"])
    assert files_of(tmp_path, "dev")[0] == ["validation.jsonl"]
    assert files_of(tmp_path, "extra")[0] == ["extra.jsonl"]
    with pytest.raises(DataError, match="no files of split 'test', only of: extra, speed_test_results, train, valid"):
        files_of(tmp_path, default="test")


def test_snapshot_of_the_hub_has_its_files_in_data_below(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.parquet", text_rows(2))
    assert rows_of(tmp_path) == text_rows(2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part").mkdir()
    write(tmp_path / "other" / "part" / "a.jsonl", text_rows(1))
    with pytest.raises(DataError, match="There are some in part: name one of these folders"):
        rows_of(tmp_path / "other")


def test_pipe_is_no_file_and_ends_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        rows_of(tmp_path / "a.jsonl")


def test_tables_give_text_and_a_record_of_another_width_costs_one_row(tmp_path: Path) -> None:
    lines = ["prompt,chosen,rejected", 'p,"a, ""b""\nc",b', "p,a", "p,,b", ""]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    first, wide, empty = rows_of(tmp_path / "a.csv")
    assert first == {"prompt": "p", "chosen": 'a, "b"\nc', "rejected": "b"}
    assert isinstance(wide, BadRow)
    assert (wide.kind, wide.detail) == ("invalid_table", "2 cells, and the header has 3")
    assert empty == {"prompt": "p", "rejected": "b"}
    (tmp_path / "b.tsv").write_text("prompt\tchosen\trejected\np\ta\tb\n")
    assert rows_of(tmp_path / "b.tsv") == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    source = find_sources([SourceConfig(path=str(tmp_path / "a.csv"))], "train")[0]
    assert [place for place, _ in read_rows(source)] == ["a.csv:2", "a.csv:4", "a.csv:5"]


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    rows = text_rows(4)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:3])}).save_to_disk(tmp_path / "many")
    assert rows_of(tmp_path / "one") == rows
    assert rows_of(tmp_path / "many") == rows[:3]
    with pytest.raises(DataError, match="no split 'test', only train"):
        rows_of(tmp_path / "many", split="test")


@pytest.mark.parametrize("kind", ["file", "folder", "saved", "saved splits"])
def test_a_slice_is_a_part_of_the_rows_of_anything_local(kind: str, tmp_path: Path) -> None:
    rows, path = text_rows(7), tmp_path / "pairs"
    match kind:
        case "file":
            path = write(tmp_path / "a.jsonl", rows)
        case "folder":
            path.mkdir()
            write(path / "a.jsonl", rows[:3])
            write(path / "b.parquet", rows[3:])
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        case _:
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    for split, part in (
        ("train[:2]", rows[:2]), ("train[2:]", rows[2:]), ("train[:-2]", rows[:-2]), ("[-2:]", rows[-2:]),
        ("train[:60%]", rows[:4]), ("train[60%:]", rows[4:]), ("train[-30%:]", rows[5:]), ("train[:9]", rows),
        ("train", rows),
    ):  # fmt: skip
        assert rows_of(path, split=split) == part, split
    source = find_sources([SourceConfig(path=str(path), split="train[3:5]")], "train")[0]
    whole = find_sources([SourceConfig(path=str(path))], "train")[0]
    assert list(read_rows(source)) == list(read_rows(whole))[3:5], "a row is named by its place among all"
    with pytest.raises(DataError, match=r"split train\[7:\] holds no row"):
        rows_of(path, split="train[7:]")


def test_columnar_messages_lose_the_nulls_that_arrow_added(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    rows = [{"chosen": [user("u"), call, assistant("a")], "rejected": [user("u"), assistant("b")]}]
    assert rows_of(write(tmp_path / "a.parquet", rows)) == rows


def test_a_line_that_is_not_json_costs_one_row(tmp_path: Path) -> None:
    rows = rows_of(write_jsonl(tmp_path / "a.jsonl", [*text_rows(2), "{broken", "", '{"chosen": 3, "rejected": "x"}']))
    assert rows[:2] == text_rows(2)
    assert isinstance(rows[2], BadRow)
    assert rows[2].kind == "invalid_json"
    assert rows[3] == {"chosen": 3, "rejected": "x"}


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [text_rows(1)[0], "", text_rows(1)[0]])
    source = find_sources([SourceConfig(path=str(path))], "train")[0]
    assert [place for place, _ in read_rows(source)] == ["a.jsonl:1", "a.jsonl:3"]


UNREADABLE: dict[str, tuple[str, bytes, str]] = {
    "binary": ("a.jsonl", bytes(range(256)) * 40, "binary data"),
    "not utf-8": ("a.jsonl", b"\xff\xfe\xfa" * 100, "not a JSON Lines file"),
    "empty": ("a.jsonl", b"", "is empty"),
    "blank": ("a.jsonl", b"\n \n\n", "is empty"),
    "empty array": ("a.json", b"[]", "is empty"),
    "prose": ("a.jsonl", b"Once upon a time\nthere was a file\n", r"a\.jsonl:1: Expecting value"),
    "pretty-printed": ("a.json", b'{\n "chosen": "a",\n "rejected": "b"\n}', "not a JSON Lines file"),
    "numbers": ("a.jsonl", b"1\n2\n3\n", "a JSON int"),
    "cut array": ("a.json", b'[{"chosen": "a", "rejected": "b"}, {"cho', "element 1"),
    "not gzip": ("a.jsonl.gz", b'{"chosen": "a"}\n', "cannot be read as .jsonl.gz"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"chosen": "a", "rejected": "b"}\n' * 99)[:-12], "cannot be read"),
    "not parquet": ("a.parquet", b"PAR0" * 30, "cannot be read as .parquet"),
    "not arrow": ("a.arrow", b"ARROW?" * 30, "cannot be read as .arrow"),
    "prompt only": ("a.jsonl", b'{"prompt": "a", "id": 1}\n' * 5, "no chosen, rejected; its fields are: id, prompt"),
    "unknown format": ("a.xlsx", b"chosen,rejected\n", "known format"),
    "header alone": ("a.csv", b"chosen,rejected\n", "is empty"),
    "open quote": ("a.csv", b'chosen,rejected\n"a,b\nc,d\n', "begins in line 2 is not valid .csv"),
    "column twice": ("a.tsv", b"chosen\tchosen\n", "names a column twice"),
    "second array": (
        "a.json",
        b'[{"chosen": "a", "rejected": "b"}]\n[{"chosen": "c", "rejected": "d"}]',
        "more follows",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files_name_the_file_and_the_reason(tmp_path: Path, case: str) -> None:
    name, content, message = UNREADABLE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no_where", "data/nowhere.jsonl", "a/b/c", "nowhere.csv"])
def test_missing_local_path_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        rows_of(path)
    assert "data.train[0]" in str(caught.value)
    assert str(Path(path).expanduser()) in str(caught.value)


def test_hub_id_that_cannot_be_had_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/no-such-pairs cannot be loaded"):
        rows_of("nobody/no-such-pairs")


def test_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DataError, match="the Hub cannot be reached") as caught:
        rows_of("nobody/no-such-pairs")
    assert "HF_HUB_OFFLINE=1" in str(caught.value)


def test_folder_without_data_and_split_of_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        rows_of(tmp_path / "empty")
    with pytest.raises(DataError, match="one file and has no splits"):
        rows_of(write(tmp_path / "a.jsonl", text_rows(1)), split="test[:1]")
    with pytest.raises(DataError, match="name and revision"):
        rows_of(tmp_path / "a.jsonl", revision="main")


def test_column_mapping_must_name_columns_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "good": "a", "bad": "b"}])
    with pytest.raises(DataError, match=r"data\.train\[0\]\.columns: \{chosen"):
        rows_of(path)
    with pytest.raises(DataError, match=r"no better \(for chosen\)"):
        rows_of(path, columns={"chosen": "better", "rejected": "bad"})
    assert len(rows_of(path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})) == 1


@pytest.mark.parametrize("weight", [0.25, 1.0, 1.5, 2.0, 3.1])
def test_weights_are_uses_per_epoch(weight: float) -> None:
    uses = uses_of_rows(40, weight=weight, seed=1, index=0)
    assert uses.sum() == round(40 * weight)
    assert set(uses.tolist()) <= {int(weight), int(weight) + 1}
    assert np.array_equal(uses, uses_of_rows(40, weight=weight, seed=1, index=0))
    if weight % 1:
        assert not np.array_equal(uses, uses_of_rows(40, weight=weight, seed=2, index=0))


U, V, A, B = user("u"), user("v"), assistant("a"), assistant("b")
S = {"role": "system", "content": "s"}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: well\n\nAssistant:"

EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": (
        {"prompt": "p", "chosen": " a", "rejected": " b"},
        {"prompt": "p", "chosen": " a", "rejected": " b"},
    ),
    "messages": (
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    "implicit prompt of messages": (
        {"chosen": [U, A, V, A], "rejected": [U, A, V, B]},
        {"prompt": [U, A, V], "chosen": [A], "rejected": [B]},
    ),
    "dialogues that part at a user turn": (
        {"chosen": [U, A, V, A], "rejected": [U, A, U, B]},
        {"prompt": [U, A], "chosen": [V, A], "rejected": [U, B]},
    ),
    "one dialogue begins the other": (
        {"chosen": [U, A], "rejected": [U, A, V, B]},
        {"prompt": [U], "chosen": [A], "rejected": [A, V, B]},
    ),
    "text prompt beside whole dialogues": (
        {"prompt": "u", "chosen": [U, A], "rejected": [U, B]},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    "text prompt, message responses": (
        {"prompt": "u", "chosen": [A], "rejected": [B]},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    "messages prompt, text responses": (
        {"prompt": [S, U], "chosen": "a", "rejected": "b"},
        {"prompt": [S, U], "chosen": [A], "rejected": [B]},
    ),
    "single message objects": (
        {"prompt": [U], "chosen": A, "rejected": B},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    "responses that repeat the prompt": (
        {"prompt": [U], "chosen": [U, A], "rejected": [U, B]},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    "system becomes a message": (
        {"system": "s", "prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": [S, U], "chosen": [A], "rejected": [B]},
    ),
    "a prompt's own system message stands": (
        {"system": "other", "prompt": [S, U], "chosen": [A], "rejected": [B]},
        {"prompt": [S, U], "chosen": [A], "rejected": [B]},
    ),
    "system before text": (
        {"system": "s", "prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "s\n\np", "chosen": "a", "rejected": "b"},
    ),
    "tools and template options as JSON text": (
        {"prompt": [U], "chosen": [A], "rejected": [B], "tools": '[{"n": 1}]', "chat_template_kwargs": '{"k": 1}'},
        {"prompt": [U], "chosen": [A], "rejected": [B], "tools": [{"n": 1}], "chat_template_kwargs": {"k": 1}},
    ),
    "null fields of messages go": (
        {"prompt": [{**U, "name": None}], "chosen": [A], "rejected": [B]},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
    ),
    "Anthropic HH": (
        {"chosen": f"{HH} sure, a", "rejected": f"{HH} sure, b"},
        {"prompt": HH, "chosen": " sure, a", "rejected": " sure, b"},
    ),
    "plain dialogue text is cut at a word": (
        {"chosen": "Q: two plus two? A: four", "rejected": "Q: two plus two? A: five"},
        {"prompt": "Q: two plus two? A:", "chosen": " four", "rejected": " five"},
    ),
    "plain dialogue text is cut at a line": (
        {"chosen": "Question\nfour", "rejected": "Question\nfive"},
        {"prompt": "Question\n", "chosen": "four", "rejected": "five"},
    ),
    "one plain text begins the other": (
        {"chosen": "Q: yes", "rejected": "Q: yes or no"},
        {"prompt": "Q:", "chosen": " yes", "rejected": " yes or no"},
    ),
    "texts that part between words": (
        {"chosen": "Q: yes\nA", "rejected": "Q: yes or"},
        {"prompt": "Q: yes", "chosen": "\nA", "rejected": " or"},
    ),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_forms_of_rows(case: str) -> None:
    row, example = EXAMPLES[case]
    assert to_example(row, {}) == example


BAD: dict[str, tuple[Any, str]] = {
    "no object": ([1], "wrong_type"),
    "no chosen": ({"prompt": "p", "rejected": "b"}, "missing_field"),
    "null rejected": ({"prompt": "p", "chosen": "a", "rejected": None}, "missing_field"),
    "number": ({"prompt": "p", "chosen": 3, "rejected": "b"}, "wrong_type"),
    "list of text": ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "wrong_type"),
    "message without role": ({"prompt": "p", "chosen": [{"content": "a"}], "rejected": [B]}, "wrong_type"),
    "content a number": ({"prompt": "p", "chosen": [{**A, "content": 1}], "rejected": [B]}, "wrong_type"),
    "mixed forms": ({"prompt": "p", "chosen": "a", "rejected": [B]}, "wrong_type"),
    "tools beside text": ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{}]}, "wrong_type"),
    "tools not JSON": ({"prompt": [U], "chosen": [A], "rejected": [B], "tools": "f(x)"}, "wrong_type"),
    "system a number": ({"system": 1, "prompt": "p", "chosen": "a", "rejected": "b"}, "wrong_type"),
    "empty chosen": ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_field"),
    "blank prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_field"),
    "no messages": ({"prompt": [], "chosen": [A], "rejected": [B]}, "empty_field"),
    "empty answer": ({"prompt": [U], "chosen": [assistant("")], "rejected": [B]}, "empty_field"),
    "equal": ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equal_responses"),
    "user last": ({"prompt": [U], "chosen": [A, V], "rejected": [B]}, "not_by_assistant"),
    "nothing shared": ({"chosen": "abc", "rejected": "xyz"}, "no_common_prompt"),
    "no shared message": ({"chosen": [U, A], "rejected": [V, B]}, "no_common_prompt"),
    "empty after the prompt": ({"chosen": HH, "rejected": f"{HH} b"}, "empty_field"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_say_their_kind(case: str) -> None:
    row, kind = BAD[case]
    with pytest.raises(BadRow) as caught:
        to_example(row, {})
    assert caught.value.kind == kind, caught.value.detail


def test_columns_are_read_under_their_own_names() -> None:
    row = {"question": "p", "good": "a", "bad": "b", "prompt": "another"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert to_example(row, columns) == {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_real_hh_rows_end_the_prompt_where_the_last_answer_begins(shared: Path) -> None:
    rows = rows_of(shared / "data" / "hh_raw_300.jsonl")
    checked = 0
    for row in rows:
        try:
            example = to_example(row, {})
        except BadRow:
            continue
        assert example["prompt"].endswith("\n\nAssistant:")
        assert example["prompt"] + example["chosen"] == row["chosen"]
        assert example["prompt"] + example["rejected"] == row["rejected"]
        assert "\n\nAssistant:" not in example["chosen"]
        checked += 1
    assert checked >= 295
