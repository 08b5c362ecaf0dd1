"""Our page of DeepSpeed's keys against the installed DeepSpeed: an upgrade that changes them fails here."""

import json
import subprocess
import sys

import pytest

from dsdpo.engine import deepspeed_keys
from dsdpo.engine.deepspeed_keys import BESIDE, BLOCKS, REMOVED, RENAMED, REQUIRED, SCHEMA_FILE, UNSUPPORTED
from tests.commands.processes import environment_of


@pytest.fixture(scope="module")
def schema():
    """What the script makes in a process of its own: with a process group, DeepSpeed asks for other keys."""
    program = "import json; from dsdpo.engine.quirks.make_schema import make_schema; print(json.dumps(make_schema()))"
    done = subprocess.run([sys.executable, "-c", program], env=environment_of(), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_file_is_what_the_script_writes(schema):
    """`python -m dsdpo.engine.quirks.make_schema` writes it anew; read what changes before taking it."""
    assert json.loads(SCHEMA_FILE.read_text()) == schema


def test_a_block_read_key_by_key_and_one_with_a_model_are_whole(schema):
    blocks = schema["blocks"]
    assert blocks["bf16"]["bf16_master_weights_and_grads"] == "flag"
    assert blocks["zero_optimization"]["stage3_prefetch_bucket_size"] == "count"
    assert blocks["zero_optimization.offload_optimizer"]["ratio"] == "number"
    assert blocks["timers.throughput"] == {"enabled": "flag", "synchronized": "flag"}
    assert blocks[""]["prescale_gradients"] == "flag"
    assert "zero_optimization.max_live_parameters" in schema["old_names"]


def test_rules_are_about_keys_that_exist():
    """A rule about a key that DeepSpeed no longer has would never be met."""
    names = {f"{path}.{key}".removeprefix(".") for path, kinds in BLOCKS.items() for key in kinds}
    ruled = {*REQUIRED, *UNSUPPORTED, *deepspeed_keys.AT_LEAST, *deepspeed_keys.CHOICES}
    assert {name for name in ruled if not name.startswith("optimizer.params.")} <= names
    assert not names & {*REMOVED, *RENAMED}


def test_kinds_beside_the_file_are_only_those_it_does_not_tell(schema):
    for path, kinds in BESIDE.items():
        for key, kind in kinds.items():
            told = schema["blocks"][path].get(key, "any")
            assert told in ("any", "flag", "block", "text"), (path, key, told, kind)


def test_every_old_name_says_what_to_write(schema):
    for old, new in RENAMED.items():
        if old in schema["old_names"] and new.startswith("stage3_"):
            assert new in BLOCKS["zero_optimization"]


def test_another_deepspeed_than_the_tested_one_is_named(monkeypatch):
    assert deepspeed_keys.untested_deepspeed() is None
    monkeypatch.setattr(deepspeed_keys, "TESTED_VERSION", "0.18.0")
    assert "was tested with 0.18.0 only" in deepspeed_keys.untested_deepspeed()
