"""What is printed reaches every terminal, file and pipe: signs that its encoding lacks are spelled in those it has."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from io import TextIOWrapper
from typing import TextIO

HANDLER = "fedlora-readable"
"""What a stream of ours does with a sign that its encoding lacks."""
_SIGNS = {
    "ρ": "rho", "α": "alpha", "γ": "gamma", "λ": "lambda", "τ": "tau", "μ": "mu", "σ": "sigma", "Σ": "sum",
    "Δ": "delta", "ß": "ss", "⊙": "(*)", "‖": "||", "⟨": "<", "⟩": ">",
    "±": "+/-", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "─": "-", "…": "...", "→": "->", "⁻": "^-", "²": "^2",
    "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "∞": "inf", "√": "sqrt", "∈": "in",
    "‘": "'", "’": "'", "“": '"', "”": '"', "„": '"', "•": "*", "│": "|", "━": "-", "┃": "|", "╭": "+", "╮": "+",
    "╰": "+", "╯": "+",
}  # fmt: skip


def _readable(error: UnicodeError) -> tuple[str, int]:
    """An error handler of Python's codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelled, error.object[error.start : error.end])), error.end


def _spelled(sign: str) -> str:
    """A sign in ASCII: its name where we have one, its letter without accents, or `?` (also for what is no sign)."""
    if sign in _SIGNS or unicodedata.combining(sign):
        return _SIGNS.get(sign, "")
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?"


codecs.register_error(HANDLER, _readable)


def settle() -> None:
    """Let standard output and error take every text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not where a test or a notebook put something else in its place
            stream.reconfigure(errors=HANDLER)


def busy(text: str) -> None:
    """To a person who waits at a terminal: what is being done. A file has no use for it."""
    if sys.stdout.isatty():
        print(text, flush=True)


def shown(text: str, stream: TextIO) -> str:
    """The text as the stream will show it: known before a table is laid out, so that its columns stay straight."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, HANDLER).decode(encoding)
