//! An image in a local OCI layout (image-spec, image-layout.md), as one tar archive: a guest's root.
//!
//! | file | what it does |
//! | --- | --- |
//! | `oci/layout.rs` | finds the image of a layout, and reads blobs whose digests it verifies |
//! | `oci/layer.rs` | reads the tar archive of a layer |
//! | `oci/tree.rs` | applies the layers to each other: whiteouts, opaque directories, hard links |
//! | `oci/archive.rs` | writes what is left of them as one archive |
//!
//! Nothing is unpacked on the host. The layers are read twice: for what is in them, and for the contents of the files that are left.
//! Who made the layout is not trusted: all paths stay within the root, and whatever is kept in memory has a limit.

mod archive;
mod layer;
mod layout;
#[cfg(test)]
mod tests;
mod tree;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use self::layer::{Layer, LayerError};
pub use self::layout::LayoutError;
use self::layout::{Blob, Layout};
use self::tree::{Tree, TreeError};

/// Why an image cannot be a root.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The layout is not one, or does not have it.
    #[error("cannot use the OCI layout {layout:?}")]
    Layout {
        /// The directory.
        layout: PathBuf,
        /// Why.
        source: LayoutError,
    },
    /// A layer is no archive that a root can be made of.
    #[error("cannot use the layer {digest} of the image")]
    Layer {
        /// Its digest.
        digest: String,
        /// Why.
        source: LayerError,
    },
    /// A layer cannot be applied to those below.
    #[error("cannot apply the layer {digest} of the image")]
    Apply {
        /// Its digest.
        digest: String,
        /// Why.
        source: TreeError,
    },
    /// A layer cannot be read again, or the archive cannot be written.
    #[error("cannot copy the image's files")]
    Write(#[source] io::Error),
}

/// What an image says of the commands that run in it (image-spec, config.md).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// `NAME=VALUE`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// What a command is appended to.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The command, if there is no other.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Where it starts; the root directory if it is empty.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// `USER[:GROUP]`; root if it is empty.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
}

/// null is as good as nothing.
fn or_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de> + Default,
{
    let value: Option<T> = serde::Deserialize::deserialize(from)?;
    Ok(value.unwrap_or_default())
}

impl ImageConfig {
    /// What runs, as docker has it: the entry point with the user's command, or with the image's own.
    pub fn command(&self, own: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let bytes = |words: &[String]| words.iter().map(|word| word.clone().into_bytes()).collect();
        let command = if own.is_empty() {
            bytes(&self.cmd)
        } else {
            own
        };
        let entrypoint: Vec<Vec<u8>> = bytes(&self.entrypoint);
        entrypoint.into_iter().chain(command).collect()
    }
}

/// An image whose layers have been read.
#[derive(Debug)]
pub struct Image {
    /// What it says of its commands.
    pub config: ImageConfig,
    layers: Vec<(Blob, Layer)>,
    tree: Tree,
}

impl Image {
    /// Reads the image with this tag, or the only one, of a layout.
    ///
    /// # Errors
    ///
    /// See [`OciError`].
    pub fn open(layout: &Path, tag: Option<&str>) -> Result<Self, OciError> {
        let failed = |source| OciError::Layout {
            layout: layout.to_owned(),
            source,
        };
        let (config, blobs) = Layout::new(layout).image(tag).map_err(failed)?;
        let layers = read_all(&blobs)?;
        let mut tree = Tree::default();
        for (n, (layer, blob)) in layers.iter().zip(&blobs).enumerate() {
            tree.apply(n, layer).map_err(|source| OciError::Apply {
                digest: blob.digest.clone(),
                source,
            })?;
        }
        Ok(Self {
            config,
            layers: blobs.into_iter().zip(layers).collect(),
            tree,
        })
    }

    /// How many bytes its files have, which will be in the guest's memory.
    pub fn size(&self) -> u64 {
        self.tree.size()
    }

    /// Writes its files as one tar archive, whose names are relative.
    ///
    /// # Errors
    ///
    /// [`OciError::Write`].
    pub fn write(&self, to: impl Write) -> Result<(), OciError> {
        archive::write(&self.tree, &self.layers, to).map_err(OciError::Write)
    }
}

/// Reads the layers, in as many threads as there are CPUs.
fn read_all(blobs: &[Blob]) -> Result<Vec<Layer>, OciError> {
    let next = AtomicUsize::new(0);
    let all = Mutex::new(Vec::with_capacity(blobs.len()));
    let work = || {
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(blob) = blobs.get(n) else { return };
            let layer = blob.verify().and_then(|()| Layer::read(blob));
            let layer = layer.map_err(|source| OciError::Layer {
                digest: blob.digest.clone(),
                source,
            });
            let mut all = all
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            all.push((n, layer));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 1..threads.min(blobs.len()) {
            // This thread does the work of one that cannot be started.
            let _ = thread::Builder::new()
                .name("layers".into())
                .spawn_scoped(scope, work);
        }
        work();
    });
    let mut all = all
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    all.sort_by_key(|(n, _)| *n);
    all.into_iter().map(|(_, layer)| layer).collect()
}
