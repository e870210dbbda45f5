//! A GGUF file, or all parts of one that was split: what the first says, and in which of them each tensor lies.
//!
//! Parts are named `NAME-00001-of-00003.gguf` and so on, as `llama-gguf-split` names them; the first has the values, each counts
//! itself and all (`split.no` from 0 on, `split.count`, `split.tensors.count`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use memmap2::Mmap;

use crate::error::ModelError;
use crate::gguf_config::whole;
use crate::gguf_header;

/// Opened parts; one, of a file that was not split.
pub(crate) struct Parts {
    /// The first part's values, and the tensors of all: where one lies in its file is not told from the beginning of this one.
    content: Content,
    files: Vec<Part>,
    /// The file of each tensor.
    places: HashMap<String, usize>,
}

struct Part {
    path: PathBuf,
    /// The file, in which tensors are looked up where they lie.
    mapped: Mmap,
    /// Where its tensors begin.
    begin: u64,
}

impl Part {
    fn new(path: PathBuf, content: &Content) -> Result<Self, ModelError> {
        // SAFETY: the file is mapped for reading. Whoever changes a checkpoint while a node loads it gets wrong weights, which the
        // check of the weights' hash finds when a pair is loaded; no memory of ours is at stake.
        let mapped = unsafe { Mmap::map(&open(&path)?) };
        let mapped = mapped.map_err(|source| ModelError::Read { path: path.clone(), source })?;
        Ok(Self { path, mapped, begin: content.tensor_data_offset })
    }
}

impl Parts {
    /// Reads the headers of a file and of the parts that follow it.
    ///
    /// # Errors
    /// [`ModelError::Read`] where a part is missing; [`ModelError::Format`] where one is no whole GGUF file or does not belong to
    /// the others, or where `path` is not the first.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let paths = files(path)?;
        let parts = paths.len();
        let mut all: Option<Self> = None;
        for (i, path) in paths.into_iter().enumerate() {
            let content = header(&path)?;
            let format = |what: String| ModelError::Format { path: path.clone(), what };
            let said = |key: &str| content.metadata.get(key).and_then(whole);
            match (said("split.count").filter(|count| *count > 1), parts) {
                (None, 1) => {}
                (Some(count), 1) => {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy();
                    return Err(format(format!(
                        "it is one of {count} parts of a split file, which are found by their names: the first must be called \
                         {name}-00001-of-{count:05}.gguf"
                    )));
                }
                (Some(count), _) if count == parts && said("split.no") == Some(i) => {}
                (count, _) => {
                    let count = count.map_or("none".to_owned(), |count| count.to_string());
                    let number = said("split.no").map_or("none".to_owned(), |number| (number + 1).to_string());
                    return Err(format(format!(
                        "its name says that it is part {} of {parts}, and its header that it is {number} of {count}",
                        i + 1
                    )));
                }
            }
            match &mut all {
                None => {
                    let places = content.tensor_infos.keys().map(|name| (name.clone(), 0)).collect();
                    all = Some(Self { files: vec![Part::new(path, &content)?], content, places });
                }
                Some(all) => all.add(path, content)?,
            }
        }
        let all = all.ok_or_else(|| ModelError::Format { path: path.to_owned(), what: "there is no such file".into() })?;
        let wanted = all.content.metadata.get("split.tensors.count").and_then(whole).filter(|_| parts > 1);
        match wanted {
            Some(wanted) if wanted != all.places.len() => Err(ModelError::Format {
                path: path.to_owned(),
                what: format!("its parts have {} tensors, and should have {wanted}", all.places.len()),
            }),
            _ => Ok(all),
        }
    }

    fn add(&mut self, path: PathBuf, content: Content) -> Result<(), ModelError> {
        let part = Part::new(path, &content)?;
        for (name, info) in content.tensor_infos {
            if self.places.insert(name.clone(), self.files.len()).is_some() {
                return Err(ModelError::Format { path: part.path, what: format!("tensor {name} is in an earlier part too") });
            }
            self.content.tensor_infos.insert(name, info);
        }
        self.files.push(part);
        Ok(())
    }

    /// What the header says, with the tensors of all parts. Their numbers are read by [`Parts::tensor`].
    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// A value of the header.
    pub(crate) fn metadata(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A stored tensor as it lies there.
    ///
    /// # Errors
    /// [`ModelError::Format`] where there is none of that name, or it cannot be read.
    pub(crate) fn tensor(&self, name: &str, device: &Device) -> Result<QTensor, ModelError> {
        let Some((info, place)) = self.content.tensor_infos.get(name).zip(self.places.get(name)) else {
            return Err(ModelError::Format { path: self.files[0].path.clone(), what: format!("tensor {name} is missing") });
        };
        let Part { path, begin, .. } = &self.files[*place];
        info.read(&mut open(path)?, *begin, device)
            .map_err(|e| ModelError::Format { path: path.clone(), what: format!("tensor {name} cannot be read: {e}") })
    }

    /// What is said of a stored tensor, and its bytes where they lie.
    pub(crate) fn bytes(&self, name: &str) -> Option<(&TensorInfo, &[u8])> {
        let (info, place) = self.content.tensor_infos.get(name).zip(self.places.get(name))?;
        let Part { mapped, begin, .. } = &self.files[*place];
        let first = usize::try_from(begin.checked_add(info.offset)?).ok()?;
        let length = info.shape.elem_count() / info.ggml_dtype.block_size() * info.ggml_dtype.type_size();
        Some((info, mapped.get(first..first.checked_add(length)?)?))
    }
}

/// The files that a GGUF file is made of, by its name: itself, or all parts, of which it must be the first.
///
/// # Errors
/// [`ModelError::Format`] where it is another part than the first, [`ModelError::Read`] where a part is missing.
pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let Some((name, number, count)) = numbered(path) else { return Ok(vec![path.to_owned()]) };
    let part = |number: usize| path.with_file_name(part_name(name, number, count));
    if number != 1 {
        let what = format!("it is part {number} of {count}: name the first, {}", part_name(name, 1, count));
        return Err(ModelError::Format { path: path.to_owned(), what });
    }
    let found = |number: usize| {
        let part = part(number);
        std::fs::metadata(&part).map_err(|source| ModelError::Read { path: part.clone(), source })?;
        Ok(part)
    };
    (1..=count).map(found).collect()
}

/// As a part is called.
pub(crate) fn part_name(name: &str, number: usize, count: usize) -> String {
    format!("{name}-{number:05}-of-{count:05}.gguf")
}

/// `NAME`, 2 and 3 of `NAME-00002-of-00003.gguf`.
fn numbered(path: &Path) -> Option<(&str, usize, usize)> {
    let (rest, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let figure = |text: &str| if text.len() == 5 { text.parse().ok() } else { None };
    let (number, count) = (figure(number)?, figure(count)?);
    (count > 1).then_some((name, number, count))
}

/// The header of one file, all of whose tensors lie within it.
fn header(path: &Path) -> Result<Content, ModelError> {
    let format = |what: String| ModelError::Format { path: path.to_owned(), what };
    let mut reader = BufReader::new(open(path)?);
    let read = |source| ModelError::Read { path: path.to_owned(), source };
    let length = reader.get_ref().metadata().map_err(read)?.len();
    gguf_header::check(&mut reader, length).map_err(|e| format(format!("no whole GGUF file: {e}")))?;
    reader.rewind().map_err(read)?;
    let content = Content::read(&mut reader).map_err(|e| format(format!("no whole GGUF file: {e}")))?;
    for (name, info) in &content.tensor_infos {
        let bytes = (info.shape.elem_count() / info.ggml_dtype.block_size()).saturating_mul(info.ggml_dtype.type_size());
        if content.tensor_data_offset.saturating_add(info.offset).saturating_add(bytes as u64) > length {
            return Err(format(format!("the file ends before tensor {name} does: it is not whole")));
        }
    }
    Ok(content)
}

fn open(path: &Path) -> Result<File, ModelError> {
    File::open(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })
}
