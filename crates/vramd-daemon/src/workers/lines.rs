//! Lines of a worker: read up to their bound and no further, whatever it prints.

use std::io;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};

/// A line's buffer beyond this is given back once the line is read.
const KEPT_BYTES: usize = 1 << 20;

/// One line, or what stands for it.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// Without its end.
    Whole(&'a [u8]),
    /// It has more bytes than it may have; the rest of it is dropped.
    TooLong,
    /// The stream ended in the midst of it.
    Half(&'a [u8]),
    End,
}

#[derive(Debug)]
pub struct Lines<R> {
    reader: BufReader<R>,
    most_bytes: usize,
    line: Vec<u8>,
    /// `line` was handed out.
    is_read: bool,
    /// What comes is the rest of a line that was too long.
    is_skipping: bool,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of at most `most_bytes`, their ends included.
    pub fn new(stream: R, most_bytes: usize) -> Self {
        let reader = BufReader::with_capacity(64 << 10, stream);
        Self { reader, most_bytes, line: Vec::new(), is_read: false, is_skipping: false }
    }

    /// Lines may be longer from now on.
    pub fn allow(&mut self, most_bytes: usize) {
        self.most_bytes = most_bytes;
    }

    /// The next line. Nothing is lost if this is dropped before it has answered.
    pub async fn next(&mut self) -> io::Result<Line<'_>> {
        if std::mem::take(&mut self.is_read) {
            self.line.clear();
            self.line.shrink_to(KEPT_BYTES);
        }
        loop {
            let bytes = self.reader.fill_buf().await?;
            if bytes.is_empty() {
                self.is_read = true;
                let half = !self.line.is_empty() || std::mem::take(&mut self.is_skipping);
                return Ok(if half { Line::Half(&self.line) } else { Line::End });
            }
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(bytes.len(), |end| end + 1);
            let skipped = self.is_skipping;
            if !skipped && self.line.len() + taken > self.most_bytes {
                self.line = Vec::new();
                self.is_skipping = end.is_none();
                self.reader.consume(taken);
                return Ok(Line::TooLong);
            }
            if !skipped {
                self.line.extend_from_slice(&bytes[..end.unwrap_or(taken)]);
            }
            self.reader.consume(taken);
            if end.is_some() {
                self.is_skipping = false;
                if !skipped {
                    self.is_read = true;
                    return Ok(Line::Whole(&self.line));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_lines_and_half_ones_are_told_apart() {
        let text = b"{}\n\n0123456789abcdef\n0123456\nhalf";
        let mut lines = Lines::new(&text[..], 8);
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b"{}"));
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b""));
        assert_eq!(lines.next().await.unwrap(), Line::TooLong);
        assert_eq!(lines.next().await.unwrap(), Line::Whole(b"0123456"));
        assert_eq!(lines.next().await.unwrap(), Line::Half(b"half"));
        assert_eq!(lines.next().await.unwrap(), Line::End);
    }

    #[tokio::test]
    async fn a_gigabyte_without_an_end_is_not_kept() {
        let mut lines = Lines::new(tokio::io::repeat(b'x').take(1 << 30), 16 << 20);
        assert_eq!(lines.next().await.unwrap(), Line::TooLong);
        assert_eq!(lines.next().await.unwrap(), Line::Half(b""));
        assert!(lines.line.capacity() <= KEPT_BYTES);
    }

    use tokio::io::AsyncReadExt as _;
}
