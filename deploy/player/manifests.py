"""The chart's objects as pods that podman runs.

What podman does not know is left out or done in another way, and that is all of it:
  * StatefulSets and Deployments are played as pods, one by one (`rollout.py` replaces them as a Deployment's controller does);
  * of Services, only names: the routers' is an alias of each router, the members' of etcd are aliases of each member. Requests of the
    load go to those routers that are ready, as a Service's would;
  * probes are asked by `kubelet.py`, and a container that ended is started again there, not by podman;
  * each pod has one more container, which sleeps: podman takes a pod's network down with its last one, Kubernetes keeps it;
  * Secrets are folders of this machine (`secrets.py`);
  * claims of volumes become volumes of podman; what a pod writes to is named after it, since podman shares volumes of one name;
  * ports are not listed, which podman would open on the machine;
  * `$(VARIABLE)` is put in here, and `status.podIP` left to the server, which finds its own address;
  * NetworkPolicies are kept by `network.py`;
  * budgets, service accounts, placement and priorities have no meaning on one machine.
"""

import copy
import json
import re
import subprocess
from dataclasses import dataclass, field

import yaml

PLAYED = ("Deployment", "StatefulSet", "Pod")
# An image with cp and sleep.
TOOLS = "localhost/overfill-play-tools:play"
# What podman has no field for.
LEFT_OUT = ("serviceAccountName", "automountServiceAccountToken", "enableServiceLinks", "topologySpreadConstraints")


@dataclass
class Pod:
    """A pod to run."""

    name: str
    manifest: dict
    aliases: list
    volumes: list = field(default_factory=list)

    @property
    def container(self):
        """podman's name of the server's container."""
        return f"{self.name}-{self.manifest['spec']['containers'][0]['name']}"


class Rendered:
    """What the chart makes of values."""

    def __init__(self, helm, chart, release, values, secrets):
        self.helm, self.chart, self.release, self.secrets = helm, chart, release, secrets
        command = [helm, "template", release, str(chart), "--namespace", "play", "--values", "-"]
        text = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60)
        if text.returncode:
            raise SystemExit(f"play: the chart cannot be rendered: {text.stderr}")
        self.objects = [o for o in yaml.safe_load_all(text.stdout) if o]

    def with_values(self, values):
        """What the same chart makes of other values."""
        return Rendered(self.helm, self.chart, self.release, values, self.secrets)

    def workload(self, component):
        """The one object that makes pods of this component."""
        return next(o for o in self.objects
                    if o["kind"] in PLAYED and o["metadata"]["labels"]["app.kubernetes.io/component"] == component)

    def pod(self, workload, name):
        """A pod of a workload."""
        template = workload if workload["kind"] == "Pod" else workload["spec"]["template"]
        spec = copy.deepcopy(template["spec"])
        for key in LEFT_OUT:
            spec.pop(key, None)
        # podman would also start init containers again and again.
        spec["restartPolicy"] = "Never"
        claims = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
        spec.setdefault("volumes", []).extend({"name": claim, "emptyDir": {}} for claim in claims)
        own = {v["name"]: f"{name}-{v['name']}" for v in spec["volumes"] if "emptyDir" in v}
        for volume in spec["volumes"]:
            if secret := volume.pop("secret", None):
                volume["hostPath"] = {"path": str(self.secrets.folder / secret["secretName"]), "type": "Directory"}
            volume["name"] = own.get(volume["name"], volume["name"])
        for container in spec.get("initContainers", []) + spec["containers"]:
            for key in ("startupProbe", "livenessProbe", "readinessProbe", "ports"):
                container.pop(key, None)
            for mount in container.get("volumeMounts", []):
                mount["name"] = own.get(mount["name"], mount["name"])
            put_in(container, name, self.secrets)
        if workload["kind"] != "Pod":
            spec["containers"].append({"name": "sleep", "image": TOOLS, "imagePullPolicy": "Never", "command": ["sleep", "infinity"]})
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": template["metadata"]["labels"]}, "spec": spec}
        return Pod(name, manifest, list(self.aliases(workload, name)), list(own.values()))

    def aliases(self, workload, name):
        """The names of Services that lead to the pod."""
        labels = workload["spec"].get("template", workload)["metadata"]["labels"]
        for service in (o for o in self.objects if o["kind"] == "Service"):
            if service["spec"]["selector"].items() <= labels.items():
                headless = service["spec"].get("clusterIP") == "None"
                yield f"{name}.{service['metadata']['name']}" if headless else service["metadata"]["name"]


def put_in(container, pod, secrets):
    """Puts in what a kubelet puts in for Secrets' values and for `$(VARIABLE)`."""
    known = {}
    kept = []
    for variable in container.get("env", []):
        if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
            variable = {"name": variable["name"], "value": secrets.content(secret["name"], secret["key"])}
        path = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        if path == "status.podIP":
            known[variable["name"]] = None
            continue
        if path == "metadata.name":
            known[variable["name"]] = pod
        if names := re.findall(r"\$\((\w+)\)", variable.get("value", "")):
            if any(known[name] is None for name in names):
                continue
            variable["value"] = expanded(variable["value"], known)
        kept.append(variable)
    container["env"] = kept
    container["args"] = [expanded(argument, known) for argument in container.get("args", [])]


def expanded(text, known):
    return re.sub(r"\$\((\w+)\)", lambda m: known[m[1]] or m[0], text)
