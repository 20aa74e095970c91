//! The index, the manifests, the config and the blobs of a layout.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::ImageConfig;
use super::layer::LayerError;

/// The most bytes of a document: registries take no larger manifests (distribution-spec).
const LONGEST: u64 = 4 << 20;
/// How deep indexes are nested at most.
const DEEPEST: u32 = 4;
/// The most layers: docker has 127.
const MOST_LAYERS: usize = 512;
/// A manifest's annotation with its tag (image-spec, annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Why a layout has no image for a guest.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file of it cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A document is of another form.
    #[error("{path:?} is no {what}")]
    Form {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// Why it is not.
        source: serde_json::Error,
    },
    /// A digest that is none, or of another algorithm.
    #[error("the digest {0:?} is not sha256: and 64 hexadecimal digits")]
    Digest(String),
    /// A blob is not what its digest says.
    #[error("the blob {0} is damaged: its digest is another, or its size")]
    Damaged(String),
    /// It has no image with this tag.
    #[error("it has no image {}: its tags are {}", wanted(.tag.as_deref()), listed(.tags))]
    NoTag {
        /// The tag that was asked for.
        tag: Option<String>,
        /// Those that are there.
        tags: BTreeSet<String>,
    },
    /// There is more than one image.
    #[error("it has several images: name one of the tags {}", listed(.0))]
    Several(BTreeSet<String>),
    /// The image is for other machines.
    #[error("the image is for {0}, and guests are linux/amd64")]
    Platform(String),
    /// It does not end.
    #[error("it has indexes in indexes, or more than {MOST_LAYERS} layers")]
    Deep,
}

fn wanted(tag: Option<&str>) -> String {
    tag.map_or("for linux/amd64".into(), |tag| format!("{tag:?}"))
}

fn listed(tags: &BTreeSet<String>) -> String {
    let tags: Vec<_> = tags.iter().map(|tag| format!("{tag:?}")).collect();
    if tags.is_empty() {
        return "none".into();
    }
    tags.join(", ")
}

/// An index, or a manifest: which one is seen by what it has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Document {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

/// The config of an image, as far as it is used here.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default)]
    config: Option<ImageConfig>,
}

impl Descriptor {
    fn tag(&self) -> Option<&str> {
        Some(self.annotations.as_ref()?.get(REF_NAME)?)
    }

    /// Whether it can be ours. An entry without a platform is looked into.
    fn may_be_ours(&self) -> bool {
        self.platform.as_ref().is_none_or(Platform::is_ours)
    }
}

/// A layer's file.
#[derive(Debug)]
pub struct Blob {
    /// Its digest, in its only form.
    pub digest: String,
    size: u64,
    file: File,
}

impl Blob {
    /// Reads it from its beginning.
    pub fn reader(&self) -> BufReader<impl Read> {
        BufReader::with_capacity(
            1 << 18,
            From {
                file: &self.file,
                at: 0,
            },
        )
    }

    /// Reads all of it, and compares it to its digest.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is another.
    pub fn verify(&self) -> Result<(), LayerError> {
        let mut hash = Sha256::new();
        let mut bytes = self.reader().take(self.size.saturating_add(1));
        let size = io::copy(&mut bytes, &mut Hasher(&mut hash))?;
        match size == self.size && is_digest(&self.digest, hash) {
            true => Ok(()),
            false => Err(LayerError::Damaged),
        }
    }
}

fn is_digest(digest: &str, hash: Sha256) -> bool {
    let hex: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    digest.strip_prefix("sha256:") == Some(&hex)
}

/// A file from a place on. Others that read it are at places of their own.
struct From<'a> {
    file: &'a File,
    at: u64,
}

impl Read for From<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// What is written to it goes into the hash.
struct Hasher<'a>(&'a mut Sha256);

impl io::Write for Hasher<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A layout's directory.
#[derive(Debug)]
pub struct Layout<'a> {
    path: &'a Path,
}

impl<'a> Layout<'a> {
    /// The layout in a directory.
    pub fn new(path: &'a Path) -> Self {
        Self { path }
    }

    /// The config and the layers, from the lowest on, of the image with this tag, or of the only one.
    ///
    /// # Errors
    ///
    /// See [`LayoutError`].
    pub fn image(&self, tag: Option<&str>) -> Result<(ImageConfig, Vec<Blob>), LayoutError> {
        let path = self.path.join("index.json");
        let bytes = read(&path)?;
        let index: Document = parse(&path, &bytes, "index of an OCI layout")?;
        let entries = index.manifests.unwrap_or_default();
        let named: Vec<_> = entries
            .iter()
            .filter(|entry| tag.is_none() || entry.tag() == tag)
            .cloned()
            .collect();
        let tags = || {
            entries
                .iter()
                .filter_map(Descriptor::tag)
                .map(str::to_owned)
                .collect()
        };
        let manifest = match self.choose(named, DEEPEST)? {
            Choice::One(manifest) => manifest,
            Choice::Several => return Err(LayoutError::Several(tags())),
            Choice::None => {
                let tag = tag.map(str::to_owned);
                return Err(LayoutError::NoTag { tag, tags: tags() });
            }
        };
        let (Some(config), Some(layers)) = (manifest.config, manifest.layers) else {
            let source = serde::de::Error::custom("it has neither manifests nor layers");
            let what = "manifest of an image";
            return Err(LayoutError::Form { path, what, source });
        };
        if layers.len() > MOST_LAYERS {
            return Err(LayoutError::Deep);
        }
        let config = self.config(&config)?;
        let layers = layers.iter().map(|layer| self.blob(layer));
        Ok((config, layers.collect::<Result<_, _>>()?))
    }

    /// The one image of these entries that is for our platform.
    fn choose(&self, entries: Vec<Descriptor>, depth: u32) -> Result<Choice, LayoutError> {
        let depth = depth.checked_sub(1).ok_or(LayoutError::Deep)?;
        let mut ours: Vec<_> = entries
            .into_iter()
            .filter(Descriptor::may_be_ours)
            .collect();
        // One that says that it is ours is preferred to what may be anything, such as a signature.
        if ours.iter().any(|entry| entry.platform.is_some()) {
            ours.retain(|entry| entry.platform.is_some());
        }
        // The same image may have several tags.
        ours.sort_by(|a, b| a.digest.cmp(&b.digest));
        ours.dedup_by(|a, b| a.digest == b.digest);
        let entry = match &ours[..] {
            [] => return Ok(Choice::None),
            [entry] => entry,
            _ => return Ok(Choice::Several),
        };
        let document: Document = self.document(entry, "manifest or index")?;
        match document.manifests {
            Some(entries) => self.choose(entries, depth),
            None => Ok(Choice::One(document)),
        }
    }

    fn config(&self, descriptor: &Descriptor) -> Result<ImageConfig, LayoutError> {
        let config: Config = self.document(descriptor, "config of an image")?;
        if !config.platform.is_ours() {
            let Platform { os, architecture } = config.platform;
            return Err(LayoutError::Platform(format!("{os}/{architecture}")));
        }
        Ok(config.config.unwrap_or_default())
    }

    /// The file of a digest, which becomes a part of a path.
    fn path_of(&self, digest: &str) -> Result<PathBuf, LayoutError> {
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let is_digest = |hex: &&str| hex.len() == 64 && hex.bytes().all(is_hex);
        let hex = digest.strip_prefix("sha256:").filter(is_digest);
        let hex = hex.ok_or_else(|| LayoutError::Digest(digest.to_owned()))?;
        Ok(self.path.join("blobs/sha256").join(hex))
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Blob, LayoutError> {
        let path = self.path_of(&descriptor.digest)?;
        let file = open(&path).map_err(|source| LayoutError::Read { path, source })?;
        Ok(Blob {
            digest: descriptor.digest.clone(),
            size: descriptor.size,
            file,
        })
    }

    fn document<T: DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
        what: &'static str,
    ) -> Result<T, LayoutError> {
        let Descriptor { digest, size, .. } = descriptor;
        let path = self.path_of(digest)?;
        let bytes = read(&path)?;
        let mut hash = Sha256::new();
        hash.update(&bytes);
        if bytes.len() as u64 != *size || !is_digest(digest, hash) {
            return Err(LayoutError::Damaged(digest.clone()));
        }
        parse(&path, &bytes, what)
    }
}

enum Choice {
    One(Document),
    Several,
    None,
}

fn open(path: &Path) -> io::Result<File> {
    // Opening a FIFO would wait.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    File::open(path)
}

fn read(path: &Path) -> Result<Vec<u8>, LayoutError> {
    let read = || {
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?
            .take(LONGEST + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LONGEST {
            return Err(io::Error::other(format!(
                "it has more than {} MiB",
                LONGEST >> 20
            )));
        }
        Ok(bytes)
    };
    read().map_err(|source| LayoutError::Read {
        path: path.to_owned(),
        source,
    })
}

fn parse<T: DeserializeOwned>(
    path: &Path,
    bytes: &[u8],
    what: &'static str,
) -> Result<T, LayoutError> {
    serde_json::from_slice(bytes).map_err(|source| LayoutError::Form {
        path: path.to_owned(),
        what,
        source,
    })
}
