"""What the Helm chart renders, checked without a cluster. HELM names the program; deploy/validate runs it."""

import copy
import functools
import json
import os
import re
import subprocess
import unittest
from pathlib import Path

import jsonschema
import yaml

DEPLOY = Path(__file__).resolve().parent.parent
CHART = DEPLOY / "helm" / "overfill"
VALUES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
RELEASE, NAMESPACE = "here", "there"
NODES = ("router", "prefill", "decode")


def helm(values, *settings):
    command = [os.environ.get("HELM", "helm"), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    if values:
        command += ["--values", str(CHART / "ci" / f"{values}.yaml")]
    command += [word for setting in settings for word in ("--set-json", setting)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@functools.cache
def rendered(values, *settings):
    """The objects that the chart makes of a file of `ci`, and of settings beside it."""
    done = helm(values, *settings)
    if done.returncode:
        raise AssertionError(done.stderr)
    return [o for o in yaml.safe_load_all(done.stdout) if o]


def of_kind(objects, *kinds):
    return [o for o in objects if o["kind"] in kinds]


def pods(objects):
    """Name, labels and spec of each kind of pod."""
    for o in objects:
        pod = o if o["kind"] == "Pod" else o.get("spec", {}).get("template")
        if pod:
            yield o["metadata"]["name"], pod["metadata"]["labels"], pod["spec"]


def component(labels):
    return labels["app.kubernetes.io/component"]


def workloads(objects, name=None):
    found = of_kind(objects, "Deployment")
    return found if name is None else next(o for o in found if component(o["metadata"]["labels"]) == name)


def container(workload):
    return workload["spec"]["template"]["spec"]["containers"][0]


def environment(workload):
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(workload)["env"]}


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


class Who:
    """Who reaches whom by the NetworkPolicies: a pod of this namespace by its labels, or another place by its namespace's."""

    def __init__(self, objects):
        self.policies = [p["spec"] for p in of_kind(objects, "NetworkPolicy")]
        self.pods = {component(labels): labels for _, labels, _ in pods(objects)}

    def reaches(self, source, target, port):
        """`source`: a component or the labels of a foreign namespace. Both sides have to allow it."""
        ours = isinstance(source, str)
        entering = self.allowed("ingress", "from", self.pods[target], self.pods[source] if ours else source, ours, port)
        leaving = not ours or self.allowed("egress", "to", self.pods[source], self.pods[target], True, port)
        return entering and leaving

    def allowed(self, side, key, pod, peer, ours, port):
        mine = [p for p in self.policies if selects(p["podSelector"], pod)]
        assert len(mine) == 1, (pod, len(mine))
        rules = [r for r in mine[0][side] if any(p["port"] == port and p["protocol"] == "TCP" for p in r["ports"])]
        return any(key not in rule or any(self.is_peer(p, peer, ours) for p in rule[key]) for rule in rules)

    @staticmethod
    def is_peer(rule, peer, ours):
        return selects(rule["podSelector"], peer) if ours and "podSelector" in rule else (
            not ours and "namespaceSelector" in rule and selects(rule["namespaceSelector"], peer))


class Networks(unittest.TestCase):
    APPS = {"kubernetes.io/metadata.name": "apps"}
    SCRAPERS = {"kubernetes.io/metadata.name": "monitoring"}
    STRANGERS = {"kubernetes.io/metadata.name": "strangers"}
    PORTS = {"router": [8000, 8001, 9100], "prefill": [7001, 9100], "decode": [7002, 9100], "etcd": [2379, 2380, 2381]}
    TABLE = {
        **{(who, "router", door): True for who in ("test", "apps") for door in (8000, 8001)},
        **{("monitoring", node, 9100): True for node in NODES},
        ("monitoring", "etcd", 2381): True,
        ("router", "prefill", 7001): True,
        ("router", "decode", 7002): True,
        ("prefill", "decode", 7002): True,
        **{(node, "etcd", 2379): True for node in NODES},
        ("etcd", "etcd", 2380): True,
    }

    def test_nobody_reaches_more_than_the_table_says(self):
        who = Who(rendered("secure"))
        sources = {"test": "test", "router": "router", "prefill": "prefill", "decode": "decode", "etcd": "etcd"}
        sources |= {"apps": self.APPS, "monitoring": self.SCRAPERS, "strangers": self.STRANGERS}
        for name, source in sources.items():
            for target, ports in self.PORTS.items():
                for port in ports:
                    with self.subTest(f"{name} → {target}:{port}"):
                        self.assertEqual(who.reaches(source, target, port), self.TABLE.get((name, target, port), False))

    def test_without_named_clients_anyone_reaches_the_doors_and_nothing_else_of_the_nodes(self):
        who = Who(rendered("minimal"))
        self.assertTrue(who.reaches(self.STRANGERS, "router", 8000) and who.reaches(self.STRANGERS, "router", 8001))
        self.assertFalse(who.reaches(self.STRANGERS, "prefill", 7001) or who.reaches(self.STRANGERS, "decode", 7002))
        self.assertFalse(who.reaches(self.STRANGERS, "etcd", 2379) or who.reaches(self.STRANGERS, "etcd", 2380))

    def test_names_are_resolved_by_all(self):
        for policy in of_kind(rendered("secure"), "NetworkPolicy"):
            dns = policy["spec"]["egress"][0]
            self.assertEqual({(p["protocol"], p["port"]) for p in dns["ports"]}, {("UDP", 53), ("TCP", 53)})
            self.assertEqual(dns["to"], [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}])

    def test_an_etcd_of_ones_own_and_a_collector_are_reached(self):
        objects = rendered("own-etcd")
        self.assertNotIn("etcd", {component(labels) for _, labels, _ in pods(objects)})
        for policy in of_kind(objects, "NetworkPolicy"):
            to = {p["port"]: rule.get("to") for rule in policy["spec"]["egress"] for p in rule["ports"]}
            server = component(policy["metadata"]["labels"]) in NODES
            self.assertEqual(to.get(2379), [{"ipBlock": {"cidr": "10.0.0.0/24"}}] if server else None)
            self.assertEqual(4317 in to, server)

    def test_containers_have_the_ports_of_the_table(self):
        for name, labels, pod in pods(rendered("minimal")):
            ports = [p["containerPort"] for p in pod["containers"][0].get("ports", [])]
            self.assertEqual(ports, self.PORTS.get(component(labels), []), name)


class Pods(unittest.TestCase):
    def each(self):
        for values in VALUES:
            for name, labels, pod in pods(rendered(values)):
                with self.subTest(f"{values}: {name}"):
                    yield labels, pod

    def test_pods_keep_to_the_restricted_profile_and_name_no_user(self):
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret", "image"}
        for _, pod in self.each():
            self.assertTrue(pod["securityContext"]["runAsNonRoot"])
            self.assertEqual(pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
            for one in pod.get("initContainers", []) + pod["containers"]:
                context = one["securityContext"]
                self.assertEqual(context["capabilities"], {"drop": ["ALL"]})
                self.assertIs(context["allowPrivilegeEscalation"], False)
                self.assertIs(context["readOnlyRootFilesystem"], True)
                self.assertNotIn("runAsUser", context | pod["securityContext"])
                self.assertIn("memory", one["resources"]["limits"])
            for volume in pod.get("volumes", []):
                kind = next(key for key in volume if key != "name")
                # Whoever has weights on a machine's disk or a file server says so, and leaves the profile for it.
                self.assertIn(kind, allowed | {"hostPath", "nfs"})
                self.assertTrue(kind not in ("hostPath", "nfs") or volume["name"].startswith("pair-"))

    def test_no_pod_has_a_token_but_those_that_ask_the_api_server(self):
        for values in VALUES:
            for _, labels, pod in pods(rendered(values)):
                asks = values == "kubernetes" and component(labels) in ("router", "prefill")
                self.assertIs(pod["automountServiceAccountToken"], asks)
        for _, pod in self.each():
            # Nor variables of Services, which may begin as ours do.
            self.assertIs(pod["enableServiceLinks"], False)
        for values in VALUES:
            for account in of_kind(rendered(values), "ServiceAccount"):
                self.assertIs(account["automountServiceAccountToken"], False)

    def test_what_is_mounted_is_there_and_what_is_named_is_mounted(self):
        for _, pod in self.each():
            volumes = {v["name"] for v in pod.get("volumes", [])}
            for one in pod.get("initContainers", []) + pod["containers"]:
                mounts = {m["name"]: m["mountPath"] for m in one.get("volumeMounts", [])}
                self.assertLessEqual(set(mounts) - {"data"}, volumes)
                for variable in one.get("env", []):
                    for path in str(variable.get("value", "")).split(","):
                        if path.startswith(("/pairs/", "/secrets/", "/tls/")):
                            self.assertTrue(any(path.startswith(mount) for mount in mounts.values()), path)

    def test_generations_spread_apart(self):
        for labels, pod in self.each():
            if component(labels) == "test":
                continue
            for spread in pod["topologySpreadConstraints"]:
                self.assertTrue(selects(spread["labelSelector"], labels))
                self.assertEqual(spread.get("matchLabelKeys"), ["pod-template-hash"] if component(labels) in NODES else None)


class Workloads(unittest.TestCase):
    def test_the_grace_period_is_longer_than_the_drain(self):
        for values in VALUES:
            for workload in workloads(rendered(values)):
                told = environment(workload)
                drain = told.get("OVERFILL_ROUTER_DRAIN_TIMEOUT") or told["OVERFILL_DRAIN_TIMEOUT"]
                longest = int(drain) + int(told["OVERFILL_DRAIN_DELAY"])
                self.assertEqual(workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], longest + 10, values)
        long = rendered("copied")
        self.assertEqual(environment(workloads(long, "decode"))["OVERFILL_DRAIN_TIMEOUT"], "300")
        self.assertEqual(workloads(long, "router")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], 340)
        self.assertEqual(workloads(long, "decode")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"], 315)

    def test_prefill_nodes_make_way_and_decode_nodes_come_first(self):
        objects = rendered("minimal")
        update = {role: workloads(objects, role)["spec"]["strategy"]["rollingUpdate"] for role in NODES}
        self.assertEqual(update["prefill"], {"maxSurge": 0, "maxUnavailable": 1})
        self.assertEqual(update["decode"], {"maxSurge": 1, "maxUnavailable": 0})
        self.assertEqual(update["router"], {"maxSurge": 1, "maxUnavailable": 0})

    def test_budgets_stand_only_where_there_is_more_than_one(self):
        for values in VALUES:
            objects = rendered(values)
            budgets = {b["metadata"]["name"]: b["spec"] for b in of_kind(objects, "PodDisruptionBudget")}
            scaled = {o["metadata"]["name"]: o["spec"].get("minReplicas", o["spec"].get("minReplicaCount"))
                      for o in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")}
            several = set()
            for o in of_kind(objects, "Deployment", "StatefulSet"):
                name = o["metadata"]["name"]
                self.assertEqual("replicas" in o["spec"], name not in scaled, "replicas are either given or scaled")
                if scaled.get(name, o["spec"].get("replicas")) > 1:
                    several.add(name)
                    self.assertEqual(budgets[name]["selector"], o["spec"]["selector"])
                    self.assertEqual(len({"minAvailable", "maxUnavailable"} & set(budgets[name])), 1)
            self.assertEqual(set(budgets), several, values)

    def test_each_selector_finds_its_own_pods_alone(self):
        for values in VALUES:
            objects = rendered(values)
            every = list(pods(objects))
            for o in of_kind(objects, "Deployment", "StatefulSet"):
                found = [name for name, labels, _ in every if selects(o["spec"]["selector"], labels)]
                self.assertEqual(found, [o["metadata"]["name"]], values)
            service = next(s for s in of_kind(objects, "Service") if s["metadata"]["name"] == f"{RELEASE}-overfill")
            found = {component(labels) for _, labels, _ in every if selects({"matchLabels": service["spec"]["selector"]}, labels)}
            self.assertEqual(found, {"router"})

    def test_probes_ask_the_plain_listener_whatever_the_doors_speak(self):
        for values in VALUES:
            for workload in workloads(rendered(values)):
                one = container(workload)
                for probe, path in {"startupProbe": "/live", "livenessProbe": "/live", "readinessProbe": "/ready"}.items():
                    self.assertEqual(one[probe]["httpGet"], {"path": path, "port": "admin"})

    def test_every_variable_is_one_that_the_binaries_take(self):
        known = {"POD_IP", "OTEL_EXPORTER_OTLP_ENDPOINT"}
        for source in (p for folder in ("crates", "router", "prefill-node", "decode-node") for p in (DEPLOY.parent / folder).rglob("*.rs")):
            known |= set(re.findall(r'env = "([A-Z_]+)"', source.read_text()))
        for values in VALUES:
            for workload in workloads(rendered(values)):
                self.assertLessEqual(set(environment(workload)), known, values)

    def test_nodes_have_a_thread_for_each_core_that_they_ask_for(self):
        source = environment(workloads(rendered("minimal"), "decode"))["OVERFILL_THREADS"]
        self.assertEqual(source, {"resourceFieldRef": {"containerName": "decode", "resource": "requests.cpu"}})
        refused = helm("minimal", 'decode.resources={"requests":{"cpu":null}}')
        self.assertIn("say how many in resources.requests.cpu", refused.stderr)


class Weights(unittest.TestCase):
    def test_several_decode_models_share_a_pool_of_prefill_nodes(self):
        told = {o["metadata"]["name"]: environment(o)["OVERFILL_PAIR"] for o in workloads(rendered("pools"))}
        base = f"{RELEASE}-overfill"
        self.assertEqual(told, {
            f"{base}-router": "/pairs/other/pair,/pairs/smollm2-135m/pair,/pairs/smollm2-135m-small/pair",
            f"{base}-prefill-shared": "/pairs/smollm2-135m/pair,/pairs/smollm2-135m-small/pair",
            f"{base}-prefill-other": "/pairs/other/pair",
            f"{base}-decode-trained": "/pairs/smollm2-135m/pair",
            f"{base}-decode-small": "/pairs/smollm2-135m-small/pair",
            f"{base}-decode-other": "/pairs/other/pair",
        })
        other = next(o for o in workloads(rendered("pools")) if o["metadata"]["name"].endswith("prefill-other"))
        self.assertEqual(environment(other)["OVERFILL_KV_MEMORY"], "8G")
        self.assertEqual(container(other)["resources"], {"requests": {"cpu": "16", "memory": "4Gi"}, "limits": {"memory": "32Gi"}})
        self.assertEqual(other["spec"]["strategy"]["rollingUpdate"], {"maxSurge": 0, "maxUnavailable": 1}, "as all of its role")

    def test_each_role_gets_its_own_half(self):
        for workload in workloads(rendered("pools")):
            role = component(workload["metadata"]["labels"])
            for volume in workload["spec"]["template"]["spec"]["volumes"]:
                self.assertIn(f"-{role}@sha256:", volume["image"]["reference"])

    def test_a_gpu_is_asked_for_where_it_is_computed_on(self):
        objects = rendered("gpu")
        prefill, decode = workloads(objects, "prefill"), workloads(objects, "decode")
        self.assertEqual([environment(w)["OVERFILL_DEVICE"] for w in (prefill, decode)], ["cuda:0", "cpu"])
        images = [container(w)["image"].split(":")[0] for w in (prefill, decode, workloads(objects, "router"))]
        self.assertEqual(images, ["registry.example/overfill-cuda", "overfill", "overfill"])
        self.assertEqual(container(prefill)["imagePullPolicy"], "IfNotPresent")
        self.assertEqual(container(prefill)["resources"]["limits"]["nvidia.com/gpu"], 1)
        self.assertEqual(prefill["spec"]["template"]["spec"]["runtimeClassName"], "nvidia")
        without = helm("gpu", 'prefill.resources={"requests":{"cpu":"2"},"limits":{"memory":"8Gi","nvidia.com/gpu":null}}')
        self.assertIn("its pods ask for no GPU", without.stderr)
        claimed = helm("gpu", 'prefill.resources.limits={"nvidia.com/gpu":null}', 'prefill.resources.claims=[{"name":"gpu"}]')
        self.assertEqual(claimed.returncode, 0, claimed.stderr)
        self.assertIn("repository", helm("gpu", 'decode.image={"tag":"1"}').stderr)

    def test_nccl_is_between_gpus_and_has_every_port(self):
        gpus = ['decode.device="cuda:0"', 'decode.resources.limits={"memory":"8Gi","nvidia.com/gpu":1}', "networkPolicy.enabled=true"]
        both = ["prefill.nccl=true", "decode.nccl=true"]
        told = helm("gpu", *gpus, *both)
        self.assertEqual(told.returncode, 0, told.stderr)
        objects = [o for o in yaml.safe_load_all(told.stdout) if o]
        for role in ("prefill", "decode"):
            self.assertEqual(environment(workloads(objects, role))["OVERFILL_NCCL"], "on")
        policies = {component(o["metadata"]["labels"]): o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
        for role, peer in (("prefill", "decode"), ("decode", "prefill")):
            for rules, side in ((policies[role]["ingress"], "from"), (policies[role]["egress"], "to")):
                anywhere = [rule for rule in rules if "ports" not in rule]
                self.assertEqual([component(p["podSelector"]["matchLabels"]) for rule in anywhere for p in rule[side]], [peer])
        for alone in (both[:1], both[1:]):
            self.assertNotIn("NCCL chooses its ports", helm("gpu", *gpus, *alone).stdout)
        self.assertIn("decode.device is cpu", helm("gpu", *both).stderr)
        self.assertIn("plain text", helm("gpu", *gpus, *both, 'clusterToken.secretName="token"').stderr)

    def test_where_images_cannot_be_mounted_they_are_copied(self):
        for workload in workloads(rendered("copied")):
            role, pod = component(workload["metadata"]["labels"]), workload["spec"]["template"]["spec"]
            self.assertEqual([i["image"] for i in pod["initContainers"]], [f"smollm2-135m-{role}:1"])
            self.assertEqual(pod["volumes"], [{"name": "pair-smollm2-135m", "emptyDir": {}}])
            self.assertEqual(environment(workload)["OVERFILL_PAIR"], "/pairs/smollm2-135m")

    def test_each_role_pulls_its_half_by_digest(self):
        pair, small = "smollm2-135m", "smollm2-135m-small"
        values = yaml.safe_load((CHART / "ci" / "pulled.yaml").read_text())["pairs"]
        objects = rendered("pulled")
        for workload in workloads(objects):
            role, pod = component(workload["metadata"]["labels"]), workload["spec"]["template"]["spec"]
            served = environment(workload)["OVERFILL_PAIR"].split(",")
            inits = {i["name"]: i for i in pod["initContainers"]}
            self.assertEqual(len(inits), len(served))
            for name, init in inits.items():
                name = name.removeprefix("pull-")
                sha256 = values[name]["pull"]["sha256"]
                self.assertEqual((init["image"], init["command"]), ("overfill-cli:0.1.0", ["overfill", "pull"]))
                self.assertLessEqual({f"--half={role}", f"--sha256={sha256}", f"--to=/pairs/{name}/{sha256}"}, set(init["args"]))
                self.assertIn(f"/pairs/{name}/{sha256}", served)
                # It writes where the server only reads.
                mounts = [next(m for m in one["volumeMounts"] if m["name"] == f"pair-{name}") for one in (init, pod["containers"][0])]
                self.assertEqual([m["mountPath"] for m in mounts], [f"/pairs/{name}"] * 2)
                self.assertEqual([m.get("readOnly") for m in mounts], [None, True])
            volumes = {v["name"]: v for v in pod["volumes"]}
            if small_init := inits.get(f"pull-{small}"):
                self.assertEqual(small_init["args"][0], f"oci://registry.example.org/{small}-{role}:1")
                self.assertIn(f"--auth-file=/secrets/pull-{small}-credentials/.dockerconfigjson", small_init["args"])
                self.assertEqual(volumes[f"pair-{small}"]["emptyDir"], {})
            if init := inits.get(f"pull-{pair}"):
                self.assertEqual(init["args"][0], f"https://files.example.org:8443/pairs/{pair}/")
                self.assertIn(f"--token-file=/secrets/pull-{pair}-credentials/token", init["args"])
                self.assertIn(f"--ca-file=/secrets/pull-{pair}-ca/ca.crt", init["args"])
                self.assertEqual(init["env"], [{"name": "HTTPS_PROXY", "value": "http://proxy.example.org:3128"}])
                self.assertIn("hostPath", volumes[f"pair-{pair}"])
                # What opens a source is no server's affair.
                mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
                self.assertFalse({f"pull-{pair}-credentials", f"pull-{pair}-ca"} & mounted)
        for policy in of_kind(objects, "NetworkPolicy"):
            ways = [(sorted(p["port"] for p in rule["ports"]), rule.get("to")) for rule in policy["spec"]["egress"]]
            sources = ([443, 3128, 8443], [{"ipBlock": {"cidr": "10.1.0.0/16"}}])
            self.assertEqual(sources in ways, component(policy["metadata"]["labels"]) in NODES)

    def test_ports_follow_from_the_source(self):
        sha256 = "0" * 64
        for source, plain, port in [
            ("https://a/b/", False, 443), ("http://a/b", False, 80), ("http://a:81", False, 81), ("oci://a/b:1", False, 443),
            ("oci://a/b:1", True, 80), ("oci://a:5000/b/c@sha256:" + sha256, True, 5000),
        ]:
            pull = {"source": source, "sha256": sha256, "plainHttp": plain}
            objects = rendered(None, "pairs=" + json.dumps({"p": {"pull": pull}}))
            policy = next(p for p in of_kind(objects, "NetworkPolicy") if component(p["metadata"]["labels"]) == "decode")
            self.assertEqual([rule["ports"] for rule in policy["spec"]["egress"] if "to" not in rule][1:], [[{"protocol": "TCP", "port": port}]])

    def test_what_cannot_be_is_refused_with_a_sentence(self):
        pull = {"source": "https://a/b/", "sha256": "0" * 64}
        for settings, sentence in [
            (('pairs={}',), "name at least one pair"),
            (('pairs={"a":{}}',), "pairs.a says neither `volume` nor `images` nor `pull`"),
            (("pairs=" + json.dumps({"a": {"pull": pull, "path": "x"}}),), "what is pulled has its own"),
            (("pairs=" + json.dumps({"a": {"pull": pull, "volume": {"emptyDir": {}}}}),), "pairs.a has volume and pull: give one of them"),
            (("pairs=" + json.dumps({"a": {"pull": {**pull, "source": {"router": "oci://a/b:1"}}}}),), "pull.source has none for"),
            (("pairs=" + json.dumps({"a": {"pull": {**pull, "source": "https://me:secret@a/"}}}),), "/pairs/a/pull/source"),
            (("pairs=" + json.dumps({"a": {"pull": {"source": "https://a/b/"}}}),), "missing property 'sha256'"),
            (('pairs={"a":{"volume":{"emptyDir":{}},"images":{"router":"r"}}}',), "pairs.a has volume and images: give one of them"),
            (('pairs={"a":{"images":{"router":"r"}}}',), "pairs.a.images has no image for prefill"),
            (('pairs={"a":{"volume":{"emptyDir":{}}}}', 'decode.pools={"x":{"pair":"b"}}'), "names the pair b, which is not in `pairs`"),
            (('pairs={"a":{"volume":{"emptyDir":{}}}}', 'etcd.enabled=false'), "say in etcd.endpoints where yours is"),
            (('pairs={"a":{"volume":{"emptyDir":{}}}}', 'tls.peers.enabled=true'), "give tls.peers.secretName, or an issuer"),
            (('pairs={"a":{"volume":{"emptyDir":{}}}}', 'router.autoscaling={"enabled":true,"targets":{"requests":null}}'), "all are null"),
        ]:
            with self.subTest(sentence):
                refused = helm(None, *settings)
                self.assertNotEqual(refused.returncode, 0)
                self.assertIn(sentence, refused.stderr)


class Secrets(unittest.TestCase):
    def test_certificates_come_to_where_the_servers_look(self):
        objects = rendered("secure")
        made = {c["spec"]["secretName"]: c["spec"] for c in of_kind(objects, "Certificate")}
        doors, peers = f"{RELEASE}-overfill-doors-tls", f"{RELEASE}-overfill-peers-tls"
        self.assertIn(f"{RELEASE}-overfill.{NAMESPACE}.svc", made[doors]["dnsNames"])
        self.assertEqual(made[peers]["usages"], ["digital signature", "server auth", "client auth"])
        for workload in workloads(objects):
            role, told = component(workload["metadata"]["labels"]), environment(workload)
            secrets = {v["name"]: v["secret"]["secretName"] for v in workload["spec"]["template"]["spec"]["volumes"] if "secret" in v}
            self.assertEqual([told["OVERFILL_PEER_TLS_NAME"]], made[peers]["dnsNames"])
            self.assertEqual(told["OVERFILL_PEER_TLS_CA"], "/secrets/tls-peers/ca.crt")
            self.assertEqual(secrets["tls-peers"], peers)
            self.assertEqual(secrets["cluster-token"], "overfill-token")
            # The doors' key and the clients' keys are the routers' affair.
            self.assertEqual(secrets.get("tls-doors"), doors if role == "router" else None)
            self.assertEqual(secrets.get("keys"), "overfill-keys" if role == "router" else None)

    def test_etcds_secrets(self):
        told = environment(workloads(rendered("own-etcd"), "decode"))
        self.assertEqual(told["OVERFILL_ETCD"], "https://etcd-0.example.org:2379,https://etcd-1.example.org:2379")
        self.assertEqual((told["OVERFILL_ETCD_USER"], told["OVERFILL_ETCD_PASSWORD_FILE"]), ("overfill", "/secrets/etcd-password/password"))
        self.assertEqual(told["OVERFILL_ETCD_CERT"], "/secrets/tls-etcd/tls.crt")

    def test_the_question_of_helm_test_goes_the_clients_way(self):
        test = of_kind(rendered("secure"), "Pod")[0]
        self.assertEqual(test["metadata"]["annotations"]["helm.sh/hook"], "test")
        for one in test["spec"]["containers"]:
            told = {e["name"]: e for e in one["env"]}
            self.assertEqual(told["OPENAI_API_KEY"]["valueFrom"]["secretKeyRef"]["name"], "overfill-test-key")
            self.assertEqual(told["SSL_CERT_FILE"]["value"], "/tls/ca.crt")
            self.assertTrue(any(a.startswith(f"--base-url=https://{RELEASE}-overfill:") for a in one["args"]))


class Discovery(unittest.TestCase):
    def test_nodes_are_found_by_the_kubernetes_api(self):
        objects = rendered("kubernetes")
        self.assertNotIn("etcd", {component(labels) for _, labels, _ in pods(objects)})
        role = of_kind(objects, "Role")[0]
        self.assertEqual(role["rules"], [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}])
        binding = of_kind(objects, "RoleBinding")[0]
        self.assertEqual((binding["roleRef"]["name"], binding["subjects"][0]["namespace"]), (role["metadata"]["name"], NAMESPACE))
        accounts = {pod["serviceAccountName"] for _, _, pod in pods(objects)}
        self.assertEqual(accounts, {binding["subjects"][0]["name"]})
        found = {s["metadata"]["labels"].get("overfill/role"): s for s in of_kind(objects, "Service")}
        for workload in workloads(objects):
            told, labels = environment(workload), workload["spec"]["template"]["metadata"]["labels"]
            self.assertEqual((told["OVERFILL_DISCOVER"], told["OVERFILL_CLUSTER"]), (f"kubernetes://{NAMESPACE}", RELEASE))
            self.assertNotIn("OVERFILL_ETCD", told)
            if component(labels) == "router":
                continue
            service = found[component(labels)]
            self.assertEqual((service["spec"]["clusterIP"], service["metadata"]["labels"]["overfill/cluster"]), ("None", RELEASE))
            self.assertTrue(selects({"matchLabels": service["spec"]["selector"]}, labels), "all pools are found")
            ports = {p["name"]: p["containerPort"] for p in container(workload)["ports"]}
            self.assertEqual([(p["name"], p["port"]) for p in service["spec"]["ports"]], [("grpc", ports["grpc"])])

    def test_only_those_that_ask_reach_the_api_server(self):
        for policy in of_kind(rendered("kubernetes"), "NetworkPolicy"):
            of = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            rules = [r for r in policy["spec"]["egress"] if {"protocol": "TCP", "port": 6443} in r["ports"]]
            self.assertEqual([r["to"] for r in rules], [[{"ipBlock": {"cidr": "10.0.0.1/32"}}]] if of in ("router", "prefill") else [])
        for values in VALUES:
            if values != "kubernetes":
                self.assertEqual(of_kind(rendered(values), "Role", "RoleBinding"), [])

    def test_traffic_is_a_file_that_changes_while_routers_run(self):
        objects = rendered("kubernetes")
        weights = of_kind(objects, "ConfigMap")[0]
        self.assertEqual(json.loads(weights["data"]["traffic.json"]), {"chat": {"chat-1": 90, "chat-2": 10}})
        router = workloads(objects, "router")
        self.assertEqual(environment(router)["OVERFILL_TRAFFIC"], "/traffic/traffic.json")
        # Versions are named by their folders.
        self.assertEqual(environment(router)["OVERFILL_PAIR"], "/pairs/chat-1,/pairs/chat-2")
        mounts = {m["name"]: m for m in container(router)["volumeMounts"]}
        self.assertNotIn("subPath", mounts["traffic"])
        volumes = {v["name"]: v for v in router["spec"]["template"]["spec"]["volumes"]}
        self.assertEqual(volumes["traffic"]["configMap"]["name"], weights["metadata"]["name"])
        for prefix in ("prefill", "decode"):
            self.assertNotIn("OVERFILL_TRAFFIC", environment(workloads(objects, prefix)))
        refused = helm("kubernetes", 'traffic={"chat":{"chat-3":1}}')
        self.assertIn("traffic.chat names chat-3", refused.stderr)


class Scaling(unittest.TestCase):
    ADAPTER = yaml.safe_load((CHART / "files" / "prometheus-adapter.yaml").read_text())["rules"]["external"]

    def test_hpas_go_by_figures_that_the_adapter_makes(self):
        made = {rule["name"]["as"] for rule in self.ADAPTER}
        scalers = of_kind(rendered("scaled"), "HorizontalPodAutoscaler")
        self.assertEqual(len(scalers), 3)
        used = {m["external"]["metric"]["name"] for s in scalers for m in s["spec"]["metrics"]}
        self.assertEqual(used, made - {"overfill_prefill_waiting", "overfill_prefill_unread_tokens"}, "these are null in these values")

    def test_keda_asks_what_the_adapter_asks(self):
        asked = {rule["metricsQuery"].replace("<<.LabelMatchers>>", "SELECTOR") for rule in self.ADAPTER}
        scalers = of_kind(rendered("gateway"), "ScaledObject")
        targets = {o["metadata"]["name"] for o in workloads(rendered("gateway"))}
        for scaler in scalers:
            self.assertIn(scaler["spec"]["scaleTargetRef"]["name"], targets)
            for trigger in scaler["spec"]["triggers"]:
                query = re.sub(r'namespace="[^}]*"', "SELECTOR", trigger["metadata"]["query"])
                self.assertIn(query, asked)
                self.assertIn(f'namespace="{NAMESPACE}",app_kubernetes_io_instance="{RELEASE}"', trigger["metadata"]["query"])
        self.assertEqual(sum(len(s["spec"]["triggers"]) for s in scalers), 4)

    def test_pods_carry_what_the_queries_select_by(self):
        monitor = of_kind(rendered("scaled"), "PodMonitor")[0]["spec"]
        for workload in workloads(rendered("scaled")):
            labels = workload["spec"]["template"]["metadata"]["labels"]
            self.assertTrue(selects(monitor["selector"], labels))
            scaler = next(s for s in of_kind(rendered("scaled"), "HorizontalPodAutoscaler")
                          if s["metadata"]["name"] == workload["metadata"]["name"])
            for metric in scaler["spec"]["metrics"]:
                for label, value in metric["external"]["metric"]["selector"]["matchLabels"].items():
                    own = next(key for key in monitor["podTargetLabels"] if re.sub("[./]", "_", key) == label)
                    self.assertEqual(labels[own], value)


class Watching(unittest.TestCase):
    ALERTS = (CHART / "files" / "alerts.yaml").read_text()

    def test_alerts_and_dashboard_are_the_files(self):
        operator, plain = rendered("scaled"), rendered("gateway")
        self.assertEqual(of_kind(operator, "PrometheusRule")[0]["spec"], yaml.safe_load(self.ALERTS))
        maps = {m["metadata"]["name"]: m["data"] for m in of_kind(plain, "ConfigMap")}
        self.assertEqual(yaml.safe_load(maps[f"{RELEASE}-overfill-alerts"]["overfill-alerts.yaml"]), yaml.safe_load(self.ALERTS))
        dashboard = json.loads((DEPLOY / "grafana.json").read_text())
        self.assertEqual(json.loads(maps[f"{RELEASE}-overfill-dashboard"]["overfill.json"]), dashboard)

    def test_each_alert_is_in_the_manual(self):
        manual = (DEPLOY.parent / "docs" / "operations.md").read_text()
        for alert in re.findall(r"alert: (\w+)", self.ALERTS):
            self.assertIn(f"`{alert}`", manual)

    def test_what_is_asked_of_prometheus_is_told_by_somebody(self):
        page = (DEPLOY.parent / "docs" / "observability.md").read_text()
        adapter = (CHART / "files" / "prometheus-adapter.yaml").read_text()
        queries = re.findall(r"expr: (?:>-\n)?(.*?)\n +(?:for|labels):", self.ALERTS, re.S) + re.findall(r"metricsQuery: (.*)", adapter)
        names = {name for query in queries for name in re.findall(r"(?:vllm:|overfill_)\w+", query)}
        self.assertGreater(len(names), 12)
        for name in names:
            self.assertIn(f"`{re.sub('_(bucket|sum|count)$', '', name)}`", page)


class Schema(unittest.TestCase):
    SCHEMA = json.loads((CHART / "values.schema.json").read_text())
    DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())

    def test_a_misspelt_key_is_refused_wherever_it_stands(self):
        check = jsonschema.Draft202012Validator(self.SCHEMA)
        self.assertTrue(check.is_valid(self.DEFAULTS))
        values = yaml.safe_load((CHART / "ci" / "pools.yaml").read_text())
        whole = {**self.DEFAULTS, "pairs": values["pairs"]}
        whole["prefill"] = whole["prefill"] | values["prefill"]
        whole["decode"] = whole["decode"] | values["decode"]
        self.assertTrue(check.is_valid(whole))
        # What Kubernetes defines, and names of ours: labels, classes of resources, pairs and pools.
        free = re.compile(r"(SecurityContext(\..*)?|requests|limits|[lL]abels|[aA]nnotations|affinity|nodeSelector|pairs|pools|scale(Up|Down))$")
        places = list(self.maps(whole, ()))
        refused = 0
        for place in places:
            if free.search(".".join(place)):
                continue
            changed = copy.deepcopy(whole)
            spot = functools.reduce(lambda value, key: value[key], place, changed)
            spot["misspelt"] = 1
            with self.subTest(".".join(place)):
                self.assertFalse(check.is_valid(changed))
            refused += 1
        self.assertGreater(refused, 60)

    def maps(self, value, place):
        if isinstance(value, dict):
            yield place
            for key, inner in value.items():
                yield from self.maps(inner, (*place, key))

    def test_helm_says_which_key_it_is(self):
        for setting in ("router.replica=3", 'decode.pools={"a":{"pair":"smollm2-135m","kvmemory":"1G"}}'):
            refused = helm("minimal", setting)
            self.assertNotEqual(refused.returncode, 0)
            self.assertRegex(refused.stderr, "additional properties '(replica|kvmemory)' not allowed")


if __name__ == "__main__":
    unittest.main()
