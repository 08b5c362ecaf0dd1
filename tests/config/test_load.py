"""RUN.yaml and the command line: what wins, what is refused and in which words."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from dsdpo.config.load import check_deepspeed_files, dotted_keys, dump_yaml, load_run, run_parser
from dsdpo.config.loss import LOSSES, listed
from dsdpo.errors import ConfigError

GOOD = """
model: {path: some/model}
data: {train: some/data}
optimizer: {learning_rate: 1e-6}
loss:   # all defaults
deepspeed: ds.json
output_dir: out
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text, *options, name="run.yaml"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(textwrap.dedent(text))
    parser = run_parser("dsdpo train", "Train.")
    parser.add_argument("--dry-run", action="store_true")
    return load_run([name, *options], parser)


def refusal(text, *options):
    with pytest.raises(ConfigError) as refused:
        load(text, *options)
    return str(refused.value)


def test_command_line_beats_yaml_beats_defaults():
    run, _ = load(GOOD + "batch: {pairs_per_step: 8}\n", "--loss.beta", "0.2", "--batch.pairs_per_step=16")
    assert (run.loss.beta, run.batch.pairs_per_step, run.loss.type) == (0.2, 16, "sigmoid")
    mix, _ = load(GOOD, "--loss.type", "[sigmoid, sft]", "--loss.weights", "[0.5,1]", "--loss.beta_schedule.end", "1")
    assert (mix.loss.parts, mix.loss.beta_at(10, 10)) == ((("sigmoid", 0.5), ("sft", 1.0)), 1.0)


def test_scientific_notation_that_yaml_calls_text_is_a_number():
    assert isinstance(yaml.safe_load("1e-6"), str)
    run, _ = load(GOOD)
    assert run.optimizer.learning_rate == 1e-6
    run, _ = load(GOOD, "--optimizer.learning_rate", "3e-5")
    assert run.optimizer.learning_rate == 3e-5


def test_environment_variables_set_nothing(monkeypatch):
    plain, _ = load(GOOD)
    for name, value in {
        "MODEL": '{"path": "other"}',
        "DATA": "other",
        "LOSS": '{"beta": 9}',
        "LOSS__BETA": "9",
        "LOSS.BETA": "9",
        "DEEPSPEED": "other.json",
        "OUTPUT_DIR": "elsewhere",
    }.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower(), value)
    assert load(GOOD)[0] == plain


def test_the_commands_own_flags_and_the_launchers_are_no_settings():
    run, flags = load(GOOD, "--local_rank=3", "--dry-run")
    assert (flags.dry_run, flags.local_rank, str(flags.run)) == (True, 3, "run.yaml")
    assert run == load(GOOD)[0]


def test_sources_and_optional_sections_from_the_command_line():
    options = ["--data.train", "a", "--data.train", '{"path": "b", "weight": 2}']
    options += ["--data.strict", "true", "--tracking.wandb.project", "p", "--model.revision", "null"]
    run, _ = load(GOOD, *options)
    assert [(source.path, source.weight) for source in run.data.train] == [("a", 1.0), ("b", 2.0)]
    assert run.data.strict
    assert run.tracking.wandb is not None
    assert run.tracking.wandb.project == "p"
    assert run.model.revision is None


def test_what_is_dumped_runs_again_as_it_is():
    sections = "data: {train: [{path: a, columns: {chosen: best}}, b], eval: c}\ntracking: {wandb: {tags: [x]}}\n"
    run, _ = load(GOOD.replace("data: {train: some/data}\n", "") + sections, "--optimizer.learning_rate", "5e-7")
    dumped = dump_yaml(run)
    assert load(dumped, name="again.yaml")[0] == run
    for section in ("checkpoint", "evaluation", "distributed"):
        assert section in yaml.safe_load(dumped)


def test_a_path_means_here_or_else_beside_the_run_file(folder):
    recipes = folder / "recipes"
    recipes.mkdir()
    for path in ("here.json", "recipes/here.json", "recipes/beside.json"):
        (folder / path).write_text("{}")
    text = GOOD.replace("ds.json", "here.json") + "reference: {deepspeed: beside.json, path: hub/id}\n"
    run, _ = load(text, name="recipes/run.yaml")
    assert (run.deepspeed, run.reference.deepspeed, run.reference.path) == (
        "here.json",
        "recipes/beside.json",
        "hub/id",
    )


def test_everything_wrong_in_a_file_is_said_at_once():
    message = refusal(
        """
        model: {path: m, revison: x}
        data: {train: [{path: a, wieght: 2}], max_length: long}
        loss: {type: dpo}
        beta: 0.1
        losss: {}
        output_dir: out
        """,
        "--batch.pairs_per_step",
        "many",
    )
    assert message.splitlines() == [
        "run.yaml: model.revison is not a setting; did you mean model.revision?",
        "run.yaml: data.train[0].wieght is not a setting; did you mean weight?",
        "run.yaml: data.max_length is 'long': input should be a valid integer, unable to parse string as an integer",
        f"run.yaml: loss.type is 'dpo': input should be {listed(list(LOSSES))}",
        "command line: batch.pairs_per_step is 'many': input should be a valid integer, unable to parse string as an "
        "integer",
        "run.yaml: deepspeed is missing (DeepSpeed JSON of the policy engine)",
        "run.yaml: beta is not a setting; did you mean loss.beta?",
        "run.yaml: losss is not a setting; did you mean loss?",
    ]


@pytest.mark.parametrize(
    ("text", "options", "mentions"),
    [
        (GOOD, ["--loss.betta", "0.2"], ["--loss.betta is not an option", "did you mean --loss.beta?"]),
        (GOOD, ["stray"], ["stray"]),
        (GOOD, ["--loss.beta"], ["expected one argument"]),
        (GOOD, ["--loss.type", "hinge", "--loss.label_smoothing", "0.1"], ["loss.label_smoothing", "loss.type hinge"]),
        (GOOD + "model: {path: twice}\n", [], ["run.yaml:8:", "model stands here a second time"]),
        (GOOD + "batch: {pairs_per_step: 8\n", [], ["run.yaml:", "not valid YAML"]),
        (GOOD + "batch: 8\n", [], ["batch is 8, but it is a section of settings"]),
        ("- a\n- b\n", [], ["run.yaml: holds a list"]),
        ("", [], ["run.yaml: holds nothing"]),
        ("\x00\x01", [], ["run.yaml: not a text file"]),
        ("{[a, b]: c}", [], ["run.yaml"]),
        (GOOD + "1: 2\n", [], ["run.yaml"]),
    ],
)
def test_refusals_say_where_and_what(text, options, mentions):
    message = refusal(text, *options)
    for part in mentions:
        assert part in message


def test_a_file_that_cannot_be_read_is_named(folder):
    parser = run_parser("dsdpo train", "Train.")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_run(["nowhere.yaml"], parser)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run([str(folder)], run_parser("dsdpo train", "Train."))
    with pytest.raises(ConfigError, match=r"RUN\.yaml"):
        load_run([], run_parser("dsdpo train", "Train."))
    (folder / "junk.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"junk\.yaml: not a text file"):
        load_run(["junk.yaml"], run_parser("dsdpo train", "Train."))


def test_help_shows_every_setting_within_100_columns(capsys):
    parser = run_parser("dsdpo train", "Train.")
    with pytest.raises(SystemExit) as left:
        load_run(["--help"], parser)
    assert left.value.code == 0
    text = capsys.readouterr().out
    sections = {key.rsplit(".", 1)[0] for key in dotted_keys() if "." in key}
    assert [key for key in dotted_keys() if key not in sections and f"--{key} " not in text] == []
    # argparse does not break one long list of choices.
    assert [line for line in text.splitlines() if len(line) > 100 and "{" not in line] == []
    assert "None" not in text


DURATIONS = {
    "3600": 3600,
    "1.5": 1.5,
    "12:00": 720,
    "90:00": 5400,
    "12:00:00": 43200,
    "1:30:00": 5400,
    "01:30:00": 5400,
    "1-00:00:00": 86400,
    "1-12": 129600,
    "PT30S": 30,
}


@pytest.mark.parametrize("text", DURATIONS)
def test_durations_are_read_alike_from_yaml_and_the_command_line(text):
    in_yaml = load(GOOD + f"checkpoint: {{deadline: {text}}}\n")[0]
    quoted = load(GOOD + f"checkpoint: {{deadline: '{text}'}}\n")[0]
    option = load(GOOD, "--checkpoint.deadline", text)[0]
    for run in (in_yaml, quoted, option, load(dump_yaml(option), name="again.yaml")[0]):
        assert run.checkpoint.deadline.total_seconds() == DURATIONS[text]


@pytest.mark.parametrize(
    "text", ["0", "-5", "-00:10:00", "1:90", "1:60:00", "1-25", "soon", "2h", "nan", "1e300", "true", "''"]
)
def test_invalid_durations_are_refused(text):
    for key in ("checkpoint.deadline", "distributed.lost_after"):
        section, name = key.split(".")
        assert f"run.yaml: {key} is " in refusal(GOOD + f"{section}: {{{name}: {text or chr(39) * 2}}}\n")
        assert f"command line: {key} is " in refusal(GOOD, f"--{key}={text}")


@pytest.mark.parametrize(
    ("text", "options", "key", "value"),
    [
        ("", ["--train.seed", "010"], "train.seed", 10),
        ("train: {seed: 010}", [], "train.seed", 10),
        ("train: {seed: 1_000}", [], "train.seed", 1000),
        ("train: {seed: 0x10}", [], "train.seed", 16),
        ("evaluation: {at_start: no}", [], "evaluation.at_start", False),
        ("reference: {revision: 2024-01-01}", [], "reference.revision", "2024-01-01"),
        ("reference: {path: None}", [], "reference.path", None),
        ("reference: {path: 'null'}", [], "reference.path", None),
        ("reference: {path: ~}", [], "reference.path", None),
        ("reference: {path: x}", ["--reference.path", "None"], "reference.path", None),
        ("reference: {path: x}", ["--reference.path", "null"], "reference.path", None),
        ("", ["--data.eval", "null"], "data.eval", None),
        ("", ["--data.eval=null"], "data.eval", None),
    ],
)
def test_yaml_1_1_traps_are_read_as_written(text, options, key, value):
    run, _ = load(GOOD.replace("train: some/data", "train: some/data, eval: held/out") + text + "\n", *options)
    for name in key.split("."):
        run = getattr(run, name)
    assert run == value


def test_a_home_folder_is_found_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = """
    model: {path: ~/model, tokenizer: ~/tokenizer, chat_template: ~/chat.jinja, lora: {path: ~/adapter}}
    data: {train: ~/rows, eval: [{path: ~/held_out}], cache_dir: ~/cache}
    reference: {strategy: precomputed, path: ~/reference, deepspeed: ~/r.json, store: ~/store}
    checkpoint: {resume: ~/run/checkpoints/step-000001}
    deepspeed: ~/ds.json
    output_dir: ~/run
    """
    written = dump_yaml(load(text)[0])
    assert "~" not in written
    assert written.count("/home/someone/") == 13
    assert load(GOOD, "--output_dir=~/run")[0].output_dir == "/home/someone/run"


@pytest.mark.parametrize(
    ("text", "options", "begins", "mentions"),
    [
        ("loss: {beta: true}", [], "run.yaml: ", "loss.beta is true: true and false are no values of this setting"),
        ("train: {max_steps: true}", [], "run.yaml: ", "train.max_steps is true"),
        ("", ["--train.max_steps", "true"], "command line: ", "train.max_steps is 'true'"),
        ("train: {seed: 12:30}", [], "run.yaml: ", "train.seed is '12:30'"),
        ("train: {seed: " + "9" * 30 + "}", [], "run.yaml: ", "larger than any number"),
        ("train: {seed: " + "9" * 5000 + "}", [], "run.yaml: ", "not valid YAML"),
        ("reference: {revision: 123}", [], "run.yaml: ", "put it in quotes"),
        ("", ["--data.train", "null"], "command line: ", "data.train is null"),
        ("", ["--data.train", '{"path": "a", "wieght": 2}'], "command line: ", "did you mean weight?"),
        ("", ["--data.train", '{"path"'], "command line: ", "check brackets and quotes"),
        ("", ["--model", "null"], "command line: ", "model"),
        ("", ["--loss", "3"], "command line: ", "loss"),
        ("", ["--batch.pairs_per_micro_batch", "128"], "command line: ", "is more than batch.pairs_per_step 64"),
        ("batch: {pairs_per_micro_batch: 128}", [], "run.yaml: ", "is more than batch.pairs_per_step 64"),
        (
            "batch: {pairs_per_step: 100}",
            ["--batch.pairs_per_micro_batch", "128"],
            "run.yaml and command line: ",
            "is more than batch.pairs_per_step 100",
        ),
    ],
)
def test_errors_name_the_source_of_the_value(text, options, begins, mentions):
    message = refusal(GOOD.replace("loss:   # all defaults\n", "") + text + "\n", *options)
    assert message.startswith(begins)
    assert mentions in message
    assert "\n" not in message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        (BOMB, "aliases stand for more than"),
        ("a: &a [*a]", "run.yaml:1: an alias stands within"),
        ("[" * 50_000, "nested more than"),
        ("a: " + "{a: " * 50_000, "nested more than"),
        ("- " * 50_000 + "a", "nested more than"),
        ("a: !!int abc", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp never", "not valid YAML"),
        ("a: !!python/object:os.system x", "run.yaml:1: not valid YAML"),
        ("a: b\n---\nc: d", "run.yaml:2: not valid YAML"),
    ],
    ids=range(10),
)
def test_malicious_and_invalid_yaml_is_refused_quickly(text, mentions):
    started = time.process_time()
    assert mentions in refusal(text)
    assert time.process_time() - started < 3


def test_pipes_and_devices_are_refused_without_reading(folder):
    os.mkfifo(folder / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: .*a pipe"):
        load_run(["pipe.yaml"], run_parser("dsdpo train", "Train."))
    with pytest.raises(ConfigError, match="a pipe or device"):
        load_run(["/dev/zero"], run_parser("dsdpo train", "Train."))


def test_python_in_place_of_a_run_file_is_named(folder):
    (folder / "own_loss.py").write_text("import torch\n")
    with pytest.raises(ConfigError, match=r"own_loss\.py is Python .*a run file is YAML"):
        load_run(["own_loss.py"], run_parser("dsdpo train", "Train."))


def test_a_missing_deepspeed_json_is_named(folder):
    (folder / "ds.json").write_text("{}")
    check_deepspeed_files(load(GOOD)[0])
    with pytest.raises(ConfigError, match=r"reference\.deepspeed: no file nowhere\.json"):
        check_deepspeed_files(load(GOOD, "--reference.deepspeed", "nowhere.json")[0])
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(ConfigError, match=r"deepspeed: not a regular file: pipe\.json"):
        check_deepspeed_files(load(GOOD, "--deepspeed", "pipe.json")[0])


@pytest.mark.parametrize("columns", [70, 80, 100])
def test_help_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        load_run(["--help"], run_parser("dsdpo train", "Train."))
    lines = capsys.readouterr().out.splitlines()
    # argparse does not break one long word, such as a list of choices.
    assert [line for line in lines if len(line) > columns and len(line.split()) > 1 and "{" not in line] == []
    assert max(map(len, lines)) > columns - 15


def test_the_version_costs_no_imports():
    code = "import sys, dsdpo.__main__ as m\n"
    code += "[m.main([word]) for word in ('--version', 'help')]; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.startswith("dsdpo 0.1.0\ntorch 2")
    assert answer.endswith("False\n")


def test_of_many_errors_some_are_told_and_the_others_counted():
    """Each in one line, also where the setting is documented in several."""
    said = refusal(GOOD + "evaluation: {length_buckets: [" + "x, " * 1000 + "]}\nreference: {quantization: 4}\n")
    lines = said.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "run.yaml: and 991 more such errors"
    assert all(line.startswith("run.yaml: ") for line in refusal(GOOD + "reference: {quantization: 4}\n").splitlines())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"loss": {"type": {"a": 1}}}, "loss.type is {'a': 1}: input should be a valid string or a valid list"),
        ({"loss": {"type": ["sft", 1]}}, "loss.type[1] is 1: input should be a text"),
        ({"loss": {"options": {"a": [1]}}}, "loss.options.a is [1]: input should be a valid boolean or"),
        ({"model": {"lora": {"lora_alpha": -1}}}, "model.lora.lora_alpha is -1: input should be greater than 0"),
        ({"model": {"lora": {"target_modules": "["}}}, "target_modules '[' is no regular expression (unterminated"),
        ({"model": {"lora": {"rank_pattern": {"(": 2}}}}, "model.lora.rank_pattern '(' is no regular expression"),
        ({"checkpoint": {"allow_changes": ["loss.betta"]}}, "loss.betta is not a setting; did you mean loss.beta?"),
        ({"output_dir": "a\0b"}, "output_dir is 'a\\x00b': it holds a NUL, which no file name can; give another path"),
        ({"output_dir": " "}, "output_dir is ' ': it is blank"),
        ({"data": {"cache_dir": "x" * 256}}, "it is too long: a name has at most 255 bytes"),
        ({"output_dir": "~no-such-user/x"}, "the home folder of a user that this machine does not have, ~no-such-user"),
        ({"output_dir": "${HOME}/x"}, "names the environment variable ${HOME}, which is not filled in here"),
        ({"data": {"chat_template_kwargs": {"tokenize": True}}}, "tokenize is no variable of a template but"),
        ({"distributed": {"lost_after": 1}}, "distributed.lost_after 0:00:01 is less than ranks can promise"),
        ({"distributed": {"timeout_minutes": 1e-320}}, "should be greater than or equal to 0.1"),
    ],
    ids=str,
)
def test_errors_name_settings_that_there_are(setting, said):
    run = yaml.safe_load(GOOD)
    for name, value in setting.items():
        run[name] = {**(run.get(name) or {}), **value} if isinstance(value, dict) else value
    answer = refusal(yaml.safe_dump(run))
    assert said in answer
    assert len(answer.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--dryrun", "did you mean --dry-run?"),
        ("--dry_run", "did you mean --dry-run?"),
        ("--model_path", "did you mean --model.path?"),
        ("-n", "-n is not an option"),
    ],
)
def test_unknown_options_get_the_command_s_own_flags_too(option, said):
    """And a letter gets no guess: -n is not evaluation.samples.n."""
    assert refusal(GOOD, option, "1").endswith(said)
