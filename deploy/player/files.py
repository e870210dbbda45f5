"""A server of a pair's folder on this machine, for pods that pull."""

import functools
import hashlib
import http.server
import json
import threading

# The parts of a pair that each role opens.
PARTS = {"router": {"text"}, "prefill": {"text", "full", "projection"}, "decode": {"text", "decode"}}


class Files:
    """Serves while it is entered, and keeps a list of the paths that were asked for."""

    def __init__(self, pair, address):
        self.manifest = (pair / "pair.json").read_bytes()
        self.asked = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                asked.append(self.path.removeprefix("/"))

        self.server = http.server.ThreadingHTTPServer((address, 0), functools.partial(Handler, directory=str(pair)))

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def values(self):
        """What the chart is told of the pair."""
        host, port = self.server.server_address
        return {"pull": {"source": f"http://{host}:{port}/", "sha256": hashlib.sha256(self.manifest).hexdigest()}}

    def half(self, role):
        """The files that a role has to ask for."""
        files = json.loads(self.manifest)["files"]
        return {"pair.json", *(name for name, file in files.items() if file["part"] in PARTS[role])}
