//! QEMU's command line, as a pure function of what is wanted.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use devices::disk::Format;
use devices::virtio::blk::IoChoice;
use net::{MacAddr, USUAL_MTU};

use super::accel::Engine;
use crate::config::{Config, ConsoleTarget, DiskConfig, Reboot};

/// A NIC: a netdev over open queues, and its device.
#[derive(Clone, Debug)]
pub(super) struct NetDevice {
    /// The netdev's id.
    pub id: String,
    /// The queues' numbers in QEMU.
    pub fds: Vec<RawFd>,
    /// Those of /dev/vhost-net, one for each queue; or none.
    pub vhost: Vec<RawFd>,
    pub mac: MacAddr,
    pub mtu: u32,
    /// Further properties; `None` when ARGS has the device.
    pub device: Option<Vec<(String, String)>>,
}

/// The numbers of what minivmm's monitor takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Control {
    /// The socket by which minivmm follows the guest.
    pub socket: RawFd,
    /// A file with [`MONITOR`].
    pub config: RawFd,
    /// The socket of the console, if that is minivmm's to show.
    pub console: Option<RawFd>,
}

/// The monitor, for a machine of ARGS: with -mon QEMU would not make those that it has by default.
pub(super) const MONITOR: &str = "\
[mon \"minivmm-control\"]
  chardev = \"minivmm-control\"
  mode = \"control\"
";

/// Everything that QEMU's command line depends on.
#[derive(Debug)]
pub(super) struct Line<'a> {
    /// The guest of the native monitor, but for its NICs.
    pub machine: Option<&'a Config>,
    /// Ctrl-A is the monitor's key: stdin is a terminal, and ours to read.
    pub keys: bool,
    pub engine: Option<Engine>,
    pub nics: &'a [NetDevice],
    /// minivmm's monitor.
    pub control: Option<Control>,
    /// Of what is served outside QEMU.
    pub extras: &'a [OsString],
    pub args: &'a [OsString],
}

impl Line<'_> {
    /// The arguments. ARGS come after the machine, so that they can change it. QEMU places devices in order, so NICs
    /// with a slot come before ARGS, whose devices then take others, and the rest after them: on buses of ARGS, or
    /// wherever ARGS leave room.
    pub fn build(&self) -> Vec<OsString> {
        let mut line = Vec::new();
        if let Some(machine) = self.machine {
            machine_args(&mut line, machine);
            // The guest that minivmm follows is reset by minivmm, once it has seen that it has not panicked.
            if self.control.is_some() || machine.reboot == Reboot::Exit {
                push(&mut line, &["-no-reboot"]);
            }
            line.extend(["-serial".into(), self.serial(machine)]);
            if !has_option(self.args, &["cpu"]) {
                // Hidden is what the host's KVM would run. QEMU's own SVM is emulated like all else, and a CPU of TCG's
                // that is to do without it does not run Linux (QEMU 7.2: readlink(2) fails in its processes).
                let hide = !machine.nested && self.engine == Some(Engine::Kvm);
                let hidden = if hide { ",-vmx,-svm" } else { "" };
                push(&mut line, &["-cpu", &format!("max{hidden}")]);
            }
        }
        if let Some(engine) = self.engine {
            push(&mut line, &["-accel", engine.name()]);
        }
        if let Some(Control {
            socket,
            config,
            console,
        }) = self.control
        {
            if let Some(fd) = console {
                let socket = format!("socket,id=minivmm-console,fd={fd}");
                push(&mut line, &["-chardev", &socket]);
            }
            let socket = format!("socket,id=minivmm-control,fd={socket}");
            push(&mut line, &["-chardev", &socket]);
            push(
                &mut line,
                &["-readconfig", &format!("/proc/self/fd/{config}")],
            );
        }
        if self.control.is_some() && self.machine.is_some() {
            // The guest is paused at its end, until minivmm has seen why.
            push(&mut line, &["-no-shutdown"]);
        }
        let (first, last): (Vec<_>, Vec<_>) = self.nics.iter().partition(|nic| has_slot(nic));
        first
            .into_iter()
            .for_each(|nic| self.push_nic(&mut line, nic));
        line.extend_from_slice(self.args);
        last.into_iter()
            .for_each(|nic| self.push_nic(&mut line, nic));
        line.extend_from_slice(self.extras);
        if let Some(machine) = self.machine {
            own_devices(&mut line, machine);
        }
        line
    }

    /// Where the serial port is. A script has no minivmm that would show it.
    fn serial(&self, machine: &Config) -> OsString {
        if self
            .control
            .is_some_and(|control| control.console.is_some())
        {
            return "chardev:minivmm-console".into();
        }
        match &machine.console {
            ConsoleTarget::Stdio if self.keys => "mon:stdio".into(),
            ConsoleTarget::Stdio => "stdio".into(),
            ConsoleTarget::None => "none".into(),
            ConsoleTarget::File(path) => {
                let mut file = OsString::from("file:");
                file.push(path);
                file
            }
        }
    }

    fn push_nic(&self, line: &mut Vec<OsString>, nic: &NetDevice) {
        push(line, &["-netdev", &netdev(nic)]);
        if let Some(properties) = &nic.device {
            let device = device(nic, properties, self.machine.is_some());
            push(line, &["-device", &device]);
        }
    }
}

/// Whether ARGS have one of these options, which QEMU takes with one or two dashes.
pub(super) fn has_option(args: &[OsString], names: &[&str]) -> bool {
    args.iter()
        .any(|arg| option(arg).is_some_and(|name| names.contains(&name)))
}

/// The name of an option of QEMU's.
pub(super) fn option(arg: &OsString) -> Option<&str> {
    let name = arg.to_str()?.strip_prefix('-')?;
    Some(name.strip_prefix('-').unwrap_or(name)).filter(|name| !name.is_empty())
}

fn push(line: &mut Vec<OsString>, args: &[&str]) {
    line.extend(args.iter().map(OsString::from));
}

fn machine_args(line: &mut Vec<OsString>, machine: &Config) {
    push(line, &["-nodefaults", "-no-user-config", "-M", "q35"]);
    push(line, &["-display", "none"]);
    push(line, &["-smp", &machine.cpus.get().to_string()]);
    push(line, &["-m", &machine.memory.to_string()]);
    if machine.hugepages || machine.shares_memory() {
        let mut backend = format!("memory-backend-memfd,id=ram,size={}", machine.memory);
        if machine.hugepages {
            backend += ",hugetlb=on,hugetlbsize=2M";
        }
        if machine.shares_memory() {
            backend += ",share=on";
        }
        // A node is the one way to name the memory's backend that every QEMU takes.
        push(line, &["-object", &backend, "-numa", "node,memdev=ram"]);
    }
    line.push("-kernel".into());
    line.push(machine.kernel.clone().into());
    if let Some(initrd) = &machine.initrd {
        line.push("-initrd".into());
        line.push(initrd.clone().into());
    }
    push(line, &["-append", &machine.whole_cmdline()]);
    for (n, disk) in machine.disks.iter().enumerate() {
        push_disk(line, n, disk);
    }
}

/// A disk as the native monitor has it, but for backing=, which QEMU believes the image, and burst=: what may exceed a
/// rate is a tenth of a second's worth there.
fn push_disk(line: &mut Vec<OsString>, n: usize, disk: &DiskConfig) {
    let image = &disk.image;
    let format = match image.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let mut drive = OsString::from(format!("if=none,id=disk{n},format={format},discard=unmap"));
    let mut add = |text: &str| drive.push(text);
    for (is_on, text) in [
        (image.readonly, ",readonly=on"),
        (image.ephemeral, ",snapshot=on"),
        (image.direct, ",cache.direct=on"),
        (disk.io == IoChoice::Threads, ",aio=threads"),
        (disk.io == IoChoice::Uring, ",aio=io_uring"),
    ] {
        if is_on {
            add(text);
        }
    }
    for (key, limit) in [("iops", disk.limit.iops), ("bps", disk.limit.bandwidth)] {
        if let Some(limit) = limit {
            add(&format!(",throttling.{key}-total={limit}"));
        }
    }
    add(",file=");
    drive.push(filename(&image.path));
    line.extend(["-drive".into(), drive]);
    let mut device = format!("virtio-blk-pci,drive=disk{n},num-queues={}", disk.queues);
    if !disk.serial.as_str().is_empty() {
        device += &format!(",serial={}", disk.serial.as_str());
    }
    push(line, &["-device", &device]);
}

/// A path as QEMU takes it for a file's: a comma is doubled, and what is before a colon is no protocol.
fn filename(path: &Path) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    let colon = bytes.iter().position(|&byte| byte == b':');
    let slash = bytes.iter().position(|&byte| byte == b'/');
    let is_protocol = colon.is_some_and(|colon| slash.is_none_or(|slash| colon < slash));
    let mut name = OsString::from(if is_protocol { "./" } else { "" });
    name.push(escaped(path));
    name
}

/// A path as a property's value.
pub(super) fn escaped(path: &Path) -> OsString {
    let mut name = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        name.push(byte);
        if byte == b',' {
            name.push(byte);
        }
    }
    OsString::from_vec(name)
}

/// The devices that take nothing of the host's, in the places that all others leave.
fn own_devices(line: &mut Vec<OsString>, machine: &Config) {
    if machine.rng {
        // From QEMU's own generator, which is the host's, and no more a second than natively.
        let device = "virtio-rng-pci,max-bytes=1048576,period=1000";
        push(line, &["-device", device]);
    }
    if machine.balloon.is_some() {
        // What it holds back from the start is asked for by QMP.
        let device = "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on";
        push(line, &["-device", device]);
    }
}

/// Whether the NIC has a slot of its own on the machine's first bus, which is there before any device.
fn has_slot(nic: &NetDevice) -> bool {
    let get = |wanted| {
        let mut properties = nic.device.iter().flatten();
        properties.find(|(key, _)| key == wanted)
    };
    get("addr").is_some() && get("bus").is_none_or(|(_, bus)| bus == "pcie.0" || bus == "pci.0")
}

/// Nothing else goes with fd=: QEMU refuses script=, downscript= and ifname= there.
fn netdev(nic: &NetDevice) -> String {
    let (fds, vhost) = (numbers(&nic.fds), numbers(&nic.vhost));
    let plural = if nic.fds.len() > 1 { "s" } else { "" };
    let mut text = format!("tap,id={},fd{plural}={fds}", nic.id);
    if !vhost.is_empty() {
        text += &format!(",vhost=on,vhostfd{plural}={vhost}");
    }
    text
}

fn numbers(fds: &[RawFd]) -> String {
    let texts: Vec<_> = fds.iter().map(RawFd::to_string).collect();
    texts.join(":")
}

/// The NIC with the user's properties, and ours where the user has none. A guest whose kernel is given (`direct`) needs
/// no network boot from the NIC's ROM.
fn device(nic: &NetDevice, properties: &[(String, String)], direct: bool) -> String {
    let mut all = vec![
        ("netdev".to_owned(), nic.id.clone()),
        ("mac".to_owned(), nic.mac.to_string()),
    ];
    let mut default = |key: &str, value: String| {
        if !properties.iter().any(|(given, _)| given == key) {
            all.push((key.to_owned(), value));
        }
    };
    if nic.fds.len() > 1 {
        default("mq", "on".into());
        // One for each direction of each queue, one for the control queue, one for the configuration.
        default("vectors", (2 * nic.fds.len() + 2).to_string());
    }
    if nic.mtu != USUAL_MTU {
        default("host_mtu", nic.mtu.to_string());
    }
    if direct {
        default("romfile", String::new());
    }
    all.extend_from_slice(properties);
    all.iter()
        .fold("virtio-net-pci".to_owned(), |text, (key, value)| {
            text + &format!(",{key}={value}")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic() -> NetDevice {
        NetDevice {
            id: "macvtap0".into(),
            fds: vec![3],
            vhost: vec![],
            mac: "52:54:00:12:34:56".parse().unwrap(),
            mtu: 1500,
            device: Some(vec![]),
        }
    }

    fn line(nics: &[NetDevice], args: &[&str]) -> Vec<String> {
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        let line = Line {
            machine: None,
            keys: true,
            engine: None,
            nics,
            control: None,
            extras: &[],
            args: &args,
        };
        let text = |arg: OsString| arg.into_string().unwrap();
        line.build().into_iter().map(text).collect()
    }

    #[test]
    fn line_without_a_kernel_is_args_untouched_and_the_nic() {
        assert_eq!(
            line(&[nic()], &["-M", "q35", "disk.qcow2"]),
            [
                "-M",
                "q35",
                "disk.qcow2",
                "-netdev",
                "tap,id=macvtap0,fd=3",
                "-device",
                "virtio-net-pci,netdev=macvtap0,mac=52:54:00:12:34:56"
            ]
        );
    }

    #[test]
    fn machine_of_args_ends_by_itself_though_minivmm_has_a_monitor() {
        let control = Control {
            socket: 3,
            config: 4,
            console: None,
        };
        let args = ["-M".into(), "q35".into()];
        let line = Line {
            machine: None,
            keys: true,
            engine: None,
            nics: &[],
            control: Some(control),
            extras: &[],
            args: &args,
        };
        let expected = "-chardev socket,id=minivmm-control,fd=3 -readconfig /proc/self/fd/4 -M q35";
        let expected: Vec<_> = expected.split(' ').map(OsString::from).collect();
        assert_eq!(line.build(), expected);
    }

    #[test]
    fn line_has_the_devices_keys() {
        let properties = [("bus", "pcie.0"), ("addr", "0x4"), ("id", "nic2")];
        let properties = properties.map(|(k, v)| (k.to_owned(), v.to_owned()));
        let nic = NetDevice {
            device: Some(properties.to_vec()),
            ..nic()
        };
        let line = line(&[nic], &[]);
        let device =
            "virtio-net-pci,netdev=macvtap0,mac=52:54:00:12:34:56,bus=pcie.0,addr=0x4,id=nic2";
        assert_eq!(line.last().unwrap(), device);
    }

    #[test]
    fn line_has_nics_with_a_slot_first_and_those_on_a_bus_of_args_last() {
        for (properties, position) in [
            (vec![("addr", "0x4")], 3),
            (vec![("bus", "pcie.0"), ("addr", "0x4")], 3),
            (vec![("bus", "port1"), ("addr", "0x0")], 7),
            (vec![("bus", "pcie.0")], 7),
        ] {
            let properties = properties.into_iter();
            let nic = NetDevice {
                device: Some(properties.map(|(k, v)| (k.into(), v.into())).collect()),
                ..nic()
            };
            let args = ["-device", "qemu-xhci", "-device", "usb-tablet"];
            let line = line(&[nic], &args);
            assert!(line[position].starts_with("virtio-net-pci"), "{line:?}");
        }
    }

    #[test]
    fn line_of_several_queues_has_their_vectors() {
        let nic = NetDevice {
            fds: vec![3, 4, 5],
            vhost: vec![6, 7, 8],
            mtu: 9000,
            ..nic()
        };
        let line = line(&[nic], &[]);
        assert_eq!(line[1], "tap,id=macvtap0,fds=3:4:5,vhost=on,vhostfds=6:7:8");
        assert_eq!(
            line[3],
            "virtio-net-pci,netdev=macvtap0,mac=52:54:00:12:34:56,mq=on,vectors=8,host_mtu=9000"
        );
    }

    #[test]
    fn line_of_one_queue_never_has_plurals() {
        let nic = NetDevice {
            vhost: vec![4],
            ..nic()
        };
        assert_eq!(
            line(&[nic], &[])[1],
            "tap,id=macvtap0,fd=3,vhost=on,vhostfd=4"
        );
    }

    #[test]
    fn line_with_the_device_in_args_has_the_netdev_alone() {
        let nic = NetDevice {
            device: None,
            ..nic()
        };
        let line = line(&[nic], &["-device", "e1000e,netdev=macvtap0"]);
        assert_eq!(line.len(), 4);
    }

    #[test]
    fn line_of_a_kernel_has_its_disks() {
        let mut machine = Config::new("bzImage");
        for disk in [
            "a:b,,c.qcow2,readonly=on,direct=on,serial=x,queues=2",
            "/d:e.img,ephemeral=on,io=uring,iops=5,bandwidth=1K",
        ] {
            machine.disks.push(disk.parse().unwrap());
        }
        let mut line = Vec::new();
        machine_args(&mut line, &machine);
        let at = line.iter().position(|arg| arg == "-drive").unwrap();
        assert_eq!(
            line[at..at + 8],
            [
                "-drive",
                "if=none,id=disk0,format=qcow2,discard=unmap,readonly=on,cache.direct=on,file=./a:b,,c.qcow2",
                "-device",
                "virtio-blk-pci,drive=disk0,num-queues=2,serial=x",
                "-drive",
                "if=none,id=disk1,format=raw,discard=unmap,snapshot=on,aio=io_uring,throttling.iops-total=5,\
                 throttling.bps-total=1024,file=/d:e.img",
                "-device",
                "virtio-blk-pci,drive=disk1,num-queues=1",
            ]
        );
    }

    #[test]
    fn line_of_a_kernel_is_a_whole_machine_that_args_may_change() {
        let machine = Config {
            initrd: Some("initrd".into()),
            cmdline: "quiet".into(),
            cpus: "2".parse().unwrap(),
            memory: "1G".parse().unwrap(),
            ..Config::new("bzImage")
        };
        let balloon = Config {
            balloon: "256M".parse().ok(),
            ..machine.clone()
        };
        let mut line = Line {
            machine: Some(&machine),
            keys: true,
            engine: Some(Engine::Tcg),
            nics: &[nic()],
            control: None,
            extras: &[],
            args: &[],
        };
        let expected = "-nodefaults -no-user-config -M q35 -display none -smp 2 -m 1G -kernel bzImage \
             -initrd initrd -append console=ttyS0+reboot=panic_warm+panic=-1+cryptomgr.notests+quiet -no-reboot \
             -serial mon:stdio -cpu max -accel tcg -netdev tap,id=macvtap0,fd=3 \
             -device virtio-net-pci,netdev=macvtap0,mac=52:54:00:12:34:56,romfile= \
             -device virtio-rng-pci,max-bytes=1048576,period=1000";
        let expected: Vec<_> = expected
            .split_whitespace()
            .map(|word| OsString::from(word.replace('+', " ")))
            .collect();
        assert_eq!(line.build(), expected);
        line.machine = Some(&balloon);
        let last = line.build().pop();
        let device = "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on";
        assert_eq!(last, Some(device.into()));
        let huge = Config {
            hugepages: true,
            nested: true,
            ..machine.clone()
        };
        line.machine = Some(&huge);
        let built = line.build();
        let backend = "memory-backend-memfd,id=ram,size=1G,hugetlb=on,hugetlbsize=2M";
        assert!(built.contains(&backend.into()));
        assert!(built.contains(&"node,memdev=ram".into()));
        assert!(built.contains(&"max".into()));
        let args = ["-cpu", "Skylake-Client"].map(OsString::from);
        line.args = &args;
        line.nics = &[];
        line.control = Some(Control {
            socket: 4,
            config: 5,
            console: Some(6),
        });
        let without = Config {
            rng: false,
            ..machine.clone()
        };
        line.machine = Some(&without);
        let built = line.build();
        assert!(!built.contains(&"max,-vmx,-svm".into()));
        assert!(built.contains(&"-no-shutdown".into()));
        assert!(built.contains(&"socket,id=minivmm-control,fd=4".into()));
        assert!(built.contains(&"/proc/self/fd/5".into()));
        assert!(built.contains(&"socket,id=minivmm-console,fd=6".into()));
        assert!(built.contains(&"chardev:minivmm-console".into()));
        assert!(built.ends_with(&args));
    }
}
