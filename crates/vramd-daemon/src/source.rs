//! Model files: found inside the model roots, opened without a way out, their headers read.
//!
//! A path is opened beneath a root by [`platform::Directory`]: nothing leads out, not even when the tree changes between
//! two looks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Semaphore;
use vramd_api::{ApiError, ComponentName, ErrorCode};
use vramd_core::layout::{self, FileHeader, GgufError, Index, Layout, Split};
use vramd_core::models::{FileIdentity, Plan};
use vramd_device::Source;

use crate::platform::{self, Directory, OpenError};

/// How many requests read headers at one time.
const PREPARING: usize = 2;

/// A directory that model paths may lie in.
#[derive(Debug)]
struct Root {
    path: PathBuf,
    /// The same with all symlinks followed.
    real: PathBuf,
    directory: Directory,
}

/// The configured model roots.
#[derive(Debug)]
pub struct Roots {
    roots: Vec<Root>,
    /// How many requests may read headers at one time.
    pub turns: Semaphore,
}

/// A component whose files are open and whose layout is known.
#[derive(Debug)]
pub struct Prepared {
    /// As it was registered.
    pub path: String,
    pub plan: Arc<Plan>,
    /// In the order that the layout's spans count them.
    pub files: Vec<Source>,
}

/// Open files, each with what it was before its header is read.
#[derive(Default)]
struct Files {
    sources: Vec<Source>,
    identities: Vec<FileIdentity>,
}

impl Files {
    /// Takes an open file in; answers it.
    fn push(&mut self, buffered: File, shown: &str) -> Result<&File, ApiError> {
        let identity = platform::identity(&buffered).map_err(|error| read_failed(shown, &error))?;
        self.identities.push(identity);
        // As a device reads it: direct too, where the file system takes that. Opening a pipe anew would wait for a writer.
        let is_file = buffered.metadata().is_ok_and(|metadata| metadata.is_file());
        let direct = if is_file { platform::reopen_direct(&buffered) } else { None };
        self.sources.push(Source { direct, buffered });
        Ok(&self.sources[self.sources.len() - 1].buffered)
    }
}

impl Prepared {
    fn new(path: &str, layout: Layout, files: Files) -> Self {
        let Files { sources, identities } = files;
        Self { path: path.to_owned(), plan: Arc::new(Plan::new(layout, identities)), files: sources }
    }

    /// An error if a file was written to since its header was read: header and payload would not belong together.
    pub fn unchanged(&self) -> std::io::Result<()> {
        for (file, before) in self.files.iter().zip(&self.plan.files) {
            if platform::identity(&file.buffered)? != *before {
                return Err(std::io::Error::other("the file was written to while it was read"));
            }
        }
        Ok(())
    }
}

/// A place beneath a root.
struct Place<'a> {
    root: &'a Root,
    below: PathBuf,
}

impl Roots {
    /// Opens every root; an error names the one that cannot be.
    pub fn open(paths: &[PathBuf]) -> Result<Self, (PathBuf, std::io::Error)> {
        let mut roots = Vec::new();
        for path in paths {
            let root = || -> std::io::Result<Root> {
                let path = std::path::absolute(path)?;
                let real = path.canonicalize()?;
                let directory = Directory::open(&real)?;
                Ok(Root { path, real, directory })
            };
            roots.push(root().map_err(|error| (path.clone(), error))?);
        }
        Ok(Self { roots, turns: Semaphore::new(PREPARING) })
    }

    /// Finds, opens and reads the headers of every component. Blocking.
    pub fn prepare(
        &self,
        sources: &BTreeMap<ComponentName, String>,
    ) -> Result<BTreeMap<ComponentName, Prepared>, ApiError> {
        sources
            .iter()
            .map(|(name, path)| {
                let prepared =
                    self.prepare_one(path).map_err(|error| error.detail("component", name.as_str()))?;
                Ok((name.clone(), prepared))
            })
            .collect()
    }

    fn prepare_one(&self, path: &str) -> Result<Prepared, ApiError> {
        let mut place = self.place(path)?;
        let mut file = place.open(path)?;
        if file.metadata().map_err(|error| read_failed(path, &error))?.is_dir() {
            place.below.push(model_file_in(&file, path)?);
            file = place.open(&place.shown())?;
        }
        let shown = place.shown();
        match Path::new(&shown).extension().and_then(|extension| extension.to_str()) {
            Some("json") => {}
            Some("gguf") => return prepare_gguf(path, &place, file),
            _ => {
                let mut files = Files::default();
                let header = read_header(files.push(file, &shown)?, &shown, place.file_name(), 0)?;
                let layout = Layout::build(vec![header], None).map_err(|e| bad_file(&shown, &e, e.hint()))?;
                return Ok(Prepared::new(path, layout, files));
            }
        }
        let index = read_index(&mut file, &shown)?;
        let mut headers = Vec::new();
        let mut kept_bytes = 0;
        let mut files = Files::default();
        for name in index.files() {
            let shard = place.beside(name);
            let shown = shard.shown();
            let file = shard.open(&shown)?;
            let header = read_header(files.push(file, &shown)?, &shown, name.clone(), kept_bytes)?;
            kept_bytes += header.payload_offset;
            headers.push(header);
        }
        let layout =
            Layout::build(headers, Some(&index)).map_err(|error| bad_file(&shown, &error, error.hint()))?;
        Ok(Prepared::new(path, layout, files))
    }

    fn place(&self, path: &str) -> Result<Place<'_>, ApiError> {
        let denied = |why: &str, hint: String| {
            ApiError::new(ErrorCode::PermissionDenied, format!("{path} {why}"))
                .hint(hint)
                .detail("path", path)
        };
        if self.roots.is_empty() {
            return Err(denied(
                "cannot be registered: the daemon has no model root",
                "start it with `vramd serve --model-root DIR`".to_owned(),
            ));
        }
        if path.contains('\0') {
            return Err(
                ApiError::invalid("path", "a path cannot contain a NUL character").detail("path", path)
            );
        }
        let asked = Path::new(path);
        if !asked.is_absolute() {
            return Err(ApiError::invalid("path", format!("{path} is not an absolute path"))
                .hint("give the whole path, from / on")
                .detail("path", path));
        }
        let roots =
            || self.roots.iter().map(|root| root.path.display().to_string()).collect::<Vec<_>>().join(", ");
        let plain = asked
            .components()
            .all(|part| matches!(part, PathPart::Prefix(_) | PathPart::RootDir | PathPart::Normal(_)));
        let below = self.roots.iter().find_map(|root| {
            let below = asked.strip_prefix(&root.path).or_else(|_| asked.strip_prefix(&root.real)).ok()?;
            let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
            Some(Place { root, below: below.to_owned() })
        });
        match below {
            Some(place) if plain => Ok(place),
            _ => Err(denied("lies outside of the model roots", format!("the roots are: {}", roots()))),
        }
    }
}

impl Place<'_> {
    fn open(&self, shown: &str) -> Result<File, ApiError> {
        let error = match self.root.directory.open_beneath(&self.below) {
            Ok(file) => return Ok(file),
            Err(OpenError::Leaves) => ApiError::new(
                ErrorCode::PermissionDenied,
                format!("{shown} leaves its model root through a symlink"),
            )
            .hint("add the directory that it points into with `--model-root`, and register that path"),
            Err(OpenError::NotThere) => {
                ApiError::new(ErrorCode::NotFound, format!("there is no file {shown}"))
                    .hint("write the path as the daemon sees it, from the root")
            }
            Err(OpenError::Denied) => {
                ApiError::new(ErrorCode::PermissionDenied, format!("the daemon may not read {shown}"))
                    .hint("give the daemon's user the right to read it")
            }
            Err(OpenError::NotRegular) => not_regular(shown),
            Err(OpenError::Unfollowable) => ApiError::invalid("path", format!("{shown} cannot be followed")),
            Err(OpenError::Failed(error)) => return Err(read_failed(shown, &error)),
        };
        Err(error.detail("path", shown))
    }

    /// Another file of its directory.
    fn beside(&self, name: &str) -> Self {
        Self { root: self.root, below: self.below.with_file_name(name) }
    }

    fn shown(&self) -> String {
        self.root.path.join(&self.below).display().to_string()
    }

    fn file_name(&self) -> String {
        self.below.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// The first bytes of a GGUF file that are read for its header; more are when it is longer.
const GGUF_BYTES: u64 = 1 << 20;

/// A GGUF file, or all of those that a model was split into, of which it is the first.
fn prepare_gguf(path: &str, place: &Place<'_>, file: File) -> Result<Prepared, ApiError> {
    let shown = place.shown();
    let mut files = Files::default();
    let (first, split) = read_gguf(files.push(file, &shown)?, &shown, &place.file_name(), 0)?;
    let mut kept_bytes = first.payload_offset;
    let mut headers = vec![first];
    let bad = |shown: &str, what: String| {
        ApiError::new(ErrorCode::InvalidModelFile, format!("{shown}: {what}"))
            .hint("the files are not of one model, or not named as they were written: fetch them again together")
            .detail("path", shown)
    };
    if let Some(split) = split {
        let Some(first) = split.sibling(&place.file_name(), 0) else {
            let (number, count) = (split.number + 1, split.count);
            let what =
                format!("it is file {number} of {count}, and not named NAME-{number:05}-of-{count:05}.gguf");
            return Err(bad(&shown, what));
        };
        if split.number > 0 {
            let what = format!("it is file {} of {}", split.number + 1, split.count);
            return Err(bad(&shown, what).hint(format!("register the first one: {first}")));
        }
        for number in 1..split.count {
            let name = split.sibling(&place.file_name(), number).expect("it was one of a set above");
            let sibling = place.beside(&name);
            let shown = sibling.shown();
            let file = sibling.open(&shown)?;
            let (header, of) = read_gguf(files.push(file, &shown)?, &shown, &name, kept_bytes)?;
            if of != Some(Split { number, ..split }) {
                return Err(bad(
                    &shown,
                    format!("it is not file {} of {} of that model", number + 1, split.count),
                ));
            }
            kept_bytes += header.payload_offset;
            headers.push(header);
        }
        let found: u64 = headers.iter().map(|file| file.header.tensors.len() as u64).sum();
        if found != split.tensors {
            let what = format!("the files have {found} tensors together, and should have {}", split.tensors);
            return Err(bad(&shown, what));
        }
    }
    let layout = Layout::build(headers, None).map_err(|error| bad_file(&shown, &error, error.hint()))?;
    Ok(Prepared::new(path, layout, files))
}

fn read_gguf(
    file: &File,
    shown: &str,
    name: &str,
    kept_bytes: u64,
) -> Result<(FileHeader, Option<Split>), ApiError> {
    let metadata = file.metadata().map_err(|error| read_failed(shown, &error))?;
    if !metadata.is_file() {
        return Err(not_regular(shown).detail("path", shown));
    }
    let most = layout::MAX_HEADER_BYTES.saturating_sub(kept_bytes).min(metadata.len());
    let mut header = Vec::new();
    loop {
        let wanted = (header.len() as u64 * 4).max(GGUF_BYTES).min(most);
        let have = header.len();
        header.resize(wanted as usize, 0);
        let got = read_up_to(file, &mut header[have..], have as u64);
        header.truncate(have + got.map_err(|error| read_failed(shown, &error))?);
        match layout::parse_gguf(name, &header, metadata.len()) {
            Err(GgufError::Short { .. }) if header.len() as u64 == wanted && wanted < most => {}
            Err(GgufError::Short { .. }) if header.len() as u64 == most && most < metadata.len() => {
                let error = GgufError::TooLong { most };
                return Err(bad_file(shown, &error, error.hint()));
            }
            Err(error) => return Err(bad_file(shown, &error, error.hint())),
            Ok(gguf) => return Ok((gguf.file, gguf.split)),
        }
    }
}

/// The one model file of a directory: an index if there is one, else the only `.safetensors` or `.gguf` file, or the first of
/// those that one model was split into.
fn model_file_in(directory: &File, shown: &str) -> Result<String, ApiError> {
    let mut names = platform::names(directory).map_err(|error| read_failed(shown, &error))?;
    names.sort_unstable();
    let indexes: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors.index.json")).collect();
    let files: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    let is_gguf = |name: &str| Path::new(name).extension().is_some_and(|extension| extension == "gguf");
    let ggufs = names.iter().filter(|name| is_gguf(name) && !is_later_split(name));
    let files = files.into_iter().chain(ggufs).collect();
    let candidates = if indexes.is_empty() { files } else { indexes };
    match candidates.as_slice() {
        [only] => Ok((*only).clone()),
        [] => Err(ApiError::new(ErrorCode::NotFound, format!("{shown} holds no model file"))
            .hint(MODEL_FILES)
            .detail("path", shown)),
        many => Err(ApiError::invalid("path", format!("{shown} holds {} model files", many.len()))
            .hint("name one of them")
            .detail("path", shown)
            .detail("files", many.iter().take(20).map(|name| (*name).clone()).collect::<Vec<_>>())),
    }
}

const MODEL_FILES: &str = "name a .safetensors file, a .safetensors.index.json, a .gguf file, or a directory with exactly one of them";

/// Whether it is named as a file after the first of a model that was split.
fn is_later_split(name: &str) -> bool {
    let mut words = name.trim_end_matches(".gguf").rsplitn(4, '-');
    let (count, of, number) = (words.next(), words.next(), words.next());
    let is_number =
        |word: Option<&str>| word.is_some_and(|word| word.len() == 5 && word.parse::<u32>().is_ok());
    of == Some("of") && is_number(count) && is_number(number) && number != Some("00001")
}

fn read_header(file: &File, shown: &str, name: String, kept_bytes: u64) -> Result<FileHeader, ApiError> {
    let metadata = file.metadata().map_err(|error| read_failed(shown, &error))?;
    if !metadata.is_file() {
        return Err(not_regular(shown).detail("path", shown));
    }
    let bad = |error: layout::HeaderError| bad_file(shown, &error, error.hint());
    let mut prefix = [0; 8];
    let got = read_up_to(file, &mut prefix, 0).map_err(|error| read_failed(shown, &error))?;
    prefix[got..].fill(0);
    let length = layout::header_length(prefix, metadata.len(), kept_bytes).map_err(bad)?;
    let mut header = vec![0; length as usize];
    let got =
        read_up_to(file, &mut header, layout::PREFIX_BYTES).map_err(|error| read_failed(shown, &error))?;
    header.truncate(got);
    let payload_offset = layout::PREFIX_BYTES + length;
    let header = layout::parse_header(&header, metadata.len() - payload_offset).map_err(bad)?;
    Ok(FileHeader { name, payload_offset, header })
}

fn read_index(file: &mut File, shown: &str) -> Result<Index, ApiError> {
    let mut bytes = Vec::new();
    file.take(layout::MAX_INDEX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| read_failed(shown, &error))?;
    layout::parse_index(&bytes).map_err(|error| bad_file(shown, &error, error.hint()))
}

fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match platform::read_at(file, &mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn not_regular(shown: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidModelFile, format!("{shown} is not a regular file")).hint(MODEL_FILES)
}

fn bad_file(shown: &str, error: &dyn std::error::Error, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidModelFile, format!("{shown}: {error}")).hint(hint).detail("path", shown)
}

fn read_failed(shown: &str, error: &std::io::Error) -> ApiError {
    ApiError::new(ErrorCode::ModelReadFailed, format!("{shown} could not be read: {error}"))
        .hint("check the disk and the file system (`dmesg`), then try again")
        .detail("path", shown)
}
