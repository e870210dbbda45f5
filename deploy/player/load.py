"""Streams that ask the cluster again and again, and compare what comes with what came before."""

import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections import Counter

QUESTIONS = [
    "What is the capital of France?", "Why is exercise good for you?", "What is a volcano?", "How do I make a cup of tea?",
    "Why do leaves change colour in autumn?", "Name three rivers.", "What do bees do?", "Tell me about the Moon.",
]


class Broken(Exception):
    """The connection ended before the answer did."""


class Door:
    """How clients ask: by TLS under the Service's name, with a key."""

    def __init__(self, service, authority, key, model):
        self.service, self.authority, self.key, self.model = service, authority, key, model
        self.tls = ssl.create_default_context(cafile=str(authority))

    def with_key(self, key):
        """The same door, asked with another key."""
        return Door(self.service, self.authority, key, self.model)

    def ask(self, host, question, tokens, on_token=lambda: None):
        """The text of a greedy answer of the router at `host`, streamed. Raises `Broken`, or ValueError with what the server said."""
        connection = http.client.HTTPSConnection(self.service, 8000, timeout=120, context=self.tls)
        # The name is the Service's, the address one of its pods'.
        connection._create_connection = lambda _, timeout, source: socket.create_connection((host, 8000), timeout, source)
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "temperature": 0, "max_tokens": tokens, "stream": True, "messages": messages}
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"{answer.status}: {answer.read(500).decode(errors='replace')}")
            return read(answer, on_token)
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


def read(answer, on_token):
    """The text of a stream of events."""
    text = ""
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return text
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(json.dumps(event["error"]))
        text += event["choices"][0]["delta"].get("content") or ""
        on_token()
    raise Broken("the stream ended early")


class Load:
    """So many streams, from `start` to `stop`. `routers` gives the hosts that a Service would lead to."""

    def __init__(self, routers, door, streams=16, tokens=48):
        self.routers, self.door, self.streams, self.tokens = routers, door, streams, tokens
        self.expected = {}
        self.counts, self.complaints, self.silence = Counter(), [], 0.0
        self.lock = threading.Lock()

    def learn(self):
        """What each question is answered while nothing happens."""
        self.expected = {q: self.door.ask(self.routers()[0], q, self.tokens) for q in QUESTIONS}

    def __enter__(self):
        self.counts, self.complaints, self.silence = Counter(), [], 0.0
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.stream, args=(i,), daemon=True) for i in range(self.streams)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=180)

    def stream(self, seed):
        draw = random.Random(seed)
        while not self.over.is_set():
            hosts = self.routers()
            if not hosts:
                # A Service without endpoints refuses.
                self.count("failed", "no router is ready")
                time.sleep(0.5)
                continue
            self.one(draw.choice(hosts), draw.choice(QUESTIONS))

    def one(self, host, question):
        last = time.monotonic()

        def on_token():
            nonlocal last
            with self.lock:
                self.silence = max(self.silence, time.monotonic() - last)
            last = time.monotonic()

        try:
            text = self.door.ask(host, question, self.tokens, on_token)
        except Broken as error:
            self.count("broken off", f"{host}: {error}")
        except ValueError as error:
            self.count("failed", f"{host}: {error}")
        else:
            right = text == self.expected[question]
            self.count("ok" if right else "wrong", None if right else f"{question}: {text!r}")

    def count(self, what, complaint=None):
        with self.lock:
            self.counts[what] += 1
            if complaint and len(self.complaints) < 5:
                self.complaints.append(complaint)

    def told(self):
        """A line of what came of it."""
        counts = ", ".join(f"{self.counts[what]} {what}" for what in ("ok", "failed", "wrong", "broken off"))
        return f"{counts}; longest silence {self.silence:.1f} s"
