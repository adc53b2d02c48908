"""Errors a user can cause. The command line prints them in one line and exits with 2."""

import difflib
import operator
import sys
from collections.abc import Iterable, Sequence, Sized
from typing import Any


class UsageError(ValueError):
    """Wrong input; the message says what was given, what is expected and the remedy."""


class UnknownNameError(UsageError, KeyError):
    """A name that does not exist; the message offers near matches."""

    def __str__(self) -> str:
        """The message itself (KeyError would print its repr)."""
        return str(self.args[0]) if self.args else ""


class Stopped(Exception):
    """Work that was told to end (SIGTERM) and has kept what it had; the command line exits with 143."""


class MissingAttribute(UsageError, AttributeError):
    """An attribute that people look for and that there is not; the message says what to do instead."""


class DivergedError(RuntimeError):
    """Training produced a loss that is not finite; the command line exits with 1."""


class NotFiniteError(ArithmeticError):
    """Weights, states or logits that are not finite where numbers are needed; the command line exits with 1."""


def unknown_name(kind: str, name: object, known: Iterable[str], remedy: str = "") -> UnknownNameError:
    """The error for an unknown `name` of some `kind`, whatever it is, with near matches among `known`."""
    known, name = list(known), name if isinstance(name, str) else repr(name)
    near = difflib.get_close_matches(name[:200], known, n=3, cutoff=0.6)
    near = near or [full for full in known if name and name in full][:3]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(known) <= 20:
        hint = f"known: {', '.join(known)}"
    else:
        hint = f"known: {', '.join(known[:5])}, ... ({len(known)} in all)"
    return UnknownNameError(f"unknown {kind} {name!r:.80}; {hint}{' ' + remedy if remedy else ''}")


MOST = 2**31 - 1
"""Largest count of anything that has no bound of its own."""
LARGEST = {"n_loops": 10_000, "max_loops": 10_000, "loops": 10_000, "min_loops": 10_000}
LARGEST |= {"tokens": 2**63 - 1, "seed": 2**63 - 1, "first_index": 2**63 - 1}  # a seed is a column of tables
LARGEST |= {"d_vocab": 2**26, "n_ctx": 2**24, "d_model": 2**20, "n_heads": 2**16, "d_head": 2**16, "d_mlp": 2**24}
LARGEST |= {"n_prelude_layers": 1000, "n_loop_layers": 1000, "n_coda_layers": 1000}
"""Bounds by the last word of a count's name; a damaged config is refused before anything of its size is made."""


def check_count(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return `value` if it is an int (not a bool) in `least`..`most`, else raise UsageError.

    `most` defaults to what `LARGEST` has for the name, else to `MOST`: beyond it nothing can be held or ends.
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UsageError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if number < least:
        raise UsageError(f"{name} must be at least {least}, got {shown(number)}")
    most = LARGEST.get(name.rpartition(".")[2], MOST) if most is None else most
    if number > most:
        raise UsageError(f"{name} must be at most {most}, got {shown(number)}")
    return number


def check_number(
    name: str, value: object, least: int | float, most: int | float = float("inf"), above: bool = False
) -> None:
    """UsageError unless `value` is a number (no bool, no NaN) in least..most; `above`: finite, and not `least`."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise UsageError(f"{name} is {shown(value)}, beyond what a float holds; give a smaller number")
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
    if least <= number <= most and not (above and number in (least, float("inf"))):
        return
    expected = f"in {least}..{most}" if most < float("inf") else f"of at least {least}"
    if above:
        expected = f"above {least}" + (f" and of at most {most}" if most < float("inf") else "")
    raise UsageError(f"{name} must be a number {expected}, got {value!r}")


def check_word(name: str, value: object, words: Sequence[str]) -> None:
    """UsageError unless `value` is one of a few words."""
    if not isinstance(value, str) or value not in words:
        *first, last = (f'"{word}"' for word in words)
        raise UsageError(f"{name} must be {', '.join(first)} or {last}, got {value!r:.80}")


def check_model(model: Any, what: str, hooked: bool = False) -> None:
    """UsageError for what is no model, such as the name of one, or has no hooks where they are needed."""
    if not (hasattr(model, "cfg") and hasattr(model, "run")):
        named = "; open_model opens one by name" if isinstance(model, str) else ""
        kinds = "a LoopMDM, a HookedLoopMDM or another Core"
        raise UsageError(f"{what} takes {kinds}, got {type(model).__name__}{named}")
    if hooked and not hasattr(model, "attention_path"):
        raise UsageError(f"{what} needs hooks; give HookedLoopMDM(model)")


def check_seed(seed: object) -> int:
    """A seed: 0 or more, of 63 bits at most."""
    return check_count("seed", seed, least=0)


def check_data(what: str, tensor: Any) -> None:
    """UsageError for a tensor on the device "meta", which has a shape and no values."""
    if getattr(tensor, "is_meta", False):
        raise UsageError(f'{what} lie on the device "meta" and have no values; give them on a real device')


def and_more(things: Sized) -> str:
    """What a message says after the first of several things."""
    return f" and {len(things) - 1} more" if len(things) > 1 else ""


def shown(number: int) -> str:
    """An integer as a message shows it: whole, or what it begins with and how long it is."""
    if number.bit_length() <= 128:
        return str(number)
    return f"a number of {int(number.bit_length() * 0.30103) + 1} digits"


def check_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise for the first key that `what` does not have, naming the nearest one."""
    known = list(known)
    for key in given:
        if key not in known:
            raise unknown_name(f"key in {what}", key, known)
