"""What a run's pairs are, as they are trained on: facts of all of them, and single ones token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import AutoConfig

from dsdpo.config.data import SourceConfig
from dsdpo.config.run import RunConfig
from dsdpo.data.binning import LayoutName, MicroBatchBudget, longest_sequences, packed_cost, sequence_tokens
from dsdpo.data.dropped_rows import BadRow
from dsdpo.data.encode import Encoded, encode_examples, encoder_for
from dsdpo.data.examples import shared_length, to_examples
from dsdpo.data.files import Row
from dsdpo.data.pairs import Pairs, open_pairs
from dsdpo.data.plan import plan_step, rank_costs
from dsdpo.data.sources import SECTIONS, DefaultSplit, find_sources, read_rows
from dsdpo.data.tokenize import prepare_pairs
from dsdpo.data.tokenizer import load_tokenizer
from dsdpo.errors import ConfigError, DataError
from dsdpo.objective.packed_support import packed_refusal
from dsdpo.run.datasets import with_date

NO_LIMIT = 2**30  # tokens
WORST_LOOKED_AT = 64  # longest pairs, of which those that lost most are shown
STEPS = 20  # of which packing is predicted


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of the same kind."""

    kind: str  # prompt, shared, chosen, rejected, masked
    ids: tuple[int, ...]
    text: str  # with special tokens


@dataclass(frozen=True)
class Shown:
    """One pair as a model sees it: of each response the whole sequence, in pieces."""

    number: int  # of the pair
    place: str  # where its row stands
    responses: tuple[tuple[Piece, ...], ...]
    cut: tuple[int, ...]  # of each response: tokens that did not fit
    prompt_cut: int
    scores: str  # what the data says of it besides


@dataclass(frozen=True)
class Packing:
    """What the first steps of a run will look like."""

    layout: LayoutName
    why_padded: str | None
    micro_batches: float  # a rank and step
    filled: float  # share of the token budget
    computed: float  # tokens a step, over all ranks
    sharing: float  # tokens of prompts and responses for each computed one
    imbalance: float  # heaviest rank over the mean


class Inspection:
    """The prepared pairs of a run's training or held-out data."""

    def __init__(self, run: RunConfig, *, held_out: bool) -> None:
        """Raises `ConfigError` or `DataError`. No model is read but its tokenizer and config.json."""
        self.split: DefaultSplit = "test" if held_out else "train"
        sources = run.data.eval if held_out else run.data.train
        if not sources:
            raise ConfigError("--eval: data.eval is null: the run has no held-out pairs")
        self.sources: list[SourceConfig] = list(sources)
        self.tokenizer = load_tokenizer(run.model)
        self.run = with_date(run, self.tokenizer)
        folder = prepare_pairs(
            self.sources, self.tokenizer, data=self.run.data, seed=run.train.seed, default_split=self.split
        )
        self.pairs: Pairs = open_pairs(folder)

    @property
    def key(self) -> str:
        """data.train or data.eval."""
        return SECTIONS[self.split]

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """(n,) tokens, by what they are of."""
        lengths = np.asarray(self.pairs.lengths)
        found = {"prompt": lengths[:, 0], "chosen": lengths[:, 1]}
        if self.pairs.group_size > 1:
            found["rejected"] = lengths[:, 2] if self.pairs.group_size == 2 else lengths[:, 2:].max(1)
        return found | {"longest sequence": longest_sequences(lengths)}

    def length_bias(self) -> dict[str, float]:
        """How the chosen response differs in length: shares of pairs, and the mean difference in tokens."""
        if self.pairs.group_size != 2:
            return {}
        gap = self.lengths["chosen"].astype(np.int64) - self.lengths["rejected"]
        return {
            "chosen longer": float((gap > 0).mean()),
            "chosen shorter": float((gap < 0).mean()),
            "mean difference": float(gap.mean()),
        }

    @cached_property
    def _hashes(self) -> np.ndarray:
        """(n, 2) of prompt and response, for chosen and rejected."""
        found = np.zeros((len(self.pairs), 2), dtype="S16")
        for number in range(len(self.pairs)):
            (start, end), *responses = self.pairs.stretches(number)
            prompt = hashlib.blake2b(np.ascontiguousarray(self.pairs.tokens[start:end]).tobytes(), digest_size=16)
            for side, (first, last) in enumerate(responses):
                whole = prompt.copy()
                whole.update(b"|" + np.ascontiguousarray(self.pairs.tokens[first:last]).tobytes())
                found[number, side] = whole.digest()
        return found

    def contradictions(self) -> list[tuple[int, int]]:
        """Pairs that prefer of the same two responses the other one than an earlier pair does."""
        if self.pairs.group_size != 2:
            return []
        seen: dict[tuple[bytes, bytes], int] = {}
        found = []
        for number, (chosen, rejected) in enumerate(self._hashes.tolist()):
            if (rejected, chosen) in seen:
                found.append((seen[rejected, chosen], number))
            seen.setdefault((chosen, rejected), number)
        return found

    def both_ways(self) -> int:
        """Responses that are chosen in one pair and rejected in another, after the same prompt."""
        if self.pairs.group_size != 2:
            return 0
        return len(set(self._hashes[:, 0].tolist()) & set(self._hashes[:, 1].tolist()))

    def packing(self, ranks: int) -> Packing:
        """What the first steps cost on so many ranks, from lengths alone: equal beginnings save a little more."""
        run, lengths = self.run, np.asarray(self.pairs.lengths)
        config = AutoConfig.from_pretrained(
            run.model.path, revision=run.model.revision, trust_remote_code=run.model.trust_remote_code
        )
        refusal = packed_refusal(config, run.model.attn_implementation)
        why = "data.layout asks for it" if run.data.layout == "padded" else refusal
        layout: LayoutName = "padded" if why else "packed"
        budget = MicroBatchBudget(tokens=run.batch.tokens_per_micro_batch, pairs=run.batch.pairs_per_micro_batch)
        costs, counts, positions, consumed = [], [], 0, 0
        for _ in range(min(STEPS, -(-len(lengths) // run.batch.pairs_per_step))):
            plan = plan_step(
                lengths, consumed_pairs=consumed, pairs_per_step=run.batch.pairs_per_step, world_size=ranks,
                budget=budget, seed=run.train.seed, shuffle=run.data.shuffle, layout=layout,
            )  # fmt: skip
            consumed += len(plan.pair_ids)
            costs.append(rank_costs(plan.micro_batches, lengths, layout=layout))
            counts.append(len(plan.micro_batches[0]))
            positions += int(sequence_tokens(lengths[plan.pair_ids]).sum())
        loads = np.array(costs, dtype=np.float64)
        filled = loads.sum() / (sum(counts) * ranks * run.batch.tokens_per_micro_batch)
        return Packing(
            layout, why, micro_batches=float(np.mean(counts)), filled=float(filled),
            computed=float(loads.sum() / len(costs)), sharing=positions / float(loads.sum()),
            imbalance=float((loads.max(1) / loads.mean(1)).mean()),
        )  # fmt: skip

    def sharing_gain(self) -> float:
        """Prompt and response tokens of both responses for each one that a packed row computes."""
        lengths = np.asarray(self.pairs.lengths)
        return float(sequence_tokens(lengths).sum() / packed_cost(lengths)[-1])

    def chosen_pairs(self, *, row: int | None, worst: bool, sample: int) -> list[int]:
        """Pairs to show: those of a row of the files, those that lost most to truncation, or some of all lengths."""
        if row is not None:
            found = np.flatnonzero(self.pairs.origins[:, 1] == row).tolist()
            if not found:
                raise DataError(self._no_row(row))
            return [int(number) for number in found][:sample]
        longest = np.argsort(-self.lengths["longest sequence"], kind="stable")
        if not worst:
            places = np.unique(np.linspace(0, len(longest) - 1, sample).astype(np.int64))
            return [int(number) for number in longest[places]]
        shown = {int(number): self.shown(int(number)) for number in longest[:WORST_LOOKED_AT]}
        lost = {number: sum(pair.cut) + pair.prompt_cut for number, pair in shown.items()}
        return sorted(shown, key=lambda number: -lost[number])[:sample]

    def _no_row(self, row: int) -> str:
        for index, source in enumerate(find_sources(self.sources, self.split, self.run.data)):
            for number, (place, content) in enumerate(read_rows(source)):
                if number == row:
                    bad = self._why_dropped(index, content)
                    return f"--row {row}: {place} makes no pair" + (f": {bad.kind}, {bad.detail}" if bad else "")
        return f"--row {row}: no source of {self.key} has so many rows; they are counted from 0"

    def _why_dropped(self, index: int, content: Any) -> BadRow | None:
        found = self._encoded(index, content, self.run.data.max_length)
        return next((one for one in found if isinstance(one, BadRow)), None)

    def _encoded(self, index: int, content: Any, max_length: int) -> list[Encoded | BadRow]:
        source = find_sources(self.sources, self.split, self.run.data)[index]
        try:
            examples = to_examples(content, source.rules)
        except BadRow as bad:
            return [bad]
        return encode_examples(examples, replace(encoder_for(self.tokenizer, self.run.data), max_length=max_length))

    @cached_property
    def _rows(self) -> dict[tuple[int, int], tuple[str, Any]]:
        """Rows of the files that have been asked for, by source and number; see `_row`."""
        return {}

    def _row(self, source: int, number: int) -> tuple[str, Any]:
        if (source, number) not in self._rows:
            wanted = {int(row) for of, row in self.pairs.origins[self._longest()] if of == source} | {number}
            rows: Sequence[tuple[int, Row]] = [
                (place, row)
                for place, row in enumerate(read_rows(find_sources(self.sources, self.split, self.run.data)[source]))
                if place in wanted
            ]
            self._rows.update({(source, place): row for place, row in rows})
        return self._rows[source, number]

    def _longest(self) -> np.ndarray:
        return np.argsort(-self.lengths["longest sequence"], kind="stable")[:WORST_LOOKED_AT]

    def shown(self, number: int) -> Shown:
        """A pair token by token, with what truncation took of it."""
        group, (source, row) = self.pairs[[number]][0], self.pairs.origins[number].tolist()
        place, content = self._row(source, row)
        wholes = [one for one in self._encoded(source, content, NO_LIMIT) if isinstance(one, Encoded)]
        before = int(np.sum((self.pairs.origins[:number] == (source, row)).all(1)))
        whole = wholes[before % len(wholes)] if wholes else None
        responses = [response for response in group.responses if len(response)]
        cut = tuple(
            max(0, len(whole.responses[k]) - len(response)) if whole and k < len(whole.responses) else 0
            for k, response in enumerate(responses)
        )
        shared = 0
        if len(responses) > 1:
            shared = min(shared_length(responses[0].tolist(), other.tolist()) for other in responses[1:])
        pieces = []
        for k, response in enumerate(responses):
            mask = group.learned_of(k)
            learned = np.ones(len(response), dtype=bool) if mask is None else mask
            own = "chosen" if k == 0 else "rejected"
            kinds = ["masked" if not learned[i] else "shared" if i < shared else own for i in range(len(response))]
            pieces.append(self._pieces(["prompt"] * len(group.prompt) + kinds, [*group.prompt, *response]))
        extra = {name: getattr(group, name) for name in ("margin", "weight", "scores")}
        return Shown(
            number=number,
            place=place,
            responses=tuple(pieces),
            cut=cut,
            prompt_cut=max(0, len(whole.prompt) - len(group.prompt)) if whole else 0,
            scores=", ".join(f"{name} {value}" for name, value in extra.items() if value is not None),
        )

    def _pieces(self, kinds: Sequence[str], ids: Sequence[Any]) -> tuple[Piece, ...]:
        found: list[Piece] = []
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or kinds[end] != kinds[start]:
                own = tuple(int(token) for token in ids[start:end])
                found.append(Piece(kinds[start], own, self._text(list(map(int, ids[:end])), start)))
                start = end
        return tuple(found)

    def _text(self, ids: list[int], start: int) -> str:
        """The text of the tokens from `start` on, as it stands behind the ones before."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        before, whole = (str(self.tokenizer.decode(part, **options)) for part in (ids[:start], ids))
        return whole[len(before) :] if whole.startswith(before) else str(self.tokenizer.decode(ids[start:], **options))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token alone, as text."""
        return [str(self.tokenizer.decode([token], skip_special_tokens=False)) for token in ids]
