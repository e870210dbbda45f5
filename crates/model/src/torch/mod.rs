//! A file that PyTorch wrote (`torch.save` of a dictionary of tensors): the names and places of its tensors are read when it is
//! opened, without executing anything; their numbers are read, one tensor at a time, when they are asked for.
//!
//! It is a zip file ([`archive`]) with a pickle ([`pickle`]) that says how tensors lie in storages, and an entry for each storage.

mod archive;
mod bytes;
mod number;
mod pickle;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

pub(crate) use self::number::Number;
use crate::error::ModelError;

/// Largest pickle: a tensor takes some hundred bytes of it.
const LARGEST_PICKLE: usize = 16 << 20;
/// What the form that PyTorch wrote before 1.6 begins with, a pickle of a number.
const OLD_FORM: [u8; 6] = [0x80, 2, 0x8a, 10, 0x6c, 0xfc];

/// An opened file.
pub(crate) struct TorchFile {
    map: Mmap,
    tensors: BTreeMap<String, TorchTensor>,
}

/// How a tensor lies in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TorchTensor {
    pub(crate) number: Number,
    pub(crate) shape: Vec<usize>,
    /// Numbers, not bytes, from one index to the next.
    strides: Vec<usize>,
    /// The first number's place in the file, in bytes.
    start: usize,
}

impl TorchFile {
    /// Opens a file that `torch.save` wrote.
    ///
    /// # Errors
    /// [`ModelError::Read`]; [`ModelError::Format`] saying what is wrong with it, or what it names that is not read.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the file is mapped for reading, and all that is read of it is bytes. Whoever changes a checkpoint while it is
        // read gets other weights, which the check of the weights' hash finds when a pair is loaded; no memory of ours is at stake.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let tensors = tensors(&map).map_err(|what| ModelError::Format { path: path.to_owned(), what })?;
        Ok(Self { map, tensors })
    }

    /// Its tensors under their names.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, TorchTensor> {
        &self.tensors
    }

    /// A tensor's numbers in row-major order: those of the file, or a copy where they lie there in another.
    pub(crate) fn bytes(&self, tensor: &TorchTensor) -> Cow<'_, [u8]> {
        let size = tensor.number.size();
        let length = tensor.shape.iter().product::<usize>() * size;
        if length == 0 {
            return Cow::Borrowed(&[]);
        }
        if tensor.is_row_major() {
            return Cow::Borrowed(&self.map[tensor.start..tensor.start + length]);
        }
        let mut sorted = Vec::with_capacity(length);
        let mut index = vec![0; tensor.shape.len()];
        while sorted.len() < length {
            let at = index.iter().zip(&tensor.strides).map(|(i, stride)| i * stride).sum::<usize>() * size + tensor.start;
            sorted.extend_from_slice(&self.map[at..at + size]);
            for (i, size) in index.iter_mut().zip(&tensor.shape).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Cow::Owned(sorted)
    }
}

impl TorchTensor {
    /// Whether its numbers lie one behind the other.
    fn is_row_major(&self) -> bool {
        let mut next = 1;
        for (size, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *size != 1 && *stride != next {
                return false;
            }
            next *= size;
        }
        true
    }
}

fn tensors(file: &[u8]) -> Result<BTreeMap<String, TorchTensor>, String> {
    if file.starts_with(&OLD_FORM) {
        return Err("it has the form that PyTorch wrote before 1.6: write it anew, with \
                    `torch.save(torch.load(FILE, weights_only=True), FILE)`"
            .into());
    }
    if !file.starts_with(b"PK") {
        return Err("it does not begin as a file that PyTorch wrote".into());
    }
    let entries = archive::entries(file)?;
    let mut pickles = entries.keys().filter(|name| name.ends_with("/data.pkl") && name.matches('/').count() == 1);
    let (Some(name), None) = (pickles.next(), pickles.next()) else {
        return Err("it has not one entry data.pkl, as a file that PyTorch wrote".into());
    };
    let folder = name.trim_end_matches("data.pkl");
    let entry = |name: &str| entries.get(&format!("{folder}{name}")).cloned();
    if let Some(order) = entry("byteorder").filter(|at| file[at.clone()] != *b"little") {
        return Err(format!("its numbers are written in the order of bytes {:?}: little is read", String::from_utf8_lossy(&file[order])));
    }
    let pickled = &file[entries[name].clone()];
    if pickled.len() > LARGEST_PICKLE {
        return Err(format!("its data.pkl has {} bytes: {LARGEST_PICKLE} are read at most", pickled.len()));
    }
    let layouts = pickle::tensors(pickled).map_err(|what| format!("its data.pkl cannot be read: {what}"))?;
    let placed = layouts.into_iter().map(|(name, layout)| {
        let pickle::Layout { storage: pickle::Storage { key, number, length }, offset, shape, strides } = layout;
        let data = entry(&format!("data/{key}")).ok_or_else(|| format!("tensor {name} lies in storage {key:?}, which is missing"))?;
        if length.checked_mul(number.size()) != Some(data.len()) {
            let (size, bytes) = (number.size(), data.len());
            return Err(format!("storage {key:?} should have {length} numbers of {size} bytes, and has {bytes} bytes"));
        }
        Ok((name, TorchTensor { number, shape, strides, start: data.start + offset * number.size() }))
    });
    placed.collect()
}

#[cfg(test)]
mod tests;
