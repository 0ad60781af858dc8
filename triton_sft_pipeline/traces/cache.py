"""What earlier runs found out about records, so that ten records appended to a large file cost ten records' work.

What the filter works out about one record (its problem's fingerprint, the first step that refuses it, its kernel's
normal form) takes many times as long as reading it, and is a function of the record's text, the settings, the held-out
problems and this package's code. All of these are in the key, so nothing here is ever out of date: it is found or it is
not. What compares records is worked out anew each time.

A cache that is lost, damaged or in somebody else's use costs time and nothing else.
"""

from __future__ import annotations

import json
import platform
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from triton_sft_pipeline.files import hash_json, sha256_file
from triton_sft_pipeline.problems import Problem, hash_problems
from triton_sft_pipeline.traces.duplicates import Form
from triton_sft_pipeline.traces.settings import FilterSettings

_TABLE = "CREATE TABLE IF NOT EXISTS found (key BLOB PRIMARY KEY, note TEXT, digest BLOB, grams BLOB)"
_BATCH = 1_000
_WAIT_S = 5.0
_SPARE = 10_000
"""So many entries that no record asked for are no reason to tidy up."""


@dataclass(frozen=True)
class Finding:
    """What is known about one record that is a trace.

    Attributes:
        problem: fingerprint of its module.
        refused: (reason, detail) of the first step that refused it, or None.
        kernel_form: its kernel's normal form, where duplicates are looked for among those that passed.
    """

    problem: str
    refused: tuple[str, str] | None = None
    kernel_form: Form | None = None


class Cache:
    """Findings in one SQLite file.

    Args:
        path: the file; made when it is missing, made anew when it is damaged.
        context: what a finding depends on beside the record; see `context_of`.
    """

    def __init__(self, path: Path, context: str) -> None:
        self.hits = 0
        self.misses = 0
        self._salt = bytes.fromhex(context)[:16]
        self._used: set[bytes] = set()
        self._new: list[tuple[bytes, str, bytes | None, bytes | None]] = []
        self._database = _opened(Path(path))

    def record(self, text: str) -> Finding | None:
        """What is known about a record, by its raw text."""
        row = self._get(b"record", text)
        if row is None:
            return None
        note = json.loads(row[0])
        refused = (note["reason"], note["detail"]) if "reason" in note else None
        return Finding(note["problem"], refused, None if row[1] is None else (row[1], row[2]))

    def remember_record(self, text: str, finding: Finding) -> None:
        """Keep what was found out about a record."""
        note = {"problem": finding.problem}
        if finding.refused:
            note["reason"], note["detail"] = finding.refused
        self._put(b"record", text, json.dumps(note), finding.kernel_form)

    def module(self, pytorch_code: str) -> Form | None:
        """The normal form of a module, by its code."""
        row = self._get(b"module", pytorch_code)
        return None if row is None else (row[1], row[2])

    def remember_module(self, pytorch_code: str, form: Form) -> None:
        """Keep the normal form of a module."""
        self._put(b"module", pytorch_code, "", form)

    def close(self) -> None:
        """Write what is new, and forget what no record asked for once that is more than half."""
        self._flush()
        if self._database is None:
            return
        with suppress(sqlite3.Error):
            self._tidy_up(self._database)
        self._database.close()
        self._database = None

    def _get(self, kind: bytes, text: str) -> tuple[str, bytes, bytes] | None:
        if self._database is None:
            return None
        key = self._key(kind, text)
        self._used.add(key)
        try:
            row = self._database.execute("SELECT note, digest, grams FROM found WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            self._give_up()
            return None
        self.hits += row is not None
        self.misses += row is None
        found: tuple[str, bytes, bytes] | None = row
        return found

    def _put(self, kind: bytes, text: str, note: str, form: Form | None) -> None:
        if self._database is not None:
            self._new.append((self._key(kind, text), note, *(form or (None, None))))
            if len(self._new) >= _BATCH:
                self._flush()

    def _flush(self) -> None:
        """In short transactions: another run may be writing, and a killed one keeps what it had."""
        if self._database is None or not self._new:
            return
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", self._new)
        except sqlite3.Error:
            self._give_up()
        self._new = []

    def _tidy_up(self, database: sqlite3.Connection) -> None:
        (entries,) = database.execute("SELECT count(*) FROM found").fetchone()
        if entries <= 2 * len(self._used) + _SPARE:
            return
        database.execute("CREATE TEMP TABLE used (key BLOB PRIMARY KEY)")
        database.executemany("INSERT INTO used VALUES (?)", ((key,) for key in self._used))
        database.execute("DELETE FROM found WHERE key NOT IN (SELECT key FROM used)")
        database.commit()
        database.execute("VACUUM")

    def _give_up(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
        self._database = None

    def _key(self, kind: bytes, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return blake2b(data, digest_size=16, key=self._salt, person=kind).digest()


def context_of(settings: FilterSettings, held_out: Iterable[Problem]) -> str:
    """Hex hash of all that a finding depends on beside its record: settings, held-out problems, and the source of what
    works it out.
    """
    return hash_json([settings.model_dump(mode="json"), hash_problems(held_out), _source(), platform.python_version()])


@cache
def _source() -> str:
    package = Path(__file__).resolve().parents[1]
    files = [
        package / "files.py",
        *sorted((package / "problems").glob("*.py")),
        *sorted((package / "traces").glob("*.py")),
    ]
    return hash_json([[file.name, sha256_file(file)] for file in files])


def _opened(path: Path) -> sqlite3.Connection | None:
    """The database, empty when it was damaged; None when there can be none."""
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=_WAIT_S)
            # What a power cut loses is worked out again.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(_TABLE)
            database.execute("SELECT note, digest, grams FROM found LIMIT 1")
            return database
        except sqlite3.OperationalError:
            return None
        except (sqlite3.DatabaseError, OSError):
            with suppress(OSError):
                path.unlink()
    return None
