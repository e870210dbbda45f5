//! Files that PyTorch wrote (`tests/reference/torch_files.py`), against what PyTorch says that they hold.

use std::collections::BTreeSet;
use std::path::PathBuf;

use candle_core::safetensors::MmapedSafetensors;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch").join(name)
}

#[test]
fn tensors_are_read_however_they_lie() {
    // SAFETY: the file is one of the repository's, which nobody changes while its tests run.
    let meant = unsafe { MmapedSafetensors::new(fixture("tensors.safetensors")) }.unwrap();
    for name in ["tensors.bin", "tensors-protocol-4.bin"] {
        let file = TorchFile::open(&fixture(name)).unwrap();
        let names: BTreeSet<String> = meant.tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(file.tensors().keys().cloned().collect::<BTreeSet<_>>(), names);
        for (tensor, meant) in meant.tensors() {
            let found = &file.tensors()[&tensor];
            assert_eq!((found.number.stored(), found.shape.as_slice()), (meant.dtype(), meant.shape()), "{tensor} of {name}");
            assert_eq!(*file.bytes(found), *meant.data(), "{tensor} of {name}");
        }
        let copied = |tensor: &str| matches!(file.bytes(&file.tensors()[tensor]), Cow::Owned(_));
        assert!(!copied("whole") && !copied("rows") && copied("transposed") && copied("columns"), "what lies in order is not copied");
        assert_eq!(file.tensors()["whole"], file.tensors()["the.same"], "two names of one storage");
    }
}

#[test]
fn what_is_not_read_is_named() {
    for (name, words) in [
        ("tensors-old.bin", ["before 1.6", "torch.save"]),
        ("tensors-whole-numbers.bin", ["torch.LongStorage", "bf16"]),
        ("tensors.safetensors", ["does not begin", "PyTorch"]),
    ] {
        let said = TorchFile::open(&fixture(name)).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said.contains(name) && words.iter().all(|word| said.contains(word)), "{name}: {said}");
    }
}
