"""What the fields of a family's record may hold. Users give them too, as keywords, by --set and in own records."""

from collections.abc import Callable, Mapping
from typing import Any

from loopmdm.model.adapters.cycles import Cycle
from loopmdm.model.errors import UsageError, check_count, check_number

SEVERAL = ("classes", "blocks", "times", "head", "once", "ignores", "remarks", "loop")
"""Fields that are tuples; lists are taken, too, and a lone entry where it is a word."""


def _of(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is of one of the kinds; True and False are no numbers."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _each(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) >= least and all(map(fits, value))


def _from(key: Callable[[Any], bool], fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(key, value)) and all(map(fits, value.values()))


def _anything(value: Any) -> bool:  # noqa: ARG001
    return True


def _or_callable(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: fits(value) or callable(value)


_word, _whole, _worded = _of(str), _of(int), _of(int, str)
_step, _maker = _or_callable(_word), _or_callable(_worded)
_WORD = ("a word", _word)
_WORDS = ("a word, or several", _each(_word))
_YES = ("True or False", _of(bool))

KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("name", "embed", "lift", "auto", "home"), _WORD),
    **dict.fromkeys(("classes", "once", "ignores", "remarks"), _WORDS),
    **dict.fromkeys(
        (
            "bidirectional", "hears", "pre_norm", "causal", "shifted", "additive", "linear_heads", "random_start",
            "nested", "gated",
        ),
        _YES,
    ),
    "blocks": ("a path, or several", _each(_word, 1)),
    "head": ("a path or a function of (native, x), or several", _each(_step)),
    "times": ("numbers or names in the config", _each(_worded)),
    "parts": ("paths by the names of parts", _from(_word, _word)),
    "sizes": ("numbers, words of the config or functions of it", _from(_word, _maker)),
    "masks": ("ids by sizes of the vocabulary", _from(_whole, _whole)),
    "options": ("keywords of the forward", _from(_word, _anything)),
    "loop": (
        "(first, n), numbers or names in the config",
        lambda v: v is None or (_each(lambda part: part is None or _worded(part), 2)(v) and len(v) == 2),
    ),
    "call": ("a function of (tokens, keys)", callable),
    "cycle": ("a Cycle's class", lambda v: isinstance(v, type) and issubclass(v, Cycle)),
}  # fmt: skip
"""What is said of a field's value, and whether one is such."""


def checked(name: str, value: Any) -> Any:
    """A field's value as a record keeps it; UsageError in one line for one of another kind."""
    if name in SEVERAL and isinstance(value, str | list):
        value = (value,) if isinstance(value, str) else tuple(value)
    if name == "mask_token_id" and value is not None:
        return check_count(name, value, least=0)
    if name == "trained_to":
        check_number(name, value, 0, 1)
    says, fits = KINDS.get(name, ("", _anything))
    if not fits(value):
        raise UsageError(f"{name} must be {says}, got {value!r:.60}")
    return value


def checked_loop(loop: Any) -> tuple[int, int] | None:
    """Layers to loop as a user gives them."""
    if loop is None:
        return None
    if not isinstance(loop, tuple | list) or len(loop) != 2:
        raise UsageError(f"loop must be (first, n), the layers to loop, such as (1, 2); got {loop!r:.60}")
    first, n = (check_count(f"loop[{place}]", part, least=0) for place, part in enumerate(loop))
    return first, n
