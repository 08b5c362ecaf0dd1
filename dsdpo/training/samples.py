"""What policy and reference answer to fixed prompts as training goes: rows of samples.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dsdpo.config.evaluation import SamplesConfig
from dsdpo.data.prompts import Prompt
from dsdpo.data.tokenizer import pad_id
from dsdpo.data.types import Tokenizer
from dsdpo.distributed import gather_objects, max_over_ranks, rank, world_size
from dsdpo.engine.build import device
from dsdpo.engine.quirks.gather_trace import SecondOrder
from dsdpo.engine.scoring_mode import scoring
from dsdpo.engine.types import InferenceEngine, TrainingEngine
from dsdpo.engine.whole_weights import fits_whole, is_sharded, whole_weights
from dsdpo.objective.decode import Decoding, TokenChoice
from dsdpo.reference.base import Reference

TOGETHER = 8  # prompts that one pass of a rank answers: bounds the memory of keys and values


@dataclass(frozen=True)
class Answer:
    """What a model has written after a prompt."""

    ids: tuple[int, ...]  # without the token that ends it
    ended: bool  # by such a token, not cut off


class Sampler:
    """Answers a run's prompts with its models, without a trace in training.

    Nothing is drawn from the process's random numbers, and ZeRO-3's records of gathers are left alone. The prompts are
    dealt out to the ranks, which make equally many passes. A reference that does not move is asked once.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        settings: SamplesConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        reference_is_static: bool,
    ) -> None:
        self.prompts, self.settings = list(prompts), settings
        self._tokenizer, self._seed, self._static = tokenizer, seed, reference_is_static
        names = getattr(tokenizer, "end_tokens", ()) or ([tokenizer.eos_token] if tokenizer.eos_token else [])
        self._ends = sorted({int(tokenizer.convert_tokens_to_ids(name)) for name in names})
        self._kept: list[Answer] | None = None  # of a reference that does not move
        self._orders: dict[str, SecondOrder] = {}

    def rows(self, policy: TrainingEngine, reference: Reference, *, step: int) -> list[dict[str, Any]]:
        """A row of answers for each prompt. Collective."""
        ours = self._answers(policy, "policy")
        theirs = self._kept or self._of_reference(reference)
        if self._static:
            self._kept = theirs
        rows = []
        for index, prompt in enumerate(self.prompts):
            row: dict[str, Any] = {"step": step, "place": prompt.place, "prompt": self._text(prompt.ids, whole=True)}
            for name, answers in (("policy", ours), ("reference", theirs)):
                if answers is not None:
                    answer = answers[index]
                    row |= {name: self._text(answer.ids), f"{name}_tokens": len(answer.ids)}
                    row[f"{name}_ended"] = answer.ended
            rows.append(row)
        return rows

    def _of_reference(self, reference: Reference) -> list[Answer] | None:
        with reference.answering() as engine:
            return None if engine is None else self._answers(engine, "reference")

    def _text(self, ids: Sequence[int], *, whole: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=not whole)

    def _answers(self, engine: InferenceEngine, role: str) -> list[Answer]:
        """An answer to each prompt, on all ranks. Collective."""
        found: dict[int, Answer] = {}
        own = list(range(len(self.prompts)))[rank() :: world_size()]
        with self._passes(engine, role):
            for numbers in dealt(own, max_over_ranks(len(own), device())):
                answers = self._write(engine, numbers or [0])  # a rank without a prompt keeps in step with the others
                found |= dict(zip(numbers, answers, strict=False))
        everyone = {number: answer for part in gather_objects(found) for number, answer in part.items()}
        return [everyone[number] for number in range(len(self.prompts))]

    @contextmanager
    def _passes(self, engine: InferenceEngine, role: str) -> Iterator[None]:
        """A block in which the engine decodes: with whole weights, or under ZeRO-3 gathering layer by layer."""
        way = self.settings.gather
        with ExitStack() as stack:
            stack.enter_context(scoring(engine))
            if is_sharded(engine):
                if way == "whole" or (way == "auto" and fits_whole(engine)):
                    stack.enter_context(whole_weights(engine))
                else:
                    order = self._orders.setdefault(role, SecondOrder(engine))
                    stack.enter_context(order.recorded_apart())
            yield

    def _write(self, engine: InferenceEngine, numbers: Sequence[int]) -> list[Answer]:
        """Answers to some prompts, in as many passes as the rank with the longest answer needs. Collective."""
        settings, where = self.settings, device()
        decoding = Decoding([self.prompts[n].ids for n in numbers], pad_id=pad_id(self._tokenizer), device=where)
        choose = TokenChoice(numbers, temperature=settings.temperature, top_p=settings.top_p, seed=self._seed)
        ends = torch.tensor(self._ends, dtype=torch.int64, device=where)
        done = torch.zeros(len(numbers), dtype=torch.bool, device=where)
        written: list[torch.Tensor] = []
        while len(written) < settings.max_new_tokens:
            tokens = choose(engine(decoding=decoding))
            written.append(tokens)
            done |= torch.isin(tokens, ends)
            if not max_over_ranks(int(not done.all()), where):
                break
            decoding.append(tokens)
        return [self._answer(row) for row in torch.stack(written, dim=1).tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        return Answer(tuple(ids[:end]), ended=end is not None)


def dealt(numbers: list[int], most: int) -> list[list[int]]:
    """The numbers in groups that are written together: as many groups as a rank with `most` numbers has."""
    return [numbers[start : start + TOGETHER] for start in range(0, most, TOGETHER)]


def lengths(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean tokens of the answers, and the share that came to an end, as metrics."""
    found = {}
    for name in ("policy", "reference"):
        if rows and name in rows[0]:
            for key in ("tokens", "ended"):
                found[f"samples/{name}_{key}"] = sum(float(row[f"{name}_{key}"]) for row in rows) / len(rows)
    return found
