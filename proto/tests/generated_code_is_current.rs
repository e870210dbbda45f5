//! `src/gen` is what the `.proto` files say. With `OVERFILL_WRITE_GENERATED=1` it is written anew.

use std::path::Path;

use prost::Message;

const FILES: [&str; 4] =
    ["overfill/v1/common.proto", "overfill/v1/decode.proto", "overfill/v1/prefill.proto", "overfill/v1/inference.proto"];

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(FILES, [root]).unwrap();
    let encoded = descriptors.encode_to_vec();
    let made = tempfile::tempdir().unwrap();
    tonic_prost_build::configure().bytes(".").out_dir(made.path()).compile_fds(descriptors).unwrap();
    let code = std::fs::read(made.path().join("overfill.v1.rs")).unwrap();

    let target = root.join("src/gen");
    if std::env::var_os("OVERFILL_WRITE_GENERATED").is_some() {
        std::fs::write(target.join("overfill.v1.rs"), &code).unwrap();
        std::fs::write(target.join("descriptors.bin"), &encoded).unwrap();
    }
    let hint = "run `OVERFILL_WRITE_GENERATED=1 cargo test -p overfill-proto`";
    assert!(std::fs::read(target.join("overfill.v1.rs")).unwrap() == code, "src/gen/overfill.v1.rs is stale: {hint}");
    assert!(std::fs::read(target.join("descriptors.bin")).unwrap() == encoded, "src/gen/descriptors.bin is stale: {hint}");
}
