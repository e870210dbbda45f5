"""What a kubelet does for pods: asks their probes, starts containers again, ends pods with their grace period."""

import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from . import podman


@dataclass
class Running:
    """A pod that runs, or is to."""

    pod: object
    workload: dict
    ip: str
    # The server's container as the chart has it, with its probes.
    server: dict
    ready: bool = False
    live: bool = False
    restarts: int = 0
    # Failures in a row, by probe.
    failures: dict = field(default_factory=dict)
    asked: dict = field(default_factory=dict)


class Kubelet:
    """Owns the pods; a thread of its own asks their probes until `close`."""

    # How often it looks which probe is due.
    TICK = 0.2

    def __init__(self, network, say):
        self.network, self.say = network, say
        self.running = {}
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def start(self, workload, pod):
        """Runs a pod; it is ready when its probe says so."""
        try:
            podman.start(pod.manifest, pod.aliases)
        except RuntimeError:
            podman.remove([pod.name], pod.volumes)
            raise
        template = workload["spec"].get("template", workload)
        ip = self.network.add(pod.name, template["metadata"]["labels"])
        with self.lock:
            self.running[pod.name] = Running(pod, workload, ip, template["spec"]["containers"][0])

    def ready(self, workload):
        """The pods of a workload that are ready: what its Service leads to."""
        with self.lock:
            return [r for r in self.running.values() if r.workload is workload and r.ready]

    def wait_ready(self, name, seconds=120):
        """Waits until a pod is ready."""
        until = time.monotonic() + seconds
        while not self.running[name].ready:
            if time.monotonic() > until:
                raise RuntimeError(f"{name} is not ready after {seconds} s: {self.log(name)}")
            time.sleep(self.TICK)

    def stop(self, name):
        """Ends a pod as its manifest asks: SIGTERM, its grace period, SIGKILL. Returns how long it took and what it exited with."""
        with self.lock:
            running = self.running.pop(name)
        grace = running.pod.manifest["spec"].get("terminationGracePeriodSeconds", 30)
        begun = time.monotonic()
        podman.run("podman", "stop", "--time", grace, running.pod.container, timeout=grace + 60)
        took, (_, code) = time.monotonic() - begun, podman.state(running.pod.container)
        self.network.remove(name)
        podman.remove([name], running.pod.volumes)
        return took, code

    def log(self, name):
        """The last lines that its server wrote."""
        return podman.logs(self.running[name].pod.container, 20)

    def close(self):
        """Ends all pods at once."""
        self.closed.set()
        self.thread.join(timeout=60)
        podman.remove(list(self.running), [volume for running in self.running.values() for volume in running.pod.volumes])

    def watch(self):
        while not self.closed.wait(self.TICK):
            with self.lock:
                now = list(self.running.values())
            for running in now:
                try:
                    self.look(running)
                except (RuntimeError, OSError) as error:
                    # It may just have been taken away.
                    if running.pod.name in self.running:
                        self.say(f"{running.pod.name}: {error}")

    def look(self, running):
        # An init container comes first, and podman has begun the server then.
        if self.due(running, "container", 1):
            alive, code = podman.state(running.pod.container)
            if not alive:
                running.ready = running.live = False
                self.restart(running, f"its server ended with {code}")
                return
        if not running.live:
            if self.passes(running, "startupProbe"):
                running.live = True
            elif running.failures.get("startupProbe", 0) >= running.server.get("startupProbe", {}).get("failureThreshold", 3):
                self.restart(running, "its startup probe failed")
            return
        self.passes(running, "readinessProbe")
        if running.failures.get("readinessProbe", 0) == 0:
            running.ready = True
        elif running.failures["readinessProbe"] >= running.server["readinessProbe"].get("failureThreshold", 3):
            running.ready = False
        self.passes(running, "livenessProbe")
        if running.failures.get("livenessProbe", 0) >= running.server.get("livenessProbe", {}).get("failureThreshold", 3):
            self.restart(running, "its liveness probe failed")

    def due(self, running, what, period):
        if time.monotonic() - running.asked.get(what, 0) < period:
            return False
        running.asked[what] = time.monotonic()
        return True

    def passes(self, running, kind):
        """Whether a probe has passed just now; False where it failed or was not due."""
        probe = running.server.get(kind)
        if probe is None:
            running.failures[kind] = 0
            return True
        if not self.due(running, kind, probe.get("periodSeconds", 10)):
            return False
        passed = "httpGet" not in probe or self.answers(running, probe)
        running.failures[kind] = 0 if passed else running.failures.get(kind, 0) + 1
        return passed

    @staticmethod
    def answers(running, probe):
        port = next(p["containerPort"] for p in running.server["ports"] if p["name"] == probe["httpGet"]["port"])
        try:
            url = f"http://{running.ip}:{port}{probe['httpGet']['path']}"
            with urllib.request.urlopen(url, timeout=probe.get("timeoutSeconds", 1)) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def restart(self, running, why):
        with self.lock:
            # It may have been looked at while it was being stopped.
            if self.running.get(running.pod.name) is not running:
                return
        self.say(f"{running.pod.name}: {why}; it is started again")
        running.ready = running.live = False
        running.failures.clear()
        running.restarts += 1
        podman.run("podman", "kill", "--signal", "KILL", running.pod.container, check=False)
        # podman may be cleaning up after the process that ended, and has been seen to hang then: it is tried again.
        podman.run("podman", "start", running.pod.container, timeout=15)
