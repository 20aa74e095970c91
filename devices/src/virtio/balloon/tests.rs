use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::ranges::PAGE;
use super::*;
use crate::virtio::ActiveQueue;
use crate::virtio::tests::{Buffer, Driver, END, Recorder, SIZE, WRITE};
use crate::virtio::worker::Job;

/// Where a driver writes the numbers of pages.
const NUMBERS: u64 = 0x6000;
/// The first page that may be given back: what is below holds rings and numbers.
const FIRST: u32 = 0x10;
/// The queues, and the two by which free pages may be reported.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const OLD_REPORT: usize = 2;
const REPORT: usize = 4;

/// A guest whose queues have rings in memories of their own, and that gives back pages of another
/// one, which holds no zero.
struct Guest {
    memory: Arc<GuestMemoryMmap>,
    drivers: [Driver; 5],
    kicks: [Arc<EventFd>; 5],
    recorder: Arc<Recorder>,
    features: u64,
    /// Which queues the driver sets up.
    queues: Vec<usize>,
}

impl Guest {
    fn new() -> Self {
        Self::with_memory(Driver::new().memory)
    }

    fn with_memory(memory: Arc<GuestMemoryMmap>) -> Self {
        memory
            .write_slice(&[7; END as usize], GuestAddress(0))
            .unwrap();
        Self {
            memory,
            drivers: [(); 5].map(|()| Driver::new()),
            kicks: [(); 5].map(|()| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())),
            recorder: Arc::default(),
            features: REPORTING,
            queues: vec![INFLATE, DEFLATE, REPORT],
        }
    }

    fn activation(&self, positions: Option<&[Option<u16>]>) -> Activation {
        let queue = |index: usize| {
            let mut queue = self.drivers[index].queue(false);
            if let Some(positions) = positions {
                queue.resume(positions[index]?);
            }
            let queue = ActiveQueue {
                queue,
                config: Driver::config(),
                kick: Arc::clone(&self.kicks[index]),
            };
            self.queues.contains(&index).then_some(queue)
        };
        Activation {
            memory: Arc::clone(&self.memory),
            features: self.features,
            queues: (0..5).map(queue).collect(),
            resumed: positions.is_some(),
            interrupt: self.recorder.clone(),
        }
    }

    fn job(&self) -> BalloonJob {
        BalloonJob::new(
            self.activation(None),
            Arc::new(ConfigSpace::new(0).unwrap()),
        )
        .unwrap()
    }

    fn inflate(&mut self, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let driver = &mut self.drivers[INFLATE];
        driver.write(NUMBERS, &bytes);
        driver.offer_chain(0, &[(NUMBERS, bytes.len() as u32, 0)]);
    }

    /// Which pages have been given back, those below [`FIRST`] included.
    fn gone(&self) -> Vec<u32> {
        let is_gone = |&page: &u32| {
            let at = u64::from(page) * PAGE as u64;
            let mut bytes = [1; PAGE];
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            assert!(bytes == [0; PAGE] || bytes == [7; PAGE], "a part of a page");
            bytes == [0; PAGE]
        };
        (0..(END / PAGE as u64) as u32).filter(is_gone).collect()
    }
}

/// Has it do all that there is.
fn finish(job: &mut BalloonJob) {
    while job.turn().more {}
}

#[test]
fn pages_in_the_balloon_are_the_hosts_until_they_are_used_again() {
    let mut guest = Guest::new();
    // In no order, one of them twice, and the two around the border of the regions.
    let numbers = [FIRST + 3, FIRST, FIRST + 1, FIRST + 3, 0x7f, 0x80];
    guest.inflate(&numbers);
    let mut job = guest.job();
    finish(&mut job);
    assert_eq!(guest.drivers[INFLATE].take_used(), [(0, 0)]);
    assert_eq!(guest.recorder.interrupts.load(Ordering::SeqCst), 1);
    let gone = [FIRST, FIRST + 1, FIRST + 3, 0x7f, 0x80];
    assert_eq!(guest.gone(), gone);

    let driver = &mut guest.drivers[DEFLATE];
    driver.offer_chain(0, &[(NUMBERS, 4, 0)]);
    job.wake(1, vmm_sys_util::epoll::EventSet::IN);
    guest.kicks[DEFLATE].write(1).unwrap();
    job.wake(1, vmm_sys_util::epoll::EventSet::IN);
    finish(&mut job);
    assert_eq!(guest.drivers[DEFLATE].take_used(), [(0, 0)]);
    let first = GuestAddress(u64::from(FIRST) * PAGE as u64);
    guest.memory.write_slice(&[7; PAGE], first).unwrap();
    assert_eq!(guest.gone(), gone[1..]);
}

#[test]
fn pages_of_a_memfd_leave_it_with_what_other_processes_have_mapped() {
    // SAFETY: a name that ends with NUL.
    let fd = unsafe { libc::memfd_create(c"balloon".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new, and ours.
    let file = Arc::new(unsafe { File::from_raw_fd(fd) });
    file.set_len(END).unwrap();
    // Two regions, as in the memory of the other tests.
    let half = END as usize / 2;
    let regions = [0, END / 2].map(|at| {
        let place = FileOffset::from_arc(Arc::clone(&file), at);
        (GuestAddress(at), half, Some(place))
    });
    let memory = GuestMemoryMmap::from_ranges_with_files(regions).unwrap();
    let mut guest = Guest::with_memory(Arc::new(memory));
    let held = || file.metadata().unwrap().blocks() * 512;
    assert_eq!(held(), END);
    let numbers = [FIRST + 3, FIRST, 0x7f, 0x80];
    guest.inflate(&numbers);
    finish(&mut guest.job());
    assert_eq!(held(), END - 4 * PAGE as u64);
    // Through the file, as through any mapping of it: reading it there takes no page.
    for page in numbers {
        let mut bytes = [1; PAGE];
        file.read_exact_at(&mut bytes, u64::from(page) * PAGE as u64)
            .unwrap();
        assert_eq!(bytes, [0; PAGE]);
    }
    assert_eq!(held(), END - 4 * PAGE as u64);
    assert_eq!(guest.gone(), [FIRST, FIRST + 3, 0x7f, 0x80]);
}

#[test]
fn page_that_is_no_memory_is_left_out_and_a_number_cut_short_too() {
    let mut guest = Guest::new();
    let end = (END / PAGE as u64) as u32;
    let numbers = [u32::MAX, end, end - 1, 0xd_0000, FIRST];
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let driver = &mut guest.drivers[INFLATE];
    driver.write(NUMBERS, &bytes);
    driver.offer_chain(0, &[(NUMBERS, bytes.len() as u32 - 1, 0)]);
    finish(&mut guest.job());
    assert_eq!(guest.drivers[INFLATE].take_used(), [(0, 0)]);
    assert_eq!(guest.gone(), [end - 1]);
}

#[test]
fn pages_beyond_what_a_chain_may_give_stay_and_the_rest_takes_several_turns() {
    let mut guest = Guest::new();
    let driver = &mut guest.drivers[INFLATE];
    // The page beyond the most of them is another one than all before.
    let mut numbers = [[FIRST, FIRST + 2]; 2048].concat();
    numbers.push(FIRST + 4);
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    driver.write(0x1_0000, &bytes);
    driver.offer_chain(0, &[(0x1_0000, bytes.len() as u32, 0)]);
    finish(&mut guest.job());
    assert_eq!(guest.gone(), [FIRST, FIRST + 2]);

    // Every other page of all memory: each costs a call.
    let mut guest = Guest::new();
    let every_other: Vec<u32> = (0..(END / PAGE as u64) as u32).step_by(2).collect();
    guest.inflate(&every_other);
    let mut job = guest.job();
    assert!(job.turn().more);
    assert_eq!(guest.drivers[INFLATE].take_used(), []);
    finish(&mut job);
    assert_eq!(guest.drivers[INFLATE].take_used(), [(0, 0)]);
    assert_eq!(guest.gone(), every_other);
}

/// The pages that go when these buffers, of guest memory as the reporting queue sees it, are reported.
fn reported(guest: &mut Guest, index: usize, buffers: &[Buffer]) -> Vec<u32> {
    guest.queues = vec![INFLATE, DEFLATE, index];
    // Rings and free pages lie in one memory there.
    guest.memory = Arc::clone(&guest.drivers[index].memory);
    let first = u64::from(FIRST) * PAGE as u64;
    let fill = vec![7; (END - first) as usize];
    guest.drivers[index].write(first, &fill);
    guest.drivers[index].offer_chain(0, buffers);
    finish(&mut guest.job());
    assert_eq!(guest.drivers[index].take_used(), [(0, 0)]);
    let pages = FIRST..(END / PAGE as u64) as u32;
    let is_gone = |&page: &u32| {
        let bytes = guest.drivers[index].read(u64::from(page) * PAGE as u64, PAGE);
        bytes == [0; PAGE]
    };
    pages.filter(is_gone).collect()
}

#[test]
fn free_pages_are_given_back_by_whichever_queue_the_driver_has_for_them() {
    for index in [OLD_REPORT, 3, REPORT] {
        // Two that overlap, one that touches them, one within a page, and one not aligned.
        let buffers = [
            (0x1_2000, 0x2000, WRITE),
            (0x1_1000, 0x2000, WRITE),
            (0x1_0000, 0x1000, WRITE),
            (0x2_0800, 0x0800, WRITE),
            (0x3_0800, 0x2000, WRITE),
            (0x4_0000, 0x1000, 0),
        ];
        let mut buffers = buffers;
        // What the device reads comes first in a chain.
        buffers.rotate_right(1);
        let gone = reported(&mut Guest::new(), index, &buffers);
        assert_eq!(gone, [0x10, 0x11, 0x12, 0x13, 0x31]);
    }
}

#[test]
fn free_pages_that_hold_something_else_than_zeros_are_kept() {
    for (poison, features, expected) in [
        (0, PAGE_POISON, true),
        (0xaaaa_aaaa, PAGE_POISON, false),
        (0xaaaa_aaaa, 0, true),
    ] {
        let mut guest = Guest::new();
        guest.features |= features;
        guest.memory = Arc::clone(&guest.drivers[REPORT].memory);
        guest.drivers[REPORT].write(0x1_0000, &[7; PAGE]);
        guest.drivers[REPORT].offer_chain(0, &[(0x1_0000, PAGE as u32, WRITE)]);
        let config = Arc::new(ConfigSpace::new(0).unwrap());
        config.write(12, &u32::to_le_bytes(poison));
        let mut job = BalloonJob::new(guest.activation(None), config).unwrap();
        finish(&mut job);
        assert_eq!(guest.drivers[REPORT].take_used(), [(0, 0)]);
        let is_gone = guest.drivers[REPORT].read(0x1_0000, PAGE) == [0; PAGE];
        assert_eq!(is_gone, expected, "{poison:#x} {features:#x}");
    }
}

#[test]
fn all_memory_reported_time_and_again_takes_the_rings_and_no_more() {
    let mut guest = Guest::new();
    let all: Vec<Buffer> = vec![(0, END as u32, WRITE); SIZE.into()];
    guest.memory = Arc::clone(&guest.drivers[REPORT].memory);
    guest.drivers[REPORT].offer_chain(0, &all);
    let mut job = guest.job();
    finish(&mut job);
    // The rings began anew, and so their index of what is available is invalid, or none.
    guest.drivers[REPORT].set_available(SIZE + 9);
    guest.kicks[REPORT].write(1).unwrap();
    job.wake(2, vmm_sys_util::epoll::EventSet::IN);
    finish(&mut job);
    assert!(guest.recorder.needs_reset.load(Ordering::SeqCst));
    guest.inflate(&[FIRST]);
    guest.kicks[INFLATE].write(1).unwrap();
    job.wake(0, vmm_sys_util::epoll::EventSet::IN);
    finish(&mut job);
    assert_eq!(guest.drivers[INFLATE].take_used(), []);
}

#[test]
fn driver_without_a_queue_that_it_needs_is_refused() {
    for (features, queues, is_refused) in [
        (0, vec![INFLATE, DEFLATE], false),
        (REPORTING, vec![INFLATE, DEFLATE], true),
        (0, vec![INFLATE, REPORT], true),
        (REPORTING, vec![DEFLATE, REPORT], true),
    ] {
        let mut guest = Guest::new();
        (guest.features, guest.queues) = (features, queues);
        let job = BalloonJob::new(
            guest.activation(None),
            Arc::new(ConfigSpace::new(0).unwrap()),
        );
        assert_eq!(job.is_err(), is_refused, "{features:#x} {:?}", guest.queues);
    }
}

fn read(balloon: &Balloon) -> [u32; 4] {
    let mut bytes = [0; 16];
    balloon.read_config(0, &mut bytes);
    let (fields, _) = bytes.as_chunks();
    [0, 1, 2, 3].map(|n: usize| u32::from_le_bytes(fields[n]))
}

#[test]
fn driver_writes_what_it_holds_back_and_reads_what_it_is_to() {
    let mut balloon = Balloon::new("balloon", 256 << 20, EventSink::default()).unwrap();
    let handle = balloon.handle();
    assert_eq!(read(&balloon), [0x1_0000, 0, 0, 0]);
    balloon.write_config(4, &[1, 2, 0, 0]);
    balloon.write_config(12, &[0xaa; 4]);
    balloon.write_config(5, &[3]);
    // Neither its own, nor there.
    balloon.write_config(0, &[9; 4]);
    balloon.write_config(8, &[9; 4]);
    balloon.write_config(14, &[0xbb; 8]);
    balloon.write_config(1 << 20, &[9; 4]);
    assert_eq!(read(&balloon), [0x1_0000, 0x301, 0, 0xbbbb_aaaa]);
    assert_eq!((handle.target(), handle.actual()), (256 << 20, 0x301 << 12));
    balloon.reset();
    assert_eq!(read(&balloon), [0x1_0000, 0, 0, 0]);
    handle.set_target(u64::MAX);
    assert_eq!(read(&balloon)[0], u32::MAX);
}

#[test]
fn change_of_what_is_held_back_is_shown_once_until_it_is_looked_at() {
    let mut balloon = Balloon::new("balloon", 0, EventSink::default()).unwrap();
    let handle = balloon.handle();
    let is_shown = || handle.changed().read().is_ok();
    balloon.write_config(12, &[0xaa; 4]);
    assert!(!is_shown());
    balloon.write_config(4, &[1, 0, 0, 0]);
    assert!(is_shown());
    balloon.write_config(4, &[2, 0, 0, 0]);
    assert!(!is_shown());
    assert_eq!(handle.watch(), 2 << 12);
    balloon.write_config(4, &[2, 0, 0, 0]);
    assert!(!is_shown(), "it is as it was");
    balloon.reset();
    assert!(is_shown());
    assert_eq!(handle.watch(), 0);
}

fn eventually_used(driver: &mut Driver) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while driver.take_used() != [(0, 0)] {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn driver_is_notified_of_another_target_also_after_a_pause_elsewhere() {
    let mut guest = Guest::new();
    let changes = |guest: &Guest| guest.recorder.config_changes.load(Ordering::SeqCst);
    let mut balloon = Balloon::new("balloon", 0, EventSink::default()).unwrap();
    balloon.handle().set_target(1 << 20);
    balloon.activate(guest.activation(None)).unwrap();
    assert_eq!(changes(&guest), 0, "it reads the target at its start");
    balloon.handle().set_target(2 << 20);
    balloon.handle().set_target(2 << 20);
    assert_eq!((changes(&guest), balloon.config_generation()), (1, 2));
    guest.inflate(&[FIRST]);
    guest.kicks[INFLATE].write(1).unwrap();
    eventually_used(&mut guest.drivers[INFLATE]);
    balloon.write_config(4, &[1, 0, 0, 0]);

    let positions = balloon.pause();
    assert_eq!(positions, [Some(1), Some(0), None, None, Some(0)]);
    guest.inflate(&[FIRST + 1]);
    balloon.handle().set_target(3 << 20);
    assert_eq!((changes(&guest), guest.gone()), (1, vec![FIRST]));
    let mut other = Balloon::new("balloon", 0, EventSink::default()).unwrap();
    other.restore(balloon.save().unwrap()).unwrap();
    assert_eq!(other.save().unwrap(), balloon.save().unwrap());
    assert_eq!(read(&other), [3 << 8, 1, 0, 0]);
    other.activate(guest.activation(Some(&positions))).unwrap();
    assert_eq!(changes(&guest), 2);
    eventually_used(&mut guest.drivers[INFLATE]);
    assert_eq!(guest.gone(), [FIRST, FIRST + 1]);
    assert_eq!(other.pause()[0], Some(2));
}

#[test]
fn chain_that_is_not_done_when_the_guest_is_paused_is_done_after_it() {
    let mut guest = Guest::new();
    let every_other: Vec<u32> = (0..(END / PAGE as u64) as u32).step_by(2).collect();
    guest.inflate(&every_other);
    let mut job = guest.job();
    assert!(job.turn().more);
    let positions = job.park();
    assert_eq!(positions, [(0, 0), (1, 0), (4, 0)]);
    let mut job = guest.job();
    finish(&mut job);
    assert_eq!(guest.drivers[INFLATE].take_used(), [(0, 0)]);
    assert_eq!(guest.gone(), every_other);
}
