//! Bytes that are read one field after the other, and never beyond their end.

/// What is left to read.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'b>(&'b [u8]);

impl<'b> Bytes<'b> {
    pub(super) fn new(bytes: &'b [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: usize) -> Result<&'b [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or("it ends in the middle of something")?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), String> {
        self.take(count).map(drop)
    }

    /// The bytes before the next line feed, which is read too.
    pub(super) fn line(&mut self) -> Result<&'b [u8], String> {
        let end = self.0.iter().position(|byte| *byte == b'\n').ok_or("it ends in the middle of a line")?;
        let line = self.take(end)?;
        self.skip(1)?;
        Ok(line)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, String> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// Two bytes, the lowest first.
    pub(super) fn u16(&mut self) -> Result<u64, String> {
        Ok(u16::from_le_bytes(self.array()?).into())
    }

    /// Four bytes.
    pub(super) fn u32(&mut self) -> Result<u64, String> {
        Ok(u32::from_le_bytes(self.array()?).into())
    }

    /// Eight bytes.
    pub(super) fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}
