"""Triton's own client against a cluster's gRPC address, whole and streamed; prints the answer, as JSON."""

import json
import queue
import sys

import numpy
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
model, prompt = sys.argv[2], sys.argv[3]
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
assert client.get_server_metadata().name == "overfill"
assert {i.name for i in client.get_model_metadata(model).inputs} >= {"text_input", "stream", "sampling_parameters"}


def tensor(name, value):
    array = numpy.array([value], dtype=bool if isinstance(value, bool) else object)
    it = triton.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES")
    it.set_data_from_numpy(array if isinstance(value, bool) else numpy.array([value.encode()], dtype=object))
    return it


def inputs(stream):
    parameters = json.dumps({"temperature": "0", "max_tokens": "24"})
    return [tensor("text_input", prompt), tensor("stream", stream), tensor("sampling_parameters", parameters)]


whole = client.infer(model, inputs(False)).as_numpy("text_output")[0].decode()
pieces = queue.Queue()
client.start_stream(callback=lambda result, error: pieces.put((result, error)))
client.async_stream_infer(model, inputs(True))
streamed = ""
while True:
    result, error = pieces.get(timeout=60)
    assert error is None, error
    streamed += result.as_numpy("text_output")[0].decode()
    if result.get_response().parameters["triton_final_response"].bool_param:
        break
client.stop_stream()
assert streamed == whole, (streamed, whole)
try:
    client.infer("other", inputs(False))
    raise AssertionError("a model that is not there")
except triton.InferenceServerException as e:
    assert "other" in e.message(), e
print(json.dumps({"text": whole}))
