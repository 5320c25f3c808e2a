//! The journal: what has to be known again after a restart, in one SQLite file.
//!
//! One thread owns the connection. Every batch of changes is one transaction with `synchronous = FULL`: when a
//! write is answered it survives a crash, and a crash at any moment leaves either all of it or nothing. A full
//! disk is an error of that write; what was there before stays readable.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rusqlite::{Connection, OptionalExtension, params};
use vramd_api::{
    AllocationId, ComponentName, DeviceId, Footprint, KeepAlive, ModelName, Priority, SetLimits,
};

/// The version of the tables below; a newer file is refused, an older one is brought up to it.
const SCHEMA_VERSION: i64 = 4;

const SCHEMA: &str = "
CREATE TABLE model (
    name TEXT PRIMARY KEY,
    components TEXT NOT NULL,
    keep_alive TEXT NOT NULL,
    pinned INTEGER NOT NULL,
    registered_at TEXT NOT NULL,
    priority TEXT NOT NULL DEFAULT 'Normal'
) STRICT;
CREATE TABLE resident (
    model TEXT NOT NULL REFERENCES model (name) ON DELETE CASCADE,
    component TEXT NOT NULL,
    device TEXT NOT NULL,
    PRIMARY KEY (model, component, device)
) STRICT;
CREATE TABLE allocation (
    id TEXT PRIMARY KEY,
    device TEXT NOT NULL,
    generation INTEGER NOT NULL,
    request TEXT NOT NULL
) STRICT;
CREATE TABLE device_limits (
    device TEXT PRIMARY KEY,
    limits TEXT NOT NULL
) STRICT;
CREATE TABLE footprint (
    model TEXT NOT NULL,
    device TEXT NOT NULL,
    shape TEXT NOT NULL,
    learned TEXT NOT NULL,
    PRIMARY KEY (model, device, shape)
) STRICT;
";

/// What makes a version of the one before it; the first makes version 2.
const MIGRATIONS: [&str; 3] = [
    "ALTER TABLE model ADD COLUMN priority TEXT NOT NULL DEFAULT 'Normal';",
    r#"CREATE TABLE device_limits (device TEXT PRIMARY KEY, limits TEXT NOT NULL) STRICT;
       INSERT INTO device_limits SELECT device, '{"limitBytes":' || bytes || '}' FROM device_limit;
       DROP TABLE device_limit;"#,
    "CREATE TABLE footprint (model TEXT NOT NULL, device TEXT NOT NULL, shape TEXT NOT NULL, learned TEXT NOT NULL,
       PRIMARY KEY (model, device, shape)) STRICT;",
];

/// One change to the journal.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    PutModel(StoredModel),
    RemoveModel(ModelName),
    SetPinned(ModelName, bool),
    SetKeepAlive(ModelName, KeepAlive),
    PutResident(ModelName, ComponentName, DeviceId),
    /// One component of it, or all.
    RemoveResident(ModelName, ComponentName, DeviceId),
    PutAllocation(StoredAllocation),
    RemoveAllocation(AllocationId),
    SetLimits(DeviceId, Box<SetLimits>),
    PutFootprint(Box<Footprint>),
    RemoveFootprint(Box<Footprint>),
}

/// A registration; `components` is the JSON of the request's field.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredModel {
    pub name: ModelName,
    pub components: String,
    pub keep_alive: KeepAlive,
    pub pinned: bool,
    pub priority: Priority,
    pub registered_at: jiff::Timestamp,
}

/// A persistent allocation; `request` is the JSON of its allocate request.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredAllocation {
    pub id: AllocationId,
    pub device: DeviceId,
    pub generation: u64,
    pub request: String,
}

/// Everything that the journal held when it was opened.
#[derive(Debug, Default)]
pub struct Stored {
    pub models: Vec<StoredModel>,
    pub residents: BTreeMap<(ModelName, DeviceId), Vec<ComponentName>>,
    pub allocations: Vec<StoredAllocation>,
    pub limits: Vec<(DeviceId, SetLimits)>,
    pub footprints: Vec<Footprint>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the journal {path} could not be opened", path = path.display())]
    Open { path: PathBuf, source: rusqlite::Error },
    #[error("the journal {path} has version {found}, this vramd knows {SCHEMA_VERSION}", path = path.display())]
    TooNew { path: PathBuf, found: i64 },
    #[error("the journal has a row that cannot be read: {what}")]
    BadRow { what: String },
    #[error("the journal could not be written")]
    Write(#[source] rusqlite::Error),
    #[error("the journal's thread has ended")]
    Gone,
}

type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

struct Write {
    changes: Vec<Change>,
    done: Done,
}

/// The way to the journal's thread.
#[derive(Debug)]
pub struct Store {
    writes: Option<std::sync::mpsc::Sender<Write>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Write").field("changes", &self.changes).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens or creates the journal in `dir` and reads all of it. `max_pages` bounds the file's size, for tests of
    /// a full disk.
    pub fn open(dir: &Path, max_pages: Option<u32>) -> Result<(Self, Stored), StoreError> {
        let path = dir.join("vramd.db");
        let open = |source| StoreError::Open { path: path.clone(), source };
        let connection = Connection::open(&path).map_err(open)?;
        connection
            .execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
            .map_err(open)?;
        let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(open)?;
        if version > SCHEMA_VERSION {
            return Err(StoreError::TooNew { path, found: version });
        }
        if version == 0 {
            let first = format!("BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;");
            connection.execute_batch(&first).map_err(open)?;
        }
        for (version, migration) in (1..).zip(MIGRATIONS).filter(|(from, _)| version > 0 && *from >= version)
        {
            let step = format!("BEGIN; {migration} PRAGMA user_version = {}; COMMIT;", version + 1);
            connection.execute_batch(&step).map_err(open)?;
        }
        let stored = read(&connection)?;
        if let Some(pages) = max_pages {
            connection.pragma_update(None, "max_page_count", pages).map_err(open)?;
        }
        let (writes, inbox) = std::sync::mpsc::channel::<Write>();
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || run(connection, &inbox))
            .map_err(|_| StoreError::Gone)?;
        Ok((Self { writes: Some(writes), thread: Some(thread) }, stored))
    }

    /// Writes `changes` as one transaction, then calls `done` on the journal's thread. Writes happen in order.
    pub fn write(&self, changes: Vec<Change>, done: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        let write = Write { changes, done: Box::new(done) };
        let refused = match &self.writes {
            Some(writes) => writes.send(write).err().map(|refused| refused.0),
            None => Some(write),
        };
        if let Some(write) = refused {
            (write.done)(Err(StoreError::Gone));
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.writes = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(mut connection: Connection, inbox: &std::sync::mpsc::Receiver<Write>) {
    while let Ok(Write { changes, done }) = inbox.recv() {
        done(apply(&mut connection, &changes).map_err(StoreError::Write));
    }
}

fn apply(connection: &mut Connection, changes: &[Change]) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for change in changes {
        match change {
            Change::PutModel(model) => transaction.execute(
                "INSERT INTO model (name, components, keep_alive, pinned, registered_at, priority) VALUES (?, ?, ?, ?, ?, ?)",
                params![
                    model.name.as_str(),
                    model.components,
                    model.keep_alive.to_string(),
                    model.pinned,
                    model.registered_at.to_string(),
                    model.priority.to_string()
                ],
            ),
            Change::RemoveModel(name) => {
                transaction.execute("DELETE FROM model WHERE name = ?", [name.as_str()])
            }
            Change::SetPinned(name, pinned) => transaction
                .execute("UPDATE model SET pinned = ? WHERE name = ?", params![pinned, name.as_str()]),
            Change::SetKeepAlive(name, keep_alive) => transaction.execute(
                "UPDATE model SET keep_alive = ? WHERE name = ?",
                params![keep_alive.to_string(), name.as_str()],
            ),
            Change::PutResident(name, component, device) => transaction.execute(
                "INSERT OR IGNORE INTO resident (model, component, device) SELECT name, ?, ? FROM model WHERE name = ?",
                params![component.as_str(), device.as_str(), name.as_str()],
            ),
            Change::RemoveResident(name, component, device) => transaction.execute(
                "DELETE FROM resident WHERE model = ?1 AND device = ?2 AND component = ?3",
                params![name.as_str(), device.as_str(), component.as_str()],
            ),
            Change::PutAllocation(allocation) => transaction.execute(
                "INSERT INTO allocation (id, device, generation, request) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET device = ?2, generation = ?3",
                params![
                    allocation.id.to_string(),
                    allocation.device.as_str(),
                    allocation.generation.cast_signed(),
                    allocation.request
                ],
            ),
            Change::RemoveAllocation(id) => {
                transaction.execute("DELETE FROM allocation WHERE id = ?", [id.to_string()])
            }
            Change::SetLimits(device, limits) => transaction.execute(
                "INSERT INTO device_limits (device, limits) VALUES (?1, ?2) ON CONFLICT (device) DO UPDATE SET limits = ?2",
                params![device.as_str(), printed(limits)],
            ),
            Change::PutFootprint(one) => transaction.execute(
                "INSERT INTO footprint (model, device, shape, learned) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (model, device, shape) DO UPDATE SET learned = ?4",
                params![one.model.as_str(), one.device_id.as_str(), printed(&one.shape), printed(one)],
            ),
            Change::RemoveFootprint(one) => transaction.execute(
                "DELETE FROM footprint WHERE model = ? AND device = ? AND shape = ?",
                params![one.model.as_str(), one.device_id.as_str(), printed(&one.shape)],
            ),
        }?;
    }
    transaction.commit()
}

fn read(connection: &Connection) -> Result<Stored, StoreError> {
    let bad = |error: rusqlite::Error| StoreError::BadRow { what: error.to_string() };
    let mut stored = Stored::default();
    let mut rows = connection
        .prepare(
            "SELECT name, components, keep_alive, pinned, registered_at, priority FROM model ORDER BY name",
        )
        .map_err(bad)?;
    let mut rows = rows.query([]).map_err(bad)?;
    while let Some(row) = rows.next().map_err(bad)? {
        stored.models.push(StoredModel {
            name: parsed(row, 0)?,
            components: row.get(1).map_err(bad)?,
            keep_alive: parsed(row, 2)?,
            pinned: row.get(3).map_err(bad)?,
            registered_at: parsed(row, 4)?,
            priority: parsed(row, 5)?,
        });
    }
    let mut rows = connection.prepare("SELECT model, device, component FROM resident").map_err(bad)?;
    let mut rows = rows.query([]).map_err(bad)?;
    while let Some(row) = rows.next().map_err(bad)? {
        stored.residents.entry((parsed(row, 0)?, parsed(row, 1)?)).or_default().push(parsed(row, 2)?);
    }
    let mut rows =
        connection.prepare("SELECT id, device, generation, request FROM allocation").map_err(bad)?;
    let mut rows = rows.query([]).map_err(bad)?;
    while let Some(row) = rows.next().map_err(bad)? {
        stored.allocations.push(StoredAllocation {
            id: parsed(row, 0)?,
            device: parsed(row, 1)?,
            generation: row.get::<_, i64>(2).map_err(bad)?.unsigned_abs(),
            request: row.get(3).map_err(bad)?,
        });
    }
    let mut rows = connection.prepare("SELECT device, limits FROM device_limits").map_err(bad)?;
    let mut rows = rows.query([]).map_err(bad)?;
    while let Some(row) = rows.next().map_err(bad)? {
        stored.limits.push((parsed(row, 0)?, read_json(row, 1)?));
    }
    let mut rows = connection.prepare("SELECT learned FROM footprint").map_err(bad)?;
    let mut rows = rows.query([]).map_err(bad)?;
    while let Some(row) = rows.next().map_err(bad)? {
        stored.footprints.push(read_json(row, 0)?);
    }
    Ok(stored)
}

fn printed(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("names and numbers always print")
}

fn read_json<T: serde::de::DeserializeOwned>(
    row: &rusqlite::Row<'_>,
    column: usize,
) -> Result<T, StoreError> {
    let bad = |what: String| StoreError::BadRow { what };
    let text: String = row.get(column).map_err(|error| bad(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| bad(error.to_string()))
}

fn parsed<T: std::str::FromStr>(row: &rusqlite::Row<'_>, column: usize) -> Result<T, StoreError> {
    let text: Option<String> =
        row.get(column).optional().map_err(|error| StoreError::BadRow { what: error.to_string() })?;
    let text = text.unwrap_or_default();
    text.parse().map_err(|_| StoreError::BadRow { what: format!("{text:?} in column {column}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_of_version_1_is_brought_up_to_date() {
        let home = tempfile::tempdir().expect("a directory");
        let old = Connection::open(home.path().join("vramd.db")).expect("a journal");
        let (schema, _) = SCHEMA.split_once("CREATE TABLE footprint").expect("the last table of version 4");
        let schema = schema.replace(",\n    priority TEXT NOT NULL DEFAULT 'Normal'", "");
        let limits = schema.replace("device_limits", "device_limit").replace("limits TEXT", "bytes INTEGER");
        assert!(!schema.contains("priority") && limits != schema);
        old.execute_batch(&format!(
            "{limits} PRAGMA user_version = 1;
             INSERT INTO device_limit VALUES ('cpu:0', 4096);
             INSERT INTO model VALUES ('a', '{{}}', '5m', 1, '2026-01-01T00:00:00Z');"
        ))
        .expect("the old tables");
        drop(old);
        for _ in 0..2 {
            let (_store, stored) = Store::open(home.path(), None).expect("it opens");
            assert_eq!((stored.models[0].pinned, stored.models[0].priority), (true, Priority::Normal));
            assert_eq!(stored.limits[0].1.limit_bytes.map(vramd_api::Bytes::get), Some(4096));
            assert!(stored.footprints.is_empty());
        }
        let new = Connection::open(home.path().join("vramd.db")).expect("a journal");
        let version: i64 = new.query_row("PRAGMA user_version", [], |row| row.get(0)).expect("a number");
        assert_eq!(version, SCHEMA_VERSION);
        new.execute_batch(&format!("PRAGMA user_version = {}", SCHEMA_VERSION + 1)).expect("set");
        drop(new);
        assert!(matches!(Store::open(home.path(), None), Err(StoreError::TooNew { .. })));
    }
}
