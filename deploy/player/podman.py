"""podman and buildah, as this machine runs them."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NETWORK = "overfill-play"


def configure(folder):
    """Settings for this process alone: limits that machines allow, a runtime that takes any cgroups, and names that resolve."""
    settings = Path(folder) / "containers.conf"
    settings.write_text(
        '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
        '[engine]\nruntime = "runc"\n[network]\nnetwork_backend = "netavark"\n')
    os.environ["CONTAINERS_CONF"] = str(settings)
    # Building needs no container of its own: nothing is run.
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    missing = [program for program in ("podman", "buildah", "runc") if not shutil.which(program)]
    if missing:
        raise SystemExit(f"play: {', '.join(missing)} is missing: see the head of deploy/play for what it needs")


def run(*command, timeout=120, check=True, **options):
    """Standard output of a command that ends well, or an error with what it said."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, **options)
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"{' '.join(map(str, command))}: not done after {timeout} s") from late
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def network():
    """The one network of all pods, new."""
    run("podman", "network", "rm", "--force", NETWORK, check=False)
    run("podman", "network", "create", NETWORK)


def start(manifest, aliases):
    """Runs a pod; other pods find it by its name and by its aliases."""
    options = ",".join(f"alias={alias}" for alias in aliases)
    run("podman", "kube", "play", "--network", NETWORK + (f":{options}" if options else ""), "-", input=json.dumps(manifest), timeout=300)


def gateway():
    """The machine's own address on the network."""
    return json.loads(run("podman", "network", "inspect", NETWORK))[0]["subnets"][0]["gateway"]


def infra(pod):
    """The container that holds a pod's network."""
    return json.loads(run("podman", "inspect", json.loads(run("podman", "pod", "inspect", pod))["InfraContainerID"]))[0]


def address(pod):
    """Its IP on the network."""
    return infra(pod)["NetworkSettings"]["Networks"][NETWORK]["IPAddress"]


def process(pod):
    """A process in its network namespace."""
    return infra(pod)["State"]["Pid"]


def logs(container, lines):
    """The last lines that it wrote, wherever to."""
    command = ["podman", "logs", "--tail", str(lines), container]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False).stdout


def state(container):
    """Whether it runs, and what it exited with."""
    said = json.loads(run("podman", "inspect", container))[0]["State"]
    return said["Running"], said["ExitCode"]


def remove(pods, volumes=()):
    """Ends pods at once, and removes what they wrote."""
    # podman takes seconds for each, and waits more than it works.
    with ThreadPoolExecutor(4) as removing:
        list(removing.map(lambda pod: run("podman", "pod", "rm", "--force", "--time", "0", pod, check=False), pods))
    if volumes:
        run("podman", "volume", "rm", "--force", *volumes, check=False)
