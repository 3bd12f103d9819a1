"""Tokens and balances: the routes, the prices, the promise that nothing is overdrawn."""

import errno
import json
import threading
from pathlib import Path

import pytest
import requests

from metadiskfs.errors import BalanceInsufficient, UsageError
from metadiskfs.node.accounts import MAX_BYTES, Accounts, new_token
from metadiskfs.node.traffic import Traffic
from tests.node.node_process import RunningNode, StartNode, run_cli

SECRET = "the-secret-of-the-house"


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "accounts.db")


def test_a_token_never_seen_has_nothing(accounts: Accounts) -> None:
    assert accounts.balance(new_token()) == 0
    with pytest.raises(BalanceInsufficient):
        accounts.withdraw("nobody", 1)
    accounts.withdraw("nobody", 0)
    accounts.close()


def test_two_at_once_never_overdraw(tmp_path: Path) -> None:
    """Over two connections, as two processes have them."""
    both = [Accounts(tmp_path / "accounts.db") for _ in range(2)]
    both[0].deposit("t", 100)
    taken: list[int] = []

    def take(accounts: Accounts) -> None:
        for _ in range(40):
            try:
                accounts.withdraw("t", 3)
                taken.append(3)
            except BalanceInsufficient:
                pass

    threads = [threading.Thread(target=take, args=(both[number % 2],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 99
    assert both[0].balance("t") == 1
    for accounts in both:
        accounts.close()


def test_no_balance_beyond_all_measure(accounts: Accounts) -> None:
    accounts.deposit("t", MAX_BYTES)
    with pytest.raises(UsageError):
        accounts.deposit("t", 1)
    assert accounts.balance("t") == MAX_BYTES
    accounts.close()


def test_a_full_disk_loses_no_balance_and_no_count(accounts: Accounts) -> None:
    accounts.deposit("t", 5)
    traffic = Traffic(accounts)
    traffic.received(7)
    pages = accounts._db.execute("PRAGMA page_count").fetchone()[0]
    accounts._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match="full") as caught:
        accounts.count({f"name-{number}" * 100: 1 for number in range(100)})
    assert caught.value.errno == errno.ENOSPC
    assert accounts.balance("t") == 5
    assert traffic.totals()["in"] == 7
    accounts._db.execute("PRAGMA max_page_count = 1000000")
    traffic.close()
    assert accounts.counters()["in"] == 7
    accounts.close()


def test_the_file_is_private(accounts: Accounts, tmp_path: Path) -> None:
    accounts.deposit("t", 1)
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o077 == 0
    accounts.close()


def post(node: RunningNode, path: str, body: object = None, secret: str = SECRET) -> requests.Response:
    return requests.post(
        f"{node.url}/accounts/token/{path}",
        json=body,
        headers={"Authentication": secret} if secret else {},
        timeout=10,
    )


def balance(node: RunningNode, token: str) -> int:
    return int(requests.get(f"{node.url}/accounts/token/balance/{token}", timeout=10).json()["balance"])


def upload(node: RunningNode, content: bytes, token: str) -> requests.Response:
    return requests.post(node.url + "/api/upload", data={"token": token}, files={"file": ("a", content)}, timeout=10)


def test_promo_codes_and_prices(start_node: StartNode) -> None:
    node = start_node()

    def admin(*words: str) -> str:
        done = run_cli("node", "admin", "--store", str(node.store), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    admin("promo", "WELCOME", "1K")
    admin("price", "1G", "50")
    admin("price", "10G", "300")
    admin("price", "10G", "0")
    assert admin("promo") == "WELCOME 1024\n"
    prices = requests.get(node.url + "/accounts/token/prices", timeout=10).json()
    assert prices == {"prices": [{"amount": 1 << 30, "cost": 50}]}
    redeem = f"{node.url}/accounts/token/redeem/"
    for token in ("first", "second"):
        answer = requests.post(redeem + token, json={"promocode": "WELCOME"}, timeout=10)
        assert (answer.status_code, answer.json()) == (201, {"status": "ok"})
        assert balance(node, token) == 1024
    assert admin("balance", "first") == "1024\n"
    for request in (
        {"json": {"promocode": "WELCOME"}},
        {"json": {"promocode": "UNKNOWN"}},
        {"json": {"promocode": 7}},
        {"json": {}},
        {"json": []},
        {"data": {"promocode": "WELCOME"}},
        {},
    ):
        answer = requests.post(redeem + "first", timeout=10, **request)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()) == (403, {"status": "error"}), request
    for malformed in ("{", "[" * 50_000):
        broken = requests.post(
            redeem + "first", data=malformed, headers={"Content-Type": "application/json"}, timeout=10
        )
        assert broken.status_code == 400
    assert balance(node, "first") == 1024
    admin("promo", "WELCOME", "0")
    assert requests.post(redeem + "third", json={"promocode": "WELCOME"}, timeout=10).status_code == 403


def test_deposit_and_withdraw(start_node: StartNode) -> None:
    node = start_node(env={"METADISKFS_NODE_SECRET": SECRET})
    for verb in ("deposit", "withdraw"):
        for body in ({"bytes": 1}, {}, None):
            answer = post(node, f"{verb}/t", body, secret="wrong")
            assert (answer.status_code, answer.json()) == (401, {"status": "invalid-authentication"})
    assert post(node, "deposit/t", {"bytes": 30}).json() == {"status": "ok"}
    assert post(node, "deposit/t", {"bytes": "30"}).status_code == 200
    assert post(node, "withdraw/t", {"bytes": 50}).json() == {"status": "ok"}
    assert balance(node, "t") == 10
    poor = post(node, "withdraw/t", {"bytes": 11})
    assert (poor.status_code, poor.json()) == (402, {"error": "balance-insufficient"})
    for amount in (-1, "-1", 1.5, "x", None, True, [], MAX_BYTES + 1, "9" * 30):
        for verb in ("deposit", "withdraw"):
            answer = post(node, f"{verb}/t", {"bytes": amount})
            assert (answer.status_code, answer.json()) == (400, {"status": "bad-request"}), amount
    assert balance(node, "t") == 10
    assert SECRET not in node.log_text()


def test_without_a_secret_nobody_deposits(node: RunningNode) -> None:
    for secret in ("", "x"):
        assert post(node, "deposit/t", {"bytes": 1}, secret=secret).status_code == 401


def test_a_charging_node(start_node: StartNode) -> None:
    node = start_node("--charge", env={"METADISKFS_NODE_SECRET": SECRET})
    poor = upload(node, b"x" * 100, "t")
    assert (poor.status_code, poor.json()) == (402, {"error": "balance-insufficient"})
    assert not list(node.store.glob("objects/*/*"))
    post(node, "deposit/t", {"bytes": 550})
    link = upload(node, b"x" * 100, "t").json()
    assert balance(node, "t") == 150
    url = f"{node.url}/api/download/{link['filehash']}"
    assert requests.get(url, timeout=10).json() == {"error": "balance-insufficient"}
    assert requests.head(url, timeout=10).status_code == 200
    assert requests.get(url, params={"token": "t", "key": link["key"]}, timeout=10).content == b"x" * 100
    assert balance(node, "t") == 50
    assert requests.get(url, params={"token": "t"}, timeout=10).status_code == 402
    assert requests.get(url, params={"token": "t"}, headers={"Range": "bytes=0-9"}, timeout=10).status_code == 206
    assert balance(node, "t") == 40
    path = node.store / "objects" / link["filehash"][:2] / link["filehash"]
    path.write_bytes(b"y" * 20)
    assert requests.get(url, params={"token": "t"}, timeout=10).status_code == 500
    assert balance(node, "t") == 40, "a failure of the node is refunded"
    assert json.loads(upload(node, b"", "t").text)["filehash"]


def test_concurrent_uploads_never_overdraw(start_node: StartNode) -> None:
    node = start_node("--charge", env={"METADISKFS_NODE_SECRET": SECRET})
    post(node, "deposit/t", {"bytes": 4 * 1000 * 5})
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda n=number: statuses.append(upload(node, bytes([n]) * 1000, "t").status_code))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] * 5 + [402] * 7
    assert balance(node, "t") == 0
