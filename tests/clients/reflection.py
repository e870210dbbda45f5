"""A gRPC client that knows nothing of the cluster but its address: it learns the rest by reflection; prints the answer, as JSON."""

import json
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
assert {"overfill.v1.Inference", "inference.GRPCInferenceService"} <= set(database.get_services())
pool = DescriptorPool(database)
method = pool.FindServiceByName("overfill.v1.Inference").FindMethodByName("Generate")
Request, Event = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
generate = channel.unary_stream(
    "/overfill.v1.Inference/Generate", request_serializer=Request.SerializeToString, response_deserializer=Event.FromString
)

ask = Request(text=sys.argv[2], max_tokens=24, sampling={"temperature": 0})
events = list(generate(ask, timeout=60, compression=grpc.Compression.Gzip))
assert events[0].HasField("started") and events[-1].HasField("finished")
text = "".join(e.delta.text for e in events if e.HasField("delta"))

# A deadline ends a call, before its answer begins or after, whoever is first to notice; and so does the client.
deadlines = [0.001, 0.002, 0.005, 0.05] * 5
for timeout, code in [(t, grpc.StatusCode.DEADLINE_EXCEEDED) for t in deadlines] + [(None, grpc.StatusCode.CANCELLED)]:
    call = generate(Request(text=sys.argv[2], max_tokens=1500, ignore_eos=True), timeout=timeout)
    try:
        for _ in call:
            if timeout is None:
                call.cancel()
        raise AssertionError("it went on to its end")
    except grpc.RpcError as e:
        assert e.code() == code, e
try:
    list(generate(Request(model="other", text="x"), timeout=60))
    raise AssertionError("a model that is not there")
except grpc.RpcError as e:
    assert e.code() == grpc.StatusCode.NOT_FOUND and "other" in e.details(), e
print(json.dumps({"text": text}))
