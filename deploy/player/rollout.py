"""Replaces the pods of a workload as a Deployment's controller does, by the strategy in its manifest."""

import time


def rollout(kubelet, rendered, workload, old, generation, say):
    """Replaces the pods named `old` one by one; returns the new names. Every old one has to end by itself, in its grace period."""
    update = workload["spec"]["strategy"]["rollingUpdate"]
    surge, missing = update["maxSurge"], update["maxUnavailable"]
    assert {surge, missing} == {0, 1}, "only one at a time is played here"
    new = []
    for index, name in enumerate(old):
        replacement = rendered.pod(workload, f"{workload['metadata']['name']}-{generation}-{index}")
        if surge:
            begin(kubelet, workload, replacement)
            end(kubelet, name, say)
        else:
            end(kubelet, name, say)
            begin(kubelet, workload, replacement)
        new.append(replacement.name)
    return new


def begin(kubelet, workload, pod):
    kubelet.start(workload, pod)
    kubelet.wait_ready(pod.name)
    # It counts as available only after that.
    time.sleep(workload["spec"].get("minReadySeconds", 0))


def end(kubelet, name, say):
    took, code = kubelet.stop(name)
    say(f"  {name} left in {took:.1f} s, exit {code}")
    if code != 0:
        raise RuntimeError(f"{name} did not end by itself: exit {code}")
