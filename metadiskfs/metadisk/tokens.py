"""The token of one node: asked for once, shared by all threads, renewed when the node will not have it."""

import threading
import time
from collections.abc import Callable

_RENEWAL_PAUSE = 60.0
"""Seconds between two renewals: a node that refuses every token is not asked for one per upload."""


class Tokens:
    """Safe to use from any thread; the first caller asks, the others wait for it.

    A token given by the user (``fixed``) is used for ever: it may carry a balance somebody paid for.
    """

    def __init__(self, ask: Callable[[], str], balance: Callable[[str], int], *, fixed: str = "") -> None:
        """``ask`` fetches a new token ("" where the node gives none), ``balance`` its bytes; both raise NodeError."""
        self._ask = ask
        self._balance = balance
        self._fixed = bool(fixed)
        self._token: str | None = fixed or None
        self._renewed = -_RENEWAL_PAUSE
        self._lock = threading.Lock()

    def current(self) -> str:
        """The token to send, "" for none. Raises NodeError when the node has to be asked and does not answer."""
        if self._token is None:
            with self._lock:
                if self._token is None:
                    self._token = self._ask()
        return self._token

    def renew(self, refused: str, status: int) -> bool:
        """Get another token in place of one the node refused; False when that would not help.

        402 says either that the balance is used up or that the node never saw the token (it forgot its accounts):
        only a balance of 0 tells that nothing is thrown away.
        """
        if self._fixed or not refused:
            return False
        with self._lock:
            if self._token != refused:
                return True
            if time.monotonic() - self._renewed < _RENEWAL_PAUSE:
                return False
            self._renewed = time.monotonic()
            if status == 402 and self._balance(refused) > 0:
                return False
            self._token = self._ask()
            return self._token != ""
