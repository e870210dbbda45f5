"""What a cluster's network does with NetworkPolicies: rules of iptables in each pod's network namespace, made of the rendered objects.

As in Kubernetes a pod that no policy selects is open, and the machine that a pod runs on (its kubelet's probes, and here the load, which is
asked from outside) is never kept out. Peers in other namespaces are none: all pods are in one.
"""

import json
import sys
from dataclasses import dataclass

from . import podman

# Run in a pod's namespace: which of the addresses on standard input take a connection.
CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def taken(address):
    try:
        socket.create_connection(address, timeout=1).close()
        return True
    except OSError:
        return False
addresses = [tuple(a) for a in json.load(sys.stdin)]
with ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(taken, addresses))))
"""


@dataclass
class Place:
    """A pod on the network."""

    ip: str
    pid: int
    labels: dict


class Network:
    """All pods that run, and the rules between them."""

    def __init__(self, objects):
        self.policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
        self.places = {}
        self.machine = podman.gateway()

    def add(self, name, labels):
        """A pod runs. Returns its address."""
        self.places[name] = Place(podman.address(name), podman.process(name), labels)
        self.apply()
        return self.places[name].ip

    def remove(self, name):
        """A pod has gone."""
        self.places.pop(name, None)
        self.apply()

    def apply(self):
        for place in self.places.values():
            self.within(place, "iptables-restore", input="\n".join(self.rules(place)) + "\n")

    def rules(self, place):
        mine = [p for p in self.policies if p["podSelector"]["matchLabels"].items() <= place.labels.items()]
        verdict = "DROP" if mine else "ACCEPT"
        yield from ("*filter", f":INPUT {verdict}", f":OUTPUT {verdict}", "-A INPUT -i lo -j ACCEPT", "-A OUTPUT -o lo -j ACCEPT")
        for chain in ("INPUT", "OUTPUT"):
            yield f"-A {chain} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
        yield f"-A INPUT -s {self.machine} -j ACCEPT"
        for side, peers, chain, flag in (("ingress", "from", "INPUT", "-s"), ("egress", "to", "OUTPUT", "-d")):
            for rule in (rule for policy in mine for rule in policy[side]):
                for port in rule["ports"]:
                    accepted = f"-A {chain} -p {port['protocol'].lower()} --dport {port['port']}"
                    if peers not in rule:
                        yield f"{accepted} -j ACCEPT"
                    for ip in self.addresses(rule.get(peers, [])):
                        yield f"{accepted} {flag} {ip} -j ACCEPT"
        yield "COMMIT"

    def addresses(self, peers):
        for peer in peers:
            selector = peer.get("podSelector", {}).get("matchLabels")
            yield from (p.ip for p in self.places.values() if selector and selector.items() <= p.labels.items())

    def reached(self, source, targets):
        """Which (pod, port) of `targets` a pod can connect to."""
        addresses = json.dumps([(self.places[pod].ip, port) for pod, port in targets])
        taken = json.loads(self.within(self.places[source], sys.executable, "-c", CONNECT, input=addresses))
        return {target for target, yes in zip(targets, taken, strict=True) if yes}

    @staticmethod
    def within(place, *command, **options):
        return podman.run("nsenter", f"--net=/proc/{place.pid}/ns/net", *command, **options)
