"""Keys: who may ask a server for what, as a file of hashed API keys."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from tfrec import artifact
from tfrec.errors import ConfigError, InputError

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what those before it may."""

FORMAT = 1
PREFIX = "tfrec"
LOOKS = 1.0  # seconds between two looks at the file

_log = logging.getLogger("tfrec.serving")


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, without the token that opens.

    Attributes:
      id: Its name, which is no secret: in the token, in listings, in limits.
      role: ``read``, ``write`` or ``admin``.
      label: Whose it is or what for, in words.
      created: When, as ISO 8601 in UTC.
      sha256: SHA-256 of the whole token, as hex.
    """

    id: str
    role: Role
    label: str
    created: str
    sha256: str

    def may(self, needed: Role) -> bool:
        """Whether this key's role includes ``needed``."""
        return ROLES.index(self.role) >= ROLES.index(needed)


class Keys:
    """API keys in a JSON file that holds no token, only their hashes.

    A token is ``tfrec_<id>_<secret>`` with 32 random bytes as its secret. The hash is one plain
    SHA-256: slow, salted hashes protect passwords, which people choose and which can be guessed
    offline; 256 random bits cannot be guessed at any speed, and each request pays for the hash.
    The id, no secret, says which hash to compare with, and that is compared in constant time.

    A running server looks at the file again once a second, so that new and revoked keys need no
    restart. A file that is gone leaves no valid key; one that is damaged leaves those of before.

    Args:
      path: The file; :meth:`create` makes it.
      clock: Seconds that only grow; tests give their own.

    Raises:
      ConfigError: the file cannot be read, or is not one of keys.
    """

    def __init__(
        self, path: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = _stamp(self.path)
        self._keys = _read(self.path)
        self._looked = clock()

    def create(self, role: str, label: str = "") -> str:
        """Adds a key.

        Args:
          role: ``read``, ``write`` or ``admin``.
          label: Whose it is or what for.

        Returns:
          Its token, which cannot be had again.

        Raises:
          InputError: there is no such role, or the label is no short line.
          ConfigError: the file there is not one of keys.
          SetupError: the file cannot be written.
        """
        known = next((known for known in ROLES if known == role), None)
        if known is None:
            raise InputError(f"there is no role '{role}'; take one of {', '.join(ROLES)}")
        if len(label) > 200 or not label.isprintable():
            raise InputError("a key's label is one line of at most 200 characters")
        key_id = secrets.token_hex(6)
        token = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        made = Key(key_id, known, label, now, _digest(token))
        self._change(lambda keys: {**keys, key_id: made})
        return token

    def revoke(self, key_id: str) -> Key:
        """Takes a key out for good, and returns what it was.

        Raises:
          InputError: there is no key with this id.
          ConfigError: the file there is not one of keys.
          SetupError: the file cannot be written.
        """
        gone: list[Key] = []

        def without(keys: Mapping[str, Key]) -> dict[str, Key]:
            if key_id not in keys:
                known = ", ".join(keys) or "none"
                raise InputError(f"{self.path} has no key '{key_id}'; its keys: {known}")
            gone.append(keys[key_id])
            return {key: value for key, value in keys.items() if key != key_id}

        self._change(without)
        return gone[0]

    def find(self, token: str) -> Key | None:
        """The key that a token opens as; None: it is none, or it was revoked."""
        self._look()
        key = self._keys.get(_id(token))
        known = key.sha256 if key else "0" * 64
        return key if hmac.compare_digest(_digest(token), known) else None

    def listing(self) -> list[Key]:
        """All keys, oldest first."""
        self._look()
        return list(self._keys.values())

    def _look(self) -> None:
        """Reads the file again if it changed; asks the disk at most once a second."""
        now = self._clock()
        if now - self._looked < LOOKS:
            return
        self._looked = now
        with self._lock:
            stamp = _stamp(self.path)
            if stamp == self._seen:
                return
            self._seen = stamp
            try:
                self._keys = _read(self.path)
            except ConfigError as error:
                _log.error("the keys of before stay valid: %s", error)

    def _change(self, change: Callable[[Mapping[str, Key]], dict[str, Key]]) -> None:
        """Reads, changes and writes the file, while no other process does."""
        with self._lock, artifact.alone(self.path.parent):
            keys = change(_read(self.path))
            listed = [asdict(key) for key in keys.values()]
            artifact.write_json(self.path, {"format": FORMAT, "keys": listed}, private=True)
            self._keys, self._seen = keys, _stamp(self.path)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _id(token: str) -> str:
    return token.partition("_")[2].partition("_")[0]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file was changed or replaced; None: there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def _read(path: Path) -> dict[str, Key]:
    """Id -> key.

    Raises:
      ConfigError: the file cannot be read, or is not one of keys.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"cannot read the keys in {path}: {why}") from None
    try:
        tree = json.loads(text)
        found = [_parsed(entry) for entry in tree["keys"]] if tree["format"] == FORMAT else None
    except (ValueError, TypeError, KeyError, RecursionError):
        found = None
    if found is None:
        raise ConfigError(f"{path} is not a file of API keys; `tfrec keys create` makes one")
    return {key.id: key for key in found}


def _parsed(entry: Mapping[str, object]) -> Key:
    """Raises KeyError, TypeError or ValueError where the entry is not what was written."""
    key = Key(**{field.name: entry[field.name] for field in fields(Key)})  # type: ignore[arg-type]
    if not all(isinstance(value, str) for value in asdict(key).values()) or key.role not in ROLES:
        raise ValueError
    return key
