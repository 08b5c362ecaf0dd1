"""Chat templates of the families that people use, times a dozen shapes of rows, beside TRL's ids where it is there.

The templates are those that installed packages ship; none is part of this project. Each is rendered with a tokenizer of
bytes in which the template's markers are special tokens, so that every id can be read back as text.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.encode import Encoded, encode_examples, make_encoder
from dsdpo.data.examples import to_examples
from dsdpo.data.formats import RowRules
from tests.data.helpers import assistant, user

PACKAGES = {"trl": "chat_templates", "axolotl": "utils/chat_templates/templates"}
BAR = "[|\uff5c]"  # DeepSeek's is the wide one
MARKER = re.compile(
    rf"<{BAR}[^<>'\"\s{{}}]+?{BAR}>|</?s>|<(?:start|end)_of_turn>|<\|?turn\|?>|\[/?[A-Z_]+\]|<(?:eos|bos)>"
)
DATE = "2024-02-03"


def template_files() -> dict[str, Path]:
    """Every template for text that an installed package ships, by package and name."""
    found = {}
    for package, folder in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted((Path(place) / folder).glob("*.jinja")):
                found[f"{package}/{path.stem}"] = path
    return found


TEMPLATES = template_files()
needs_templates = pytest.mark.skipif(not TEMPLATES, reason=f"none of {', '.join(PACKAGES)} is installed")


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and one for each marker that the template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    markers = sorted({"<BOS>", "<EOS>", *MARKER.findall(template)})
    backend.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<BOS>", eos_token="<EOS>")
    tokenizer.chat_template = template
    return tokenizer


def call(city: str, *, as_text: bool = False) -> dict[str, Any]:
    """An assistant's call of the tool, with arguments as an object or as JSON text."""
    arguments: Any = f'{{"city": "{city}"}}' if as_text else {"city": city}
    function = {"name": "forecast", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
    }


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "forecast", "description": "d", "parameters": PARAMETERS}}]
TOOL_TURN = {"role": "tool", "name": "forecast", "tool_call_id": "abcdefghi", "content": "wet"}
SYSTEM = {"role": "system", "content": "Sys-Words"}
Q, A, B = user("First-Q"), assistant("Good-A"), assistant("Bad-B")


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]


SHAPES: dict[str, dict[str, Any]] = {
    "one question": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "system": {"prompt": [SYSTEM, Q], "chosen": [A], "rejected": [B]},
    "implicit prompt": {"chosen": [Q, A], "rejected": [Q, B]},
    "system in one dialogue": {"prompt": [Q], "chosen": [SYSTEM, Q, A], "rejected": [B]},
    "earlier turns": {"prompt": [Q, assistant("Early-A"), user("Next-Q")], "chosen": [A], "rejected": [B]},
    "responses of several turns": {
        "prompt": [Q],
        "chosen": [assistant("Early-A"), user("Next-Q"), A],
        "rejected": [assistant("Early-B"), user("Next-Q"), B],
    },
    "text parts": {
        "prompt": [{"role": "user", "content": parts("First-Q")}],
        "chosen": [{"role": "assistant", "content": parts("Good-A")}],
        "rejected": [B],
    },
    "spaces around": {"prompt": [user(" First-Q\n")], "chosen": [assistant("\nGood-A ")], "rejected": [B]},
    "begun answer": {"prompt": [Q, assistant("So: ")], "chosen": [A], "rejected": [B]},
    "thoughts in the content": {
        "prompt": [Q],
        "chosen": [assistant("<think>\nMuse-A\n</think>\n\nGood-A")],
        "rejected": [B],
    },
    "thoughts beside the content": {
        "prompt": [Q],
        "chosen": [{**A, "reasoning_content": "Muse-A"}],
        "rejected": [{**B, "reasoning_content": "Muse-B"}],
    },
    "tool calls": {"prompt": [Q], "chosen": [call("Rome")], "rejected": [call("Oslo", as_text=True)], "tools": TOOLS},
    "after a tool": {"prompt": [Q, call("Rome"), TOOL_TURN], "chosen": [A], "rejected": [B], "tools": TOOLS},
}
# Shapes that some templates cannot say: what is then said of the row, and nothing else.
MAY_BE_REFUSED: dict[str, set[str]] = {
    "system": {"template_refused", "template_drops"},
    "system in one dialogue": {"template_refused", "template_drops"},
    "thoughts beside the content": {"template_drops", "template_refused"},
    "tool calls": {"template_drops", "template_refused"},
    "after a tool": {"template_drops", "template_refused"},
    "thoughts in the content": {"template_drops"},
}


@functools.cache
def prepared_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return tokenizer_for(TEMPLATES[name].read_text(encoding="utf-8"))


def encode(name: str, shape: str) -> tuple[Any, Encoded | BadRow]:
    tokenizer = prepared_tokenizer(name)
    (example,) = to_examples(SHAPES[shape], RowRules())
    (result,) = encode_examples([example], make_encoder(tokenizer, max_length=100_000, date=DATE))
    return tokenizer, result


@needs_templates
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TEMPLATES or ["none"])
def test_each_part_of_a_row_stands_where_it_belongs(name: str, shape: str) -> None:
    tokenizer, result = encode(name, shape)
    if isinstance(result, BadRow):
        assert result.kind in MAY_BE_REFUSED.get(shape, set()), result
        return
    prompt, chosen, rejected = (tokenizer.decode(ids) for ids in (result.prompt, result.chosen, result.rejected))
    in_prompt = {"First-Q", *(["Sys-Words"] if "system" in shape else []), *(["So:"] if "begun" in shape else [])}
    in_chosen, in_rejected = {"Good-A"}, {"Bad-B"}
    match shape:
        case "earlier turns":
            in_prompt |= {"Early-A", "Next-Q"}
        case "responses of several turns":
            in_chosen, in_rejected = {"Early-A", "Next-Q", "Good-A"}, {"Early-B", "Next-Q", "Bad-B"}
        case "tool calls":
            in_chosen, in_rejected = {"forecast", "Rome"}, {"forecast", "Oslo"}
        case "after a tool":
            in_prompt |= {"forecast", "Rome", "wet"}
    for words, text in ((in_prompt, prompt), (in_chosen, chosen), (in_rejected, rejected)):
        assert all(text.count(word) == 1 or word == "forecast" for word in words), (words, text)
    assert not any(word in chosen + rejected for word in in_prompt - {"forecast", "Next-Q", "Rome"})
    assert not any(word in prompt for word in (in_chosen | in_rejected) - {"forecast"})
    if "several turns" in shape:
        for ids, mask, own in zip(result.responses, result.learned, (in_chosen, in_rejected), strict=True):
            learned = tokenizer.decode([token for token, one in zip(ids, mask or [], strict=True) if one])
            assert "Next-Q" not in learned
            assert all(word in learned for word in own - {"Next-Q"}), learned
    else:
        assert result.learned == ()
    if "thoughts" in shape and "thoughts_cut" not in result.notes:
        assert prompt.count("Muse-A") + chosen.count("Muse-A") == 1
    assert "{'" not in prompt + chosen + rejected, "printed as Python"
    assert (prompt + chosen).count("<BOS>") <= 1
    assert not (chosen + rejected).startswith("<BOS>")
    for response in (chosen, rejected):
        end = response.rstrip()
        assert end.endswith(tuple(tokenizer.all_special_tokens)) or MARKER.search(end[-40:]), "nothing ends it"
        assert response.count("<EOS>") <= (2 if "several" in shape else 1)
    assert DATE[:4] in prompt or "strftime_now" not in tokenizer.chat_template or "date" not in prompt.lower()


# Where our ids are not TRL's, and why.
NOT_AS_TRL = {
    "end_added": "a response that its template ends with no special token gets EOS from us and nothing from TRL",
    "begun answer": "TRL ends the begun answer's turn and opens another",
    "text parts": "TRL hands lists of parts to the template, which many print as Python",
    "tool calls": "TRL hands arguments to the template as they are, so that JSON text is quoted twice",
    "after a tool": "as for tool calls",
    "system in one dialogue": "TRL appends the dialogues to the prompt, which then stands twice",
    "lists of parts": "templates that take contents as lists alone write nothing of the strings that TRL hands them",
    "strftime_now": "TRL writes the date of the day",
}


def contents_stand(prompt: str, shape: str) -> bool:
    return "First-Q" in prompt and ("Sys-Words" in prompt or "system" not in shape)


TRL_SHAPES = [shape for shape in SHAPES if shape not in NOT_AS_TRL]


@pytest.mark.skipif(not any(name.startswith("trl/") for name in TEMPLATES), reason="TRL is not installed")
def test_ids_are_those_of_trl_but_for_what_the_table_explains() -> None:
    from datasets import Dataset
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    compared = 0
    for name in (name for name in TEMPLATES if name.startswith("trl/")):
        for shape in TRL_SHAPES:
            tokenizer, result = encode(name, shape)
            if isinstance(result, BadRow) or "strftime_now" in tokenizer.chat_template:
                continue
            rows = Dataset.from_list([SHAPES[shape]])
            trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
            try:
                theirs = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train")[0]
            except TemplateError:
                continue  # a row that TRL does not take
            if not contents_stand(tokenizer.decode(theirs["prompt_ids"]), shape):
                continue  # explained under "lists of parts"
            added = [tokenizer.eos_token_id] if any(note.startswith("end_added") for note in result.notes) else []
            assert theirs["prompt_ids"] == result.prompt, (name, shape)
            assert theirs["chosen_ids"] + added == result.chosen, (name, shape)
            assert theirs["rejected_ids"] + added == result.rejected, (name, shape)
            compared += 1
    assert compared > 200
