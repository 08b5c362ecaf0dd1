"""`dsdpo inspect RUN.yaml`: a run's pairs as they are trained on: what is in them, and some of them token by token.

In colour: prompt, what both responses begin with, chosen, rejected, and what is read but not learned.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from html import escape

import numpy as np

from dsdpo.commands.arguments import InspectArguments
from dsdpo.commands.page import page, write_page
from dsdpo.console import counted, quiet_libraries, say
from dsdpo.run.inspection import Inspection, Shown

COLOURS = {"prompt": "2", "shared": "36", "chosen": "32", "rejected": "31", "masked": "2;9", "cut": "33", "title": "1"}
BARS = " ▁▂▃▄▅▆▇█"
BINS = 24
WIDTH = 80
STYLE = """
.rows { display: grid; gap: 1rem; } .row { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 0; font-size: .85rem; }
.prompt { color: var(--dim); } .shared { color: var(--c5); } .chosen { color: var(--good); }
.rejected { color: var(--bad); } .masked { color: var(--dim); text-decoration: line-through; }
.cut { color: var(--c4); } .token:hover { outline: 1px solid currentColor; }
.hist { display: flex; align-items: flex-end; height: 44px; gap: 1px; width: 240px; }
.hist i { flex: 1; background: var(--c0); min-height: 1px; }
"""


def main(given: InspectArguments) -> int:
    """Run the command; the exit code."""
    quiet_libraries(verbose=False)
    found = Inspection(given.run, held_out=given.held_out)
    numbers = found.chosen_pairs(row=given.row, worst=given.worst, sample=given.sample)
    shown = [found.shown(number) for number in numbers]
    coloured = given.color == "always" or (
        given.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    if given.row is None:
        say("\n".join(facts(found, given.ranks)))
    for pair in shown:
        say("\n".join(describe(found, pair, coloured=coloured, tokens=given.tokens)))
    if given.html is not None:
        write_page(given.html, as_page(found, shown, given.ranks))
        say(f"page     {given.html}")
    return 0


def facts(found: Inspection, ranks: int) -> list[str]:
    """What all pairs are, within 80 columns."""
    pairs, size = found.pairs, max(1, len(found.pairs))
    lines = [f"{found.key}: {counted(len(pairs), 'pair')}"]
    for source in pairs.sources:
        dropped = ", ".join(f"{count:,} {kind}" for kind, count in source.dropped.items()) or "none"
        lines.append(f"  {source.path}")
        lines.append(
            f"    {counted(source.rows, 'row')}; dropped {dropped}; {source.truncated:,} truncated "
            f"({source.truncated / max(1, source.pairs):.1%}); {counted(source.duplicates, 'duplicate')}"
        )
    lines += ["", f"  {'tokens':<18}{'5%':>7}{'half':>7}{'95%':>7}{'most':>7}  pairs by length"]
    for name, values in found.lengths.items():
        low, middle, high = np.percentile(values, [5, 50, 95])
        lines.append(f"  {name:<18}{low:>7.0f}{middle:>7.0f}{high:>7.0f}{values.max():>7}  {sparkline(values)}")
    lines.append("")
    if bias := found.length_bias():
        lines.append(
            f"  length    chosen longer in {bias['chosen longer']:.1%}, shorter in {bias['chosen shorter']:.1%}; "
            f"{bias['mean difference']:+.1f} tokens in the mean"
        )
    against = found.contradictions()
    lines.append(
        f"  labels    {counted(len(against), 'pair')} ({len(against) / size:.1%}) against an earlier one"
        + (f": {', '.join(f'{a} and {b}' for a, b in against[:2])}" if against else "")
    )
    lines.append(f"            {counted(found.both_ways(), 'response')} chosen in one pair and rejected in another")
    plan = found.packing(ranks)
    lines.append(
        f"  packing   {plan.layout}{f' ({plan.why_padded})' if plan.why_padded else ''}: "
        f"{plan.micro_batches:.1f} micro-batches a rank and step on {counted(ranks, 'rank')},"
    )
    budget = f"{plan.filled:.0%} of the token budget filled"
    if number := found.run.batch.pairs_per_micro_batch:
        budget = f"{counted(number, 'pair')} each (batch.pairs_per_micro_batch)"
    lines.append(f"            {budget}, heaviest rank {plan.imbalance:.2f} of the mean")
    lines.append(
        f"  sharing   {plan.sharing:.2f} prompt and response tokens for each computed one"
        + ("" if plan.layout == "packed" else f"; packed it would be {found.sharing_gain():.2f}")
    )
    return [part for line in lines for part in (_wrapped(line) if line.startswith("  ") else [line])]


def _wrapped(line: str) -> list[str]:
    """A fact in lines of at most 80 columns; a path stays whole."""
    if len(line) <= WIDTH or "/" in line.split(" ")[2]:
        return [line]
    start = " " * 12
    return textwrap.wrap(line, WIDTH, subsequent_indent=start, drop_whitespace=True, initial_indent="")


def histogram(values: np.ndarray) -> np.ndarray:
    """(BINS,) or fewer numbers of pairs from the shortest length to the longest."""
    low, high = int(values.min()), int(values.max())
    return np.histogram(values, bins=min(BINS, high - low + 1), range=(low, high + 1))[0]


def sparkline(values: np.ndarray) -> str:
    """A histogram in a line."""
    counts = histogram(values)
    top = max(1, counts.max())
    return "".join(BARS[0 if count == 0 else 1 + round(int(count) * 7 / int(top))] for count in counts)


def describe(found: Inspection, pair: Shown, *, coloured: bool, tokens: bool) -> list[str]:
    """A pair in lines; without colours what is not learned and shared is marked by brackets."""

    def paint(text: str, kind: str) -> str:
        return f"\x1b[{COLOURS[kind]}m{text}\x1b[0m" if coloured else text

    width = min(100, shutil.get_terminal_size((80, 24)).columns)
    lines = ["", paint(f"── pair {pair.number}, {pair.place} ".ljust(width, "─"), "title")]
    lines += [pair.scores] if pair.scores else []
    for index, pieces in enumerate(pair.responses):
        name = ("chosen", "rejected")[index] if index < 2 else f"response {index + 1}"
        sizes = {kind: sum(len(piece.ids) for piece in pieces if piece.kind == kind)
                 for kind in ("prompt", "shared", "chosen", "rejected", "masked")}  # fmt: skip
        said = ", ".join(f"{size} {kind}" for kind, size in sizes.items() if size)
        lines.append(f"{name}: {sum(sizes.values())} tokens ({said})")
        parts = []
        for piece in pieces:
            text = "".join(f"{token}⟨{i}⟩" for token, i in zip(found.token_texts(piece.ids), piece.ids, strict=True))
            text = text if tokens else piece.text
            marked = f"[{piece.kind}: {text}]" if not coloured else text
            parts.append("\n".join(paint(line, piece.kind) for line in marked.split("\n")))
        lost = "".join(f" … {count} tokens of the {what} cut" for count, what in
                       ((pair.cut[index], "response"), (pair.prompt_cut, "prompt")) if count)  # fmt: skip
        lines.append("".join(parts) + (paint(lost, "cut") if lost else ""))
    return lines


def as_page(found: Inspection, shown: Sequence[Shown], ranks: int) -> str:
    """All of it as HTML."""
    head = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f"<td>{value:.0f}</td>" for value in (*np.percentile(values, [5, 50, 95]), values.max()))
        + f'<td><div class="hist" title="{values.min()} to {values.max()} tokens">{_bars(values)}</div></td></tr>'
        for name, values in found.lengths.items()
    )
    # The table takes the place of the lines about lengths.
    lines = [line for line in facts(found, ranks) if not any(bar in line for bar in BARS[1:]) and "half" not in line]
    rows = "".join(_row(found, pair) for pair in shown)
    body = f"""<h1>{escape(found.key)} of {escape(os.path.basename(found.run.output_dir))}</h1>
<pre class="dim">{escape(chr(10).join(line for line in lines[1:] if line))}</pre>
<h2>Lengths in tokens</h2><div class="wide"><table><thead><tr><th></th><th>5%</th><th>half</th><th>95%</th><th>most</th>
<th>pairs by length</th></tr></thead><tbody>{head}</tbody></table></div>
<h2>Pairs as they are trained on</h2>
<p><span class="prompt">prompt</span> · <span class="shared">both responses begin so</span> ·
<span class="chosen">chosen</span> · <span class="rejected">rejected</span> ·
<span class="masked">read, not learned</span> · <span class="cut">cut</span> — hover a token for its id</p>
<div class="rows">{rows}</div>"""
    return page(f"{found.key}: {len(found.pairs):,} pairs", body, style=STYLE)


def _bars(values: np.ndarray) -> str:
    counts = histogram(values)
    return "".join(
        f'<i style="height:{100 * count / max(1, counts.max()):.0f}%" title="{count}"></i>' for count in counts
    )


def _row(found: Inspection, pair: Shown) -> str:
    parts = [f'<div class="row"><b>pair {pair.number}</b> <small>{escape(os.path.basename(pair.place))} '
             f"{escape(pair.scores)}</small>"]  # fmt: skip
    for index, pieces in enumerate(pair.responses):
        spans = "".join(
            f'<span class="{piece.kind}">'
            + "".join(
                f'<span class="token" title="{token}">{escape(text)}</span>'
                for token, text in zip(piece.ids, split_text(found, piece.text, piece.ids), strict=True)
            )
            + "</span>"
            for piece in pieces
        )
        lost = "".join(f'<span class="cut"> … {count} tokens of the {what} cut</span>' for count, what in
                       ((pair.cut[index], "response"), (pair.prompt_cut, "prompt")) if count)  # fmt: skip
        parts.append(f"<pre>{spans}{lost}</pre>")
    return "".join(parts) + "</div>"


def split_text(found: Inspection, text: str, ids: Sequence[int]) -> list[str]:
    """A piece's text by token, where the tokens alone spell it; else each token alone."""
    alone = found.token_texts(ids)
    parts, place = [], 0
    for index, token in enumerate(alone):
        start = text.find(token, place) if token else place
        if start < 0 or text[place:start].strip():
            return alone
        parts.append(text[place : start + len(token)])
        place = start + len(token)
        if index == len(alone) - 1:
            parts[-1] += text[place:]
    return parts
