use super::*;

/// The header of a disk of 1 GiB with clusters of 64 KiB, version 3, and a backing file.
fn valid() -> Vec<u8> {
    let mut bytes = vec![0; MAX_HEADER];
    put(&mut bytes, 0, &MAGIC.to_be_bytes());
    put(&mut bytes, 4, &3u32.to_be_bytes());
    put(&mut bytes, 8, &512u64.to_be_bytes());
    put(&mut bytes, 16, &8u32.to_be_bytes());
    put(&mut bytes, 20, &16u32.to_be_bytes());
    put(&mut bytes, 24, &(1u64 << 30).to_be_bytes());
    put(&mut bytes, 36, &2u32.to_be_bytes());
    put(&mut bytes, 40, &0x3_0000u64.to_be_bytes());
    put(&mut bytes, 48, &0x1_0000u64.to_be_bytes());
    put(&mut bytes, 56, &1u32.to_be_bytes());
    put(&mut bytes, 96, &4u32.to_be_bytes());
    put(&mut bytes, 100, &104u32.to_be_bytes());
    put(&mut bytes, 104, &EXTENSION_BACKING_FORMAT.to_be_bytes());
    put(&mut bytes, 108, &3u32.to_be_bytes());
    put(&mut bytes, 112, b"raw");
    put(&mut bytes, 512, b"base.img");
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
    Header::parse(bytes, bytes.len())
}

#[test]
fn valid_header_is_read() {
    let header = parse(&valid()).unwrap();
    assert_eq!(header.size, 1 << 30);
    assert_eq!(header.cluster_size(), 65536);
    assert_eq!(header.bytes_of_l2_table(), 512 << 20);
    let backing = header.backing.unwrap();
    assert_eq!(backing.path.to_str(), Some("base.img"));
    assert_eq!(backing.format.as_deref(), Some("raw"));
}

#[test]
fn backing_format_of_version_2_is_read() {
    let mut bytes = valid();
    put(&mut bytes, 4, &2u32.to_be_bytes());
    bytes[72..128].fill(0);
    put(&mut bytes, 72, &EXTENSION_BACKING_FORMAT.to_be_bytes());
    put(&mut bytes, 76, &5u32.to_be_bytes());
    put(&mut bytes, 80, b"qcow2");
    let format = |bytes: &[u8]| parse(bytes).unwrap().backing.unwrap().format;
    assert_eq!(format(&bytes).as_deref(), Some("qcow2"));
    // The name ends the extensions.
    put(&mut bytes, 8, &72u64.to_be_bytes());
    put(&mut bytes, 72, b"base.img");
    assert_eq!(format(&bytes), None);
}

/// What is wrong, the number at an offset in the header that makes it so, the error.
type Case = (usize, Vec<u8>, fn(&HeaderError) -> bool);

#[test]
fn each_bad_field_is_refused() {
    use HeaderError as E;
    let long = |number: u64| number.to_be_bytes().to_vec();
    let short = |number: u32| number.to_be_bytes().to_vec();
    let cases: Vec<Case> = vec![
        (0, short(0x4d5a), |e| matches!(e, E::Magic)),
        (4, short(1), |e| matches!(e, E::Version(1))),
        (4, short(4), |e| matches!(e, E::Version(4))),
        (8, long(65530), |e| matches!(e, E::Damaged(_))),
        (8, long(u64::MAX), |e| matches!(e, E::Damaged(_))),
        (16, short(1024), |e| matches!(e, E::Damaged(_))),
        (16, short(0), |e| matches!(e, E::Damaged(_))),
        (20, short(8), |e| matches!(e, E::Damaged(_))),
        (20, short(22), |e| matches!(e, E::Damaged(_))),
        (24, long(0), |e| matches!(e, E::Size(0))),
        (24, long(513), |e| matches!(e, E::Size(513))),
        (24, long(1 << 60), |e| matches!(e, E::Damaged(_))),
        (32, short(1), |e| matches!(e, E::Encrypted)),
        (32, short(2), |e| matches!(e, E::Encrypted)),
        (36, short(1), |e| matches!(e, E::Damaged(_))),
        (36, short(u32::MAX), |e| matches!(e, E::Memory(_))),
        (40, long(0), |e| matches!(e, E::Damaged(_))),
        (40, long(513), |e| matches!(e, E::Damaged(_))),
        (48, long(0), |e| matches!(e, E::Damaged(_))),
        (48, long(1 << 60), |e| matches!(e, E::Damaged(_))),
        (56, short(0), |e| matches!(e, E::Damaged(_))),
        (56, short(u32::MAX), |e| matches!(e, E::Memory(_))),
        (72, long(1), |e| matches!(e, E::Dirty)),
        (72, long(2), |e| matches!(e, E::Corrupt)),
        (72, long(4), |e| matches!(e, E::ExternalData)),
        (72, long(8), |e| matches!(e, E::Compression)),
        (72, long(16), |e| matches!(e, E::ExtendedL2)),
        (
            72,
            long(1 << 63),
            |e| matches!(e, E::Unknown(bits) if *bits == 1 << 63),
        ),
        (96, short(7), |e| matches!(e, E::Damaged(_))),
        (100, short(96), |e| matches!(e, E::Damaged(_))),
        (100, short(105), |e| matches!(e, E::Damaged(_))),
        (100, short(u32::MAX - 7), |e| matches!(e, E::Damaged(_))),
        (104, short(EXTENSION_FEATURE_NAMES), |e| {
            matches!(e, E::Damaged(_))
        }),
        (108, short(u32::MAX), |e| matches!(e, E::Damaged(_))),
    ];
    for (at, value, is_expected) in cases {
        let mut bytes = valid();
        put(&mut bytes, at, &value);
        let error = parse(&bytes).unwrap_err();
        assert!(is_expected(&error), "{value:?} at {at}: {error:?}");
        let needs_none = matches!(error, E::Version(_));
        assert!(needs_none || error.remedy().is_some(), "{error:?}");
    }
}

#[test]
fn large_clusters_are_refused_where_their_tables_take_too_much_memory() {
    let mut bytes = valid();
    put(&mut bytes, 20, &21u32.to_be_bytes());
    put(&mut bytes, 40, &(4u64 << 20).to_be_bytes());
    put(&mut bytes, 48, &(2u64 << 20).to_be_bytes());
    let header = parse(&bytes).unwrap();
    assert!(header.memory(1) < 8 << 20);
    // 32 TiB have 64 L2 tables of 2 MiB.
    put(&mut bytes, 24, &(32u64 << 40).to_be_bytes());
    put(&mut bytes, 36, &64u32.to_be_bytes());
    assert!(matches!(parse(&bytes), Err(HeaderError::Memory(_))));
}

#[test]
fn refcount_blocks_are_as_many_as_the_file_can_have() {
    let header = parse(&valid()).unwrap();
    header.check_refblocks(1, 1 << 20).unwrap();
    header.check_refblocks(5, 10 << 30).unwrap();
    let error = header.check_refblocks(8192, 1 << 20).unwrap_err();
    assert!(matches!(error, HeaderError::Damaged(_)));
}

#[test]
fn disk_grows_as_far_as_its_l1_table_has_room() {
    let header = parse(&valid()).unwrap();
    let grown = header.grown(4 << 40).unwrap();
    assert_eq!((grown.size, grown.l1_entries), (4 << 40, 8192));
    assert!(header.grown((4 << 40) + 512).is_none());
    assert_eq!(header.grown((1 << 30) + 512).unwrap().l1_entries, 3);
}

proptest::proptest! {
    #[test]
    fn any_header_is_read_or_refused(
        changes in proptest::collection::vec((0..700usize, 0..=255u8), 1..12),
    ) {
        let mut bytes = valid();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Ok(header) = parse(&bytes) {
            assert!(header.memory(0) <= MAX_CACHES + MAX_TABLE);
        }
    }
}
