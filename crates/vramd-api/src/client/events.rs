//! The event stream: server-sent events, read piece by piece.
//!
//! The parser knows what `/api/events` sends (`id`, `event`, `data`, comments) and skips every other field,
//! as the format demands.

use futures_util::stream::{self, Stream};
use reqwest::{Method, header};

use super::{Client, ClientError};
use crate::Event;

/// The most that one line may hold: far above any event, and a bound on what a broken peer can make us keep.
const MAX_LINE_BYTES: usize = 16 << 20;

impl Client {
    /// Follows what happens, from now on or from just after the event `since`.
    ///
    /// The stream ends when the daemon closes it; to go on, ask again with the id of the last event.
    pub async fn events(
        &self,
        since: Option<&str>,
    ) -> Result<impl Stream<Item = Result<Event, ClientError>> + Send + use<>, ClientError> {
        let mut request =
            self.request(Method::GET, &["api", "events"]).header(header::ACCEPT, "text/event-stream");
        if let Some(id) = since {
            request = request.header("Last-Event-ID", id);
        }
        let response = request.send().await.map_err(|error| self.transport(error))?;
        let status = response.status();
        if !status.is_success() {
            let body = response.bytes().await.map_err(|error| self.transport(error))?;
            return Err(self.refusal(status, &body));
        }
        Ok(stream::try_unfold((self.clone(), response, Parser::default()), next))
    }
}

type State = (Client, reqwest::Response, Parser);

async fn next((client, mut response, mut parser): State) -> Result<Option<(Event, State)>, ClientError> {
    loop {
        if let Some(data) = parser.next() {
            let event = serde_json::from_str(&data)
                .map_err(|error| client.protocol(format!("an event cannot be read: {error}")))?;
            return Ok(Some((event, (client, response, parser))));
        }
        match response.chunk().await.map_err(|error| client.transport(error))? {
            Some(_) if parser.buffer.len() > MAX_LINE_BYTES => {
                return Err(client.protocol(format!("a line has more than {MAX_LINE_BYTES} bytes")));
            }
            Some(chunk) => parser.buffer.extend_from_slice(&chunk),
            None => return Ok(None),
        }
    }
}

/// Turns bytes, cut anywhere, into the data of messages. The id and the kind are in the data too.
#[derive(Debug, Default)]
struct Parser {
    /// What came and was not read yet; at most one line and one chunk once `next` has answered `None`.
    buffer: Vec<u8>,
    data: Option<String>,
}

impl Parser {
    /// The data of the next complete message, its lines joined.
    fn next(&mut self) -> Option<String> {
        let mut read = 0;
        let mut message = None;
        while message.is_none() {
            let Some(length) = self.buffer[read..].iter().position(|byte| *byte == b'\n') else { break };
            let line = &self.buffer[read..read + length];
            let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line));
            read += length + 1;
            if line.is_empty() {
                message = self.data.take();
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            if field == "data" {
                let value = value.strip_prefix(' ').unwrap_or(value);
                match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                    None => self.data = Some(value.to_owned()),
                }
            }
        }
        self.buffer.drain(..read);
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(chunks: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Vec<String> {
        let mut parser = Parser::default();
        let mut messages = Vec::new();
        for chunk in chunks {
            parser.buffer.extend_from_slice(chunk.as_ref());
            while let Some(data) = parser.next() {
                messages.push(data);
            }
        }
        messages
    }

    #[test]
    fn a_message_may_come_in_any_pieces() {
        let text = "id: 7\nevent: model.loaded\ndata: {\"ä\":1}\n\n";
        let one_by_one: Vec<[u8; 1]> = text.bytes().map(|byte| [byte]).collect();
        assert_eq!(parse(one_by_one), ["{\"ä\":1}"]);
    }

    #[test]
    fn comments_and_unknown_fields_are_skipped() {
        assert_eq!(parse([": heartbeat\n\n:\n\nretry: 10\ndata\nother\n\n", "data:x\n\n"]), ["", "x"]);
    }

    #[test]
    fn lines_of_data_are_joined() {
        assert_eq!(parse(["data: a\r\ndata:  b\r\n\r\n"]), ["a\n b"]);
    }

    #[test]
    fn an_unfinished_message_is_not_told() {
        assert!(parse(["data: a\n"]).is_empty());
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(texts in prop::collection::vec("[a-zä: ]{0,12}", 0..6), cuts in prop::collection::vec(1usize..9, 1..40)) {
            let bytes: Vec<u8> =
                texts.iter().flat_map(|text| format!(": c\nid: 1\ndata: {text}\n\n").into_bytes()).collect();
            let mut rest = bytes.as_slice();
            let mut chunks = Vec::new();
            for cut in cuts.into_iter().cycle() {
                if rest.is_empty() { break }
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                chunks.push(head);
                rest = tail;
            }
            prop_assert_eq!(parse(chunks), texts);
        }
    }
}
