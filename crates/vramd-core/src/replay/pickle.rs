//! Pickles of protocol 2 to 5, as far as plain data needs them, read once from front to back.
//!
//! Nothing is ever looked up by name or called: opcodes that would are an error. Values that nobody asks for are not kept:
//! text is compared with the words of [`Word`] and dropped, dictionaries keep only these words as keys. Lists and
//! dictionaries stand in two arrays and refer to each other by number, so that a cycle is no leak and depth no recursion.

use std::collections::HashMap;
use std::io::BufRead;

use super::TraceError;

/// The most that the values of one file may take. A snapshot of a million events takes a fifth.
const MOST_BYTES: u64 = 1 << 30;
/// What is charged for one value on the stack, in a list or in the memo, and for a new list or dictionary.
const VALUE_BYTES: u64 = 40;
const OBJECT_BYTES: u64 = 48;

macro_rules! words {
    ($($word:ident = $text:literal,)*) => {
        /// The texts that mean something to us.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Word { $($word,)* }

        impl Word {
            const LONGEST: usize = {
                let mut longest = 0;
                $(if $text.len() > longest { longest = $text.len(); })*
                longest
            };

            fn of(text: &[u8]) -> Option<Self> {
                $(if text == $text { return Some(Self::$word); })*
                None
            }
        }
    };
}

words! {
    DeviceTraces = b"device_traces",
    Action = b"action",
    Address = b"addr",
    Size = b"size",
    TimeMicros = b"time_us",
    Alloc = b"alloc",
    FreeCompleted = b"free_completed",
    OutOfMemory = b"oom",
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    Int(i64),
    Word(Word),
    List(usize),
    Dict(usize),
    /// Anything else.
    Other,
}

/// What a pickle holds.
#[derive(Debug)]
pub struct Pickle {
    pub root: Value,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Word, Value)>>,
}

impl Pickle {
    /// The items, if it is a list.
    pub fn list(&self, value: Value) -> Option<&[Value]> {
        if let Value::List(number) = value { Some(&self.lists[number]) } else { None }
    }

    /// What the dictionary has under `key`, if it is one.
    pub fn get(&self, value: Value, key: Word) -> Option<Value> {
        let Value::Dict(number) = value else { return None };
        self.dicts[number].iter().find(|(word, _)| *word == key).map(|(_, value)| *value)
    }
}

pub fn read(reader: &mut impl BufRead) -> std::result::Result<Pickle, TraceError> {
    let mut machine = Machine {
        reader,
        offset: 0,
        left: MOST_BYTES,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        lists: Vec::new(),
        dicts: Vec::new(),
    };
    if machine.reader.fill_buf()?.first() != Some(&PROTOCOL) {
        let problem = "it does not begin as a pickle of protocol 2 to 5".to_owned();
        return Err(TraceError::Byte { offset: 0, problem });
    }
    loop {
        let begin = machine.offset;
        let result = machine.byte().and_then(|opcode| machine.step(opcode));
        match result {
            Ok(None) => {}
            Ok(Some(root)) => return Ok(Pickle { root, lists: machine.lists, dicts: machine.dicts }),
            Err(Fault::Read(error)) => return Err(error.into()),
            Err(Fault::Problem(problem)) => return Err(TraceError::Byte { offset: begin, problem }),
        }
    }
}

enum Fault {
    Read(std::io::Error),
    Problem(String),
}

type Result<T> = std::result::Result<T, Fault>;

fn problem<T>(text: impl Into<String>) -> Result<T> {
    Err(Fault::Problem(text.into()))
}

struct Machine<'a, R> {
    reader: &'a mut R,
    offset: u64,
    /// Of [`MOST_BYTES`].
    left: u64,
    stack: Vec<Value>,
    /// How high the stack was at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Word, Value)>>,
}

impl<R: BufRead> Machine<'_, R> {
    /// Does what one opcode says; answers the root at the end.
    fn step(&mut self, opcode: u8) -> Result<Option<Value>> {
        match opcode {
            PROTOCOL => match self.byte()? {
                2..=5 => {}
                version => return problem(format!("its protocol is {version} and not 2 to 5")),
            },
            // FRAME: how far to read ahead is for the reader to know.
            0x95 => self.skip(8)?,
            b'.' => {
                let root = self.pop()?;
                return if self.stack.is_empty() && self.marks.is_empty() {
                    Ok(Some(root))
                } else {
                    problem("it ends with values left over")
                };
            }
            b'(' => {
                self.charge(VALUE_BYTES)?;
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.top()?;
                self.push(top)?;
            }
            b'N' | b')' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'J' => {
                let number = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Int(number.into()))?;
            }
            b'K' => {
                let number = self.byte()?;
                self.push(Value::Int(number.into()))?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Int(number.into()))?;
            }
            0x8a => {
                let length = self.byte()?;
                self.long(length.into())?;
            }
            0x8b => {
                let length = self.length_32()?;
                self.long(length)?;
            }
            b'G' => {
                self.skip(8)?;
                self.push(Value::Other)?;
            }
            0x8c | b'U' | b'C' => {
                let length = self.byte()?;
                self.text(length.into())?;
            }
            b'X' | b'T' | b'B' => {
                let length = self.length_32()?;
                self.text(length)?;
            }
            0x8d | 0x8e | 0x96 => {
                let length = u64::from_le_bytes(self.bytes()?);
                self.text(length)?;
            }
            b']' => self.new_list(Vec::new())?,
            b'}' => self.new_dict()?,
            b'l' => {
                let items = self.pop_mark()?;
                self.new_list(items)?;
            }
            b'd' => {
                let pairs = self.pop_mark()?;
                self.new_dict()?;
                self.set(&pairs)?;
            }
            b't' => {
                self.pop_mark()?;
                self.push(Value::Other)?;
            }
            0x85..=0x87 => {
                for _ in 0x85..=opcode {
                    self.pop()?;
                }
                self.push(Value::Other)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?;
            }
            b'u' => {
                let pairs = self.pop_mark()?;
                self.set(&pairs)?;
            }
            b'q' => {
                let place = self.byte()?;
                self.remember(place.into())?;
            }
            b'r' => {
                let place = u32::from_le_bytes(self.bytes()?);
                self.remember(place)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let place = self.byte()?;
                self.recall(place.into())?;
            }
            b'j' => {
                let place = u32::from_le_bytes(self.bytes()?);
                self.recall(place)?;
            }
            b'c' | b'R' | b'b' | b'i' | b'o' | b'P' | b'Q' | 0x81..=0x84 | 0x92 | 0x93 => {
                return problem(format!(
                    "opcode 0x{opcode:02x} asks for code to be run, and a snapshot is plain data"
                ));
            }
            _ => return problem(format!("opcode 0x{opcode:02x} has no place in a snapshot")),
        }
        Ok(None)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.bytes::<1>()?[0])
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.reader.read_exact(bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Fault::Problem(ENDS.to_owned()),
            _ => Fault::Read(error),
        })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn skip(&mut self, mut length: u64) -> Result<()> {
        while length > 0 {
            let here = self.reader.fill_buf().map_err(Fault::Read)?.len();
            let step = length.min(here as u64);
            if step == 0 {
                return problem(ENDS);
            }
            self.reader.consume(step as usize);
            self.offset += step;
            length -= step;
        }
        Ok(())
    }

    fn length_32(&mut self) -> Result<u64> {
        Ok(u32::from_le_bytes(self.bytes()?).into())
    }

    /// A number of any length; one that has more than 64 bits is of no interest.
    fn long(&mut self, length: u64) -> Result<()> {
        if length > 8 {
            self.skip(length)?;
            return self.push(Value::Other);
        }
        let mut bytes = [0; 8];
        self.fill(&mut bytes[..length as usize])?;
        let unused = 64 - 8 * length as u32;
        let number = i64::from_le_bytes(bytes).checked_shl(unused).unwrap_or(0) >> unused.min(63);
        self.push(Value::Int(number))
    }

    fn text(&mut self, length: u64) -> Result<()> {
        if length > Word::LONGEST as u64 {
            self.skip(length)?;
            return self.push(Value::Other);
        }
        let mut text = [0; Word::LONGEST];
        let text = &mut text[..length as usize];
        self.fill(text)?;
        self.push(Word::of(text).map_or(Value::Other, Value::Word))
    }

    fn charge(&mut self, bytes: u64) -> Result<()> {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => problem(format!("its values take more than {} MiB", MOST_BYTES >> 20)),
        }
    }

    fn push(&mut self, value: Value) -> Result<()> {
        self.charge(VALUE_BYTES)?;
        self.stack.push(value);
        Ok(())
    }

    /// What lies on top, above the last mark.
    fn top(&mut self) -> Result<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(value) if self.stack.len() > floor => Ok(*value),
            _ => problem("it takes a value where there is none"),
        }
    }

    fn pop(&mut self) -> Result<Value> {
        let value = self.top()?;
        self.stack.pop();
        self.left += VALUE_BYTES;
        Ok(value)
    }

    /// What lies above the last mark, which is closed.
    fn pop_mark(&mut self) -> Result<Vec<Value>> {
        let Some(mark) = self.marks.pop() else { return problem("it closes a mark where there is none") };
        let values = self.stack.split_off(mark);
        self.left += VALUE_BYTES * (1 + values.len() as u64);
        Ok(values)
    }

    fn new_list(&mut self, items: Vec<Value>) -> Result<()> {
        self.charge(OBJECT_BYTES + VALUE_BYTES * items.len() as u64)?;
        self.lists.push(items);
        self.push(Value::List(self.lists.len() - 1))
    }

    fn new_dict(&mut self) -> Result<()> {
        self.charge(OBJECT_BYTES)?;
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    fn append(&mut self, items: &[Value]) -> Result<()> {
        let Value::List(list) = self.top()? else { return problem("it appends to what is no list") };
        self.charge(VALUE_BYTES * items.len() as u64)?;
        self.lists[list].extend_from_slice(items);
        Ok(())
    }

    fn set(&mut self, pairs: &[Value]) -> Result<()> {
        let Value::Dict(dict) = self.top()? else {
            return problem("it sets an item of what is no dictionary");
        };
        let (pairs, rest) = pairs.as_chunks::<2>();
        if !rest.is_empty() {
            return problem("it sets a key without a value");
        }
        for [key, value] in pairs {
            let Value::Word(key) = *key else { continue };
            let kept = self.dicts[dict].iter_mut().find(|(word, _)| *word == key);
            if let Some((_, old)) = kept {
                *old = *value;
            } else {
                self.charge(VALUE_BYTES)?;
                self.dicts[dict].push((key, *value));
            }
        }
        Ok(())
    }

    fn remember(&mut self, place: u32) -> Result<()> {
        let value = self.top()?;
        self.charge(VALUE_BYTES)?;
        self.memo.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Result<()> {
        match self.memo.get(&place) {
            Some(value) => self.push(*value),
            None => problem(format!("it recalls {place}, which it never remembered")),
        }
    }
}

/// The first opcode, with the version behind it.
const PROTOCOL: u8 = 0x80;
const ENDS: &str = "it ends in the middle";
