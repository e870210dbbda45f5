//! A look through the header of a GGUF file before anything is allocated for what it says: all lengths lie within the file.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 1 (lengths of four bytes), 2 and 3 (of eight).

use std::io::{self, BufRead, Read};

/// Most values of one list: the largest vocabularies have some hundred thousand.
const LONGEST_LIST: u64 = 1 << 22;
/// Most lists within each other.
const DEEPEST: usize = 4;
/// Most dimensions of a tensor.
const DIMENSIONS: u32 = 4;
/// Largest alignment of the tensors, in bytes.
const ALIGNMENT: u64 = 1 << 16;

const STRING: u32 = 8;
const LIST: u32 = 9;

/// Looks through the header of a file of `length` bytes.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(file: impl BufRead, length: u64) -> Result<(), String> {
    let mut header = Header { file: file.take(length), wide: true, length };
    header.check().map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => "the file ends in its header".to_owned(),
        _ => e.to_string(),
    })
}

struct Header<R> {
    file: io::Take<R>,
    /// Lengths have eight bytes.
    wide: bool,
    length: u64,
}

fn wrong<T>(what: String) -> io::Result<T> {
    Err(io::Error::other(what))
}

impl<R: BufRead> Header<R> {
    fn check(&mut self) -> io::Result<()> {
        if self.bytes()? != *b"GGUF" {
            return wrong("it does not begin as one".into());
        }
        match u32::from_le_bytes(self.bytes()?) {
            1 => self.wide = false,
            2 | 3 => {}
            version => return wrong(format!("version {version} is not known: 1 to 3 are")),
        }
        let (tensors, values) = (self.count()?, self.count()?);
        for _ in 0..values {
            let key = self.string()?;
            let kind = u32::from_le_bytes(self.bytes()?);
            if key == b"general.alignment" {
                self.alignment(kind)?;
            } else {
                self.value(kind, 0)?;
            }
        }
        (0..tensors).try_for_each(|_| self.tensor())
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> io::Result<u64> {
        if self.wide { Ok(u64::from_le_bytes(self.bytes()?)) } else { Ok(u32::from_le_bytes(self.bytes()?).into()) }
    }

    /// A number of things that each take some of the file.
    fn count(&mut self) -> io::Result<u64> {
        let count = self.number()?;
        if count > self.file.limit() { wrong(format!("it announces {count} entries in {} bytes", self.file.limit())) } else { Ok(count) }
    }

    fn string(&mut self) -> io::Result<Vec<u8>> {
        let length = self.count()?;
        let mut text = Vec::new();
        // It grows with what is there.
        (&mut self.file).take(length).read_to_end(&mut text)?;
        if text.len() as u64 == length { Ok(text) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let skipped = io::copy(&mut (&mut self.file).take(bytes), &mut io::sink())?;
        if skipped == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn alignment(&mut self, kind: u32) -> io::Result<()> {
        let alignment = match size(kind) {
            Some(4) => u32::from_le_bytes(self.bytes()?).into(),
            Some(8) => u64::from_le_bytes(self.bytes()?),
            _ => return wrong("general.alignment is no whole number of four or eight bytes".into()),
        };
        let fits = (1..=ALIGNMENT).contains(&alignment);
        if fits { Ok(()) } else { wrong(format!("general.alignment is {alignment}: 1 to {ALIGNMENT} are taken")) }
    }

    fn value(&mut self, kind: u32, depth: usize) -> io::Result<()> {
        match (kind, size(kind)) {
            (_, Some(size)) => self.skip(size),
            (STRING, _) => self.string().map(|_| ()),
            (LIST, _) if depth < DEEPEST => {
                let of = u32::from_le_bytes(self.bytes()?);
                let count = self.count()?;
                if count > LONGEST_LIST {
                    return wrong(format!("a list has {count} values: {LONGEST_LIST} are taken at most"));
                }
                match size(of) {
                    Some(size) => self.skip(count.saturating_mul(size)),
                    None => (0..count).try_for_each(|_| self.value(of, depth + 1)),
                }
            }
            (LIST, _) => wrong("lists lie too deep within each other".into()),
            _ => wrong(format!("a value is of kind {kind}, which is not known")),
        }
    }

    fn tensor(&mut self) -> io::Result<()> {
        let name = String::from_utf8_lossy(&self.string()?).into_owned();
        let dimensions = u32::from_le_bytes(self.bytes()?);
        if dimensions > DIMENSIONS {
            return wrong(format!("tensor {name} has {dimensions} dimensions: {DIMENSIONS} are taken at most"));
        }
        let mut numbers = Some(1_u64);
        for _ in 0..dimensions {
            let dimension = self.number()?;
            numbers = numbers.and_then(|numbers| numbers.checked_mul(dimension));
        }
        // No format has less than a bit for a number.
        if numbers.is_none_or(|numbers| numbers / 8 > self.length) {
            return wrong(format!("tensor {name} has more numbers than the file has room for"));
        }
        let (_kind, offset) = (self.bytes::<4>()?, u64::from_le_bytes(self.bytes()?));
        if offset > self.length { wrong(format!("tensor {name} begins behind the file's end")) } else { Ok(()) }
    }
}

/// Bytes of a value of this kind, where all have the same.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::{self, Content, Value};
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Device, Tensor};
    use proptest::prelude::*;

    use super::*;

    fn file() -> Vec<u8> {
        let zeros = Tensor::zeros((4, 32), DType::F32, &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&zeros, GgmlDType::Q8_0).unwrap();
        let lists = Value::Array(vec![Value::Array(vec![Value::U8(1), Value::U8(2)]), Value::Array(vec![])]);
        let values = [("general.alignment", Value::U32(32)), ("a", Value::String("text".into())), ("b", Value::F64(0.5)), ("c", lists)];
        let values: Vec<(&str, &Value)> = values.iter().map(|(key, value)| (*key, value)).collect();
        let mut bytes = io::Cursor::new(Vec::new());
        gguf_file::write(&mut bytes, &values, &[("token_embd.weight", &tensor)]).unwrap();
        bytes.into_inner()
    }

    fn checked(bytes: &[u8]) -> Result<(), String> {
        check(bytes, bytes.len() as u64)
    }

    #[test]
    fn a_whole_file_passes() {
        assert_eq!(checked(&file()), Ok(()));
    }

    #[test]
    fn what_is_announced_has_to_be_there() {
        let (bytes, alignment) = (file(), "general.alignment".len());
        let with = |at: usize, value: &[u8]| {
            let mut changed = bytes.clone();
            changed[at..at + value.len()].copy_from_slice(value);
            checked(&changed).unwrap_err()
        };
        assert!(with(0, b"GGML").contains("begin"));
        assert!(with(4, &9_u32.to_le_bytes()).contains("version 9"));
        assert!(with(8, &u64::MAX.to_le_bytes()).contains("announces"), "tensors");
        assert!(with(24, &u64::MAX.to_le_bytes()).contains("announces"), "the first key's length");
        assert!(with(24 + 8 + alignment + 4, &0_u32.to_le_bytes()).contains("alignment is 0"));
        assert!(checked(&bytes[..60]).unwrap_err().contains("ends"));
    }

    proptest! {
        /// What passes can be read: nothing panics, and nothing larger than the file is allocated for it.
        #[test]
        fn a_changed_file_is_refused_or_can_be_read(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let mut bytes = file();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if checked(&bytes).is_ok() {
                let _ = Content::read(&mut io::Cursor::new(&bytes));
            }
        }
    }
}
