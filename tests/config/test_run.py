"""What a run may say: defaults, limits, contradictions and the number of steps."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from dsdpo.config.data import SourceConfig
from dsdpo.config.run import RunConfig, Section

NEEDED = {"model": {"path": "m"}, "data": {"train": "d"}, "deepspeed": "ds.json", "output_dir": "out"}


def make(**sections):
    return RunConfig.model_validate(NEEDED | sections)


def test_names_and_defaults_of_trl_and_transformers_are_kept():
    run = make()
    assert (run.loss.type, run.loss.beta, run.loss.label_smoothing) == ("sigmoid", 0.1, 0.0)
    assert (run.optimizer.learning_rate, run.optimizer.max_grad_norm, run.optimizer.lr_scheduler_type) == (
        1e-6,
        1.0,
        "linear",
    )
    assert (run.train.num_train_epochs, run.train.max_steps, run.train.seed) == (1, -1, 42)
    assert run.batch.pairs_per_step == 64


def test_every_setting_is_documented():
    def undocumented(section: type[Section]):
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            if is_section:
                assert field.annotation.__doc__
                yield from undocumented(field.annotation)
            elif not field.description:
                yield f"{section.__name__}.{name}"

    assert list(undocumented(RunConfig)) + list(undocumented(SourceConfig)) == []


@pytest.mark.parametrize(
    "train",
    ["d", {"path": "d"}, ["d"], [{"path": "d"}]],
    ids=["path", "source", "list of paths", "list of sources"],
)
def test_sources_in_every_form_are_one_list(train):
    run = make(data={"train": train, "eval": train})
    assert run.data.train == run.data.eval == [SourceConfig(path="d")]


@pytest.mark.parametrize(
    ("sections", "mentions"),
    [
        ({"loss": {"type": "hinge", "label_smoothing": 0.1}}, ["loss.label_smoothing", "loss.type hinge"]),
        ({"loss": {"type": "ipo", "label_smoothing": 0.1}}, ["loss.label_smoothing", "loss.type ipo"]),
        ({"loss": {"label_smoothing": 0.5}}, ["less than 0.5"]),
        ({"loss": {"beta": 0}}, ["greater than 0"]),
        ({"loss": {"beta": float("nan")}}, ["finite number"]),
        (
            {"optimizer": {"warmup_steps": 5, "warmup_ratio": 0.1}},
            ["optimizer.warmup_steps 5", "optimizer.warmup_ratio 0.1"],
        ),
        (
            {"optimizer": {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}},
            ["optimizer.warmup_ratio", "optimizer.lr_scheduler_type constant"],
        ),
        (
            {"optimizer": {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7}},
            ["optimizer.learning_rate", "optimizer.lr_scheduler_type polynomial"],
        ),
        *(
            ({"optimizer": {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "learning_rate": 1e-6}}, said)
            for kind, kwargs, said in (
                ("linear", {"num_cycles": 1}, ["has num_cycles", "lr_scheduler_type linear", "leave it out"]),
                ("cosine", {"min_lr_rate": 0.1}, ["has min_lr_rate", "it takes num_cycles"]),
                ("cosine_with_min_lr", {}, ["cosine_with_min_lr needs one of min_lr and min_lr_rate"]),
                ("cosine_with_min_lr", {"min_lr": 1e-7, "min_lr_rate": 0.1}, ["needs one of min_lr and min_lr_rate"]),
                ("cosine_with_min_lr", {"min_lr_rate": 1.5}, ["min_lr_rate is 1.5: give a number from 0 to 1"]),
                ("cosine_with_min_lr", {"min_lr": 1e-5}, ["optimizer.learning_rate 1e-06 must be above 1e-05"]),
                ("cosine_with_restarts", {"num_cycles": "two"}, ["num_cycles is two: give a number, 0 or more"]),
                ("warmup_stable_decay", {}, ["{num_decay_steps: 100}"]),
                ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, ["steep", "1-sqrt"]),
                ("polynomial", {"lr_end": 2e-6}, ["must be above 2e-06"]),
            )
        ),
        (
            {"optimizer": {"type": "sgd", "adam_beta1": 0.8}},
            ["optimizer.adam_beta1 0.8", "optimizer.type sgd", "adamw or adamw_8bit or lion or muon"],
        ),
        ({"optimizer": {"momentum": 0.9}}, ["optimizer.momentum 0.9", "optimizer.type adamw", "muon or sgd"]),
        ({"optimizer": {"type": "lion", "adam_epsilon": 1e-6}}, ["optimizer.adam_epsilon 1e-06", "lion"]),
        ({"optimizer": {"type": "sgd", "nesterov": True}}, ["optimizer.nesterov true", "optimizer.momentum above 0"]),
        ({"optimizer": {"type": "muon", "max_grad_norm": 1.0}}, ["optimizer.max_grad_norm 1", "optimizer.type muon"]),
        ({"optimizer": {"type": "adafactor"}}, ["optimizer.type adafactor", "one flat vector", "adamw_8bit"]),
        (
            {"batch": {"pairs_per_step": 4, "pairs_per_micro_batch": 8}},
            ["batch.pairs_per_micro_batch 8", "batch.pairs_per_step 4"],
        ),
        ({"train": {"max_steps": 0}}, ["train.max_steps 0"]),
        ({"data": {"train": []}}, ["at least 1 item"]),
        ({"data": {"train": [{"path": "d", "weight": 0}]}}, ["greater than 0"]),
        ({"data": {"train": [{"path": "d", "columns": {"best": "a"}}]}}, ["'chosen'"]),
    ],
)
def test_contradictions_name_both_settings(sections, mentions):
    with pytest.raises(ValidationError) as refused:
        make(**sections)
    for text in mentions:
        assert text in str(refused.value)


@pytest.mark.parametrize(
    ("num_pairs", "pairs_per_step", "epochs", "steps"),
    [
        (100, 10, 1, 10),
        (101, 10, 1, 11),  # the last step of an epoch holds the one pair left
        (101, 10, 2, 22),  # and so does every epoch's
        (100, 10, 1.25, 13),  # 10, then 25 pairs: 10 + 10 + 5
        (100, 10, 1.1, 11),  # 10 pairs more, though 1.1 * 100 is 110.00000000000001
        (7, 10, 3, 3),  # smaller than a step: a step an epoch
        (3, 10, 0.1, 1),  # never nothing
    ],
)
def test_total_steps(num_pairs, pairs_per_step, epochs, steps):
    run = make(batch={"pairs_per_step": pairs_per_step}, train={"num_train_epochs": epochs})
    assert run.total_steps(num_pairs) == steps


def test_max_steps_overrides_epochs():
    assert make(train={"num_train_epochs": 3, "max_steps": 7}).total_steps(1000) == 7


@pytest.mark.parametrize(("settings", "steps"), [({}, 0), ({"warmup_steps": 5}, 5), ({"warmup_ratio": 0.1}, 11)])
def test_warmup_rounds_a_ratio_up(settings, steps):
    assert make(optimizer=settings).optimizer.num_warmup_steps(101) == steps


def test_settings_never_change_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        make().loss.beta = 0.5


def test_a_wrong_setting_is_found_without_importing_torch():
    heavy = "{'torch', 'deepspeed', 'transformers', 'datasets'}"
    code = f"import sys, dsdpo.config.load, dsdpo.engine.zero_config; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_an_optimizer_brings_its_own_defaults_and_a_saved_run_keeps_them():
    lion, muon = (make(optimizer={"type": kind}).optimizer for kind in ("lion", "muon"))
    assert (lion.adam_beta2, lion.max_grad_norm, muon.momentum, muon.max_grad_norm) == (0.99, 1.0, 0.95, 0.0)
    assert make(optimizer={"type": "lion", "adam_beta2": 0.999}).optimizer.adam_beta2 == 0.999
    assert make(optimizer=muon.model_dump(mode="json")).optimizer == muon
