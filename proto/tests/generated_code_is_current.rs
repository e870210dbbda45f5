//! `src/gen` is what the `.proto` files say. With `OVERFILL_WRITE_GENERATED=1` it is written anew.

use std::path::Path;

use prost::Message;

const FILES: [&str; 7] = [
    "overfill/v1/node.proto",
    "overfill/v1/common.proto",
    "overfill/v1/decode.proto",
    "overfill/v1/prefill.proto",
    "overfill/v1/inference.proto",
    "overfill/v1/local.proto",
    "inference/grpc_service.proto",
];
const GENERATED: [&str; 2] = ["overfill.v1.rs", "inference.rs"];

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(FILES, [root]).unwrap();
    let encoded = descriptors.encode_to_vec();
    let made = tempfile::tempdir().unwrap();
    tonic_prost_build::configure().bytes(".").out_dir(made.path()).compile_fds(descriptors).unwrap();

    let target = root.join("src/gen");
    let mut files: Vec<(&str, Vec<u8>)> = GENERATED.iter().map(|name| (*name, std::fs::read(made.path().join(name)).unwrap())).collect();
    files.push(("descriptors.bin", encoded));
    for (name, made) in files {
        if std::env::var_os("OVERFILL_WRITE_GENERATED").is_some() {
            std::fs::write(target.join(name), &made).unwrap();
        }
        let stale = std::fs::read(target.join(name)).ok() != Some(made);
        assert!(!stale, "src/gen/{name} is stale: run `OVERFILL_WRITE_GENERATED=1 cargo test -p overfill-proto`");
    }
}
