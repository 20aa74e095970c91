//! The freestanding test guest, started in a network made for the test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::PATIENCE;
use super::elf::elf;
use super::netns::Netns;
use super::vm::{self, Vm};

/// The IPv4 and IPv6 address of the far side.
pub const PEER: [&str; 2] = ["10.77.0.1", "fd77::1"];
/// The services of `guest.mode=echo`.
pub const ECHO: u16 = 7;
/// See [`ECHO`].
pub const SINK: u16 = 9;
/// See [`ECHO`].
pub const SOURCE: u16 = 19;

/// How the guest reaches its NICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// virtio-mmio.
    Mmio,
    /// virtio-pci.
    Pci,
}

impl Transport {
    /// The argument of `--transport`, which is the guest's word for it too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mmio => "mmio",
            Self::Pci => "pci",
        }
    }
}

/// A host with the interface `lower`, which guests put their macvtap on, and a far side with
/// addresses.
#[derive(Debug)]
pub struct Net {
    /// Where minivmm runs.
    pub host: Netns,
    /// The other end of the wire.
    pub far: Netns,
    /// The transport of the guests, where it matters; else they have minivmm's default.
    pub transport: Option<Transport>,
}

impl Net {
    /// Makes both, for guests whose transport does not matter.
    pub fn new() -> Self {
        Self::make(None)
    }

    /// Makes both, for guests with this transport.
    pub fn with(transport: Transport) -> Self {
        Self::make(Some(transport))
    }

    /// Makes both, joined by a veth pair: `lower` and `wire`.
    fn make(transport: Option<Transport>) -> Self {
        let (host, far) = (Netns::new(), Netns::new());
        host.veth("lower", &far, "wire");
        far.address("wire", &format!("{}/24", PEER[0]));
        far.address("wire", &format!("{}/64", PEER[1]));
        Self {
            host,
            far,
            transport,
        }
    }

    /// Both, the host with the addresses of this `number` and default routes to the far side.
    pub fn routed(number: u8) -> Self {
        let net = Self::new();
        for (address, peer) in addresses(number).iter().zip(PEER) {
            let (family, prefix) = if peer.contains(':') {
                ("-6", 64)
            } else {
                ("-4", 24)
            };
            net.host.address("lower", &format!("{address}/{prefix}"));
            net.host
                .ip(&format!("{family} route add default via {peer}"));
        }
        net
    }

    /// Turns IPv6 off, whose hosts speak without being asked.
    pub fn silence(&self) {
        for namespace in [&self.host, &self.far] {
            let setting = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
            // A kernel without IPv6 has no such setting.
            namespace.enter(|| drop(std::fs::write(setting, "1")));
        }
    }

    /// Starts the guest with the addresses numbered `number`; `options` are its own, without their
    /// `guest.`.
    pub fn start(&self, number: u8, options: &str) -> Vm {
        self.start_on("lower", number, options)
    }

    /// The same with the whole argument of `--macvtap`.
    pub fn start_on(&self, macvtap: &str, number: u8, options: &str) -> Vm {
        let [ip, ip6] = addresses(number);
        let options = options
            .split_whitespace()
            .map(|option| format!("guest.{option} "))
            .collect::<String>();
        let line = format!("{options}guest.ip={ip}/24 guest.ip6={ip6}/64");
        let mut command = self.command();
        command.args(["--macvtap", macvtap, "--cmdline", &line]);
        Vm::spawn(command)
    }

    /// The command that starts the guest, but for its NICs and its command line.
    pub fn command(&self) -> Command {
        self.command_under(&[])
    }

    /// The same, started by another program, `tracer` with its arguments.
    pub fn command_under(&self, tracer: &[&str]) -> Command {
        let mut command = match tracer {
            [] => self.host.command(vm::binary()),
            [program, args @ ..] => {
                let mut command = self.host.command(program);
                command.args(args).arg(vm::binary());
                command
            }
        };
        command.arg("--kernel").arg(elf()).stdin(Stdio::null());
        command.args(["--memory", "128M"]);
        if let Some(transport) = self.transport {
            command.args(["--transport", transport.name()]);
        }
        command
    }

    /// Starts a guest that serves, and waits until it does.
    pub fn serve(&self, number: u8, options: &str) -> Vm {
        let mut vm = self.start(number, &format!("mode=echo {options}"));
        vm.wait_for("READY echo\n");
        vm
    }

    /// Runs a guest to its end, which must be a power-off; returns its console.
    pub fn run(&self, number: u8, options: &str) -> String {
        power_off(self.start(number, options))
    }

    /// Ends a serving guest, and waits for that.
    pub fn quit(&self, number: u8, vm: Vm) -> String {
        let [ip, _] = addresses(number);
        assert_eq!(
            self.datagram(&ip, b"quit"),
            b"quit",
            "\n{}",
            vm.transcript()
        );
        power_off(vm)
    }

    /// Sends a datagram from the far side to a guest's echo, until it comes back.
    pub fn datagram(&self, ip: &str, data: &[u8]) -> Vec<u8> {
        self.datagram_by(ip, ECHO, data)
    }

    /// The same by another port, which is forwarded there.
    pub fn datagram_by(&self, ip: &str, port: u16, data: &[u8]) -> Vec<u8> {
        let to = SocketAddr::new(ip.parse().expect("an address"), port);
        self.far.enter(|| {
            let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any).expect("a socket");
            socket
                .set_read_timeout(Some(Duration::from_secs(1)))
                .expect("a timeout");
            let mut answer = vec![0; 65_536];
            for _ in 0..10 {
                socket.send_to(data, to).expect("the datagram goes out");
                if let Ok(length) = socket.recv(&mut answer) {
                    answer.truncate(length);
                    return answer;
                }
            }
            panic!("no datagram came back from {to}");
        })
    }

    /// Connects from the far side to a service of a guest and runs `work` on the connection.
    pub fn connect<T: Send>(
        &self,
        ip: &str,
        port: u16,
        work: impl FnOnce(TcpStream) -> T + Send,
    ) -> T {
        let to = SocketAddr::new(ip.parse().expect("an address"), port);
        self.far.enter(|| {
            let stream =
                TcpStream::connect_timeout(&to, PATIENCE).unwrap_or_else(|e| panic!("{to}: {e}"));
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
            work(stream)
        })
    }

    /// Sends `bytes` of the stream to a guest's sink, which must find them right. Returns Mbit/s.
    pub fn fill_sink(&self, ip: &str, bytes: usize) -> u64 {
        let start = Instant::now();
        let answer = self.connect(ip, SINK, |mut stream| {
            let mut position = 0;
            while position < bytes {
                let block = stream_bytes(position, (bytes - position).min(1 << 16));
                stream
                    .write_all(&block)
                    .expect("the guest takes the stream");
                position += block.len();
            }
            stream
                .shutdown(std::net::Shutdown::Write)
                .expect("the connection is up");
            let mut answer = String::new();
            stream
                .read_to_string(&mut answer)
                .expect("the guest answers");
            answer
        });
        assert_eq!(answer, format!("OK {bytes}\n"));
        mbits(bytes, start.elapsed())
    }

    /// Reads a guest's source to its end, which must come after `bytes` right ones. Returns Mbit/s.
    pub fn drain_source(&self, ip: &str, bytes: usize) -> u64 {
        let start = Instant::now();
        let received = self.connect(ip, SOURCE, |mut stream| {
            let mut block = vec![0; 1 << 18];
            let mut position = 0;
            loop {
                match stream.read(&mut block).expect("the guest sends the stream") {
                    0 => return position,
                    length => {
                        assert!(
                            block[..length] == stream_bytes(position, length),
                            "wrong bytes after {position}"
                        );
                        position += length;
                    }
                }
            }
        });
        assert_eq!(received, bytes);
        mbits(bytes, start.elapsed())
    }
}

/// The IPv4 and IPv6 address of the guest with this number.
pub fn addresses(number: u8) -> [String; 2] {
    [format!("10.77.0.{number}"), format!("fd77::{number:x}")]
}

/// Waits for a guest's power-off; returns its console.
pub fn power_off(mut vm: Vm) -> String {
    let status = vm.wait_exit();
    assert_eq!(status.code(), Some(0), "\n{}", vm.transcript());
    vm.console()
}

/// The same, for a guest that must not have reported any failure.
pub fn succeed(vm: Vm) -> String {
    let console = power_off(vm);
    assert!(console.contains("END failures=0\n"), "{console}");
    console
}

/// Bytes of the stream that the guest sends and checks, from a position on
/// (`tests/guest/src/net/stream.rs`).
pub fn stream_bytes(position: usize, length: usize) -> Vec<u8> {
    let byte = |n: usize| ((n as u32).wrapping_mul(0x9e37_79b9) >> 24) as u8;
    (position..position + length).map(byte).collect()
}

fn mbits(bytes: usize, time: Duration) -> u64 {
    (bytes as u128 * 8 / time.as_micros().max(1)) as u64
}
