"""The demo's generator: draws answers by the model's own probabilities and scores them by the demo's rule.

Each answer names one of six colours; four different ones are drawn in proportion to how likely the model is to write
them. The right colour scores 1, others 0. A real generator asks a server or a library and a judge.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsdpo.commands.demo import COLOURS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--round", type=int, default=1, help="seed of the draws")
    given = parser.parse_args()
    tokenizer, model = AutoTokenizer.from_pretrained(given.model), AutoModelForCausalLM.from_pretrained(given.model)
    random = torch.Generator().manual_seed(given.round)
    right = {thing: colour for colour, things in COLOURS.items() for thing in things}
    with given.out.open("w", encoding="utf-8") as out:
        for line in given.prompts.read_text(encoding="utf-8").splitlines():
            prompt = json.loads(line)["prompt"]
            thing = next(word for word in prompt[-1]["content"].split() if word in right)
            answers = [[{"role": "assistant", "content": f"the {thing} is {colour} ."}] for colour in COLOURS]
            ids = tokenizer.apply_chat_template([prompt + answer for answer in answers], return_tensors="pt").input_ids
            with torch.no_grad():
                logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
            drawn = torch.multinomial(logps.softmax(0), 4, generator=random).tolist()
            scores = [float(list(COLOURS)[index] == right[thing]) for index in drawn]
            if len(set(scores)) > 1:  # else no answer is better than another
                row = {"prompt": prompt, "completions": [answers[index] for index in drawn], "scores": scores}
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
