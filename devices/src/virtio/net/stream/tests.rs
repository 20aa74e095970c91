use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::loopback::tests::frame_to;
use super::*;
use crate::virtio::iovec::tests::iovecs;

fn pair() -> (Stream, UnixStream) {
    let (ours, far) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    (Stream::new(ours).unwrap(), far)
}

/// A frame of this length, different from others of another `seed`.
fn frame(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + seed * 31) as u8).collect()
}

fn with_length(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

/// Reads a frame into `room` bytes in pieces of `piece`, and takes off its header.
fn read(stream: &Stream, room: usize, piece: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; room];
    // SAFETY: the iovecs describe parts of `bytes`.
    let len = unsafe { stream.read_frame(&iovecs(&mut bytes, piece)) }?;
    assert!(bytes[len..].iter().all(|byte| *byte == 0xee) || len < room);
    bytes.truncate(len);
    let frame = bytes.split_off(HEADER_LEN);
    assert_eq!(bytes, HEADER);
    Ok(frame)
}

fn write(stream: &Stream, frame: &[u8], piece: usize) -> io::Result<usize> {
    let mut bytes = [&[0; HEADER_LEN], frame].concat();
    // SAFETY: the iovecs describe parts of `bytes`.
    unsafe { stream.write_frame(&iovecs(&mut bytes, piece)) }
}

fn would_block<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

fn is_hung_up(socket: impl AsFd) -> bool {
    let epoll = Epoll::new().unwrap();
    let fd = socket.as_fd().as_raw_fd();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, fd, event).unwrap();
    let mut events = [EpollEvent::default()];
    epoll.wait(0, &mut events).unwrap() == 1 && events[0].event_set().contains(EventSet::HANG_UP)
}

/// Lengths of short frames and of long ones.
fn lengths() -> impl Strategy<Value = Vec<usize>> {
    vec(
        prop_oneof![14..200_usize, 14..5000_usize, 60_000..=LARGEST],
        1..30,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_are_read_as_they_were_written_however_they_come(
        lengths in lengths(),
        pieces in vec(1..70_000_usize, 1..20),
        piece in prop_oneof![60..100_usize, 1500..70_000_usize],
    ) {
        let (stream, mut far) = pair();
        let frames: Vec<_> = lengths.iter().enumerate().map(|(n, len)| frame(*len, n)).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| with_length(frame)).collect();
        let (mut at, mut pieces, mut read_back) = (0, pieces.iter().cycle(), Vec::new());
        while at < bytes.len() {
            let end = bytes.len().min(at + pieces.next().unwrap());
            at += far.write(&bytes[at..end]).unwrap_or(0);
            loop {
                match read(&stream, LARGEST_FRAME, piece) {
                    Ok(frame) => read_back.push(frame),
                    Err(error) => {
                        prop_assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                        break;
                    }
                }
            }
        }
        prop_assert!(read_back == frames);
    }

    #[test]
    fn frames_are_written_whole_and_in_order_however_slowly_they_are_read(
        lengths in lengths(),
        reads in vec(1..100_000_usize, 1..20),
        piece in prop_oneof![60..100_usize, 1500..70_000_usize],
    ) {
        let (stream, mut far) = pair();
        let frames: Vec<_> = lengths.iter().enumerate().map(|(n, len)| frame(*len, n)).collect();
        let (mut seen, mut reads) = (Vec::new(), reads.iter().cycle());
        let mut take = |seen: &mut Vec<u8>| {
            let mut some = vec![0; *reads.next().unwrap()];
            let n = far.read(&mut some).unwrap_or(0);
            seen.extend_from_slice(&some[..n]);
        };
        for frame in &frames {
            while would_block(write(&stream, frame, piece)) {
                take(&mut seen);
            }
        }
        while would_block(stream.flush()) {
            take(&mut seen);
        }
        let all: Vec<u8> = frames.iter().flat_map(|frame| with_length(frame)).collect();
        while seen.len() < all.len() {
            take(&mut seen);
        }
        prop_assert!(seen == all);
    }
}

#[test]
fn what_the_other_end_does_not_take_is_bounded() {
    for len in [60, 40_000] {
        let (stream, _far) = pair();
        while !would_block(write(&stream, &frame(len, 0), 1500)) {}
        for _ in 0..10 {
            assert!(would_block(write(&stream, &frame(len, 0), 1500)));
            assert!(would_block(stream.flush()));
        }
        assert!(lock(&stream.sent).bytes.capacity() < 2 * (LARGEST + BATCH));
    }
}

#[test]
fn frame_that_has_no_room_is_cut_and_the_next_one_whole() {
    let (stream, mut far) = pair();
    for seed in 0..2 {
        far.write_all(&with_length(&frame(3000, seed))).unwrap();
    }
    let cut = read(&stream, HEADER_LEN + 1000, 100).unwrap();
    assert!(cut == frame(3000, 0)[..1000]);
    assert!(read(&stream, LARGEST_FRAME, 5000).unwrap() == frame(3000, 1));
}

#[test]
fn lengths_that_no_frame_has_end_the_connection() {
    for len in [0, SHORTEST - 1, LARGEST + 1, usize::MAX] {
        let (stream, mut far) = pair();
        far.write_all(&(len as u32).to_be_bytes()).unwrap();
        let error = read(&stream, LARGEST_FRAME, 5000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(is_hung_up(&stream) && is_hung_up(&far));
    }
    let (stream, _far) = pair();
    for len in [0, SHORTEST - 1, LARGEST + 1] {
        let error = write(&stream, &frame(len, 0), 5000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn frame_that_never_ends_is_not_delivered() {
    for len in [60, 40_000] {
        let bytes = with_length(&frame(len, 0));
        for cut in [1, PREFIX_LEN, PREFIX_LEN + 1, bytes.len() - 1] {
            let (stream, mut far) = pair();
            far.write_all(&with_length(&frame(14, 1))).unwrap();
            far.write_all(&bytes[..cut]).unwrap();
            drop(far);
            assert!(read(&stream, LARGEST_FRAME, 5000).unwrap() == frame(14, 1));
            for _ in 0..2 {
                assert!(would_block(read(&stream, LARGEST_FRAME, 5000)));
            }
            assert!(is_hung_up(&stream));
        }
    }
}

#[test]
fn other_end_that_is_gone_leaves_a_socket_that_is_hung_up() {
    let (stream, far) = pair();
    far.shutdown(Shutdown::Write).unwrap();
    assert!(!is_hung_up(&stream));
    assert!(would_block(read(&stream, LARGEST_FRAME, 5000)));
    assert!(is_hung_up(&stream));
    drop(far);
    assert!(would_block(read(&stream, LARGEST_FRAME, 5000)));
    for len in [60, 40_000] {
        let written = write(&stream, &frame(len, 0), 5000).and_then(|_| stream.flush());
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}

#[test]
fn frames_to_the_loopback_are_refused_and_those_around_them_written() {
    for (len, piece) in [
        (60, 5000),
        (60, 7),
        (2000, 100),
        (40_000, 70_000),
        (40_000, 1500),
    ] {
        let (stream, mut far) = pair();
        let around = [frame_to("10.0.2.2", len), frame_to("fe80::1", len)];
        write(&stream, &around[0], piece).unwrap();
        for to in ["127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1"] {
            let error = write(&stream, &frame_to(to, len), piece).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{to}");
        }
        write(&stream, &around[1], piece).unwrap();
        stream.flush().unwrap();
        let mut seen = vec![0; 2 * (PREFIX_LEN + len)];
        far.read_exact(&mut seen).unwrap();
        assert!(seen == around.map(|frame| with_length(&frame)).concat());
        assert!(would_block(far.read(&mut [0])));
    }
}

/// The guest's other processors may write a frame's destination at any time.
#[test]
fn destination_that_changes_meanwhile_is_never_the_loopback() {
    const FRAMES: usize = 2000;
    for len in [60, 3000] {
        let (stream, mut far) = pair();
        far.set_nonblocking(false).unwrap();
        let mut bytes = [&[0; HEADER_LEN], &frame_to("10.0.2.2", len)[..]].concat();
        let pieces = iovecs(&mut bytes, 5000);
        let at = bytes.as_mut_ptr().wrapping_add(HEADER_LEN + 30);
        // SAFETY: it is within `bytes`, which is used by this and the device's volatile reads alone until the threads end.
        let first = unsafe { AtomicU8::from_ptr(at) };
        let is_done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    first.store(127, Ordering::Relaxed);
                    first.store(10, Ordering::Relaxed);
                }
            });
            let reader = scope.spawn(|| {
                let mut frame = vec![0; PREFIX_LEN + len];
                while far.read_exact(&mut frame).is_ok() {
                    assert_eq!(frame[PREFIX_LEN + 30], 10);
                }
            });
            for _ in 0..FRAMES {
                // SAFETY: the iovecs describe parts of `bytes`.
                while would_block(unsafe { stream.write_frame(&pieces) }) {}
            }
            while would_block(stream.flush()) {}
            is_done.store(true, Ordering::Relaxed);
            stream.hang_up();
            reader.join().unwrap();
        });
    }
}

#[test]
fn other_end_learns_another_address_between_two_frames() {
    let (stream, mut far) = pair();
    // As much as finds room: the last frame is written in part.
    let long = frame(60_000, 1);
    let mut whole = 0;
    while write(&stream, &long, 60_000 + HEADER_LEN).is_ok() {
        whole += 1;
    }
    let mac = [2, 0, 0, 0, 0x77, 1];
    stream.set_mac(mac).unwrap();
    let mut read = Vec::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        while let Ok(n @ 1..) = far.read(&mut piece) {
            read.extend_from_slice(&piece[..n]);
        }
        if !would_block(stream.flush()) {
            break;
        }
    }
    while let Ok(n @ 1..) = far.read(&mut piece) {
        read.extend_from_slice(&piece[..n]);
    }
    let mut expected = with_length(&long).repeat(whole);
    expected.extend(introduction(mac));
    assert!(
        read == expected,
        "{} of {} bytes",
        read.len(),
        expected.len()
    );
    // Nor does one that is gone keep it from changing.
    drop(far);
    stream.set_mac(mac).unwrap();
}

#[test]
fn addresses_that_change_take_no_memory_where_the_other_end_does_not_read() {
    let (stream, _far) = pair();
    let long = frame(60_000, 1);
    while write(&stream, &long, 60_000 + HEADER_LEN).is_ok() {}
    for number in 0..100_000_u32 {
        let [a, b, c, d] = number.to_be_bytes();
        stream.set_mac([2, 0, a, b, c, d]).unwrap();
    }
    assert!(lock(&stream.sent).bytes.len() <= LARGEST + BATCH + 2 * introduction([0; 6]).len());
}
