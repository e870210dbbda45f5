//! Python's pickle, as far as a dictionary of tensors needs it. Nothing is executed: of all that a pickle may name, only what
//! makes tensors and ordered dictionaries is known, and stands for data. Anything else is refused by its name.
//!
//! Values are small and point into tables, so that nothing is copied when a file repeats itself, and nothing is walked in depth.

use std::collections::{BTreeMap, HashMap};

use super::bytes::Bytes;
use super::number::Number;

/// Most operations of a pickle: a tensor takes forty.
const MOST_OPERATIONS: usize = 1 << 19;
/// Most dimensions of a tensor.
const MOST_DIMENSIONS: usize = 8;
/// Longest name of a tensor, in bytes.
const LONGEST_NAME: usize = 1000;
/// Longest name of a storage: PyTorch numbers them.
const LONGEST_KEY: usize = 100;

/// A value of the machine. Texts lie in the pickle, the rest in the tables.
#[derive(Clone, Copy, Debug)]
enum Value<'p> {
    Nothing,
    Truth,
    Whole(i64),
    /// A number with a fraction: no tensor needs it.
    Real,
    Text(&'p str),
    /// A tuple or a list.
    Sequence(usize),
    Dictionary(usize),
    Known(Known),
    Storage(usize),
    Tensor(usize),
}

/// What a pickle may name.
#[derive(Clone, Copy, Debug)]
enum Known {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// The class of a storage, which says what numbers it holds.
    Storage(Number),
}

/// A run of numbers in the archive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'p> {
    /// Name of its entry, below `data/`.
    pub(super) key: &'p str,
    pub(super) number: Number,
    /// How many numbers it has.
    pub(super) length: usize,
}

/// How a tensor lies in its storage; figures are in numbers, not in bytes.
#[derive(Clone, Debug)]
pub(super) struct Layout<'p> {
    pub(super) storage: Storage<'p>,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// The tensors of a dictionary that was pickled.
///
/// # Errors
/// What is wrong with it, or what it has that is no tensor.
pub(super) fn tensors(pickle: &[u8]) -> Result<BTreeMap<String, Layout<'_>>, String> {
    let mut machine = Machine::default();
    let Value::Dictionary(all) = machine.run(Bytes::new(pickle))? else {
        return Err("what it holds is no dictionary of tensors".into());
    };
    let mut tensors = BTreeMap::new();
    for (name, value) in &machine.dictionaries[all] {
        let Value::Text(name) = name else { return Err("a key of the dictionary is no text".into()) };
        if name.len() > LONGEST_NAME {
            return Err(format!("the name of a tensor has {} bytes", name.len()));
        }
        let Value::Tensor(tensor) = value else { return Err(format!("{name:?} is {}, not a tensor", kind(value))) };
        tensors.insert((*name).to_owned(), machine.tensors[*tensor].clone());
    }
    Ok(tensors)
}

fn kind(value: &Value<'_>) -> &'static str {
    match value {
        Value::Nothing => "None",
        Value::Truth => "a truth value",
        Value::Whole(_) | Value::Real => "a number",
        Value::Text(_) => "a text",
        Value::Sequence(_) => "a list",
        Value::Dictionary(_) => "a dictionary",
        Value::Known(_) => "a class",
        Value::Storage(_) => "a storage",
        Value::Tensor(_) => "a tensor",
    }
}

#[derive(Default)]
struct Machine<'p> {
    stack: Vec<Value<'p>>,
    /// Heights of the stack at which something was begun.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'p>>,
    sequences: Vec<Vec<Value<'p>>>,
    dictionaries: Vec<Vec<(Value<'p>, Value<'p>)>>,
    storages: Vec<Storage<'p>>,
    tensors: Vec<Layout<'p>>,
}

impl<'p> Machine<'p> {
    fn run(&mut self, mut pickle: Bytes<'p>) -> Result<Value<'p>, String> {
        for _ in 0..MOST_OPERATIONS {
            let operation = pickle.u8()?;
            if operation == b'.' {
                return self.pop();
            }
            self.operate(operation, &mut pickle)?;
        }
        Err(format!("it has more than {MOST_OPERATIONS} operations"))
    }

    fn operate(&mut self, operation: u8, pickle: &mut Bytes<'p>) -> Result<(), String> {
        match operation {
            // PROTO, FRAME: nothing depends on them.
            0x80 => pickle.skip(1)?,
            0x95 => pickle.skip(8)?,
            b'N' => self.stack.push(Value::Nothing),
            0x88 | 0x89 => self.stack.push(Value::Truth),
            b'K' | b'M' | b'J' | 0x8a | b'G' => self.number(operation, pickle)?,
            b'X' | 0x8c | 0x8d => self.text(operation, pickle)?,
            b'c' | 0x93 => self.global(operation, pickle)?,
            b'(' => self.marks.push(self.stack.len()),
            b')' | b']' => self.sequence(Vec::new()),
            0x85..=0x87 => {
                let taken = self.last(usize::from(operation - 0x84))?;
                self.sequence(taken);
            }
            b't' => {
                let taken = self.marked()?;
                self.sequence(taken);
            }
            b'}' => self.dictionary(Vec::new()),
            b's' | b'u' | b'a' | b'e' => self.fill(operation)?,
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember(operation, pickle)?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'0' => drop(self.pop()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            other => {
                return Err(format!("it has the operation {other:#04x}{}: dictionaries of tensors alone are read", called(other)));
            }
        }
        Ok(())
    }

    fn number(&mut self, operation: u8, pickle: &mut Bytes<'p>) -> Result<(), String> {
        let value = match operation {
            b'K' => Value::Whole(pickle.u8()?.into()),
            b'M' => Value::Whole(pickle.u16()? as i64),
            b'J' => Value::Whole((pickle.u32()? as u32).cast_signed().into()),
            0x8a => {
                let length = usize::from(pickle.u8()?);
                let given = pickle.take(length)?;
                if given.len() > 8 {
                    return Err("a whole number has more than eight bytes".into());
                }
                // Two's complement: what is left out is the sign.
                let sign = if given.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
                let mut bytes = [sign; 8];
                bytes[..given.len()].copy_from_slice(given);
                Value::Whole(i64::from_le_bytes(bytes))
            }
            _ => {
                pickle.skip(8)?;
                Value::Real
            }
        };
        self.stack.push(value);
        Ok(())
    }

    fn text(&mut self, operation: u8, pickle: &mut Bytes<'p>) -> Result<(), String> {
        let length = match operation {
            b'X' => pickle.u32()?,
            0x8c => pickle.u8()?.into(),
            _ => pickle.u64()?,
        };
        let bytes = pickle.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        self.stack.push(Value::Text(std::str::from_utf8(bytes).map_err(|_| "a text is no UTF-8")?));
        Ok(())
    }

    fn global(&mut self, operation: u8, pickle: &mut Bytes<'p>) -> Result<(), String> {
        let (module, name) = if operation == b'c' {
            let text = |line| std::str::from_utf8(line).map_err(|_| "a name is no UTF-8");
            (text(pickle.line()?)?, text(pickle.line()?)?)
        } else {
            match self.last(2)?.as_slice() {
                [Value::Text(module), Value::Text(name)] => (*module, *name),
                _ => return Err("a name is no text".into()),
            }
        };
        let known = match (module, name) {
            ("collections", "OrderedDict") => Known::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Known::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Known::RebuildParameter,
            ("torch", "FloatStorage") => Known::Storage(Number::F32),
            ("torch", "HalfStorage") => Known::Storage(Number::F16),
            ("torch", "BFloat16Storage") => Known::Storage(Number::Bf16),
            ("torch", other) if other.ends_with("Storage") => {
                return Err(format!("it holds numbers of torch.{other}: f32, bf16 and f16 are read"));
            }
            _ => {
                let named: String = format!("{module}.{name}").chars().take(100).collect();
                return Err(format!(
                    "it names {named:?}, which makes no tensor of f32, bf16 or f16: nothing that a file names is executed"
                ));
            }
        };
        self.stack.push(Value::Known(known));
        Ok(())
    }

    /// Appends to the list, or sets keys of the dictionary, that lies below.
    fn fill(&mut self, operation: u8) -> Result<(), String> {
        let values = match operation {
            b's' => self.last(2)?,
            b'a' => self.last(1)?,
            _ => self.marked()?,
        };
        match (self.top()?, operation) {
            (Value::Sequence(list), b'a' | b'e') => self.sequences[list].extend(values),
            (Value::Dictionary(dictionary), b's' | b'u') if values.len().is_multiple_of(2) => {
                self.dictionaries[dictionary].extend(values.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            (other, _) => return Err(format!("{} values are put into {}", values.len(), kind(&other))),
        }
        Ok(())
    }

    fn remember(&mut self, operation: u8, pickle: &mut Bytes<'p>) -> Result<(), String> {
        let at = match operation {
            b'q' | b'h' => pickle.u8()?.into(),
            b'r' | b'j' => pickle.u32()?,
            _ => self.memo.len() as u64,
        };
        if matches!(operation, b'h' | b'j') {
            let value = *self.memo.get(&at).ok_or_else(|| format!("it repeats value {at}, which it has not said"))?;
            self.stack.push(value);
        } else {
            let value = self.top()?;
            self.memo.insert(at, value);
        }
        Ok(())
    }

    /// What a persistent id stands for: `("storage", class, key, device, length)`.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let (number, key, length) = match *self.items(id)? {
            [Value::Text("storage"), Value::Known(Known::Storage(number)), Value::Text(key), Value::Text(_), Value::Whole(length)] => {
                (number, key, length)
            }
            _ => return Err("what it says of a storage is not what PyTorch says".into()),
        };
        if key.len() > LONGEST_KEY {
            return Err(format!("the name of a storage has {} bytes", key.len()));
        }
        let length = usize::try_from(length).map_err(|_| format!("storage {key:?} has {length} numbers"))?;
        self.storages.push(Storage { key, number, length });
        self.stack.push(Value::Storage(self.storages.len() - 1));
        Ok(())
    }

    /// Calls what lies below with the tuple on top.
    fn reduce(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let known = self.pop()?;
        let arguments = self.items(arguments)?;
        let made = match (known, arguments) {
            (Value::Known(Known::OrderedDict), []) => {
                self.dictionary(Vec::new());
                return Ok(());
            }
            (Value::Known(Known::RebuildParameter), [Value::Tensor(tensor), _, _]) => Value::Tensor(*tensor),
            (Value::Known(Known::RebuildTensor), &[Value::Storage(storage), Value::Whole(offset), shape, strides, ref rest @ ..])
                if (2..=3).contains(&rest.len()) =>
            {
                // A tensor may be said to be the negative or the conjugate of what is stored.
                let as_stored = rest.get(2).is_none_or(|said| match said {
                    Value::Nothing => true,
                    Value::Dictionary(said) => self.dictionaries[*said].is_empty(),
                    _ => false,
                });
                if !as_stored {
                    return Err("a tensor is said to be another than what is stored".into());
                }
                let layout = self.layout(self.storages[storage], offset, shape, strides)?;
                self.tensors.push(layout);
                Value::Tensor(self.tensors.len() - 1)
            }
            (known, arguments) => return Err(format!("{} is called with {} values", kind(&known), arguments.len())),
        };
        self.stack.push(made);
        Ok(())
    }

    fn layout(&self, storage: Storage<'p>, offset: i64, shape: Value<'p>, strides: Value<'p>) -> Result<Layout<'p>, String> {
        let key = storage.key;
        let figures = |value| {
            let items = self.items(value)?;
            if items.len() > MOST_DIMENSIONS {
                return Err(format!("a tensor of storage {key:?} has {} dimensions: {MOST_DIMENSIONS} are read at most", items.len()));
            }
            let figures = items.iter().map(|figure| match figure {
                Value::Whole(figure) => usize::try_from(*figure).map_err(|_| format!("a tensor of storage {key:?} has a size below 0")),
                other => Err(format!("a size of a tensor of storage {key:?} is {}", kind(other))),
            });
            figures.collect::<Result<Vec<_>, String>>()
        };
        let (shape, strides) = (figures(shape)?, figures(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of storage {key:?} has {} sizes and {} strides", shape.len(), strides.len()));
        }
        let offset = usize::try_from(offset).map_err(|_| format!("a tensor begins before its storage {key:?}"))?;
        let numbers = shape.iter().try_fold(1_usize, |numbers, &size| numbers.checked_mul(size));
        // A tensor that repeats its storage could be of any size: no weights do.
        let numbers = numbers.filter(|numbers| *numbers <= storage.length).ok_or_else(|| {
            format!("a tensor of shape {shape:?} has more numbers than its storage {key:?}, which has {}", storage.length)
        })?;
        // One behind the last number; a tensor without numbers is nowhere else than its offset says.
        let end = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |end, (size, stride)| end.checked_add(size.saturating_sub(1).checked_mul(*stride)?));
        let end = if numbers == 0 { Some(offset) } else { end.and_then(|last| last.checked_add(1)) };
        if end.is_none_or(|end| end > storage.length) {
            return Err(format!(
                "a tensor of shape {shape:?} with strides {strides:?} from {offset} on goes beyond its storage {key:?} of {} numbers",
                storage.length
            ));
        }
        Ok(Layout { storage, offset, shape, strides })
    }

    /// Sets attributes of what lies below: a dictionary has some that are no tensors (`_metadata`), and they are left out.
    fn build(&mut self) -> Result<(), String> {
        let state = self.pop()?;
        match (self.top()?, state) {
            (Value::Dictionary(_), Value::Dictionary(_)) => Ok(()),
            (other, _) => Err(format!("attributes of {} are set", kind(&other))),
        }
    }

    fn sequence(&mut self, items: Vec<Value<'p>>) {
        self.sequences.push(items);
        self.stack.push(Value::Sequence(self.sequences.len() - 1));
    }

    fn dictionary(&mut self, items: Vec<(Value<'p>, Value<'p>)>) {
        self.dictionaries.push(items);
        self.stack.push(Value::Dictionary(self.dictionaries.len() - 1));
    }

    fn items(&self, value: Value<'p>) -> Result<&[Value<'p>], String> {
        match value {
            Value::Sequence(sequence) => Ok(&self.sequences[sequence]),
            other => Err(format!("{} stands where a tuple should", kind(&other))),
        }
    }

    /// The lowest height to which the stack may be taken down: what lies below the last mark is not there yet.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Value<'p>, String> {
        self.stack[self.floor()..].last().copied().ok_or_else(|| "no value is left where one is taken".to_owned())
    }

    fn pop(&mut self) -> Result<Value<'p>, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// The last `count` values.
    fn last(&mut self, count: usize) -> Result<Vec<Value<'p>>, String> {
        let from = self.stack.len().checked_sub(count).filter(|from| *from >= self.floor());
        Ok(self.stack.split_off(from.ok_or("no value is left where one is taken")?))
    }

    /// The values behind the last mark.
    fn marked(&mut self) -> Result<Vec<Value<'p>>, String> {
        let mark = self.marks.pop().ok_or("it ends something that it has not begun")?;
        Ok(self.stack.split_off(mark))
    }
}

/// Names of operations that make objects, or call what a file names.
fn called(operation: u8) -> &'static str {
    match operation {
        b'i' => " (INST, which makes an object)",
        b'o' => " (OBJ, which makes an object)",
        0x81 => " (NEWOBJ, which makes an object)",
        0x92 => " (NEWOBJ_EX, which makes an object)",
        0x82..=0x84 => " (EXT, which names something by a number)",
        b'P' => " (PERSID)",
        _ => "",
    }
}
