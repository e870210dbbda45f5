"""Measures as they come, line by line in a file: a run that is broken off goes on after the last of them."""

import json


class Kept:
    def __init__(self, file):
        self.file = file
        self.rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def measure(self, name, what):
        """What `what()` gives, each with the fields of `name`, unless that is there already."""
        if any(name.items() <= row.items() for row in self.rows):
            return
        print(", ".join(f"{key} {value}" for key, value in name.items()), flush=True)
        new = [{**name, **row} for row in what()]
        with open(self.file, "a") as to:
            to.writelines(json.dumps(row) + "\n" for row in new)
        self.rows += new
