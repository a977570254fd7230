import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from openai import OpenAI

from preftune.evaluate.agreement import ANY
from preftune.evaluate.generation import answers
from preftune.evaluate.subjects import find, weights
from preftune.pipeline.export import export

pytestmark = pytest.mark.slow
TOKENS = 24


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """(folder of the export, base URL) of a tiny model behind `transformers serve`, on this machine alone."""
    folder = tmp_path_factory.mktemp("served") / "model"
    export(str(trained("dpo")), str(folder), None, "trained")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"])
    try:
        for _ in range(240):
            assert server.poll() is None, "transformers serve ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_the_served_model_says_what_the_export_says(served):
    folder, url = served
    found = find(str(folder))
    own = answers(weights(found), found.tokenizer(), ANY, TOKENS)
    with OpenAI(base_url=url, api_key="none") as client:
        reply = client.chat.completions.create(
            model=str(folder), messages=list(ANY[0]), temperature=0, max_tokens=TOKENS
        )
    assert own[0] and reply.choices[0].message.content.strip() == own[0]
