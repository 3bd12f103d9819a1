"""The routes of tokens: new, balance, prices, redeem, deposit, withdraw."""

import hmac
import json
from typing import Any

import falcon

from metadiskfs.errors import BalanceInsufficient, UsageError
from metadiskfs.node.accounts import MAX_BYTES, Accounts, new_token
from metadiskfs.node.answers import Refusal
from metadiskfs.node.settings import NodeSettings

_MAX_BODY = 64 << 10
_MAX_TOKEN = 256


class NewToken:
    """POST /accounts/token/new. The token needs no account until something is paid in."""

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        response.media = {"token": new_token()}


class Balance:
    """GET /accounts/token/balance/TOKEN."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def on_get(self, request: falcon.Request, response: falcon.Response, token: str) -> None:
        response.media = {"balance": self._accounts.balance(token)}

    on_head = on_get


class Prices:
    """GET /accounts/token/prices."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        response.media = {
            "prices": [{"amount": price.amount, "cost": price.cost} for price in self._accounts.prices()]
        }

    on_head = on_get


class Redeem:
    """POST /accounts/token/redeem/TOKEN with a promo code."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def on_post(self, request: falcon.Request, response: falcon.Response, token: str) -> None:
        code = _read_field(request, "promocode")
        if not isinstance(code, str) or len(token) > _MAX_TOKEN or not self._accounts.redeem(token, code):
            response.status = 403
            response.media = {"status": "error"}
            return
        response.status = 201
        response.media = {"status": "ok"}


class Payment:
    """POST /accounts/token/deposit/TOKEN and .../withdraw/TOKEN, for whoever holds the node's secret."""

    def __init__(self, settings: NodeSettings, accounts: Accounts, *, deposit: bool) -> None:
        self._secret = settings.secret
        self._accounts = accounts
        self._deposit = deposit

    def on_post(self, request: falcon.Request, response: falcon.Response, token: str) -> None:
        given = request.get_header("Authentication") or ""
        if not self._secret or not hmac.compare_digest(given.encode(), self._secret.encode()):
            _status(response, 401, "invalid-authentication")
            return
        amount = _read_amount(request)
        if amount is None or len(token) > _MAX_TOKEN:
            _status(response, 400, "bad-request")
            return
        try:
            (self._accounts.deposit if self._deposit else self._accounts.withdraw)(token, amount)
        except BalanceInsufficient as error:
            raise Refusal(402, "balance-insufficient") from error
        except UsageError:
            _status(response, 400, "bad-request")
            return
        _status(response, 200, "ok")


def _status(response: falcon.Response, status: int, word: str) -> None:
    response.status = status
    response.media = {"status": word}


def _read_field(request: falcon.Request, name: str) -> Any:
    """One field of a JSON body; None where the body is no JSON object. Raises Refusal (400) on malformed JSON.

    Whether a body is JSON is said by its type, as the old servers had it: a form is not malformed, it is nothing.
    """
    if not (request.content_type or "").lower().startswith("application/json"):
        return None
    body = request.stream.read(_MAX_BODY)
    if not body:
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "bad-request") from error
    return content.get(name) if isinstance(content, dict) else None


def _read_amount(request: falcon.Request) -> int | None:
    try:
        value = _read_field(request, "bytes")
    except Refusal:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        return None
    return value
