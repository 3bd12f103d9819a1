import os
from collections.abc import Iterator

import pytest
import requests

from tests.engines.s3_server import BUCKET, MotoServer

S3_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


@pytest.fixture(scope="session")
def s3_env() -> Iterator[dict[str, str]]:
    """Settings of an S3 server that has the bucket: with METADISKFS_TEST_S3=1 the environment's, else moto's."""
    if os.environ.get("METADISKFS_TEST_S3"):
        yield {name: os.environ[name] for name in S3_SETTINGS}
        return
    server = MotoServer()
    try:
        assert requests.put(f"{server.url}/{BUCKET}", timeout=10).ok
        yield server.env
    finally:
        server.end()


@pytest.fixture
def s3_settings(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in s3_env.items():
        monkeypatch.setenv(name, value)
    return s3_env
