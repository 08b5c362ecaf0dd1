"""Rows to stored token pairs: borders, EOS and BOS, truncation, bad rows, the cache."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dsdpo.config.data import DataConfig
from dsdpo.data import chunks
from dsdpo.data.encode import BadRow, Encoded, encode_examples, make_encoder
from dsdpo.data.pairs import FILES, Pairs, damage
from dsdpo.data.tokenize import open_pairs, prepare_pairs, template_digest, tokenizer_digest
from dsdpo.errors import DataError
from tests.data.helpers import TEMPLATE, assistant, letter_tokenizer, text_rows, user, words, write_jsonl


def encoded(example: dict[str, Any], tokenizer: Any, max_length: int = 100, **settings: Any) -> Encoded:
    (result,) = encode_examples([example], make_encoder(tokenizer, max_length=max_length, **settings))
    assert isinstance(result, Encoded), result
    return result


def read(result: Encoded, tokenizer: Any) -> tuple[str, str, str]:
    return words(tokenizer, result.prompt), words(tokenizer, result.chosen), words(tokenizer, result.rejected)


def prepared(cache: Path, path: Path | list[Any], tokenizer: Any = None, **settings: Any) -> Pairs:
    sources = [
        str(entry) if isinstance(entry, Path) else entry for entry in (path if isinstance(path, list) else [path])
    ]
    data = DataConfig.model_validate({"train": sources, "cache_dir": str(cache), "max_length": 50, **settings})
    folder = prepare_pairs(data.train, tokenizer or letter_tokenizer(), data=data, seed=3, default_split="train")
    return open_pairs(folder)


MESSAGES = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
TEXT = {"prompt": "q:", "chosen": " yes", "rejected": " no"}


def test_messages_begin_the_response_after_the_generation_prompt() -> None:
    tokenizer = letter_tokenizer(bos=True)  # the template's ids stand as they are: no <s>, no </s>
    assert read(encoded(MESSAGES, tokenizer, add_eos="never"), tokenizer) == ("uq;a", "yes;", "no;")


def test_response_without_any_end_gets_one_unless_that_is_not_wanted() -> None:
    tokenizer = letter_tokenizer()
    added = encoded(MESSAGES, tokenizer)
    assert read(added, tokenizer) == ("uq;a", "yes;</s>", "no;</s>")
    assert added.notes == ("end_added </s>",)
    assert encoded(MESSAGES, tokenizer, add_eos="never").notes == ("no_end",)
    ended = letter_tokenizer(template=TEMPLATE.replace("};{", "}</s>{"))
    assert read(encoded(MESSAGES, ended), ended) == ("uq</s>a", "yes</s>", "no</s>")
    assert encoded(MESSAGES, ended).notes == ()
    other = letter_tokenizer(template=TEMPLATE.replace("};{", "}<unk>{"))
    assert encoded(MESSAGES, other).notes == ("other_end <unk>",)


def test_tools_and_template_options_reach_the_template() -> None:
    tokenizer = letter_tokenizer(template="{% if loud %}!{% endif %}" + TEMPLATE)
    example = {**MESSAGES, "tools": [{"name": "T"}, {"name": "2"}], "chat_template_kwargs": {"loud": True}}
    assert read(encoded(example, tokenizer), tokenizer) == ("!T2uq;a", "yes;</s>", "no;</s>")


def test_border_inside_a_token_starts_the_response_where_generation_would() -> None:
    tokenizer = letter_tokenizer(merges=[("a", "y")])  # "uq;ayes;" is u q ; ay e s ;
    result = encoded(MESSAGES, tokenizer)
    assert read(result, tokenizer) == ("uq;a", "yes;</s>", "no;</s>")
    assert len(result.prompt) == 4
    assert not result.rewritten


def test_template_that_rewrites_the_history_leaves_the_shared_beginning() -> None:
    # As templates of reasoning models do: the generation prompt opens a thought that no answer has.
    tokenizer = letter_tokenizer(template=TEMPLATE.replace("%}a{%", "%}a<t>{%"))
    result = encoded(MESSAGES, tokenizer)
    assert read(result, tokenizer) == ("uq;a", "yes;</s>", "no;</s>")
    assert result.rewritten


def test_text_gets_bos_once_and_eos_once() -> None:
    tokenizer = letter_tokenizer(bos=True)
    assert read(encoded(TEXT, tokenizer), tokenizer) == ("<s>q:", " yes</s>", " no</s>")
    marked = {"prompt": "<s>q:", "chosen": " yes</s>", "rejected": " no"}
    assert read(encoded(marked, tokenizer), tokenizer) == ("<s>q:", " yes</s>", " no</s>")
    plain = letter_tokenizer(bos=False)
    assert read(encoded(TEXT, plain), plain) == ("q:", " yes</s>", " no</s>")


def test_truncation_cuts_the_end_of_each_response() -> None:
    tokenizer = letter_tokenizer()
    result = encoded(TEXT, tokenizer, max_length=6)  # 2 of the prompt, 4 left: " yes" fits without its end
    assert read(result, tokenizer) == ("q:", " yes", " no</s>")
    assert result.truncated
    assert not encoded(TEXT, tokenizer, max_length=7).truncated


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Prompt <s> a b c d e f :, responses of 4 and 3 tokens besides their ends.
        ({"max_prompt_length": 3}, ("<s>ab", " yes</s>", " no</s>")),
        ({"max_prompt_length": 3, "truncation": "keep_end"}, ("<s>f:", " yes</s>", " no</s>")),
        ({"max_prompt_length": 3, "truncation": "keep_end", "max_length": 6}, (":", " yes</s>", " no</s>")),
        ({"truncation": "keep_end", "max_length": 10}, ("<s>def:", " yes</s>", " no</s>")),
        ({"truncation": "keep_end", "max_length": 5}, ("<s>:", " ye", " no")),  # no prompt is short enough
        ({"truncation": "keep_end"}, ("<s>abcdef:", " yes</s>", " no</s>")),
        ({"max_length": 10}, ("<s>abcdef:", " y", " n")),
    ],
)
def test_which_end_of_a_long_prompt_stays(settings: dict[str, Any], expected: tuple[str, str, str]) -> None:
    tokenizer = letter_tokenizer(bos=True)
    result = encoded({**TEXT, "prompt": "abcdef:"}, tokenizer, **settings)
    assert read(result, tokenizer) == expected
    assert ("prompt_cut" in result.notes) == (expected[0] != "<s>abcdef:")
    assert result.truncated == (not expected[1].endswith("</s>"))


@pytest.mark.parametrize(
    ("example", "max_length", "kind"),
    [
        (TEXT, 2, "prompt_too_long"),
        ({"prompt": "q", "chosen": "same then a", "rejected": "same then b"}, 6, "equal_after_truncation"),
        ({**MESSAGES, "chosen": [assistant("x"), assistant("no")]}, 50, "template_refused"),
    ],
)
def test_bad_rows_found_by_tokenizing(example: dict[str, Any], max_length: int, kind: str) -> None:
    strict = "{% if messages[-1].role == messages[-2].role %}{{ raise_exception('roles must alternate') }}{% endif %}"
    tokenizer = letter_tokenizer(template="{% if messages | length > 1 %}" + strict + "{% endif %}" + TEMPLATE)
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    first, bad, last = encode_examples([good, example, good], make_encoder(tokenizer, max_length=max_length))
    assert isinstance(bad, BadRow)
    assert bad.kind == kind
    assert first == last
    assert isinstance(first, Encoded)


def test_pair_is_the_row_of_the_file(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer()
    pairs = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", text_rows(2500)), tokenizer)
    assert len(pairs) == 2500
    assert (pairs.report.dropped, pairs.report.truncated) == (0, 0)
    for pair in pairs[[0, 999, 1000, 2499]]:
        read_back = [words(tokenizer, ids) for ids in (pair.prompt, *pair.responses)]
        assert read_back == [f"p{pair.pair_id}", f" good{pair.pair_id}</s>", f" bad{pair.pair_id}</s>"]
        assert pairs.lengths[pair.pair_id].tolist() == [len(ids) for ids in (pair.prompt, *pair.responses)]
        assert pairs.origins[pair.pair_id].tolist() == [0, pair.pair_id]


def test_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    rows = text_rows(40)
    rows[7]["chosen"] = ""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    one, two = (prepared(tmp_path / str(count), path, dataset_num_proc=count) for count in (1, 2))
    assert one.digest == two.digest
    assert one.report == two.report
    assert np.array_equal(one.origins, two.origins)


def test_bad_rows_are_dropped_and_reported_also_from_the_cache(tmp_path: Path) -> None:
    rows: list[Any] = [*text_rows(12), "{broken", {"prompt": "x" * 60, "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "q", "chosen": 1, "rejected": "b"}] * 7
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        pairs = prepared(tmp_path, path, max_dropped_share=0.5)
        assert pairs.origins[:, 1].tolist() == list(range(12))
        assert (pairs.report.rows, pairs.report.kept, pairs.report.dropped) == (21, 12, 9)
        found = {problem.kind: (problem.count, problem.places) for problem in pairs.report.problems}
        assert found == {
            "invalid_json": (1, ("a.jsonl:13",)),
            "prompt_too_long": (1, ("a.jsonl:14",)),
            "wrong_type": (7, tuple(f"a.jsonl:{line}" for line in range(15, 20))),
        }
        assert "7 wrong_type" in pairs.report.text
        assert "chosen is text or a list of {role, content}, not int 1" in pairs.report.text


def test_limits_on_bad_rows_hold_with_and_without_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*text_rows(9), {"prompt": "p", "chosen": "a", "rejected": "a"}])
    for _ in range(2):
        assert len(prepared(tmp_path, path)) == 9
        with pytest.raises(DataError, match=r"data\.train: bad rows, and data\.strict is true"):
            prepared(tmp_path, path, strict=True)
        with pytest.raises(DataError, match=r"10\.0% of the rows are bad, data\.max_dropped_share allows 5\.0%"):
            prepared(tmp_path, path, max_dropped_share=0.05)


def test_no_row_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(3))
    with pytest.raises(DataError, match="no usable row is left") as caught:
        prepared(tmp_path, path, max_length=2, max_dropped_share=1.0)
    assert "3 prompt_too_long (the prompt alone fills data.max_length)" in str(caught.value)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [MESSAGES])
    with pytest.raises(DataError, match=r"a\.jsonl:1 holds messages, but the tokenizer has no chat template"):
        prepared(tmp_path, path, letter_tokenizer(template=None))


def test_half_a_surrogate_pair_costs_one_row(tmp_path: Path) -> None:
    odd = '{"prompt": "p", "chosen": "\\ud83d", "rejected": "b"}'
    pairs = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", [*text_rows(9), odd]))
    assert [problem.kind for problem in pairs.report.problems] == ["wrong_type"]


def test_sources_of_different_forms_and_weights_follow_one_another(tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", text_rows(4))
    tools = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")], "tools": [{"x": 1}]}
    chat = write_jsonl(tmp_path / "chat.jsonl", [MESSAGES, tools])
    tokenizer = letter_tokenizer()
    sources = [{"path": str(text), "weight": 1.5}, {"path": str(chat), "weight": 2.0}]
    pairs = prepared(tmp_path, sources, tokenizer)
    assert pairs.report.rows == pairs.report.kept == 6
    rows = pairs.origins.tolist()
    assert rows[:4] == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert len({row for source, row in rows[4:6]}) == 2
    assert rows[6:] == [[1, 0], [1, 1], [1, 0], [1, 1]]
    assert [words(tokenizer, pair.prompt) for pair in pairs[[6, 7, 8, 9]]] == ["uq;a", "T1uq;a"] * 2
    again, third = pairs[[4]][0], pairs[[rows[4][1]]][0]
    assert again.pair_id == 4
    assert np.array_equal(again.responses[0], third.responses[0])


def test_weight_below_one_takes_a_sample(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(40))
    pairs = prepared(tmp_path, [{"path": str(path), "weight": 0.25}])
    assert len(pairs) == pairs.report.rows == 10
    assert sorted(set(pairs.origins[:, 1].tolist())) == pairs.origins[:, 1].tolist() != list(range(10))


def test_second_run_opens_what_the_first_made(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(5))
    tokenizer = letter_tokenizer()
    prepared(tmp_path, path, tokenizer)
    (folder,) = (tmp_path / "dsdpo").iterdir()
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves settings in a fast tokenizer
    prepared(tmp_path, path, tokenizer)
    assert list((tmp_path / "dsdpo").iterdir()) == [folder]
    assert before == {name: (folder / name).stat().st_mtime_ns for name in FILES}


def test_the_cache_key_covers_all_that_decides_token_ids(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(5))
    made = {prepared(tmp_path, path).digest}
    prepared(tmp_path, path, max_length=49)
    prepared(tmp_path, path, letter_tokenizer(template="{{ 1 }}"))
    prepared(tmp_path, path, letter_tokenizer(merges=[("g", "o")]))
    prepared(tmp_path, [{"path": str(path), "weight": 2.0}])
    prepared(tmp_path, [{"path": str(path), "columns": {"chosen": "rejected", "rejected": "chosen"}}])
    os.utime(path, ns=(1, 1))
    prepared(tmp_path, path)
    assert len(list((tmp_path / "dsdpo").iterdir())) == 7
    assert len(made) == 1


def test_digest_is_of_tokens_and_order_alone(tmp_path: Path) -> None:
    rows = text_rows(6)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    moved = write_jsonl(tmp_path / "moved.jsonl", [{**row, "id": 1} for row in rows])
    turned = write_jsonl(tmp_path / "turned.jsonl", rows[::-1])
    digest = prepared(tmp_path, path).digest
    assert prepared(tmp_path / "elsewhere", moved).digest == digest
    assert prepared(tmp_path, turned).digest != digest


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 // 4 * 4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", FILES)
def test_damaged_pairs_are_noticed_and_made_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(5))
    made = prepared(tmp_path, path)
    (folder,) = (tmp_path / "dsdpo").iterdir()
    good = {file: (folder / file).read_bytes() for file in FILES}
    for harm in (cut, flip, Path.unlink):
        harm(folder / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = prepared(tmp_path, path)
        assert "made again" in caplog.text
        assert str(folder) in caplog.text
        assert again.digest == made.digest
        assert {file: (folder / file).read_bytes() for file in FILES} == good
        assert list((tmp_path / "dsdpo").iterdir()) == [folder]
    cut(folder / name)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl does not exist"):  # before anything is deleted
        prepared(tmp_path, path)
    assert folder.is_dir()


def test_pairs_are_read_whole_only_where_a_file_has_changed(tmp_path: Path) -> None:
    prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", text_rows(5)))
    (folder,) = (tmp_path / "dsdpo").iterdir()
    tokens = folder / "tokens.bin"
    os.utime(tokens, (0, 0))
    assert damage(folder) is None  # and takes note of the files as they are
    unchanged = tokens.stat()
    flip(tokens)
    assert "not what was written" in (damage(folder) or "")
    os.utime(tokens, ns=(unchanged.st_atime_ns, unchanged.st_mtime_ns))
    assert damage(folder) is None  # shows that the file was not read
    os.utime(tokens)
    assert "not what was written" in (damage(folder) or "")


def test_what_was_encoded_before_a_kill_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process of its own prepares and is killed in the middle; the next one goes on, and its result is the same."""
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(60))
    whole = prepared(tmp_path / "whole", path)
    cache = tmp_path / "cut" / "dsdpo"
    child = multiprocessing.get_context("fork").Process(target=_prepare_until_killed, args=(tmp_path / "cut", path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (left,) = cache.glob(".pairs-*")
    done = sorted(left.iterdir())
    assert len(done) == 3
    done[1].write_bytes(done[1].read_bytes()[:-40])  # as a power cut might leave it
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 10)
    with caplog.at_level(logging.WARNING):
        again = prepared(tmp_path / "cut", path)
    assert "20 rows were encoded by a preparation that was ended" in caplog.text
    assert again.digest == whole.digest
    assert [entry.name for entry in cache.iterdir() if not entry.name.startswith(".making-")] == [
        entry.name for entry in (tmp_path / "whole" / "dsdpo").iterdir()
    ]


def _prepare_until_killed(cache: Path, path: Path) -> None:
    chunks.CHUNK_ROWS = 10
    save = chunks.Chunk.save

    def save_and_die(chunk: chunks.Chunk, path: Path) -> None:
        save(chunk, path)
        if path.name == "chunk-000002.npz":
            os.kill(os.getpid(), signal.SIGKILL)

    chunks.Chunk.save = save_and_die  # type: ignore[method-assign]
    prepared(cache, path, dataset_num_proc=1)


def test_columns_of_numbers_stay_with_their_pairs(tmp_path: Path) -> None:
    rows: list[Any] = text_rows(4)
    rows[1] |= {"margin": 2.5, "strength": 3}
    rows[2] |= {"margin": -1}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    plain = prepared(tmp_path / "plain", path)
    assert plain.margins is not None
    assert plain.margins.tolist() == [0.0, 2.5, -1.0, 0.0], "0 where others have one"
    assert plain.weights is None
    mapped = prepared(tmp_path / "mapped", [{"path": str(path), "columns": {"weight": "strength"}, "weight": 2}])
    assert mapped.weights is not None
    assert mapped.weights.tolist() == [1.0, 3.0, 1.0, 1.0] * 2
    assert (mapped[[5]][0].margin, mapped[[5]][0].weight) == (2.5, 3.0)
    assert prepared(tmp_path / "none", write_jsonl(tmp_path / "b.jsonl", text_rows(4))).margins is None


def test_facts_of_each_source(tmp_path: Path) -> None:
    first = [*text_rows(5), text_rows(3)[2], {"prompt": "p", "chosen": "a", "rejected": "a"}, "{"]
    second = [{"prompt": "q", "chosen": "x" * 60, "rejected": "b"}]
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("one", first), ("two", second))]
    one, two = prepared(tmp_path, [{"path": str(path), "weight": 2} for path in paths], max_dropped_share=1).sources
    assert (one.rows, one.pairs, one.duplicates, one.truncated) == (8, 6, 1, 0)
    assert one.dropped == {"equal_responses": 1, "invalid_json": 1}
    assert (two.rows, two.pairs, two.dropped, two.truncated) == (1, 1, {}, 1)
    assert two.tokens == 2 * 1 + 49 + 2  # both prompts, the response cut to 50 - 1, "b" and its end
    assert two.path == str(paths[1])


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", text_rows(3)), max_length=1)
    assert list((tmp_path / "dsdpo").iterdir()) == []


def test_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(3))
    with pytest.raises(DataError, match=r"data\.cache_dir: .* cannot be written"):
        prepared(path, path)  # a file where the folder should be


def test_weight_that_leaves_no_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows(5))
    with pytest.raises(DataError, match="the weights leave none of 5 rows"):
        prepared(tmp_path, [{"path": str(path), "weight": 0.01}])


def test_digests_of_tokenizer_and_template() -> None:
    one, other = letter_tokenizer(), letter_tokenizer(merges=[("a", "b")], template="x")
    assert tokenizer_digest(one) == tokenizer_digest(letter_tokenizer()) != tokenizer_digest(other)
    assert template_digest(one) == template_digest(letter_tokenizer()) != template_digest(other)


def test_first_real_pair_has_the_ids_that_trl_gives_it(shared: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-sft")
    pairs = prepared(tmp_path, shared / "data" / "train.jsonl", tokenizer, max_length=512)
    expected = json.loads((shared / "parity" / "sigmoid.json").read_text())["first_pair_ids"]
    pair = pairs[[0]][0]
    parts = {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
    assert {f"{name}_ids": ids.tolist() for name, ids in parts.items()} == expected
    assert len(pairs) == 4745
    assert pairs.report.text == ""
