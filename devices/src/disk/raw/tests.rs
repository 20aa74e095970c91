use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use tempfile::NamedTempFile;

use super::*;

const MIB: usize = 1 << 20;

/// A file of this size whose bytes tell where they stand.
fn file(len: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&bytes(len), 0).unwrap();
    file
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 7 % 251) as u8).collect()
}

fn open(file: &NamedTempFile, flags: i32) -> io::Result<RawFile> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    RawFile::new(options.open(file.path())?)
}

/// The image by way of the page cache, and past it where the file system of the tests can do so.
fn images(file: &NamedTempFile) -> Vec<RawFile> {
    let images = [0, libc::O_DIRECT].map(|flags| open(file, flags).ok());
    images.into_iter().flatten().collect()
}

/// Calls with iovecs for `bytes`, from `skip` on and cut into pieces.
fn lend<T>(
    bytes: &mut [u8],
    (skip, piece): (usize, usize),
    call: impl FnOnce(Segments<'_>) -> T,
) -> T {
    let iovecs = crate::virtio::iovec::tests::iovecs(&mut bytes[skip..], piece);
    // SAFETY: the iovecs describe `bytes`, which nothing else refers to meanwhile.
    call(unsafe { Segments::new(&iovecs) })
}

#[test]
fn image_is_read_and_written_in_pieces_of_any_shape() {
    let file = file(2 * MIB);
    let mut expected = bytes(2 * MIB);
    for image in images(&file) {
        let block = image.blocks().logical as usize;
        // More than a page, a call, or a bounce buffer takes; aligned or not.
        for (offset, len, skip, piece) in [
            (0, block, 0, block),
            (4096, 8192, 1, 4096),
            (block as u64, MIB, 0, 65_536),
            (MIB as u64, MIB, 3, 700),
            (8192, 0, 1, 1),
        ] {
            let at = offset as usize;
            let mut got = vec![0; len + skip];
            lend(&mut got, (skip, piece), |into| image.read(offset, into)).unwrap();
            assert!(got[skip..] == expected[at..at + len], "{offset} {len}");
            let mut new: Vec<u8> = got.iter().map(|byte| byte ^ 0x5a).collect();
            lend(&mut new, (skip, piece), |from| image.write(offset, from)).unwrap();
            expected[at..at + len].copy_from_slice(&new[skip..]);
            let durably = |from: Segments<'_>| image.write_with(offset, from, true);
            lend(&mut new, (skip, piece), durably).unwrap();
        }
        image.flush().unwrap();
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}

#[test]
fn buffers_that_the_kernel_refuses_past_the_page_cache_are_known() {
    let file = file(4096);
    let Ok(image) = open(&file, libc::O_DIRECT) else {
        return;
    };
    assert!(image.is_direct());
    let mut buffer = vec![0; 3 * 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let page = &mut buffer[start..start + 4096];
    assert!(lend(page, (0, 4096), |page| image.takes(page)));
    assert!(!lend(page, (1, 4096), |page| image.takes(page)));
    assert!(!open(&file, 0).unwrap().is_direct());
}

#[test]
fn file_that_became_shorter_is_an_error() {
    let file = file(8192);
    for image in images(&file) {
        file.as_file().set_len(4096).unwrap();
        let mut got = vec![0; 8192];
        let error = lend(&mut got, (0, 8192), |into| image.read(0, into)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        file.as_file().set_len(8192).unwrap();
        lend(&mut got, (0, 8192), |into| image.read(0, into)).unwrap();
    }
}

#[test]
fn zeros_are_written_and_take_space_unless_they_may_not() {
    for (may_unmap, keeps_space) in [(false, true), (true, false)] {
        let file = file(MIB);
        for image in images(&file) {
            let before = file.as_file().metadata().unwrap().blocks();
            image.write_zeroes(4096, MIB as u64 / 2, may_unmap).unwrap();
            let got = std::fs::read(file.path()).unwrap();
            assert!(got[4096..4096 + MIB / 2].iter().all(|&byte| byte == 0));
            assert_eq!(got[..4096], bytes(4096));
            assert!(got[4096 + MIB / 2..] == bytes(MIB)[4096 + MIB / 2..]);
            file.as_file().sync_all().unwrap();
            if keeps_space {
                assert!(file.as_file().metadata().unwrap().blocks() >= before);
            }
        }
    }
}

#[test]
fn zeros_where_the_host_has_no_call_for_them_are_written() {
    let file = file(MIB);
    for image in images(&file) {
        let at = 3 * image.blocks().logical as usize;
        image.write_zeros(at as u64, MIB as u64 / 2).unwrap();
        let got = std::fs::read(file.path()).unwrap();
        let zeros = at..at + MIB / 2;
        assert!(got[zeros.clone()].iter().all(|&byte| byte == 0));
        assert!(got[zeros.end..] == bytes(MIB)[zeros.end..]);
    }
}

#[test]
fn discarded_range_gives_its_space_back() {
    let file = file(MIB);
    for image in images(&file) {
        image.write_zeroes(0, 8192, false).unwrap();
        file.as_file().sync_all().unwrap();
        let before = file.as_file().metadata().unwrap().blocks();
        image.discard(0, MIB as u64 / 2).unwrap();
        file.as_file().sync_all().unwrap();
        assert!(file.as_file().metadata().unwrap().blocks() <= before);
        assert_eq!(file.as_file().metadata().unwrap().size(), MIB as u64);
    }
}

#[test]
fn image_grows_and_follows_a_file_that_has_grown() {
    let file = file(4096);
    let image = open(&file, 0).unwrap();
    for (size, result) in [
        (8192, Ok(8192)),
        (8192, Ok(8192)),
        (4096, Err(io::ErrorKind::InvalidInput)),
        (8193, Err(io::ErrorKind::InvalidInput)),
    ] {
        let grown = image.grow(size).map(|()| image.size());
        assert_eq!(grown.map_err(|error| error.kind()), result, "{size}");
    }
    file.as_file().set_len(16_384).unwrap();
    assert_eq!(image.size(), 8192);
    image.grow(16_384).unwrap();
    assert_eq!(image.size(), 16_384);
}

#[test]
fn size_is_whole_sectors_and_other_files_are_refused() {
    let file = file(1000);
    assert_eq!(open(&file, 0).unwrap().size(), 512);
    let null = RawFile::new(File::open("/dev/null").unwrap());
    assert_eq!(null.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let directory = RawFile::new(File::open("/tmp").unwrap());
    assert_eq!(directory.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn iovecs_advance_to_any_byte() {
    let mut lent = bytes(100);
    let base = lent.as_ptr() as usize;
    for at in 0..=100 {
        let mut iovecs = crate::virtio::iovec::tests::iovecs(&mut lent, 9);
        advance(&mut iovecs, at);
        let left: usize = iovecs.iter().map(|piece| piece.iov_len).sum();
        assert_eq!(left, 100 - at);
        if at < 100 {
            assert_eq!(iovecs[0].iov_base as usize, base + at);
        }
    }
}
