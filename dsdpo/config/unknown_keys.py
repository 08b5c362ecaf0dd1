"""What to say about a key that is no setting: another program's name for one, the right section, or a typo."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from dsdpo.config.foreign_names import FOREIGN

# A setting that an advice names: dotted, and not a file's name.
_SETTING = re.compile(r"\b(?:model|data|loss|reference|optimizer|batch|train|evaluation|checkpoint|export|tracking|"
                      r"distributed)\.(?!json)[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*")  # fmt: skip
# Too common to say anything by themselves.
_COMMON = {"name", "path", "type", "mode", "group", "tags", "pairs", "revision", "bias", "adapter", "strategy", "which"}


def about_unknown(key: str, valid: list[str], *, shown: Callable[[str], str] = str) -> str:
    """'; use X', '; did you mean X?' or '; there is none: ...' about a dotted key that is none of `valid`.

    Similarity counts only where it can be a slip of the fingers: a name of another program that happens to look like
    one of ours is worse than no advice. `shown` writes a setting as an option where the key was one.
    """
    section, _, leaf = key.replace("-", "_").rpartition(".")
    advice = FOREIGN.get(f"{section}.{leaf}") or FOREIGN.get(leaf) or FOREIGN.get(leaf.lower())
    if advice is not None:
        return _advice(advice, valid, shown)
    if (dotted := leaf.replace("_", ".", 1)) in valid and not section:  # model_path
        return _question([dotted], shown)
    own = [name for name in valid if name.split(".")[-1] == leaf.lower() and name != key]
    if own and leaf not in _COMMON:
        return _question(own, shown)
    return _question(_slips(key, valid), shown)


def did_you_mean(name: str, names: Iterable[str], *, like: float = 0.6) -> str:
    """'; did you mean X?' with the nearest of `names`, or nothing where none is `like` it (0 to 1)."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=like)
    return f"; did you mean {near[0]}?" if near else ""


def _advice(advice: str, valid: list[str], shown: Callable[[str], str]) -> str:
    advice = next((one for one in advice.split(" | ") if set(_SETTING.findall(one)) <= set(valid)), "")
    if not advice:
        return "; there is none in this version"
    if advice in (f"use {name}" for name in valid):
        return _question([advice.removeprefix("use ")], shown)
    return f"; {_SETTING.sub(lambda match: shown(match[0]), advice)}"


def _question(names: list[str], shown: Callable[[str], str]) -> str:
    if not names:
        return ""
    *first, last = map(shown, names)
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?"


def _slips(key: str, valid: list[str]) -> list[str]:
    """The settings that a slip or two of the fingers turn into this key: the same section first, then outer ones."""
    section, _, leaf = key.lower().rpartition(".")
    beside = [name for name in valid if name.rpartition(".")[0] == section]
    elsewhere = [] if leaf in _COMMON else valid
    for names, word in ((beside, leaf), (valid, key.lower()), (elsewhere, leaf)):
        candidates = {name: name if word != leaf else name.split(".")[-1] for name in names}
        near = [(_distance(word, text), name) for name, text in candidates.items() if _near(word, text)]
        if near:
            best = min(near)[0]
            return sorted((name for distance, name in near if distance == best), key=lambda name: name.count("."))[:3]
    return []


def _near(word: str, other: str) -> bool:
    """True if one is the other with a slip in about every five letters, two at most."""
    return 0 < _distance(word, other) <= min(2, max(len(word), len(other)) // 4)


def _distance(word: str, other: str) -> int:
    """Letters to insert, delete, replace or swap with their neighbour (optimal string alignment)."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(word, 1):
        row = [i]
        for j, its in enumerate(other, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != its))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == its:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
