#!/usr/bin/env python3
"""What TLS costs: a cluster of three processes in plain text, and one with TLS on every hop and a cluster token, take turns.

    scripts/bench/tls.py [--bin FOLDER] [--pair FOLDER] [--rounds 5]

Needs openssl. Each round asks either cluster for the same requests: one at a time, eight at a time, and new connections. Prints the
median of each figure over the rounds, and its ratio to plain text.
"""

import argparse
import json
import os
import pathlib
import secrets
import ssl
import statistics
import subprocess
import tempfile
import time
import urllib.request

BASE = 17600
LOADS = {"1 at a time": ["--num-prompts", "12", "--max-concurrency", "1"], "8 at a time": ["--num-prompts", "48", "--max-concurrency", "8"]}
FIGURES = {"output_throughput": "tokens/s", "mean_ttft_ms": "mean TTFT, ms", "mean_itl_ms": "mean ITL, ms", "p99_itl_ms": "p99 ITL, ms"}


def sh(*command, **more):
    subprocess.run([str(c) for c in command], check=True, capture_output=True, **more)


def certificates(folder):
    """An authority and one certificate for all processes."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    sh("openssl", "req", "-x509", *key, "-keyout", folder / "ca.key", "-out", folder / "ca.pem", "-days", "2", "-subj", "/CN=authority")
    sh("openssl", "req", *key, "-keyout", folder / "key.pem", "-out", folder / "request.pem", "-subj", "/CN=overfill")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    signed = ["-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial", "-days", "2", "-extfile", folder / "names"]
    sh("openssl", "x509", "-req", "-in", folder / "request.pem", "-out", folder / "cert.pem", *signed)
    (folder / "token").write_text(secrets.token_hex(32) + "\n")


class Cluster:
    """A router, a prefill node, a decode node."""

    def __init__(self, options, folder, port, secured):
        self.folder, self.secured, self.http = folder, secured, port
        file = lambda name: str(folder / name)
        peer = ["--peer-tls-cert", file("cert.pem"), "--peer-tls-key", file("key.pem"), "--peer-tls-ca", file("ca.pem")]
        peer += ["--cluster-token-file", file("token")]
        door = ["--tls-cert", file("cert.pem"), "--tls-key", file("key.pem")]
        prefill, decode = (f"127.0.0.1:{port + n}" for n in (1, 2))
        node = ["--pair", options.pair, "--kv-memory", "1G", "--threads", "1"]
        commands = [
            ["decode-node", *node, "--listen", decode, "--decode-nodes", decode],
            ["prefill-node", *node, "--listen", prefill, "--decode-nodes", decode],
            ["router", "--pair", options.pair, "--http", f"127.0.0.1:{port}", "--prefill-nodes", prefill, "--decode-nodes", decode],
        ]
        environment = {**os.environ, "OVERFILL_LOG": "off"}
        self.processes = []
        for command in commands:
            more = (peer + (door if command[0] == "router" else [])) if secured else []
            binary = str(pathlib.Path(options.bin) / command[0])
            self.processes.append(subprocess.Popen([binary, *command[1:], *more], env=environment))
        self.url = f"{'https' if secured else 'http'}://127.0.0.1:{port}"
        self.until_ready()

    def context(self):
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem")) if self.secured else None

    def until_ready(self):
        for _ in range(300):
            if any(process.poll() is not None for process in self.processes):
                break
            try:
                if urllib.request.urlopen(self.url + "/ready", context=self.context()).status == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{self.url} did not become ready")

    def bench(self, options, load):
        results = self.folder / "results"
        command = [str(pathlib.Path(options.bin) / "overfill"), "bench", "serve", "--base-url", self.url, *load, "--result-dir", str(results)]
        command += ["--dataset-name", "random", "--input-len", "64", "--output-len", "128", "--save-result", "--result-filename", "one.json"]
        environment = {**os.environ, "SSL_CERT_FILE": str(self.folder / "ca.pem")}
        (results / "one.json").unlink(missing_ok=True)
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return json.loads((results / "one.json").read_text())

    def connections(self, count=100):
        """Milliseconds of a request on a new connection."""
        context, began = self.context(), time.perf_counter()
        for _ in range(count):
            urllib.request.urlopen(self.url + "/live", context=context).read()
        return 1000 * (time.perf_counter() - began) / count

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--pair", default=str(pathlib.Path.home() / ".cache/overfill/pairs/smollm2-135m"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        certificates(folder)
        for round in range(options.rounds):
            for kind in ["plain", "tls"] if round % 2 == 0 else ["tls", "plain"]:
                cluster = Cluster(options, folder, BASE, kind == "tls")
                try:
                    cluster.bench(options, ["--num-prompts", "4", "--max-concurrency", "2"])
                    for name, load in LOADS.items():
                        result = cluster.bench(options, load)
                        assert result["failed"] == 0, result
                        for figure, said in FIGURES.items():
                            told.setdefault((name, said), {}).setdefault(kind, []).append(result[figure])
                    told.setdefault(("a new connection", "ms"), {}).setdefault(kind, []).append(cluster.connections())
                finally:
                    cluster.stop()
    print("| load | figure | plain text | TLS and token | ratio |\n|---|---|---|---|---|")
    for (name, figure), kinds in told.items():
        plain, tls = (statistics.median(kinds[kind]) for kind in ("plain", "tls"))
        print(f"| {name} | {figure} | {plain:.2f} | {tls:.2f} | {tls / plain:.3f} |")


main()
