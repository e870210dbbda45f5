//! The zip file that PyTorch writes: where its entries lie, all of them stored as they are.
//!
//! It is read here, because nothing that a file says may cost more than the file is worth: one look for the directory, at the
//! file's end, a bounded number of entries, and no byte of them copied. Checksums are not compared, as PyTorch compares none.

use std::collections::HashMap;
use std::ops::Range;

use super::bytes::Bytes;

/// Most entries: a tensor has one, and the largest models that are known here have some thousands.
const MOST_ENTRIES: u64 = 1 << 17;
/// The directory's end, without its comment.
const END: usize = 22;
/// Longest comment behind the directory's end.
const COMMENT: usize = 0xffff;
/// What stands in a field of four bytes whose figure needs eight, and in one of two.
const LARGE: u64 = 0xffff_ffff;
const MANY: u64 = 0xffff;

/// Entries of the archive under their names.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn entries(file: &[u8]) -> Result<HashMap<String, Range<usize>>, String> {
    let (count, directory) = directory(file)?;
    if count > MOST_ENTRIES {
        return Err(format!("it announces {count} entries: {MOST_ENTRIES} are read at most"));
    }
    let mut entries = HashMap::new();
    let mut fields = Bytes::new(&file[directory]);
    for _ in 0..count {
        let (name, data) = entry(file, &mut fields)?;
        if entries.insert(name.clone(), data).is_some() {
            return Err(format!("it has two entries {name:?}"));
        }
    }
    Ok(entries)
}

/// How many entries there are, and where they are listed.
fn directory(file: &[u8]) -> Result<(u64, Range<usize>), String> {
    let whole = || "it is no whole zip file: the list of its entries is not at its end, or not within it".to_owned();
    let begin = file.len().checked_sub(END).ok_or_else(whole)?;
    let ends = (begin.saturating_sub(COMMENT)..=begin).rev();
    let at = ends.into_iter().find(|&at| {
        let comment = usize::from(u16::from_le_bytes([file[at + 20], file[at + 21]]));
        file[at..].starts_with(b"PK\x05\x06") && comment == file.len() - at - END
    });
    let at = at.ok_or_else(whole)?;
    let mut end = Bytes::new(&file[at + 4..]);
    let (disk, with_directory, here, mut count) = (end.u16()?, end.u16()?, end.u16()?, end.u16()?);
    let (mut size, mut offset) = (end.u32()?, end.u32()?);
    if (disk, with_directory) != (0, 0) && (disk, with_directory) != (MANY, MANY) || here != count {
        return Err("it is one of several disks of a zip file".into());
    }
    if count == MANY || size == LARGE || offset == LARGE {
        let locator = at.checked_sub(20).map(|from| &file[from..at]).filter(|bytes| bytes.starts_with(b"PK\x06\x07"));
        let mut locator = Bytes::new(locator.ok_or_else(whole)?);
        locator.skip(8)?;
        let wide = usize::try_from(locator.u64()?).ok().and_then(|at| file.get(at..)).filter(|bytes| bytes.starts_with(b"PK\x06\x06"));
        let mut wide = Bytes::new(wide.ok_or_else(whole)?);
        wide.skip(32)?;
        (count, size, offset) = (wide.u64()?, wide.u64()?, wide.u64()?);
    }
    let range = range(offset, size, file.len()).ok_or_else(whole)?;
    Ok((count, range))
}

/// The next entry of the directory.
fn entry(file: &[u8], fields: &mut Bytes<'_>) -> Result<(String, Range<usize>), String> {
    if fields.take(4)? != b"PK\x01\x02" {
        return Err("an entry of its list does not begin as one".into());
    }
    fields.skip(4)?;
    let (flags, method) = (fields.u16()?, fields.u16()?);
    fields.skip(8)?;
    let (mut packed, mut size) = (fields.u32()?, fields.u32()?);
    let (name, extra, comment) = (fields.u16()?, fields.u16()?, fields.u16()?);
    fields.skip(8)?;
    let mut offset = fields.u32()?;
    let name = std::str::from_utf8(fields.take(name as usize)?).map_err(|_| "the name of an entry is no UTF-8")?.to_owned();
    let mut extras = Bytes::new(fields.take(extra as usize)?);
    fields.skip(comment as usize)?;
    while !extras.is_empty() {
        let (kind, length) = (extras.u16()?, extras.u16()?);
        let mut field = Bytes::new(extras.take(length as usize)?);
        if kind == 1 {
            // Only those are there that had no room, in this order.
            for figure in [&mut size, &mut packed, &mut offset] {
                if *figure == LARGE {
                    *figure = field.u64()?;
                }
            }
        }
    }
    if method != 0 || packed != size {
        return Err(format!("entry {name:?} is compressed: PyTorch stores entries as they are"));
    }
    if flags & 1 != 0 {
        return Err(format!("entry {name:?} is encrypted"));
    }
    let outside = || format!("entry {name:?} does not lie within the file: it is not whole");
    let header = range(offset, 30, file.len()).ok_or_else(outside)?;
    let mut local = Bytes::new(&file[header.clone()]);
    if local.take(4)? != b"PK\x03\x04" {
        return Err(format!("entry {name:?} does not begin where the list says"));
    }
    local.skip(22)?;
    let before = local.u16()? + local.u16()?;
    let data = range(header.end as u64 + before, size, file.len()).ok_or_else(outside)?;
    Ok((name, data))
}

/// `size` bytes from `offset` on, if the file is as long.
fn range(offset: u64, size: u64, length: usize) -> Option<Range<usize>> {
    let end = usize::try_from(offset.checked_add(size)?).ok()?;
    (end <= length).then(|| end - size as usize..end)
}
