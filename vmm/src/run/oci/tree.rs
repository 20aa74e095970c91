//! What is left of layers that are applied to each other (image-spec, layer.md).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::layer::{Entry, Kind, Layer};

/// How the name of a file begins that takes another one away.
const WHITEOUT: &[u8] = b".wh.";
/// What takes away all that the layers below have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How other names of AUFS's own begin.
const AUFS: &[u8] = b".wh..wh.";
/// As many symbolic links Linux follows on one path.
const MOST_LINKS: usize = 40;

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// What should be a directory is something else.
    #[error("{path:?} is below what is no directory")]
    NotDirectory {
        /// The path below.
        path: String,
    },
    /// A path leads through too many symbolic links.
    #[error("the path {path:?} leads through more than {MOST_LINKS} symbolic links")]
    Loop {
        /// The path.
        path: String,
    },
    /// A hard link to nothing.
    #[error("{path:?} is a hard link to {target:?}, which is not there or a directory")]
    NoTarget {
        /// The link.
        path: String,
        /// What it should be another name of.
        target: String,
    },
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// A file, of which there may be several names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// In which layer it is.
    pub layer: usize,
    /// Which of its entries.
    pub entry: usize,
}

/// A name in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    /// A directory that no layer describes.
    Implied,
    /// A directory.
    Directory(Source),
    /// Anything else.
    Other(Source),
}

/// All paths, in an order in which a directory is before what is in it.
#[derive(Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    /// Where symbolic links lead.
    links: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The sizes of files.
    sizes: BTreeMap<Source, u64>,
}

impl Tree {
    /// Applies a layer to those before.
    ///
    /// # Errors
    ///
    /// See [`TreeError`].
    pub fn apply(&mut self, number: usize, layer: &Layer) -> Result<(), TreeError> {
        // A whiteout is about the layers below, wherever it stands in its own.
        for entry in &layer.entries {
            self.white_out(&entry.path)?;
        }
        for (n, entry) in layer.entries.iter().enumerate() {
            let (_, name) = split(&entry.path);
            if !name.starts_with(WHITEOUT) {
                let source = Source {
                    layer: number,
                    entry: n,
                };
                self.add(source, entry)?;
            }
        }
        Ok(())
    }

    /// The directories, in their order, with what describes them.
    pub fn directories(&self) -> impl Iterator<Item = (&[u8], Option<Source>)> {
        self.nodes.iter().filter_map(|(path, node)| match node {
            Node::Implied => Some((&path[..], None)),
            Node::Directory(source) => Some((&path[..], Some(*source))),
            Node::Other(_) => None,
        })
    }

    /// All else, with all names of each.
    pub fn others(&self) -> BTreeMap<Source, Vec<&[u8]>> {
        let mut all: BTreeMap<Source, Vec<&[u8]>> = BTreeMap::new();
        for (path, node) in &self.nodes {
            if let Node::Other(source) = node {
                all.entry(*source).or_default().push(path);
            }
        }
        all
    }

    /// The bytes of all files.
    pub fn size(&self) -> u64 {
        let files: BTreeSet<_> = self.others().into_keys().collect();
        let sizes = files.iter().filter_map(|source| self.sizes.get(source));
        sizes.fold(0, |sum, size| sum.saturating_add(*size))
    }

    fn white_out(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let (parent, name) = split(path);
        let Some(hidden) = name.strip_prefix(WHITEOUT) else {
            return Ok(());
        };
        let parent = self.resolve(parent)?;
        if name == OPAQUE {
            self.remove_below(&parent);
        } else if !name.starts_with(AUFS) && !matches!(hidden, b"" | b"." | b"..") {
            self.remove(&join(&parent, hidden));
        }
        Ok(())
    }

    fn add(&mut self, source: Source, entry: &Entry) -> Result<(), TreeError> {
        let (parent, name) = split(&entry.path);
        let parent = self.resolve(parent)?;
        self.make_directories(&parent, &entry.path)?;
        let path = join(&parent, name);
        let is_directory = matches!(
            self.nodes.get(&path),
            Some(Node::Directory(_) | Node::Implied)
        );
        let node = match &entry.kind {
            Kind::Directory => Node::Directory(source),
            Kind::Link(target) => {
                let (parent, name) = split(target);
                let found = join(&self.resolve(parent)?, name);
                match self.nodes.get(&found) {
                    Some(Node::Other(_)) if found == path => return Ok(()),
                    Some(Node::Other(source)) => Node::Other(*source),
                    _ => {
                        return Err(TreeError::NoTarget {
                            path: text(&entry.path),
                            target: text(target),
                        });
                    }
                }
            }
            _ => Node::Other(source),
        };
        // The root itself stays one.
        if path.is_empty() && entry.kind != Kind::Directory {
            let path = "/".into();
            return Err(TreeError::NotDirectory { path });
        }
        let link = match &entry.kind {
            Kind::Symlink(target) => Some(target.clone()),
            Kind::Link(target) => {
                let (parent, name) = split(target);
                self.links.get(&join(&self.resolve(parent)?, name)).cloned()
            }
            _ => None,
        };
        if !(is_directory && entry.kind == Kind::Directory) {
            self.remove(&path);
        }
        if let Kind::File(size) = entry.kind {
            self.sizes.insert(source, size);
        }
        if let Some(link) = link {
            self.links.insert(path.clone(), link);
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    /// Makes a directory and those above it, where there are none.
    fn make_directories(&mut self, path: &[u8], below: &[u8]) -> Result<(), TreeError> {
        if path.is_empty() {
            return Ok(());
        }
        let ends = (0..path.len())
            .filter(|at| path[*at] == b'/')
            .chain([path.len()]);
        for end in ends {
            let node = self
                .nodes
                .entry(path[..end].to_vec())
                .or_insert(Node::Implied);
            if matches!(node, Node::Other(_)) {
                let path = text(below);
                return Err(TreeError::NotDirectory { path });
            }
        }
        Ok(())
    }

    /// The path of a directory, with symbolic links followed as within the root.
    fn resolve(&self, path: &[u8]) -> Result<Vec<u8>, TreeError> {
        let split = |path: &[u8]| -> Vec<Vec<u8>> {
            let parts = path.split(|byte| *byte == b'/').rev();
            let parts = parts.filter(|part| !part.is_empty() && *part != b".");
            parts.map(<[u8]>::to_vec).collect()
        };
        let mut rest = split(path);
        let mut found: Vec<u8> = Vec::new();
        let mut followed = 0;
        while let Some(part) = rest.pop() {
            if part == b".." {
                found.truncate(split_at(&found));
                continue;
            }
            let next = join(&found, &part);
            let Some(target) = self.links.get(&next) else {
                found = next;
                continue;
            };
            followed += 1;
            if followed > MOST_LINKS {
                return Err(TreeError::Loop { path: text(path) });
            }
            if target.starts_with(b"/") {
                found.clear();
            }
            rest.extend(split(target));
        }
        Ok(found)
    }

    fn remove(&mut self, path: &[u8]) {
        self.nodes.remove(path);
        self.links.remove(path);
        self.remove_below(path);
    }

    fn remove_below(&mut self, path: &[u8]) {
        fn below<T>(map: &BTreeMap<Vec<u8>, T>, path: &[u8]) -> Vec<Vec<u8>> {
            let start = if path.is_empty() {
                Vec::new()
            } else {
                [path, b"/"].concat()
            };
            let range = (Bound::Excluded(start.clone()), Bound::Unbounded);
            let all = map.range(range).map(|(path, _)| path);
            all.take_while(|path| path.starts_with(&start))
                .cloned()
                .collect()
        }
        for path in below(&self.nodes, path) {
            self.nodes.remove(&path);
        }
        for path in below(&self.links, path) {
            self.links.remove(&path);
        }
    }
}

/// A path's directory and its last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let at = split_at(path);
    let name = &path[at..];
    (&path[..at], name.strip_prefix(b"/").unwrap_or(name))
}

/// Where a path's directory ends.
fn split_at(path: &[u8]) -> usize {
    path.iter().rposition(|byte| *byte == b'/').unwrap_or(0)
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() || name.is_empty() {
        return [directory, name].concat();
    }
    [directory, b"/", name].concat()
}
