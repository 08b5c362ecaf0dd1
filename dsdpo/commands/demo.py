"""`dsdpo demo`: a small model, a small data set with a rule in it, and a whole DPO run over them on two ranks.

The rule: every thing has its colour. Each pair asks for the colour of a thing, in one of several wordings; `chosen`
names the right colour, `rejected` a wrong one that is right for other things, so nothing but the link between thing
and colour separates the two. Held-out questions ask in wordings that training never used for that thing.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from dsdpo.accelerator import CHOICE, Device, choose_accelerator
from dsdpo.commands.arguments import train
from dsdpo.commands.parsing import user_path
from dsdpo.commands.plot import plot
from dsdpo.config.load import RunParser
from dsdpo.console import quiet_libraries, waiting, wrapped, written_time
from dsdpo.errors import ConfigError

Row = dict[str, list[dict[str, str]]]

RECIPE = "launch/recipes/demo.yaml"
INPUTS = Path("runs/demo-inputs")
RUN_FOLDER = Path("runs/demo")
ABOUT = (
    "With starting the ranks and reading libraries it took {time}. At step 0 policy and reference are the same, so no "
    "pair is ranked right or wrong and the accuracy, which counts strictly larger rewards, is 0; guessing gives 0.5."
)
NEXT = """
change a setting     dsdpo demo --loss.beta 0.5
train on your data   dsdpo init FOLDER"""
COLOURS = {
    "yellow": ["banana", "lemon", "canary", "sun"],
    "red": ["tomato", "cherry", "ruby", "rose"],
    "green": ["frog", "lime", "grass", "pickle"],
    "blue": ["sky", "sapphire", "ocean", "jay"],
    "white": ["snow", "milk", "swan", "salt"],
    "black": ["coal", "raven", "tar", "panther"],
}
QUESTIONS = [
    "what colour is the {} ?",
    "which colour does the {} have ?",
    "please name the colour of the {} .",
    "tell me , what does the {} look like ?",
    "the {} : which colour ?",
    "i have never seen the {} . what is its colour ?",
    "describe the colour of the {} to me .",
    "is the {} colourful ?",
]
ANSWERS = ["the {thing} is {colour} .", "{colour} .", "it is {colour} , of course .", "i would say {colour} ."]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    parser = RunParser(prog="dsdpo demo", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, help="processes to start; default: one a GPU (2 at most), 2 without GPU")
    parser.add_argument(
        "--output_dir",
        type=user_path,
        default=RUN_FOLDER,
        help=f"run folder; default: {RUN_FOLDER}",
    )
    parser.add_argument("--device", action=Device)
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers have to say")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks is {arguments.ranks}: give 1 or more")
    train([RECIPE, *overrides])  # what it would refuse is told before anything is written
    choose_accelerator(computes=True)
    quiet_libraries(verbose=arguments.verbose)
    try:
        make_inputs(INPUTS)
    except OSError as error:
        raise ConfigError(
            f"the demo writes its model and data to {INPUTS.absolute()}, which cannot be written ({error}): start it "
            "in another folder"
        ) from error
    if arguments.output_dir != RUN_FOLDER:
        overrides += ["--output_dir", str(arguments.output_dir)]
    command = launch_command(arguments.ranks) + overrides + ["--verbose"] * arguments.verbose
    shown = " ".join(word for word in command[2:] if not word.startswith(("--master_port", "--log_level")))
    print(f"made an untrained model and data in {INPUTS}; now\n\n  deepspeed {shown}\n", flush=True)
    print("which takes a minute, and longer the first time, as libraries are read from the disk", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code == 0:
        seconds = time.monotonic() - started
        with waiting("drawing"):
            picture = plot(arguments.output_dir)
        print(f"picture  {picture}\n\n{wrapped(ABOUT.format(time=written_time(seconds)), indent=0)}\n{NEXT}")
    return code


def launch_command(ranks: int | None) -> list[str]:
    """Arguments of python that start the recipe through the deepspeed launcher, on GPUs where there are any."""
    import torch

    gpus = 0 if os.environ.get(CHOICE) == "cpu" else torch.cuda.device_count()
    ranks = ranks or min(2, gpus or 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += [f"--master_port={port}", "--log_level=error", "--module"]
    command += ["dsdpo", "train", RECIPE]
    return command + (["--model.dtype", "bfloat16"] if gpus else [])


def make_inputs(folder: Path, *, seed: int = 0) -> None:
    """Write `model/` (untrained, with tokenizer), `train.jsonl` and `test.jsonl`: the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make_rows(seed)
    for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_model(folder / "model", seed)


def make_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; each thing keeps two of the question wordings for the held-out part."""
    rng = random.Random(seed)
    train: list[Row] = []
    test: list[Row] = []
    for colour, things in COLOURS.items():
        for thing in things:
            questions = rng.sample(QUESTIONS, len(QUESTIONS))
            for number, question in enumerate(questions):
                for answer in ANSWERS:
                    for wrong in rng.sample([other for other in COLOURS if other != colour], 3):
                        row = {
                            "prompt": [{"role": "user", "content": question.format(thing)}],
                            "chosen": [{"role": "assistant", "content": answer.format(thing=thing, colour=colour)}],
                            "rejected": [{"role": "assistant", "content": answer.format(thing=thing, colour=wrong)}],
                        }
                        (test if number < 2 else train).append(row)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test[:240]


def make_model(folder: Path, seed: int) -> None:
    """Write an untrained two-layer Llama with a word-level tokenizer that knows just the demo's words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    things = [thing for group in COLOURS.values() for thing in group]
    words = " ".join([*QUESTIONS, *ANSWERS, *COLOURS, *things]).split()
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
