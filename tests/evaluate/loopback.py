"""An OpenAI-compatible endpoint on this machine, for tests: it prefers the shorter answer, or does what it is told."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def endpoint(status=200, says=None):
    """(base_url, requests): a server for as long as the context lasts, and what it was asked.

    `says` maps (first, second) to a verdict; with a status other than 200 it echoes the Authorization header.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
            content = body["messages"][0]["content"]
            if "[Answer A]" in content:
                both = content.split("[Answer A]\n")[1].split("\n\nBetter answer:")[0].split("\n\n[Answer B]\n")
                verdict = (says or shorter)(*both)
            else:
                verdict = f"Message {len(body['messages'])}."
            reply = {"choices": [{"message": {"role": "assistant", "content": verdict}}]}
            if status != 200:
                reply = {"error": f"refused: {self.headers.get('Authorization')}"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def shorter(first, second):
    return "A" if len(first) < len(second) else "B"
