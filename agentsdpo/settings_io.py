"""Settings from TOML and back, with errors a person can act on. Works for any :class:`~agentsdpo.settings.Settings`.

TOML has no null, so ``"none"`` stands for None wherever a setting may be None. Types are strict: a text is not taken
for a number, nor a number for a yes or no. Unknown keys are refused with the nearest valid name.
"""

import difflib
import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from agentsdpo.errors import ConfigError
from agentsdpo.settings import Settings
from agentsdpo.types import Json

S = TypeVar("S", bound=Settings)
NONE = "none"
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
_BOUNDS = (("ge", "[", "{} or more"), ("gt", "(", "above {}"), ("le", "]", "{} or less"), ("lt", ")", "below {}"))


@dataclass(frozen=True)
class Setting:
    """One setting as documentation: dotted key, type and range in words, default, description with unit."""

    key: str
    type: str
    range: str
    default: Any
    description: str

    @property
    def expected(self) -> str:
        """Type and range in one phrase."""
        return f"{self.type} {self.range}".strip()


# ---------------------------------------------------------------------------------------------------------- reading


def read_toml(path: Path) -> Json:
    """One TOML file as a mapping.

    Raises:
        ConfigError: the file is missing, unreadable, or not TOML (names the line).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}", fix="give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", fix="quote texts, write key = value") from error


def flat(table: Mapping[str, Any], stem: str = "") -> Json:
    """A table of tables with dotted keys.

    >>> flat({"seed": 0, "learn": {"betas": [0.9, 0.95], "lr": 0.1}})
    {'seed': 0, 'learn.betas': [0.9, 0.95], 'learn.lr': 0.1}
    """
    found: Json = {}
    for key, value in table.items():
        found |= flat(value, f"{stem}{key}.") if isinstance(value, Mapping) else {f"{stem}{key}": value}
    return found


def with_sets(data: Mapping[str, Any], sets: Iterable[str]) -> Json:
    """A copy with overrides ``a.b=c`` laid over it; values are TOML, or bare text when they are not.

    Raises:
        ConfigError: an override has no ``=`` or no key, or goes through something that is not a table.

    >>> with_sets({"learn": {"lr": 0.1}}, ["learn.lr=1e-4", "model=seed", "eval.splits=['val']", "learn.on=true"])
    {'learn': {'lr': 0.0001, 'on': True}, 'model': 'seed', 'eval': {'splits': ['val']}}
    """
    result = json.loads(json.dumps(data, default=str))
    for text in sets:
        key, equals, value = text.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"--set {text!r} is not of the form key=value", fix="write --set KEY=VALUE, say seed=1")
        table = result
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {text!r} goes through {part!r}, which is {table!r}",
                                  fix="name a table before the dot")
        table[parts[-1]] = _toml_value(value.strip())
    return result


def _toml_value(text: str) -> Any:
    """One TOML value, or the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def build(cls: type[S], data: Mapping[str, Any]) -> S:
    """Settings from a mapping.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong type or a value out of range (with what is
            expected), or settings that make no sense together.

    >>> from agentsdpo.hint.config import HintConfig
    >>> build(HintConfig, {"level": 2}).level
    2
    >>> build(HintConfig, {"levle": 2})
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: levle is not a setting; did you mean level?
    >>> build(HintConfig, {"level": 9})
    Traceback (most recent call last):
    agentsdpo.errors.ConfigError: level is 9; it must be an integer in [1, 3]
    """
    text = json.dumps(_nones(cls, data), default=str)
    try:
        return cls.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _readable(cls, error) from error


def _nones(cls: type[Settings], data: Mapping[str, Any]) -> Json:
    """The mapping with ``"none"`` turned into None where a setting may be None."""
    result = dict(data)
    for name, field in cls.model_fields.items():
        inner = _settings_in(field.annotation)
        if inner and isinstance(result.get(name), Mapping):
            result[name] = _nones(inner, result[name])
        elif result.get(name) == NONE and type(None) in get_args(field.annotation):
            result[name] = None
    return result


def _readable(cls: type[Settings], error: ValidationError) -> ConfigError:
    """The first complaint as our own error; a ConfigError raised inside comes back as it is."""
    first = error.errors()[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return inner
    known = {setting.key: setting for setting in describe(cls)}
    tables = {key[:at] for key in known for at, letter in enumerate(key) if letter == "."}
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{key} is not a setting", fix=nearest(key, known) or _listed(cls, known))
    while key not in known and key not in tables and "." in key:
        key = key.rpartition(".")[0]  # the complaint is about an item of a list, or one type of several
    shown = NONE if first["input"] is None else first["input"]
    expected = known[key].expected if key in known else "a table of settings"
    return ConfigError(f"{key} is {shown!r}", fix=f"it must be {expected}")


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint at the valid name that was probably meant: spelt alike, or the same last part elsewhere; "" without one.

    >>> nearest("learn.max_stalness", ["learn.max_staleness", "seed"]), nearest("lr", ["learn.lr", "seed"])
    ('did you mean learn.max_staleness?', 'did you mean learn.lr?')
    >>> nearest("zzz", ["a"])
    ''
    """
    names = list(known)
    last = key.rpartition(".")[2]
    found = [name for name in names if name.rpartition(".")[2] == last]
    found = found or difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    lasts = {name.rpartition(".")[2]: name for name in names}
    found = found or [lasts[name] for name in difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)]
    return f"did you mean {found[0]}?" if found else ""


def _listed(cls: type[Settings], known: Iterable[str]) -> str:
    """Where the settings of a class stand, or which there are: those of a table as one."""
    if cls.LISTED:
        return f"list all settings with: {cls.LISTED}"
    return "there are " + ", ".join(dict.fromkeys(re.sub(r"\..*", ".*", key) for key in known))


# ---------------------------------------------------------------------------------------------------------- writing


def to_toml(settings: Settings) -> str:
    """All settings, defaults included, as TOML that :func:`build` turns back into the same settings.

    >>> from agentsdpo.learn.tripwire import TripwireConfig
    >>> to_toml(TripwireConfig(every=5))
    'on = true\\nevery = 5\\n'
    """
    return tomli_w.dumps(_plain(settings.model_dump(mode="json")))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return NONE if value is None else value


def describe(cls: type[Settings], prefix: str = "", at: Settings | None = None) -> list[Setting]:
    """Every setting of a class and of the tables inside it, in order of declaration.

    Args:
        cls: the class.
        prefix: put before each key, as in ``learn.``.
        at: where defaults are taken from; the class's own when not given. A table inside may have others than its
            class has by itself, as ``learn`` has those of a preset.
    """
    found: list[Setting] = []
    for name, field in cls.model_fields.items():
        default = getattr(at, name) if at is not None else field.get_default(call_default_factory=True)
        inner = _settings_in(field.annotation)
        if inner:
            found += describe(inner, f"{prefix}{name}.", default if isinstance(default, inner) else None)
        else:
            found.append(Setting(f"{prefix}{name}", _type_words(field.annotation), _range_words(field.metadata),
                                 None if default is PydanticUndefined else default, field.description or ""))
    return found


def _settings_in(annotation: Any) -> type[Settings] | None:
    """The settings class an annotation names, if it does."""
    options = [annotation, *get_args(annotation)] if _is_union(annotation) else [annotation]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Settings)), None)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _type_words(annotation: Any) -> str:
    """A type in words.

    >>> _type_words(int | None), _type_words(Literal["a", "b"]), _type_words(tuple[str, ...])
    ('an integer or "none"', "one of 'a', 'b'", 'a list, each a text')
    """
    args = get_args(annotation)
    if _is_union(annotation):
        return " or ".join('"none"' if arg is type(None) else _type_words(arg) for arg in args)
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(repr(arg) for arg in args)}"
    if get_origin(annotation) in (tuple, list):
        items = list(dict.fromkeys(_type_words(arg) for arg in args if arg is not ...))
        size = "" if ... in args or get_origin(annotation) is list else f" of {len(args)}"
        return f"a list{size}, each {' or '.join(items)}"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _range_words(metadata: Iterable[Any]) -> str:
    """Bounds in words: an interval when both ends are bound; the pattern of a text.

    >>> from annotated_types import Ge, Gt, Lt
    >>> _range_words([Ge(0), Lt(1)]), _range_words([Gt(0)]), _range_words([])
    ('in [0, 1)', 'above 0', '')
    """
    patterns = [item.pattern for item in metadata if getattr(item, "pattern", None)]
    if patterns:
        return f"that matches {patterns[0]}"
    found = [(getattr(item, name), mark, words) for name, mark, words in _BOUNDS for item in metadata
             if getattr(item, name, None) is not None]
    if len(found) == 2:
        (low, opening, _), (high, closing, _) = found
        return f"in {opening}{low}, {high}{closing}"
    return " and ".join(words.format(value) for value, _, words in found)
