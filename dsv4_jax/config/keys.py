"""Typed access to the keys of a config.json, by any of their names, collecting every problem."""

from collections.abc import Callable, Mapping

from dsv4_jax.config import json_objects, rules


class Keys:
    """The keys of one JSON object.

    Every getter takes all the names a value may go by. Names that are present must agree. A wrong
    type, a disagreement, or the absence of a required key is appended to `problems` and gives None.
    JSON null counts as absent.
    """

    def __init__(self, raw: Mapping[str, object], problems: list[str], where: str = "") -> None:
        self.raw = raw
        self.problems = problems
        self.where = where  # prefix of the key in messages: "rope_scaling."

    def has(self, *names: str) -> bool:
        """Whether any of the names is present."""
        return any(self.raw.get(name) is not None for name in names)

    def integer(self, *names: str, default: int | None = None) -> int | None:
        """An integer; a boolean or 3.0 is refused. Without a default the key is required."""
        return self._pick(names, rules.is_int, "an integer", default)

    def real(self, *names: str, default: float | None = None) -> float | None:
        """A finite number, as a float. Without a default the key is required."""
        value = self._pick(names, rules.is_real, "a finite number", default)
        return None if value is None else float(value)

    def token(self, name: str) -> int | None:
        """A token id, or absent. A list of one id (transformers allows lists) counts as that id."""
        value = self.raw.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and not rules.is_int(value):
            self.complain(name, value, "one token id")
            return None
        return value

    def tokens(self, name: str) -> int | tuple[int, ...] | None:
        """A token id, a tuple of them where the file has a list, or None if absent or wrong."""
        value = self.raw.get(name)
        if isinstance(value, list) and value and all(map(rules.is_int, value)):
            return tuple(value)
        if value is not None and not rules.is_int(value):
            self.complain(name, value, "a token id or a list of token ids")
            return None
        return value

    def list_of(self, name: str, accepts: Callable[[object], bool], wanted: str) -> list[object] | None:
        """A list whose items all satisfy `accepts`, or None if absent or wrong."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.complain(name, value, f"a list of {wanted}")
            return None
        for position, item in enumerate(value):
            if not accepts(item):
                self.complain(f"{name}[{position}]", item, wanted)
                return None
        return value

    def block(self, name: str) -> "Keys | None":
        """A nested object, or None if absent or not an object."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.complain(name, value, "an object")
            return None
        return Keys(value, self.problems, f"{self.where}{name}.")

    def fixed(self, names: tuple[str, ...], expected: object, *, required: bool = False) -> None:
        """Refuses any other value than `expected`."""
        present = [name for name in names if self.raw.get(name) is not None]
        if required and not present:
            self.missing(names)
        for name in present:
            value = self.raw[name]
            same_type = type(value) is type(expected) or (isinstance(expected, float) and rules.is_int(value))
            if not same_type or value != expected:
                self.complain(name, value, f"{expected!r}, the only supported value")

    def missing(self, names: tuple[str, ...]) -> None:
        """Records the absence of a required key."""
        also = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
        self.problems.append(f"{self.where}{names[0]}{also} is missing")

    def complain(self, name: str, value: object, wanted: str) -> None:
        """Records that a key's value is not what is wanted."""
        if not isinstance(value, json_objects.NonFinite):  # reported when the file was read
            said = rules.shown(value)
            self.problems.append(f"{self.where}{name}={said} must be {wanted}")

    def _pick(
        self,
        names: tuple[str, ...],
        accepts: Callable[[object], bool],
        wanted: str,
        default: object,
    ) -> object:
        present = [name for name in names if self.raw.get(name) is not None]
        if not present:
            if default is None:
                self.missing(names)
            return default
        sound = [name for name in present if accepts(self.raw[name])]
        for name in present:
            if name not in sound:
                self.complain(name, self.raw[name], wanted)
        if len(sound) != len(present):
            return None
        if any(self.raw[name] != self.raw[sound[0]] for name in sound):
            found = " but ".join(f"{self.where}{name}={self.raw[name]!r}" for name in sound)
            self.problems.append(f"{found}: two names of one value must agree")
            return None
        return self.raw[sound[0]]
