"""RUN.yaml and the command line: what wins, what is refused and in which words."""

import textwrap

import pytest
import yaml

from dsdpo.config.load import dotted_keys, dump_yaml, load_run, run_parser
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
