//! Layouts that are made here, by the crate that reads them, and what comes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;

use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Archive, Builder, EntryType, Header};

use super::*;

/// A layout in a directory of its own.
struct Made(tempfile::TempDir);

/// How a layer is packed.
#[derive(Clone, Copy, Debug)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    fn pack(self, bytes: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Plain => bytes,
            Self::Gzip => {
                let level = flate2::Compression::fast();
                let mut to = flate2::write::GzEncoder::new(Vec::new(), level);
                to.write_all(&bytes).unwrap();
                to.finish().unwrap()
            }
            Self::Zstd => {
                use ruzstd::encoding::{CompressionLevel, compress_to_vec};
                compress_to_vec(&bytes[..], CompressionLevel::Fastest)
            }
        }
    }
}

impl Made {
    fn new() -> Self {
        let made = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(made.0.path().join("blobs/sha256")).unwrap();
        made
    }

    /// Adds a blob; its descriptor.
    fn blob(&self, bytes: &[u8]) -> Value {
        let hex: String = Sha256::digest(bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        fs::write(self.0.path().join("blobs/sha256").join(&hex), bytes).unwrap();
        json!({ "digest": format!("sha256:{hex}"), "size": bytes.len() })
    }

    fn document(&self, value: &Value) -> Value {
        self.blob(value.to_string().as_bytes())
    }

    /// Adds an image of these layers; its manifest's descriptor.
    fn image(&self, layers: &[Vec<u8>], config: Value) -> Value {
        let config = json!({ "os": "linux", "architecture": "amd64", "config": config });
        let layers: Vec<_> = layers.iter().map(|layer| self.blob(layer)).collect();
        self.document(&json!({ "config": self.document(&config), "layers": layers }))
    }

    fn index(&self, manifests: Value) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(self.0.path().join("index.json"), index.to_string()).unwrap();
    }

    fn open(&self, tag: Option<&str>) -> Result<Image, OciError> {
        Image::open(self.0.path(), tag)
    }

    /// The only image, of these layers.
    fn of(layers: &[Vec<u8>]) -> Result<Image, OciError> {
        let made = Self::new();
        made.index(json!([made.image(layers, Value::Null)]));
        made.open(None)
    }
}

/// The words of an error and of all that is behind it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// A tar archive from short descriptions: `DIR/`, `FILE=CONTENTS`, `LINK->TARGET`, `NAME==HARD LINK'S TARGET`.
fn layer(entries: &[&str]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(0);
        let mut contents = "";
        let name = if let Some((name, target)) = entry.split_once("==") {
            header.set_entry_type(EntryType::Link);
            header.set_link_name(target).unwrap();
            name
        } else if let Some((name, target)) = entry.split_once("->") {
            header.set_entry_type(EntryType::Symlink);
            header.set_link_name(target).unwrap();
            name
        } else if let Some((name, text)) = entry.split_once('=') {
            header.set_size(text.len() as u64);
            contents = text;
            name
        } else if entry.ends_with('/') {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(0o750);
            entry
        } else {
            entry
        };
        // Not by set_path(), which refuses some of these.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        archive.append(&header, contents.as_bytes()).unwrap();
    }
    archive.into_inner().unwrap()
}

/// The archive of an image in the same descriptions, sorted.
fn files(image: &Image) -> Vec<String> {
    let mut bytes = Vec::new();
    image.write(&mut bytes).unwrap();
    let mut all = Vec::new();
    for entry in Archive::new(&bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let path = path.strip_prefix("./").unwrap_or(&path).to_owned();
        let link = entry.link_name_bytes().map(|link| link.into_owned());
        let link = String::from_utf8(link.unwrap_or_default()).unwrap();
        all.push(match entry.header().entry_type() {
            EntryType::Directory => format!("{}/", path.trim_end_matches('/')),
            EntryType::Symlink => format!("{path}->{link}"),
            EntryType::Link => format!("{path}=={link}"),
            _ => {
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                format!("{path}={text}")
            }
        });
    }
    all.sort();
    all
}

#[test]
fn layers_are_merged_however_they_are_packed() {
    let lower = layer(&[
        "./",
        "bin/",
        "bin/sh=shell",
        "etc/",
        "etc/passwd=root",
        "etc/old/",
        "etc/old/a=1",
        "etc/old/b/c=2",
        "opt/",
        "opt/x=1",
        "opt/y/z=2",
        "usr/was-file=x",
        "usr/was-dir/",
        "usr/was-dir/inside=x",
        "lib->usr/lib",
    ]);
    let upper = layer(&[
        "etc/",
        "etc/.wh.passwd",
        "etc/.wh.old",
        "etc/old/",
        "etc/old/new=3",
        "opt/",
        "opt/.wh..wh..opq",
        "opt/y/",
        "usr/was-file/",
        "usr/was-file/now=dir",
        "usr/was-dir=file",
        "bin/.wh.none",
        "bin/.wh..wh.aufs",
    ]);
    let packings = [Packing::Plain, Packing::Gzip, Packing::Zstd];
    for (a, b) in packings.iter().zip(packings.iter().rev()) {
        let image = Made::of(&[a.pack(lower.clone()), b.pack(upper.clone())]).unwrap();
        assert_eq!(
            files(&image),
            [
                "/",
                "bin/",
                "bin/sh=shell",
                "etc/",
                "etc/old/",
                "etc/old/new=3",
                "lib->usr/lib",
                "opt/",
                "opt/y/",
                "usr/",
                "usr/was-dir=file",
                "usr/was-file/",
                "usr/was-file/now=dir",
            ],
            "{a:?}"
        );
        assert_eq!(image.size(), "shell".len() as u64 + 1 + 4 + 3);
    }
}

#[test]
fn hard_links_keep_what_they_lead_to_when_that_is_hidden() {
    let lower = layer(&["a=data", "b==a", "c/d==./b", "s->a", "t==s"]);
    let image = Made::of(std::slice::from_ref(&lower)).unwrap();
    let all = ["a=data", "b==a", "c/", "c/d==a", "s->a", "t==s"];
    assert_eq!(files(&image), all);
    assert_eq!(image.size(), 4);
    let image = Made::of(&[lower.clone(), layer(&[".wh.a", "e==b", ".wh.s"])]).unwrap();
    assert_eq!(files(&image), ["b=data", "c/", "c/d==b", "e==b", "t->a"]);
    let image = Made::of(&[lower, layer(&["b=other", "a==a"])]).unwrap();
    assert_eq!(
        files(&image),
        ["a=data", "b=other", "c/", "c/d==a", "s->a", "t==s"]
    );
}

#[test]
fn paths_through_symbolic_links_stay_within_the_root() {
    let lower = layer(&[
        "usr/bin/",
        "bin->usr/bin",
        "up->../../../usr",
        "abs->/usr/bin",
    ]);
    let upper = layer(&["bin/a=1", "up/b=2", "abs/c=3", "usr/bin/gone=4"]);
    let top = layer(&["bin/.wh.gone", "up/bin/d=5"]);
    let image = Made::of(&[lower, upper, top]).unwrap();
    let found = files(&image);
    for file in ["usr/bin/a=1", "usr/b=2", "usr/bin/c=3", "usr/bin/d=5"] {
        assert!(found.iter().any(|other| other == file), "{file}: {found:?}");
    }
    assert_eq!(found.len(), 2 + 3 + 4, "{found:?}");
}

#[test]
fn names_owners_and_attributes_survive() {
    let (long, target) = (format!("d/{}", "n".repeat(250)), "t".repeat(300));
    let mut archive = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o4755);
    header.set_uid(1000);
    header.set_gid(3_000_000);
    header.set_mtime(1_700_000_000);
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 10];
    let pax = [
        ("SCHILY.xattr.security.capability", capability),
        ("mtime", b"17.5"),
    ];
    archive.append_pax_extensions(pax).unwrap();
    archive
        .append_data(&mut header, &long, &b"data"[..])
        .unwrap();
    header.set_size(0);
    header.set_entry_type(EntryType::Symlink);
    archive.append_link(&mut header, "link", &target).unwrap();
    let mut device = Header::new_ustar();
    device.set_entry_type(EntryType::Char);
    device.set_size(0);
    device.set_mode(0o666);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    archive
        .append_data(&mut device, "dev/null", io::empty())
        .unwrap();

    let image = Made::of(&[archive.into_inner().unwrap()]).unwrap();
    let mut bytes = Vec::new();
    image.write(&mut bytes).unwrap();
    let mut seen = 0;
    for entry in Archive::new(&bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let header = entry.header().clone();
        let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        if path == long {
            seen += 1;
            let numbers = (
                header.uid().unwrap(),
                header.gid().unwrap(),
                header.mtime().unwrap(),
            );
            assert_eq!(numbers, (1000, 3_000_000, 17));
            assert_eq!(header.mode().unwrap(), 0o4755);
            let at = bytes
                .windows(capability.len())
                .filter(|window| *window == capability);
            assert_eq!(at.count(), 1);
            let mut data = String::new();
            entry.read_to_string(&mut data).unwrap();
            assert_eq!(data, "data");
        } else if path == "link" {
            seen += 1;
            assert_eq!(entry.link_name_bytes().unwrap(), target.as_bytes());
        } else if path == "dev/null" {
            seen += 1;
            let device = (
                header.device_major().unwrap(),
                header.device_minor().unwrap(),
            );
            assert_eq!(device, (Some(1), Some(3)));
        }
    }
    assert_eq!(seen, 3);
}

#[test]
fn layers_that_would_leave_the_root_or_never_end_are_refused() {
    for (entries, part) in [
        (&["../etc/passwd=x"][..], "../etc/passwd"),
        (&["a/../../b=x"], "a/../../b"),
        (&["a==../../etc/shadow"], "../../etc/shadow"),
        (&["a==b"], "hard link to \"b\", which is not there"),
        (&["d/", "a==d"], "hard link to \"d\""),
        (&["a=x", "a/b=y"], "below what is no directory"),
        (&["a->b", "b->a", "a/c=x"], "more than 40 symbolic links"),
        (&[".=x"], "no directory"),
    ] {
        let error = chain(&Made::of(&[layer(entries)]).unwrap_err());
        assert!(error.contains(part), "{entries:?}: {error}");
        assert!(error.contains("sha256:"), "{error}");
    }
    let mut long = Header::new_gnu();
    long.set_entry_type(EntryType::GNULongName);
    long.set_size(1 << 40);
    long.set_cksum();
    let mut sparse = long.clone();
    sparse.set_entry_type(EntryType::GNUSparse);
    sparse.set_size(0);
    sparse.set_cksum();
    let sized = {
        let mut archive = Builder::new(Vec::new());
        archive
            .append_pax_extensions([("size", &b"99999999999"[..])])
            .unwrap();
        [
            archive.into_inner().unwrap()[..1024].to_vec(),
            layer(&["a=x"]),
        ]
        .concat()
    };
    for bytes in [
        long.as_bytes().to_vec(),
        sparse.as_bytes().to_vec(),
        sized,
        b"no archive".repeat(100),
        layer(&["a=x"])[..700].to_vec(),
        Packing::Gzip.pack(layer(&["a=x"]))[..40].to_vec(),
    ] {
        let error = Made::of(&[bytes]).unwrap_err();
        assert!(matches!(error, OciError::Layer { .. }), "{error:?}");
    }
}

#[test]
fn layouts_that_lie_about_their_blobs_are_refused() {
    let open = |descriptor: Value| {
        let made = Made::new();
        let good = made.image(&[layer(&["a=x"])], Value::Null);
        let config = json!({ "os": "linux", "architecture": "amd64" });
        let config = made.document(&config);
        let manifest = json!({ "config": config, "layers": [descriptor] });
        made.index(json!([made.document(&manifest)]));
        let error = chain(&made.open(None).unwrap_err());
        made.index(json!([good]));
        made.open(None).unwrap();
        error
    };
    let zeros = format!("sha256:{}", "0".repeat(64));
    for (digest, part) in [
        ("sha256:../../../../etc/passwd", "is not sha256:"),
        ("sha256:", "is not sha256:"),
        ("sha512:00", "is not sha256:"),
        (&zeros.to_uppercase(), "is not sha256:"),
        (&zeros, "No such file"),
    ] {
        let error = open(json!({ "digest": digest, "size": 1 }));
        assert!(error.contains(part), "{digest}: {error}");
    }
    for (contents, size) in [(&b"other"[..], 5), (b"", 0), (&[0; 1024], 512)] {
        let made = Made::new();
        let image = made.image(&[layer(&["a=x"])], Value::Null);
        made.index(json!([image]));
        let mut blob = made.blob(b"this");
        blob["size"] = size.into();
        let hex = blob["digest"]
            .as_str()
            .unwrap()
            .strip_prefix("sha256:")
            .unwrap();
        fs::write(made.0.path().join("blobs/sha256").join(hex), contents).unwrap();
        let config = made.document(&json!({ "os": "linux", "architecture": "amd64" }));
        let manifest = json!({ "config": config, "layers": [blob] });
        made.index(json!([made.document(&manifest)]));
        let error = chain(&made.open(None).unwrap_err());
        assert!(error.contains("damaged"), "{error}");
    }
}

#[test]
fn image_is_chosen_by_tag_and_platform() {
    let made = Made::new();
    let image = |name: &str| made.image(&[layer(&[&format!("{name}=")])], Value::Null);
    let tagged = |mut descriptor: Value, tag: &str| {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        descriptor
    };
    let on = |mut descriptor: Value, os: &str, architecture: &str| {
        descriptor["platform"] = json!({ "os": os, "architecture": architecture });
        descriptor
    };
    let list = made.document(&json!({ "manifests": [
        on(image("arm"), "linux", "arm64"),
        on(image("amd"), "linux", "amd64"),
        on(image("signature"), "unknown", "unknown"),
    ] }));
    made.index(json!([
        tagged(image("one"), "1"),
        tagged(list.clone(), "all")
    ]));
    assert_eq!(files(&made.open(Some("1")).unwrap()), ["one="]);
    assert_eq!(files(&made.open(Some("all")).unwrap()), ["amd="]);
    for (tag, part) in [(None, "several images"), (Some("2"), "no image \"2\"")] {
        let error = chain(&made.open(tag).unwrap_err());
        assert!(
            error.contains(part) && error.contains("\"1\", \"all\""),
            "{error}"
        );
    }
    made.index(json!([list]));
    assert_eq!(files(&made.open(None).unwrap()), ["amd="]);
    made.index(json!([on(image("arm"), "linux", "arm64")]));
    let error = chain(&made.open(None).unwrap_err());
    assert!(error.contains("linux/amd64"), "{error}");
    let foreign = json!({ "os": "linux", "architecture": "arm64" });
    let manifest = json!({ "config": made.document(&foreign), "layers": [] });
    made.index(json!([made.document(&manifest)]));
    let error = chain(&made.open(None).unwrap_err());
    assert!(error.contains("linux/arm64"), "{error}");
    let mut nested = image("deep");
    for _ in 0..6 {
        nested = made.document(&json!({ "manifests": [nested] }));
    }
    made.index(json!([nested]));
    let error = chain(&made.open(None).unwrap_err());
    assert!(error.contains("indexes in indexes"), "{error}");
}

#[test]
fn layout_that_is_none_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let open = || chain(&Image::open(directory.path(), None).unwrap_err());
    assert!(open().contains("index.json"));
    fs::write(directory.path().join("index.json"), "[1").unwrap();
    assert!(open().contains("is no index"));
    fs::remove_file(directory.path().join("index.json")).unwrap();
    let fifo = directory.path().join("index.json");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).unwrap();
    assert!(open().contains("no regular file"));
}

#[test]
fn config_says_what_runs_as_docker_has_it() {
    let made = Made::new();
    let config = json!({
        "Env": ["PATH=/bin", "A=1"], "Entrypoint": ["/entry", "-x"], "Cmd": ["one", "two"],
        "WorkingDir": "/srv", "User": "1000:10", "Labels": null,
    });
    made.index(json!([made.image(&[], config)]));
    let config = made.open(None).unwrap().config;
    assert_eq!(config.env, ["PATH=/bin", "A=1"]);
    assert_eq!((&*config.working_dir, &*config.user), ("/srv", "1000:10"));
    let command = |own: &[&str]| {
        let own = own.iter().map(|word| word.as_bytes().to_vec()).collect();
        let words = config.command(own);
        let words: Vec<_> = words
            .iter()
            .map(|word| String::from_utf8_lossy(word))
            .collect();
        words.join(" ")
    };
    assert_eq!(command(&[]), "/entry -x one two");
    assert_eq!(command(&["three"]), "/entry -x three");
    made.index(json!(
        [made.image(&[], json!({ "Cmd": null, "Env": null }))]
    ));
    assert_eq!(made.open(None).unwrap().config, ImageConfig::default());
}

/// Descriptions of entries in a small world, in which they meet.
fn entry() -> impl Strategy<Value = String> {
    let path = proptest::collection::vec(prop_oneof!["[abc]", "[abc]"], 1..4);
    let path = path.prop_map(|parts| parts.join("/"));
    (path.clone(), path, 0..7).prop_map(|(path, other, kind)| {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        let slash = if parent.is_empty() { "" } else { "/" };
        match kind {
            0 => format!("{path}/"),
            1 => format!("{path}->/{other}"),
            2 => format!("{path}=={other}"),
            3 => format!("{parent}{slash}.wh.{name}"),
            4 => format!("{parent}{slash}.wh..wh..opq"),
            _ => format!("{path}={other}"),
        }
    })
}

proptest! {
    #[test]
    fn archive_of_any_layers_can_be_unpacked(
        layers in proptest::collection::vec(proptest::collection::vec(entry(), 0..12), 1..4)
    ) {
        let layers: Vec<_> = layers
            .iter()
            .map(|entries| layer(&entries.iter().map(String::as_str).collect::<Vec<_>>()))
            .collect();
        let Ok(image) = Made::of(&layers) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        image.write(&mut bytes).unwrap();
        let (mut names, mut directories) = (BTreeMap::new(), BTreeSet::from([String::new()]));
        for entry in Archive::new(&bytes[..]).entries().unwrap() {
            let entry = entry.unwrap();
            let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let path = path.trim_start_matches("./").trim_end_matches('/').to_owned();
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            prop_assert!(directories.contains(parent), "{path} before its directory");
            let kind = entry.header().entry_type();
            if kind.is_dir() {
                directories.insert(path.clone());
            }
            if kind.is_hard_link() {
                let target = entry.link_name_bytes().unwrap().into_owned();
                let target = String::from_utf8(target).unwrap();
                prop_assert!(names.contains_key(&target), "{path} before {target}");
            }
            prop_assert!(!path.contains(".wh."));
            let is_new = names.insert(path.clone(), kind).is_none();
            prop_assert!(is_new, "{path} twice");
        }
    }
}
