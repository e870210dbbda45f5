"""schemathesis against a cluster's HTTP address: bodies that /openapi.json allows are answered, others are refused, and every answer
is as it is described. Says where that does not hold, and ends with 1.

What a description cannot say may be refused, if it is for one of `REASONS`. Arguments: the address, and schemathesis' own.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REASONS = [
    r"together more than the context",  # of prompt and answer
    r"out of range[,:] the vocabulary has",  # of a model
    r"^forced_token_ids",  # as many as the answer, and none that ends it
    r"^tool_choice: ('.*' is not among the tools|there are no tools)",
    r"^(tool_choice|echo|max_tokens|top_logprobs|logprobs|best_of|n)\b.*(leave|set|ask|it must)",  # fields that exclude each other
    r"^(response_format|guided_\w+|structured_outputs|guide)\b|cannot be followed",  # languages of their own, and one of them at most
    r"chat template",  # what a model's own refuses
    r"^(messages|input): the last one cannot be gone on from",  # empty, for one
    r"^continue_final_message",  # one of two
]

if __name__ == "__main__":
    address, *own = sys.argv[1:]
    hooks = {"SCHEMATHESIS_HOOKS": "openapi", "PYTHONPATH": str(Path(__file__).parent)}
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json", "--continue-on-failure", "--request-timeout", "60"]
    command += ["--exclude-checks", "positive_data_acceptance", *own]
    # It leaves what it tried where it runs.
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(command, env={**os.environ, **hooks}, cwd=folder).returncode)

import schemathesis


@schemathesis.check
def refused_for_a_reason(context, response, case):
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    message = response.json()["error"]["message"]
    assert any(re.search(reason, message) for reason in REASONS), f"the description allows it, and it was refused: {message}"
