use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::connection::BUFFER;
use super::header::{
    CLOSED, CREDIT_REQUEST, CREDIT_UPDATE, HOST_CID, Header, LEN, NO_RECEIVE, NO_SEND, REQUEST,
    RESPONSE, RST, RW, SHUTDOWN, STREAM as KIND,
};
use super::*;
use crate::virtio::tests::{Driver, Recorder, SIZE, WRITE};
use crate::virtio::worker::Job;
use crate::virtio::{ActiveQueue, Interrupt};

const CID: u32 = 7;
/// Where the guest lays what it sends, and gets what it receives: so much for each chain.
const AT: u64 = 0x1_0000;
const ROOM: u64 = 0x2000;

/// A driver with a memory for each queue, the thread's job without the thread, and the host's files.
struct Bench {
    rx: Driver,
    tx: Driver,
    event: Driver,
    device: Vsock,
    job: VsockJob,
    recorder: Arc<Recorder>,
    directory: TempDir,
    /// Chains in the receive queue that were not used.
    heads: Vec<u16>,
}

/// The guest's end of a connection: its port, and the host's.
type Ports = (u32, u32);

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut device = Vsock::new("vsock", CID, listener, path, EventSink::default()).unwrap();
        let recorder = Arc::new(Recorder::default());
        let [rx, tx, event] = [Driver::new(), Driver::new(), Driver::new()];
        let activation = activation([&rx, &tx, &event], &recorder, false);
        let job = device.job(activation).unwrap();
        let mut bench = Self {
            rx,
            tx,
            event,
            device,
            job,
            recorder,
            directory,
            heads: (0..SIZE).collect(),
        };
        bench.refill();
        bench
    }

    /// Gives the device room for as many packets as the queue has descriptors.
    fn refill(&mut self) {
        for head in std::mem::take(&mut self.heads) {
            let buffer = (AT + ROOM * u64::from(head), ROOM as u32, WRITE);
            self.rx.offer_chain(head, &[buffer]);
        }
    }

    /// The guest sends a packet, in two pieces.
    fn send(&mut self, packet: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..packet
        };
        self.send_raw(header, data);
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.tx.write(AT, &header.to_bytes());
        self.tx.write(AT + 0x1000, data);
        let whole = [(AT, LEN as u32, 0), (AT + 0x1000, data.len() as u32, 0)];
        let pieces = if data.is_empty() { 1 } else { 2 };
        self.tx.offer_chain(0, &whole[..pieces]);
        self.turn();
        assert_eq!(self.tx.take_used(), [(0, 0)]);
    }

    fn op(&mut self, (guest, host): Ports, op: u16, flags: u32) {
        self.send(packet(guest, host, op, flags), &[]);
    }

    /// Turns until nothing is left to do.
    fn turn(&mut self) {
        loop {
            let has_events = self.has_events();
            if has_events {
                self.job.wake(3, EventSet::IN);
            }
            if !self.job.turn().more && !has_events {
                return;
            }
        }
    }

    /// Whether the host's sockets would wake the thread.
    fn has_events(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.device.host.fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: it is one pollfd.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }

    /// What the guest has received since it looked last.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.turn();
        let mut packets = Vec::new();
        for (head, len) in self.rx.take_used() {
            self.heads.push(head);
            let bytes = self.rx.read(AT + ROOM * u64::from(head), len as usize);
            let (header, data) = bytes.split_at(LEN);
            let header = Header::from_bytes(header.try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            assert_eq!((header.kind, header.len as usize), (KIND, data.len()));
            packets.push((header, data.to_vec()));
        }
        self.refill();
        packets
    }

    /// The same, which must be one packet without data: its ports, what it is and its flags.
    #[track_caller]
    fn one(&mut self) -> (Ports, u16, u32) {
        let packets = self.received();
        let [(header, data)] = &packets[..] else {
            panic!("{packets:?}");
        };
        assert!(data.is_empty());
        ((header.dst_port, header.src_port), header.op, header.flags)
    }

    fn host_port(&self, port: u32) -> UnixListener {
        let listener = self.directory.path().join(format!("s_{port}"));
        UnixListener::bind(listener).unwrap()
    }

    /// A connection that the guest has asked for, and the program's end.
    fn guest_connects(&mut self, ports: Ports) -> UnixStream {
        let listener = self.host_port(ports.1);
        self.op(ports, REQUEST, 0);
        assert_eq!(self.one(), (ports, RESPONSE, 0));
        let (program, _) = listener.accept().unwrap();
        program
    }

    fn program(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("s")).unwrap()
    }

    /// A connection that a program has asked for, to port 9 of the guest.
    fn program_connects(&mut self) -> (Ports, UnixStream) {
        let mut program = self.program();
        program.write_all(b"CONNECT 9\n").unwrap();
        let (ports, op, _) = self.one();
        assert_eq!((ports.0, op), (9, REQUEST));
        self.op(ports, RESPONSE, 0);
        let mut line = vec![0; format!("OK {}\n", ports.1).len()];
        program.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", ports.1).into_bytes());
        (ports, program)
    }
}

fn packet(guest: u32, host: u32, op: u16, flags: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: KIND,
        op,
        flags,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

fn activation(drivers: [&Driver; 3], recorder: &Arc<Recorder>, resumed: bool) -> Activation {
    let queue = |driver: &Driver| {
        Some(ActiveQueue {
            queue: driver.queue(false),
            config: Driver::config(),
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
        })
    };
    Activation {
        memory: Arc::clone(&drivers[0].memory),
        features: 0,
        queues: drivers.into_iter().map(queue).collect(),
        resumed,
        interrupt: Arc::clone(recorder) as Arc<dyn Interrupt>,
    }
}

const PORTS: Ports = (1000, 80);

#[test]
fn guests_connection_carries_data_both_ways_and_ends_with_both_directions() {
    let mut bench = Bench::new();
    let mut program = bench.guest_connects(PORTS);
    bench.send(packet(1000, 80, RW, 0), b"hello");
    let mut said = [0; 5];
    program.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
    program.write_all(b"hi there").unwrap();
    let packets = bench.received();
    assert_eq!(packets.len(), 1, "{packets:?}");
    assert_eq!((packets[0].0.op, &packets[0].1[..]), (RW, &b"hi there"[..]));
    assert_eq!((packets[0].0.fwd_cnt, packets[0].0.buf_alloc), (5, BUFFER));
    assert!(bench.recorder.interrupts.load(Ordering::SeqCst) > 0);

    // Each side closes its half.
    bench.op(PORTS, SHUTDOWN, NO_SEND);
    assert_eq!(program.read(&mut said).unwrap(), 0);
    program.write_all(b"more").unwrap();
    assert_eq!(bench.received()[0].1, b"more");
    drop(program);
    assert_eq!(bench.one(), (PORTS, SHUTDOWN, CLOSED));
    bench.op(PORTS, RST, 0);
    assert_eq!(bench.received(), []);
    let counters = bench.device.handle().counters();
    let expected = VsockCounters {
        open: 0,
        from_host: 0,
        from_guest: 1,
        refused: 0,
        rx_bytes: 12,
        tx_bytes: 5,
    };
    assert_eq!(counters, expected);
}

#[test]
fn programs_connection_begins_with_its_line() {
    let mut bench = Bench::new();
    let mut program = bench.program();
    bench.turn();
    // What follows the line is the guest's.
    program.write_all(b"CONNECT 9\nearly").unwrap();
    let (ports, op, _) = bench.one();
    assert_eq!((ports.0, op), (9, REQUEST));
    bench.op(ports, RESPONSE, 0);
    let packets = bench.received();
    assert_eq!(packets[0].1, b"early");
    let mut line = [0; 14];
    program.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", ports.1).as_bytes());

    // The guest closes: it hears that this is done, and the program the end of the stream.
    bench.send(packet(ports.0, ports.1, RW, 0), b"bye");
    bench.op(ports, SHUTDOWN, CLOSED);
    assert_eq!(bench.one(), (ports, RST, 0));
    let mut rest = String::new();
    program.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "bye");
}

#[test]
fn programs_half_close_reaches_the_guest_after_its_data() {
    let mut bench = Bench::new();
    let (ports, mut program) = bench.program_connects();
    program.write_all(b"all").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let packets = bench.received();
    assert_eq!(packets.len(), 2, "{packets:?}");
    assert_eq!(packets[0].1, b"all");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (SHUTDOWN, NO_SEND));
    bench.send(packet(ports.0, ports.1, RW, 0), b"answer");
    bench.op(ports, SHUTDOWN, NO_SEND);
    let mut answer = String::new();
    program.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    // Nothing can come any more in either direction.
    assert_eq!(bench.one(), (ports, SHUTDOWN, CLOSED));
}

#[test]
fn guest_that_receives_no_more_stops_the_programs_writes() {
    let mut bench = Bench::new();
    let (ports, mut program) = bench.program_connects();
    bench.op(ports, SHUTDOWN, NO_RECEIVE);
    assert!(program.write_all(b"x").is_err());
    bench.send(packet(ports.0, ports.1, RW, 0), b"still");
    let mut said = [0; 5];
    program.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"still");
}

#[test]
fn refused_connections_are_reset_and_closed() {
    let mut bench = Bench::new();
    // No program listens there.
    bench.op(PORTS, REQUEST, 0);
    assert_eq!(bench.one(), (PORTS, RST, 0));
    // A listener's file that is none, and one that has gone.
    fs::write(bench.directory.path().join("s_1"), "").unwrap();
    drop(bench.host_port(2));
    for port in [1, 2, u32::MAX] {
        bench.op((5, port), REQUEST, 0);
        assert_eq!(bench.one(), ((5, port), RST, 0));
    }
    // The guest has no such port.
    let mut program = bench.program();
    program.write_all(b"CONNECT 9\n").unwrap();
    let (ports, ..) = bench.one();
    bench.op(ports, RST, 0);
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    // Nor is this a line.
    let mut program = bench.program();
    program.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert_eq!(bench.received(), []);
    assert_eq!(program.read(&mut [0; 9]).ok().filter(|n| *n > 0), None);
    assert_eq!(bench.device.handle().counters().refused, 6);
}

#[test]
fn packets_of_no_connection_are_reset_but_for_resets() {
    let mut bench = Bench::new();
    for op in [
        0,
        RESPONSE,
        SHUTDOWN,
        RW,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        8,
        u16::MAX,
    ] {
        bench.op(PORTS, op, 0);
        assert_eq!(bench.one(), (PORTS, RST, 0), "{op}");
    }
    bench.op(PORTS, RST, 0);
    // Another's address, which is not to be believed.
    let mut stray = packet(1000, 80, RW, 0);
    stray.src_cid = 8;
    bench.send(stray, &[]);
    assert_eq!(bench.received(), []);
    // Another type of socket.
    let mut seqpacket = packet(1000, 80, REQUEST, 0);
    seqpacket.kind = 2;
    bench.send(seqpacket, &[]);
    bench.turn();
    let used = bench.rx.take_used();
    let bytes = bench.rx.read(AT + ROOM * u64::from(used[0].0), LEN);
    let header = Header::from_bytes(&bytes.try_into().unwrap());
    assert_eq!((header.op, header.kind, header.dst_port), (RST, 2, 1000));
}

#[test]
fn packets_that_make_no_sense_reset_their_connection() {
    // Its parts, and the data it has.
    let wrong = |op, data: usize| {
        move |bench: &mut Bench| {
            bench.send(packet(1000, 80, op, 0), &vec![0; data]);
        }
    };
    type Wrong = Box<dyn Fn(&mut Bench)>;
    let cases: Vec<Wrong> = vec![
        Box::new(wrong(REQUEST, 0)),
        Box::new(wrong(RESPONSE, 0)),
        Box::new(wrong(9, 0)),
        Box::new(|bench| {
            bench.op(PORTS, SHUTDOWN, NO_SEND);
            bench.send(packet(1000, 80, RW, 0), b"x");
        }),
    ];
    for (n, case) in cases.iter().enumerate() {
        let mut bench = Bench::new();
        let mut program = bench.guest_connects(PORTS);
        case(&mut bench);
        assert_eq!(bench.one(), (PORTS, RST, 0), "{n}");
        assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    }
}

#[test]
fn chains_that_hold_no_packet_are_given_back() {
    let mut bench = Bench::new();
    for buffers in [
        &[(AT, LEN as u32 - 1, 0)][..],
        &[(AT, 64, WRITE)],
        &[(1 << 40, 64, 0)],
    ] {
        bench.tx.offer_chain(0, buffers);
        bench.turn();
        assert_eq!(bench.tx.take_used(), [(0, 0)]);
    }
    // More data than there are.
    let mut program = bench.guest_connects(PORTS);
    let mut long = packet(1000, 80, RW, 0);
    long.len = 6;
    bench.send_raw(long, b"hello");
    long.len = 4;
    bench.send_raw(long, b"hello");
    let mut said = [0; 4];
    program.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hell");
    // Room for a header alone is none.
    bench.turn();
    let heads = (0..SIZE).filter(|head| !bench.heads.contains(head)).count();
    assert_eq!(heads, usize::from(SIZE));
}

#[test]
fn peer_that_does_not_read_stops_its_own_connection_at_the_guests_credit() {
    let mut bench = Bench::new();
    let mut slow = bench.guest_connects(PORTS);
    let mut quick = bench.guest_connects((1001, 81));
    let block: Vec<u8> = (0..4096_u32).map(|n| (n % 251) as u8).collect();
    // As a driver counts: what was sent, and what it has heard of.
    let (mut sent, mut forwarded) = (0_u32, 0_u32);
    loop {
        for (header, _) in bench.received() {
            assert_eq!(header.op, CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
        if sent - forwarded + block.len() as u32 > BUFFER {
            break;
        }
        bench.send(packet(1000, 80, RW, 0), &block);
        sent += block.len() as u32;
    }
    bench.send(packet(1001, 81, RW, 0), b"hello");
    let mut said = [0; 5];
    quick.read_exact(&mut said).unwrap();
    // A driver that asks hears the same, and has no more.
    bench.op(PORTS, CREDIT_REQUEST, 0);
    let answer = bench.received();
    assert_eq!(answer[0].0.op, CREDIT_UPDATE);
    // The program reads at last, while the thread gets its events.
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        slow.read_to_end(&mut all).unwrap();
        all
    });
    bench.op(PORTS, SHUTDOWN, CLOSED);
    while !reader.is_finished() {
        bench.turn();
    }
    let all = reader.join().unwrap();
    assert_eq!(all.len(), sent as usize);
    assert!(all.chunks(block.len()).all(|chunk| chunk == block));
    assert_eq!(bench.device.handle().counters().open, 1);
}

#[test]
fn guest_that_sends_more_than_its_credit_is_reset() {
    let mut bench = Bench::new();
    let _slow = bench.guest_connects(PORTS);
    let block = [0; 4096];
    let is_reset = |bench: &mut Bench| bench.received().iter().any(|(header, _)| header.op == RST);
    // What a socket takes is unknown, but it has an end.
    while !is_reset(&mut bench) {
        bench.send(packet(1000, 80, RW, 0), &block);
    }
}

#[test]
fn program_that_floods_waits_for_the_guests_credit() {
    let mut bench = Bench::new();
    let (ports, mut program) = bench.program_connects();
    program.set_nonblocking(true).unwrap();
    while program.write(&[1; 4096]).is_ok() {}
    // The guest has said that it has room for 64 KiB.
    let mut got = 0;
    let mut ops = Vec::new();
    loop {
        let packets = bench.received();
        if packets.is_empty() {
            break;
        }
        for (header, data) in packets {
            got += data.len();
            if header.op != RW {
                ops.push(header.op);
            }
        }
    }
    assert_eq!((got, &ops[..]), (1 << 16, &[CREDIT_REQUEST][..]));
    // Asked once, until there is some.
    let mut update = packet(ports.0, ports.1, CREDIT_UPDATE, 0);
    bench.send(update, &[]);
    assert_eq!(bench.received(), []);
    update.fwd_cnt = 100;
    bench.send(update, &[]);
    let packets = bench.received();
    assert_eq!(packets[0].1.len(), 100);
    assert_eq!(packets[1].0.op, CREDIT_REQUEST);
    // Credit that cannot be is none.
    update.fwd_cnt = 1 << 31;
    bench.send(update, &[]);
    assert_eq!(bench.received(), []);
}

#[test]
fn data_fill_one_buffer_after_the_other_whatever_lies_between() {
    let mut bench = Bench::new();
    let (ports, mut program) = bench.program_connects();
    // The guest has no buffer left but those below.
    while bench.heads.len() < usize::from(SIZE) {
        bench.op((1, 1), RW, 0);
        bench.turn();
        bench
            .heads
            .extend(bench.rx.take_used().iter().map(|(head, _)| *head));
    }
    let all: Vec<u8> = (0..20_000_u32).map(|n| (n % 251) as u8).collect();
    program.write_all(&all).unwrap();
    // A chain of three pieces takes three descriptors; the header lies in two of them.
    bench.heads.sort_unstable();
    bench.heads.retain(|head| head % 3 == 0 && head + 2 < SIZE);
    let mut got = Vec::new();
    let mut update = packet(ports.0, ports.1, CREDIT_UPDATE, 0);
    while got.len() < all.len() {
        for (n, head) in std::mem::take(&mut bench.heads).into_iter().enumerate() {
            let at = AT + ROOM * u64::from(head);
            match n % 5 {
                1 => bench.rx.offer_chain(head, &[(1 << 40, 64, WRITE)]),
                3 => bench.rx.offer_chain(head, &[(at, LEN as u32, WRITE)]),
                _ => {
                    let pieces = [(0, 10), (10, 100), (110, 190)];
                    let pieces = pieces.map(|(offset, len)| (at + offset, len, WRITE));
                    bench.rx.offer_chain(head, &pieces);
                }
            }
        }
        update.fwd_cnt = got.len() as u32;
        bench.send(update, &[]);
        for (head, len) in bench.rx.take_used() {
            bench.heads.push(head);
            if len > 0 {
                let bytes = bench.rx.read(AT + ROOM * u64::from(head), len as usize);
                let (header, data) = bytes.split_at(LEN);
                let header = Header::from_bytes(header.try_into().unwrap());
                assert_eq!((header.op, header.len as usize), (RW, data.len()));
                got.extend_from_slice(data);
            }
        }
    }
    assert!(got == all);
}

#[test]
fn guest_without_room_for_packets_does_not_make_anything_grow() {
    let mut bench = Bench::new();
    let listener = bench.host_port(80);
    // It takes nothing: all that it gets is used up.
    while bench.heads.len() < usize::from(SIZE) {
        bench.op((1, 1), RW, 0);
        bench.turn();
        for (head, _) in bench.rx.take_used() {
            bench.heads.push(head);
        }
    }
    for round in 0..5000 {
        let op = [REQUEST, RST][round % 2];
        bench.op((round as u32 / 2 % 300, 80), op, 0);
        if op == REQUEST {
            listener.accept().unwrap();
        }
    }
    // Beyond the most resets that wait its packets do.
    let offer = |bench: &mut Bench| {
        bench.tx.write(AT, &packet(1, 1, RW, 0).to_bytes());
        bench.tx.offer_chain(0, &[(AT, LEN as u32, 0)]);
        bench.turn();
        bench.tx.take_used().len()
    };
    let handled = (0..300).take_while(|_| offer(&mut bench) == 1).count();
    assert!(handled < 300);
    // And go on with it.
    bench.refill();
    while !bench.received().is_empty() {}
    assert_eq!(bench.tx.take_used(), [(0, 0)]);
}

#[test]
fn connections_have_a_limit_and_one_more_after_each_that_ends() {
    let mut bench = Bench::new();
    let listener = bench.host_port(80);
    let mut programs = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        bench.op((port, 80), REQUEST, 0);
        assert_eq!(bench.one(), ((port, 80), RESPONSE, 0));
        programs.push(listener.accept().unwrap().0);
    }
    assert_eq!(bench.device.handle().counters().open, 1024);
    bench.op((5000, 80), REQUEST, 0);
    assert_eq!(bench.one(), ((5000, 80), RST, 0));
    let mut refused = bench.program();
    bench.turn();
    assert_eq!(refused.read(&mut [0; 9]).unwrap(), 0);
    programs.remove(3);
    assert_eq!(bench.one(), ((3, 80), SHUTDOWN, CLOSED));
    bench.op((3, 80), RST, 0);
    bench.op((5000, 80), REQUEST, 0);
    assert_eq!(bench.one(), ((5000, 80), RESPONSE, 0));
    // Each still has its turn.
    for program in &mut programs {
        program.write_all(b"x").unwrap();
    }
    let mut heard = 0;
    loop {
        match bench.received().len() {
            0 => break,
            more => heard += more,
        }
    }
    assert_eq!(heard, programs.len());
}

#[test]
fn sides_that_do_not_answer_are_given_up() {
    let mut bench = Bench::new();
    let mut silent = bench.program();
    let mut asking = bench.program();
    asking.write_all(b"CONNECT 9\n").unwrap();
    let (ports, ..) = bench.one();
    let turn = bench.job.turn();
    assert!(turn.wake_at.is_some());
    bench.job.timeout();
    bench.turn();
    assert_eq!(bench.received(), []);
    bench.job.expire(Duration::from_secs(3600));
    assert_eq!(bench.one(), (ports, RST, 0));
    for program in [&mut silent, &mut asking] {
        assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    }
    // The clock stands still again.
    assert_eq!(bench.job.turn().wake_at, None);
    assert_eq!(bench.device.handle().counters().refused, 2);
    // One that goes before the guest has answered.
    let mut going = bench.program();
    going.write_all(b"CONNECT 9\n").unwrap();
    let (ports, ..) = bench.one();
    drop(going);
    assert_eq!(bench.one(), (ports, RST, 0));
}

#[test]
fn program_that_leaves_what_a_guest_has_sent_loses_it_and_is_not_refused() {
    let mut bench = Bench::new();
    let mut program = bench.guest_connects(PORTS);
    let block = [7; 4096];
    // More than the socket takes, and no more than the credit.
    for _ in 0..BUFFER / 4096 {
        bench.send(packet(1000, 80, RW, 0), &block);
    }
    bench.received();
    bench.send(packet(1000, 80, RW, 0), &block);
    bench.op(PORTS, SHUTDOWN, CLOSED);
    assert_eq!(bench.one(), (PORTS, RST, 0));
    let counters = |bench: &Bench| bench.device.handle().counters();
    assert_eq!(counters(&bench).open, 1);
    bench.job.expire(Duration::from_secs(3600));
    bench.turn();
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert!(all.len() > 4096 && all.iter().all(|byte| *byte == 7));
    assert_eq!((counters(&bench).open, counters(&bench).refused), (0, 0));
    assert_eq!(bench.job.turn().wake_at, None);
}

#[test]
fn pause_keeps_connections_and_restore_and_reset_do_not() {
    let mut bench = Bench::new();
    let mut program = bench.guest_connects(PORTS);
    let Bench {
        rx,
        tx,
        event,
        mut device,
        job,
        recorder,
        ..
    } = bench;
    let (positions, connections, must_reset) = job.park();
    assert!(!must_reset);
    device.paused = Some((connections, Instant::now()));
    program.write_all(b"meanwhile").unwrap();
    let resume = |device: &mut Vsock| {
        let mut activation = activation([&rx, &tx, &event], &recorder, true);
        for (queue, position) in activation.queues.iter_mut().zip(&positions) {
            queue.as_mut().unwrap().queue.resume(position.unwrap());
        }
        device.job(activation).unwrap()
    };
    let mut job = resume(&mut device);
    job.turn();
    assert_eq!(device.handle().counters().rx_bytes, 9);

    // Elsewhere the driver hears that its connections are gone.
    let (_, connections, _) = job.park();
    device.paused = Some((connections, Instant::now()));
    device.restore(Value::Null).unwrap();
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    let mut job = resume(&mut device);
    job.turn();
    let (_, _, must_reset) = job.park();
    assert!(must_reset, "there was no buffer for it");
    let mut event = event;
    event.offer_chain(0, &[(AT, 8, WRITE)]);
    device.must_reset = true;
    let mut activation = activation([&rx, &tx, &event], &recorder, true);
    for queue in activation.queues.iter_mut().take(2).flatten() {
        queue.queue.resume(0);
    }
    let mut job = device.job(activation).unwrap();
    job.turn();
    assert_eq!(event.take_used(), [(0, 4)]);
    assert_eq!(event.read(AT, 4), [0; 4]);
    let (_, connections, must_reset) = job.park();
    assert!(!must_reset);

    device.paused = Some((connections, Instant::now()));
    device.reset();
    assert_eq!(device.handle().counters().open, 0);
}

#[test]
fn queue_that_is_broken_closes_everything_and_wakes_the_thread_no_more() {
    let mut bench = Bench::new();
    let mut program = bench.guest_connects(PORTS);
    bench.tx.set_available(20_000);
    assert_eq!(bench.job.turn(), crate::virtio::worker::Turn::default());
    assert!(bench.recorder.needs_reset.load(Ordering::SeqCst));
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    let (_, _, events) = bench.job.varying().unwrap();
    assert_eq!(events, EventSet::empty());
    let _waiting = bench.program();
    assert!(!bench.job.turn().more);
}
