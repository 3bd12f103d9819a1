"""An S3 server for tests: moto's, in a process of its own, with an empty bucket."""

import os
import re
import subprocess
import sys
import threading

BUCKET = "metadisk"


class MotoServer:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr
        for line in self.process.stderr:
            if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.url = f"http://127.0.0.1:{match[1]}"
                break
        threading.Thread(
            target=self.process.stderr.read, daemon=True
        ).start()  # or its log fills the pipe and it stops
        self.env = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        if self.process.stderr:
            self.process.stderr.close()
