//! Files that say they were written by PyTorch, and were not: each is refused with a sentence, without a panic, in little time and
//! little memory.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use overfill_model::weights::Weights;

/// Longest that a file may take, on a slow machine and not optimised.
const SLOW: Duration = Duration::from_secs(20);
/// Most memory, in bytes: the largest pickle that is read has some ten million operations.
const MUCH: usize = 256 << 20;

/// The system's memory, counted.
struct Counted;
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// One file at a time: its memory is its own.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: all is passed on to the system's allocator as it came; counting changes nothing of it.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// What is said when a folder with this file is opened as a model; nothing where it can be read.
fn said(file: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixtures().join("plain/config.json"), folder.path().join("config.json")).unwrap();
    fs::write(folder.path().join("pytorch_model.bin"), file).unwrap();
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (begun, before) = (Instant::now(), NOW.load(Ordering::Relaxed));
    MOST.store(before, Ordering::Relaxed);
    let said = Weights::open(folder.path()).err().map(|error| error.to_string());
    assert!(begun.elapsed() < SLOW, "it took {:?}", begun.elapsed());
    let taken = MOST.load(Ordering::Relaxed).saturating_sub(before);
    assert!(taken < MUCH, "it took {taken} bytes");
    assert!(said.as_ref().is_none_or(|said| !said.is_empty() && said.len() < 2000), "no sentence: {said:?}");
    said.unwrap_or_default()
}

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch")
}

/// An entry of a zip file.
#[derive(Clone)]
struct Entry {
    name: Vec<u8>,
    data: Vec<u8>,
    flags: u16,
    method: u16,
    extra: Vec<u8>,
    /// What the directory says, where it lies.
    size: Option<u32>,
    offset: Option<u32>,
}

fn entry(name: &str, data: impl Into<Vec<u8>>) -> Entry {
    let name = name.as_bytes().to_vec();
    Entry { name, data: data.into(), flags: 0, method: 0, extra: Vec::new(), size: None, offset: None }
}

/// A zip file, as PyTorch writes one; `end` changes what stands at its end.
fn zip(entries: &[Entry], end: impl FnOnce(&mut [u8; 22])) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for Entry { name, data, flags, method, extra, size, offset } in entries {
        let at = offset.unwrap_or(file.len() as u32).to_le_bytes();
        let sizes = [size.unwrap_or(data.len() as u32).to_le_bytes(); 2].concat();
        let common = [&flags.to_le_bytes()[..], &method.to_le_bytes(), &[0; 8], &sizes, &(name.len() as u16).to_le_bytes()].concat();
        file.extend([b"PK\x03\x04\x00\x00", &common[..], &[0; 2], name, data].concat());
        let rest = [&(extra.len() as u16).to_le_bytes()[..], &[0; 10], &at, name, extra].concat();
        directory.extend([b"PK\x01\x02\x00\x00\x00\x00", &common[..], &rest].concat());
    }
    let mut closing = [0; 22];
    closing[..4].copy_from_slice(b"PK\x05\x06");
    closing[8..10].copy_from_slice(&(entries.len() as u16).to_le_bytes());
    closing[10..12].copy_from_slice(&(entries.len() as u16).to_le_bytes());
    closing[12..16].copy_from_slice(&(directory.len() as u32).to_le_bytes());
    closing[16..20].copy_from_slice(&(file.len() as u32).to_le_bytes());
    end(&mut closing);
    file.extend(directory);
    file.extend(closing);
    file
}

/// A file with this pickle and one storage of 24 bytes, `0`.
fn with(pickle: &[u8]) -> Vec<u8> {
    zip(&[entry("m/data.pkl", pickle), entry("m/data/0", [0; 24])], |_| ())
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

fn number(number: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &number.to_le_bytes()].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(".to_vec(), items.concat(), b"t".to_vec()].concat()
}

fn numbers(figures: &[i64]) -> Vec<u8> {
    tuple(&figures.iter().map(|figure| number(*figure)).collect::<Vec<_>>())
}

/// A storage of `length` numbers.
fn storage(class: &str, key: &str, length: i64) -> Vec<u8> {
    let id = [text("storage"), global("torch", class), text(key), text("cpu"), number(length)];
    [tuple(&id), b"Q".to_vec()].concat()
}

/// A tensor of the storage `0`, of six 32-bit floats.
fn tensor(offset: Vec<u8>, shape: Vec<u8>, strides: Vec<u8>) -> Vec<u8> {
    tensor_of(storage("FloatStorage", "0", 6), offset, shape, strides, Vec::new())
}

fn tensor_of(storage: Vec<u8>, offset: Vec<u8>, shape: Vec<u8>, strides: Vec<u8>, metadata: Vec<u8>) -> Vec<u8> {
    let arguments = tuple(&[storage, offset, shape, strides, vec![0x89], b"}".to_vec(), metadata]);
    [global("torch._utils", "_rebuild_tensor_v2"), arguments, b"R".to_vec()].concat()
}

/// A pickle of a dictionary with one value.
fn holding(value: Vec<u8>) -> Vec<u8> {
    [b"\x80\x02}".to_vec(), text("w"), value, b"s.".to_vec()].concat()
}

fn right() -> Vec<u8> {
    holding(tensor(number(0), numbers(&[2, 3]), numbers(&[3, 1])))
}

#[test]
fn what_is_right_is_read() {
    // It is no model, but it is read.
    assert!(said(&with(&right())).contains("tensor w is none of this model"));
}

#[test]
fn pickles() {
    let cat = |parts: &[&[u8]]| parts.concat();
    let shaped = |shape: &[i64], strides: &[i64], offset: i64| holding(tensor(number(offset), numbers(shape), numbers(strides)));
    let class = |module: &str, name: &str| cat(&[b"\x80\x02", &global(module, name), b")R."]);
    let of_storage = |storage: Vec<u8>| holding(tensor_of(storage, number(0), numbers(&[1]), numbers(&[1]), Vec::new()));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("a command", cat(&[b"\x80\x02", &global("os", "system"), &tuple(&[text("true")]), b"R."]), "\"os.system\""),
        ("posix", class("posix", "system"), "posix.system"),
        ("eval", class("builtins", "eval"), "builtins.eval"),
        ("exec, in Python 2", class("__builtin__", "exec"), "__builtin__.exec"),
        ("a process", class("subprocess", "Popen"), "subprocess.Popen"),
        ("an import", class("importlib", "import_module"), "importlib.import_module"),
        ("getattr", class("builtins", "getattr"), "builtins.getattr"),
        ("a name that is nearly right", class("torch._utils", "_rebuild_tensor"), "torch._utils._rebuild_tensor"),
        ("a parameter with state", class("torch._utils", "_rebuild_parameter_with_state"), "_rebuild_parameter_with_state"),
        ("another type", class("torch._tensor", "_rebuild_from_type_v2"), "_rebuild_from_type_v2"),
        ("numpy", class("numpy.core.multiarray", "scalar"), "numpy.core.multiarray.scalar"),
        ("torch.load", class("torch", "load"), "torch.load"),
        ("whole numbers", of_storage(storage("LongStorage", "0", 3)), "torch.LongStorage"),
        ("64-bit floats", of_storage(storage("DoubleStorage", "0", 3)), "torch.DoubleStorage"),
        ("bytes", class("torch.storage", "UntypedStorage"), "torch.storage.UntypedStorage"),
        ("a name of a megabyte", class(&"x".repeat(1 << 20), "y"), "xxx"),
        ("a command by its texts", cat(&[b"\x80\x04\x8c\x02os\x8c\x06system\x93)R."]), "os.system"),
        ("INST", cat(&[b"\x80\x02(ios\nsystem\n."]), "INST"),
        ("OBJ", cat(&[b"\x80\x02(", &global("collections", "OrderedDict"), b"o."]), "OBJ"),
        ("NEWOBJ", cat(&[b"\x80\x02", &global("collections", "OrderedDict"), b")\x81."]), "NEWOBJ"),
        ("EXT1", cat(&[b"\x80\x02\x82\x01."]), "EXT"),
        ("PERSID", cat(&[b"Pstorage\n."]), "PERSID"),
        ("an operation of none", cat(&[b"\x80\x02\xff."]), "0xff"),
        ("no operation", vec![], "ends in the middle"),
        ("no end", cat(&[b"\x80\x02}"]), "ends in the middle"),
        ("nothing at the end", cat(&[b"\x80\x02."]), "no value is left"),
        ("a list that is called", cat(&[b"\x80\x02])R."]), "a list is called"),
        (
            "a dictionary of something",
            cat(&[b"\x80\x02", &global("collections", "OrderedDict"), &numbers(&[1]), b"R."]),
            "a class is called",
        ),
        ("what was not said", cat(&[b"\x80\x02h\x07."]), "value 7"),
        ("a text of four gigabytes", cat(&[b"\x80\x02X\xff\xff\xff\xff."]), "ends in the middle"),
        ("a text of 2^64 bytes", cat(&[b"\x80\x02\x8d", &[0xff; 8], b"."]), "ends in the middle"),
        ("a number of 255 bytes", cat(&[b"\x80\x02\x8a\xff", &[1; 255], b"."]), "more than eight bytes"),
        ("things begun", vec![b'('; 400_000], "ends in the middle"),
        ("tuples within each other", cat(&[b"N", &vec![0x85; 400_000], b"."]), "no dictionary"),
        ("lists within each other", cat(&[&vec![b']'; 200_000], &vec![b'a'; 199_999], b"."]), "no dictionary"),
        ("too many operations", vec![b'N'; 600_000], "operations"),
        ("a pickle of 17 MB", vec![b'N'; 17 << 20], "17825792 bytes"),
        ("a list of itself twice, and so on", cat(&[b"]q\x00", &b"](h\x00h\x00eq\x00".repeat(60_000), b"."]), "no dictionary"),
        ("a list of itself", cat(&[b"]q\x00h\x00a."]), "no dictionary"),
        ("a dictionary of itself", cat(&[b"}q\x00X\x01\x00\x00\x00ah\x00s."]), "\"a\" is a dictionary"),
        ("the whole memo", (0..60_000_u32).flat_map(|i| [b"Nr".to_vec(), (i * 65_537).to_le_bytes().to_vec()].concat()).collect(), "ends"),
        ("an offset below 0", shaped(&[1], &[1], -1), "begins before"),
        ("an offset beyond", shaped(&[1], &[1], 6), "goes beyond its storage"),
        ("an offset beyond all", shaped(&[2], &[1], i64::MAX), "goes beyond its storage"),
        ("no numbers, from beyond all", shaped(&[0], &[1], i64::MAX), "goes beyond its storage"),
        ("more numbers than there are", shaped(&[2, 4], &[4, 1], 0), "more numbers than its storage"),
        ("sizes of 2^80", shaped(&[1 << 40, 1 << 40], &[1, 1], 0), "more numbers than its storage"),
        ("a number, repeated", shaped(&[1 << 40], &[0], 0), "more numbers than its storage"),
        ("a size below 0", shaped(&[-2, 3], &[3, 1], 0), "below 0"),
        ("a stride below 0", shaped(&[2, 3], &[-3, 1], 3), "below 0"),
        ("wide strides", shaped(&[2, 3], &[4, 1], 0), "goes beyond its storage"),
        ("the widest strides", shaped(&[2, 3], &[i64::MAX, i64::MAX], 0), "goes beyond its storage"),
        ("fewer strides", shaped(&[2, 3], &[1], 0), "2 sizes and 1 strides"),
        ("nine dimensions", shaped(&[1; 9], &[1; 9], 0), "9 dimensions"),
        ("a size that is none", holding(tensor(number(0), tuple(&[b"N".to_vec()]), numbers(&[1]))), "is None"),
        ("a size with a fraction", holding(tensor(number(0), tuple(&[vec![b'G', 0, 0, 0, 0, 0, 0, 0, 0]]), numbers(&[1]))), "a number"),
        ("a shape that is a text", holding(tensor(number(0), text("2"), numbers(&[1]))), "a text stands where"),
        (
            "the negative of what is stored",
            {
                let metadata = cat(&[b"}", &text("neg"), b"\x88s"]);
                holding(tensor_of(storage("FloatStorage", "0", 6), number(0), numbers(&[6]), numbers(&[1]), metadata))
            },
            "another than what is stored",
        ),
        ("a storage of more", of_storage(storage("FloatStorage", "0", 7)), "should have 7 numbers"),
        ("a storage of less", of_storage(storage("FloatStorage", "0", 5)), "should have 5 numbers"),
        ("a storage of 2^63", of_storage(storage("FloatStorage", "0", i64::MAX)), "should have 9223372036854775807"),
        ("a storage of less than none", of_storage(storage("FloatStorage", "0", -1)), "has -1 numbers"),
        ("no storage", of_storage(storage("FloatStorage", "1", 6)), "which is missing"),
        ("a storage above", of_storage(storage("FloatStorage", "../../../etc/passwd", 6)), "which is missing"),
        ("a storage of a long name", of_storage(storage("FloatStorage", &"0".repeat(1000), 6)), "1000 bytes"),
        ("a storage of none", of_storage(cat(&[&tuple(&[text("module")]), b"Q"])), "not what PyTorch says"),
        ("a storage by a text", of_storage(cat(&[&text("storage"), b"Q"])), "a text stands where"),
        ("a list", b"\x80\x02].".to_vec(), "no dictionary"),
        ("None", b"\x80\x02N.".to_vec(), "no dictionary"),
        ("a tensor alone", cat(&[&tensor(number(0), numbers(&[6]), numbers(&[1])), b"."]), "no dictionary"),
        ("a dictionary of dictionaries", holding(right()[2..right().len() - 1].to_vec()), "\"w\" is a dictionary"),
        ("a text", holding(text("x")), "\"w\" is a text"),
        ("a class", holding(global("torch", "FloatStorage")), "\"w\" is a class"),
        ("a key that is no text", cat(&[b"}K\x01Ns."]), "a key of the dictionary is no text"),
        ("a key without a value", cat(&[b"}(", &text("w"), b"u."]), "1 values are put into a dictionary"),
        ("a value put into a dictionary", b"}Na.".to_vec(), "put into a dictionary"),
        ("a key put into a list", b"](NNu.".to_vec(), "put into a list"),
        ("attributes of a list", b"]}b.".to_vec(), "attributes of a list"),
        ("a value from before", b"N(0.".to_vec(), "no value is left"),
        ("a tuple from before", b"N(\x85.".to_vec(), "no value is left"),
        ("an end of nothing", b"Nt.".to_vec(), "has not begun"),
        ("a name that is no UTF-8", b"}X\x01\x00\x00\x00\xffNs.".to_vec(), "no UTF-8"),
        ("a long name", cat(&[b"}", &text(&"w".repeat(2000)), &tensor(number(0), numbers(&[1]), numbers(&[1])), b"s."]), "2000 bytes"),
    ];
    for (what, pickle, word) in &cases {
        let said = said(&with(pickle));
        assert!(said.contains("pytorch_model.bin") && said.contains(word), "{what}: {said}");
    }
    assert!(cases.len() > 80);
}

/// A shape of many sizes that many tensors have would be looked at again and again.
#[test]
fn work_is_bounded() {
    let shape = [b"(".to_vec(), vec![b'N'; 200_000], b"tq\x01".to_vec()].concat();
    let memoised = [storage("FloatStorage", "0", 6), b"q\x02".to_vec()].concat();
    let tensor = [&global("torch._utils", "_rebuild_tensor_v2"), &b"(h\x02K\x00h\x01h\x01\x89}tR"[..]].concat();
    let pickle = [shape, memoised, tensor.repeat(30_000), b".".to_vec()].concat();
    assert!(said(&with(&pickle)).contains("200000 dimensions"));
    // Many names of one tensor, each with its own.
    let tensor =
        [tensor_of(storage("FloatStorage", "0", 6), number(0), numbers(&[1; 8]), numbers(&[1; 8]), Vec::new()), b"q\x03".to_vec()].concat();
    let names: Vec<u8> = (0..130_000).flat_map(|i| [text(&format!("{i:06}")), b"h\x03".to_vec()].concat()).collect();
    let pickle = [b"}(".to_vec(), text("first"), tensor, names, b"u.".to_vec()].concat();
    assert!(said(&with(&pickle)).contains("is none of this model"));
}

#[test]
fn archives() {
    let entries = [entry("m/data.pkl", right()), entry("m/data/0", [0; 24])];
    let changed = |change: &dyn Fn(&mut [Entry; 2])| {
        let mut entries = entries.clone();
        change(&mut entries);
        zip(&entries, |_| ())
    };
    let end = |at: usize, bytes: &[u8]| zip(&entries, |end| end[at..at + bytes.len()].copy_from_slice(bytes));
    let whole = zip(&entries, |_| ());
    let more = |more: Entry| zip(&[entries[0].clone(), entries[1].clone(), more], |_| ());
    let wide = |record: &[u8], at: u64| {
        let (body, closing) = whole.split_at(whole.len() - 22);
        let mut closing = closing.to_vec();
        closing[8..20].fill(0xff);
        [body, record, b"PK\x06\x07\x00\x00\x00\x00", &at.to_le_bytes(), &[1, 0, 0, 0], &closing].concat()
    };
    let record = |count: u64, size: u64, offset: u64| {
        [b"PK\x06\x06", &[0; 28][..], &count.to_le_bytes(), &size.to_le_bytes(), &offset.to_le_bytes()].concat()
    };
    let at = whole.len() as u64 - 22;
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("compressed", changed(&|e| e[1].method = 8), "compressed"),
        ("encrypted", changed(&|e| e[1].flags = 1), "encrypted"),
        ("a storage beyond the file", changed(&|e| e[1].size = Some(1 << 30)), "does not lie within the file"),
        ("a storage from beyond the file", changed(&|e| e[1].offset = Some(1 << 30)), "does not lie within the file"),
        ("a storage from elsewhere", changed(&|e| e[1].offset = Some(3)), "does not begin where"),
        ("sizes of eight bytes that are not there", changed(&|e| e[1].size = Some(u32::MAX)), "does not lie within the file"),
        (
            "more that is cut",
            changed(&|e| {
                e[1].size = Some(u32::MAX);
                e[1].extra = vec![1, 0, 4, 0, 9, 9, 9, 9];
            }),
            "ends in the middle",
        ),
        ("more that goes on", changed(&|e| e[1].extra = vec![1, 0, 255, 0]), "ends in the middle"),
        (
            "a size of 2^64",
            changed(&|e| {
                e[1].size = Some(u32::MAX);
                e[1].extra = [&[1, 0, 16, 0][..], &[0xff; 16]].concat();
            }),
            "within the file",
        ),
        ("a name that is no UTF-8", changed(&|e| e[1].name = vec![0xff]), "no UTF-8"),
        ("no pickle", changed(&|e| e[0].name = b"m/data.pk".to_vec()), "one entry data.pkl"),
        ("two pickles", more(entry("n/data.pkl", right())), "one entry data.pkl"),
        ("a storage twice", more(entry("m/data/0", [0; 24])), "two entries \"m/data/0\""),
        ("the other order of bytes", more(entry("m/byteorder", "big")), "\"big\""),
        ("an odd order of bytes", more(entry("m/byteorder", [0xff; 3])), "order of bytes"),
        ("empty", Vec::new(), "pytorch_model.bin"),
        ("zeros", vec![0; 4096], "does not begin"),
        ("a beginning", b"PK".to_vec(), "no whole zip file"),
        ("no end", whole[..whole.len() - 1].to_vec(), "no whole zip file"),
        ("a tar file", [b"./\x00", &[0; 600][..]].concat(), "does not begin"),
        ("a web page", b"<!DOCTYPE html><html></html>".to_vec(), "does not begin"),
        ("a pointer to the file", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), "does not begin"),
        ("65,534 entries", end(8, &[0xfe, 0xff, 0xfe, 0xff]), "ends in the middle"),
        ("more here than there are", end(8, &[9, 0]), "several disks"),
        ("another disk", end(4, &[1, 0]), "several disks"),
        ("a list beyond the file", end(16, &[0, 0, 0, 9]), "no whole zip file"),
        ("a list that is too long", end(12, &[0, 0, 0, 9]), "no whole zip file"),
        ("a list that is something else", end(16, &[0; 4]), "does not begin as one"),
        ("a comment that is not there", end(20, &[9, 0]), "no whole zip file"),
        ("2^60 entries", wide(&record(1 << 60, 100, 0), at), "1152921504606846976 entries"),
        ("a list from 2^64 on", wide(&record(2, 100, u64::MAX), at), "no whole zip file"),
        ("a list of 2^64 bytes", wide(&record(2, u64::MAX, 50), at), "no whole zip file"),
        ("a wide end that is elsewhere", wide(&record(2, 100, 0), u64::MAX), "no whole zip file"),
        ("a wide end that is cut", wide(b"PK\x06\x06", at), "ends in the middle"),
        ("ends without end", [b"PK\x03\x04", &b"PK\x05\x06".repeat(2_000_000)[..]].concat(), "no whole zip file"),
    ];
    for (what, file, word) in cases {
        let said = said(&file);
        assert!(said.contains("pytorch_model.bin") && said.contains(word), "{what}: {said}");
    }
}

/// A right file with any byte of what it says of itself changed, or cut anywhere, is read or refused.
#[test]
fn changed_files() {
    let right = fs::read(fixtures().join("plain/pytorch_model-00001-of-00002.bin")).unwrap();
    // It is half a model.
    let as_it_is = said(&right);
    assert!(as_it_is.contains("is missing"), "{as_it_is}");
    let pickle = right.windows(2).position(|two| two == b"\x80\x02").unwrap();
    let directory = right.windows(4).position(|four| four == b"PK\x01\x02").unwrap();
    let described = (pickle..pickle + 2500).chain(directory..right.len());
    let mut refused = std::collections::HashSet::new();
    for at in described.step_by(3) {
        for change in [0x01, 0x80, 0xff] {
            let mut changed = right.clone();
            changed[at] ^= change;
            let said = said(&changed);
            assert!(!said.is_empty(), "byte {at}");
            refused.insert(said);
        }
    }
    assert!(refused.len() > 100, "{} sentences", refused.len());
    for length in (0..right.len()).step_by(97) {
        assert!(!said(&right[..length]).is_empty(), "cut to {length} bytes");
    }
}
