"""deploy/play: builds, renders, plays, asks, rolls, kills, takes down."""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.chart import Networks

from . import podman
from .files import Files
from .kubelet import Kubelet
from .load import Door, Load
from .manifests import TOOLS, Rendered
from .network import Network
from .rollout import rollout
from .secrets import Secrets

DEPLOY = Path(__file__).resolve().parent.parent
RELEASE, NODES = "play", ("prefill", "decode", "router")
# Names in the chart: the routers' Service, and what the servers' certificates are for.
SERVICE, PEERS = "play-overfill", "nodes.overfill.internal"
# Labels of pods that are not ours, and may reach the doors or scrape.
CLIENT, SCRAPER = {"play": "client"}, {"play": "scraper"}
# Exit status where this machine runs no containers.
CANNOT = 77
BEGUN = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - BEGUN:5.0f} s] {text}", flush=True)


def can_play(work):
    """Builds the image of tools, and runs it on the network: whether that can be done here at all."""
    podman.run(DEPLOY / "image-root", work / "tools", "/bin/cp", "/bin/sleep")
    (work / "Dockerfile").write_text("FROM scratch\nCOPY / /\nENV PATH=/usr/local/bin\n")
    try:
        podman.run("buildah", "build", "--quiet", "--tag", TOOLS, "--file", work / "Dockerfile", work / "tools")
        podman.network()
        podman.run("podman", "run", "--rm", "--network", podman.NETWORK, TOOLS, "cp", "--version")
    except RuntimeError as error:
        say(f"no containers can be run here, so nothing is played: {error}")
        podman.run("podman", "network", "rm", podman.NETWORK, check=False)
        return False
    return True


def images(binaries, pair):
    """Builds ours, and the pair's upon that of tools."""
    podman.run(DEPLOY / "build-images", binaries, "play", timeout=600)
    podman.run(DEPLOY / "pair-images", pair, "overfill-play-pair:play", timeout=600, env={**os.environ, "BASE": TOOLS})


def values(secrets):
    """The chart's defaults, with images of this machine and as little memory as will do; TLS at the doors and between the servers, a token
    and keys. The user is one that no image knows."""
    node = {"kvMemory": "256M", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}}
    here = {"pullPolicy": "Never", "tag": "play"}
    return {
        **secrets.values(),
        "pairs": {"pair": {"images": {
            **{role: f"localhost/overfill-play-pair-{role}:play" for role in NODES}, "pullPolicy": "Never", "copy": True}}},
        "image": {"repository": "localhost/overfill", **here},
        "cliImage": {"repository": "localhost/overfill-cli", **here},
        "networkPolicy": {
            "clients": [{"podSelector": {"matchLabels": CLIENT}}],
            "scrapers": [{"podSelector": {"matchLabels": SCRAPER}}],
        },
        "podSecurityContext": {"runAsUser": 1000650000, "runAsGroup": 0},
        "prefill": node,
        "decode": node,
        "etcd": {"image": {"repository": "localhost/overfill-etcd", **here}},
    }


class Play:
    """A cluster that runs."""

    def __init__(self, rendered, door):
        self.rendered, self.door = rendered, door
        self.network = Network(rendered.objects)
        self.kubelet = Kubelet(self.network, say)
        self.names = {}

    def up(self):
        for component in ("etcd", *NODES):
            workload = self.rendered.workload(component)
            separator = "-" if workload["kind"] == "StatefulSet" else "-1-"
            self.names[component] = [f"{workload['metadata']['name']}{separator}{i}" for i in range(workload["spec"]["replicas"])]
            for name in self.names[component]:
                self.kubelet.start(workload, self.rendered.pod(workload, name))
        for component, names in self.names.items():
            for name in names:
                self.kubelet.wait_ready(name)
            say(f"{len(names)} {component}: ready")

    def routers(self):
        return [r.ip for r in self.kubelet.ready(self.rendered.workload("router"))]

    def samples(self, pod, name, **labels):
        """What a pod tells of a metric, with these labels among others."""
        port = 2381 if pod in self.names["etcd"] else 9100
        with urllib.request.urlopen(f"http://{self.kubelet.running[pod].ip}:{port}/metrics", timeout=10) as answer:
            lines = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", answer.read().decode(), re.M)
        return [float(value) for told, value in lines if all(f'{key}="{wanted}"' in told for key, wanted in labels.items())]

    def ask(self):
        """A question by hand, `helm test` as the chart has it, and a scrape of each pod."""
        say(f"asked by HTTP: {self.door.ask(self.routers()[0], 'What is the capital of France?', 24)!r}")
        try:
            self.door.with_key("sk-of-nobody").ask(self.routers()[0], "Who am I?", 4)
        except ValueError as refused:
            say(f"asked with another key: {str(refused)[:3]}")
        else:
            raise SystemExit("a key that is in no file was taken")
        workload = self.rendered.workload("test")
        test = self.rendered.pod(workload, workload["metadata"]["name"])
        podman.start(test.manifest, test.aliases)
        self.network.add(test.name, workload["metadata"]["labels"])
        try:
            for container in test.manifest["spec"]["containers"]:
                name = f"{test.name}-{container['name']}"
                code = podman.run("podman", "wait", name, timeout=180)
                said = podman.run("podman", "logs", name, check=False)
                answered = re.search(r"Successful requests: +(\d+)", said)
                if code != "0" or not answered or answered[1] != "2":
                    raise SystemExit(f"helm test: {container['name']} failed with {code}:\n{said}")
                say(f"helm test, {container['name']}: {answered[0]}")
        finally:
            self.network.remove(test.name)
            podman.remove([test.name])
        for component, expected in {
            "router": [*(("overfill_nodes", {"role": role}, 2) for role in ("prefill", "decode")), ("overfill_router_held", {}, None)],
            "prefill": [("overfill_step_seconds_sum", {}, None), ("vllm:num_requests_waiting", {}, None)],
            "decode": [("vllm:kv_cache_usage_perc", {}, None), ("vllm:num_requests_running", {}, None)],
            "etcd": [("etcd_server_has_leader", {}, 1)],
        }.items():
            for pod in self.names[component]:
                for name, labels, value in expected:
                    found = self.samples(pod, name, **labels)
                    if not found or (value is not None and found != [value]):
                        raise SystemExit(f"{pod} tells {found or 'nothing'} as {name} {labels}")
        say(f"scraped: {', '.join(f'{len(names)} {component}' for component, names in self.names.items())}")

    def reach(self):
        """Every pod, and three that are none of ours, tries every port of every other: as the chart's table says, and no more."""
        places = {component: self.names[component][0] for component in self.names}
        others = {"test": self.rendered.workload("test")["metadata"]["labels"], "apps": CLIENT, "monitoring": SCRAPER, "strangers": {}}
        try:
            for place, labels in others.items():
                places[place] = f"play-{place}"
                spec = {"restartPolicy": "Never", "containers": [{"name": "sleep", "image": TOOLS, "command": ["sleep", "infinity"]}]}
                metadata = {"name": places[place], "labels": labels}
                podman.start({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, [])
                self.network.add(places[place], labels)
            # The second of each, so that a member's own ports are reached over the network too.
            targets = {(self.names[component][1], port): (component, port) for component, ports in Networks.PORTS.items() for port in ports}
            for place, pod in places.items():
                reached = {targets[target] for target in self.network.reached(pod, list(targets))}
                expected = {(target, port) for source, target, port in Networks.TABLE if source == place}
                if reached != expected:
                    raise SystemExit(f"{place} reaches {reached - expected} beside the table, and does not reach {expected - reached}")
            say(f"{len(places)} kinds of pods tried {len(targets)} ports each: {len(Networks.TABLE)} ways are open, as in the table")
        finally:
            for place in others:
                self.network.remove(f"play-{place}")
            podman.remove([f"play-{place}" for place in others])

    def pull(self, values, pair):
        """A pod more of each role, into which an init container pulls its half, and that alone, from a server on this machine."""
        with Files(pair, self.network.machine) as files:
            rendered = self.rendered.with_values({**values, "pairs": {"pair": files.values()}})
            for component in NODES:
                workload = rendered.workload(component)
                pod = rendered.pod(workload, f"{workload['metadata']['name']}-pulled")
                begun = time.monotonic()
                self.kubelet.start(workload, pod)
                self.kubelet.wait_ready(pod.name)
                took, asked = time.monotonic() - begun, list(files.asked)
                files.asked.clear()
                if len(asked) != len(set(asked)) or set(asked) != files.half(component):
                    raise SystemExit(f"{pod.name} pulled {asked}, and not {files.half(component)}")
                say(f"{pod.name} pulled {', '.join(asked)}, and was ready {took:.1f} s after it was begun")
                self.kubelet.stop(pod.name)

    def figures(self, load, seconds=10):
        """What the chart scales by, of a pod on average, while the streams ask."""
        def mean(component, name, **labels):
            pods = self.names[component]
            return sum(sum(self.samples(pod, name, **labels)) for pod in pods) / len(pods)

        with load:
            time.sleep(3)
            begun, busy = time.monotonic(), mean("prefill", "overfill_step_seconds_sum")
            gauges = {
                "waiting": ("router", "overfill_waiting_for_nodes", {"role": "prefill"}),
                "unreadTokens": ("prefill", "overfill_unread_tokens", {}),
                "kvShare": ("decode", "overfill_kv_promised_share", {}),
                "sequences": ("decode", "vllm:num_requests_running", {}),
                "requests": ("router", "overfill_router_held", {"what": "requests"}),
            }
            told = {figure: [] for figure in gauges}
            while time.monotonic() < begun + seconds:
                for figure, (component, name, labels) in gauges.items():
                    told[figure].append(mean(component, name, **labels))
                time.sleep(0.5)
            busy = (mean("prefill", "overfill_step_seconds_sum") - busy) / (time.monotonic() - begun)
        means = ", ".join(f"{figure} {sum(values) / len(values):.2f}" for figure, values in told.items())
        say(f"under {load.streams} streams a pod has on average: busy {busy:.2f}, {means}; {load.told()}")

    def roll(self, load):
        """Each role is rolled under load. Nothing may fail."""
        for generation, component in enumerate(NODES, start=2):
            workload = self.rendered.workload(component)
            with load:
                time.sleep(3)
                self.names[component] = rollout(self.kubelet, self.rendered, workload, self.names[component], generation, say)
                time.sleep(3)
            say(f"{component} rolled under {load.streams} streams: {load.told()}")
            if load.counts["ok"] == 0 or any(load.counts[what] for what in ("failed", "wrong", "broken off")):
                raise SystemExit(f"answers were lost: {load.complaints}")

    def hurt(self, load, signal, components, seconds):
        """One of each is killed or frozen under load. No answer may be wrong; only those break off whose router went."""
        for component in components:
            name = self.names[component][0]
            with load:
                time.sleep(3)
                # The kubelet may have seen it before podman has said that it is done.
                begun, before = time.monotonic(), self.kubelet.running[name].restarts
                podman.run("podman", "kill", "--signal", signal, self.kubelet.running[name].pod.container)
                self.wait_restarted(name, before, seconds)
                took = time.monotonic() - begun
                time.sleep(3)
            say(f"{name} got SIG{signal} under {load.streams} streams: ready again after {took:.1f} s; {load.told()}")
            if load.counts["failed"] or load.counts["wrong"] or (component != "router" and load.counts["broken off"]):
                raise SystemExit(f"answers were lost: {load.complaints}")

    def wait_restarted(self, name, before, seconds):
        """Waits until a pod is ready that had been started again `before` times."""
        running = self.kubelet.running[name]
        until = time.monotonic() + seconds
        while running.restarts == before or not running.ready:
            if time.monotonic() > until:
                raise SystemExit(f"{name} was not ready again after {seconds} s: {running.failures}\n{self.kubelet.log(name)}")
            time.sleep(0.1)

    def idle(self):
        """When all is over no router holds anything."""
        for name in self.names["router"]:
            held = self.samples(name, "overfill_router_held")
            if not held or any(held):
                raise SystemExit(f"{name} still holds {held}")


def main():
    parser = argparse.ArgumentParser(prog="play")
    parser.add_argument("binaries", type=Path)
    parser.add_argument("what", nargs="*", metavar="WHAT", help="ask, pull, roll, kill, freeze (default: all but freeze)")
    args = parser.parse_args()
    what = args.what or ["ask", "pull", "roll", "kill"]
    if unknown := set(what) - {"ask", "pull", "roll", "kill", "freeze"}:
        parser.error(f"there is no {', '.join(sorted(unknown))} to play")
    with tempfile.TemporaryDirectory(prefix="overfill-play-") as work:
        podman.configure(work)
        if not can_play(Path(work)):
            raise SystemExit(CANNOT)
        pair = os.environ.get("PAIR") or subprocess.run([args.binaries / "overfill", "fetch"], check=True, capture_output=True, text=True,
                                                        timeout=600).stdout.strip()
        # A copy, of links, of which no older version is the maker.
        sealed = Path(work) / "pair"
        podman.run("cp", "--recursive", "--link", pair, sealed)
        podman.run(args.binaries / "overfill", "seal", sealed, timeout=600)
        images(args.binaries, sealed)
        say("images are built")
        secrets = Secrets(Path(work) / "secrets", SERVICE, PEERS)
        door = Door(SERVICE, secrets.authority, secrets.key, json.loads((sealed / "pair.json").read_text())["name"])
        play = Play(Rendered(os.environ["HELM"], DEPLOY / "helm" / "overfill", RELEASE, values(secrets), secrets), door)
        try:
            play.up()
            load = Load(play.routers, door)
            load.learn()
            if "ask" in what:
                play.ask()
                play.reach()
                play.figures(load)
            if "pull" in what:
                play.pull(values(secrets), sealed)
            if "roll" in what:
                play.roll(load)
            if "kill" in what:
                play.hurt(load, "KILL", ("decode", "prefill", "router"), 120)
            if "freeze" in what:
                play.hurt(load, "STOP", ("decode",), 240)
            play.idle()
            say("nothing is held any more")
        finally:
            play.kubelet.close()
            podman.run("podman", "network", "rm", "--force", podman.NETWORK, check=False)
        say("taken down")


main()
