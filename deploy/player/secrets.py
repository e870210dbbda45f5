"""The Secrets that the chart's values name: certificates of an authority of our own, the cluster's token, a client's key."""

import json
import secrets

from . import podman

DOORS, PEERS, TOKEN, KEYS, TEST = "doors", "peers", "token", "keys", "test"


class Secrets:
    """Made anew in a folder, one for each Secret, a file for each of its keys."""

    def __init__(self, folder, service, peers):
        """`service`: the name that clients reach the doors by; `peers`: the one that the servers' certificates are for."""
        self.folder = folder
        self.key = f"sk-{secrets.token_hex(16)}"
        for name, host in ((DOORS, service), (PEERS, peers)):
            (folder / name).mkdir(parents=True)
            self.certificate(folder / name, host)
        self.write(TOKEN, "token", secrets.token_hex(32))
        self.write(KEYS, "keys.json", json.dumps({"clients": [{"name": "play", "keys": [self.key]}]}))
        self.write(TEST, "key", self.key)
        # Pods run as any user; here they read the machine's own files.
        podman.run("chmod", "-R", "a+rX", folder)

    @property
    def authority(self):
        """The certificate that clients go by."""
        return self.folder / DOORS / "ca.crt"

    def values(self):
        """What the chart is told of them."""
        return {
            "tls": {"doors": {"enabled": True, "secretName": DOORS}, "peers": {"enabled": True, "secretName": PEERS}},
            "clusterToken": {"secretName": TOKEN},
            "keys": {"secretName": KEYS},
            "test": {"keySecretName": TEST},
        }

    def content(self, name, key):
        return (self.folder / name / key).read_text()

    def write(self, name, key, content):
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / key).write_text(content)

    @staticmethod
    def certificate(folder, host):
        """An authority that signs one certificate, as cert-manager lays them out."""
        new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        podman.run("openssl", "req", "-x509", *new_key, "-subj", "/CN=play", "-keyout", folder / "ca.key", "-out", folder / "ca.crt")
        podman.run("openssl", "req", "-x509", *new_key, "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}",
                   "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth,clientAuth",
                   "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-keyout", folder / "tls.key", "-out", folder / "tls.crt")
        (folder / "ca.key").unlink()
