"""What a node remembers besides objects: balances, prices, promo codes, and how much went through it.

A token needs no row until it has a balance: `token/new` costs nothing and leaves nothing. The interface is the
class's public methods; a server database can take its place for nodes on several machines.
"""

import contextlib
import errno
import secrets
import sqlite3
import string
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from metadiskfs.errors import BalanceInsufficient, UsageError

MAX_BYTES = 1 << 60
_ALPHABET = string.ascii_letters + string.digits
_SCHEMA = """
-- A token's balance in bytes. No row: 0. The CHECK is the last wall against overdrawing.
CREATE TABLE IF NOT EXISTS account (
    token   TEXT PRIMARY KEY,
    balance INTEGER NOT NULL CHECK (balance >= 0)
) STRICT, WITHOUT ROWID;
-- What the node sells: that many bytes of balance for that many cents.
CREATE TABLE IF NOT EXISTS price (
    amount INTEGER PRIMARY KEY,
    cost   INTEGER NOT NULL
) STRICT;
-- A code gives `bytes` of balance, once to each token.
CREATE TABLE IF NOT EXISTS promo (
    code  TEXT PRIMARY KEY,
    bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS redemption (
    code  TEXT NOT NULL,
    token TEXT NOT NULL,
    PRIMARY KEY (code, token)
) STRICT, WITHOUT ROWID;
-- Running totals of all processes of the node (traffic.py names them). They only grow.
CREATE TABLE IF NOT EXISTS counter (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Price:
    """``amount`` in bytes, ``cost`` in cents."""

    amount: int
    cost: int


def new_token() -> str:
    """Sixteen random letters and digits, as the old servers gave: 95 bits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(16))


class Accounts:
    """One SQLite file. Methods may be called from any thread; several processes may open the same file.

    Amounts are bytes of balance, 0 to MAX_BYTES.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # money: a withdrawal that was answered is not forgotten
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def balance(self, token: str) -> int:
        with self._lock:
            row = self._db.execute("SELECT balance FROM account WHERE token = ?", (token,)).fetchone()
        return row[0] if row else 0

    def prices(self) -> list[Price]:
        with self._lock:
            return [Price(*row) for row in self._db.execute("SELECT amount, cost FROM price ORDER BY amount")]

    def deposit(self, token: str, amount: int) -> None:
        """Add to a balance; also how a refund is given. Raises UsageError where the sum would pass MAX_BYTES."""
        with self._transaction() as db:
            _add(db, token, amount)

    def withdraw(self, token: str, amount: int) -> None:
        """Take from a balance. Raises BalanceInsufficient and takes nothing where it does not suffice.

        One statement decides and takes, so that two at once never overdraw.
        """
        with self._transaction() as db:
            taken = db.execute(
                "UPDATE account SET balance = balance - ?2 WHERE token = ?1 AND balance >= ?2", (token, amount)
            )
            if amount and not taken.rowcount:
                raise BalanceInsufficient("balance-insufficient")

    def redeem(self, token: str, code: str) -> bool:
        """Give the token what the code is worth; False if it is unknown or this token has used it."""
        with self._transaction() as db:
            row = db.execute("SELECT bytes FROM promo WHERE code = ?", (code,)).fetchone()
            if row is None:
                return False
            used = db.execute("INSERT INTO redemption VALUES (?, ?) ON CONFLICT DO NOTHING", (code, token))
            if not used.rowcount:
                return False
            _add(db, token, row[0])
        return True

    def set_promo(self, code: str, amount: int) -> None:
        """Add a promo code or change its worth. Who used it before stays a user of it."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO promo VALUES (?, ?)", (code, amount))

    def drop_promo(self, code: str) -> bool:
        with self._transaction() as db:
            return db.execute("DELETE FROM promo WHERE code = ?", (code,)).rowcount > 0

    def promos(self) -> list[tuple[str, int]]:
        with self._lock:
            return self._db.execute("SELECT code, bytes FROM promo ORDER BY code").fetchall()

    def set_price(self, amount: int, cost: int) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO price VALUES (?, ?)", (amount, cost))

    def drop_price(self, amount: int) -> bool:
        with self._transaction() as db:
            return db.execute("DELETE FROM price WHERE amount = ?", (amount,)).rowcount > 0

    def count(self, increments: Mapping[str, int]) -> None:
        """Add to running totals."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO counter VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = value + ?2", increments.items()
            )

    def counters(self) -> dict[str, int]:
        with self._lock:
            return dict(self._db.execute("SELECT name, value FROM counter"))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction. sqlite3's own errors end here as OSError: ENOSPC for a full disk, else EIO."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
                    raise OSError(errno.ENOSPC if full else errno.EIO, f"accounts: {error}") from error
                raise


def _add(db: sqlite3.Connection, token: str, amount: int) -> None:
    row = db.execute(
        "INSERT INTO account VALUES (?1, ?2) ON CONFLICT DO UPDATE SET balance = balance + ?2 RETURNING balance",
        (token, amount),
    ).fetchone()
    if row[0] > MAX_BYTES:
        raise UsageError("the balance would grow beyond all measure")
