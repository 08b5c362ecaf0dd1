"""Wrong run files, DeepSpeed JSONs, models and data, each with words that the one message about it must hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.commands.bad_models import UNFIT
from tests.data.helpers import assistant, user

QUESTION = "what colour is the sun ?"
ROW = {"prompt": [user(QUESTION)], "chosen": [assistant("yellow .")], "rejected": [assistant("red .")]}
LONG_ROW = {**ROW, "chosen": [assistant("yellow " * 200)]}
RATED = {"prompt": [user(QUESTION)], "completion": [assistant("yellow .")], "label": True}
LIST = {
    "prompt": [user(QUESTION)],
    "completions": [[assistant(f"{colour} .")] for colour in ("yellow", "red", "blue")],
    "scores": [3, 2, 1],
}
WITHOUT_CHOSEN = {"prompt": "what colour is the sun ?", "rejected": "red ."}


@dataclass(frozen=True)
class Case:
    """One wrong input. Sections are laid over a good run, files are written beside it."""

    name: str
    mentions: tuple[str, ...]
    sections: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    model: dict[str, str | None] = field(default_factory=dict)  # files of the model to replace, None: to remove
    change: Callable[[Path], None] | None = None  # called with the case's folder, in which the model is then a copy
    run_file: str | None = None  # its text, in place of the good run with `sections`

    def __str__(self) -> str:
        return self.name


def lines(*rows: Any) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def policy(**zero: Any) -> dict[str, str | bytes]:
    """A policy's DeepSpeed JSON, ZeRO-3 with `zero` in its block."""
    return {"ds.json": json.dumps({"zero_optimization": {"stage": 3, **zero}})}


def with_reference(text: str) -> dict[str, Any]:
    """Sections and files for a run whose reference has this DeepSpeed JSON."""
    return {"sections": {"reference": {"deepspeed": "reference.json"}}, "files": {"reference.json": text}}


def with_data(content: str | bytes, **settings: Any) -> dict[str, Any]:
    """Sections and files for a run on this JSON Lines file."""
    return {"sections": {"data": {"train": "rows.jsonl", **settings}}, "files": {"rows.jsonl": content}}


def with_loss(name: str, content: str) -> dict[str, Any]:
    """The same for a run with this loss."""
    found = with_data(content)
    return {**found, "sections": {**found["sections"], "loss": {"type": name}}}


def with_prompts(file: dict[str, str | bytes]) -> dict[str, Any]:
    """The same for a run on good rows with samples of the prompts in this file."""
    found = with_data(lines(ROW, ROW))
    samples = {"evaluation": {"samples": {"prompts": next(iter(file))}}}
    return {"sections": found["sections"] | samples, "files": found["files"] | file}


def change_config(folder: Path, **settings: Any) -> None:
    """Other values in the config.json of the case's model."""
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def confident(content: str, **loss: Any) -> dict[str, Any]:
    """The same for a run whose loss takes each label's confidence from the data."""
    found = with_data(content)
    return {**found, "sections": {**found["sections"], "loss": {"label_confidence": True, **loss}}}


ZERO_3 = {"zero_optimization": {"stage": 3}}
NVME = '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp/nvme"}}}'
RUN_FILE = [
    Case("quiet and a plan", ("--quiet goes with neither --dry-run nor --verbose",), options=("--quiet", "--dry-run")),
    Case("missing run file", ("nowhere.yaml", "cannot be read as a run file", "No such file"), options=("RUN",)),
    Case("YAML syntax", ("run.yaml:2", "not valid YAML"), run_file="model: {path: m}\n  data: ]\n"),
    Case("run file is a list", ("run.yaml", "a mapping of sections"), run_file="- model\n"),
    Case("key twice", ("run.yaml:2", "the key loss stands here a second time"), run_file="loss: {}\nloss: {}\n"),
    Case("unknown section", ("losss is not a setting; did you mean loss?",), {"losss": {"beta": 1}}),
    Case(
        "unknown key",
        ("optimizer.lr is not a setting; did you mean optimizer.learning_rate?",),
        {"optimizer": {"lr": 1e-6}},
    ),
    Case("unknown option", ("command line: --loss.betta", "did you mean --loss.beta?"), options=("--loss.betta", "1")),
    Case("endless time-out", ("distributed.timeout_minutes is 1e+300",), {"distributed": {"timeout_minutes": 1e300}}),
    Case("each row a billion times", ("weight is 1000000000",), {"data": {"train": [{"path": "d", "weight": 1e9}]}}),
    Case("wrong type", ("batch.pairs_per_step is 'many'", "integer"), {"batch": {"pairs_per_step": "many"}}),
    Case("missing section", ("data is missing",), run_file="model: {path: m}\ndeepspeed: d\noutput_dir: o\n"),
    Case(
        "tiles of a token",
        ("model.mlp_tile_tokens 1 cuts the batch.tokens_per_micro_batch 16384", "give 16 or more, such as 1024"),
        {"model": {"mlp_tile_tokens": 1}},
    ),
    Case(
        "DoRA on weights in 4 bits",
        ("model.quantization and model.lora.use_dora do not go together",),
        {"model": {"quantization": {"bits": 4}, "lora": {"use_dora": True}}},
    ),
    Case("endless training", ("train.num_train_epochs is 1e+308", "less than"), {"train": {"num_train_epochs": 1e308}}),
    Case(
        "contradictory batch sizes",
        ("batch.pairs_per_micro_batch 16 is more than batch.pairs_per_step 8",),
        {"batch": {"pairs_per_step": 8, "pairs_per_micro_batch": 16}},
    ),
    Case(
        "unknown loss",
        ("loss.type is 'dpo'", "'sigmoid', 'robust', 'hinge'"),
        {"loss": {"type": "dpo"}},
    ),
    Case(
        "option without effect",
        ("loss.label_smoothing 0.1 has no effect with loss.type hinge", "set loss.label_smoothing to 0"),
        {"loss": {"type": "hinge", "label_smoothing": 0.1}},
    ),
    Case("samples of nothing", ("evaluation.samples.prompts is missing",), {"evaluation": {"samples": {"n": 2}}}),
    Case(
        "greedy answers out of a part",
        ("evaluation.samples.top_p 0.5 has no effect", "temperature above 0"),
        {"evaluation": {"samples": {"prompts": "p.txt", "top_p": 0.5}}},
    ),
    Case(
        "rows split over more ranks than there are",
        ("distributed.sequence_parallel: 2 ranks are to share each row", "has 1 rank", "--num_gpus 2"),
        {"distributed": {"sequence_parallel": 2}},
    ),
    Case(
        "padded rows to split",
        ("distributed.sequence_parallel 2 splits packed rows", "set data.layout to auto"),
        {"distributed": {"sequence_parallel": 2}, "data": {"layout": "padded"}},
    ),
    Case("no rank to a row", ("distributed.sequence_parallel is 0",), {"distributed": {"sequence_parallel": 0}}),
    Case("output folder not empty", ("output_dir", "is not empty", "--overwrite_output_dir true"), files={"out/a": ""}),
    Case("output folder is a file", ("output_dir", "out cannot be written", "choose another"), files={"out": ""}),
]
DEEPSPEED = [
    Case("missing DeepSpeed JSON", ("deepspeed: no file no.json", "ds_configs/zero3.json"), {"deepspeed": "no.json"}),
    Case("invalid JSON", ("ds.json:2: not valid JSON",), files={"ds.json": '{\n"bf16": }'}),
    Case(
        "stage-3 key typo",
        ("zero_optimization.stage3_param_persistance_threshold", "did you mean stage3_param_persistence_threshold?"),
        files=policy(stage3_param_persistance_threshold=0),
    ),
    Case("auto that nothing fills", ('zero_optimization.stage is "auto"', "write a value"), files=policy(stage="auto")),
    Case(
        "auto misspelt",
        ('stage3_prefetch_bucket_size is "Auto"', "a whole number"),
        files=policy(stage3_prefetch_bucket_size="Auto"),
    ),
    Case(
        "dotted key",
        ('"zero_optimization.stage" is a dotted key',),
        files={"ds.json": '{"zero_optimization.stage": 3}'},
    ),
    Case(
        "bf16 contradicts model.dtype",
        ("bf16.enabled is true", "model.dtype float32", "make them agree"),
        files={"ds.json": '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}}'},
    ),
    Case(
        "batch sizes contradict the run",
        ("train_batch_size is 64", "batch.pairs_per_step 8"),
        files={"ds.json": '{"train_batch_size": 64, "zero_optimization": {"stage": 3}}'},
    ),
    Case(
        "reference stage 2", ("reference.json", "use 0 or 3"), **with_reference('{"zero_optimization": {"stage": 2}}')
    ),
    Case(
        "reference with an optimizer",
        ("reference.json", "optimizer has no place in a reference", "delete it"),
        **with_reference('{"optimizer": {"type": "AdamW", "params": {}}, "zero_optimization": {"stage": 3}}'),
    ),
    Case(
        "one nvme_path for both",
        ("reference.json", "nvme_path /tmp/nvme is the policy's too", "use another folder"),
        {"reference": {"deepspeed": "reference.json"}},
        {"reference.json": NVME, "ds.json": NVME},
    ),
    Case(
        "background saves of states on NVMe",
        ("checkpoint.background: true", "offload_optimizer.device nvme", "set it to auto or false"),
        {"checkpoint": {"background": True}},
        {"ds.json": NVME.replace("offload_param", "offload_optimizer")},
    ),
]
DEEPSPEED += [
    Case(
        "removed block of another DeepSpeed",
        ("compile.disable was removed", "compile.backend was removed"),
        files={"ds.json": json.dumps({"compile": {"disable": False, "backend": "inductor"}, **ZERO_3})},
    ),
    Case(
        "monitor key typo", ("csv_monitor.path is not",), files={"ds.json": json.dumps({"csv_monitor": {"path": "x"}})}
    ),
    Case("timer key typo", ("did you mean enabled?",), files={"ds.json": '{"timers": {"throughput": {"enable": 1}}}'}),
    Case("bucket of 0", ("reduce_bucket_size is 0, but must be 1",), files=policy(reduce_bucket_size=0)),
    Case(
        "checkpoint writer",
        ("checkpoint.writer is", "must be left out"),
        files={"ds.json": json.dumps({"checkpoint": {"writer": {"type": "FAST"}}, **ZERO_3})},
    ),
    Case(
        "fewer ranks than asked for",
        ("started, of at least 3 (distributed.min_ranks)",),
        sections={"distributed": {"min_ranks": 3}},
    ),
    Case(
        "deadline after the end of the job's time",
        ("checkpoint.deadline 1:00:00 is not before checkpoint.time_limit 0:30:00",),
        options=("--checkpoint.deadline", "3600", "--checkpoint.time_limit", "30:00"),
    ),
    Case(
        "universal checkpoint",
        ("checkpoint.load_universal is true",),
        files={"ds.json": json.dumps({"checkpoint": {"load_universal": True}, **ZERO_3})},
    ),
    Case(
        "gradients scaled early",
        ("prescale_gradients is true, which stage 3 refuses",),
        files={"ds.json": json.dumps({"prescale_gradients": True, **ZERO_3})},
    ),
    Case("JSON 50,000 blocks deep", ("blocks stand inside blocks",), files={"ds.json": "[" * 50_000 + "]" * 50_000}),
    Case("number of 5,000 digits", ("not a DeepSpeed JSON",), files={"ds.json": '{"a": 1' + "0" * 5000 + "}"}),
    Case("DeepSpeed JSON is a folder", ("deepspeed: not a regular file",), files={"ds.json/inside": ""}),
    Case(
        "optimizer parameter that DeepSpeed refuses",
        ("ds.json: DeepSpeed", "optimizer.params.velocity 1", "SGD"),
        files={"ds.json": json.dumps({"optimizer": {"type": "SGD", "params": {"velocity": 1}}, **ZERO_3})},
    ),
    Case(
        "data type that conflicts",
        ("ds.json: DeepSpeed", 'data_types.param_dtype "fp16"', "conflicts"),
        files={"ds.json": json.dumps({"data_types": {"param_dtype": "fp16"}, **ZERO_3})},
    ),
    Case(
        "quantized weights without the operator",
        ("ds.json: DeepSpeed", "zero_optimization.zero_quantized_weights true"),
        files=policy(zero_quantized_weights=True),
    ),
    Case(
        "autocast of one engine only",
        ("reference.json: torch_autocast.enabled is true", "the two would differ"),
        **with_reference(
            '{"torch_autocast": {"enabled": true, "dtype": "bfloat16"}, "zero_optimization": {"stage": 3}}'
        ),
    ),
]
MODEL = [
    Case("model folder missing", ("model.path", "no folder", "nowhere"), {"model": {"path": "./nowhere"}}),
    Case("model is no Hub id", ("model.path", "'some/model'", "cannot be loaded"), {"model": {"path": "some/model"}}),
    Case("reference folder missing", ("reference.path", "no folder"), {"reference": {"path": "./nowhere"}}),
    Case("model without config.json", ("model.path", "has no config.json"), model={"config.json": None}),
    Case("damaged config.json", ("model.path", "config.json cannot be read as JSON"), model={"config.json": "{"}),
    Case("model without weights", ("model.path", "has no weights"), model={"model.safetensors": None}),
    Case(
        "weights in a pickle",
        ("model.path", "pytorch_model.bin, a pickle", "model.allow_pickle"),
        model={"model.safetensors": None, "pytorch_model.bin": "x"},
    ),
    Case(
        "no tokenizer",
        ("model.path", "no tokenizer", "model.tokenizer"),
        model={"tokenizer.json": None, "tokenizer_config.json": None},
    ),
    Case(
        "heads that ranks cannot share",
        ("2 ranks cannot share the 3 attention heads of llama (model.path)", "sizes that can: 3"),
        {"distributed": {"sequence_parallel": 2}},
        change=partial(change_config, num_attention_heads=3, num_key_value_heads=3, hidden_size=96),
    ),
    Case("tiles of no token", ("model.mlp_tile_tokens is 0",), {"model": {"mlp_tile_tokens": 0}}),
    Case(
        "compiled layers of weights in 4 bits",
        ("model.torch_compile and model.quantization do not go together",),
        {"model": {"torch_compile": True, "quantization": {"bits": 4}, "lora": {"r": 4}}},
    ),
    Case("Liger's kernels on a CPU", ("model.use_liger_kernel",), {"model": {"use_liger_kernel": True}}),
    Case(
        "rows of a state-space model to split",
        ("2 ranks can share packed rows only, and mamba", "leave it out"),
        {"distributed": {"sequence_parallel": 2}},
        model={"config.json": json.dumps({"model_type": "mamba", "hidden_size": 64, "vocab_size": 97})},
    ),
    Case(
        "load balancing without experts",
        ("model.router_aux_loss_coef 0.01 has no effect", "llama is no mixture of experts", "set it to 0"),
        {"model": {"router_aux_loss_coef": 0.01}},
    ),
    Case("unknown pad token", ("model.pad_token", "'<none>' is not a token"), {"model": {"pad_token": "<none>"}}),
]
UNFIT_MODEL = [
    Case(name, mentions, sections, options=options, change=change)
    for name, mentions, sections, options, change in UNFIT
]
DATA = [
    Case(
        "the best by no metric",
        ("checkpoint.best_metric: eval/rewards/accuracy is no metric", "did you mean eval/rewards/accuracies?"),
        {
            "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
            "evaluation": {"every_steps": 1, "length_buckets": []},
            "checkpoint": {"every_steps": 1, "keep_best": 1, "best_metric": "eval/rewards/accuracy"},
        },
        {"rows.jsonl": lines(ROW)},
        options=("--dry-run",),
    ),
    Case(
        "checkpoint of no run",
        ("checkpoint.resume: nowhere is not in", "say auto"),
        options=("--dry-run", "--checkpoint.resume", "nowhere"),
    ),
    Case(
        "no chat template for messages",
        ("rows.jsonl:1 holds messages", "no chat template", "model.chat_template"),
        **with_data(lines(ROW)),
        model={"chat_template.jinja": None},
    ),
    Case("missing data file", ("data.train[0]", "gone.jsonl does not exist"), {"data": {"train": "gone.jsonl"}}),
    Case(
        "missing held-out file",
        ("data.eval[0]", "gone.jsonl does not exist"),
        {"data": {"train": "rows.jsonl", "eval": "gone.jsonl"}},
        {"rows.jsonl": lines(ROW)},
    ),
    Case(
        "missing file of prompts",
        ("evaluation.samples.prompts: gone.txt does not exist",),
        {"evaluation": {"samples": {"prompts": "gone.txt"}}},
    ),
    Case(
        "a row of prompts without one",
        ("evaluation.samples.prompts: p.jsonl:2: a field is missing", "the fields are: text"),
        **with_prompts({"p.jsonl": lines({"prompt": "p"}, {"text": "t"})}),
    ),
    Case(
        "no room for an answer",
        ("evaluation.samples.max_new_tokens: 256 behind the", "p.txt:1", "takes 128 tokens"),
        **with_prompts({"p.txt": QUESTION}),
    ),
    Case("empty data file", ("rows.jsonl: is empty", "at least one preference pair"), **with_data("")),
    Case("binary junk", ("rows.jsonl: not text but binary data",), **with_data(bytes(range(256)) * 40)),
    Case(
        "pairs for a loss of single completions",
        ("data.train", "chosen and rejected a row", "loss.type kto", "prompt, completion and label", "sigmoid"),
        **with_loss("kto", lines(ROW, ROW)),
    ),
    Case(
        "single completions for a loss of pairs",
        ("data.train", "one rated completion a row", "loss.type sigmoid", "set loss.type to kto"),
        **with_data(lines(*[RATED] * 3)),
    ),
    Case(
        "single completions that all answer one prompt",
        ("data.train", "all rows have the same prompt", "apo_zero_unpaired"),
        **with_loss("kto", lines(RATED, {**RATED, "completion": [assistant("red .")], "label": False})),
    ),
    Case(
        "lists for a loss of pairs",
        ("data.train", "up to 3 completions a row", "set data.pairing to best_worst"),
        **with_data(lines(*[LIST] * 2), pairing="list"),
    ),
    Case(
        "pairs for a loss of lists",
        ("data.train", "chosen and rejected a row", "3 or more completions", "data.pairing to list", "sigmoid"),
        **with_loss("plackett_luce", lines(ROW, ROW)),
    ),
    Case(
        "no confidence",
        ("data.train: rows have no confidence", "loss.label_confidence needs", "{confidence: agreement}"),
        **confident(lines(ROW, ROW)),
    ),
    Case(
        "a label no better than a coin for robust",
        ("data.train: row 1 has confidence 0.5", "loss.type robust divides", "loss.type to sigmoid"),
        **confident(lines(ROW, {**ROW, "confidence": 0.5}), type="robust"),
    ),
    Case("not JSON", ("rows.jsonl: not a JSON Lines file",), **with_data("prompt,chosen,rejected\n1,2,3\n")),
    Case("prompt-only rows", ("has no chosen, rejected", "columns"), **with_data(lines({"prompt": "p"}))),
    Case(
        "all rows bad",
        ("data.train: no usable row is left", "2 equal_responses", "rows.jsonl:1"),
        **with_data(lines(*[{**ROW, "rejected": ROW["chosen"]}] * 2)),
    ),
    Case(
        "a margin of 400 digits",
        ("no usable row is left", "1 wrong_type", "margin is a number"),
        **with_data(lines({**ROW, "margin": 10**400})),
    ),
    Case(
        "a chat template that leaves everything out",
        ("no usable row is left", "template_drops", "or the chat template (model.chat_template)"),
        **with_data(lines(ROW)),
        model={"chat_template.jinja": "hello"},
    ),
    Case(
        "too many bad rows",
        ("20.0% of the rows are bad", "data.max_dropped_share allows 10.0%", "rows.jsonl:1, rows.jsonl:2"),
        **with_data(lines(*[WITHOUT_CHOSEN] * 2, *[ROW] * 8)),
    ),
    Case(
        "one bad row under data.strict",
        ("data.strict is true", "rows.jsonl:21", "missing"),
        **with_data(lines(*[ROW] * 20, WITHOUT_CHOSEN), strict=True),
    ),
    Case(
        "max_length below every prompt",
        ("no usable row is left", "prompt_too_long", "Raise data.max_length"),
        **with_data(lines(ROW, ROW), max_length=3),
    ),
    Case(
        "longer than the model's positions",
        ("data.max_length: 1000", "takes 128 tokens", "set data.max_length to 128 or less"),
        **with_data(lines(LONG_ROW), max_length=1000),
    ),
]
CASES = [*RUN_FILE, *DEEPSPEED, *MODEL, *UNFIT_MODEL, *DATA]


def write(case: Case, folder: Path, inputs: Path) -> list[str]:
    """The case's files in `folder`, beside a run that is good but for them; arguments of `dsdpo`."""
    model = inputs / "model"
    if case.model or case.change:
        model = Path(shutil.copytree(model, folder / "model"))
        for name, replacement in case.model.items():
            change_model(model, name, replacement)
    run: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(inputs / "train.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache")},
        "batch": {"pairs_per_step": 8},
        "deepspeed": "ds.json",
        "output_dir": str(folder / "out"),
    }
    for name, values in case.sections.items():
        run[name] = {**run.get(name, {}), **values} if isinstance(values, dict) else values
    files = policy() if not any(name.startswith("ds.json") for name in case.files) else {}
    for name, content in {**files, **case.files}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.change is not None:
        case.change(folder)
    path = folder / "run.yaml"
    path.write_text(case.run_file if case.run_file is not None else yaml.safe_dump(run))
    if case.options == ("RUN",):
        return ["train", str(folder / "nowhere.yaml")]
    return ["train", str(path), *case.options]


def change_model(model: Path, name: str, content: str | None) -> None:
    """Replace or remove a file of a model folder, or the tokenizer's `pad_token`."""
    if name == "pad_token":
        path = model / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["pad_token"]
        path.write_text(json.dumps(settings))
    elif content is None:
        (model / name).unlink()
    else:
        (model / name).write_text(content)
