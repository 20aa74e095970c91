//! From a config to a guest that has ended.

pub mod load;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Instant;

use devices::irq::IrqLine;
use devices::serial::Serial;
use devices::virtio::balloon::BalloonHandle;
use devices::virtio::rng::Rng;
use devices::virtio::vsock::VsockHandle;
use event_manager::MutEventSubscriber;
use net::HostLinkGuard;
use vm_memory::GuestMemoryMmap;

use self::load::Loader;
use crate::config::{Config, ConsoleTarget};
use crate::control::event_loop::{CaughtSignals, Control, SharedControl};
use crate::control::exit::{Exit, ExitRequest};
use crate::control::handle::{Handle, Requests};
use crate::control::reset::{ResetRequest, Resets, Restart};
use crate::disk::Disk;
use crate::events::start::Start;
use crate::events::writer::EventWriter;
use crate::events::{Event, EventHub};
use crate::instance::InstanceError;
use crate::kvm::barrier::Barrier;
use crate::kvm::cpuid::CpuModel;
use crate::kvm::guest::KvmGuest;
use crate::kvm::vcpu::{DeviceBuses, NewVcpu};
use crate::kvm::vcpus::Vcpus;
use crate::kvm::vm::{Hypervisor, Vm, VmError};
use crate::machine::{Machine, MachineError};
use crate::memory::{GuestRam, MemoryError, Sharing};
use crate::nic::devices::NetDevices;
use crate::nic::{Inherited, NicError};
use crate::plan::{Plan, TooManyDevices};
use crate::qmp::commands::Native;
use crate::qmp::server::Server;
use crate::qmp::socket::Listener;
use crate::resources::{Opened, ResourceError, Resources};
use crate::service::Services;
use crate::shares;
use crate::tty::RawTerminal;
use crate::tty::console;
use crate::tty::output::Output;
use crate::tty::server::{Server as ConsoleServer, ToSerial};
use crate::vsock::VsockError;
use crate::{balloon, disk, vsock};

/// Why a guest could not be started or kept running.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine cannot be laid out.
    #[error(transparent)]
    Plan(#[from] TooManyDevices),
    /// The guest cannot have its name.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The host does not give something.
    #[error(transparent)]
    Resources(#[from] ResourceError),
    /// The guest cannot have its sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The kernel cannot be loaded.
    #[error("cannot load the kernel {0:?}")]
    Kernel(PathBuf, #[source] boot::kernel::Error),
    /// The initrd cannot be loaded.
    #[error("cannot load the initrd {0:?}")]
    Initrd(PathBuf, #[source] boot::initrd::Error),
    /// The rest of what a guest boots with cannot be prepared.
    #[error(transparent)]
    Boot(boot::Error),
    /// There is no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refuses something.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A device cannot be added.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
    /// The host refuses something small.
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

impl Error {
    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Instance(error) => error.remedy(),
            Self::Resources(ResourceError::Disk(error)) => error.remedy(),
            Self::Resources(ResourceError::Share(error)) => error.remedy(),
            Self::Resources(ResourceError::Kvm(error)) | Self::Vm(error) => {
                error.remedy().map(str::to_owned)
            }
            Self::Resources(ResourceError::Nic(NicError::UserNet(error))) => error.remedy(),
            _ => net::remedy(self),
        }
    }
}

fn failed_to(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::Host(what, error)
}

/// Boots the guest and waits for its end, on this thread, which becomes its control thread:
/// `started` gets what other threads ask that by, and `settled` is called once the guest has usually
/// booted, and some time after whatever else this thread has had to do. The first of `signals`
/// presses the guest's power button, the second ends it. Whatever was taken from the host has been
/// given back when this returns.
pub fn run(
    began: Instant,
    config: Config,
    mut inherited: Inherited,
    signals: &[libc::c_int],
    started: impl FnOnce(Handle) -> io::Result<()>,
    settled: fn(),
) -> Result<Exit, Error> {
    let plan = Plan::new(
        config.cpus.get(),
        config.transport,
        config.virtio_devices(),
        config.console.has_port(),
    )?;
    let start = Start::new(began);
    let mut opened = Opened::open(&config, &mut inherited)?;
    start.note(|stages| &mut stages.opened);
    let file = opened.events.take();
    let writer = file.map(|(file, place)| EventWriter::start(file, place, &start.events));
    // Waits at the end until the last event is written.
    let _writer = writer
        .transpose()
        .map_err(failed_to("start the events' thread"))?;
    let planned = (config, plan);
    let end = run_opened(
        &start, planned, inherited, opened, signals, started, settled,
    );
    start.events.publish(Event::of_end(&end));
    end
}

/// The same with its files open.
fn run_opened(
    start: &Start,
    (config, plan): (Config, Plan),
    inherited: Inherited,
    mut opened: Opened,
    signals: &[libc::c_int],
    started: impl FnOnce(Handle) -> io::Result<()>,
    settled: fn(),
) -> Result<Exit, Error> {
    let qmp = std::mem::take(&mut opened.qmp);
    let console_socket = opened.console_socket.take();
    let sharing = match config.shares_memory() {
        true => Sharing::Shared,
        false => Sharing::Private,
    };
    let ram = GuestRam::map(config.memory, config.hugepages, sharing)?;
    start.note(|stages| &mut stages.memory);
    let (requests, handle) = Requests::new().map_err(failed_to("create an eventfd"))?;
    let planned = (&config, &plan);
    let mut built = build(start, planned, inherited, opened, ram.memory(), &handle)?;

    let exit = Arc::clone(&built.buses.exit);
    let signals = CaughtSignals::catch(signals, config.grace());
    let signals = signals.map_err(failed_to("catch signals"))?;
    let console_server = console_socket.map(|socket| serve_console(socket, &built));
    let console_server = console_server.transpose()?.flatten();
    let _terminal = connect_stdio(&config.console, built.serial, &exit)?;
    start.note(|stages| &mut stages.vcpus);
    // Before the guest causes other events.
    let nics = std::mem::take(&mut built.net_devices.started);
    start.publish(config.name.clone(), nics);
    let vcpus = Vcpus::start(built.kvm, built.barrier, Arc::clone(&exit))
        .map_err(failed_to("start the vCPUs' threads"))?;
    let events = &start.events;
    let mut control = Control::new(
        vcpus,
        built.buses,
        built.power_button,
        signals,
        requests,
        Arc::clone(events),
    )
    .map_err(failed_to("create a timer"))?;
    control.name = config.name.clone();
    control.disks = built.disks;
    control.nics = built.net_devices.handles.clone();
    control.user_nets = std::mem::take(&mut built.net_devices.user_nets);
    control.balloon = built.balloon;
    control.vsock = built.vsock.as_ref().map(|(handle, _)| handle.clone());
    let resets = |restart| Resets::new(restart, handle.clone());
    control.resets = built.restart.map(resets);
    let control = Rc::new(RefCell::new(control));
    let mut others = built.net_devices.followers(events);
    others.extend(followers(&config, &control, qmp, events)?);
    for service in built.services.iter().chain(&built.net_devices.passts) {
        others.push(Box::new(Rc::clone(service)));
    }
    if let Some(server) = &console_server {
        others.push(Box::new(Rc::clone(server)));
    }
    started(handle).map_err(failed_to("say that the guest runs"))?;
    Control::run(control, others, settled).map_err(failed_to("wait for events"))?;
    // With the control thread's share of the buses the devices' threads have ended; only then are
    // the macvtaps deleted, and the programs ended that have the guest's last frames.
    drop((
        built.services,
        built.net_devices.passts,
        built.net_devices.guards,
        built.host_link,
        built.vsock,
    ));
    if let Some(server) = console_server.and_then(Rc::into_inner) {
        server.into_inner().finish();
    }
    if let Some(console) = built.console {
        console.lost().log();
    }
    Ok(exit.reason().cloned().unwrap_or(Exit::Quit))
}

/// What follows the balloon and serves QMP's sockets, if the guest has them.
fn followers(
    config: &Config,
    control: &SharedControl,
    qmp: Vec<Listener>,
    events: &Arc<EventHub>,
) -> Result<Vec<Box<dyn MutEventSubscriber>>, Error> {
    let mut all: Vec<Box<dyn MutEventSubscriber>> = Vec::new();
    if let Some(balloon) = &control.borrow().balloon {
        let memory = config.memory.bytes();
        let follower = balloon::Follower::new(balloon.clone(), memory, Arc::clone(events));
        all.push(Box::new(follower.map_err(failed_to("create a timer"))?));
    }
    if !qmp.is_empty() {
        let native = Box::new(Native(Rc::clone(control)));
        let server = Server::new(qmp, events, native);
        all.push(Box::new(server.map_err(failed_to("serve QMP"))?));
    }
    Ok(all)
}

/// A guest that is ready to run. It is dropped in this order: with the buses the devices' threads
/// end, and only then are the macvtaps deleted.
struct Built {
    kvm: Arc<KvmGuest>,
    barrier: Arc<Barrier>,
    restart: Option<Restart>,
    buses: Arc<DeviceBuses>,
    power_button: IrqLine,
    serial: Option<Arc<Mutex<Serial>>>,
    console: Option<Arc<Output>>,
    disks: Vec<Disk>,
    balloon: Option<BalloonHandle>,
    /// Its counters, and the socket whose file is removed at the end.
    vsock: Option<(VsockHandle, Listener)>,
    services: Services,
    net_devices: NetDevices,
    host_link: Option<HostLinkGuard>,
}

/// Makes the guest. Its NICs, KVM's part and its kernel take about as long as each other and need
/// nothing of each other, so they are made side by side. When several of them fail, the error is
/// of the first in this order.
fn build(
    start: &Start,
    (config, plan): (&Config, &Plan),
    inherited: Inherited,
    opened: Opened,
    memory: &Arc<GuestMemoryMmap>,
    control: &Handle,
) -> Result<Built, Error> {
    let hypervisor = opened.hypervisor;
    let mut loader = Loader::new(config, plan, opened.kernel, opened.initrd);
    let cpus = usize::from(config.cpus.get());
    let barrier = Arc::new(Barrier::new(cpus).map_err(failed_to("create an eventfd"))?);
    thread::scope(|scope| {
        let vm = beside(scope, "kvm", || {
            let vm = create_vm(config, hypervisor, memory);
            start.note(|stages| &mut stages.machine);
            vm
        })?;
        let boot = beside(scope, "boot", move || {
            let boot = loader.load(memory);
            start.note(|stages| &mut stages.kernel);
            boot.map(|boot| (boot, loader))
        })?;
        let host = Resources::make(config, inherited, opened.outputs)?;
        start.note(|stages| &mut stages.network);
        let (vm, vcpus) = join(vm)?;
        let exit = Arc::new(ExitRequest::new().map_err(failed_to("create an eventfd"))?);
        let console = host.console.map(|file| output(file, config, &exit));
        let console = console.transpose()?;
        let reset = ResetRequest::of(config, &barrier, control);
        let (memory, events) = (Arc::clone(memory), Arc::clone(&start.events));
        let mut machine = Machine::new(&vm, memory, exit, reset, console.clone(), events, plan)?;
        let serial = machine.add_serial()?;
        let power_button = machine.add_power_button()?;
        let disks = disk::add(&mut machine, &config.disks, opened.disks)?;
        let net_devices = NetDevices::add(&mut machine, host.nics)?;
        let services = shares::add(&mut machine, &config.shares, opened.shares)?;
        if config.rng {
            machine.add_new(Rng::new("rng", machine.event_sink("rng")))?;
        }
        let balloon = config.balloon.map(|size| balloon::add(&mut machine, size));
        let balloon = balloon.transpose()?;
        let vsock = opened.vsock.map(|socket| vsock::add(&mut machine, socket));
        let vsock = vsock.transpose()?;
        let buses = Arc::new(machine.finish()?);
        start.note(|stages| &mut stages.devices);
        let kvm = Arc::new(KvmGuest::new(vm, vcpus, &buses));
        let (boot, loader) = join(boot)?;
        let restart = Restart::of(config, loader, &kvm, &buses)?;
        kvm.enter_at(&boot)?;
        Ok(Built {
            kvm,
            barrier,
            restart,
            buses,
            power_button,
            serial,
            console,
            disks,
            balloon,
            vsock,
            services,
            net_devices,
            host_link: host.host_link,
        })
    })
}

fn output(file: File, config: &Config, exit: &Arc<ExitRequest>) -> Result<Arc<Output>, Error> {
    let output = Output::new(file, config.console.place(), Arc::clone(exit));
    output.map(Arc::new).map_err(failed_to("create a timer"))
}

/// Starts `work` on a thread of its own, whose end the scope waits for whatever else fails.
fn beside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Error> {
    let thread = thread::Builder::new().name(name.to_owned());
    thread
        .spawn_scoped(scope, work)
        .map_err(failed_to("start a thread"))
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Serves the console's socket, if the machine has a serial port.
fn serve_console(
    socket: Listener,
    built: &Built,
) -> Result<Option<Rc<RefCell<ConsoleServer>>>, Error> {
    let (Some(serial), Some(console)) = (&built.serial, &built.console) else {
        return Ok(None);
    };
    let input = ToSerial::new(Arc::clone(serial)).map_err(failed_to("create an eventfd"))?;
    let transcript = Arc::clone(console.transcript());
    let server = ConsoleServer::new(socket, transcript, Box::new(input));
    Ok(Some(Rc::new(RefCell::new(server))))
}

/// Connects a serial port whose console is stdio with the terminal there, or whatever it is.
fn connect_stdio(
    console: &ConsoleTarget,
    serial: Option<Arc<Mutex<Serial>>>,
    exit: &Arc<ExitRequest>,
) -> Result<Option<RawTerminal>, Error> {
    let Some(serial) = serial.filter(|_| *console == ConsoleTarget::Stdio) else {
        return Ok(None);
    };
    let terminal = RawTerminal::enter().map_err(failed_to("set up the terminal"))?;
    let push = move |input: &[u8]| {
        let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
        serial.push_input(input)
    };
    console::spawn_input(push, Arc::clone(exit), terminal.is_some())
        .map_err(failed_to("start the console's thread"))?;
    Ok(terminal)
}

/// The VM with its vCPUs. Of KVM's part, finding out what it supports of CPUID takes the longest.
fn create_vm(
    config: &Config,
    hypervisor: Hypervisor,
    memory: &Arc<GuestMemoryMmap>,
) -> Result<(Vm, Vec<NewVcpu>), VmError> {
    let vm = Vm::new(hypervisor, Arc::clone(memory))?;
    let (supported, tsc_deadline) = vm.supported_cpuid()?;
    let model = CpuModel {
        count: config.cpus.get(),
        tsc_deadline,
        nested: config.nested,
    };
    let create = |id| {
        let cpuid = model.vcpu(&supported, id).map_err(VmError::Cpuid)?;
        NewVcpu::create(&vm, id, &cpuid)
    };
    let vcpus = (0..config.cpus.get()).map(create);
    let vcpus = vcpus.collect::<Result<_, _>>()?;
    Ok((vm, vcpus))
}
